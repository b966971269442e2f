"""Class folders in every layout people have them, and FER2013 and CK+48 as their mirrors ship them."""

import io
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import change, tells
from PIL import Image

from fer.data.found import look
from fer.data.readers import ckplus, fer2013, folders
from fer.data.source import Source, Wanted

CLASSES = ["angry", "happy", "sad"]


def put(root: Path, names: list[str]) -> Path:
    """A picture under each name, whose grey is its place in the list."""
    for value, name in enumerate(names):
        buffer = io.BytesIO()
        Image.new("L", (8, 8), value).save(buffer, "PNG")
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(buffer.getvalue())
    return root


def read(path: Path, reader: Callable = folders.read, **wanted: Any) -> Source:
    with look(path) as found:
        source = reader(found, Wanted(**wanted))
        return Source(np.concatenate([*source.chunks()]), *list(vars(source).values())[1:])


def rows(source: Source) -> dict[str, tuple[str, str, str, int]]:
    """File name -> usage, subject, class, and the grey of the image."""
    votes, table = source.table[list(source.classes)].to_numpy(), source.table
    assert (votes.sum(axis=1) == 1).all()
    said = zip(table["usage"], table["subject"], (source.classes[label] for label in votes.argmax(1)))
    return {name: (*one, int(image[0, 0])) for name, one, image in zip(table["name"], said, source.images)}


@pytest.mark.parametrize(
    ("layout", "usages"),
    [
        ("{label}/{n}.png", [""]),
        ("{label}/deeper/{n}/x.png", [""]),
        ("{usage}/{label}/{n}.png", ["train", "val", "test"]),
        ("set/{Usage}/{Label}/{n}.JPG", ["train", "test"]),
        ("{label}/{usage}/{n}.png", ["train", "test"]),
        ("{Usage}ing/{label}/{n}.png", ["train", "test"]),
        ("{usage}set/{label}/{n}.png", ["train", "test"]),
    ],
)
def test_splits_above_below_or_none(layout: str, usages: list[str], tmp_path: Path) -> None:
    wanted: dict[str, tuple[str, str, str, int]] = {}
    for usage, label, n in ((usage, label, n) for usage in usages for label in CLASSES for n in range(2)):
        name = layout.format(usage=usage, label=label, n=n, Usage=usage.title(), Label=label.title())
        wanted[name] = (usage, "", label.title() if "Label" in layout else label, len(wanted))
    source = read(put(tmp_path, list(wanted)))
    assert (rows(source), source.labels, source.left_out) == (wanted, "hard", {})


def test_classes_keep_their_names_numbers_are_in_order_and_some_may_be_chosen(tmp_path: Path) -> None:
    put(tmp_path, [f"{label}/a.png" for label in ("10", "9", "Zürich", "b c", "NA")])
    assert read(tmp_path).classes == ("9", "10", "b c", "NA", "Zürich")
    source = read(tmp_path, classes=("NA", "10"))
    assert [row[2] for row in rows(source).values()] == ["10", "NA"]
    left_out = {"of a class that data.classes leaves out": ["9/a.png", "Zürich/a.png", "b c/a.png"]}
    assert (source.classes, source.left_out) == (("NA", "10"), left_out)
    told = "data.classes: the data set has no class bored; known: 9, 10, b c, NA, Zürich"
    tells(tmp_path, told, read, tmp_path, classes=("9", "bored"))
    tells(tmp_path, "data.classes: two or more different classes are needed; known", read, tmp_path, classes=("9", "9"))


def test_subjects_are_found_in_file_names(tmp_path: Path) -> None:
    put(tmp_path, ["happy/KA.HA1.29.tiff", "happy/KL.HA1.158.tiff", "sad/KA.SA1.33.tiff"])
    for pattern, subjects in ((r"^(..)\.", ["KA", "KL", "KA"]), (r"(\w+)/", ["happy", "happy", "sad"])):
        assert read(tmp_path, subject_pattern=pattern).table["subject"].tolist() == subjects
    told = "data.subject_pattern: '(\\d{3})' finds no subject in 2 of 3 file names, as KA.HA1.29.tiff: correct it"
    tells(tmp_path, told, read, tmp_path, subject_pattern=r"(\d{3})")


def test_accents_that_a_system_writes_apart_change_neither_names_nor_order(tmp_path: Path) -> None:
    """As macOS hands them over: a and an accent would come before b, but \u00e4 comes after it."""
    assert read(put(tmp_path, ["a\u0308/1.png", "b/1.png"])).classes == ("b", "\u00e4")


def test_what_is_no_picture_is_left_out_and_said(tmp_path: Path) -> None:
    put(tmp_path, ["happy/1.png", "happy/.hidden.png", "sad/1.png", "sad/without suffix"])
    (tmp_path / "sad" / "notes.txt").write_text("x")
    source = read(tmp_path)
    assert list(rows(source)) == ["happy/1.png", "sad/1.png", "sad/without suffix"]
    hidden = "hidden, half downloaded, or left by the operating system"
    assert source.left_out == {hidden: ["happy/.hidden.png"], "no part of the data set": ["sad/notes.txt"]}


