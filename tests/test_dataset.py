"""The splits as training reads them, and what is said when they are not whole."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CLASSES, make_data

from fer.data.dataset import open_data
from fer.errors import UserError

AGAIN = "make it again with `dvc repro -f split`"


def test_rows_point_into_the_array(data: Path) -> None:
    opened = open_data(data)
    images = np.load(data / "upscaled" / "images.npy")
    val = opened.split("val")
    assert len(val) == 40
    assert val.rows.tolist() == list(range(96, 136))
    assert val.name == "val"
    assert val.names[:2] == ["96.png", "97.png"]
    assert val.subjects == [""] * 40
    pixels = val.pixels(np.array([3, 0]))
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, torch.from_numpy(images[[99, 96]]))
    assert val.labels.dtype == torch.int64
    assert val.labels.tolist() == [row % 8 for row in range(96, 136)]
    assert val.targets.dtype == torch.float32
    # .8 for the label, .2 shared by all eight
    torch.testing.assert_close(val.targets, 0.8 * torch.eye(8)[val.labels] + 0.025)


def test_images_stay_on_disk(data: Path) -> None:
    opened = open_data(data)
    assert isinstance(opened.images, np.memmap)
    assert opened.split("train").images is opened.images
    assert not opened.images.flags.writeable


def test_classes_and_prior_come_from_the_split_stage(data: Path) -> None:
    opened = open_data(data)
    assert opened.classes == CLASSES
    prior = opened.prior()
    assert prior.dtype == torch.float32
    torch.testing.assert_close(prior, 0.7 * torch.eye(8) + 0.0375)  # .3 shared by all eight


def test_targets_follow_the_order_of_the_classes(data: Path) -> None:
    path = data / "splits" / "val.csv"
    table = pd.read_csv(path)
    table[[*reversed(table.columns)]].to_csv(path, index=False)
    val = open_data(data).split("val")
    assert torch.equal(val.targets.argmax(1), val.labels)


def test_leaked_are_those_with_a_twin_in_train(data: Path) -> None:
    path = data / "splits" / "train.csv"
    table = pd.read_csv(path, keep_default_na=False)
    table.loc[5, "duplicate_of"] = "2.png"
    table.to_csv(path, index=False)
    opened = open_data(data)
    assert not opened.split("train").leaked.any()  # a copy within train is no leak
    assert not opened.split("val").leaked.any()
    assert opened.split("test").rows[opened.split("test").leaked].tolist() == [140, 150, 160, 170]


def test_names_stay_text(data: Path) -> None:
    path = data / "splits" / "val.csv"
    table = pd.read_csv(path, keep_default_na=False)
    table["name"] = ["NA", "007", "", *table["name"][3:]]
    table["duplicate_of"] = ["NA", "007", *table["duplicate_of"][2:]]
    table["subject"] = ["NA", "007", "", *["7"] * 37]
    table.to_csv(path, index=False)
    val = open_data(data).split("val")
    assert val.subjects == ["NA", "007", "", *["7"] * 37]
    assert val.names[:3] == ["NA", "007", ""]
    assert val.leaked.tolist() == [True, True] + [False] * 38


def test_hash_changes_with_every_file_of_the_splits(tmp_path: Path) -> None:
    hashes = [open_data(make_data(tmp_path / "first")).hash, open_data(make_data(tmp_path / "same")).hash]
    assert hashes[0] == hashes[1]
    assert len(hashes[0]) == 16
    for name in ("summary.json", "train.csv", "val.csv", "test.csv"):
        path = tmp_path / "same" / "splits" / name
        path.write_text(path.read_text() + "\n")
        hashes.append(open_data(tmp_path / "same").hash)
    assert len(set(hashes)) == 5


@pytest.mark.parametrize("name", ["summary.json", "train.csv", "val.csv", "test.csv"])
def test_a_missing_file_is_named(data: Path, name: str) -> None:
    (data / "splits" / name).unlink()
    with pytest.raises(UserError) as caught:
        open_data(data)
    assert str(caught.value) == f"{data}/splits/{name}: not found; make the data with `dvc repro`"


@pytest.mark.parametrize("content", [None, b"", b"<html>", b"\x93NUMPY\x01\x00"])
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # numpy leaves the bad file open
def test_images_that_are_no_array_are_named(data: Path, content: bytes | None) -> None:
    path = data / "upscaled" / "images.npy"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path}: .*`dvc repro .*upscale`") as caught:
        open_data(data)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_cut_array_is_named(data: Path) -> None:
    path = data / "upscaled" / "images.npy"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(UserError, match=f"^{path}: damaged"):
        open_data(data)


def test_images_of_another_type_are_refused(data: Path) -> None:
    path = data / "upscaled" / "images.npy"
    np.save(path, np.load(path).astype(np.float32))
    with pytest.raises(UserError, match=r"must be uint8 .*, found float32 \[176, 16, 16\]"):
        open_data(data)


def test_a_summary_that_is_no_json_is_named(data: Path) -> None:
    path = data / "splits" / "summary.json"
    path.write_text(path.read_text()[:-5])
    with pytest.raises(UserError) as caught:
        open_data(data)
    assert str(caught.value) == f"{path}: not valid JSON; {AGAIN}"


def edit(path: Path, change: str) -> None:
    table = pd.read_csv(path, keep_default_na=False)
    if change == "column":
        table = table.drop(columns="fear")
    elif change == "rows":
        table = table[:0]
    elif change == "row":
        table.loc[3, "row"] = 176
    table.to_csv(path, index=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("column", f"Usecols do not match columns, columns expected but not found: ['fear']; {AGAIN}"),
        ("rows", f"holds no image; {AGAIN}"),
        ("row", "row 176 is not in upscaled/images.npy; run `dvc repro`"),
    ],
)
def test_a_table_that_does_not_fit_is_named(data: Path, change: str, message: str) -> None:
    path = data / "splits" / "val.csv"
    edit(path, change)
    with pytest.raises(UserError) as caught:
        open_data(data).split("val")
    assert str(caught.value) == f"{path}: {message}"


def test_classes_of_the_summary_must_be_columns(data: Path) -> None:
    path = data / "splits" / "summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps(summary | {"classes": [*CLASSES, "boredom"]}))
    with pytest.raises(UserError, match="expected but not found: \\['boredom'\\]"):
        open_data(data).split("train")
