"""Faces in photographs and videos: found, cropped, predicted, written; what cannot be read is a row that says so."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import CLASSES, CPU, ROOT, change, refusal, small_run, tells, wait_for
from PIL import Image

from fer.data.sample import draw_face
from fer.faces.annotate import annotate
from fer.faces.boxes import Boxes
from fer.faces.detect import YUNET, Face, build_detector, crop
from fer.faces.predict import Found, Frame, camera, frames, predict
from fer.faces.smooth import matched, overlap, smooth
from fer.predict import Predictor
from fer.train import fit
from pipelines.predicting import check_written, checkpoint_of, files, write

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
    for least, faces in ((found[1].width - 1, 2), (found[1].width * 1.2, 1), (found[0].width * 1.2, 0)):
        larger = build_detector(min_face=least)(picture.repeat(zoom, 0).repeat(zoom, 1))
        assert [face.left for face in larger] == pytest.approx([face.left for face in found[:faces]], abs=10 * zoom)


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
    assert refusal(build_detector).startswith("OpenCV is not installed: pip install -c constraints.txt -e '.[faces]'")


class Hub(BaseHTTPRequestHandler):
    """The hub with one file in it, which is not YuNet."""

    def do_HEAD(self) -> None:
        there = self.path == f"/opencv/face_detection_yunet/resolve/main/{YUNET}"
        self.send_response(200 if there else 404)
        for name, value in (("ETag", '"1"'), ("X-Repo-Commit", "0" * 40), ("Content-Length", "15")):
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(b"another network")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.slow
def test_yunet_is_fetched_once_and_checked(tmp_path: Path) -> None:
    def fetch(home: str, **variables: str) -> str:
        ask = "from pathlib import Path; from fer.faces.detect import build_detector; build_detector(Path('hub'))"
        own = {"HF_HOME": str(tmp_path / home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **variables}
        done = subprocess.run([sys.executable, "-c", ask], env={**os.environ, **own}, capture_output=True, text=True)
        return done.stderr.splitlines()[-1]

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        told = fetch("home", HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert f"/{YUNET}: is not {YUNET} (its SHA-256 differs)" in told
    assert fetch("home", HF_HUB_OFFLINE="1") == told  # from the cache
    assert f"{YUNET}: cannot be fetched from opencv/face_detection_yunet (" in fetch("empty", HF_HUB_OFFLINE="1")


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
    whole = save_gif(cut, [RNG.integers(0, 255, (16, 16), dtype=np.uint8) for _ in range(2)]).read_bytes()
    for end in range(len(whole) - 1):  # Pillow has several words for it
        cut.write_bytes(whole[:end])
        assert all(one.note for one in frames(cut) if one.pixels is None)


def test_a_picture_that_cannot_be_read_is_no_video_and_a_photograph_with_a_preview_no_animation(tmp_path: Path) -> None:
    noise, turned = RNG.integers(0, 256, (64, 48, 3), np.uint8), Image.Exif()
    turned[0x112] = 6
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:2000])
    Image.fromarray(noise[..., 0].astype(np.uint16)).save(tmp_path / "b.png")
    for name, told in (("a.jpg", "not a readable picture (image file is trunc"), ("b.png", "has more than 8 bits")):
        (none,) = frames(tmp_path / name)
        assert (none.pixels, none.note[: len(told)]) == (None, told)
    preview = [Image.fromarray(noise[:8, :8])]
    Image.fromarray(noise).save(tmp_path / "c.jpg", "MPO", save_all=True, append_images=preview, exif=turned)
    (photo,) = frames(tmp_path / "c.jpg")
    assert (photo.seconds, np.shape(photo.pixels)) == (None, (48, 64, 3))


def test_a_video_that_ends_before_its_time_says_so(tmp_path: Path) -> None:
    clip = save_video(tmp_path / "a.avi", [RNG.integers(0, 256, (48, 64, 3), np.uint8) for _ in range(30)])
    whole = list(frames(clip))
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    *seen, last = frames(clip)
    assert (len(whole), {frame.note for frame in (*whole, *seen)}) == (30, {""})
    assert (last.number, last.pixels, last.note) == (len(seen), None, "ends here, but should last 3.0 s: damaged")
    assert 5 < len(seen) < 25


def slower_from(clip: Path, frame: int, times: int) -> None:
    """Rewrite the times of an MP4 of 30 frames a second, so that `frame` and all after it last that much longer."""
    data = bytearray(clip.read_bytes())

    def number(place: int) -> int:
        return int.from_bytes(data[place : place + 4], "big")

    def write(place: int, value: int) -> None:
        data[place : place + 4] = value.to_bytes(4, "big")

    at = data.index(b"stts")
    count, delta = number(at + 12), number(at + 16)
    whole = delta * (frame + times * (count - frame))
    data[at + 8 : at + 20] = b"".join(n.to_bytes(4, "big") for n in (2, frame, delta, count - frame, delta * times))
    for box in (b"stts", b"stbl", b"minf", b"mdia", b"trak", b"moov"):  # each is 8 bytes longer
        write(data.index(box) - 4, number(data.index(box) - 4) + 8)
    media, movie = data.index(b"mdhd"), data.index(b"mvhd")
    write(media + 20, whole)
    for place in (movie + 20, data.index(b"tkhd") + 24, data.index(b"elst") + 12):
        write(place, whole * number(movie + 16) // number(media + 16))
    clip.write_bytes(data)


def test_frames_of_a_video_are_at_their_own_times(tmp_path: Path) -> None:
    """As a telephone's, whose rate falls in the dark: 20 frames of 1/30 s, then 20 of 1/6 s."""
    writer = cv2.VideoWriter(str(clip := tmp_path / "a.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 30.0, (64, 48))
    for _ in range(40):
        writer.write(np.zeros((48, 64, 3), np.uint8))
    writer.release()
    slower_from(clip, 20, 5)
    seen = list(frames(clip))
    times = [n / 30 if n < 20 else 20 / 30 + (n - 20) / 6 for n in range(40)]
    assert [frame.seconds for frame in seen] == pytest.approx(times, abs=2e-3)
    assert {frame.note for frame in seen} == {""}


def test_names_that_opencv_takes_for_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A colon is no protocol; at a name that is no UTF-8 OpenCV would crash, whatever the file is."""
    monkeypatch.chdir(tmp_path)
    save_video(Path("a.avi"), [RNG.integers(0, 256, (48, 64, 3), np.uint8)] * 2).rename("12:30 talk.avi")
    assert [frame.note for frame in frames(Path("12:30 talk.avi"))] == ["", ""]
    Path(odd := os.fsdecode(b"caf\xe9.jpg")).touch()
    (none,) = frames(Path(odd))
    assert (none.pixels, none.note.endswith("a video's name should be UTF-8: rename it")) == (None, True)


def test_an_animation_is_turned_upright_and_one_that_is_cut_says_so(tmp_path: Path) -> None:
    pictures, turned = [Image.fromarray(RNG.integers(0, 256, (48, 64, 3), np.uint8)) for _ in range(3)], Image.Exif()
    turned[0x112] = 6
    for name in ("a.png", "a.webp"):
        pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], exif=turned, lossless=True)
        found = [frame.pixels for frame in frames(tmp_path / name)]
        np.testing.assert_array_equal(found, [np.rot90(np.asarray(picture), -1) for picture in pictures])
    gif = save_gif(tmp_path / "a.gif", [np.full((16, 16), value, np.uint8) for value in (0, 100, 200)])
    whole = gif.read_bytes()
    gif.write_bytes(whole[: whole.rindex(b"\x21\xf9")])  # before the block that begins the last frame
    *seen, last = frames(gif)
    assert ([frame.note for frame in seen], last.note) == (["", ""], "damaged from here on (its end is missing)")


def test_folders_are_searched_and_what_is_no_picture_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b/2.JPG", "b/1.png", "b/notes.txt", ".hidden/3.png", "__MACOSX/4.png", "a.mp4"):
        change(tmp_path, name, str)
    assert files([tmp_path]) == ([tmp_path / "a.mp4", tmp_path / "b/1.png", tmp_path / "b/2.JPG"], 1)
    assert files([tmp_path / "b", tmp_path / "b/1.png"])[0] == [tmp_path / "b/1.png", tmp_path / "b/2.JPG"]  # once
    assert files([tmp_path / "b/notes.txt"]) == ([tmp_path / "b/notes.txt"], 0)  # named, so tried
    change(tmp_path, "b/[12].*", None)
    for name, told in (("c", "/c: not found"), ("b", "/b: ")):
        tells(tmp_path, told, files, [tmp_path / name])
    monkeypatch.chdir(tmp_path)
    for _ in range(20):
        Path("x" * 250).mkdir()
        monkeypatch.chdir("x" * 250)
    assert refusal(files, [tmp_path]).endswith(": cannot be read (File name too long)")


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


def test_each_face_of_each_frame_has_the_probabilities_of_its_crop(run: Path) -> None:
    predictor = Predictor(run, "cpu")
    two, one = [Face(0, 0, 20, 20, 5), Face(10, 10, 16, 16, 4)], [Face(4, 4, 30, 30, 9)]
    clip = [frame(0, 1), frame(1, 0), frame(2, 2), Frame("bad", 0, None, None, "damaged"), frame(3, 1)]
    found = list(predict(predictor, clip, Fixed({1: two, 2: one}), margin=1.5, at_once=3))
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


def test_a_frame_without_a_face_is_told_before_the_next_one_is_asked_for(run: Path) -> None:
    """Before a camera nothing may wait for a face that never comes."""
    asked: list[int] = []
    clip = (asked.append(number) or frame(number, 0) for number in range(3))
    told = predict(Predictor(run, "cpu"), clip, Fixed({}), at_once=1)
    assert [(next(told).frame.number, len(asked)) for _ in range(3)] == [(0, 1), (1, 2), (2, 3)]


def test_a_table_that_is_stopped_keeps_what_it_has(run: Path, tmp_path: Path) -> None:
    found = list(predict(Predictor(run, "cpu"), [frame(0, 1)], None))

    def stopped() -> Iterator[Found]:
        yield from found
        raise KeyboardInterrupt

    for suffix, read in ((".csv", pd.read_csv), (".parquet", pd.read_parquet)):
        with pytest.raises(KeyboardInterrupt):
            list(write(stopped(), CLASSES, tmp_path / f"table{suffix}"))
        assert len(read(tmp_path / f"table{suffix}")) == 1


def test_pictures_behind_links_are_read_and_never_written(tmp_path: Path) -> None:
    """A link to a folder is one of it; a link to a picture is no picture to draw a box into."""
    (tmp_path / "far").mkdir()
    Image.new("L", (9, 9)).save(tmp_path / "far/a.png")
    (tmp_path / "album").mkdir()
    (tmp_path / "album/a.png").symlink_to(tmp_path / "far/a.png")
    for link, to in (("album/2024", "far"), ("far/round", "far")):
        (tmp_path / link).symlink_to(tmp_path / to)
    found, others = files([tmp_path / "album"])
    assert ([path.relative_to(tmp_path / "album").as_posix() for path in found], others) == (["2024/a.png", "a.png"], 0)
    told = refusal(check_written, [tmp_path / "album/a.png"], tmp_path / "album", None, tmp_path / "out.csv")
    assert told.endswith("album: holds the pictures themselves; name another folder")
    before = (tmp_path / "far/a.png").read_bytes()
    one = Found(Frame("a.png", 0, None, np.zeros((9, 9), np.uint8)), None, None, None)
    list(annotate([one], tmp_path / "album", CLASSES))
    assert (tmp_path / "far/a.png").read_bytes() == before


def test_what_a_decoder_raises_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's AVIF decoder raises RuntimeError."""

    def fails(*_: object) -> None:
        raise RuntimeError("Failed to decode frame 0")

    Image.new("L", (9, 9)).save(tmp_path / "a.png")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fails)
    (one,) = frames(tmp_path / "a.png")
    assert (one.pixels, "Failed to decode frame 0" in one.note) == (None, True)


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


# A user's own boxes, faces over time, a camera


def test_own_boxes_say_where_the_faces_are(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By path, or from the table's folder; for all frames, or one; a face is cropped to exactly its box."""
    monkeypatch.chdir(tmp_path)
    change(tmp_path, "b/own.csv", lambda _: "\xef\xbb\xbffile,left,top,right,bottom,frame\nx.png,2,4,18,20,\n")
    table = tmp_path / "b/own.csv"
    table.write_text(
        table.read_text() + "b/c.png,0,0,10,10,3.0\nb/c.png,0,0,8,10,\nd.png,,,,,\nother.png,1,1,2,2,\n"
        "x.png,0,0,999,9,7\n../d.png,3,3,9,9,1\n"
    )
    boxes = Boxes(table, [Path("b/x.png"), Path("b/c.png"), Path("d.png")])
    assert boxes.of("b/x.png", 0) == [Face(2, 4, 16, 16, 1)]
    assert [face.width for face in boxes.of("b/c.png", 3)] == [8, 10]
    assert (len(boxes.of("b/c.png", 2)), boxes.of("d.png", 0), len(boxes.of("d.png", 1))) == (1, [], 1)
    twice = Boxes(table, [Path("b/x.png"), Path("b/../b/x.png")])  # a file that is named in two ways
    assert twice.of("b/../b/x.png", 0) == twice.of("b/x.png", 0) == boxes.of("b/x.png", 0)
    pixels, predictor = frame(0, 0).pixels, Predictor(run, "cpu")
    assert pixels is not None
    pictures = [Frame(name, 0, None, pixels) for name in ("b/x.png", "d.png")]
    found = list(predict(predictor, pictures, boxes))
    np.testing.assert_allclose(found[0].probabilities, predictor.probabilities(pixels[4:20, 2:18])[0], atol=1e-6)
    (outside,) = predict(predictor, [Frame("b/x.png", 0, None, pixels[:3])], boxes)
    _, huge = predict(predictor, [Frame("b/x.png", 7, None, pixels)], boxes)
    assert [one.row(CLASSES)["note"] for one in (found[1], outside, huge)] == [
        "no face", "the box lies outside the picture", "the box is more than 4 times as large as the picture"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "cannot be read (No such file"),
        ("file,left,top,right\n", "has no column bottom; give file, left, top, right, bottom"),
        ("file,left,top,right,bottom\ny.png,1,2,3,4\n", "names none of the files to predict"),
        ("file,left,top,right,bottom\nx.png,1,2,3,4\nx.png,1,2,x,4\n", "line 3: left, top, right and bottom should"),
        ("file,left,top,right,bottom\nx.png,1,2,1,4\n", "line 2: left should be less than right"),
        ("file,left,top,right,bottom\nx.png,1,2,nan,4\n", "line 2: left should be less than right"),
        ("file,left,top,right,bottom,frame\nx.png,1,2,3,4,1.5\n", "line 2: frame should be a whole number, 0 or more"),
        ("file,left,top,right,bottom\nx.png,1,2\n", "line 2: left, top, right and bottom should be numbers"),
    ],
)
def test_own_boxes_that_are_none(text: str | None, told: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "own.csv").write_text(text)
    message = refusal(Boxes, tmp_path / "own.csv", [tmp_path / "x.png"])
    assert message.replace(str(tmp_path), "").startswith(f"--boxes /own.csv: {told}")


