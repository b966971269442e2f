"""AffectNet's csv pair with face boxes, and its folders with an annotation file for each picture."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import change, swap, tells
from test_folders import put, read, rows

from fer.data.readers import affectnet

HEADER = "subDirectory_filePath,face_x,face_y,face_width,face_height,facial_landmarks,expression,valence,arousal"
MEANT = ["neutral", "happiness", "sadness", "surprise", "fear", "disgust", "anger", "contempt"]  # by their number
SETS = {"training.csv": "train", "validation.csv": "test"}
IMAGES, LEFT_OUT = "Manually_Annotated/Manually_Annotated_Images", "none, uncertain or no face, as annotated"


def tables(root: Path) -> Path:
    """Eleven rows each: all expressions from 0 to 10."""
    put(root, [f"{IMAGES}/{n}/{name[:2]}{n}.jpg" for name in SETS for n in range(11)])
    for name in SETS:
        lines = [f"{n}/{name[:2]}{n}.jpg,1,2,6,5,0.5;0.5,{n},0.1,-0.2" for n in range(11)]
        (root / name).write_text("\n".join([HEADER, *lines]) + "\n")
    return root


def annotations(root: Path) -> Path:
    put(root, [f"{folder}/images/{n}.jpg" for folder in affectnet.SETS for n in range(9)])
    for folder, kind in (("train_set", int), ("val_set", str)):  # the label is a number, or its text
        (root / folder / "annotations").mkdir()
        for n in range(9):
            for what, value in (("exp", kind(n)), ("val", "0.1"), ("lnd", "0 0")):
                np.save(root / folder / f"annotations/{n}_{what}.npy", np.array(value))
    return root


def test_tables_with_boxes(tmp_path: Path) -> None:
    source = read(tables(tmp_path), affectnet.read)
    assert rows(source) == {
        f"{IMAGES}/{n}/{name[:2]}{n}.jpg": (usage, "", label, 11 * number + n)
        for number, (name, usage) in enumerate(SETS.items()) for n, label in enumerate(MEANT)
    }  # fmt: skip
    assert source.images.shape == (16, 6, 6)  # the square around the box
    assert (source.classes, source.read, len(source.left_out[LEFT_OUT])) == (affectnet.CLASSES, [*SETS], 6)


def test_folders_with_annotations(tmp_path: Path) -> None:
    source = read(annotations(tmp_path), affectnet.read)
    assert {name: row[:3] for name, row in rows(source).items()} == {
        f"{folder}/images/{n}.jpg": (usage, "", label)
        for folder, usage in affectnet.SETS.items() for n, label in enumerate(MEANT)
    }  # fmt: skip
    assert [len(source.left_out[reason]) for reason in (LEFT_OUT, "no part of the data set")] == [2, 36]


EXP, PICTURE = "train_set/annotations/3_exp.npy", "train_set/images/3.jpg"
NOTHING = ": no AffectNet found, neither training.csv and validation.csv nor train_set ... data.dataset to folders)"
MISTAKES: list[tuple[Callable[[Path], Path], str, Callable[[str], str] | None, str]] = [
    (tables, "validation.csv", None, ": holds no validation.csv of AffectNet: put it there, too"),
    (tables, f"{IMAGES}/*/tr[259].jpg", None, ": 2 of 22 rows have no partner, the first lacks 2/tr2.jpg: restore it"),
    (tables, "training.csv", swap(",3,0.1", ",11,0.1"), "/training.csv line 5: expression is '11': must be a whole"),
    (tables, "training.csv", swap(",1,2,6", ",NULL,2,6"), "/training.csv line 2: the face's box is 'NULL 2 6 5': must"),
    (annotations, EXP, None, ": 1 of 18 pictures have no partner, the first lacks the annotation of train_set/images"),
    (
        annotations,
        PICTURE,
        None,
        f": 1 of 18 annotations have no partner, the first lacks the picture of {EXP}: restore",
    ),
    (annotations, EXP, lambda text: text[:-1] + "x", f"/{EXP}: holds no number from 0 to 10: restore it"),
    (annotations, f"old/{PICTURE}", str, f"/{PICTURE}: old/{PICTURE} is of the same set and number: keep one copy of"),
    (lambda root: root, "notes.txt", lambda text: "x", NOTHING),
]


@pytest.mark.parametrize(("make", "file", "edit", "message"), MISTAKES, ids=[row[3] for row in MISTAKES])
def test_mistakes(
    make: Callable[[Path], Path], file: str, edit: Callable[[str], str] | None, message: str, tmp_path: Path
) -> None:
    change(make(tmp_path), file, edit)
    tells(tmp_path, message, read, tmp_path, affectnet.read)


def test_an_annotation_is_not_unpickled(tmp_path: Path) -> None:
    np.save(annotations(tmp_path) / EXP, np.array(3, dtype=object), allow_pickle=True)
    tells(tmp_path, f"/{EXP}: holds no number from 0 to 10", read, tmp_path, affectnet.read)


def test_a_number_whose_file_is_damaged(tmp_path: Path) -> None:
    path = annotations(tmp_path) / EXP
    whole = path.read_bytes()
    for content in (whole.replace(b"}", b" ", 1), whole[:20], whole.replace(b"'descr'", b"'descr\x00")):
        path.write_bytes(content)
        tells(tmp_path, f"/{EXP}: holds no number from 0 to 10: restore it", read, tmp_path, affectnet.read)
