"""Processes of this machine: how to identify one, whether it is alive, and which ones a driver has started."""

import hashlib
import os
from functools import cache
from pathlib import Path

MARK = "FER_DRIVER"  # in the environment of everything that a driver starts: Ray's processes, Prefect's own server


def process_id(pid: int) -> str:
    """Names a process of this pid namespace for good; only `pid` if it is gone.

    `pid:start time:boot:namespace:machine`: a pid may be reused, containers may number their processes alike, and share
    a host name with others.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return str(pid)
    state, started = fields[0], fields[19]
    return str(pid) if state == "Z" else ":".join([str(pid), started, *_here()])


@cache
def _here() -> tuple[str, str, str]:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespace = os.readlink("/proc/self/ns/pid").strip("pid:[]")
    known = Path("/etc/machine-id")  # a secret, as its man page says
    machine = hashlib.sha256(known.read_bytes()).hexdigest()[:12] if known.exists() and known.stat().st_size else ""
    return boot, namespace, machine


def alive(process: str) -> bool:
    """Whether the process with this `process_id` is seen to run, from this pid namespace."""
    pid, _, started = process.partition(":")
    return bool(started) and process_id(int(pid)) == process


def ended(process: str) -> bool:
    """Whether the process with this `process_id`, of a host of this name, has certainly ended.

    False for one in another container, which is not seen from here, or on another machine.
    """
    if not process:
        return True
    pid, started, *where = process.split(":")  # of earlier versions without the place
    if where:
        (boot, namespace, machine), here = where, _here()
        if boot != here[0]:
            return machine != "" and machine == here[2]  # rebooted
        if namespace != here[1]:
            return False
    return process_id(int(pid)).split(":")[:2] != [pid, started]


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
