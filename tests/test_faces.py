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
from conftest import CLASSES, CPU, change, refusal, small_run, tells
from PIL import Image

from fer.data.sample import draw_face
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
    assert centres == [pytest.approx((450, 270), abs=15), pytest.approx((120, 140), abs=15)]
    assert 0.7 * 240 < found[0].width / zoom < 1.1 * 240
    assert build_detector()(picture[:, :, 0])[0].left == pytest.approx(found[0].left / zoom, abs=10)
    assert build_detector()(np.full((100, 100, 3), 9, np.uint8)) == []


def test_a_crop_is_a_square_around_the_box_that_repeats_the_edge() -> None:
    picture = np.arange(48, dtype=np.uint8).reshape(6, 8)
    for face, margin, wanted in (
        (Face(2, 1, 2, 4, 1), 1.0, picture[1:5, 1:5]),
        (Face(3, 2, 2, 2, 1), 2.0, picture[1:5, 2:6]),
        (Face(-1, -1, 2, 2, 1), 1.0, np.zeros((2, 2))),
        (Face(7, 5, 4, 4, 1), 1.5, np.pad(picture[4:, 6:], ((0, 4), (0, 4)), "edge")),
    ):
        np.testing.assert_array_equal(crop(picture, face, margin), wanted)
        np.testing.assert_array_equal(crop(np.dstack([picture] * 3), face, margin), np.dstack([wanted] * 3))


def test_what_a_detector_lacks_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / YUNET).write_bytes(b"another network")
    tells(tmp_path, "/none.onnx: No such file or directory: give the file ", build_detector, tmp_path / "none.onnx")
    tells(tmp_path, f"/{YUNET}: is not {YUNET}", build_detector, tmp_path / YUNET)
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert refusal(build_detector).startswith("OpenCV is not installed: pip install 'fer-pipeline[faces]'")


# Files