def test_matched_faces_overlap_and_the_sum_of_their_overlaps_is_the_largest() -> None:
    left, right, far = Face(0, 0, 10, 10, 1), Face(4, 0, 10, 10, 1), Face(50, 50, 10, 10, 1)
    assert overlap(left, right) == pytest.approx(60 / 140)
    assert overlap(left, far) == 0
    assert matched([right, left], [left, far, right]) == {0: 2, 1: 0}
    assert matched([Face(1, 0, 10, 10, 1), far], [left]) == {0: 0}
    assert matched([far], [left]) == matched([], [left]) == {}
    crossed = [Face(x, 0, 100, 100, 1) for x in (0, 108, 48, -60)]  # two overlaps of .25 against one of .35
    assert matched(crossed[:2], crossed[2:]) == {0: 0}


def test_a_face_of_the_frame_before_is_followed_however_slow_the_video() -> None:
    clip = [answered(n, 1.1 * n, Face(0, 0, 10, 10, 1), 0.5) for n in range(4)]
    assert [f.track for f in smooth(clip, seconds=5)] == [0, 0, 0, 0]


def answered(number: int, seconds: float, face: Face | None, share: float, file: str = "clip") -> Found:
    """A face in a frame whose first class has this probability, its second the rest."""
    values = np.array([share, 1 - share, *np.zeros(6)], np.float32)
    return Found(Frame(file, number, seconds, np.zeros((9, 9), np.uint8)), 0, face, values)


