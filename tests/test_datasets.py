"""Rules for every reader: nothing is lost without a word, whatever people do to the files; the table of data sets."""

import io
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fer.data.datasets import DATASETS, counted
from fer.data.found import look
from fer.data.source import Source, Wanted
from fer.errors import UserError

COUNT = 12  # pictures of each data set; the grey of a picture is its number
USAGE = ["Training"] * 6 + ["PublicTest"] * 3 + ["PrivateTest"] * 3
FOLDER = {"Training": "FER2013Train", "PublicTest": "FER2013Valid", "PrivateTest": "FER2013Test"}


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (48, 48), number).save(buffer, "PNG")
    return buffer.getvalue()


def ferplus(root: Path) -> None:
    for number, usage in enumerate(USAGE):
        put(root / FOLDER[usage] / f"fer{number}.png", picture(number))
        votes = ",".join(str(10 * (column == number % 8)) for column in range(10))
        append(root / FOLDER[usage] / "label.csv", f'fer{number}.png,"(0, 0, 48, 48)",{votes}\n')


def fer2013(root: Path) -> None:
    append(root / "fer2013.csv", "emotion,pixels,Usage\n")
    for number, usage in enumerate(USAGE):
        append(root / "fer2013.csv", f"{number % 7},{' '.join([str(number)] * 2304)},{usage}\n")


def rafdb(root: Path) -> None:
    for number in range(COUNT):
        name = f"{'train' if number < 8 else 'test'}_{number}"
        put(root / "Image/aligned" / f"{name}_aligned.jpg", picture(number))
        append(root / "EmoLabel/list_patition_label.txt", f"{name}.jpg {number % 7 + 1}\n")


def affectnet(root: Path) -> None:
    for number in range(COUNT):
        put(root / f"train_set/images/{number}.png", picture(number))
        file = io.BytesIO()
        np.save(file, np.array(str(number % 8)))
        put(root / f"train_set/annotations/{number}_exp.npy", file.getvalue())


def ckplus(root: Path) -> None:
    for number in range(COUNT):
        label = ("anger", "contempt", "disgust", "fear", "happy", "sadness", "surprise")[number % 7]
        put(root / "CK+48" / label / f"S{number:03}_001_00000001.png", picture(number))


def folders(root: Path) -> None:
    for number in range(COUNT):
        put(root / ("train", "test")[number > 7] / "abcd"[number % 4] / f"{number}.png", picture(number))


def table(root: Path) -> None:
    append(root / "labels.csv", "path,label\n")
    for number in range(COUNT):
        put(root / f"faces/{number}.png", picture(number))
        append(root / "labels.csv", f"faces/{number}.png,{'abcd'[number % 4]}\n")


