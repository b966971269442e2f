"""Near duplicates: the same photograph with another watermark, brightness, shift or scale, or mirrored.

Two images are compared by the cosine of their thumbnails of 24x24 pixels without their means. On FER+, of pairs above
.94 all that were looked at were the same photograph (72 of 72), between .93 and .94 13 of 14, between .91 and .92 about
9 of 14.
"""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from fer.data.images import Images

SAME = 0.94  # cosine from which two images count as the same photograph
SIDE = 24  # pixels of a thumbnail
ROWS = 512  # compared at once with all others: bounds memory
AT_ONCE = 2**25  # bytes of images looked at at once: bounds memory as well


def parts(images: Images, rows: np.ndarray) -> Iterator[np.ndarray]:
    """`rows`, some at a time, so that few of the images are in memory at once."""
    size = max(1, AT_ONCE // int(np.prod(images.shape[1:])))
    return (rows[first : first + size] for first in range(0, len(rows), size))


def shrunk(images: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W] or [N, H, W, 3] -> uint8 [N, 24, 24], grey."""
    found = np.empty((len(images), SIDE, SIDE), np.uint8)
    for row, image in enumerate(images):
        found[row] = np.asarray(Image.fromarray(image).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX))
    return found


def thumbnails(images: np.ndarray, mirrored: bool = False) -> np.ndarray:
    """uint8 [N, H, W] or [N, H, W, 3] -> float32 [N, 576], without its mean, of length 1; blank images: zeros."""
    return centred(shrunk(images), mirrored)


def centred(small: np.ndarray, mirrored: bool = False) -> np.ndarray:
    """The `thumbnails` of images that are `shrunk`."""
    found = (small[:, :, ::-1] if mirrored else small).reshape(len(small), SIDE * SIDE).astype(np.float32)
    found -= found.mean(1, keepdims=True)
    length = np.linalg.norm(found, axis=1, keepdims=True)
    return np.divide(found, length, out=found, where=length > 0)


def nearest(queries: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each of the `thumbnails` [M, 576] the most similar one of [N, 576], the first of equals: row and cosine.

    Returns int64 [M] and float32 [M]; without any to compare with, rows of -1 and cosines of -1.
    """
    rows, cosines = np.full(len(queries), -1, np.int64), np.full(len(queries), -1, np.float32)
    if not len(among):
        return rows, cosines
    for first in range(0, len(queries), ROWS):
        part = slice(first, first + ROWS)
        similar = queries[part] @ among.T
        rows[part] = similar.argmax(1)
        cosines[part] = similar.max(1)
    return rows, cosines


def pairs(found: np.ndarray, threshold: float = SAME, mirrored: bool = False) -> np.ndarray:
    """int64 [2, P]: positions i < j of `thumbnails` [N, 576] whose cosine is `threshold` or more.

    `mirrored`: the cosine of the one and the mirror image of the other.
    """
    others = found.reshape(-1, SIDE, SIDE)[:, :, ::-1].reshape(found.shape) if mirrored else found
    links = [np.empty((2, 0), np.int64)]
    for first in range(0, len(found), ROWS):
        here, there = np.nonzero(found[first : first + ROWS] @ others[first:].T >= threshold)
        links.append(np.stack([here, there])[:, here < there] + first)
    return np.concatenate(links, 1)
