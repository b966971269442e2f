"""Super-resolution by interpolation, with the exact bytes of Pillow's `Image.resize`."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

KERNELS = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}


def none(images: np.ndarray, scale: int) -> np.ndarray:
    """The images unchanged. Raises ValueError for any scale but 1."""
    if scale != 1:
        raise ValueError(f"method none keeps the size, so scale must be 1, got {scale}")
    return images


def bicubic(images: np.ndarray, scale: int) -> np.ndarray:
    """uint8 [B, H, W(, 3)] -> uint8 [B, H*scale, W*scale(, 3)] by cubic convolution, a = -0.5."""
    return _enlarged(images, scale, KERNELS["bicubic"])


def lanczos(images: np.ndarray, scale: int) -> np.ndarray:
    """uint8 [B, H, W(, 3)] -> uint8 [B, H*scale, W*scale(, 3)] by a windowed sinc of radius 3 pixels."""
    return _enlarged(images, scale, KERNELS["lanczos"])


def _enlarged(images: np.ndarray, scale: int, kernel: Image.Resampling) -> np.ndarray:
    if scale < 1:
        raise ValueError(f"scale must be a whole number of at least 1, got {scale}")
    return resize(images, images.shape[1] * scale, images.shape[2] * scale, kernel)


def resize(images: np.ndarray, height: int, width: int, kernel: Image.Resampling) -> np.ndarray:
    """uint8 [B, H, W(, 3)] -> uint8 [B, height, width(, 3)].

    One thread per core, as Pillow releases the interpreter lock while it resizes.
    """
    count, channels = len(images), images.shape[3:]
    out = np.empty((count, height, width, *channels), np.uint8)

    def fill(rows: range) -> None:
        for row in rows:
            out[row] = resize_one(images[row], height, width, kernel)

    workers = max(1, min(os.cpu_count() or 1, count))
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(fill, [range(first, count, workers) for first in range(workers)]))
    return out


def resize_one(image: np.ndarray, height: int, width: int, kernel: Image.Resampling) -> np.ndarray:
    """uint8 [H, W(, 3)] -> uint8 [height, width(, 3)]."""
    return np.asarray(Image.fromarray(image).resize((width, height), kernel))
