"""Rules for every reader: nothing is lost without a word, whatever people do to the files; the table of data sets."""

import io
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import change, tells
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_found import USELESS, put, zipped

from fer.data.datasets import DATASETS, counted
from fer.data.found import ARCHIVES, PICTURES, look
from fer.data.source import Source, Wanted
from fer.errors import UserError

COUNT = 12  # pictures of each data set; the grey of a picture is its number
USAGE = ["Training"] * 6 + ["PublicTest"] * 3 + ["PrivateTest"] * 3
FOLDER = {"Training": "FER2013Train", "PublicTest": "FER2013Valid", "PrivateTest": "FER2013Test"}
CK_CLASSES = ("anger", "contempt", "disgust", "fear", "happy", "sadness", "surprise")


def picture(root: Path, name: str, number: int) -> None:
    buffer = io.BytesIO()
    Image.new("L", (48, 48), number).save(buffer, "PNG")
    change(root, name, lambda text: buffer.getvalue().decode("latin-1"))


def append(root: Path, name: str, line: str) -> None:
    change(root, name, lambda text: f"{text}{line}\n")


# What makes picture `number` of a data set, in the publisher's exact layout


def ferplus(root: Path, number: int) -> None:
    votes = ",".join(str(10 * (column == number % 8)) for column in range(10))
    picture(root, f"{FOLDER[USAGE[number]]}/fer{number}.png", number)
    append(root, f"{FOLDER[USAGE[number]]}/label.csv", f'fer{number}.png,"(0, 0, 48, 48)",{votes}')


def fer2013(root: Path, number: int) -> None:
    if not number:
        append(root, "fer2013.csv", "emotion,pixels,Usage")
    append(root, "fer2013.csv", f"{number % 7},{' '.join([str(number)] * 2304)},{USAGE[number]}")


def rafdb(root: Path, number: int) -> None:
    name = f"{'train' if number < 8 else 'test'}_{number}"
    picture(root, f"Image/aligned/{name}_aligned.jpg", number)
    append(root, "EmoLabel/list_patition_label.txt", f"{name}.jpg {number % 7 + 1}")


def affectnet(root: Path, number: int) -> None:
    picture(root, f"train_set/images/{number}.png", number)
    (root / "train_set/annotations").mkdir(exist_ok=True)
    np.save(root / f"train_set/annotations/{number}_exp.npy", np.array(str(number % 8)))


def ckplus(root: Path, number: int) -> None:
    picture(root, f"CK+48/{CK_CLASSES[number % 7]}/S{number:03}_001_00000001.png", number)


def folders(root: Path, number: int) -> None:
    picture(root, f"{('train', 'test')[number > 7]}/{'abcd'[number % 4]}/{number}.png", number)


def table(root: Path, number: int) -> None:
    picture(root, f"faces/{number}.png", number)
    append(root, "labels.csv", f"faces/{number}.png,{'abcd'[number % 4]}" if number else "path,label\nfaces/0.png,a")


MAKERS: dict[str, Callable[[Path, int], None]] = {
    maker.__name__: maker for maker in (ferplus, fer2013, rafdb, affectnet, ckplus, folders, table)
}


def read(dataset: str, root: Path) -> tuple[Source, dict[int, str]]:
    """The data set, and the number of each picture -> its class."""
    with look(root) as found:
        source = DATASETS[dataset].read(found, Wanted())
        images = np.concatenate(list(source.chunks()))
    assert (images.dtype, images.shape) == (np.uint8, source.images.shape)
    places = source.table[list(source.classes)].to_numpy().argmax(1)
    return source, {int(image.ravel()[0]): source.classes[place] for image, place in zip(images, places, strict=True)}


def made(dataset: str, root: Path) -> dict[int, str]:
    """The classes of a whole data set, of which everything is read."""
    for number in range(COUNT):
        MAKERS[dataset](root, number)
    source, labels = read(dataset, root)
    assert (len(labels), len(source.table), source.left_out) == (COUNT, COUNT, {})
    assert source.table.columns.tolist() == ["name", "usage", "subject", *source.vote_columns]
    assert set(source.table["usage"]) in ({"train", "val", "test"}, {"train", "test"}, {"train"}, {""})
    return labels


# What people do: the lines of a list, or a file, and random numbers


