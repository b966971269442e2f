"""A small process that outlives the driver: when that is gone, it kills its processes and closes its runs."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pipelines.processes import MARK


@contextmanager
def guarded(uri: str, experiment: str) -> Iterator[None]:
    """Watch over this process inside the block; call `processes.mark_children` before starting other processes."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.guard"],
        stdin=subprocess.PIPE,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin
    process.stdin.write(f"{uri}\n{experiment}".encode())  # not on the command line: a uri may hold a password
    process.stdin.flush()
    try:
        yield
    finally:
        process.kill()
        process.wait()
        process.stdin.close()


def main() -> None:
    """Wait for the end of stdin, which comes with the driver's; then clean up."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm and systemd send it to every process
    uri, experiment = sys.stdin.read().splitlines()
    import psutil

    left = set()
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == os.environ[MARK]:
                # a process that sets its own title, as Ray's do, may overwrite its environment: so its parent decides
                left |= {process, *process.children(recursive=True)}
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    for process in left - {psutil.Process()}:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    from pipelines.tracking import Tracker  # takes seconds, which a starting driver needs for itself

    Tracker(uri, experiment).close_abandoned()
    if os.environ.get("PREFECT_API_URL"):  # otherwise the next start does it, on the server that it starts
        from pipelines import flow_page

        flow_page.close_abandoned()


if __name__ == "__main__":
    main()
