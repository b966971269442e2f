"""The splits as training reads them, their identity, and what is said when they are not whole or not of one piece."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CLASSES, make_data

from fer.data.dataset import DataSet, feed, open_data
from fer.errors import UserError
from fer.files import sha256

AGAIN = "make it again with `dvc repro --force --single-item split`"
SUMMARY = "splits/summary.json"


def edit_table(data: Path, split: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    path = data / "splits" / f"{split}.csv"
    text = {"name": str, "subject": str, "duplicate_of": str, "duplicate_in": str}
    change(pd.read_csv(path, dtype=text, keep_default_na=False)).to_csv(path, index=False)


def set_cell(split: str, line: int, **values: object) -> Callable[[Path], None]:
    """The edit that sets these columns of one line."""

    def change(table: pd.DataFrame) -> pd.DataFrame:
        for column, value in values.items():
            if isinstance(value, str):
                table[column] = table[column].astype(object)
            table.loc[line, column] = value
        return table

    return lambda data: edit_table(data, split, change)


def edit_summary(data: Path, **keys: object) -> None:
    (data / SUMMARY).write_text(json.dumps(json.loads((data / SUMMARY).read_text()) | keys))


def save_images(data: Path, images: np.ndarray) -> None:
    """Another images.npy, with a time of change that differs by more than any clock's tick."""
    path = data / "upscaled" / "images.npy"
    later = path.stat().st_mtime_ns + 10**9
    np.save(path, images)
    os.utime(path, ns=(later, later))


def test_a_split_is_rows_labels_and_targets_with_the_classes_and_the_prior(data: Path) -> None:
    edit_table(data, "val", lambda table: table[[*reversed(table.columns)]])  # columns count by name, not by place
    opened = open_data(data)
    images = np.load(data / "upscaled" / "images.npy")
    val = opened.split("val")
    assert (val.name, len(val), val.names[:2], val.subjects) == ("val", 40, ["96.png", "97.png"], [""] * 40)
    assert val.rows.tolist() == list(range(96, 136))
    pixels = val.pixels(np.array([3, 0]))
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, torch.from_numpy(images[[99, 96]]))
    assert val.labels.tolist() == [row % 8 for row in range(96, 136)]
    # .8 for the label, .2 shared by all eight
    torch.testing.assert_close(val.targets, 0.8 * torch.eye(8)[val.labels] + 0.025)
    assert opened.classes == CLASSES
    # .3 shared by all eight
    torch.testing.assert_close(opened.prior(), 0.7 * torch.eye(8) + 0.0375)


def test_leaked_are_those_with_a_duplicate_in_train_or_val(data: Path) -> None:
    set_cell("train", 5, duplicate_of="2.png", duplicate_in="train")(data)  # a copy within train is no leak
    set_cell("val", 7, duplicate_of="0.png", duplicate_in="train")(data)
    set_cell("test", 5, duplicate_of="96.png", duplicate_in="val")(data)
    set_cell("test", 6, duplicate_of="1.png", duplicate_in="train", duplicate_kind="mirrored")(data)
    train, val, test = (open_data(data).split(name) for name in ("train", "val", "test"))
    assert not train.leaked.any()
    assert val.rows[val.in_train].tolist() == val.rows[val.leaked].tolist() == [103]
    assert test.rows[test.in_train].tolist() == [140, 150, 160, 170]
    assert test.rows[test.in_val].tolist() == [141]
    assert test.rows[test.near].tolist() == [142]
    assert test.rows[test.leaked].tolist() == [140, 141, 142, 150, 160, 170]


def test_names_stay_text(data: Path) -> None:
    path = data / "splits" / "val.csv"
    table = pd.read_csv(path, keep_default_na=False)
    table["name"] = table["subject"] = ["NA", "007", "", *["7"] * 37]
    table.to_csv(path, index=False)
    val = open_data(data).split("val")
    assert val.names == val.subjects == ["NA", "007", "", *["7"] * 37]


# Identity


def rewrite_images(data: Path) -> None:
    images = np.load(data / "upscaled" / "images.npy")
    images[0, 0, 0] ^= 1
    save_images(data, images)
    edit_summary(data, images_sha256=sha256(data / "upscaled" / "images.npy"))


