"""Atomic writes: a file or folder is written under another name, then renamed, so it is complete or absent."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any, durable: bool = True) -> None:
    """Replace `path` atomically. Raises ValueError for NaN or infinity, TypeError for what JSON cannot hold."""
    write_bytes(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode(), durable)


def write_bytes(path: Path, content: bytes, durable: bool = True) -> None:
    """Replace `path` atomically; with `durable`, the content survives a power failure once this returns."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    if durable:
        _sync(partial)
    os.replace(partial, path)
    if durable:
        _sync(path.parent)


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


def _beside(target: Path) -> tuple[Path, Path]:
    return target.with_name(target.name + ".partial"), target.with_name(target.name + ".old")
