"""Pictures as people have them: formats, colour, sizes, rotation, boxes, damage."""

import io
from pathlib import Path

import numpy as np
import pytest
from conftest import refusal, tells
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fer.data.found import look
from fer.data.picture_files import Box, Pictures
from fer.errors import UserError
from fer.faces.detect import Face, crop
from fer.pictures import Faces, read_picture

COLOUR = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
KINDS: dict[str, dict] = {
    "PNG": {}, "BMP": {}, "TIFF": {}, "PPM": {}, "WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}
}  # fmt: skip


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(mode: str = "L", size: tuple[int, int] = (30, 20)) -> Image.Image:
    return Image.fromarray(COLOUR).resize(size).convert(mode)


def read(folder: Path, files: list[bytes], size: int | None = None, boxes: list[Box | None] | None = None):
    """The array of all pictures, and how many were resized."""
    for number, content in enumerate(files):
        (folder / f"{number}.png").write_bytes(content)
    with look(folder) as found:
        pictures = Pictures(found.entries[: len(files)], size, boxes)
        images = np.concatenate([*pictures.chunks()])
        assert pictures.shape == images.shape
        return images, pictures.resized


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_whatever_the_name(kind: str, tmp_path: Path) -> None:
    for mode in ("L", "RGB"):
        images, _ = read(tmp_path, [encoded(picture(mode), kind, **KINDS[kind])])
        expected = np.asarray(picture(mode).convert("RGB" if kind == "WEBP" else mode)).astype(int)  # which has no grey
        assert images.shape == (1, *expected.shape)
        assert np.abs(images[0] - expected).mean() <= (4 if kind == "JPEG" else 0)


def test_grey_and_colour_together_are_colour(tmp_path: Path) -> None:
    images, _ = read(tmp_path, [encoded(picture(mode)) for mode in ("L", "RGB", "P", "RGBA")])
    grey, colour = np.asarray(picture("L").convert("RGB")), np.asarray(picture("RGB"))
    np.testing.assert_array_equal(images[[0, 1, 3]], [grey, colour, colour])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_is_turned_upright(kind: str, tmp_path: Path) -> None:
    upright = np.zeros((16, 24), np.uint8)
    upright[:8, :8] = 255  # light in the upper left corner
    turned = [upright, upright[:, ::-1], upright[::-1, ::-1], upright[::-1], upright.T, np.rot90(upright),
              upright[::-1, ::-1].T, np.rot90(upright, -1)]  # fmt: skip
    for orientation, pixels in enumerate(turned, start=1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        images, _ = read(tmp_path, [encoded(Image.fromarray(np.ascontiguousarray(pixels)), kind, exif=exif)])
        assert np.abs(images.reshape(16, 24, -1)[..., 0].astype(int) - upright).mean() < 3, orientation


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_whole_picture_whose_exif_cannot_be_read_is_upright(kind: str, tmp_path: Path) -> None:
    content = encoded(picture("RGB"), kind, exif=b"Exif\0\0rubbish")
    images, _ = read(tmp_path, [content])
    assert images.shape == (1, 20, 30, 3)
    np.testing.assert_array_equal(images[0], read_picture(content))


def exif_behind_the_pixels(content: bytes) -> bytes:
    """A PNG whose chunk eXIf has been moved to the end."""
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4])
    last = content.index(b"IEND") - 4
    return content[:start] + content[end:last] + content[start:end] + content[last:]


def test_a_png_that_names_its_rotation_elsewhere_is_upright_in_training_and_in_prediction(tmp_path: Path) -> None:
    exif, xmp = Image.Exif(), PngInfo()
    exif[0x0112] = 6
    xmp.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    whole = encoded(picture("RGB"), exif=exif)
    rotated = {whole: True, exif_behind_the_pixels(whole): False, encoded(picture("RGB"), pnginfo=xmp): False}
    for content, is_turned in rotated.items():
        images, _ = read(tmp_path, [content])
        assert images.shape == ((1, 30, 20, 3) if is_turned else (1, 20, 30, 3))
        np.testing.assert_array_equal(images[0], read_picture(content))


