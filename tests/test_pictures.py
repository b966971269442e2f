"""Pictures as people have them: each is prepared like the training data, or refused in one line with the remedy."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refusal, tells
from PIL import Image, ImageOps

from fer.data.found import look
from fer.data.picture_files import Pictures
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
        (GREY, FACES, FACES), (GREY, FACES[0], FACES[:1]), (GREY, FACES[0, ..., None], FACES[:1]),
        (GREY, FACES.astype(np.int64), FACES), (GREY, list(FACES), FACES), (GREY, [], FACES[:0]), (GREY, RGB, LUMA),
        (GREY, [RGB[0], FACES[1]], np.stack([LUMA[0], FACES[1]])), (COLOUR, RGB, RGB),
        (COLOUR, FACES, np.repeat(FACES[..., None], 3, axis=3)),
    ],
)  # fmt: skip
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
    cut_out = np.asarray(raw.resize((96, 96), Image.Resampling.LANCZOS))  # of a photograph, whatever its size
    np.testing.assert_array_equal(UPSCALED.prepare(batch_of(face), photographed=True), cut_out[None])


WANTED = f"wanted: {LAYOUTS}"
FLOATS = WANTED + ", values 0..255, e.g. (255 * images).round().astype('uint8') if they are in 0..1"
BY_DIC = (
    "48x48 pixels, but the model was trained on faces of 48x48 pixels upscaled by dic to 384x384: give faces upscal"
)


@pytest.mark.parametrize(
    ("faces", "given", "line"),
    [
        (GREY, FACES / 255, f"float64; {FLOATS}"),
        (GREY, FACES > 99, f"bool; {FLOATS}"),
        (GREY, -FACES.astype(int), f"int64 with values -{FACES.max()}..0; {WANTED}"),
        (
            COLOUR,
            RGB.transpose(0, 3, 1, 2),
            f"shape [5, 3, 48, 48]; {WANTED}: move the channels last with images.trans",
        ),
        (COLOUR, np.zeros((48, 48, 4), np.uint8), f"shape [1, 48, 48, 4]; {WANTED}"),
        (
            GREY,
            FACES.reshape(5, 2304),
            "2304x5 pixels, but the model was trained on faces of 48x48 pixels: crop them to that shape",
        ),
        (
            Faces((48, 64), (48, 64), "none", 1),
            FACES,
            "48x48 pixels, but the model was trained on faces of 64x48 pixels: crop them to that shape",
        ),
        (GREY, [FACES], "one item of the list has shape [5, 48, 48]; wanted: [H, W] or [H, W, 3]"),
        (Faces((48, 48), (384, 384), "dic", 8), FACES, BY_DIC),
    ],
)
def test_what_is_no_face_of_that_kind_is_refused_in_one_line(faces: Faces, given: Any, line: str) -> None:
    assert refusal(prepared, faces, given).startswith(f"images: {line}")


def test_files_are_read_upright_grey_or_in_colour(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    saved: list[tuple[str, np.ndarray, dict[str, Any]]] = [
        ("a.png", FACES[0], {}), ("b.webp", RGB[1], {"lossless": True}), ("c.png", RGB[2], {"exif": exif}),
        ("d.png", np.dstack([RGB[3], np.full((48, 48), 9, np.uint8)]), {}),  # nearly clear
    ]  # fmt: skip
    for name, pixels, options in saved:
        Image.fromarray(pixels).save(tmp_path / name, **options)
    few = Image.fromarray(RGB[4]).convert("P")
    few.save(tmp_path / "e.png", transparency=bytes([0, 99]))  # of its first colours
    np.testing.assert_array_equal(prepared(COLOUR, tmp_path / "e.png"), np.asarray(few.convert("RGB"))[None])
    grey, colour, *others = (tmp_path / name for name, *_ in saved)
    np.testing.assert_array_equal(prepared(GREY, grey), FACES[:1])
    found = prepared(GREY, [grey, str(colour), colour.read_bytes()])
    np.testing.assert_array_equal(found, [FACES[0], LUMA[1], LUMA[1]])
    np.testing.assert_array_equal(prepared(COLOUR, others), [np.rot90(RGB[2], 3), RGB[3]])


def of_data_set(folder: Path, content: bytes) -> np.ndarray:
    """The picture as the stage download reads it."""
    (folder / "one.png").write_bytes(content)
    with look(folder) as found:
        return np.concatenate([*Pictures(found.entries).chunks()])[0]


@pytest.mark.parametrize("faces", [GREY, COLOUR])
def test_pictures_of_any_size_become_what_they_are_in_a_data_set(faces: Faces, tmp_path: Path) -> None:
    for number, (height, width) in enumerate([(65, 73), (41, 50), (90, 45), (48, 49), (48, 48), (30, 59)]):
        picture = RNG.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(picture).convert("L" if faces is GREY else "RGB").save(tmp_path / f"{number}.png")
    with look(tmp_path) as found:
        wanted = np.concatenate([*Pictures(found.entries, size=48).chunks()])
    np.testing.assert_array_equal(prepared(faces, sorted(tmp_path.iterdir())), wanted)


def test_every_orientation_of_exif_is_read_upright_though_another_tag_holds_nonsense(tmp_path: Path) -> None:
    oblong = Image.fromarray(RGB[0][:, :32])
    for orientation in range(10):
        entries = [struct.pack(">HHI4s", 0x100, 2, 4, b"abc\0"), struct.pack(">HHIHH", 0x112, 3, 1, orientation, 0)]
        exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + b"".join(entries) + bytes(4)  # a width that is a text
        turned, plain = io.BytesIO(), Image.Exif()
        oblong.save(turned, "PNG", exif=exif)
        plain[0x112] = orientation
        wanted = oblong.copy()
        wanted.info["exif"] = plain.tobytes()
        np.testing.assert_array_equal(read_picture(turned.getvalue()), ImageOps.exif_transpose(wanted))
        np.testing.assert_array_equal(of_data_set(tmp_path, turned.getvalue()), ImageOps.exif_transpose(wanted))
        tiff = io.BytesIO()
        oblong.save(tiff, "TIFF", exif=plain)
        np.testing.assert_array_equal(read_picture(tiff.getvalue()), ImageOps.exif_transpose(wanted))
        np.testing.assert_array_equal(of_data_set(tmp_path, tiff.getvalue()), ImageOps.exif_transpose(wanted))


def test_what_is_no_picture_and_a_method_of_another_version_are_named(tmp_path: Path) -> None:
    whole = io.BytesIO()
    Image.fromarray(RGB[0]).save(whole, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole.getvalue()[:500])
    Image.fromarray(FACES[0].astype(np.uint16) * 200).save(tmp_path / "deep.png")
    for name, reason in (
        ("cut.jpg", "not a readable picture ("),
        ("deep.png", "has more than 8 bits per pixel; convert it to 8"),
        ("none.png", "not a file; give the path of a picture"),
    ):
        tells(tmp_path, f"/{name}: {reason}", prepared, GREY, tmp_path / name)
    kept = {"formats": ["PNG", "GIF"], "pixels": 48 * 48 - 1}
    assert refusal(read_picture, whole.getvalue(), **kept) == "picture: not a readable picture (none of PNG, GIF)"
    Image.fromarray(FACES[0]).save(large := io.BytesIO(), "PNG")
    told = "picture: 48x48 pixels; at most 2,303 are read: shrink it"
    assert refusal(read_picture, large.getvalue()[:100], **kept) == told  # before it is decoded
    about = {"image_shape": [96, 96], "super_resolution": {"method": "magic", "scale": 2}}
    assert "super_resolution.method: 'magic' is not in this version" in refusal(Faces.of, about)


def test_a_tiff_is_turned_whether_it_comes_as_a_path_or_as_bytes(tmp_path: Path) -> None:
    """Pillow maps an uncompressed grey one that it is given by name into memory, and then does not turn it."""
    noise, turned = np.random.default_rng(0).integers(0, 256, (4, 6), np.uint8), Image.Exif()
    turned[0x112] = 6
    Image.fromarray(noise).save(path := tmp_path / "a.tif", exif=turned)
    for source in (path, path.read_bytes()):
        np.testing.assert_array_equal(read_picture(source), np.rot90(noise, -1))