def save_video(path: Path, pictures: list[np.ndarray]) -> Path:
    """Ten frames a second."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, pictures[0].shape[1::-1])
    for picture in pictures:
        writer.write(picture[:, :, ::-1].copy())
    writer.release()
    return path


def save_gif(path: Path, pictures: list[np.ndarray]) -> Path:
    """Five frames a second."""
    first, *others = map(Image.fromarray, pictures)
    first.save(path, save_all=True, append_images=others, duration=200)
    return path


def test_frames_of_a_picture_an_animation_a_video_and_of_none_of_these(tmp_path: Path) -> None:
    grey = RNG.integers(0, 256, (20, 30), np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    (still,) = frames(tmp_path / "a.png")
    np.testing.assert_array_equal(still.pixels, grey)
    assert (still.number, still.seconds, still.note) == (0, None, "")
    colours = [np.full((16, 16, 3), value, np.uint8) for value in (0, 100, 200)]
    for moving, rate in ((save_gif(tmp_path / "b.gif", colours), 5), (save_video(tmp_path / "c.avi", colours), 10)):
        found = list(frames(moving))
        assert [(frame.number, frame.seconds) for frame in found] == [(n, pytest.approx(n / rate)) for n in range(3)]
        levels = [int(np.median(frame.pixels)) for frame in found if frame.pixels is not None]
        assert levels == pytest.approx([0, 100, 200], abs=3)
    (tmp_path / "d.mp4").write_bytes(b"no video")
    (tmp_path / "e.jpg").write_bytes((tmp_path / "a.png").read_bytes()[:100])
    for name in ("d.mp4", "e.jpg", "f.png"):
        (none,) = frames(tmp_path / name)
        assert (none.pixels, none.note != "") == (None, True)
    cut = save_gif(tmp_path / "cut.gif", [RNG.integers(0, 255, (16, 16), dtype=np.uint8) for _ in range(4)])
    cut.write_bytes(cut.read_bytes()[:-200])
    seen = list(frames(cut))
    assert [one.number for one in seen] == list(range(len(seen)))
    assert seen[-1].note.startswith("damaged from here on (")


def test_folders_are_searched_and_what_is_no_picture_is_counted(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "b/1.png", "b/notes.txt", ".hidden/3.png", "__MACOSX/4.png", "a.mp4"):
        change(tmp_path, name, str)
    assert files([tmp_path]) == ([tmp_path / "a.mp4", tmp_path / "b/1.png", tmp_path / "b/2.JPG"], 1)
    assert files([tmp_path / "b/notes.txt"]) == ([tmp_path / "b/notes.txt"], 0)  # named, so tried
    change(tmp_path, "b/[12].*", None)
    for name, told in (("c", "/c: not found"), ("b", "/b: ")):
        tells(tmp_path, told, files, [tmp_path / name])


# Predictions


@pytest.fixture(scope="module")
def run(bars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit("x", small_run(epochs=1), CPU, bars, tmp_path_factory.mktemp("runs"))


class Fixed:
    """A detector that finds what it is told, by the brightness of the picture."""

    name, margin = "fixed", 1.0

    def __init__(self, boxes: dict[int, list[Face]]):
        self.boxes = boxes

    def __call__(self, picture: np.ndarray) -> list[Face]:
        return self.boxes.get(int(picture[0, 0].max()), [])


def frame(number: int, value: int, file: str = "clip") -> Frame:
    pixels = RNG.integers(0, 256, (40, 40, 3), np.uint8)
    pixels[0, 0] = value
    return Frame(file, number, number / 10, pixels)


def test_each_face_of_each_frame_has_the_probabilities_of_its_crop(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fer.faces.predict.AT_ONCE", 3)
    predictor = Predictor(run, "cpu")
    two, one = [Face(0, 0, 20, 20, 5), Face(10, 10, 16, 16, 4)], [Face(4, 4, 30, 30, 9)]
    clip = [frame(0, 1), frame(1, 0), frame(2, 2), Frame("bad", 0, None, None, "damaged"), frame(3, 1)]
    found = list(predict(predictor, clip, Fixed({1: two, 2: one}), margin=1.5))
    assert [(f.frame.file, f.frame.number, f.number, f.row(CLASSES)["note"]) for f in found] == [
        ("clip", 0, 0, ""), ("clip", 0, 1, ""), ("clip", 1, None, "no face"), ("clip", 2, 0, ""),
        ("bad", 0, None, "damaged"), ("clip", 3, 0, ""), ("clip", 3, 1, ""),
    ]  # fmt: skip
    for f in found:
        if f.face is not None and f.frame.pixels is not None:
            wanted = predictor.probabilities(crop(f.frame.pixels, f.face, 1.5))[0]
            np.testing.assert_allclose(f.probabilities, wanted, atol=1e-5)
    row = found[1].row(CLASSES)
    best = max(CLASSES, key=lambda name: row[name])  # type: ignore[arg-type, return-value]
    assert [row[key] for key in ("left", "width", "score", "prediction")] == [10, 16, 4, best]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_the_table_reads_back_as_it_was_predicted(suffix: str, run: Path, tmp_path: Path) -> None:
    """One that does not fit, or cannot be read, is a row of its own and stops no other; nor does an odd name."""
    wide = Frame("wide", 0, None, np.zeros((20, 90, 3), np.uint8))
    pictures = [frame(0, 1), Frame("bad", 0, None, None, "damaged"), wide, frame(1, 0)]
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(odd := Path(f"{tmp_path}/\udcff.png"))
    found = list(predict(Predictor(run, "cpu"), [*pictures, *frames(odd)], None))
    path = tmp_path / f"table{suffix}"
    assert list(write(found, CLASSES, path)) == found
    table = pd.read_csv(path) if suffix == ".csv" else pd.read_parquet(path)
    assert table["file"].tolist() == ["clip", "bad", "wide", "clip", f"{tmp_path}/\\udcff.png"]
    probabilities = [one.probabilities for one in found if one.probabilities is not None]
    np.testing.assert_array_equal(table.loc[[0, 3, 4], CLASSES].to_numpy(np.float32), np.stack(probabilities))
    assert table.loc[[1, 2], CLASSES].isna().all(axis=None)
    assert table["note"][1] == "damaged"
    assert table["note"][2].startswith("images: 90x20 pixels, but the model was trained on")


def test_marked_pictures_have_a_box_and_marked_videos_all_their_frames(run: Path, tmp_path: Path) -> None:
    boxes = Fixed({1: [Face(8, 20, 16, 12, 5)], 2: [Face(8, 20, 16, 12, 5)]})
    stills = [Frame(name, 0, None, frame(0, 1).pixels) for name in ("a/x.jpg", "x.png")]
    found = predict(Predictor(run, "cpu"), [stills[0], *(frame(n, 2) for n in range(3)), stills[1]], boxes)
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


def test_the_champion_answers_if_no_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "bars-s1/best").mkdir(parents=True)
    champions: dict[str, Any] = {"fer-bars": {"fer.run_id": "bars-s1"}, "fer-x": {"fer.run_id": "gone"}}
    assert checkpoint_of(champions, "bars", tmp_path) == tmp_path / "bars-s1"
    for dataset, line in (("other", "no such champion"), ("x", "not on this machine")):
        assert line in refusal(checkpoint_of, champions, dataset, tmp_path)