def test_a_face_is_averaged_over_its_own_past_by_age_in_seconds() -> None:
    one, moved, other = Face(0, 0, 10, 10, 1), Face(2, 0, 10, 10, 1), Face(50, 0, 10, 10, 1)
    nothing, again = (Found(Frame("clip", n, t, None), None, None, None) for n, t in ((2, 0.3), (4, 1.9)))
    clip = [
        answered(0, 0.0, one, 1.0), answered(1, 0.2, other, 0.3), answered(1, 0.2, moved, 0.0), nothing,
        answered(3, 0.7, moved, 0.0), again, answered(5, 2.0, moved, 0.4), answered(0, 0.0, one, 0.6, "next"),
        answered(0, 0.0, one, 0.7, "next"),
    ]  # fmt: skip
    found = list(smooth(clip, seconds=0.5))
    assert [f.track for f in found] == [0, 1, 0, None, 0, None, 2, 0, 1]  # gone for more than a second: a new one
    first = np.exp(-0.4) / (np.exp(-0.4) + 1)
    third = np.exp(-1.4) / (np.exp(-1.4) + np.exp(-1.0) + 1)
    shares = [f.smoothed[0] for f in found if f.smoothed is not None]
    assert shares == pytest.approx([1.0, 0.3, first, third, 0.4, 0.6, 0.7])
    row = found[2].row(CLASSES)
    assert [row[key] for key in ("neutral", "smoothed neutral", "prediction", "smoothed")] == [
        0.0, pytest.approx(first), "happiness", "happiness",
    ]  # fmt: skip
    still = Found(Frame("a.png", 0, None, None), 0, None, clip[0].probabilities)
    assert next(smooth([still], 1.0)).smoothed is still.probabilities
    whole = [answered(n, n / 10, None, share) for n, share in enumerate((1.0, 0.0))]
    twice = list(smooth([*whole, *whole], 1.0))  # the same file once more begins anew
    assert [(f.track, f.smoothed is not None and f.smoothed[0]) for f in twice[2:]] == [
        (0, 1.0), (0, pytest.approx(np.exp(-0.1) / (np.exp(-0.1) + 1))),
    ]  # fmt: skip


