"""Expressions in files: pictures, animations and videos, row by row as they come, in bounded memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from fer.data.found import printable
from fer.errors import UserError, first_line
from fer.faces.detect import Detector, Face, crop
from fer.pictures import read_picture
from fer.predict import Predictor

AT_ONCE = 64  # faces in one pass through the network
HELD = 2**28  # bytes of pictures that wait for it at most, and one picture more
NO_FACE = "no face"
PLACE = ("file", "frame", "seconds", "face", "left", "top", "width", "height", "score", "note")


@dataclass(frozen=True, eq=False)
class Frame:
    """A picture, or one of a video; without pixels, `note` says why."""

    file: str
    number: int
    seconds: float | None
    pixels: np.ndarray | None  # uint8 [H, W] or [H, W, 3], upright
    note: str = ""


@dataclass(frozen=True, eq=False)
class Found:
    """A face in a frame and its probabilities; neither where there is none."""

    frame: Frame
    number: int | None
    face: Face | None
    probabilities: np.ndarray | None  # float32 [C]

    def row(self, classes: list[str]) -> dict[str, object]:
        """By PLACE, then `prediction` and a column for each class."""
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
        return row | {name: None if values is None else float(values[i]) for i, name in enumerate(classes)}


def frames(path: Path) -> Iterator[Frame]:
    """The pictures in a file. One that cannot be read is one frame without pixels, which says why."""
    name = printable(str(path))
    try:
        animated = _animation(path)
        if animated is None:
            yield Frame(name, 0, None, read_picture(path))
            return
    except UserError as error:
        yield from _video(path, str(error).removeprefix(f"{path}: "))
        return
    yield from animated


def _animation(path: Path) -> Iterator[Frame] | None:
    """The frames of an animated GIF, PNG or WebP; None for any other file."""
    try:
        with Image.open(path) as image:
            if not getattr(image, "is_animated", False):
                return None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None  # `read_picture` says why
    return _animated(path)


def _animated(path: Path) -> Iterator[Frame]:
    seconds, number, name = 0.0, 0, printable(str(path))
    try:
        with Image.open(path) as image:
            for number, frame in enumerate(ImageSequence.Iterator(image)):
                yield Frame(name, number, seconds, np.asarray(frame.convert("RGB")))
                seconds += frame.info.get("duration", 100) / 1000
    except (OSError, SyntaxError, ValueError) as error:
        yield Frame(name, number, seconds, None, f"damaged from here on ({first_line(error)})")


def _video(path: Path, otherwise: str) -> Iterator[Frame]:
    """The frames of a video; one without pixels if it is none."""
    try:
        import cv2
    except ImportError:
        yield Frame(printable(str(path)), 0, None, None, otherwise)
        return
    capture = cv2.VideoCapture(str(path)) if path.is_file() else None
    try:
        number = 0
        rate = (capture.get(cv2.CAP_PROP_FPS) if capture else 0) or 25.0
        while capture is not None:
            there, pixels = capture.read()
            if not there:
                break
            yield Frame(printable(str(path)), number, number / rate, cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
            number += 1
        if not number:
            yield Frame(printable(str(path)), 0, None, None, otherwise)
    finally:
        if capture is not None:
            capture.release()


def predict(
    predictor: Predictor, pictures: Iterable[Frame], detector: Detector | None, margin: float | None = None
) -> Iterator[Found]:
    """Each face of each frame, in order; a frame without one gives one `Found` without face.

    `detector`: None if every picture is a face, cropped as in the training data. `margin`: another than that of the
    training data, if the same detector cropped them, or else the detector's.
    """
    if margin is None and detector is not None:
        margin = detector.margin
        if predictor.cropped.get("detector") == detector.name:
            margin = float(predictor.cropped["margin"])
    waiting: list[Found] = []
    crops: list[np.ndarray] = []
    held = 0
    for frame in pictures:
        for found, face in _faces(frame, detector, margin):
            waiting.append(found)
            crops += [] if face is None else [face]
        held += 0 if frame.pixels is None else frame.pixels.nbytes
        if len(crops) >= AT_ONCE or held >= HELD:
            yield from _answered(predictor, waiting, crops)
            waiting, crops, held = [], [], 0
    yield from _answered(predictor, waiting, crops)


def _faces(frame: Frame, detector: Detector | None, margin: float | None) -> Iterator[tuple[Found, np.ndarray | None]]:
    if frame.pixels is None:
        yield Found(frame, None, None, None), None
    elif detector is None:
        yield Found(frame, 0, None, None), frame.pixels
    else:
        faces = detector(frame.pixels)
        if not faces:
            yield Found(frame, None, None, None), None
        for number, face in enumerate(faces):
            assert margin is not None
            yield Found(frame, number, face, None), crop(frame.pixels, face, margin)


def _answered(predictor: Predictor, waiting: list[Found], crops: list[np.ndarray]) -> Iterator[Found]:
    """`waiting` with the probabilities of the `crops` for those that have a number."""
    answers = _probabilities(predictor, crops)
    for found in waiting:
        if found.number is None:
            yield found
            continue
        answer = next(answers)
        if isinstance(answer, str):
            yield Found(replace(found.frame, note=answer), found.number, found.face, None)
        else:
            yield replace(found, probabilities=answer)


def _probabilities(predictor: Predictor, crops: list[np.ndarray]) -> Iterator[np.ndarray | str]:
    """Of each crop, or why there are none: one that does not fit the training data does not stop the others."""
    try:
        yield from predictor.probabilities(crops)
    except UserError:
        for one in crops:
            try:
                yield predictor.probabilities([one])[0]
            except UserError as error:
                yield str(error)
