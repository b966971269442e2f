"""The sample data set: drawn faces with simulated voters, written in the file format of FER+."""

import csv
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFilter

from fer.data.labels import CLASSES, VOTE_COLUMNS
from fer.data.readers.fer2013 import SIDE
from fer.data.readers.ferplus import VOTES_CSV

VOTERS = 10
CLEAR_VOTES = 6  # out of ten: a winner under every vote rule and for the class prior
CLEAR_IMAGES = 2  # per class and split get that many votes, so that no class is missing from a small sample
NO_EMOTION_CHANCE = (0.015, 0.005)  # probability of a vote for unknown, for NF
COPIES = 100  # one image in this many is replaced by a copy of a training image, as happens in FER2013

FREQUENCIES = (0.33, 0.27, 0.13, 0.12, 0.07, 0.02, 0.04, 0.02)  # about those of FER+, with the rare classes less rare
# Mean votes on an image of each class: `labels.class_prior` of the published fer2013new.csv, rounded.
CONFUSION = (
    (0.777, 0.033, 0.017, 0.114, 0.026, 0.007, 0.004, 0.021),
    (0.043, 0.918, 0.023, 0.005, 0.004, 0.002, 0.002, 0.004),
    (0.058, 0.036, 0.787, 0.010, 0.014, 0.003, 0.089, 0.002),
    (0.170, 0.013, 0.009, 0.748, 0.023, 0.011, 0.016, 0.010),
    (0.075, 0.025, 0.060, 0.032, 0.741, 0.035, 0.023, 0.009),
    (0.090, 0.017, 0.017, 0.089, 0.125, 0.621, 0.008, 0.034),
    (0.043, 0.012, 0.169, 0.073, 0.027, 0.013, 0.659, 0.004),
    (0.148, 0.022, 0.010, 0.043, 0.034, 0.060, 0.006, 0.678),
)

