"""Pictures of a data set, decoded when they are asked for: upright, cropped, of one size, all grey or all in colour."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image
from tqdm import tqdm

from fer.data import decode
from fer.data.decode import FORMATS, UNREADABLE, Box, around, decoded, misplaced, orientation
from fer.data.found import Entry, what_it_is
from fer.errors import UserError

SIDE = 112  # pixels, of images whose sizes differ
CHUNK = 256  # images
AT_ONCE = 32  # pictures whose files are in memory at once
GREY = ("1", "L", "LA", "La")
NAMED = 3  # faulty pictures that a message names


class Pictures:
    """uint8 [N, H, W], or [N, H, W, 3] if any picture has colour; `shape` is known before any is decoded.

    Pictures of one size keep it. If their sizes differ, or `size` is given, the largest square in the middle of each is
    resized to `size` pixels (SIDE without). `boxes`: of those that have one the square around it counts instead, as it
    does in prediction.
    Raises UserError, which names them, for pictures that cannot be opened.
    """

    def __init__(self, entries: Sequence[Entry], size: int | None = None, boxes: Sequence[Box | None] | None = None):
        self.entries, self.size = entries, size
        self.boxes: Sequence[Box | None] = boxes or [None] * len(entries)
        faults, sizes, modes = [], [], set()
        for entry, box in zip(tqdm(entries, desc="sizes", unit=" images", disable=None), self.boxes, strict=True):
            try:
                found, mode = _survey(entry, box)
            except UserError as error:
                faults.append(str(error))
            else:
                sizes.append(found)
                modes.add(mode)
        _refuse(faults, len(entries))
        self.grey = all(mode in GREY for mode in modes)
        side = size or (SIDE if len(set(sizes)) > 1 else None)
        self.width, self.height = (side, side) if side else (sizes[0] if sizes else (0, 0))
        self.resized = sum(found != (self.width, self.height) for found in sizes)
        half = min(self.width, self.height) / 2
        self.tiny = [
            entry.name for entry, found in zip(entries, sizes) if min(found) < half
        ]  # enlarged more than twice

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array of all images."""
        return (len(self.entries), self.height, self.width, *(() if self.grey else (3,)))

    def __len__(self) -> int:
        return len(self.entries)

    def chunks(self, keep: Callable[[bytes], None] | None = None) -> Iterator[np.ndarray]:
        """The images, CHUNK at a time, in order; `keep` is given the file of each, in the same order.

        Raises UserError at the end for all pictures that were damaged.
        """
        faults: list[str] = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow releases the interpreter lock while it decodes
            for first in range(0, len(self), CHUNK):
                images = np.zeros((min(CHUNK, len(self) - first), *self.shape[1:]), np.uint8)
                for start in range(0, len(images), AT_ONCE):
                    part = images[start : start + AT_ONCE]
                    faults += self._fill(part, first + start, pool, keep)
                yield images
        _refuse(faults, len(self))

    def _fill(
        self, images: np.ndarray, first: int, pool: ThreadPoolExecutor, keep: Callable[[bytes], None] | None
    ) -> list[str]:
        """Decode the pictures from `first` on into `images`; returns what is wrong with those that are damaged."""
        waiting, faults = [], []
        for row in range(first, first + len(images)):
            try:
                content = self.entries[row].read()  # in this thread, as archives are read by one at a time
            except UserError as error:
                faults.append(str(error))
                continue
            if keep is not None:
                keep(content)
            waiting.append((row, pool.submit(self._image, row, content)))
        for row, image in waiting:
            try:
                images[row - first] = image.result()
            except UserError as error:
                faults.append(str(error))
        return faults

    def _image(self, row: int, content: bytes) -> np.ndarray:
        try:
            return decoded(content, self.boxes[row], self.shape[1:])
        except UNREADABLE as error:
            raise UserError(f"{self.entries[row]}: {fault(content, error)}") from None


def upright(entry: Entry, content: bytes, mode: str) -> Image.Image:
    """The picture in `entry`, whose file is `content`, turned as EXIF says, in a mode of Pillow.

    Raises UserError for one that cannot be read.
    """
    try:
        return decode.upright(content, mode)
    except UNREADABLE as error:
        raise UserError(f"{entry}: {fault(content, error)}") from None


def fault(content: bytes, error: Exception, remedy: str = "replace it or delete it") -> str:
    """Why a picture of these bytes, on which Pillow raised `error`, cannot be read, and the remedy."""
    if (other := what_it_is(content)) is not None:
        return other
    if isinstance(error, Image.UnidentifiedImageError):
        return f"is no picture that can be read ({', '.join(FORMATS)}): {remedy}"
    return f"is truncated or damaged ({str(error).splitlines()[0] or type(error).__name__}): {remedy}"


def _survey(entry: Entry, box: Box | None) -> tuple[tuple[int, int], str]:
    """Width and height of what counts of a picture, and its mode, from its first bytes."""
    with entry.opened() as stream:
        try:
            with Image.open(stream, formats=FORMATS) as image:
                if image.mode.startswith(("I", "F")):
                    raise UserError(f"{entry}: has more than 8 bits a pixel: convert it to 8")
                size = image.size
                if orientation(image) > 4:  # it lies on its side
                    size = size[::-1]
                mode = image.mode
        except UNREADABLE as error:
            raise UserError(f"{entry}: {fault(entry.head, error)}") from None
    if box is None:
        return size, mode
    if wrong := misplaced(box, size):
        raise UserError(f"{entry}: is {size[0]}x{size[1]} pixels, and its box {box} {wrong}: correct the box")
    left, _, right, _ = around(box)
    return (right - left, right - left), mode


def _refuse(faults: list[str], total: int) -> None:
    if len(faults) == 1:
        raise UserError(faults[0])
    if faults:
        more = f"; and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
        raise UserError(f"{len(faults)} of {total} pictures cannot be read: {'; '.join(faults[:NAMED])}{more}")
