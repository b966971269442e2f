"""`fer predict` on a made video: faces found, accuracy, frames a second, memory; beside a plain loop on the same clip.

`python -m benchmarks.video RUN --data FOLDER [--keep FILE.mp4]`: test images of the data set, one to three at a time
and enlarged to 80 to 200 pixels, move over backgrounds of clouds and shapes, 25 frames of 640x480 a second; faces and
background change every second. The plain loop reads a frame with OpenCV, finds faces with the same cascade,
resizes each with Pillow, and gives it alone to the same network.
"""

import argparse
import csv
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

from benchmarks.measure import HEAD, Effort, Row, beside, machine
from fer.data.dataset import open_data
from fer.device import autocast
from fer.errors import UserError
from fer.faces.detect import Face, build_detector
from fer.faces.predict import frames, predict
from fer.faces.smooth import matched, smooth
from fer.input import model_input
from fer.predict import Predictor
from pipelines.predicting import write

SIZE, RATE = (640, 480), 25
SPEED = 3  # pixels a frame at most


class Drawn(NamedTuple):
    """A face of the video: where, and its class."""

    face: Face
    label: int


class Seen(NamedTuple):
    """A face that was found: where, its class, and that of the smoothed probabilities."""

    face: Face
    label: int
    smoothed: int


def background(rng: np.random.Generator) -> np.ndarray:
    """uint8 [480, 640, 3]: clouds of colour, smoother than photographs are on average, and sharp shapes in them."""
    down, across = np.meshgrid(np.fft.fftfreq(SIZE[1]), np.fft.rfftfreq(SIZE[0]), indexing="ij")
    fall = np.maximum(np.hypot(down, across), 1 / max(SIZE)) ** -2
    noise = rng.normal(size=(3, *fall.shape)) + 1j * rng.normal(size=(3, *fall.shape))
    noise[1:] = 0.8 * noise[0] + 0.2 * noise[1:]  # channels of photographs are alike
    picture = np.fft.irfft2(noise * fall, s=SIZE[::-1])
    spread = picture.std((1, 2), keepdims=True)
    grey = 128 + 50 * (picture - picture.mean((1, 2), keepdims=True)) / spread
    image = Image.fromarray(grey.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
    pen = ImageDraw.Draw(image)
    for draw in (pen.rectangle, pen.ellipse) * 6:
        left, top = (int(rng.integers(-50, side)) for side in SIZE)
        colour = tuple(map(int, rng.integers(20, 236, 3)))
        draw((left, top, left + int(rng.integers(10, 200)), top + int(rng.integers(10, 200))), fill=colour)
    return np.asarray(image)


def shot(rng: np.random.Generator, faces: np.ndarray, labels: np.ndarray) -> Iterator[tuple[np.ndarray, list[Drawn]]]:
    """A second: frames uint8 [480, 640, 3], and the faces in each, which start side by side and do not meet."""
    behind, third = background(rng), SIZE[0] // 3
    sides = rng.integers(80, 200, len(faces))
    images = [Image.fromarray(face).resize((side, side), Image.Resampling.BICUBIC).convert("RGB")
              for face, side in zip(faces, sides)]  # fmt: skip
    starts = [(place * third + int(rng.integers(0, third - side + 1)), int(rng.integers(0, SIZE[1] - side + 1)))
              for place, side in enumerate(sides)]  # fmt: skip
    speeds = rng.uniform(-SPEED, SPEED, len(faces))
    for number in range(RATE):
        picture, there = Image.fromarray(behind), []
        for image, label, (left, start), speed in zip(images, labels, starts, speeds):
            top = int(np.clip(start + number * speed, 0, SIZE[1] - image.width))
            picture.paste(image, (left, top))
            there.append(Drawn(Face(left, top, image.width, image.width, 1), int(label)))
        yield np.asarray(picture), there


def make(path: Path, faces: np.ndarray, labels: np.ndarray, seconds: int) -> list[list[Drawn]]:
    """Write the video, and return the faces of each frame."""
    import cv2

    rng, truth = np.random.default_rng(1), []
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), RATE, SIZE)
    if not writer.isOpened():
        raise UserError(f"{path}: OpenCV cannot write this video")
    for _ in range(seconds):
        chosen = rng.integers(0, len(faces), rng.integers(1, 4))
        for picture, there in shot(rng, faces[chosen], labels[chosen]):
            writer.write(picture[:, :, ::-1].copy())
            truth.append(there)
    writer.release()
    return truth