def rename_class(data: Path) -> None:
    edit_summary(data, classes=[*CLASSES[:-1], "scorn"])
    for split in ("train", "val", "test"):
        edit_table(data, split, lambda table: table.rename(columns={"contempt": "scorn"}))


def change_prior(data: Path) -> None:
    prior = json.loads((data / SUMMARY).read_text())["class_prior"]
    prior[2][3] += 1e-6
    edit_summary(data, class_prior=prior)


def change_what_does_not_count(data: Path) -> None:
    """Formats, names of images, other keys of the summary, leaks that are not of test."""
    set_cell("train", 5, duplicate_in="train")(data)
    set_cell("val", 5, duplicate_in="train")(data)
    for split in ("train", "val", "test"):
        path = data / "splits" / f"{split}.csv"
        table = pd.read_csv(path, keep_default_na=False).assign(name="x.png", duplicate_of="")
        table[[*reversed(table.columns)]].to_csv(path, index=False, quoting=1, lineterminator="\r\n")
    edit_summary(data, remark="checked", dataset="renamed")


def exchange_train_and_val(data: Path) -> None:
    train, val = (data / "splits" / f"{name}.csv" for name in ("train", "val"))
    content = train.read_bytes()
    train.write_bytes(val.read_bytes())
    val.write_bytes(content)
    edit_summary(data, totals={"train": 40, "val": 96, "test": 40})


def drop_last(data: Path) -> None:
    edit_table(data, "train", lambda table: table[:-1])
    edit_summary(data, totals={"train": 95, "val": 40, "test": 40})


ALL = ("hash", "test_hash", "leak_hash")
EDITS: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "what does not count": (change_what_does_not_count, set()),
    "images": (rewrite_images, {"hash"}),
    "class name": (rename_class, {"hash"}),
    "prior": (change_prior, {"hash"}),
    "exchange": (exchange_train_and_val, {"hash"}),
    "train fewer": (drop_last, {"hash"}),
    "leak of test": (set_cell("test", 5, duplicate_in="train"), {"leak_hash"}),
    "near leak of test": (set_cell("test", 4, duplicate_in="val", duplicate_kind="near"), {"leak_hash"}),
    "other leak of test": (set_cell("test", 4, duplicate_in="val"), {"leak_hash"}),
    "row of val": (set_cell("val", 2, row=1), {"hash"}),
    "row of test": (set_cell("test", 2, row=1), {"test_hash"}),
    "label of train": (set_cell("train", 2, label=7), {"hash"}),
    "label of test": (set_cell("test", 2, label=7), {"test_hash"}),
    "targets of train": (set_cell("train", 2, fear=0.825, surprise=0.025), {"hash"}),  # of an image of surprise
    "targets of test": (set_cell("test", 2, fear=0.825, surprise=0.025), {"test_hash"}),
    "subject of val": (set_cell("val", 2, subject="b"), {"hash"}),
    "subject of test": (set_cell("test", 2, subject="b"), {"test_hash"}),
}


@pytest.mark.parametrize("edit", EDITS)
def test_hashes_react_to_what_they_are_of_and_to_nothing_else(tmp_path: Path, edit: str) -> None:
    change, expected = EDITS[edit]
    before = open_data(make_data(tmp_path / "before", subjects=["a"] * 176))
    folder = make_data(tmp_path / "after", subjects=["a"] * 176)
    change(folder)
    after = open_data(folder)
    assert {name for name in ALL if getattr(before, name) != getattr(after, name)} == expected


def fed(*parts: tuple[str, np.ndarray | list[str]]) -> bytes:
    class Recorder:
        content = b""

        def update(self, part: bytes) -> None:
            self.content += part

    recorder = Recorder()
    for name, content in parts:
        feed(recorder, name, content)  # type: ignore[arg-type]
    return recorder.content


