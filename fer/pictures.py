"""Pictures of faces as people have them, made like the training data: layout, colour, size, super-resolution."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from fer.data.decode import UNREADABLE, middle, turned
from fer.errors import UserError, first_line
from fer.super_resolution.interpolation import resize
from fer.super_resolution.methods import METHODS

Picture = str | Path | bytes | np.ndarray  # a file, the bytes of one, or uint8 [H, W], [H, W, 1] or [H, W, 3]
LAYOUTS = "uint8 [H, W], [B, H, W], [B, H, W, 1] or [B, H, W, 3]"
SKEWED = 0.02  # relative difference of two sides that is still the same shape
OBLONG = 2  # a picture whose sides differ by a larger factor is no face


def batch_of(pictures: Picture | Iterable[Picture]) -> np.ndarray | list[Picture]:
    """One picture or many, as something with a length that can be sliced: uint8 [B, H, W], [B, H, W, 3], or a list.

    Raises UserError for an array of another layout or type of number, and for what is no picture.
    """
    if isinstance(pictures, np.ndarray) and pictures.dtype != object:
        return _layout(_bytes(pictures))
    if isinstance(pictures, str | Path | bytes):
        return [pictures]
    if not isinstance(pictures, Iterable):
        raise UserError(f"images: {type(pictures).__name__}; wanted: {LAYOUTS}, the path of a picture, or a list")
    return list(pictures)


@dataclass(frozen=True)
class Faces:
    """How the faces that a model was trained on were prepared."""

    raw: tuple[int, ...]  # [H, W] or [H, W, 3] before super-resolution
    prepared: tuple[int, ...]  # and after it
    method: str
    scale: int

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "Faces":
        """From the part `data` of a checkpoint.json."""
        prepared, made = tuple(data["image_shape"]), data.get("super_resolution", {})
        if made.get("method", "none") not in METHODS:
            raise UserError(f"checkpoint.json: data.super_resolution.method: {made['method']!r} is not in this version")
        return cls(
            tuple(made.get("raw_shape", prepared)), prepared, made.get("method", "none"), int(made.get("scale", 1))
        )

    def prepare(self, pictures: np.ndarray | Sequence[Picture], photographed: bool = False) -> np.ndarray:
        """A batch of `batch_of` -> uint8 [B, H, W] or [B, H, W, 3] of the shape `prepared`.

        Faces of that shape are taken as prepared already, unless they are `photographed`. All others are resized to the
        shape `raw`, as the training data were: if that is square, from the largest square in their middle; and then
        upscaled with the method that made the training data. Raises UserError for a file that is no picture, a shape
        that is no face or not that of the training data, and faces that only a super-resolution network could prepare.
        """
        if isinstance(pictures, np.ndarray):
            return self._prepared(pictures, photographed)
        if not pictures:
            return np.empty((0, *self.prepared), np.uint8)
        return np.concatenate([self._prepared(_single(picture), photographed) for picture in pictures])

    def _prepared(self, images: np.ndarray, photographed: bool) -> np.ndarray:
        images = self._coloured(images)
        if images.shape[1:] == self.prepared and (self.method == "none" or not photographed):
            return images
        (height, width), (wanted_height, wanted_width) = images.shape[1:3], self.raw[:2]
        shown = f"{wanted_width}x{wanted_height} pixels"
        if wanted_height == wanted_width and max(height, width) <= OBLONG * min(height, width):
            left, top, right, bottom = middle((width, height))
            images = images[:, top:bottom, left:right]
        elif abs(height * wanted_width / (width * wanted_height) - 1) > SKEWED:
            raise UserError(
                f"images: {width}x{height} pixels, but the model was trained on faces of {shown}: "
                "crop them to that shape"
            )
        interpolate = METHODS[self.method].interpolate
        if interpolate is None:
            raise UserError(
                f"images: {width}x{height} pixels, but the model was trained on faces of {shown} upscaled by "
                f"{self.method} to {self.prepared[1]}x{self.prepared[0]}: give faces upscaled like that"
            )
        if images.shape[1:3] != self.raw[:2]:
            images = resize(images, wanted_height, wanted_width, Image.Resampling.BICUBIC)
        return interpolate(images, self.scale)

    def _coloured(self, images: np.ndarray) -> np.ndarray:
        """Grey or colour like the training data; grey is the luma that Pillow makes."""
        if len(self.prepared) == 2 and images.ndim == 4:
            weighted = images.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)  # ITU-R BT.601 in 2^-16
            return ((weighted + 0x8000) >> 16).astype(np.uint8)
        if len(self.prepared) == 3 and images.ndim == 3:
            return np.repeat(images[..., None], 3, axis=3)
        return images


def _bytes(images: np.ndarray) -> np.ndarray:
    """As uint8. Raises UserError for anything but whole numbers in 0..255."""
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind not in "iu":
        raise UserError(
            f"images: {images.dtype}; wanted: {LAYOUTS}, values 0..255, e.g. (255 * images).round().astype('uint8') "
            "if they are in 0..1"
        )
    if images.size and (images.min() < 0 or images.max() > 255):
        raise UserError(f"images: {images.dtype} with values {images.min()}..{images.max()}; wanted: {LAYOUTS}")
    return images.astype(np.uint8)


def _layout(images: np.ndarray) -> np.ndarray:
    """As [B, H, W] or [B, H, W, 3]. Raises UserError for any other layout."""
    if images.ndim == 2 or (images.ndim == 3 and images.shape[2] in (1, 3, 4)):
        images = images[None]
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3) or 0 in images.shape[1:]:
        shape = list(images.shape)
        channels_first = images.ndim == 4 and images.shape[1] in (1, 3)
        remedy = ": move the channels last with images.transpose(0, 2, 3, 1)" if channels_first else ""
        raise UserError(f"images: shape {shape}; wanted: {LAYOUTS}{remedy}")
    return images


def _single(picture: Any) -> np.ndarray:
    """One picture as [1, H, W] or [1, H, W, 3]."""
    if isinstance(picture, str | Path | bytes):
        return read_picture(picture)[None]
    if isinstance(picture, Image.Image) and not picture.mode.startswith(("I", "F")):  # which have more than 8 bits
        picture = picture.convert("L" if picture.mode in ("1", "L", "LA") else "RGB")
    found = _layout(_bytes(np.asarray(picture)))
    if len(found) != 1:
        raise UserError(
            f"images: one item of the list has shape {list(np.shape(picture))}; wanted: [H, W] or [H, W, 3]"
        )
    return found


def read_picture(source: str | Path | bytes, formats: list[str] | None = None, pixels: int | None = None) -> np.ndarray:
    """An upright picture, uint8 [H, W] if its file is grey, else [H, W, 3]; transparency is dropped.

    `formats`: the names of Pillow's formats that are read, else all; `pixels`: how many it may have.
    Raises UserError if the file is missing, damaged, or has 16 bits per pixel, and before it decodes what is too large.
    """
    name = "picture" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes) and not os.path.isfile(source):  # of a name that is too long, too
        raise UserError(f"{name}: not a file; give the path of a picture")
    try:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()  # of a path it turns no grey TIFF
        with Image.open(BytesIO(content), formats=formats) as image:
            if pixels is not None and image.width * image.height > pixels:
                raise UserError(f"{name}: {image.width}x{image.height} pixels; at most {pixels:,} are read: shrink it")
            if image.mode.startswith(("I", "F")):
                raise UserError(f"{name}: has more than 8 bits per pixel; convert it to 8")
            upright = turned(image)
            if upright.mode == "P" and "transparency" in upright.info:
                upright = upright.convert("RGBA")  # else Pillow warns
            mode = "L" if upright.mode in ("1", "L", "LA") else "RGB"
            return np.asarray(upright if upright.mode == mode else upright.convert(mode))  # `convert` copies
    except UnidentifiedImageError:
        known = f"none of {', '.join(formats)}" if formats else "its format is unknown"
        raise UserError(f"{name}: not a readable picture ({known})") from None
    except (*UNREADABLE, Image.DecompressionBombWarning) as error:
        raise UserError(f"{name}: not a readable picture ({first_line(error)})") from None