BOTH = ["train/happy/1.png", "train/sad/1.png"]
MISTAKES: list[tuple[list[str], str]] = [
    ([], ": holds no pictures: put class folders there, as train/happiness/1.png, or correct the path in params.yaml"),
    (["a/1.png", "b/1.png", "x.png"], "/x.png: lies in no class folder: sort the pictures by class, as happiness/1"),
    (["happy/1.png", "happy/2.png"], ": holds pictures of one class only, happy: name the folder above the classes"),
    (
        [*BOTH, "old/sad/1.png"],
        "/old/sad/1.png: lies beside the folders of the splits, not in them: move or delete old",
    ),
    ([*BOTH, "training/sad/2.png"], ": holds several folders for train: train, training: keep one of them"),
    (["val/a/1.png", "test/b/1.png"], ": has test, val and no train: name the folder above them"),
    ([*BOTH, "val/happy/1.png"], ": has train and val and no test: rename val to test (split.val_share of train"),
    ([*BOTH, "test/Happy/1.png"], ": test has a folder Happy and train has none, but happy, sad: give them the same"),
    (["left/1.png", "right/1.png"], ": a class cannot be called left, as a column is: rename it"),
    (["row/1.png", "sad/1.png"], ": a class cannot be called row, as a column is: rename it"),
    ([f"{a}/{b}/1.png" for a in "ab" for b in CLASSES], ": holds several folders with class folders: a, b: give the "),
    ([f"{a}/train/{b}/1.png" for a in "ab" for b in CLASSES], ": holds several folders with class folders: a, b: give"),
    ([f"train/{a}/{b}/1.png" for a in "ab" for b in CLASSES], ": holds several folders with class folders: a, b: give"),
    (
        [*(f"{a}/{b}/1.png" for a in ("happy", "sad") for b in ("train", "test")), "sad/x.png"],
        "/sad/x.png: lies beside the folders of the splits, not in them: move or delete it",
    ),
    (["happy/1.png", "Happy/2.png", "sad/1.png"], ": a class is called both Happy and happy: write one of them every"),
]


@pytest.mark.parametrize(("names", "message"), MISTAKES)
def test_mistakes(names: list[str], message: str, tmp_path: Path) -> None:
    tells(tmp_path, message, read, put(tmp_path, names))


