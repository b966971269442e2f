"""Class folders in every layout people have them, and FER2013 and CK+48 as their mirrors ship them."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fer.data.found import look
from fer.data.readers import ckplus, fer2013, folders
from fer.data.source import Source, Wanted
from fer.errors import UserError

CLASSES = ["angry", "happy", "sad"]


def grey(value: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), value).save(buffer, kind)
    return buffer.getvalue()


def put(root: Path, names: list[str]) -> Path:
    """A picture under each name, whose grey is its place in the list."""
    for value, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(grey(value))
    return root


def read(path: Path, reader: Callable = folders.read, **wanted: Any) -> Source:
    with look(path) as found:
        source = reader(found, Wanted(**wanted))
        return Source(np.asarray(source.images), *list(vars(source).values())[1:])


def rows(source: Source) -> dict[str, tuple[str, str, str, int]]:
    """File name -> usage, subject, class, and the grey of the image."""
    votes = source.table[list(source.classes)].to_numpy()
    assert (votes.sum(axis=1) == 1).all()
    named = zip(source.table["name"], source.table["usage"], source.table["subject"], votes.argmax(1), source.images)
    return {
        name: (usage, subject, source.classes[label], int(image[0, 0])) for name, usage, subject, label, image in named
    }


LAYOUTS = {  # pattern of the names -> usages
    "{label}/{n}.png": [""],
    "{label}/deeper/{n}/x.png": [""],
    "{usage}/{label}/{n}.png": ["train", "val", "test"],
    "set/{Usage}/{Label}/{n}.JPG": ["train", "test"],
    "{label}/{usage}/{n}.png": ["train", "test"],
    "{Usage}ing/{label}/{n}.png": ["train", "test"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_above_below_or_none(layout: str, tmp_path: Path) -> None:
    names, expected = [], []
    for usage in LAYOUTS[layout]:
        for label in CLASSES:
            for n in range(2):
                names.append(layout.format(usage=usage, label=label, n=n, Usage=usage.title(), Label=label.title()))
                expected.append((usage, "", label.title() if "Label" in layout else label, len(names) - 1))
    source = read(put(tmp_path, names))
    assert rows(source) == dict(zip(names, expected))
    assert (source.labels, source.form, source.left_out) == ("hard", "class folders", {})
    assert [name.lower() for name in source.classes] == CLASSES


def test_numbers_are_in_order_and_names_stay_as_they_are(tmp_path: Path) -> None:
    names = [f"{label}/a.png" for label in ("10", "9", "Zürich", "b c", "NA")]
    assert read(put(tmp_path, names)).classes == ("9", "10", "b c", "NA", "Zürich")


def test_classes_may_be_chosen(tmp_path: Path) -> None:
    put(tmp_path, [f"{label}/{n}.png" for label in CLASSES for n in range(2)])
    source = read(tmp_path, classes=("sad", "angry"))
    assert source.classes == ("sad", "angry")
    assert [label for _, _, label, _ in rows(source).values()] == ["angry", "angry", "sad", "sad"]
    assert source.left_out == {"of a class that data.classes leaves out": ["happy/0.png", "happy/1.png"]}
    for classes, message in (
        (("sad", "bored"), "data.classes: the data set has no class bored; known: angry, happy, sad"),
        (("sad",), "data.classes: two or more different classes are needed; known: angry, happy, sad"),
    ):
        assert refused(tmp_path, classes=classes) == message


def test_subjects_are_found_in_file_names(tmp_path: Path) -> None:
    put(tmp_path, ["happy/KA.HA1.29.tiff", "happy/KL.HA1.158.tiff", "sad/KA.SA1.33.tiff"])
    source = read(tmp_path, subject_pattern=r"^(..)\.")
    assert source.table["subject"].tolist() == ["KA", "KL", "KA"]
    source = read(tmp_path, subject_pattern=r"(\w+)/")
    assert source.table["subject"].tolist() == ["happy", "happy", "sad"]
    assert refused(tmp_path, subject_pattern=r"(\d{3})") == (
        "data.subject_pattern: '(\\d{3})' finds no subject in 2 of 3 file names, as KA.HA1.29.tiff: correct it"
    )


def test_what_is_no_picture_is_left_out_and_said(tmp_path: Path) -> None:
    put(tmp_path, ["happy/1.png", "happy/.hidden.png", "sad/1.png", "sad/Thumbs.db", "sad/without suffix"])
    (tmp_path / "sad" / "notes.txt").write_text("x")
    (tmp_path / "happy" / "gone.png").symlink_to("nowhere")
    source = read(tmp_path)
    assert list(rows(source)) == ["happy/1.png", "sad/1.png", "sad/without suffix"]
    assert source.left_out == {
        "hidden, half downloaded, or left by the operating system": ["happy/.hidden.png", "sad/Thumbs.db"],
        "a link to nothing": ["happy/gone.png"],
        "no part of the data set": ["sad/notes.txt"],
    }


NO_CLASS = "lies in no class folder: sort the pictures by class, as"
BOTH = ["train/happy/1.png", "train/sad/1.png"]
MISTAKES: dict[str, tuple[list[str], str]] = {
    "nothing": (
        [], "{root}: holds no pictures: put class folders there, as train/happiness/1.png, or correct data.path",
    ),
    "a picture beside the classes": (["a/1.png", "b/1.png", "x.png"], f"{{root}}/x.png: {NO_CLASS} happiness/1.png"),
    "one class": (
        ["happy/1.png", "happy/2.png"],
        "{root}: holds pictures of one class only, happy: name the folder above the classes",
    ),
    "a folder beside the splits": (
        [*BOTH, "test/sad/1.png", "old/sad/1.png"],
        "{root}/old/sad/1.png: lies beside the folders of the splits, not in them: move or delete old",
    ),
    "no train": (["val/a/1.png", "test/b/1.png"], "{root}: has test, val and no train: name the folder above them"),
    "no test": (
        [*BOTH, "val/happy/1.png"],
        "{root}: has train and val and no test: rename val to test (split.val_share of train becomes val)",
    ),
    "a class spelled in two ways": (
        [*BOTH, "test/Happy/1.png"],
        "{root}: test has a folder Happy and train has none, but happy, sad: give them the same names",
    ),
    "a class called as a column": (
        ["row/1.png", "sad/1.png"], "{root}: a class cannot be called row, as a column is: rename it",
    ),
    "two copies": (
        ["a/happy/1.png", "a/sad/1.png", "b/happy/1.png", "b/sad/1.png"],
        "{root}: holds several folders with class folders: a, b: set data.path to the one to read",
    ),
}  # fmt: skip


def refused(path: Path, reader: Callable = folders.read, **wanted: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(path, reader, **wanted)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str, tmp_path: Path) -> None:
    names, message = MISTAKES[mistake]
    assert refused(put(tmp_path, names)) == message.format(root=tmp_path)


# FER2013


FER2013_FOLDERS = ["angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"]
MEANT = ["anger", "disgust", "fear", "happiness", "neutral", "sadness", "surprise"]


def test_fer2013_as_class_folders_whose_names_tell_the_split(tmp_path: Path) -> None:
    names = [f"train/{label}/Training_{n}.jpg" for label in FER2013_FOLDERS for n in range(2)]
    names += [
        f"test/{label}/{usage}_{n}.jpg" for label in FER2013_FOLDERS for n, usage in enumerate(fer2013.SPLITS) if n
    ]
    source = read(put(tmp_path, names), fer2013.read)
    found = rows(source)
    assert source.classes == fer2013.CLASSES
    for name in names:
        folder, file = name.split("/")[1:]
        assert found[name][:3] == (fer2013.SPLITS[file.split("_")[0]], "", MEANT[FER2013_FOLDERS.index(folder)])
    (tmp_path / "train/angry/Training_0.jpg").rename(tmp_path / "test/angry/Training_0.jpg")
    assert refused(tmp_path, fer2013.read) == (
        f"{tmp_path}/test/angry/Training_0.jpg: its name says train, its folder test: move it back"
    )
    (tmp_path / "train/sad").rename(tmp_path / "train/bored")
    assert refused(tmp_path, fer2013.read) == (
        f"{tmp_path}: folder 'bored' is none of neutral, happiness, surprise, sadness, anger, disgust, fear: remove it"
    )


def pixel_rows(emotions: str = "0123456") -> str:
    usages = ["Training", "PublicTest", "PrivateTest"]
    lines = [f"{emotion},{' '.join([str(n)] * 2304)},{usages[n % 3]}" for n, emotion in enumerate(emotions * 3)]
    return "\n".join(["emotion,pixels,Usage", *lines]) + "\n"


def test_fer2013_from_its_rows(tmp_path: Path) -> None:
    (tmp_path / "fer2013.csv").write_text(pixel_rows())
    source = read(tmp_path, fer2013.read)
    assert (source.labels, source.read, source.images.shape) == ("hard", ["fer2013.csv"], (21, 48, 48))
    assert source.images[:, 0, 0].tolist() == list(range(21))
    assert source.table["usage"].tolist() == ["train", "val", "test"] * 7
    labels = source.table[list(source.classes)].to_numpy().argmax(1)
    assert [source.classes[label] for label in labels] == list(fer2013.EMOTIONS) * 3
    source = read(tmp_path, fer2013.read, classes=("anger", "fear"))
    assert (source.classes, len(source.table)) == (("anger", "fear"), 6)
    assert len(source.left_out["of a class that data.classes leaves out"]) == 15
    assert refused(tmp_path, fer2013.read, size=64) == (
        "data.size: rows of pixels are 48x48 and name no subjects: remove it"
    )

    (tmp_path / "fer2013.csv").write_text(pixel_rows("0127456"))
    assert refused(tmp_path, fer2013.read) == (
        f"{tmp_path}/fer2013.csv line 5: emotion must be a whole number, 0 to 6: "
        "use fer2013.csv or icml_face_data.csv as Kaggle ships it"
    )


# CK+48


def test_ckplus_has_subjects_and_no_splits(tmp_path: Path) -> None:
    names = [f"CK+48/{label}/S{person:03}_00{n}_0000001{n}.png"
             for label in ("anger", "contempt", "disgust", "fear", "happy", "sadness", "surprise")
             for person in (5, 130) for n in range(3)]  # fmt: skip
    source = read(put(tmp_path, names), ckplus.read)
    assert source.classes == ckplus.CLASSES
    assert set(source.table["usage"]) == {""}
    assert source.table["subject"].value_counts().to_dict() == {"S005": 21, "S130": 21}
    assert [label for _, _, label, _ in rows(source).values()].count("happiness") == 6
    (tmp_path / names[0]).rename(tmp_path / "CK+48/anger/x.png")
    assert refused(tmp_path, ckplus.read) == (
        "data.subject_pattern: '(S\\d+)_' finds no subject in 1 of 42 file names, as x.png: correct it"
    )