def shuffled(lines: list[str], draw: Any) -> list[str]:
    head = lines[:1] if "," in lines[0] and not lines[0][0].isdigit() and "(" not in lines[0] else []
    return [*head, *draw(st.permutations(lines[len(head) :]))]


def blank(lines: list[str], draw: Any) -> list[str]:
    place = draw(st.integers(0, len(lines)))
    return [*lines[:place], draw(st.sampled_from(["\n", ",,\n", "   \n"])), *lines[place:]]


LINES: list[Callable[[list[str], Any], list[str]]] = [
    shuffled, blank, lambda lines, draw: lines[: draw(st.integers(1, len(lines)))],
    lambda lines, draw: [*lines, draw(st.sampled_from(lines))],
]  # fmt: skip
FILES: list[Callable[[Path, Any], Any]] = [
    lambda file, draw: file.unlink(),
    lambda file, draw: shutil.copy(file, file.with_name(f"copy of {file.name}")),
    lambda file, draw: file.rename(
        file.with_name(draw(st.sampled_from([file.name.upper(), f"x{file.name}", f".{file.name}"])))
    ),
    lambda file, draw: file.write_bytes(file.read_bytes()[: draw(st.integers(0, file.stat().st_size))]),
]


@pytest.mark.parametrize("dataset", DATASETS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_reader_reads_less_than_is_there_without_a_word(dataset: str, data: st.DataObject) -> None:
    """Whatever is done to the files, all are read with their labels, or named as left out, or all is refused."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        before = made(dataset, root)
        for _ in range(data.draw(st.integers(1, 3))):
            files = sorted(file for file in root.rglob("*") if file.is_file())
            listed = [file for file in files if file.suffix in (".csv", ".txt") and file.stat().st_size]
            if listed and data.draw(st.booleans()):
                file, edit = data.draw(st.sampled_from(listed)), data.draw(st.sampled_from(LINES))
                file.write_text("".join(edit(file.read_text().splitlines(keepends=True), data.draw)))
            elif files:
                data.draw(st.sampled_from(FILES))(data.draw(st.sampled_from(files)), data.draw)
        source = None
        try:
            source, labels = read(dataset, root)
        except UserError as error:
            message = str(error)
        if source is None:
            assert "\n" not in message
            return
        if dataset == "fer2013":
            there = sum(bool(line.strip(", ")) for line in (root / source.read[0]).read_text().split("\n")) - 1
        else:
            left_out = {name for names in source.left_out.values() for name in names}
            pictures = [file for file in root.rglob("*") if file.suffix.lower() in PICTURES]
            there = sum(str(file.relative_to(root)) not in left_out for file in pictures)
        assert len(source.table) == there
        assert labels.items() <= before.items()


@pytest.mark.parametrize("dataset", DATASETS)
def test_an_archive_that_cannot_be_read_is_refused_beside_a_whole_data_set(dataset: str, tmp_path: Path) -> None:
    """A class or the test split may be in it; but of RAR and 7z people leave what they have unpacked."""
    made(dataset, tmp_path)
    for name, (content, reason) in USELESS.items():
        (tmp_path / name).write_bytes(content)
        if name.endswith(ARCHIVES) and not name.endswith(".rar"):
            tells(tmp_path, f"/{name}: {reason}, or delete it", read, dataset, tmp_path)
        (tmp_path / name).unlink()
    unread = {"x.rar": b"Rar!\x1a\7\0", "y.7Z": b"7z\xbc\xaf\x27\x1c\0", "z.zip": b"Rar!\0"}
    put(tmp_path, {**unread, "model.pt": zipped({"a": b""})[:-5], "none.zip": zipped({})})
    assert read(dataset, tmp_path)[0].left_out == {
        "an archive that is not read": ["x.rar", "y.7Z", "z.zip"],
        "a damaged archive under another name": ["model.pt"],
        "an archive without files": ["none.zip"],
    }


def test_counts_are_said_beside_the_published_ones() -> None:
    assert counted("rafdb", {"train": 12271, "test": 3068}) == counted("folders", {"": 3}) == ""
    assert counted("ckplus", {"": 980}) == " (published: 981 images)"
    assert counted("fer2013", {"train": 28709, "test": 7000}) == " (published: 28,709 train, 7,178 test)"
    assert counted("affectnet", {"train": 283000, "test": 3500}) == " (published: 283,901 train, 3,500 test)"