FEATURES = (
    "brow_raise", "brow_inner", "brow_skew", "eye_open", "squint", "mouth_width", "mouth_curve",
    "mouth_open", "mouth_skew", "teeth", "nose_wrinkle", "cheek_line",
)  # fmt: skip
# Change of each feature at full intensity. Positive: brow raised, inner end up, one side up; mouth corners up, one up.
EXPRESSIONS = {
    "neutral":   (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "happiness": (0.1, 0.0, 0.0, -0.2, 0.7, 0.4, 1.0, 0.45, 0.0, 1.0, 0.0, 1.0),
    "surprise":  (1.0, 0.0, 0.0, 0.7, 0.0, -0.4, 0.0, 1.2, 0.0, 0.0, 0.0, 0.0),
    "sadness":   (0.1, 1.0, 0.0, -0.35, 0.0, -0.1, -0.9, 0.0, 0.0, 0.0, 0.0, 0.2),
    "anger":     (-0.6, -1.1, 0.0, -0.1, 0.3, 0.0, -0.4, 0.3, 0.0, 1.0, 0.2, 0.2),
    "disgust":   (-0.5, -0.5, 0.0, -0.5, 0.7, -0.1, -0.9, 0.5, 0.15, 0.3, 1.0, 0.8),
    "fear":      (0.8, 0.9, 0.0, 0.7, 0.0, 0.2, -0.6, 0.7, 0.0, 0.4, 0.0, 0.0),
    "contempt":  (0.0, -0.2, 1.0, -0.3, 0.2, 0.0, 0.1, 0.0, 1.2, 0.0, 0.0, 0.3),
}  # fmt: skip
JITTER = 0.13  # standard deviation of every feature: no two people look alike

_ZOOM = 4  # faces are drawn at this multiple of the final size, then averaged
_FER2013_EMOTIONS = (6, 3, 5, 4, 0, 1, 2, 6)  # the class numbers of fer2013.csv, which has no contempt
_USAGES = ("Training", "PublicTest", "PrivateTest")
_DECIMALS = [str(value) for value in range(256)]


def write_sample(folder: Path, train: int, val: int, test: int, seed: int) -> None:
    """Write fer2013.csv and fer2013new.csv with `train` + `val` + `test` drawn faces; the same bytes for the same seed.

    Every split contains every class, so each needs at least 24 images. One image in a hundred is a pixel-identical copy
    of a training image, with votes of its own.
    """
    rng = np.random.default_rng(seed)
    counts = (train, val, test)
    classes = [_true_classes(rng, count) for count in counts]
    votes = np.concatenate([_votes(rng, split) for split in classes])
    images = [np.stack([draw_face(rng, CLASSES[label]) for label in split]) for split in classes]
    for split in range(len(counts)):
        _copy_faces(rng, images[0], classes[0], images[split], classes[split])
    usages = np.repeat(_USAGES, counts)
    _write_images(folder / "fer2013.csv", np.concatenate(images), np.concatenate(classes), usages)
    _write_votes(folder / VOTES_CSV, votes, usages)


def draw_face(rng: np.random.Generator, expression: str) -> np.ndarray:
    """A cartoon face, uint8 [48, 48]; `rng` decides person, pose, light and intensity of the expression."""
    change = np.array(EXPRESSIONS[expression]) * rng.uniform(0.4, 1.0)
    look = dict(zip(FEATURES, change + rng.normal(0, JITTER, len(FEATURES))))
    background, skin = rng.uniform(20, 235), rng.uniform(95, 225)
    ink = skin * rng.uniform(0.1, 0.35)
    face = _Canvas(rng, background)
    _head(face, rng, skin, ink)
    _eyes(face, look, rng, skin, ink)
    _nose(face, look, skin, ink)
    _mouth(face, look, rng.uniform(0.1, 0.5) * skin, ink)
    if rng.random() < 0.2:
        _glasses(face, ink * 0.7)
    return _photograph(face.image, rng)


class _Canvas:
    """A picture in face coordinates: x to the right, y down, the head from about -0.8 to 0.8 and from -1 to 1."""

    def __init__(self, rng: np.random.Generator, background: float) -> None:
        side = SIDE * _ZOOM
        self.image = Image.new("L", (side, side), int(background))
        self.draw = ImageDraw.Draw(self.image)
        self.pen = rng.uniform(0.8, 1.5) * _ZOOM  # pixels
        angle, scale = rng.normal(0, 0.13), rng.uniform(0.37, 0.48) * side
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        self.matrix = scale * np.diag([rng.uniform(0.9, 1.1), 1.0]) @ turn
        self.centre = side * (0.5 + rng.normal(0, 0.03, 2))

    def _place(self, x: ArrayLike, y: ArrayLike) -> list[tuple[float, float]]:
        return [(px, py) for px, py in (np.stack([x, y], axis=1) @ self.matrix + self.centre).tolist()]

    def area(self, x: ArrayLike, y: ArrayLike, tone: float) -> None:
        self.draw.polygon(self._place(x, y), fill=_grey(tone))

    def line(self, x: ArrayLike, y: ArrayLike, tone: float, width: float = 1.0) -> None:
        self.draw.line(self._place(x, y), fill=_grey(tone), width=max(1, round(width * self.pen)), joint="curve")


def _grey(tone: float) -> int:
    return int(min(max(tone, 0), 255))


_CIRCLE = np.linspace(0, 2 * np.pi, 24, endpoint=False)
_SPAN = np.linspace(-1, 1, 11)


def _ellipse(x: float, y: float, width: float, height: float) -> tuple[np.ndarray, np.ndarray]:
    return x + width * np.cos(_CIRCLE), y + height * np.sin(_CIRCLE)


def _head(face: _Canvas, rng: np.random.Generator, skin: float, ink: float) -> None:
    hair = rng.uniform(10, 200)
    width = rng.uniform(0.68, 0.82)
    long_hair = rng.random() < 0.35
    if long_hair:
        face.area(*_ellipse(0, 0.1, width + 0.17, 1.15), hair)
    face.area(*_ellipse(0, 0, width, 1), skin)
    if long_hair or rng.random() < 0.6:
        line = rng.uniform(0.62, 0.78)  # where the hair ends on the forehead
        crown = np.linspace(np.arcsin(line), np.pi - np.arcsin(line), 16)
        x = (width + 0.05) * np.cos(crown)
        face.area(
            np.concatenate([x, x[::-1]]),
            -np.concatenate([1.05 * np.sin(crown), line - 0.1 * np.cos(5 * x[::-1])]),
            hair,
        )
    else:
        face.line(*_ellipse(0, 0, width, 1), (skin + ink) / 2, 0.5)


def _eyes(face: _Canvas, look: dict[str, float], rng: np.random.Generator, skin: float, ink: float) -> None:
    apart, level = rng.uniform(0.29, 0.35), -0.2
    height = 0.1 * max(0.25, 1 + look["eye_open"])
    gaze = rng.normal(0, 0.02)
    brow_width = rng.uniform(1.0, 2.2)
    for side in (-1, 1):
        x = side * apart
        below = height * (1 - 0.75 * min(max(look["squint"], 0), 1))
        outline = level - height * (1 - _SPAN**2), level + below * (1 - _SPAN**2)
        across = x + 0.155 * _SPAN
        face.area(
            np.concatenate([across, across[::-1]]), np.concatenate([outline[0], outline[1][::-1]]), skin * 0.4 + 150
        )
        face.area(*_ellipse(x + gaze, level + (below - height) / 2, 0.06, min(0.075, (height + below) / 2)), ink * 0.5)
        face.line(across, outline[0], ink, 1.0)
        face.line(across, outline[1], (ink + skin) / 2, 0.5)
        inwards = -side * _SPAN  # -1 at the outer end of the brow, 1 at the inner end
        raised = 0.13 * look["brow_raise"] + 0.09 * look["brow_inner"] * inwards + 0.13 * side * look["brow_skew"]
        face.line(x + 0.2 * _SPAN, level - 0.2 - raised - 0.05 * (1 - _SPAN**2), ink, brow_width)


def _nose(face: _Canvas, look: dict[str, float], skin: float, ink: float) -> None:
    shade = (skin * 2 + ink) / 3
    face.line([0.03, -0.09, 0.0, 0.09], [-0.12, 0.2, 0.24, 0.2], shade, 0.8)
    wrinkle = min(max(look["nose_wrinkle"], 0), 1)
    if wrinkle > 0.3:
        for y in (-0.18, -0.09, 0.0):
            face.line([-0.11, 0.0, 0.11], [y - 0.05, y + 0.03, y - 0.05], skin + (ink - skin) * wrinkle, 0.7)
    fold = min(max(look["cheek_line"], 0), 1)
    if fold > 0.3:
        for side in (-1, 1):
            x = side * np.array([0.14, 0.3, 0.4])
            face.line(x, [0.15, 0.28, 0.5], skin + (ink - skin) * 0.7 * fold, 0.7)


def _mouth(face: _Canvas, look: dict[str, float], inside: float, ink: float) -> None:
    half = 0.27 * (1 + look["mouth_width"])
    opening = 0.24 * max(look["mouth_open"], 0)
    x = half * _SPAN
    bend = 0.13 * look["mouth_curve"] * (1 - 2 * _SPAN**2) - 0.16 * look["mouth_skew"] * np.maximum(_SPAN, 0) ** 2
    upper = 0.5 + bend - 0.35 * opening * (1 - _SPAN**4)
    lower = 0.5 + bend + opening * (1 - _SPAN**4)
    around = np.concatenate([x, x[::-1]])
    if opening > 0.03:
        face.area(around, np.concatenate([upper, lower[::-1]]), inside)
        if look["teeth"] > 0.3:
            depth = min(look["teeth"], 1) * 0.75
            face.area(around, np.concatenate([upper, (upper + depth * (lower - upper))[::-1]]), 245)
    face.line(x, upper, ink, 1.3)
    face.line(x, lower, ink, 1.3)


def _glasses(face: _Canvas, tone: float) -> None:
    for side in (-1, 1):
        x, y = _ellipse(side * 0.32, -0.18, 0.23, 0.2)
        face.line(np.append(x, x[0]), np.append(y, y[0]), tone, 0.8)
    face.line([-0.09, 0.09], [-0.2, -0.2], tone, 0.8)


def _photograph(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Shrink to 48x48, blur, light from one side, add noise."""
    small = image.reduce(_ZOOM).filter(ImageFilter.GaussianBlur(rng.uniform(0.0, 0.8)))
    slope = rng.normal(0, 0.2, 2)
    ramp = np.linspace(-1, 1, SIDE)
    light = rng.uniform(0.75, 1.15) * (1 + slope[0] * ramp[:, None] + slope[1] * ramp)
    noise = rng.normal(0, rng.uniform(2, 14), (SIDE, SIDE))
    return np.clip(np.asarray(small) * light + noise, 0, 255).astype(np.uint8)


def _true_classes(rng: np.random.Generator, count: int) -> np.ndarray:
    """`count` class indices in random order: three of each class, the rest by FREQUENCIES."""
    floor = np.tile(np.arange(len(CLASSES)), CLEAR_IMAGES + 1)
    rest = rng.choice(len(CLASSES), count - len(floor), p=np.array(FREQUENCIES) / sum(FREQUENCIES))
    return rng.permutation(np.concatenate([floor, rest]))


def _votes(rng: np.random.Generator, classes: np.ndarray) -> np.ndarray:
    """Ten votes per image, int64 [N, 10]; votes on the first images of each class are redrawn until they are clear."""
    chances = np.array(CONFUSION)
    chances *= (1 - sum(NO_EMOTION_CHANCE)) / chances.sum(axis=1, keepdims=True)
    chances = np.concatenate([chances, np.tile(NO_EMOTION_CHANCE, (len(CLASSES), 1))], axis=1)
    votes = rng.multinomial(VOTERS, chances[classes])
    for label in range(len(CLASSES)):
        for row in np.flatnonzero(classes == label)[:CLEAR_IMAGES]:
            while votes[row, label] < CLEAR_VOTES:
                votes[row] = rng.multinomial(VOTERS, chances[label])
    return votes


def _copy_faces(
    rng: np.random.Generator, sources: np.ndarray, labels: np.ndarray, images: np.ndarray, classes: np.ndarray
) -> None:
    """Replace one image in COPIES, at least one, with a training image of the same class; in place."""
    for row in rng.choice(len(images), max(1, len(images) // COPIES), replace=False):
        same = np.flatnonzero(labels == classes[row])
        others = same[same != row] if images is sources else same
        images[row] = sources[rng.choice(others)]


def _write_images(file: Path, images: np.ndarray, classes: np.ndarray, usages: Iterable[str]) -> None:
    with file.open("w", newline="\n") as stream:
        stream.write("emotion,pixels,Usage\n")
        for image, label, usage in zip(images, classes, usages):
            pixels = " ".join([_DECIMALS[value] for value in image.ravel().tolist()])
            stream.write(f"{_FER2013_EMOTIONS[label]},{pixels},{usage}\n")


def _write_votes(file: Path, votes: np.ndarray, usages: Iterable[str]) -> None:
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["Usage", "Image name", *VOTE_COLUMNS])
        for row, (usage, counts) in enumerate(zip(usages, votes.tolist())):
            writer.writerow([usage, f"fer{row:07d}.png", *counts])
