"""Stage faces: where each photograph shows a face -> faces/boxes.csv. Off for sets of cropped faces (`data.faces`)."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fer.data.boxes import Seen, write_boxes
from fer.data.datasets import DATASETS
from fer.data.decode import around
from fer.data.found import Entry, look
from fer.data.picture_files import AT_ONCE, Pictures, upright
from fer.errors import UserError
from fer.files import new_folder
from pipelines.data_sets import Data, Prepared
from pipelines.stages import fetch, run


def faces(one: Prepared) -> None:
    """Write boxes.csv, a row for each picture that comes without a box: its largest face, empty if none is found.

    As the first stage it also fills an empty folder. Without `data.faces` the table has no rows. Raises UserError if
    OpenCV or its weights are missing, a picture cannot be read, or the data set is not one of pictures.
    """
    data = one.recipe.data
    fetch.ensure(one.path, data)
    finder = None if data.faces is None else Finder(data.faces, data.faces_margin)
    seen = [] if finder is None else list(_seen(one.path, data, finder))
    with new_folder(one.folder / "faces") as folder:
        write_boxes(folder, seen, {} if finder is None else {"detector": finder.name, "margin": finder.margin})


def _seen(path: Path, data: Data, finder: "Finder") -> Iterator[Seen]:
    with look(path) as found:
        pictures = DATASETS[data.dataset].read(found, data.wanted()).images
        if not isinstance(pictures, Pictures):
            raise UserError(f"data.faces: {data.dataset} is of cropped faces; remove it")
        wanted = [entry for entry, box in zip(pictures.entries, pictures.boxes) if box is None]
        yield from tqdm(looked_at(wanted, finder), total=len(wanted), desc="faces", unit=" images", disable=None)


def looked_at(wanted: list[Entry], finder: "Finder") -> Iterator[Seen]:
    """What `finder` sees in each picture, in order, in as many threads as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, len(wanted), AT_ONCE):
            part = wanted[first : first + AT_ONCE]
            contents = [entry.read() for entry in part]  # in this thread, as archives are read by one at a time
            yield from pool.map(finder, part, contents)


class Finder:
    """Finds the largest face of a picture; with a detector for each thread, as they keep a state.

    `detector`: haar, the path of YuNet's file, or hub. Raises UserError if that or OpenCV is missing.
    """

    def __init__(self, detector: str, margin: float | None):
        from fer.faces.detect import build_detector

        self.build = partial(build_detector, None if detector == "haar" else Path(detector))
        first = self.build()
        self.name, self.margin = first.name, margin or first.margin
        self.own = threading.local()

    def __call__(self, entry: Entry, content: bytes) -> Seen:
        if not hasattr(self.own, "detector"):
            self.own.detector = self.build()
        found = self.own.detector(np.asarray(upright(entry, content, "RGB")))
        if not found:
            return Seen(entry.name)
        left, top, right, bottom = around(found[0].box, self.margin)
        return Seen(entry.name, left, top, right, bottom, round(found[0].score, 3), len(found))


if __name__ == "__main__":
    run(faces)
