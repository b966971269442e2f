"""Pictures as people have them: each is prepared like the training data, or refused in one line with the remedy."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fer.errors import UserError
from fer.pictures import LAYOUTS, Faces, batch_of, read_picture

GREY = Faces((48, 48), (48, 48), "none", 1)
COLOUR = Faces((48, 48, 3), (48, 48, 3), "none", 1)
UPSCALED = Faces((48, 48), (96, 96), "lanczos", 2)
RNG = np.random.default_rng(1)
FACES = RNG.integers(0, 256, (5, 48, 48), np.uint8)
RGB = RNG.integers(0, 256, (5, 48, 48, 3), np.uint8)
LUMA = np.stack([np.asarray(Image.fromarray(face).convert("L")) for face in RGB])


def prepared(faces: Faces, pictures: Any) -> np.ndarray:
    return faces.prepare(batch_of(pictures))


@pytest.mark.parametrize(
    ("faces", "given", "wanted"),
    [
        (GREY, FACES, FACES),
        (GREY, FACES[0], FACES[:1]),
        (GREY, FACES[0, ..., None], FACES[:1]),
        (GREY, FACES.astype(np.int64), FACES),
        (GREY, list(FACES), FACES),
        (GREY, [], FACES[:0]),
        (GREY, RGB, LUMA),
        (GREY, [RGB[0], FACES[1]], np.stack([LUMA[0], FACES[1]])),
        (COLOUR, RGB, RGB),
        (COLOUR, FACES, np.repeat(FACES[..., None], 3, axis=3)),
    ],
)
def test_every_layout_becomes_that_of_the_training_data(faces: Faces, given: Any, wanted: np.ndarray) -> None:
    found = prepared(faces, given)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("side", [24, 96])
def test_faces_of_another_size_are_resized_and_upscaled_as_the_training_data_were(side: int) -> None:
    face = np.asarray(Image.fromarray(FACES[0]).resize((side, side)))
    raw = Image.fromarray(face).resize((48, 48), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(prepared(GREY, face), np.asarray(raw)[None])
    wanted = np.asarray(raw.resize((96, 96), Image.Resampling.LANCZOS)) if side != 96 else face  # prepared already
    np.testing.assert_array_equal(prepared(UPSCALED, face), wanted[None])


WANTED = f"wanted: {LAYOUTS}"
FLOATS = WANTED + ", values 0..255, e.g. (255 * images).round().astype('uint8') if they are in 0..1"


@pytest.mark.parametrize(
    ("faces", "given", "line"),
    [
        (GREY, FACES / 255, f"images: float64; {FLOATS}"),
        (GREY, FACES > 99, f"images: bool; {FLOATS}"),
        (GREY, -FACES.astype(int), f"images: int64 with values -{FACES.max()}..0; {WANTED}"),
        (
            COLOUR, RGB.transpose(0, 3, 1, 2),
            f"images: shape [5, 3, 48, 48]; {WANTED}: move the channels last with images.transpose(0, 2, 3, 1)",
        ),
        (COLOUR, np.zeros((48, 48, 4), np.uint8), f"images: shape [1, 48, 48, 4]; {WANTED}"),
        (
            GREY, FACES.reshape(5, 2304),
            "images: 2304x5 pixels, but the model was trained on faces of 48x48 pixels: crop them to that shape; "
            + WANTED,
        ),
        (GREY, [FACES], "images: one item of the list has shape [5, 48, 48]; wanted: [H, W] or [H, W, 3]"),
        (
            Faces((48, 48), (384, 384), "dic", 8), FACES,
            "images: 48x48 pixels, but the model was trained on faces of 48x48 pixels upscaled by dic to 384x384: "
            "give faces upscaled like that",
        ),
    ],
)  # fmt: skip
def test_what_is_no_face_of_that_kind_is_refused_in_one_line(faces: Faces, given: Any, line: str) -> None:
    with pytest.raises(UserError) as caught:
        prepared(faces, given)
    assert str(caught.value) == line


# Files


def save(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def test_files_are_read_upright_grey_or_in_colour(tmp_path: Path) -> None:
    grey, colour = save(tmp_path / "a.png", FACES[0]), save(tmp_path / "b.webp", RGB[1], lossless=True)
    found = prepared(GREY, [grey, str(colour), colour.read_bytes()])
    np.testing.assert_array_equal(found, np.stack([FACES[0], LUMA[1], LUMA[1]]))
    np.testing.assert_array_equal(prepared(GREY, grey), FACES[:1])
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    turned = save(tmp_path / "c.png", RGB[2], exif=exif)
    np.testing.assert_array_equal(read_picture(turned), np.rot90(RGB[2], 3))
    clear = save(tmp_path / "d.png", np.dstack([RGB[3], np.full((48, 48), 9, np.uint8)]))
    np.testing.assert_array_equal(read_picture(clear), RGB[3])


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    whole = io.BytesIO()
    Image.fromarray(RGB[0]).save(whole, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole.getvalue()[:500])
    (tmp_path / "text.png").write_text("face")
    Image.fromarray(FACES[0].astype(np.uint16) * 200).save(tmp_path / "deep.png")
    for name, reason in {
        "cut.jpg": "not a readable picture",
        "text.png": "not a readable picture",
        "deep.png": "has more than 8 bits per pixel; convert it to 8",
        "none.png": "not a file; give the path of a picture",
    }.items():
        with pytest.raises(UserError) as caught:
            prepared(GREY, tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: {reason}")


def test_a_method_of_another_version_is_named() -> None:
    with pytest.raises(UserError, match="super_resolution.method: 'magic' is not in this version"):
        Faces.of({"image_shape": [96, 96], "super_resolution": {"method": "magic", "scale": 2}})
