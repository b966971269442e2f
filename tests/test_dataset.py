"""The splits as training reads them, their identity, and what is said when they are not whole or not of one piece."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CLASSES, refusal

from fer.data.dataset import DataSet, feed, open_data
from fer.files import sha256

SUMMARY, IMAGES = "splits/summary.json", "upscaled/images.npy"


def edit(data: Path, split: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    path = data / "splits" / f"{split}.csv"
    change(pd.read_csv(path, dtype=object, keep_default_na=False)).to_csv(path, index=False)


def set_cells(data: Path, split: str, line: int, **values: object) -> None:
    edit(
        data,
        split,
        lambda table: table.assign(**{key: table[key].where(table.index != line, values[key]) for key in values}),
    )


def save_images(data: Path, images: np.ndarray) -> None:
    """Another images.npy, with a time of change that differs by more than any clock's tick."""
    later = (data / IMAGES).stat().st_mtime_ns + 10**9
    np.save(data / IMAGES, images)
    os.utime(data / IMAGES, ns=(later, later))


def test_a_split_is_rows_labels_and_targets_with_the_classes_and_the_prior(data: Path) -> None:
    names = ["NA", "007", "", *["7"] * 37]  # which stay text
    edit(data, "val", lambda table: table.assign(name=names, subject=names)[[*reversed(table.columns)]])
    opened, images = open_data(data), np.load(data / IMAGES)
    val = opened.split("val")
    assert (val.name, len(val), val.names, val.subjects) == ("val", 40, names, names)
    assert val.rows.tolist() == list(range(96, 136))
    assert torch.equal(val.pixels(np.array([3, 0])), torch.from_numpy(images[[99, 96]]))
    assert val.labels.tolist() == [row % 8 for row in range(96, 136)]
    # .8 for the label, .2 shared by all eight
    torch.testing.assert_close(val.targets, 0.8 * torch.eye(8)[val.labels] + 0.025)
    assert opened.classes == CLASSES
    # .3 shared by all eight
    torch.testing.assert_close(opened.prior(), 0.7 * torch.eye(8) + 0.0375)


def test_leaked_are_those_with_a_duplicate_in_train_or_val(data: Path) -> None:
    set_cells(data, "train", 5, duplicate_in="train")  # a copy within train is no leak
    set_cells(data, "val", 7, duplicate_in="train")
    set_cells(data, "test", 5, duplicate_in="val")
    set_cells(data, "test", 6, duplicate_in="train", duplicate_kind="mirrored")
    train, val, test = (open_data(data).split(name) for name in ("train", "val", "test"))
    assert not train.leaked.any()
    assert val.rows[val.in_train].tolist() == val.rows[val.leaked].tolist() == [103]
    found = [test.rows[mark].tolist() for mark in (test.in_train, test.in_val, test.near, test.leaked)]
    assert found == [[140, 150, 160, 170], [141], [142], [140, 141, 142, 150, 160, 170]]


# Identity

HEADER = "row,name,label,glad,sad,subject,duplicate_of,duplicate_in,duplicate_kind"
TINY = {
    "train": "0,a,0,1.0,0.0,Zoë,,,\n1,b,1,0.25,0.75,,a,train,exact\n",
    "val": "2,c,1,0.125,0.875,Max,b,train,exact\n",
    "test": "3,d,0,0.5,0.5,Zoë,c,val,exact\n4,e,0,0.75,0.25,,a,train,exact\n5,f,1,0.0,1.0,,,,\n",
}
ABOUT = {"classes": ["glad", "sad"], "class_prior": [[0.9, 0.1], [0.2, 0.8]], "images_sha256": "0123abcd" * 8}
HASHES = {"hash": "a397d8519e791129", "test_hash": "522878a8ca8a479e", "leak_hash": "3ec59625cac44a1a"}


def hashes(folder: Path, tables: dict[str, str], header: str = HEADER, **about: Any) -> dict[str, str]:
    (folder / "splits").mkdir(exist_ok=True)
    for name, text in tables.items():
        (folder / "splits" / f"{name}.csv").write_text(f"{header}\n{text}")
    summary = ABOUT | {"totals": {name: text.count("\n") for name, text in tables.items()}} | about
    opened = DataSet(folder, np.zeros((6, 2, 2), np.uint8), summary)
    return {name: getattr(opened, name) for name in HASHES}