def test_different_content_is_fed_as_different_bytes() -> None:
    zeros = np.zeros(4, np.int64)
    inputs: list[list[tuple[str, np.ndarray | list[str]]]] = [
        [("a", zeros)], [("b", zeros)], [("a", zeros.reshape(2, 2))], [("a", zeros.astype(np.float64))],
        [("a", zeros[:2]), ("a", zeros[:2])], [("a", ["x", "y"])], [("a", ["xy"])], [("a", ["xy", ""])],
        [("a", ["x"]), ("a", ["y"])], [("ax", ["y"])], [("a", [])], [("a", zeros[:0])], [],
    ]  # fmt: skip
    assert len({fed(*parts) for parts in inputs}) == len(inputs)
    values = np.arange(6, dtype=np.int64).reshape(2, 3)  # equal numbers in any layout are equal
    assert fed(("a", values)) == fed(("a", values.astype(">i8"))) == fed(("a", np.asfortranarray(values)))


def test_hashes_of_tiny_data_stay_what_they_are(tmp_path: Path) -> None:
    """If this fails, every run that was made before is one on other data."""
    (tmp_path / "splits").mkdir()
    header = "row,name,label,glad,sad,subject,duplicate_of,duplicate_in,duplicate_kind"
    tables = {
        "train": ["0,a,0,1.0,0.0,Zoë,,,", "1,b,1,0.25,0.75,,a,train,exact"],
        "val": ["2,c,1,0.125,0.875,Max,b,train,exact"],
        "test": ["3,d,0,0.5,0.5,Zoë,c,val,exact", "4,e,0,0.75,0.25,,a,train,exact", "5,f,1,0.0,1.0,,,,"],
    }
    for name, lines in tables.items():
        (tmp_path / "splits" / f"{name}.csv").write_text("\n".join([header, *lines]) + "\n")
    summary = {"classes": ["glad", "sad"], "class_prior": [[0.9, 0.1], [0.2, 0.8]], "images_sha256": "0123abcd" * 8}
    summary["totals"] = {"train": 2, "val": 1, "test": 3}
    opened = DataSet(tmp_path, np.zeros((6, 2, 2), np.uint8), summary)
    found = [getattr(opened, name) for name in ALL]
    assert found == ["a397d8519e791129", "522878a8ca8a479e", "3ec59625cac44a1a"]


