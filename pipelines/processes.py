"""Processes of this machine: how to identify one, whether it is alive, and which ones a driver has started."""

import os
from pathlib import Path

MARK = "FER_DRIVER"  # in the environment of everything that a driver starts: Ray's processes, Prefect's own server


def process_id(pid: int) -> str:
    """`pid:start time`, as a pid alone may be reused; only `pid` if the process is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return str(pid)
    state, started = fields[0], fields[19]
    return str(pid) if state == "Z" else f"{pid}:{started}"


def alive(process: str) -> bool:
    """Whether the process with this `process_id` still runs on this machine."""
    pid, _, started = process.partition(":")
    return bool(started) and process_id(int(pid)) == process


def mark_children() -> None:
    """Mark every process that this one starts from now on as its own."""
    os.environ[MARK] = process_id(os.getpid())


def other_drivers(program: str) -> list[int]:
    """Process ids of other living drivers of this machine that have started `program`."""
    import psutil

    found = set()
    for process in psutil.process_iter():
        try:
            mark = process.environ().get(MARK, "") if process.name() == program else ""
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if mark != os.environ.get(MARK) and alive(mark):
            found.add(int(mark.partition(":")[0]))
    return sorted(found)
