"""A small process that outlives a driver however it dies: ends what that started, closes its runs everywhere."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pipelines.processes import MARK


@contextmanager
def guarded(uri: str, experiment: str) -> Iterator[None]:
    """Watch over this process while the block runs; call `processes.mark_children` before anything is started."""
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
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm and systemd send it to every process
    uri, experiment = sys.stdin.read().splitlines()  # ends when the driver is gone
    import psutil

    from pipelines import flow  # which takes seconds that a driver that lives needs for itself
    from pipelines.tracking import Tracker

    left = set()
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == os.environ[MARK]:
                # a process that names itself, as Ray's do, may write over its environment: its parent still tells
                left |= {process, *process.children(recursive=True)}
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    for process in left - {psutil.Process()}:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    flow.close_abandoned(Tracker(uri, experiment))


if __name__ == "__main__":
    main()