def test_hashes_of_tiny_data_stay_what_they_are(tmp_path: Path) -> None:
    """If this fails, every run that was made before is one on other data."""
    assert hashes(tmp_path, TINY) == HASHES
    # names of images, leaks that are not of test, line ends and other keys do not count
    tables = {name: text.replace(",b,", ",x,").replace("\n", "\r\n") for name, text in TINY.items()}
    tables |= {"train": tables["train"].replace(",train,", ",,"), "val": tables["val"].replace(",train,", ",,")}
    assert hashes(tmp_path, tables, remark="checked") == HASHES


@pytest.mark.parametrize(
    ("where", "old", "new", "changed"),
    [
        ("train", "1,b,1,", "1,b,0,", "hash"), ("train", "0.25,0.75", "0.5,0.5", "hash"),
        ("train", "0,a,0,1.0,0.0,Zoë,,,\n", "", "hash"), ("val", "2,c", "1,c", "hash"), ("val", "Max", "Zoë", "hash"),
        ("test", "3,d", "5,d", "test_hash"), ("test", "d,0", "d,1", "test_hash"), ("test", "Zoë", "", "test_hash"),
        ("test", "0.5,0.5", "0.25,0.75", "test_hash"), ("test", "c,val", "c,train", "leak_hash"),
        ("test", "a,train,exact", "a,train,near", "leak_hash"), ("test", "a,train,exact", ",,", "leak_hash"),
    ],
)  # fmt: skip
def test_hashes_react_to_what_they_are_of(where: str, old: str, new: str, changed: str, tmp_path: Path) -> None:
    found = hashes(tmp_path, TINY | {where: TINY[where].replace(old, new)})
    assert {name for name in HASHES if found[name] != HASHES[name]} == {changed}


def test_images_classes_prior_and_which_split_is_which_count(tmp_path: Path) -> None:
    prior = [[0.9, 0.1], [0.2, 0.800001]]
    for found in (
        hashes(tmp_path, TINY, images_sha256="1"),
        hashes(tmp_path, TINY, class_prior=prior),
        hashes(tmp_path, TINY, HEADER.replace("sad", "blue"), classes=["glad", "blue"]),
        hashes(tmp_path, TINY | {"train": TINY["val"], "val": TINY["train"]}),
    ):
        assert {name for name in HASHES if found[name] != HASHES[name]} == {"hash"}


