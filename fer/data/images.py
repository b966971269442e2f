"""The one array that holds all images of a data set: `images.npy`, uint8 [N, H, W] or [N, H, W, 3]."""

import hashlib
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fer.errors import UserError


def open_images(path: str | Path, stage: str) -> np.memmap:
    """The array of `path`, memory-mapped and read-only: uint8 [N, H, W] or [N, H, W, 3], N >= 1.

    Raises UserError that names the stage to run again when the file is missing, damaged or of another form.
    """
    remedy = f"run `dvc repro --force --single-item {stage}` to make it again"
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run `dvc repro {stage}` to make it or `dvc pull` to fetch it") from None
    except (ValueError, EOFError, zipfile.BadZipFile):
        raise UserError(f"{path}: damaged or not a .npy file; {remedy}") from None
    if not isinstance(images, np.memmap):
        raise UserError(f"{path}: not a .npy file; {remedy}")
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (3,)):
        found = f"{images.dtype} {list(images.shape)}"
        raise UserError(f"{path}: must be uint8 [N, H, W] or [N, H, W, 3], found {found}; {remedy}")
    if 0 in images.shape:
        raise UserError(f"{path}: holds no image; {remedy}")
    return images


def write_images(path: Path, shape: tuple[int, ...], batches: Iterable[np.ndarray]) -> None:
    """Write `batches` of uint8 images, `shape` all together, as the .npy file that `np.save` would write.

    Plain writes, not a memory map: on a full disk a map kills the process without a word. Raises UserError before
    the first byte where the disk is too small, OSError where it fills up on the way.
    """
    needed, free = int(np.prod(shape, dtype=np.int64)), shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(
            f"cannot write {path}: it takes {needed / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free"
            " (DVC's cache takes as much again): free some space and run the command again"
        )
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for batch in batches:
            file.write(np.ascontiguousarray(batch).data)


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
