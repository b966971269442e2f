"""Expressions in files: pictures, animations and videos, row by row as they come, in bounded memory."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError

from fer.data.decode import UNREADABLE, UPRIGHT, misplaced, orientation
from fer.data.found import printable
from fer.errors import UserError, first_line, without_password
from fer.faces.boxes import Boxes
from fer.faces.detect import Detector, Face, crop
from fer.pictures import read_picture
from fer.predict import Predictor

AT_ONCE = 64  # faces in one pass through the network
HELD = 2**28  # bytes of pictures that wait for it at most, and one picture more
NO_FACE = "no face"
ANIMATED = ("GIF", "PNG", "WEBP")  # what has several pictures in another format is no animation
ENOUGH = 0.9  # of the frames that a video says to have, which some only estimate
PLACE = ("file", "frame", "seconds", "face", "left", "top", "width", "height", "score", "note")


@dataclass(frozen=True, eq=False)
class Frame:
    """A picture, or one of a video; without pixels, `note` says why."""

    file: str
    number: int
    seconds: float | None
    pixels: np.ndarray | None  # uint8 [H, W] or [H, W, 3], upright
    note: str = ""
    of: int = 1  # frames of its file, as far as that says


@dataclass(frozen=True, eq=False)
class Found:
    """A face in a frame and its probabilities; neither where there is none."""

    frame: Frame
    number: int | None
    face: Face | None
    probabilities: np.ndarray | None  # float32 [C]
    track: int | None = None  # the same for a face in all frames of a video, if it is followed
    smoothed: np.ndarray | None = None  # float32 [C], the probabilities averaged over time

    def row(self, classes: list[str]) -> dict[str, object]:
        """By PLACE, then `prediction` and a column for each class; then SMOOTHED, if they are averaged over time."""
        face, values = self.face, self.probabilities
        box = {key: None if face is None else round(getattr(face, key), 2) for key in PLACE[4:9]}
        about = {
            "file": self.frame.file,
            "frame": self.frame.number,
            "seconds": self.frame.seconds,
            "face": self.number,
        }
        row: dict[str, object] = {**about, **box, "note": self.frame.note or ("" if values is not None else NO_FACE)}
        row["prediction"] = "" if values is None else classes[int(values.argmax())]
        row |= {name: None if values is None else float(values[i]) for i, name in enumerate(classes)}
        if self.smoothed is None:
            return row
        row |= {"track": self.track, "smoothed": classes[int(self.smoothed.argmax())]}
        return row | {f"smoothed {name}": float(value) for name, value in zip(classes, self.smoothed)}


def frames(path: Path) -> Iterator[Frame]:
    """The pictures in a file. One that cannot be read is one frame without pixels, which says why.

    Of a photograph that comes with a preview, or a TIFF of several pages, it is the first picture.
    """
    match _kind(path):
        case "animation":
            yield from _animated(path)
        case "picture":
            yield _still(path)
        case _:
            yield from _video(path)


def _kind(path: Path) -> str:
    """By its content: animation, picture (if only a damaged one), or, if it is none of these, perhaps a video."""
    try:
        with Image.open(path) as image:
            if image.format == "MPEG":  # Pillow knows these videos, but does not read them
                return "video"
            return "animation" if image.format in ANIMATED and getattr(image, "is_animated", False) else "picture"
    except UnidentifiedImageError:
        return "video"
    except UNREADABLE:
        return "picture"  # `read_picture` says what is wrong


def _still(path: Path) -> Frame:
    try:
        return Frame(printable(str(path)), 0, None, read_picture(path))
    except UserError as error:
        return Frame(printable(str(path)), 0, None, None, str(error).removeprefix(f"{path}: "))


def _animated(path: Path) -> Iterator[Frame]:
    seconds, number, name = 0.0, 0, printable(str(path))
    try:
        with Image.open(path) as image:
            turn = UPRIGHT.get(orientation(image))
            for number, frame in enumerate(ImageSequence.Iterator(image)):
                upright = frame.convert("RGB") if turn is None else frame.convert("RGB").transpose(turn)
                yield Frame(name, number, seconds, np.asarray(upright))
                seconds += frame.info.get("duration", 100) / 1000
            if image.format == "GIF" and not path.read_bytes().rstrip(b"\0").endswith(b";"):
                raise OSError("its end is missing")  # between two frames, where Pillow does not see it
    except UNREADABLE as error:
        yield Frame(name, number, seconds, None, f"damaged from here on ({first_line(error)})")


def _video(path: Path) -> Iterator[Frame]:
    """The frames of a video; one without pixels if it is none, or at the end of one that has not all its frames."""
    name = printable(str(path))
    try:
        import cv2
    except ImportError:
        note = "not a readable picture; videos need OpenCV (pip install -c constraints.txt -e '.[faces]')"
        yield Frame(name, 0, None, None, note)
        return
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # nothing on stderr: the rows say what is damaged
    if any("\udc80" <= letter <= "\udcff" for letter in str(path)):  # at which OpenCV crashes
        yield Frame(name, 0, None, None, "not a readable picture; a video's name should be UTF-8: rename it")
        return
    capture, number, seconds = cv2.VideoCapture(os.path.abspath(path)), -1, 0.0  # before a colon would be a protocol
    rate, of = capture.get(cv2.CAP_PROP_FPS) or 25.0, max(1, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
    for number, pixels in enumerate(_read(capture)):
        told = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        seconds = told if told > seconds or not number else seconds + 1 / rate  # of a file without times
        yield Frame(name, number, seconds, pixels, of=of)
    if number < 0:
        yield Frame(name, 0, None, None, "not a readable picture or video")
    elif seconds + 1 / rate < ENOUGH * of / rate:  # `of` is an estimate where the frames are not equally far apart
        yield Frame(name, number + 1, seconds, None, f"ends here, but should last {of / rate:.1f} s: damaged", of)


def camera(source: str, stopped: Callable[[], bool]) -> Iterator[Frame]:
    """The frames of a camera as they come, until `stopped()`; `source`: its number, or its device or address.

    `seconds` counts from the first frame. Raises UserError if there is no such camera.
    """
    try:
        import cv2
    except ImportError:
        raise UserError("OpenCV is not installed: pip install -c constraints.txt -e '.[faces]'") from None
    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # or it lists what it tried
    try:
        capture = cv2.VideoCapture(int(source) if source.isdecimal() else source)
    finally:
        cv2.utils.logging.setLogLevel(level)
    shown = without_password(source)
    if not capture.isOpened():
        raise UserError(f"--camera {shown}: no camera there that can be opened; give its number, such as 0")
    capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # the newest frame, where prediction is slower than the camera
    return _live(f"camera {shown}", capture, stopped)


def _live(name: str, capture: Any, stopped: Callable[[], bool]) -> Iterator[Frame]:
    start: float | None = None
    for number, pixels in enumerate(_read(capture)):
        now = time.monotonic()
        start = now if start is None else start
        yield Frame(name, number, round(now - start, 3), pixels)
        if stopped():
            break


def _read(capture: Any) -> Iterator[np.ndarray]:
    """uint8 [H, W, 3] of each frame, in RGB."""
    import cv2

    try:
        while True:
            there, pixels = capture.read()
            if not there:
                return
            yield cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    finally:
        capture.release()


def margin_of(predictor: Predictor, detector: Detector) -> float:
    """That of the training data, if the same detector cropped them, or else the detector's."""
    if predictor.cropped.get("detector") == detector.name:
        return float(predictor.cropped["margin"])
    return detector.margin


