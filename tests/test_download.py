"""Stage download: what lies in data/raw, its bytes, and that a mistake leaves the old content alone."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fer.data.labels import CLASSES, VOTE_COLUMNS
from fer.errors import UserError
from pipelines.params import Data, Params, load
from pipelines.stages.download import download

ROOT = Path(__file__).resolve().parents[1]
DEFAULTS = load(ROOT / "params.yaml").data
SMALL = {"train": 80, "val": 40, "test": 40, "seed": 3}


def params(**changes: object) -> Params:
    data = Data.model_validate(DEFAULTS.model_dump() | {"sample": SMALL} | changes)
    return Params.model_construct(data=data)


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


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


def test_the_sample_is_the_same_bytes_for_the_same_settings(project: Path, capfd: pytest.CaptureFixture) -> None:
    download(params())
    raw = project / "data" / "raw"
    first = digests(raw)
    assert list(first) == ["images.npy", "labels.csv", "source.json"]
    assert [file.name for file in (project / "data").iterdir()] == ["raw"]
    images = np.load(raw / "images.npy")
    assert (images.shape, images.dtype) == ((160, 48, 48), np.uint8)
    assert json.loads((raw / "source.json").read_text()) == {
        "dataset": "sample",
        "form": "rows of pixels",
        "labels": "votes",
        "label_source": "fer2013new",
        "emotion_agrees": 1.0,
        "images": {"train": 80, "val": 40, "test": 40},
        "classes": list(CLASSES),
        "vote_columns": list(VOTE_COLUMNS),
        "read": ["fer2013.csv", "fer2013new.csv"],
        "left_out": {},
        "confusion": None,
    }
    assert capfd.readouterr() == ("", "")
    download(params())
    assert digests(raw) == first
    download(params(sample=SMALL | {"seed": 4}))
    assert digests(raw)["images.npy"] != first["images.npy"]


def test_ferplus_to_the_byte(project: Path, capfd: pytest.CaptureFixture) -> None:
    images = official_folders(project / "faces")
    for number in range(5):
        (project / "faces" / f"._{number}").write_text("")
    (project / "faces" / "notes.txt").write_text("x")
    download(params(dataset="ferplus", path="faces"))
    assert capfd.readouterr().out == (
        "ferplus: 2 train, 2 val, 2 test (published: 28,558 train, 3,579 val, 3,573 test); "
        "read FER2013Train, FER2013Valid, FER2013Test in faces\n"
        "left out: hidden, half downloaded, or left by the operating system: 5 (._0, ...); "
        "no part of the data set: 1 (notes.txt)\n"
    )
    raw = project / "data" / "raw"
    np.testing.assert_array_equal(np.load(raw / "images.npy"), images)
    sha1 = [hashlib.sha1(image.tobytes()).hexdigest() for image in images]
    usages = ["train", "train", "val", "val", "test", "test"]
    header = "row,name,usage,subject,neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF,sha1\n"
    rows = [f"{row},{row}.png,{usages[row]},,{row},9,0,0,0,0,0,0,0,1,{sha1[row]}\n" for row in range(6)]
    assert (raw / "labels.csv").read_bytes() == (header + "".join(rows)).encode()
    source = json.loads((raw / "source.json").read_text())
    assert source == {
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
    assert list(source) == sorted(source)


def test_a_mistake_leaves_the_old_data_and_nothing_new(project: Path) -> None:
    download(params())
    before = digests(project / "data" / "raw")
    official_folders(project / "faces")
    (project / "faces" / "FER2013Test" / "5.png").unlink()
    with pytest.raises(UserError, match=r"^faces/FER2013Test/5.png: not found, but label.csv names it"):
        download(params(dataset="ferplus", path="faces"))
    with pytest.raises(UserError, match=r"^nowhere: not found: correct data.path in params.yaml$"):
        download(params(dataset="ferplus", path="nowhere"))
    assert digests(project / "data" / "raw") == before
    assert [file.name for file in (project / "data").iterdir()] == ["raw"]


def test_an_empty_folder_says_how_to_fill_it(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    (project / "faces").mkdir()
    with pytest.raises(
        UserError, match=r"^faces: contains no data set, and https://www.kaggle.com/competitions/.* by hand"
    ):
        download(params(dataset="ferplus", path="faces"))
    assert not (project / "data").exists()
