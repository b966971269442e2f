"""A picture's bytes as an image of a data set: upright, cropped, of one size, grey or in colour."""

import io
import struct

import numpy as np
from PIL import ExifTags, Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")
# what Pillow raises on damaged files
UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, RuntimeError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip

TURNS = Image.Transpose
# by EXIF's orientation; ImageOps.exif_transpose also writes the EXIF anew, and fails where a camera filled it oddly
UPRIGHT = {2: TURNS.FLIP_LEFT_RIGHT, 3: TURNS.ROTATE_180, 4: TURNS.FLIP_TOP_BOTTOM, 5: TURNS.TRANSPOSE,
           6: TURNS.ROTATE_270, 7: TURNS.TRANSVERSE, 8: TURNS.ROTATE_90}  # fmt: skip
Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels of the upright picture
LARGEST = 4  # times the longer side of a picture: a larger box is a mistake


def decoded(content: bytes, box: Box | None, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 of `shape`, [H, W] or [H, W, 3]: the square around `box`, or all of a picture that has this size.

    Of one of another size the largest square in the middle is resized. Raises one of UNREADABLE.
    """
    image = upright(content, "L" if len(shape) == 2 else "RGB")
    size = shape[1], shape[0]
    if box is None and image.size == size:
        return np.asarray(image)
    square = middle(image.size) if box is None else around(box)
    part = image.crop(square) if within(square, image.size) else Image.fromarray(cut(np.asarray(image), square))
    return np.asarray(part if part.size == size else part.resize(size, Image.Resampling.BICUBIC))


def middle(size: tuple[int, int]) -> Box:
    """The largest square in the middle of a picture of this width and height."""
    width, height = size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def around(box: tuple[float, float, float, float], margin: float = 1) -> Box:
    """The square around the middle of a box: its side is `margin` times the longer one of the box."""
    left, top, right, bottom = box
    side = max(1, round(max(right - left, bottom - top) * margin))
    left, top = round((left + right - side) / 2), round((top + bottom - side) / 2)
    return left, top, left + side, top + side


def cut(picture: np.ndarray, box: Box) -> np.ndarray:
    """The part `box` of uint8 [H, W] or [H, W, 3]; what lies outside the picture repeats its edge."""
    (left, top, right, bottom), (height, width) = box, picture.shape[:2]
    rows = np.arange(top, bottom).clip(0, height - 1)
    columns = np.arange(left, right).clip(0, width - 1)
    return picture[rows[:, None], columns]


def within(box: Box, size: tuple[int, int]) -> bool:
    """Whether a picture of this width and height holds the whole box."""
    return box[0] >= 0 and box[1] >= 0 and box[2] <= size[0] and box[3] <= size[1]


def misplaced(box: tuple[float, float, float, float], size: tuple[int, int]) -> str:
    """What is wrong with a box on a picture of this width and height; empty if nothing is."""
    (left, top, right, bottom), (width, height) = box, size
    if min(right, width) <= max(left, 0) or min(bottom, height) <= max(top, 0):
        return "lies outside the picture"
    if max(right - left, bottom - top) > LARGEST * max(size):
        return f"is more than {LARGEST} times as large as the picture"
    return ""


def upright(content: bytes, mode: str) -> Image.Image:
    """A picture, turned as EXIF says, in a mode of Pillow. Raises one of UNREADABLE."""
    image = turned(Image.open(io.BytesIO(content), formats=FORMATS))
    image.load()
    return image if image.mode == mode else image.convert(mode)  # which would copy it


def turned(image: Image.Image) -> Image.Image:
    """The picture as EXIF says; itself if it is upright."""
    turn = UPRIGHT.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def orientation(image: Image.Image) -> int:
    """As EXIF counts it, 1 to 8; 1 where that cannot be read, and for a TIFF, which Pillow turns when it decodes it.

    Of a PNG only what stands before the pixels counts: to look behind them it would have to be decoded.
    """
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
    except UNREADABLE:  # no EXIF, though it is called so
        return 1
    return found if found in UPRIGHT else 1
