"""`images.npy`, the images of a data set: uint8 [N, H, W] or [N, H, W, 3], or an index of encoded ones (`encoded`)."""

import os
import shutil
import tokenize
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fer.data.encoded import ROW, Encoded
from fer.errors import UserError

Images = np.ndarray | Encoded  # with dtype, shape, ndim and length; given rows, an array of those images
# what numpy raises on a file that is cut, another one or no file
DAMAGE = (
    EOFError, ValueError, TypeError, SyntaxError, OverflowError, MemoryError, RecursionError,
    tokenize.TokenError, zipfile.BadZipFile,
)  # fmt: skip


def open_images(path: str | Path, stage: str) -> np.memmap | Encoded:
    """The images in `path`, memory-mapped and read-only, or encoded: uint8 [N, H, W] or [N, H, W, 3], N >= 1.

    Raises UserError, which names the stage to run again, if the file is missing, damaged or has another type or shape.
    """
    remedy = f"run `dvc repro --force --single-item {stage}` to make it again"
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run `dvc repro {stage}` to make it or `dvc pull` to fetch it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except DAMAGE:
        raise UserError(f"{path}: damaged or not a .npy file; {remedy}") from None
    if not isinstance(images, np.memmap):
        images.close()
        raise UserError(f"{path}: not a .npy file; {remedy}")
    if images.dtype == ROW and images.ndim == 1:
        return Encoded(Path(path), images, remedy)
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (3,)):
        found = f"{images.dtype} {list(images.shape)}"
        raise UserError(f"{path}: must be uint8 [N, H, W] or [N, H, W, 3], found {found}; {remedy}")
    if 0 in images.shape:
        raise UserError(f"{path}: holds no image; {remedy}")
    return images


def allocate_images(path: Path, shape: tuple[int, ...]) -> None:
    """Write a .npy file of zeros, uint8 `shape`, with all its space reserved on the disk.

    Raises UserError if there is too little free space, OSError if the disk fills up anyway; no file is left then.
    """
    needed = int(np.prod(shape, dtype=np.int64))
    check_room(path, needed)
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
    try:
        with open(path, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            if needed:
                os.posix_fallocate(file.fileno(), file.tell(), needed)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def check_room(path: Path, needed: int) -> None:
    """Raise UserError if fewer than `needed` bytes are free where `path` is to be written."""
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(
            f"cannot write {path}: it takes {needed / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free"
            " (DVC's cache takes as much again): free some space and run the command again"
        )


def write_rows(file: BinaryIO, first: int, images: np.ndarray) -> None:
    """Write uint8 `images` to rows `first`, `first` + 1, ... of an allocated file, open in mode r+b, from its start.

    Several processes may do so at once. Raises ValueError if the images do not fit. Uses plain writes, since a disk
    error under a memory map kills the process without a message.
    """
    np.lib.format.read_magic(file)
    shape, _, _ = np.lib.format.read_array_header_1_0(file)
    if images.shape[1:] != shape[1:] or first + len(images) > shape[0]:
        raise ValueError(f"rows {first} to {first + len(images)} of {images.shape[1:]} do not fit into {shape}")
    file.seek(first * int(np.prod(shape[1:], dtype=np.int64)), os.SEEK_CUR)
    file.write(np.ascontiguousarray(images).data)
    file.flush()
    os.fdatasync(file.fileno())
