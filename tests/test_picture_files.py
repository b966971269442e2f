"""Pictures as people have them: formats, colour, sizes, rotation, boxes, damage."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fer.data.found import look
from fer.data.picture_files import Box, Pictures
from fer.errors import UserError

COLOUR = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(mode: str = "L", size: tuple[int, int] = (30, 20)) -> Image.Image:
    return Image.fromarray(COLOUR).resize(size).convert(mode)


def read(folder: Path, files: dict[str, bytes], size: int | None = None, boxes: list[Box | None] | None = None):
    """The array of all pictures, and how many were resized."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with look(folder) as found:
        pictures = Pictures([entry for entry in found.entries if entry.name in files], size, boxes)
        images = np.asarray(pictures)
        assert pictures.shape == images.shape
        return images, pictures.resized


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "JPEG"])
def test_every_format_whatever_the_name(kind: str, tmp_path: Path) -> None:
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    for mode, shape in (("L", (20, 30)), ("RGB", (20, 30, 3))):
        shape = (20, 30, 3) if kind == "WEBP" else shape  # which has no grey
        images = read(tmp_path, {"a.png": encoded(picture(mode), kind, **options)})[0]
        expected = np.asarray(picture(mode).convert("RGB" if len(shape) == 3 else "L")).astype(int)
        assert images.shape == (1, *shape)
        assert np.abs(images[0] - expected).mean() <= (4 if kind == "JPEG" else 0)


def test_grey_and_colour_together_are_colour(tmp_path: Path) -> None:
    modes = ("L", "RGB", "P", "RGBA")
    images = read(tmp_path, {f"{number}.png": encoded(picture(mode)) for number, mode in enumerate(modes)})[0]
    assert images.shape == (4, 20, 30, 3)
    assert (images[0] == np.asarray(picture("L"))[..., None]).all()
    assert (images[3] == np.asarray(picture("RGB"))).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_is_turned_upright(kind: str, tmp_path: Path) -> None:
    upright = np.zeros((16, 24), np.uint8)
    upright[:8, :8] = 255  # light in the upper left corner
    turned = [upright, upright[:, ::-1], upright[::-1, ::-1], upright[::-1], upright.T, np.rot90(upright),
              upright[::-1, ::-1].T, np.rot90(upright, -1)]  # fmt: skip
    for orientation, pixels in enumerate(turned, start=1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = encoded(Image.fromarray(np.ascontiguousarray(pixels)), kind, exif=exif)
        images = read(tmp_path, {"a.jpg": content})[0]
        assert np.abs(images.reshape(16, 24, -1)[..., 0].astype(int) - upright).mean() < 3, orientation


def test_sizes_that_differ_become_one_and_the_same_size_is_kept(tmp_path: Path) -> None:
    files = {f"{n}.png": encoded(picture("L", size)) for n, size in enumerate([(30, 20), (20, 40), (112, 112)])}
    images, resized = read(tmp_path, files)
    assert (images.shape, resized) == ((3, 112, 112), 2)
    assert (images[2] == np.asarray(picture("L", (112, 112)))).all()
    images, resized = read(tmp_path, files, size=24)
    assert (images.shape, resized) == ((3, 24, 24), 3)
    middle = picture("L").crop((5, 0, 25, 20)).resize((24, 24), Image.Resampling.BICUBIC)
    inner = np.s_[3:-3, 3:-3]  # the edge is interpolated with its neighbours outside
    np.testing.assert_array_equal(images[0][inner], np.asarray(middle)[inner])  # the largest square in the middle
    same = dict.fromkeys(("a.png", "b.png"), encoded(picture("L")))
    assert read(tmp_path, same)[0].shape == (2, 20, 30)
    assert read(tmp_path, same, size=20)[0].shape == (2, 20, 20)


def test_boxes_are_cut_out_and_end_at_the_edge(tmp_path: Path) -> None:
    files, whole = dict.fromkeys(("a.png", "b.png"), encoded(picture("L"))), np.asarray(picture("L"))
    images = read(tmp_path, files, boxes=[(3, 4, 13, 14), (20, 10, 40, 40)])[0]
    assert (images[0] == whole[4:14, 3:13]).all()
    assert (images[1] == whole[10:20, 20:30]).all()
    with pytest.raises(UserError, match=r"b.png: is 30x20 pixels, and its box \(30, 0, 35, 5\) lies outside"):
        read(tmp_path, files, boxes=[None, (30, 0, 35, 5)])


JPEG = encoded(picture("RGB", (300, 200)), "JPEG")
FAULTS = {
    "empty": (b"", "is empty: download it again"),
    "text": (b"hello", "is no picture that can be read (PNG, JPEG, WEBP, BMP, TIFF, PPM): replace it or delete it"),
    "a web page": (b"<html>sign in</html>", "is a web page, not the file: sign in there and download it again"),
    "cut": (JPEG[:1500], "is truncated or damaged (image file is truncated"),
    "cut in the header": (JPEG[:100], "is truncated or damaged ("),
    "16 bits": (encoded(Image.fromarray(np.zeros((9, 9), np.uint16))), "has more than 8 bits a pixel: convert it to 8"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_read_is_named_with_the_reason(fault: str, tmp_path: Path) -> None:
    content, reason = FAULTS[fault]
    with pytest.raises(UserError) as caught:
        read(tmp_path, {"a.jpg": content, "b.jpg": JPEG})
    assert str(caught.value).startswith(f"{tmp_path}/a.jpg: {reason}")


def test_many_are_counted_and_the_first_named(tmp_path: Path) -> None:
    for content in (b"x", JPEG[:1500]):  # noticed when they are opened, when they are decoded
        with pytest.raises(UserError) as caught:
            read(tmp_path, {"good.jpg": JPEG, **{f"{n}.jpg": content for n in range(5)}})
        message = str(caught.value)
        assert message.startswith(f"5 of 6 pictures cannot be read: {tmp_path}/0.jpg: is ")
        assert message.endswith("; and 2 more")
        assert message.count(".jpg: ") == 3


def test_any_damaged_byte_ends_in_a_picture_or_one_line(tmp_path: Path) -> None:
    messages = []
    for whole in (encoded(picture("RGB")), encoded(picture("RGB"), "JPEG"), encoded(picture("RGB"), "WEBP")):
        for position in [*range(0, 60), *range(60, len(whole), 61)]:
            content = whole[:position] + bytes([whole[position] ^ 0x5A]) + whole[position + 1 :]
            try:
                read(tmp_path, {"a.jpg": content})
            except UserError as error:
                messages.append(str(error))
    assert len(messages) > 50
    assert all(message.startswith(f"{tmp_path}/a.jpg: ") for message in messages)
