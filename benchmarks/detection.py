"""How well `fer predict` finds faces and how much accuracy the way through the detector costs.

`python -m benchmarks.detection RUN [--yunet FILE]`: test images of the data set, enlarged to 80 to 240 pixels, are
pasted into pictures of 640x480 pixels of coloured noise; the same images are predicted as they are.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fer.data.dataset import open_data
from fer.faces.detect import Face, build_detector
from fer.faces.predict import Found, Frame, predict
from fer.faces.smooth import matched
from fer.predict import Predictor

SIZE = (640, 480)


def pasted(face: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, Face]:
    """uint8 [480, 640, 3] with the face somewhere in it, and where."""
    noise = rng.integers(0, 256, (12, 16, 3), np.uint8)
    picture = Image.fromarray(noise).resize(SIZE, Image.Resampling.BICUBIC)
    side = int(rng.integers(80, 240))
    place = int(rng.integers(0, SIZE[0] - side)), int(rng.integers(0, SIZE[1] - side))
    picture.paste(Image.fromarray(face).resize((side, side), Image.Resampling.BICUBIC).convert("RGB"), place)
    return np.asarray(picture), Face(*place, side, side, 1)


def where(found: list[Found], places: Sequence[Face]) -> tuple[dict[int, np.ndarray], int]:
    """Picture -> probabilities of the box at its face, if there is one; and the number of all other boxes."""
    boxes: dict[int, list[Found]] = {}
    for one in found:
        if one.face is not None:
            boxes.setdefault(int(one.frame.file), []).append(one)
    answers = {}
    for number, inside in boxes.items():
        for place in matched([one.face for one in inside if one.face is not None], [places[number]]):
            answer = inside[place].probabilities
            assert answer is not None
            answers[number] = answer
    return answers, sum(map(len, boxes.values())) - len(answers)


def main() -> None:
    """Print recall, accuracy with and without the detector, and pictures a second."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run or a checkpoint")
    parser.add_argument("--yunet", type=Path)
    parser.add_argument("--faces", type=int, default=600)
    parser.add_argument("--data", type=Path, default=Path("data/sets/ferplus"), help="folder of the prepared data set")
    asked = parser.parse_args()
    test = open_data(asked.data).split("test")
    rng = np.random.default_rng(1)
    chosen = rng.permutation(len(test))[: asked.faces]
    faces, labels = test.pixels(chosen).numpy(), test.labels.numpy()[chosen]
    predictor, detector = Predictor(asked.run), build_detector(asked.yunet)
    plain = predictor.probabilities(faces).argmax(1) == labels
    pictures, places = zip(*(pasted(face, rng) for face in faces))
    frames = (Frame(str(number), 0, None, picture) for number, picture in enumerate(pictures))
    start = time.perf_counter()
    found = list(predict(predictor, frames, detector))
    seconds = time.perf_counter() - start
    answers, others = where(found, places)
    right = {number: int(answer.argmax()) == labels[number] for number, answer in answers.items()}
    shares = (len(right) / len(faces), np.mean(list(right.values())), plain[list(right)].mean(), plain.mean())
    recall, through, same, every = (f"{100 * share:.1f} %" for share in shares)
    lines = (
        f"{detector.name}: {recall} of {len(faces)} faces found, {others} boxes beside them",
        f"accuracy on those found: {through} through the detector, {same} as they are ({every} on all)",
        f"{len(pictures) / seconds:.1f} pictures of {SIZE[0]}x{SIZE[1]} a second, detection and prediction",
    )
    print("\n".join(lines))  # noqa: T201


if __name__ == "__main__":
    main()
