"""Encoded images against a bare loop that decodes the same bytes in as many processes, and against an array."""

import io
import multiprocessing
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.faces import write_encoded
from benchmarks.measure import Effort, Row, Work, beside
from benchmarks.training import epochs, settings
from fer.batches import Pixels
from fer.data.dataset import DataSet, open_data
from fer.data.encoded import Encoded
from fer.resources import Resources
from fer.run import Run

SIDE = 224
SMALL = {"model.width": 0.125, "input.image_size": 48, "batch_size": 64}


def cases(device: torch.device, effort: Effort) -> Iterator[Row]:
    """With one reader and with two: reading alone, and the steps of a small network beside the same on an array."""
    with tempfile.TemporaryDirectory() as folder:
        write_encoded(Path(folder), SIDE, train=effort.small, val=8, test=8)
        data = open_data(folder)
        for readers in (1, 2):
            yield from reading(data, readers, device, effort)
            run, resources = settings("vgg13_small", device, **SMALL, **{"resources.readers": readers})
            yield from steps(data, run, resources, device, effort)


def reading(data: DataSet, readers: int, device: torch.device, effort: Effort) -> Iterator[Row]:
    """Batches of 64 of the first thousands of train, in random order, on any data set of encoded images."""
    split = data.split("train")
    order = np.random.default_rng(0).permutation(min(len(split), effort.small))
    pixels = Pixels(split, device, 0.0, readers)

    def ours() -> int:
        return sum(len(batch) for batch in pixels.ahead(np.split(order, range(64, len(order), 64))))

    with ExitStack() as stack:
        rates = beside(effort, ours, bare(split.images, split.rows[order], readers, stack))
    yield Row(f"reading, encoded {split.images.shape[1]} px, {readers} readers", rates[0], "Pillow alone", rates[1])


def steps(data: DataSet, run: Run, resources: Resources, device: torch.device, effort: Effort) -> Iterator[Row]:
    """An epoch without evaluation, of images that are decoded meanwhile and of the same as an array in memory."""
    split = data.split("train")
    array = split.images[:]
    beforehand = replace(data, images=array, splits={"train": replace(split, images=array)})
    streamed = resources.model_copy(update={"data_share": 0.0})
    rates = beside(effort, *(epochs(run, streamed, of, device) for of in (data, beforehand)))
    what = f"steps at {run.input.image_size} px, encoded {split.images.shape[1]} px, {resources.readers} readers"
    yield Row(what, rates[0], "an array in memory", rates[1])


def bare(images: object, chosen: np.ndarray, processes: int, stack: ExitStack) -> Work:
    """A loop over these pictures in several processes, or for 0 in this one, which hold their bytes."""
    assert isinstance(images, Encoded)
    contents = [images.content(int(row)) for row in chosen]
    if not processes:
        _take(contents)
        return lambda: _decode((0, 1))
    pool = stack.enter_context(multiprocessing.Pool(processes, _take, (contents,)))
    return lambda: sum(pool.map(_decode, [(first, processes) for first in range(processes)]))


def _take(contents: list[bytes]) -> None:
    _held[:] = contents


def _decode(part: tuple[int, int]) -> int:
    first, step = part
    return len([np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) for content in _held[first::step]])


_held: list[bytes] = []