def predict(
    predictor: Predictor,
    pictures: Iterable[Frame],
    detector: Detector | Boxes | None,
    margin: float | None = None,
    at_once: int = AT_ONCE,
) -> Iterator[Found]:
    """Each face of each frame, in order; a frame without one gives one `Found` without face.

    `detector`: None if every picture is a face, cropped as in the training data. `margin`: another than `margin_of`, or
    than 1 around boxes. `at_once`: faces of one pass through the network, which are waited for: 1 for a camera.
    """
    if margin is None and detector is not None:
        margin = detector.margin if isinstance(detector, Boxes) else margin_of(predictor, detector)
    waiting: list[Found] = []
    crops: list[np.ndarray] = []
    held = 0
    for frame in pictures:
        for found, face in _faces(frame, detector, margin):
            waiting.append(found)
            crops += [] if face is None else [face]
        held += 0 if frame.pixels is None else frame.pixels.nbytes
        if not crops or len(crops) >= at_once or held >= HELD:  # nothing waits for a face that may never come
            yield from _answered(predictor, waiting, crops, detector is not None)
            waiting, crops, held = [], [], 0
    yield from _answered(predictor, waiting, crops, detector is not None)


def _faces(
    frame: Frame, detector: Detector | Boxes | None, margin: float | None
) -> Iterator[tuple[Found, np.ndarray | None]]:
    if frame.pixels is None:
        yield Found(frame, None, None, None), None
    elif detector is None:
        yield Found(frame, 0, None, None), frame.pixels
    else:
        faces = detector.of(frame.file, frame.number) if isinstance(detector, Boxes) else detector(frame.pixels)
        if not faces:
            yield Found(frame, None, None, None), None
        for number, face in enumerate(faces):
            assert margin is not None
            height, width = frame.pixels.shape[:2]
            if wrong := misplaced(face.box, (width, height)):
                yield Found(replace(frame, note=f"the box {wrong}"), None, face, None), None
                continue
            yield Found(frame, number, face, None), crop(frame.pixels, face, margin)


def _answered(
    predictor: Predictor, waiting: list[Found], crops: list[np.ndarray], photographed: bool
) -> Iterator[Found]:
    """`waiting` with the probabilities of the `crops` for those that have a number."""
    answers = _probabilities(predictor, crops, photographed)
    for found in waiting:
        if found.number is None:
            yield found
            continue
        answer = next(answers)
        if isinstance(answer, str):
            yield Found(replace(found.frame, note=answer), found.number, found.face, None)
        else:
            yield replace(found, probabilities=answer)


def _probabilities(predictor: Predictor, crops: list[np.ndarray], photographed: bool) -> Iterator[np.ndarray | str]:
    """Of each crop, or why there are none: one that does not fit the training data does not stop the others."""
    try:
        yield from predictor.probabilities(crops, photographed)
    except UserError:
        for one in crops:
            try:
                yield predictor.probabilities([one], photographed)[0]
            except UserError as error:
                yield str(error)
