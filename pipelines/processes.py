"""Processes of this machine: which one is meant, whether it lives, and which ones a driver has started."""

import os
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