def test_a_camera_gives_frames_until_it_is_stopped(tmp_path: Path) -> None:
    """A video stands in for it: OpenCV opens both in the same way."""
    clip = save_video(tmp_path / "clip.avi", [np.full((16, 16, 3), value, np.uint8) for value in (0, 90, 180)])
    answers = iter([False, True])
    found = list(camera(str(clip), lambda: next(answers)))
    assert [(one.file, one.number, one.seconds is not None) for one in found] == [
        (f"camera {clip}", 0, True), (f"camera {clip}", 1, True),
    ]  # fmt: skip
    assert found[0].seconds == 0
    assert len(list(camera(str(clip), lambda: False))) == 3
    for none in ("97", str(tmp_path / "none")):
        assert refusal(camera, none, bool).startswith(f"--camera {none}: no camera there that can be opened")
    assert "S3cret" not in refusal(camera, "rtsp://me:S3cret@127.0.0.1:9/x", bool)


def test_marked_pictures_have_a_box_and_marked_videos_all_their_frames(run: Path, tmp_path: Path) -> None:
    boxes = Fixed({1: [Face(8, 20, 16, 12, 5)], 2: [Face(8, 20, 16, 12, 5)]})
    stills = [Frame(name, 0, None, frame(0, 1).pixels) for name in ("a/x.jpg", "x.png")]
    stills += [Frame(name, 0, None, frame(0, 1).pixels) for name in ("x.1.jpg", "x.2.jpg")]
    found = predict(Predictor(run, "cpu"), [stills[0], *(frame(n, 2) for n in range(3)), *stills[1:]], boxes)
    assert len(list(annotate(found, tmp_path / "out", CLASSES))) == 7
    names = ["clip.mp4", "x-2.png", "x.1.png", "x.2.png", "x.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    marked = np.asarray(Image.open(tmp_path / "out/x.png"))
    assert (marked[20, 8:25] == (0, 255, 0)).all()
    assert len(list(frames(tmp_path / "out/clip.mp4"))) == 3
    face = predict(Predictor(run, "cpu"), [Frame("face.png", 0, None, np.zeros((64, 64, 3), np.uint8))], None)
    assert len(list(annotate(face, tmp_path / "out", CLASSES))) == 1
    marked = np.asarray(Image.open(tmp_path / "out/face.png"))
    assert (marked[:16, :, 1] > 100).any()  # its label, without a box
    assert not marked[16:].any()


def test_the_command_predicts_files(
    run: Path, tmp_path: Path, here: Callable[..., CompletedProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photograph({(100, 100): 240})).save("photo.jpg")
    Path("empty.png").touch()
    done = here("predict", "photo.jpg", "empty.png", "--run", str(run), "--annotated", "marked", "--smooth", "1")
    assert done.returncode == 0, done.stderr
    assert "--smooth: no file with several frames, so nothing was averaged" in done.stdout
    table = pd.read_csv("predictions.csv")
    assert table["file"].tolist() == ["photo.jpg", "empty.png"]
    assert table["prediction"].iloc[0] in CLASSES
    assert table["note"].iloc[1].startswith("not a readable picture")
    assert [path.name for path in Path("marked").iterdir()] == ["photo.png"]
    balanced = shutil.copytree(run, tmp_path / "balanced")
    old, new = (f'"balanced_sampling": {value}' for value in (0.0, 0.5))
    change(balanced, "best/checkpoint.json", lambda text: text.replace(old, new))
    done = here("predict", "photo.jpg", "--run", str(balanced), "--even", "1")
    assert (done.returncode, "was trained with balanced_sampling 0.5, which evens" in done.stderr) == (2, True)


def test_the_command_follows_faces_in_a_video_and_before_a_camera(
    run: Path, tmp_path: Path, here: Callable[..., CompletedProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    clip = str(save_video(tmp_path / "clip.avi", [photograph({(100, 100): 240})] * 4))
    Path("own.csv").write_text("file,left,top,right,bottom\nclip.avi,100,100,340,340\n")
    columns = []
    for words in ([clip], ["--camera", clip], [clip, "--boxes", "own.csv"]):
        done = here("predict", *words, "--run", str(run), "--smooth", "1", "--out", "p.parquet", "--annotated", "m")
        assert (done.returncode, "averaged" in done.stdout) == (0, False), done.stderr
        table = pd.read_parquet("p.parquet")
        assert table["frame"].tolist() == [0, 1, 2, 3]
        assert table["track"].tolist() == [0] * 4
        assert (table["seconds"].diff()[1:] > 0).all()
        columns.append(list(table.columns))
        smoothed, raw = (table[[f"{before}{name}" for name in CLASSES]] for before in ("smoothed ", ""))
        np.testing.assert_allclose(smoothed.iloc[-1], raw.iloc[-1], atol=1e-3)  # of a face that does not change
    assert columns[0] == columns[1] == columns[2]
    assert table["left"].tolist() == [100] * 4
    for words, told in (
        ([], "predict: name pictures and videos, or a camera"),
        ([clip, "--camera", "0"], "predict: name pictures and videos, or a camera"),
        ([clip, "--cropped", "--min-face", "50"], "--min-face: has no effect with --cropped; leave it out"),
        ([clip, "--cropped", "--margin", "1.2"], "--margin: has no effect with --cropped; leave it out"),
        ([clip, "--cropped", "--boxes", "own.csv"], "--cropped: says where the faces are, and so does --boxes"),
        (["--camera", "0", "--boxes", "own.csv"], "--boxes: is for files, not for a camera"),
        ([clip, "--annotated", "."], "--annotated .: holds the pictures themselves; name another folder"),
        ([clip, "--boxes", "own.csv", "--out", "own.csv"], "--out own.csv: is the table of --boxes; name another file"),
        (["--camera", "97"], "--camera 97: no camera there that can be opened; give its number, such as 0"),
    ):
        done = here("predict", *words)
        assert (done.returncode, done.stderr[: len(told) + 7]) == (2, f"error: {told}")
        assert done.stderr.count("\n") == 1


def test_ctrl_c_ends_a_camera_with_all_that_it_saw(run: Path, tmp_path: Path) -> None:
    clip = save_video(tmp_path / "clip.avi", [photograph({(100, 100): 240})] * 400)
    words = ["predict", "--camera", str(clip), "--run", str(run), "--out", "p.csv"]
    process = subprocess.Popen(
        [sys.executable, "-c", "from pipelines.cli import main; main()", *words], cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    table = tmp_path / "p.csv"
    wait_for(lambda: table.exists() and table.read_text().count("\n") > 2)  # rows come while it runs
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
    rows = table.read_text().splitlines()[1:]
    assert 2 <= len(rows) < 400
    assert out.rstrip().endswith("p.csv")
    assert all(row.count(",") == rows[0].count(",") for row in rows)


def test_the_champion_answers_if_no_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "bars-s1/best").mkdir(parents=True)
    champions: dict[str, Any] = {"fer-bars": {"fer.run_id": "bars-s1"}, "fer-x": {"fer.run_id": "gone"}}
    assert checkpoint_of(champions, "bars", tmp_path) == tmp_path / "bars-s1"
    for dataset, line in (("other", "no such champion"), ("x", "not on this machine")):
        assert line in refusal(checkpoint_of, champions, dataset, tmp_path)
