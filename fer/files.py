"""Atomic writes, so that a file or folder is complete or absent, and the lock on a folder that one process works on."""

import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fer.errors import UserError

LOCK = ".lock"  # in a locked folder; names its holder


def write_json(path: Path, content: Any, durable: bool = True) -> None:
    """Replace `path` atomically. Raises ValueError for NaN or infinity, TypeError for what JSON cannot hold."""
    write_bytes(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode(), durable)


def write_bytes(path: Path, content: bytes, durable: bool = True) -> None:
    """Replace `path` atomically; with `durable`, the content survives a power failure once this returns."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        if durable:
            _sync(partial)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    if durable:
        _sync(path.parent)


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def new_folder(target: Path, resumable: bool = False) -> Iterator[Path]:
    """A folder to write to that replaces `target` when the block ends and is deleted when the block fails.

    A kill or a power failure at any point leaves either the old or the new content; `recover` finds it. A `resumable`
    folder is kept on failure unless it is empty, and the next resumable block for this target continues in it.
    """
    recover(target)
    partial, old = _beside(target)
    if not resumable:
        shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            _sync(path)
        if target.exists():
            target.replace(old)
        partial.replace(target)
        _sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if not resumable:
            shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            partial.rmdir()  # if empty


def recover(target: Path) -> bool:
    """Restore the old folder if a process was killed between the two renames; True if `target` exists then."""
    _, old = _beside(target)
    if old.exists():
        if target.exists():
            shutil.rmtree(old)
        else:
            old.replace(target)
    return target.exists()


def refuse_beside(target: Path) -> None:
    """Raises UserError if a user's own file or folder has one of the names that `new_folder` takes for itself."""
    for path in _beside(target):
        if os.path.lexists(path):
            raise UserError(f"{path}: would be replaced while {target.name} is written; move it or delete it")


def _beside(target: Path) -> tuple[Path, Path]:
    return target.with_name(target.name + ".partial"), target.with_name(target.name + ".old")


@contextmanager
def held(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Lock a folder, so that one process at a time works on it; the lock ends with the process.

    Raises UserError if another one still holds it after `patience` seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + patience
    with open(folder / LOCK, "a+") as lock:
        while not _taken(lock, fcntl.LOCK_EX):
            if time.monotonic() >= until:
                lock.seek(0)
                raise UserError(f"{folder}: another process ({lock.read()}) is working on it; wait for it or stop it")
            time.sleep(0.1)
        lock.truncate(0)
        lock.write(f"{os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


def is_held(folder: Path) -> bool:
    """Whether a process works on the folder; of another machine only if the file system shares its locks."""
    try:
        with open(folder / LOCK) as lock:
            return not _taken(lock, fcntl.LOCK_SH)  # shared, so that processes that only look do not see each other
    except FileNotFoundError:
        return False


def _taken(lock: Any, kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
