"""Stage download: what lies in raw/, its bytes, and that a mistake leaves the old content alone."""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import CPU, prepared, small_run
from PIL import Image

from fer.data.dataset import open_data
from fer.data.labels import CLASSES, VOTE_COLUMNS
from fer.errors import UserError
from fer.train import fit
from pipelines.data_sets import Prepared
from pipelines.stages.download import download
from pipelines.stages.split import split
from pipelines.stages.upscale import upscale

SMALL = {"train": 80, "val": 40, "test": 40, "seed": 3}
SET = Path("data/sets/mine")
RAW = SET / "raw"


def asked(dataset: str = "sample", path: str = "faces", **data: object) -> Prepared:
    own = {"sample": SMALL} if dataset == "sample" else {}
    return replace(prepared(dataset, path, own | data), name="mine")


def digests() -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(RAW.iterdir())}


def source() -> dict:
    return json.loads((RAW / "source.json").read_text())


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def official_folders(root: Path) -> np.ndarray:
    """Two pictures a folder; returns the six images."""
    images = np.random.default_rng(0).integers(0, 256, (6, 48, 48), dtype=np.uint8)
    for position, folder in enumerate(("FER2013Train", "FER2013Valid", "FER2013Test")):
        (root / folder).mkdir(parents=True)
        lines = []
        for row in (2 * position, 2 * position + 1):
            Image.fromarray(images[row]).save(root / folder / f"{row}.png")
            lines.append(f'{row}.png,"(0, 0, 48, 48)",{row},9,0,0,0,0,0,0,0,1\n')
        (root / folder / "label.csv").write_text("".join(lines))
    return images


def test_the_sample_is_the_same_bytes_for_the_same_settings(capfd: pytest.CaptureFixture) -> None:
    download(asked())
    first = digests()
    assert list(first) == ["images.npy", "labels.csv", "source.json"]
    images = np.load(RAW / "images.npy")
    assert (images.shape, images.dtype) == ((160, 48, 48), np.uint8)
    assert (source()["dataset"], source()["images"]) == ("sample", {"train": 80, "val": 40, "test": 40})
    assert capfd.readouterr() == ("", "")
    download(asked())
    assert digests() == first
    download(asked(sample=SMALL | {"seed": 4}))
    assert digests()["images.npy"] != first["images.npy"]


def test_ferplus_to_the_byte(project: Path, capfd: pytest.CaptureFixture) -> None:
    images = official_folders(project / "faces")
    for number in range(5):
        (project / "faces" / f"._{number}").write_text("")
    (project / "faces" / "notes.txt").write_text("x")
    download(asked(dataset="ferplus", path="faces"))
    assert capfd.readouterr().out == (
        "ferplus: 2 train, 2 val, 2 test (published: 28,558 train, 3,579 val, 3,573 test); "
        "read FER2013Train, FER2013Valid, FER2013Test in faces\n"
        "classes: neutral, happiness, surprise, sadness, anger, disgust, fear, contempt\n"
        "left out: hidden, half downloaded, or left by the operating system: 5 (._0, ...); "
        "no part of the data set: 1 (notes.txt)\n"
    )
    np.testing.assert_array_equal(np.load(RAW / "images.npy"), images)
    sha1 = [hashlib.sha1(image.tobytes()).hexdigest() for image in images]
    usages = ["train", "train", "val", "val", "test", "test"]
    header = "row,name,usage,subject,neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF,sha1\n"
    rows = [f"{row},{row}.png,{usages[row]},,{row},9,0,0,0,0,0,0,0,1,{sha1[row]}\n" for row in range(6)]
    assert (RAW / "labels.csv").read_bytes() == (header + "".join(rows)).encode()
    assert source() == {
        "dataset": "ferplus",
        "form": "pictures",
        "labels": "votes",
        "label_source": "label_csv",
        "images": {"train": 2, "val": 2, "test": 2},
        "classes": list(CLASSES),
        "vote_columns": list(VOTE_COLUMNS),
        "read": ["FER2013Train", "FER2013Valid", "FER2013Test"],
        "left_out": {
            "hidden, half downloaded, or left by the operating system": {"count": 5, "first": ["._0", "._1", "._2"]},
            "no part of the data set": {"count": 1, "first": ["notes.txt"]},
        },
        "confusion": None,
    }


def refused(**changes: object) -> str:
    with pytest.raises(UserError) as caught:
        download(asked(**changes))
    return str(caught.value)


