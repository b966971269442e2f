"""A picture's bytes as an image of a data set: upright, cropped, of one size, grey or in colour."""

import io
import struct

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")
# what Pillow raises on damaged files
UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, NotImplementedError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels of the upright picture


def decoded(content: bytes, box: Box | None, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 of `shape`, [H, W] or [H, W, 3]: the part `box` of a picture, None for all of it.

    Of a part of another size the largest square in the middle is resized. Raises one of UNREADABLE.
    """
    image = upright(content, "L" if len(shape) == 2 else "RGB")
    left, top, right, bottom = inside(box, image.size)
    width, height = right - left, bottom - top
    if (height, width) == shape[:2]:
        whole = image.size == (width, height)
        return np.asarray(image if whole else image.crop((left, top, right, bottom)))
    side = min(width, height)
    left, top = left + (width - side) // 2, top + (height - side) // 2
    square = (left, top, left + side, top + side)
    return np.asarray(image.resize((shape[1], shape[0]), Image.Resampling.BICUBIC, square))


def upright(content: bytes, mode: str) -> Image.Image:
    """A picture, turned as EXIF says, in a mode of Pillow. Raises one of UNREADABLE."""
    image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
    if has_exif(image):  # known before the pixels are read
        ImageOps.exif_transpose(image, in_place=True)
    image.load()
    return image if image.mode == mode else image.convert(mode)  # which would copy it


def has_exif(image: Image.Image) -> bool:
    """Whether there may be a rotation; of a PNG it would have to be decoded to look behind the pixels."""
    return image.format != "PNG" or "exif" in image.info


def inside(box: Box | None, size: tuple[int, int]) -> Box:
    """The part of `box` that lies in a picture of this width and height."""
    width, height = size
    if box is None:
        return 0, 0, width, height
    return max(box[0], 0), max(box[1], 0), min(box[2], width), min(box[3], height)
