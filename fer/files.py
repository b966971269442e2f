"""Files that are whole or absent: written under another name, then renamed."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any, durable: bool = True) -> None:
    """Replace `path` at once; floats must be finite."""
    write_bytes(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode(), durable)


def write_bytes(path: Path, content: bytes, durable: bool = True) -> None:
    """Replace `path` at once; where `durable`, what is written outlasts a power cut once this returns."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    if durable:
        _sync(partial)
    os.replace(partial, path)
    if durable:
        _sync(path.parent)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def new_folder(target: Path, resumable: bool = False) -> Iterator[Path]:
    """A folder to write in that takes the place of `target` when the block ends, and vanishes when it fails.

    A process killed at any point, or a power cut, leaves the old or the new content, found again by `recover`. A
    `resumable` folder
    does not vanish unless it is empty: the next block for this target goes on in it.
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
    """Put back the old folder where a process was killed between the two renames; True when `target` is there."""
    _, old = _beside(target)
    if old.exists():
        if target.exists():
            shutil.rmtree(old)
        else:
            old.replace(target)
    return target.exists()


def _beside(target: Path) -> tuple[Path, Path]:
    return target.with_name(target.name + ".partial"), target.with_name(target.name + ".old")
