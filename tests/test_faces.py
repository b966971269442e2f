"""Faces in photographs and videos: found, cropped, predicted, written; what cannot be read is a row that says so."""

import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import CLASSES, CPU, make_data, small_run
from PIL import Image

from fer.data.sample import draw_face
from fer.errors import UserError
from fer.faces.annotate import annotate
from fer.faces.detect import YUNET, Face, build_detector, crop
from fer.faces.predict import Frame, frames, predict
from fer.predict import Predictor
from fer.train import fit
from pipelines.predicting import checkpoint_of, files, write

RNG = np.random.default_rng(3)


def photograph(faces: dict[tuple[int, int], int], size: tuple[int, int] = (640, 480), seed: int = 3) -> np.ndarray:
    """Drawn faces on grey: left and top -> side."""
    rng, picture = np.random.default_rng(seed), np.full((size[1], size[0], 3), 150, np.uint8)
    for (left, top), side in faces.items():
        drawn = Image.fromarray(draw_face(rng, "happiness")).resize((side, side), Image.Resampling.BICUBIC)
        picture[top : top + side, left : left + side] = np.asarray(drawn)[..., None]
    return picture


@pytest.mark.parametrize("zoom", [1, 3])
def test_faces_are_found_where_they_are_the_largest_first(zoom: int) -> None:
    picture = photograph({(40, 60): 160, (330, 150): 240})
    found = build_detector()(picture.repeat(zoom, 0).repeat(zoom, 1))
    centres = [((face.left + face.width / 2) / zoom, (face.top + face.height / 2) / zoom) for face in found]
    assert len(found) == 2
    assert centres[0] == pytest.approx((450, 270), abs=15)
    assert centres[1] == pytest.approx((120, 140), abs=15)
    assert 0.7 * 240 < found[0].width / zoom < 1.1 * 240
    assert build_detector()(picture[:, :, 0])[0].left == pytest.approx(found[0].left / zoom, abs=10)
    assert build_detector()(np.full((100, 100, 3), 9, np.uint8)) == []


def test_a_crop_is_a_square_around_the_box_that_repeats_the_edge() -> None:
    picture = np.arange(48, dtype=np.uint8).reshape(6, 8)
    np.testing.assert_array_equal(crop(picture, Face(2, 1, 2, 4, 1), 1.0), picture[1:5, 1:5])
    np.testing.assert_array_equal(crop(picture, Face(3, 2, 2, 2, 1), 2.0), picture[1:5, 2:6])
    np.testing.assert_array_equal(crop(picture, Face(-1, -1, 2, 2, 1), 1.0), np.zeros((2, 2)))
    colour = np.repeat(picture[..., None], 3, 2)
    assert crop(colour, Face(7, 5, 4, 4, 1), 1.5).shape == (6, 6, 3)
    assert (crop(colour, Face(7, 5, 4, 4, 1), 1.5)[-1, -1] == 47).all()


def test_what_a_detector_lacks_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / YUNET).write_bytes(b"another network")
    for name, told in (("none.onnx", ": No such file or directory: give the file "), (YUNET, ": is not ")):
        with pytest.raises(UserError, match=f"{name}{told}{YUNET}"):
            build_detector(tmp_path / name)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match=r"^OpenCV is not installed: pip install 'fer-pipeline\[faces\]'"):
        build_detector()


# Files


def save_video(path: Path, pictures: list[np.ndarray], rate: float = 10.0) -> Path:
    height, width = pictures[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), rate, (width, height))
    for picture in pictures:
        writer.write(picture[:, :, ::-1].copy())
    writer.release()
    return path