def ours(predictor: Predictor, clip: Path, table: Path, min_face: float) -> dict[int, list[Seen]]:
    """`fer predict CLIP --smooth 0.5 --min-face ...`: the faces found in each frame."""
    seen: dict[int, list[Seen]] = {}
    found = smooth(predict(predictor, frames(clip), build_detector(min_face=min_face)), 0.5)
    for one in write(found, predictor.classes, table, smoothed=True):
        faces = seen.setdefault(one.frame.number, [])
        if one.face is not None and one.probabilities is not None and one.smoothed is not None:
            faces.append(Seen(one.face, int(one.probabilities.argmax()), int(one.smoothed.argmax())))
    return seen


def plain(predictor: Predictor, clip: Path, table: Path) -> int:
    """The loop as one writes it at first: frame by frame, face by face; returns the number of frames."""
    import cv2

    cascade = cv2.CascadeClassifier(f"{cv2.data.haarcascades}haarcascade_frontalface_alt2.xml")  # type: ignore[attr-defined]
    capture, count, side = cv2.VideoCapture(str(clip)), 0, predictor.faces.raw[0]
    with table.open("w", newline="") as file, torch.inference_mode():
        rows = csv.writer(file)
        while True:
            there, picture = capture.read()
            if not there:
                return count
            grey = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)
            for left, top, width, height in cascade.detectMultiScale(grey, 1.1, 3, minSize=(24, 24)):
                face = Image.fromarray(grey[top : top + height, left : left + width]).resize((side, side))
                pixels = torch.from_numpy(np.array(face))[None].to(predictor.device)
                with autocast(predictor.run.precision, predictor.device):
                    logits = predictor.model(pixel_values=model_input(pixels, predictor.run.input))
                answer = torch.softmax(logits.float() / predictor.temperature, 1)[0].tolist()
                rows.writerow([count, left, top, width, height, *answer])
            count += 1


def quality(found: dict[int, list[Seen]], truth: list[list[Drawn]]) -> str:
    """Recall of the faces, boxes that are none, accuracy of what was found, raw and smoothed."""
    hits, boxes, right, smoothed = 0, 0, 0, 0
    for number, there in enumerate(truth):
        seen = found.get(number, [])
        places = matched([one.face for one in seen], [one.face for one in there])
        pairs = [(seen[place], there[other]) for place, other in places.items()]
        hits, boxes = hits + len(pairs), boxes + len(seen)
        right += sum(one.label == true.label for one, true in pairs)
        smoothed += sum(one.smoothed == true.label for one, true in pairs)
    every = sum(map(len, truth))
    shares = (100 * part / max(1, whole) for part, whole in ((hits, every), (right, hits), (smoothed, hits)))
    recall, raw, over_time = (f"{share:.1f} %" for share in shares)
    first = f"{recall} of {every:,} faces in {len(truth):,} frames found, {boxes - hits} boxes beside them"
    return f"{first}; right of those found: {raw}, smoothed over 0.5 s: {over_time}"


def _peak() -> float:
    """MB of memory that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print what is found and how well, memory, and a row of the table of benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run or a checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="folder of the prepared data set")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--compare", type=int, default=8, help="seconds of the video of the comparison")
    parser.add_argument("--rounds", type=int, default=Effort().rounds, help="of each side of the comparison")
    parser.add_argument("--min-face", type=float, default=0, help="of fer predict; the plain loop takes 24")
    parser.add_argument("--keep", type=Path, help="where to leave the video of --seconds")
    asked = parser.parse_args()
    test, predictor = open_data(asked.data).split("test"), Predictor(asked.run)
    images, labels = test.pixels(np.arange(len(test))).numpy(), test.labels.numpy()
    with tempfile.TemporaryDirectory() as folder:
        clip, table = asked.keep or Path(folder) / "clip.mp4", Path(folder) / "table.csv"
        truth = make(clip, images, labels, asked.seconds)
        own = 100 * (predictor.probabilities(images).argmax(1) == labels).mean()
        before, start, busy = _peak(), time.perf_counter(), time.process_time()
        found = ours(predictor, clip, table, asked.min_face)
        rate, busy = len(truth) / (time.perf_counter() - start), 1000 * (time.process_time() - busy) / len(truth)
        print(machine(predictor.device))  # noqa: T201
        print(f"{quality(found, truth)} ({own:.1f} % of all test images as they are)")  # noqa: T201
        cost = f"{rate:.1f} frames/s, {busy:.0f} ms of CPU time each"
        print(f"{cost}; at most {_peak():.0f} MB of memory, {before:.0f} before")  # noqa: T201
        make(clip := Path(folder) / "short.mp4", images, labels, asked.compare)
        work = (lambda: len(ours(predictor, clip, table, asked.min_face))), (lambda: plain(predictor, clip, table))
        fast, slow = beside(Effort(seconds=0, rounds=asked.rounds), *work)
        print(f"\n{HEAD}\n{Row('video 640x480, detection and prediction', fast, 'plain loop', slow)}")  # noqa: T201


if __name__ == "__main__":
    main()