def test_sizes_that_differ_become_one_and_the_same_size_is_kept(tmp_path: Path) -> None:
    files = [encoded(picture("L", size)) for size in ((30, 20), (20, 40), (112, 112))]
    images, resized = read(tmp_path, files)
    assert (images.shape, resized) == ((3, 112, 112), 2)
    assert (images[2] == np.asarray(picture("L", (112, 112)))).all()
    images, resized = read(tmp_path, files, size=24)
    assert (images.shape, resized) == ((3, 24, 24), 3)
    middle = np.asarray(picture("L").crop((5, 0, 25, 20)).resize((24, 24), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(images[0], middle)  # the largest square in the middle
    assert read(tmp_path, files[:1] * 2)[0].shape == (2, 20, 30)


def test_the_square_around_a_box_is_cut_out_and_repeats_the_edge(tmp_path: Path) -> None:
    files, whole = [encoded(picture("L"))] * 3, np.asarray(picture("L"))
    images, resized = read(tmp_path, files, boxes=[(3, 4, 13, 14), (3, 6, 13, 12), (25, -4, 31, 6)])
    corner = np.pad(whole[:6, 23:], ((4, 0), (0, 3)), "edge")
    np.testing.assert_array_equal(images, [whole[4:14, 3:13], whole[4:14, 3:13], corner])
    assert resized == 0
    for box, wrong in (((30, 0, 35, 5), "lies outside"), ((0, 0, 9, 121), "is more than 4 times as large as")):
        told = f"/1.png: is 30x20 pixels, and its box {box} {wrong} the picture: correct the box"
        tells(tmp_path, told, read, tmp_path, files[:2], boxes=[None, box])


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_face_is_cut_alike_for_training_and_in_prediction(mode: str, tmp_path: Path) -> None:
    boxes = [(3, 4, 13, 14), (2, 1, 6, 14), (25, -4, 31, 6), (-3, 2, 12, 30), (0, 0, 30, 20)]
    pixels = np.asarray(picture(mode))
    trained, _ = read(tmp_path, [encoded(picture(mode))] * len(boxes), size=16, boxes=boxes)
    faces = [Face(left, top, right - left, bottom - top, 1) for left, top, right, bottom in boxes]
    predicted = Faces(trained.shape[1:], trained.shape[1:], "none", 1).prepare(
        [crop(pixels, face, margin=1) for face in faces], photographed=True
    )
    np.testing.assert_array_equal(trained, predicted)


JPEG = encoded(picture("RGB", (300, 200)), "JPEG")
FAULTS = {
    "is empty: download it again": b"",
    "is no picture that can be read (PNG, JPEG, WEBP, BMP, TIFF, PPM): replace it or delete it": b"hello",
    "is a web page, not the file: sign in there and download it again": b"<html>sign in</html>",
    "is truncated or damaged (image file is truncated ... ): replace it or delete it": JPEG[:1500],
    "is truncated or damaged ( ... ): replace it or delete it": JPEG[:100],
    "has more than 8 bits a pixel: convert it to 8": encoded(Image.fromarray(np.zeros((9, 9), np.uint16))),
}


@pytest.mark.parametrize("reason", FAULTS)
def test_what_cannot_be_read_is_named_with_the_reason(reason: str, tmp_path: Path) -> None:
    tells(tmp_path, f"/1.png: {reason}", read, tmp_path, [JPEG, FAULTS[reason]])


@pytest.mark.parametrize("content", [b"x", JPEG[:1500]])  # noticed when they are opened, when they are decoded
def test_many_are_counted_and_the_first_named(content: bytes, tmp_path: Path) -> None:
    message = refusal(read, tmp_path, [JPEG, *[content] * 5])
    assert message.startswith(f"5 of 6 pictures cannot be read: {tmp_path}/1.png: is ")
    assert (message.endswith("; and 2 more"), message.count(".png: ")) == (True, 3)


def test_any_damaged_byte_ends_in_a_picture_or_one_line(tmp_path: Path) -> None:
    messages = []
    for whole in (encoded(picture("RGB"), kind) for kind in ("PNG", "JPEG", "WEBP")):
        for position in [*range(60), *range(60, len(whole), 61)]:
            try:
                read(tmp_path, [whole[:position] + bytes([whole[position] ^ 0x5A]) + whole[position + 1 :]])
            except UserError as error:
                messages.append(str(error))
    assert len(messages) > 50
    assert all(message.startswith(f"{tmp_path}/0.png: ") for message in messages)