def packed(path: Path, folder: Path, prefix: str = "") -> None:
    """A zip of all files in `folder`."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, prefix + file.relative_to(folder).as_posix())


def test_an_archive_beside_the_folder_that_was_corrected_is_another_copy(tmp_path: Path) -> None:
    put(tmp_path / "d", [f"{label}/{n}.png" for label in CLASSES for n in range(2)])
    packed(tmp_path / "d.zip", tmp_path / "d")
    assert len(rows(read(tmp_path))) == 6
    (tmp_path / "d/sad/1.png").unlink()
    told = "/d/angry/0.png: lies at the same place as d.zip/angry/0.png: if they are copies, keep one; if not, unpack "
    tells(tmp_path, told, read, tmp_path)


@pytest.mark.parametrize(
    ("top", "told"), [("", ""), ("{usage}/", ""), ("images/", ": only the names of the archives ")]
)
def test_archives_that_are_called_like_splits(top: str, told: str, tmp_path: Path) -> None:
    for n, usage in enumerate(("train", "Test")):
        put(tmp_path / usage, [f"{label}/{n}.png" for label in CLASSES])
        packed(tmp_path / f"{usage}.zip", tmp_path / usage, top.format(usage=usage))
        shutil.rmtree(tmp_path / usage)
    if told:
        tells(tmp_path, f"{told}Test, train tell the splits: unpack each into a folder of its name", read, tmp_path)
        return
    found = {(usage, label) for usage, _, label, _ in rows(read(tmp_path)).values()}
    assert found == {(usage, label) for usage in ("train", "test") for label in CLASSES}


def test_an_archive_called_test_that_holds_all_splits(tmp_path: Path) -> None:
    put(tmp_path / "x", [f"{usage}/{label}/1.png" for usage in ("train", "test") for label in CLASSES])
    packed(tmp_path / "test.zip", tmp_path / "x", "DATASET/")
    shutil.rmtree(tmp_path / "x")
    assert [usage for usage, *_ in rows(read(tmp_path)).values()] == ["test"] * 3 + ["train"] * 3


def test_folders_of_people_below_the_classes_may_be_called_dev(tmp_path: Path) -> None:
    put(tmp_path, ["happy/anna/1.png", "happy/dev/1.png", "sad/anna/1.png"])
    assert [row[:3] for row in rows(read(tmp_path)).values()] == [("", "", "happy"), ("", "", "happy"), ("", "", "sad")]


def test_a_document_is_no_archive_of_pictures(tmp_path: Path) -> None:
    put(tmp_path, ["happy/1.png", "sad/1.png", "x/word/media/1.png"])
    packed(tmp_path / "happy" / "notes.docx", tmp_path / "x")
    with zipfile.ZipFile(tmp_path / "happy" / "notes.docx", "a") as document:
        document.writestr("[Content_Types].xml", "")
    shutil.rmtree(tmp_path / "x")
    source = read(tmp_path)
    assert (list(rows(source)), source.left_out) == (
        ["happy/1.png", "sad/1.png"], {"no part of the data set": ["happy/notes.docx"]}
    )  # fmt: skip


FER2013_FOLDERS = ["angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"]
MEANT = ["anger", "disgust", "fear", "happiness", "neutral", "sadness", "surprise"]


def test_fer2013_as_class_folders_whose_names_tell_the_split(tmp_path: Path) -> None:
    inside = {
        "train/{}/Training_0.jpg": "train",
        "test/{}/PublicTest_1.jpg": "val",
        "test/{}/PrivateTest_2.jpg": "test",
    }
    wanted = {name.format(folder): (usage, "", label) for name, usage in inside.items()
              for folder, label in zip(FER2013_FOLDERS, MEANT)}  # fmt: skip
    source = read(put(tmp_path, list(wanted)), fer2013.read)
    assert {name: row[:3] for name, row in rows(source).items()} == wanted
    assert source.classes == fer2013.CLASSES
    (tmp_path / "train/angry/Training_0.jpg").rename(tmp_path / "test/angry/Training_0.jpg")
    told = "/test/angry/Training_0.jpg: its name says train, its folder test: move it back"
    tells(tmp_path, told, read, tmp_path, fer2013.read)
    (tmp_path / "train/sad").rename(tmp_path / "train/bored")
    tells(tmp_path, ": folder 'bored' is none of neutral, ... fear: remove it", read, tmp_path, fer2013.read)


def test_fer2013_from_its_rows(tmp_path: Path) -> None:
    usages, table = ["Training", "PublicTest", "PrivateTest"], tmp_path / "fer2013.csv"
    lines = [f"{n % 7},{' '.join([str(n)] * 2304)},{usages[n % 3]}" for n in range(21)]
    table.write_text("\n".join(["emotion,pixels,Usage", *lines]) + "\n")
    source = read(tmp_path, fer2013.read)
    assert (source.labels, source.read, source.images.shape) == ("hard", ["fer2013.csv"], (21, 48, 48))
    assert source.images[:, 0, 0].tolist() == list(range(21))
    assert source.table["usage"].tolist() == ["train", "val", "test"] * 7
    labels = source.table[list(source.classes)].to_numpy().argmax(1)
    by_number = ["anger", "disgust", "fear", "happiness", "sadness", "surprise", "neutral"]  # as published
    assert [source.classes[label] for label in labels] == by_number * 3
    source = read(tmp_path, fer2013.read, classes=("anger", "fear"))
    left = source.left_out["of a class that data.classes leaves out"]
    assert (source.classes, len(source.table), len(left)) == (("anger", "fear"), 6, 15)
    tells(tmp_path, "data.size: rows of pixels are 48x48 and name no", read, tmp_path, fer2013.read, size=64)
    change(tmp_path, table.name, lambda text: text.replace("\n3,", "\n7,"))
    told = "/fer2013.csv line 5: emotion must be a whole number, 0 to 6: use fer2013.csv or icml"
    tells(tmp_path, told, read, tmp_path, fer2013.read)


def test_ckplus_has_subjects_and_no_splits(tmp_path: Path) -> None:
    inside = ("anger", "contempt", "disgust", "fear", "happy", "sadness", "surprise")
    people = [f"{person}_00{n}_0000001{n}.png" for person in ("S005", "S130") for n in range(3)]
    source = read(put(tmp_path, [f"CK+48/{label}/{name}" for label in inside for name in people]), ckplus.read)
    assert (source.classes, set(source.table["usage"])) == (ckplus.CLASSES, {""})
    assert source.table["subject"].value_counts().to_dict() == {"S005": 21, "S130": 21}
    assert [row[2] for row in rows(source).values()].count("happiness") == 6


def test_folders_whose_accents_are_written_in_two_ways_are_one_class(tmp_path: Path) -> None:
    joined, parted = "fr\u00f6h", "fro\u0308h"
    labels = {"1": joined, "2": parted, "3": "sad"}
    put(tmp_path, [f"{label}/{who}_{n}.png" for n, label in labels.items() for who in (parted, joined)])
    source = read(tmp_path, subject_pattern="(.*)_")
    assert (set(source.classes), set(source.table["subject"])) == ({joined, "sad"}, {joined})
    assert source.table[joined].tolist() == [1, 1, 1, 1, 0, 0]
    assert read(tmp_path, classes=("sad", parted)).classes == ("sad", joined)


def test_a_class_is_one_however_its_accents_are_written_in_each_split(tmp_path: Path) -> None:
    put(tmp_path, ["train/caf\u00e9/0.png", "train/b/1.png", "test/cafe\u0301/2.png", "test/b/3.png"])
    assert [row[2] for row in rows(read(tmp_path)).values()].count("caf\u00e9") == 2
