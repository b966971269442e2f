"""A small process that outlives a driver however it dies: ends what the driver started, closes its MLflow runs."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MARK = "FER_DRIVER"  # in the environment of everything that a driver starts: Ray's processes, Prefect's own server


def process_id(pid: int) -> str:
    """`pid:start time`, since a pid alone may be given to another process later; without the time it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return str(pid)
    state, started = fields[0], fields[19]
    return str(pid) if state == "Z" else f"{pid}:{started}"


def alive(process: str) -> bool:
    """Whether the process that had this `process_id` on this machine still runs."""
    pid, _, started = process.partition(":")
    return bool(started) and process_id(int(pid)) == process


def mark_children() -> None:
    """Let every process that this one starts from now on carry its mark."""
    os.environ[MARK] = process_id(os.getpid())


@contextmanager
def guarded(uri: str, experiment: str) -> Iterator[None]:
    """Watch over this process while the block runs; call `mark_children` before anything is started."""
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
    Tracker(uri, experiment).close_abandoned()


if __name__ == "__main__":
    main()
