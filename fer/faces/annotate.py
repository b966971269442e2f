"""Pictures and videos with a box and a label on each face."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fer.errors import UserError
from fer.faces.predict import Found, Frame

RATE = 25.0  # frames a second of videos that do not say theirs


def drawn(frame: Frame, faces: list[Found], classes: list[str]) -> np.ndarray:
    """uint8 [H, W, 3]: the frame with boxes and, above each, its prediction and probability."""
    assert frame.pixels is not None
    image = Image.fromarray(frame.pixels).convert("RGB")
    pen, size = ImageDraw.Draw(image), max(10, min(image.size) // 25)
    for found in faces:
        if found.probabilities is None:
            continue
        values = found.probabilities if found.smoothed is None else found.smoothed
        best, place = int(values.argmax()), (0.0, 0.0)  # a picture that is a face has no box
        if found.face is not None:
            pen.rectangle(found.face.box, outline=(0, 255, 0), width=max(1, size // 8))
            place = (found.face.left, max(0.0, found.face.top - size - 2))
        text = f"{classes[best]} {100 * values[best]:.0f} %"
        pen.text(place, text, (0, 255, 0), ImageFont.load_default(size), stroke_width=1, stroke_fill=(0, 0, 0))
    return np.asarray(image)


def annotate(found: Iterable[Found], folder: Path, classes: list[str]) -> Iterator[Found]:
    """Pass `found` on, and write each file with its faces marked to `folder`: PNG, or MP4 if it has several frames.

    Raises UserError if a video cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taken: set[str] = set()
    for file, of_file in groupby(found, lambda one: one.frame.file):
        target = folder / _free(Path(file).stem, taken)
        writer: Any = None
        first: np.ndarray | None = None
        for _, of_frame in groupby(of_file, lambda one: one.frame.number):
            faces = list(of_frame)
            frame = faces[0].frame
            if frame.pixels is not None:
                picture = drawn(frame, faces, classes)
                if first is None:
                    first = picture
                else:
                    writer = writer or _video(_anew(target.with_name(f"{target.name}.mp4")), first, frame)
                    writer.write(picture[:, :, ::-1].copy())
            yield from faces
        if writer is not None:
            writer.release()
        elif first is not None:
            Image.fromarray(first).save(_anew(target.with_name(f"{target.name}.png")))


def _anew(path: Path) -> Path:
    """The path of a file that is not there: a link is not followed."""
    path.unlink(missing_ok=True)
    return path


def _free(stem: str, taken: set[str]) -> str:
    """A name that no other file of this call has."""
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(name)
    return name


def _video(path: Path, first: np.ndarray, second: Frame) -> Any:
    import cv2

    rate = 1 / second.seconds if second.seconds else RATE
    height, width = first.shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), rate, (width, height))
    if not writer.isOpened():
        raise UserError(f"{path}: cannot be written as a video")
    writer.write(first[:, :, ::-1].copy())
    return writer