def test_a_mistake_leaves_the_old_data_and_nothing_new(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    download(asked())
    before = digests()
    official_folders(project / "faces")
    picture = project / "faces/FER2013Test/5.png"
    picture.write_bytes(picture.read_bytes()[:99])
    (project / "empty").mkdir()
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    for path, message in {
        "faces": "faces/FER2013Test/5.png: is truncated or damaged",
        "nowhere": "nowhere: not found: correct the path under data in params.yaml",
        "empty": "empty: contains no data set, and https://www.kaggle.com/competitions/",
    }.items():
        assert refused(dataset="ferplus", path=path).startswith(message)
    for key, value in {"size": 64, "subject_pattern": "(.)", "classes": ["fear", "anger"]}.items():
        message = f"data.{key}: FER+ has 48x48 pixels, 8 classes and no subjects: remove it"
        assert refused(dataset="ferplus", path="faces", **{key: value}) == message
    cut = class_folders(project / "happy") / "sad" / "P9_sad.webp"
    Image.new("RGB", (20, 20)).save(cut, "PNG")
    cut.write_bytes(cut.read_bytes()[:-30])  # noticed when the images are written
    assert refused(**HAPPY | {"path": "happy"}).startswith("happy/sad/P9_sad.webp: is truncated or damaged")
    assert digests() == before
    assert [file.name for file in SET.iterdir()] == ["raw"]


def class_folders(root: Path) -> Path:
    """Two classes, a picture of each for ten persons, of two sizes, in colour."""
    for person in range(10):
        for number, label in enumerate(("happy", "sad")):
            (root / label).mkdir(parents=True, exist_ok=True)
            image = Image.new("RGB", (20 + person % 2, 20), (10 * person, 100 * number, 0))
            image.save(root / label / f"P{person}_{label}.webp", lossless=True)
    return root


HAPPY = {"dataset": "folders", "path": "faces", "size": 16, "subject_pattern": r"(P\d)_"}


def test_class_folders_become_arrays_of_one_size_with_subjects(project: Path, capfd: pytest.CaptureFixture) -> None:
    class_folders(project / "faces")
    download(asked(**HAPPY))
    assert capfd.readouterr().out == (
        "folders: 20 images; read faces\nclasses: happy, sad\nresized to 16x16 pixels: 20 of 20 images (data.size)\n"
    )
    images = np.load(RAW / "images.npy")
    assert (images.shape, images.dtype) == ((20, 16, 16, 3), np.uint8)
    assert images[:, 0, 0].tolist() == [[10 * (n % 10), 100 * (n // 10), 0] for n in range(20)]
    lines = (RAW / "labels.csv").read_text().splitlines()
    assert lines[0] == "row,name,usage,subject,happy,sad,sha1"
    assert lines[12] == f"11,sad/P1_sad.webp,,P1,0,1,{hashlib.sha1(images[11].tobytes()).hexdigest()}"
    assert (source()["labels"], source()["classes"], source()["images"]) == ("hard", ["happy", "sad"], {"": 20})
    (project / "faces/saad").mkdir()
    (project / "faces/sad/P0_sad.webp").rename(project / "faces/saad/P0_sad.webp")
    download(asked(**HAPPY))
    told = "classes: happy, saad, sad\nsaad and sad look like one class: give their images one label if they are\n"
    assert told in capfd.readouterr().out
    assert "tiny" not in source()
    download(asked(**HAPPY | {"size": 42}))  # those of 20x20 and 21x20 have less than half of it
    assert source()["tiny"] == {"count": 20, "first": [f"happy/P{person}_happy.webp" for person in range(3)]}


def split_folders(**changes: object) -> dict:
    """summary.json of the stages on class folders."""
    for stage in (download, upscale, split):
        stage(asked(**HAPPY | changes))
    return json.loads((SET / "splits/summary.json").read_text())


def test_a_set_without_splits_is_split_by_subject_and_trained_on(project: Path) -> None:
    class_folders(project / "faces")
    summary = split_folders()
    assert summary["totals"] == {"train": 14, "val": 2, "test": 4}
    assert summary["held_out"] == {"test": "all, by subject", "val": "all, by subject"}
    assert (summary["class_prior"], summary["labels"]) == (None, "hard")
    data = open_data(SET)
    people = [set(data.split(name).subjects) for name in ("train", "val", "test")]
    assert sum(map(len, people)) == len(set.union(*people)) == 10
    assert data.prior().tolist() == [[1, 0], [0, 1]]
    colour: dict = {"input": {"image_size": 16, "channels": 3}, "epochs": 1, "batch_size": 4}
    with pytest.raises(UserError) as caught:
        fit("x", small_run(loss={"name": "pdls"}, **colour), CPU, SET, "data/runs")
    assert str(caught.value) == (
        "loss.name: this loss needs the class prior, which hard labels do not give: name a file with it in "
        "data.confusion of the data set's file in datasets/ (`fer train EXPERIMENT data=NAME --folds 10` makes one, "
        "data/folds/*/confusion.csv), or choose another loss"
    )
    fit("y", small_run(**colour), CPU, SET, "data/runs")


CONFUSION = ",sad,happy\nhappy,1,3\nsad,4,0\n"


def test_the_prior_of_hard_labels_is_a_file_that_the_user_names(project: Path) -> None:
    class_folders(project / "faces")
    (project / "faces" / "confusion.csv").write_text("\ufeff" + CONFUSION.replace(",", ";"))  # as Excel may save it
    assert split_folders(confusion="confusion.csv")["class_prior"] == [[0.75, 0.25], [0, 1]]
    assert (source()["read"], source()["left_out"]) == ([".", "confusion.csv"], {})
    assert open_data(SET).prior(needed=True).tolist() == [[0.75, 0.25], [0, 1]]


EACH = "faces/confusion.csv must have a row and a column for each of happy, sad"
CELL = "faces/confusion.csv must hold a number in every cell"
ABOVE = "faces/confusion.csv must hold numbers from 0 up, and some above 0 in every row"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [("sad,4", "bored,4", EACH), (CONFUSION, "", EACH), ("1,3", "1,x", CELL), ("1,3", "1", CELL), ("4,0", "0,0", ABOVE),
     ("4,0", "4,-1", ABOVE)],
)  # fmt: skip
def test_a_confusion_that_does_not_fit(old: str, new: str, message: str, project: Path) -> None:
    (class_folders(project / "faces") / "confusion.csv").write_text(CONFUSION.replace(old, new))
    assert refused(**HAPPY, confusion="confusion.csv") == f"data.confusion: {message}"


def test_a_confusion_that_is_not_there_or_for_votes(project: Path) -> None:
    class_folders(project / "faces")
    assert refused(**HAPPY, confusion="x.csv") == (
        "data.confusion: faces/x.csv not found: give its path within the data set's folder"
    )
    official_folders(project / "votes")
    message = "data.confusion: is for data sets with one label an image; this one has votes: remove it"
    assert refused(dataset="ferplus", path="votes", confusion="x.csv") == message