def test_frames_of_a_picture_an_animation_a_video_and_of_none_of_these(tmp_path: Path) -> None:
    grey = RNG.integers(0, 256, (20, 30), np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    (still,) = frames(tmp_path / "a.png")
    np.testing.assert_array_equal(still.pixels, grey)
    assert (still.number, still.seconds, still.note) == (0, None, "")

    colours = [np.full((16, 16, 3), value, np.uint8) for value in (0, 100, 200)]
    first, *others = map(Image.fromarray, colours)
    first.save(tmp_path / "b.gif", save_all=True, append_images=others, duration=200)
    for moving, rate in ((tmp_path / "b.gif", 5), (save_video(tmp_path / "c.avi", colours), 10)):
        found = list(frames(moving))
        assert [frame.number for frame in found] == [0, 1, 2]
        assert [frame.seconds for frame in found] == pytest.approx([0, 1 / rate, 2 / rate])
        assert [int(np.median(frame.pixels)) for frame in found if frame.pixels is not None] == pytest.approx(
            [0, 100, 200], abs=3
        )

    (tmp_path / "d.mp4").write_bytes(b"no video")
    (tmp_path / "e.jpg").write_bytes((tmp_path / "a.png").read_bytes()[:100])
    for name in ("d.mp4", "e.jpg", "f.png"):
        (none,) = frames(tmp_path / name)
        assert none.pixels is None
        assert none.note


def test_folders_are_searched_and_what_is_no_picture_is_counted(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "b/1.png", "b/notes.txt", ".hidden/3.png", "__MACOSX/4.png", "a.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert files([tmp_path]) == ([tmp_path / "a.mp4", tmp_path / "b/1.png", tmp_path / "b/2.JPG"], 1)
    assert files([tmp_path / "b/notes.txt"]) == ([tmp_path / "b/notes.txt"], 0)  # named, so tried
    (tmp_path / "b/2.JPG").unlink(), (tmp_path / "b/1.png").unlink()
    for nothing in ("c", "b"):
        with pytest.raises(UserError, match=r"not found|no picture or video there"):
            files([tmp_path / nothing])


# Predictions


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run")
    return fit("x", small_run(epochs=1), CPU, make_data(place / "data"), place / "data" / "runs")


class Fixed:
    """A detector that finds what it is told, by the brightness of the picture."""

    name, margin = "fixed", 1.0

    def __init__(self, boxes: dict[int, list[Face]]):
        self.boxes = boxes

    def __call__(self, picture: np.ndarray) -> list[Face]:
        return self.boxes.get(int(picture[0, 0].max()), [])


def frame(number: int, value: int, side: int = 40) -> Frame:
    pixels = RNG.integers(0, 256, (side, side, 3), np.uint8)
    pixels[0, 0] = value
    return Frame("clip", number, number / 10, pixels)


def test_each_face_of_each_frame_has_the_probabilities_of_its_crop(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fer.faces.predict.AT_ONCE", 3)
    predictor = Predictor(run, "cpu")
    two, one = [Face(0, 0, 20, 20, 5), Face(10, 10, 16, 16, 4)], [Face(4, 4, 30, 30, 9)]
    clip = [frame(0, 1), frame(1, 0), frame(2, 2), Frame("bad", 0, None, None, "damaged"), frame(3, 1)]
    found = list(predict(predictor, clip, Fixed({1: two, 2: one}), margin=1.5))
    assert [(f.frame.file, f.frame.number, f.number) for f in found] == [
        ("clip", 0, 0), ("clip", 0, 1), ("clip", 1, None), ("clip", 2, 0),
        ("bad", 0, None), ("clip", 3, 0), ("clip", 3, 1),
    ]  # fmt: skip
    for f in found:
        if f.face is not None and f.frame.pixels is not None:
            wanted = predictor.probabilities(crop(f.frame.pixels, f.face, 1.5))[0]
            np.testing.assert_allclose(f.probabilities, wanted, atol=1e-5)
    row = found[1].row(CLASSES)
    assert (row["left"], row["width"], row["score"], row["note"]) == (10, 16, 4, "")
    assert row["prediction"] == max(CLASSES, key=lambda name: row[name])  # type: ignore[arg-type, return-value]
    assert [f.row(CLASSES)["note"] for f in found[2:5]] == ["no face", "", "damaged"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_the_table_reads_back_as_it_was_predicted(suffix: str, run: Path, tmp_path: Path) -> None:
    """One that does not fit, or cannot be read, is a row of its own and stops no other."""
    wide = Frame("wide", 0, None, np.zeros((20, 90, 3), np.uint8))
    pictures = [frame(0, 1), Frame("bad", 0, None, None, "damaged"), wide, frame(1, 0)]
    found = list(predict(Predictor(run, "cpu"), pictures, None))
    path = tmp_path / f"table{suffix}"
    assert list(write(found, CLASSES, path)) == found
    table = pd.read_csv(path) if suffix == ".csv" else pd.read_parquet(path)
    assert table["file"].tolist() == ["clip", "bad", "wide", "clip"]
    probabilities = [one.probabilities for one in found if one.probabilities is not None]
    np.testing.assert_array_equal(table.loc[[0, 3], CLASSES].to_numpy(np.float32), np.stack(probabilities))
    assert table.loc[[1, 2], CLASSES].isna().all(axis=None)
    assert table["note"][1] == "damaged"
    assert table["note"][2].startswith("images: 90x20 pixels, but the model was trained on")


def test_marked_pictures_have_a_box_and_marked_videos_all_their_frames(run: Path, tmp_path: Path) -> None:
    boxes = Fixed({1: [Face(8, 20, 16, 12, 5)], 2: [Face(8, 20, 16, 12, 5)]})
    still = Frame("a/x.jpg", 0, None, frame(0, 1).pixels)
    clip = [frame(number, 2) for number in range(3)]
    found = predict(Predictor(run, "cpu"), [still, *clip, Frame("x.png", 0, None, frame(0, 1).pixels)], boxes)
    assert len(list(annotate(found, tmp_path / "out", CLASSES))) == 5
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["clip.mp4", "x-2.png", "x.png"]
    marked = np.asarray(Image.open(tmp_path / "out/x.png"))
    assert (marked[20, 8:25] == (0, 255, 0)).all()
    assert len(list(frames(tmp_path / "out/clip.mp4"))) == 3


def test_the_command_predicts_files(
    run: Path, tmp_path: Path, here: Callable[..., CompletedProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photograph({(100, 100): 240})).save("photo.jpg")
    Path("empty.png").touch()
    done = here("predict", "photo.jpg", "empty.png", "--run", str(run), "--annotated", "marked")
    assert done.returncode == 0, done.stderr
    table = pd.read_csv("predictions.csv")
    assert table["file"].tolist() == ["photo.jpg", "empty.png"]
    assert table["prediction"].iloc[0] in CLASSES
    assert table["note"].iloc[1].startswith("not a readable picture")
    assert [path.name for path in Path("marked").iterdir()] == ["photo.png"]


def test_a_cut_animation_and_a_name_that_is_no_utf8_are_rows_like_others(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "clip.gif"
    stills = [Image.fromarray(RNG.integers(0, 255, (16, 16), dtype=np.uint8)) for _ in range(4)]
    stills[0].save(path, save_all=True, append_images=stills[1:])
    path.write_bytes(path.read_bytes()[:-200])
    seen = list(frames(path))
    assert [one.number for one in seen] == list(range(len(seen)))
    assert seen[-1].note.startswith("damaged from here on (")
    odd = Path(f"{tmp_path}/\udcff.png")
    stills[0].save(odd)
    found = predict(Predictor(run, "cpu"), frames(odd), None)
    assert [one.frame.file for one in write(found, CLASSES, tmp_path / "t.csv")] == [f"{tmp_path}/\\udcff.png"]


def test_the_champion_answers_if_no_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "bars-s1/best").mkdir(parents=True)
    champions: dict[str, Any] = {"fer-bars": {"fer.run_id": "bars-s1"}, "fer-x": {"fer.run_id": "gone"}}
    assert checkpoint_of(champions, "bars", tmp_path) == tmp_path / "bars-s1"
    for dataset, line in (("other", "no such champion"), ("x", "not on this machine")):
        with pytest.raises(UserError, match=line):
            checkpoint_of(champions, dataset, tmp_path)