MAKERS: dict[str, Callable[[Path], None]] = {
    maker.__name__: maker for maker in (ferplus, fer2013, rafdb, affectnet, ckplus, folders, table)
}


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def append(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(text)


def read(dataset: str, root: Path) -> tuple[Source, np.ndarray]:
    with look(root) as found:
        source = DATASETS[dataset].read(found, Wanted())
        return source, np.concatenate(list(source.chunks()))


def labels(source: Source, images: np.ndarray) -> dict[int, str]:
    """Number of each picture -> its class."""
    places = source.table[list(source.classes)].to_numpy().argmax(1)
    return {int(image.ravel()[0]): source.classes[place] for image, place in zip(images, places)}


@pytest.mark.parametrize("dataset", DATASETS)
def test_what_a_reader_returns(dataset: str, tmp_path: Path) -> None:
    MAKERS[dataset](tmp_path)
    source, images = read(dataset, tmp_path)
    assert images.dtype == np.uint8
    assert images.shape == source.images.shape
    assert len(labels(source, images)) == len(images) == len(source.table) == COUNT
    assert source.table.columns.tolist() == ["name", "usage", "subject", *source.vote_columns]
    assert source.vote_columns[: len(source.classes)] == source.classes
    assert set(source.table["usage"]) <= {"train", "val", "test"} or set(source.table["usage"]) == {""}
    if source.labels == "hard":
        assert (source.table[list(source.vote_columns)].sum(axis=1) == 1).all()
    assert source.read
    assert source.left_out == {}


# What people do: each takes a file, its lines if it is a list, and random numbers.


def shuffle_lines(file: Path, lines: list[str], draw: Any) -> None:
    head = lines[:1] if "," in lines[0] and not lines[0][0].isdigit() and "(" not in lines[0] else []
    file.write_text("".join([*head, *draw(st.permutations(lines[len(head) :]))]))


def cut_lines(file: Path, lines: list[str], draw: Any) -> None:
    file.write_text("".join(lines[: draw(st.integers(1, len(lines)))]))


def double_line(file: Path, lines: list[str], draw: Any) -> None:
    append(file, draw(st.sampled_from(lines)))


def blank_line(file: Path, lines: list[str], draw: Any) -> None:
    lines.insert(draw(st.integers(0, len(lines))), draw(st.sampled_from(["\n", ",,\n", "   \n"])))
    file.write_text("".join(lines))


def remove_file(file: Path, lines: list[str], draw: Any) -> None:
    file.unlink()


def copy_file(file: Path, lines: list[str], draw: Any) -> None:
    shutil.copy(file, file.with_name(f"copy of {file.name}"))


def rename_file(file: Path, lines: list[str], draw: Any) -> None:
    file.rename(file.with_name(draw(st.sampled_from([file.name.upper(), f"x{file.name}", f".{file.name}"]))))


def cut_file(file: Path, lines: list[str], draw: Any) -> None:
    file.write_bytes(file.read_bytes()[: draw(st.integers(0, file.stat().st_size))])


LINES = [shuffle_lines, cut_lines, double_line, blank_line]
FILES = [remove_file, copy_file, rename_file, cut_file]


@pytest.mark.parametrize("dataset", DATASETS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_reader_reads_less_than_is_there_without_a_word(dataset: str, data: st.DataObject) -> None:
    """Whatever is done to the files, all of them are read, or named among what was left out, or all is refused.

    And what is read keeps its label.
    """
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        MAKERS[dataset](root)
        before = labels(*read(dataset, root))
        for _ in range(data.draw(st.integers(1, 3))):
            files = sorted(file for file in root.rglob("*") if file.is_file())
            listed = [file for file in files if file.suffix in (".csv", ".txt") and file.stat().st_size]
            kind = data.draw(st.sampled_from([*(LINES if listed else []), *FILES]))
            if not files:
                return
            file = data.draw(st.sampled_from(listed if kind in LINES else files))
            kind(file, file.read_text().splitlines(keepends=True) if kind in LINES else [], data.draw)
        pictures = [file for file in root.rglob("*") if file.suffix.lower() in (".png", ".jpg")]
        message = ""
        try:
            source, images = read(dataset, root)
        except UserError as refusal:
            message = str(refusal)
        if message:
            assert "\n" not in message
            return
        left_out = {name for names in source.left_out.values() for name in names}
        if dataset == "fer2013":
            lines = (root / source.read[0]).read_text().split("\n")
            assert len(images) == sum(bool(line.strip(", ")) for line in lines) - 1
        else:
            said = [file for file in pictures if str(file.relative_to(root)) in left_out]
            assert len(images) + len(said) == len(pictures)
        assert all(before[number] == label for number, label in labels(source, images).items())


def test_counts_are_said_beside_the_published_ones() -> None:
    assert counted("rafdb", {"train": 12271, "test": 3068}) == counted("folders", {"": 3}) == ""
    assert counted("rafdb", {"train": 12270, "test": 3068}) == " (published: 12,271 train, 3,068 test)"
    assert counted("ckplus", {"": 980}) == " (published: 981 images)"
    assert counted("fer2013", {"train": 28709, "test": 7000}) == " (published: 28,709 train, 7,178 test)"
