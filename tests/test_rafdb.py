"""RAF-DB as its publisher ships it, and as Kaggle's mirror does."""

from collections.abc import Callable
from pathlib import Path

import pytest
from test_folders import put, read, refused, rows

from fer.data.readers import rafdb

MEANT = ["", "surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral"]  # by the publisher's number
LABELS = {f"train_{n:05}": 1 + n % 7 for n in range(14)} | {f"test_{n:04}": 1 + n % 7 for n in range(7)}
LIST = "basic/EmoLabel/list_patition_label.txt"
ALIGNED = "basic/Image/aligned"


def published(root: Path) -> Path:
    put(root, [f"{ALIGNED}/{name}_aligned.jpg" for name in LABELS])
    put(root, [f"basic/Image/original/{name}.jpg" for name in LABELS])
    (root / LIST).parent.mkdir()
    (root / LIST).write_text("".join(f"{name}.jpg {label}\n" for name, label in LABELS.items()))
    return root


def test_the_list_with_aligned_pictures(tmp_path: Path) -> None:
    source = read(published(tmp_path), rafdb.read)
    found = {name.rpartition("/")[2]: row for name, row in rows(source).items()}
    assert len(found) == 21
    for number, (name, label) in enumerate(LABELS.items()):
        expected = (name.split("_")[0], "", MEANT[label], number)
        assert found[f"{name}_aligned.jpg"] == expected
    assert (source.classes, source.labels, source.form) == (rafdb.CLASSES, "hard", "list")
    assert source.read == [ALIGNED, LIST]
    assert len(source.left_out["the aligned pictures are read instead"]) == 21
    for file in (tmp_path / ALIGNED).iterdir():
        file.unlink()
    assert read(tmp_path, rafdb.read).read == ["basic/Image/original", LIST]  # where there are no others


def test_class_folders_as_on_kaggle(tmp_path: Path) -> None:
    put(tmp_path, [f"DATASET/{name.split('_')[0]}/{label}/{name}_aligned.jpg" for name, label in LABELS.items()])
    (tmp_path / "train_labels.csv").write_text("image,label\n")
    source = read(tmp_path, rafdb.read)
    assert {name.rpartition("/")[2][:-12]: row[2] for name, row in rows(source).items()} == {
        name: MEANT[label] for name, label in LABELS.items()
    }
    assert source.table["usage"].value_counts().to_dict() == {"train": 14, "test": 7}
    assert source.left_out == {"no part of the data set": ["train_labels.csv"]}


def change_list(change: Callable[[list[str]], list[str]]) -> Callable[[Path], object]:
    return lambda root: (root / LIST).write_text("\n".join(change((root / LIST).read_text().splitlines())) + "\n")


PICTURE = f"{ALIGNED}/train_00001_aligned.jpg"
MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a list that is cut": (
        change_list(lambda lines: lines[:15]),
        f"{{root}}/{LIST}: has no line for 6 of 21 pictures (the first: {{root}}/{ALIGNED}/test_0001_aligned.jpg): "
        "restore the list",
    ),
    "missing pictures": (
        lambda root: [(root / PICTURE).unlink(), (root / PICTURE.replace("00001", "00002")).unlink()],
        f"{{root}}/{LIST}: names 2 of 21 pictures that are not there (the first: train_00001.jpg): "
        "put Image/aligned of RAF-DB there, whole",
    ),
    "no pictures": (
        lambda root: [file.unlink() for file in root.rglob("*.jpg")],
        "{root}: holds a list of RAF-DB and no pictures: put Image/aligned of RAF-DB there",
    ),
    "no list": (
        lambda root: (root / LIST).unlink(),
        "{root}: holds aligned pictures and no list_patition_label.txt: put EmoLabel of RAF-DB there",
    ),
    "a line twice": (
        change_list(lambda lines: [*lines, lines[0]]),
        f"{{root}}/{LIST} line 22: train_00000.jpg stands in list_patition_label.txt line 1 as well: "
        "delete one of them",
    ),
    "a label of the compound set": (
        change_list(lambda lines: [lines[0][:-1] + "11", *lines[1:]]),
        f"{{root}}/{LIST} line 1: 'train_00000.jpg 11' is no name and number from 1 to 7: restore the list",
    ),
    "another name": (
        change_list(lambda lines: ["x.jpg 1", *lines[1:]]),
        f"{{root}}/{LIST} line 1: 'x.jpg' begins with neither train_ nor test_: restore the name",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str, tmp_path: Path) -> None:
    change, message = MISTAKES[mistake]
    change(published(tmp_path))
    assert refused(tmp_path, rafdb.read) == message.format(root=tmp_path)