def fed(*parts: tuple[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, content in parts:
        feed(digest, name, content)
    return digest.hexdigest()


def test_different_content_is_fed_as_different_bytes() -> None:
    zeros = np.zeros(4, np.int64)
    inputs: list[list[tuple[str, Any]]] = [
        [("a", zeros)], [("b", zeros)], [("a", zeros.reshape(2, 2))], [("a", zeros.astype(np.float64))],
        [("a", zeros[:2]), ("a", zeros[:2])], [("a", ["x", "y"])], [("a", ["xy"])], [("a", ["xy", ""])],
        [("a", ["x"]), ("a", ["y"])], [("ax", ["y"])], [("a", [])], [("a", zeros[:0])], [],
    ]  # fmt: skip
    assert len({fed(*parts) for parts in inputs}) == len(inputs)
    values = np.arange(6, dtype=np.int64).reshape(2, 3)  # equal numbers in any layout are equal
    assert fed(("a", values)) == fed(("a", values.astype(">i8"))) == fed(("a", np.asfortranarray(values)))


# The images are those that the splits were made of


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose SHA-256 was computed."""
    found: list[Path] = []
    monkeypatch.setattr("fer.data.dataset.sha256", lambda path: found.append(path) or sha256(path))
    return found


def test_images_are_hashed_once_and_again_when_touched(data: Path, reads: list[Path]) -> None:
    path, memory = data / IMAGES, data / "images.verified.json"
    images, made_of = np.load(path), f"but the splits were made of {sha256(path)[:12]}... ({data}/{SUMMARY})"
    open_data(data), open_data(data)
    assert (len(reads), [*data.glob("*.partial")]) == (1, [])
    save_images(data, 255 - images)
    for _ in range(2):  # computed, then remembered
        assert refusal(open_data, data) == f"{path}: its SHA-256 is {sha256(path)[:12]}..., {made_of}; run `dvc repro`"
    save_images(data, images)
    open_data(data), open_data(data)
    assert len(reads) == 3
    state = path.stat()
    path.write_bytes(path.read_bytes() + b"\0")  # which numpy does not read
    os.utime(path, ns=(state.st_mtime_ns, state.st_mtime_ns))
    assert "its SHA-256 is" in refusal(open_data, data)
    save_images(data, images[1:])  # seen in the header alone
    shapes = "its shape is [175, 16, 16], but the splits were made of [176, 16, 16]"
    assert refusal(open_data, data) == f"{path}: {shapes} ({data}/{SUMMARY}); run `dvc repro`"
    save_images(data, images)
    for number, content in enumerate(("{", "[]", "{}", "\xff"), 5):  # a memory that is useless is replaced
        memory.write_text(content, encoding="latin-1")
        open_data(data), open_data(data)
        assert len(reads) == number
    memory.unlink(), memory.mkdir()  # one that cannot be written is no error
    open_data(data), open_data(data)
    assert (len(reads), [*data.glob("*.partial")]) == (10, [])


# Mistakes

AGAIN = "make it again with `dvc repro --force --single-item split`"
NOT_FOUND = "not found; make the data with `dvc repro`"
UNFIT = "the probabilities of row 99 do not sum to 1"


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (None, "not valid JSON"),
        ({"classes": 3}, "classes: should be a valid list, got 3"),
        ({"classes": ["a", "a"]}, "classes: two have the same name"),
        ({"class_prior": [[1.0]]}, "class_prior: is not of 8 x 8 classes"),
        ({"totals": {}}, "totals: and counts should be those of train, val, test"),
    ],
)
def test_a_summary_that_does_not_fit_is_named(data: Path, changes: dict[str, Any] | None, fault: str) -> None:
    path = data / SUMMARY
    path.write_text("{" if changes is None else json.dumps(json.loads(path.read_text()) | changes))
    assert refusal(open_data, data) == f"{path}: {fault}; {AGAIN}"


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"row": 176}, f"row 176 is not in {IMAGES}"),
        ({"row": -1}, f"row -1 is not in {IMAGES}"),
        ({"row": "1.5"}, "column row holds something else than whole numbers"),
        ({"label": 99}, "label 99 is not in classes"),
        ({"duplicate_in": "moon"}, "duplicate_in 'moon' is none of train, val, test"),
        ({"fear": ""}, "a probability is no number"),
        ({"fear": -0.1, "anger": 0.15}, UNFIT),
        ({"fear": 0.5}, UNFIT),
    ],
)
def test_a_table_that_does_not_fit_is_named(data: Path, values: dict[str, Any], fault: str) -> None:
    set_cells(data, "val", 3, **values)
    assert refusal(open_data(data).split, "val") == f"{data}/splits/val.csv: {fault}; {AGAIN}"


def test_files_that_are_cut_or_not_there_are_named(data: Path) -> None:
    path, opened = data / "splits/val.csv", open_data(data)
    whole, columns = path.read_text(), "Usecols do not match columns, columns expected but not found: ['duplicate_in']"
    for text, fault in (
        (whole[: whole.rstrip().rindex("\n") + 1], "holds 39 images, not 40 as summary.json says"),
        (whole.replace("duplicate_in,", "x,"), columns),
    ):
        path.write_text(text)
        assert refusal(open_data(data).split, "val") == f"{path}: {fault}; {AGAIN}"
    upscale = "not found; run `dvc repro upscale` to make it or `dvc pull` to fetch it"
    for name, remedy in ((IMAGES, upscale), ("splits/val.csv", NOT_FOUND), (SUMMARY, NOT_FOUND)):
        (data / name).unlink()
        assert refusal(open_data, data) == f"{data}/{name}: {remedy}"
        if name == IMAGES:
            np.save(data / IMAGES, opened.images)
    assert refusal(getattr, opened, "hash") == f"{path}: {NOT_FOUND}"
