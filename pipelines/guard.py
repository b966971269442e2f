"""A small process that outlives the driver: when that is gone, it kills its processes and closes its runs."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

from pipelines.processes import MARK, mark_children

_told: list[IO[bytes]] = []  # stdin of this process's guard, while it has one


@contextmanager
def guarded() -> Iterator[None]:
    """Watch over this process inside the block, before it starts others; a block inside another does nothing."""
    if _told:
        yield
        return
    mark_children()
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.guard"],
        stdin=subprocess.PIPE,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin
    _told.append(process.stdin)
    try:
        yield
    finally:
        _told.clear()
        process.kill()
        process.wait()
        process.stdin.close()


def close_runs(uri: str, experiment: str) -> None:
    """Tell the guard where to close the runs of this process."""
    for stdin in _told:  # not on the command line: a uri may hold a password
        stdin.write(f"{uri}\n{experiment}\n".encode())
        stdin.flush()


def runs_closed() -> None:
    """Tell the guard that this process has closed its runs itself, so that only what it has started is left."""
    for stdin in _told:
        stdin.write(b"\n")
        stdin.flush()


def main() -> None:
    """Wait for the end of stdin, which comes with the driver's; then clean up."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm and systemd send it to every process
    group = os.getpgid(os.getppid())
    runs = sys.stdin.read().splitlines()
    import psutil

    left = set()
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == os.environ[MARK]:
                # a process that sets its own title, as Ray's do, may overwrite its environment: so its parent decides
                left |= {process, *process.children(recursive=True)}
            elif process.name().startswith("ray::") and os.getpgid(process.pid) == group and process.ppid() == 1:
                left.add(process)  # an agent, which survives the raylet that started it by a minute
        except (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError):
            continue
    for process in left - {psutil.Process()}:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    if not runs or not runs[-1]:  # none was begun, or `runs_closed`
        return
    from pipelines.tracking import Tracker  # takes seconds, which a starting driver needs for itself

    Tracker(*runs[:2]).close_abandoned()
    if os.environ.get("PREFECT_API_URL"):  # otherwise the next start does it, on the server that it starts
        from pipelines import flow_page

        flow_page.close_abandoned()


if __name__ == "__main__":
    main()
