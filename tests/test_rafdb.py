"""RAF-DB as its publisher ships it, and as Kaggle's mirror does."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import change, lines, swap, tells
from test_folders import put, read, rows

from fer.data.readers import rafdb

MEANT = ["", "surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral"]  # by the publisher's number
LABELS = {f"train_{n:05}": 1 + n % 7 for n in range(14)} | {f"test_{n:04}": 1 + n % 7 for n in range(7)}
LIST, ALIGNED = "basic/EmoLabel/list_patition_label.txt", "basic/Image/aligned"
WANTED = {name: (name.split("_")[0], "", MEANT[label]) for name, label in LABELS.items()}


def published(root: Path) -> Path:
    put(root, [f"{ALIGNED}/{name}_aligned.jpg" for name in LABELS])
    put(root, [f"basic/Image/original/{name}.jpg" for name in LABELS])
    change(root, LIST, lambda text: "".join(f"{name}.jpg {label}\n" for name, label in LABELS.items()))
    return root


def test_the_list_with_aligned_or_else_original_pictures(tmp_path: Path) -> None:
    source = read(published(tmp_path), rafdb.read)
    assert {name[len(ALIGNED) + 1 : -12]: row[:3] for name, row in rows(source).items()} == WANTED
    assert (source.classes, source.labels, source.read) == (rafdb.CLASSES, "hard", [ALIGNED, LIST])
    assert len(source.left_out["the aligned pictures are read instead"]) == 21
    change(tmp_path, f"{ALIGNED}/*", None)
    assert read(tmp_path, rafdb.read).read == ["basic/Image/original", LIST]


def test_class_folders_as_on_kaggle(tmp_path: Path) -> None:
    put(tmp_path, [f"DATASET/{name.split('_')[0]}/{label}/{name}_aligned.jpg" for name, label in LABELS.items()])
    source = read(tmp_path, rafdb.read)
    assert {name.rpartition("/")[2][:-12]: row[:3] for name, row in rows(source).items()} == WANTED


MISTAKES: list[tuple[str, Callable[[str], str] | None, str]] = [
    (LIST, lines(0, 15), f"/{LIST}: has no line for 6 of 21 pictures (the first: /{ALIGNED}/test_0001_aligned.jpg)"),
    (f"{ALIGNED}/train_0000[12]*", None, f"/{LIST}: names 2 of 21 pictures that are not there (the first: train_00001"),
    ("**/*.jpg", None, ": holds a list of RAF-DB and no pictures: put Image/aligned of RAF-DB there"),
    (LIST, None, ": holds aligned pictures and no list_patition_label.txt: put EmoLabel of RAF-DB there"),
    (LIST, lambda text: text + lines(0, 1)(text), f"/{LIST} line 22: train_00000.jpg stands in list_patition_label.txt"
     " line 1 as well: delete one of them"),
    (LIST, swap(" 1\n", " 11\n"), f"/{LIST} line 1: 'train_00000.jpg 11' is no name and number from 1 to 7: restore"),
    (LIST, swap("train_00000", "x"), f"/{LIST} line 1: 'x.jpg' begins with neither train_ nor test_: restore the name"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "edit", "message"), MISTAKES, ids=[row[2] for row in MISTAKES])
def test_mistakes(file: str, edit: Callable[[str], str] | None, message: str, tmp_path: Path) -> None:
    change(published(tmp_path), file, edit)
    tells(tmp_path, message, read, tmp_path, rafdb.read)