# The images are those that the splits were made of


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose SHA-256 was computed."""
    found: list[Path] = []
    monkeypatch.setattr("fer.data.dataset.sha256", lambda path: found.append(path) or sha256(path))
    return found


def test_images_are_hashed_once_and_again_when_touched(data: Path, reads: list[Path]) -> None:
    path = data / "upscaled" / "images.npy"
    open_data(data), open_data(data)
    assert reads == [path]
    state = path.stat()
    os.utime(path, ns=(state.st_mtime_ns, state.st_mtime_ns + 1))
    open_data(data), open_data(data)
    assert reads == [path] * 2
    with path.open("ab") as file:
        file.write(b"\0")  # which numpy does not read
    os.utime(path, ns=(state.st_mtime_ns, state.st_mtime_ns + 1))
    with pytest.raises(UserError, match="its SHA-256 is"):
        open_data(data)
    assert len(reads) == 3


IMAGES = np.arange(176 * 16 * 16, dtype=np.uint8).reshape(176, 16, 16)


def test_images_of_another_shape_are_refused_by_the_header_alone(data: Path, reads: list[Path]) -> None:
    for images in (IMAGES[..., None].repeat(3, 3), IMAGES[1:]):
        save_images(data, images)
        with pytest.raises(UserError) as caught:
            open_data(data)
        assert str(caught.value) == (
            f"{data}/upscaled/images.npy: its shape is {list(images.shape)}, but the splits were made of [176, 16, 16]"
            f" ({data}/{SUMMARY}); run `dvc repro`"
        )
    assert reads == []


def test_other_images_of_the_same_shape_are_refused_until_they_are_changed_back(data: Path, reads: list[Path]) -> None:
    path = data / "upscaled" / "images.npy"
    open_data(data)
    images, expected = np.load(path), sha256(path)
    save_images(data, IMAGES)
    for _ in range(2):  # computed, then remembered
        with pytest.raises(UserError) as caught:
            open_data(data)
        assert str(caught.value) == (
            f"{path}: its SHA-256 is {sha256(path)[:12]}..., but the splits were made of {expected[:12]}..."
            f" ({data}/{SUMMARY}); run `dvc repro`"
        )
    save_images(data, images)
    open_data(data)
    assert len(reads) == 3


@pytest.mark.parametrize("content", ["{", "[]", "{}", "\xff"])
def test_a_useless_memory_is_replaced(data: Path, reads: list[Path], content: str) -> None:
    (data / "images.verified.json").write_text(content, encoding="latin-1")
    open_data(data), open_data(data)
    assert len(reads) == 1
    assert sorted(path.name for path in data.iterdir()) == ["images.verified.json", "splits", "upscaled"]


def test_a_memory_that_cannot_be_written_is_no_error(data: Path, reads: list[Path]) -> None:
    (data / "images.verified.json").mkdir()  # which no file can replace
    open_data(data), open_data(data)
    assert len(reads) == 2
    assert not list(data.glob("*.partial"))


# Mistakes

NOT_FOUND = "not found; make the data with `dvc repro`"


def summary(**changes: object) -> Callable[[Path], object]:
    return lambda data: edit_summary(data, **changes)


def table(change: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[Path], object]:
    return lambda data: edit_table(data, "val", change)


def val(**values: object) -> Callable[[Path], object]:
    return set_cell("val", 3, **values)


UNFIT = "the probabilities of row 99 do not sum to 1"
MISTAKES: list[tuple[Callable[[Path], object], str]] = [
    (lambda data: (data / SUMMARY).unlink(), f"{SUMMARY}: {NOT_FOUND}"),
    (lambda data: (data / SUMMARY).write_text("{"), f"{SUMMARY}: not valid JSON; {AGAIN}"),
    (lambda data: (data / SUMMARY).write_text("{}"), f"{SUMMARY}: classes: missing; {AGAIN}"),
    (summary(classes=3), f"{SUMMARY}: classes: should be a valid list, got 3; {AGAIN}"),
    (summary(classes=["a", "a"]), f"{SUMMARY}: classes: two have the same name; {AGAIN}"),
    (summary(class_prior=[[1.0]]), f"{SUMMARY}: class_prior: is not of 8 x 8 classes; {AGAIN}"),
    (summary(totals={}), f"{SUMMARY}: totals: and counts should be those of train, val, test; {AGAIN}"),
    (lambda data: (data / "splits/test.csv").unlink(), f"splits/test.csv: {NOT_FOUND}"),
    (
        table(lambda table: table.drop(columns="duplicate_in")), "splits/val.csv: Usecols do not match columns, columns"
        f" expected but not found: ['duplicate_in']; {AGAIN}",
    ),
    (table(lambda table: table[:0]), f"splits/val.csv: holds 0 images, not 40 as summary.json says; {AGAIN}"),
    (table(lambda table: table[:-1]), f"splits/val.csv: holds 39 images, not 40 as summary.json says; {AGAIN}"),
    (val(row=176), f"splits/val.csv: row 176 is not in upscaled/images.npy; {AGAIN}"),
    (val(row=-1), f"splits/val.csv: row -1 is not in upscaled/images.npy; {AGAIN}"),
    (val(row="1.5"), f"splits/val.csv: column row holds something else than whole numbers; {AGAIN}"),
    (val(label=99), f"splits/val.csv: label 99 is not in classes; {AGAIN}"),
    (val(fear=""), f"splits/val.csv: a probability is no number; {AGAIN}"),
    (val(fear=-0.1, anger=0.15), f"splits/val.csv: {UNFIT}; {AGAIN}"),
    (val(fear=0.5), f"splits/val.csv: {UNFIT}; {AGAIN}"),
    (
        lambda data: (data / "upscaled/images.npy").unlink(),
        "upscaled/images.npy: not found; run `dvc repro upscale` to make it or `dvc pull` to fetch it",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), MISTAKES)
def test_files_that_do_not_fit_are_named(data: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(data)
    with pytest.raises(UserError) as caught:
        open_data(data).split("val")
    assert str(caught.value) == f"{data}/{message}"


def test_a_table_that_went_away_is_named(data: Path) -> None:
    opened = open_data(data)
    (data / "splits" / "val.csv").unlink()
    with pytest.raises(UserError) as caught:
        assert opened.hash
    assert str(caught.value) == f"{data}/splits/val.csv: {NOT_FOUND}"
