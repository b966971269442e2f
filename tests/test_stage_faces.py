"""Stage faces: photographs become cropped faces alike in training and prediction; those without are named."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import CPU, prepared, refusal, small_run
from PIL import Image
from test_faces import photograph

from fer.data.found import Entry, look
from fer.faces.detect import Haar, build_detector, crop
from fer.faces.predict import Frame, predict
from fer.predict import Predictor
from fer.train import fit
from pipelines.data_sets import Prepared
from pipelines.stages.download import download
from pipelines.stages.faces import faces, looked_at
from pipelines.stages.split import split
from pipelines.stages.upscale import upscale

SIDE = 32
SET = Path("data/sets/folders")


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(**data: Any) -> Prepared:
    return prepared("folders", data={"size": SIDE, "faces": "haar"} | data)


def photographs() -> dict[str, np.ndarray]:
    """Eight photographs of one person, two of them of two people; and one of nobody."""
    places = ({(40, 60): 160}, {(40, 90): 160}, {(50, 20): 240}, {(20, 20): 160, (330, 150): 240})
    pictures = {f"{label}/{n}.png": photograph(place) for label in "ab" for n, place in enumerate(places)}
    pictures["b/nobody.png"] = np.full((300, 420, 3), 90, np.uint8)
    for name, picture in pictures.items():
        path = Path("faces") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    return pictures


@pytest.mark.parametrize("margin", [None, 1.2])
def test_the_largest_face_is_cut_out_and_a_picture_without_is_named(
    margin: float | None, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures, detect, wide = photographs(), build_detector(), margin or Haar.margin
    one = asked(faces_margin=margin)
    for stage in (faces, download, upscale, split):
        stage(one)
    assert "left out: no face found (data.faces): 1 (b/nobody.png)\n" in capfd.readouterr().out
    boxes = pd.read_csv(SET / "faces/boxes.csv").set_index("file")
    assert (boxes.loc["b/nobody.png", "faces"], boxes.loc["a/3.png", "faces"], len(boxes)) == (0, 2, 9)
    labels = pd.read_csv(SET / "raw/labels.csv")
    images = np.load(SET / "raw/images.npy")
    assert images.shape == (8, SIDE, SIDE, 3)
    for name, image in zip(labels["name"], images):
        square = Image.fromarray(crop(pictures[name], detect(pictures[name])[0], wide))
        expected = np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).astype(int)
        assert abs(expected - image).mean() < 1, name
    about = {"detector": "haar", "margin": wide}
    assert json.loads((SET / "splits/summary.json").read_text())["faces"] == about

    # and `fer predict` cuts out the same
    run = fit("x", small_run(input={"image_size": SIDE, "channels": 3}, epochs=1, batch_size=4), CPU, SET, "runs")
    predictor, seen = Predictor(run), list[np.ndarray]()
    assert predictor.cropped == about
    monkeypatch.setattr(predictor, "probabilities", lambda faces, _: seen.extend(faces) or np.zeros((len(faces), 2)))
    list(predict(predictor, [Frame("x", 0, None, pictures["a/0.png"])], detect))
    np.testing.assert_array_equal(seen[0], crop(pictures["a/0.png"], detect(pictures["a/0.png"])[0], wide))


def test_an_archive_is_read_by_one_thread_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files in a tar share one position in it."""
    contents = [np.random.default_rng(seed).bytes(20_000) for seed in range(100)]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number, content in enumerate(contents):
            member = tarfile.TarInfo(f"{number:03}.png")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    monkeypatch.setattr("os.cpu_count", lambda: 16)

    class Same:
        def __call__(self, entry: Entry, content: bytes) -> bool:
            return content == contents[int(entry.base[:3])]

    with look(tmp_path / "a.tar") as found:
        assert list(looked_at(list(found.entries), Same())) == 100 * [True]  # type: ignore[arg-type]


def test_a_box_that_the_data_give_is_kept() -> None:
    photographs()
    one = prepared("table", data={"size": SIDE, "faces": "haar"})
    lines = [f"{name},{name[0]},{box}" for name, box in (("a/0.png", "0 0 300 300"), ("b/0.png", "9 9 250 250"))]
    Path("faces/list.csv").write_text("\n".join(["path,label,box", *lines]))
    faces(one)
    download(one)
    assert (SET.parent / "table/faces/boxes.csv").read_text().count("\n") == 1
    assert len(np.load(SET.parent / "table/raw/images.npy")) == 2


def test_it_looks_at_the_pictures_that_are_read_alone() -> None:
    """Of the wanted classes, and of a table whose other columns are no votes."""
    photographs()
    faces(asked(classes=["a", "b"]))
    for name in ("c/broken.png", "list.csv"):
        Path("faces", name).parent.mkdir(exist_ok=True)
    Path("faces/c/broken.png").write_bytes(b"\x89PNG\r\n")
    faces(asked(classes=["a", "b"]))
    assert "c/broken" not in (SET / "faces/boxes.csv").read_text()
    rows = [f"{label}/{n}.png,{2 * (label == 'a')},{2 * (label == 'b')},30" for label in "ab" for n in range(4)]
    Path("faces/list.csv").write_text("\n".join(["path,happiness,sadness,age", *rows]))
    faces(prepared("table", "faces", data={"faces": "haar", "classes": ["happiness", "sadness"]}))
    assert (SET.parent / "table/faces/boxes.csv").read_text().count("\n") == 1 + 8
    assert refusal(faces, asked(classes=[])).startswith("data.classes: two or more different classes are needed; known")


def test_off_it_is_an_empty_table_and_users_mistakes_are_one_line() -> None:
    faces(prepared("sample"))
    assert Path("data/sets/sample/faces/boxes.csv").read_text() == "file,left,top,right,bottom,score,faces\n"
    for label in "ab":
        Path("faces", label).mkdir(parents=True)
        Image.fromarray(np.zeros((40, 40), np.uint8)).save(f"faces/{label}/1.png")
    message = "data/sets/folders/faces/boxes.csv: not found; run `dvc repro faces` to make it"
    assert refusal(download, asked()) == message
    faces(asked())
    assert refusal(download, asked()) == "data.faces: no face was found in any picture; remove it if they are cropped"
    assert refusal(faces, asked(faces="no.onnx")).startswith("no.onnx: No such file or directory: give the file ")
    Path("rows").mkdir()
    pixels = " ".join(["9"] * 48 * 48)
    lines = [f"{n},{pixels},{usage}" for n, usage in enumerate(("Training", "PublicTest", "PrivateTest"))]
    rows = "\n".join(["emotion,pixels,Usage", *lines])
    Path("rows/fer2013.csv").write_text(rows)
    message = "data.faces: fer2013 is of cropped faces; remove it"
    assert refusal(faces, prepared("fer2013", "rows", data={"faces": "haar"})) == message
