"""Encoded images against a bare loop that decodes the same bytes in as many processes, and does nothing else."""

import io
import multiprocessing
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.faces import write_encoded
from benchmarks.measure import Effort, Row, Work, beside
from benchmarks.training import ready, settings
from fer.batches import Pixels
from fer.data.dataset import DataSet, open_data
from fer.data.encoded import Encoded
from fer.resources import Resources
from fer.run import Run

SIDE = 224
LITTLE = {
    "model.width": 0.03125, "input.image_size": 32, "batch_size": 64, "augment.rotation": 0, "augment.translation": 0,
    "augment.scale": 0, "augment.brightness": 0, "augment.contrast": 0,
}  # fmt: skip


def cases(device: torch.device, effort: Effort) -> Iterator[Row]:
    """With one reader and with two: reading ahead alone, and the steps of a network that costs next to nothing."""
    with tempfile.TemporaryDirectory() as folder:
        write_encoded(Path(folder), SIDE, train=effort.small, val=8, test=8)
        for readers in (1, 2):
            run, resources = settings("vgg13_small", device, **LITTLE, **{"resources.readers": readers})
            yield from rows(open_data(folder), run, resources, device, effort)


def rows(data: DataSet, run: Run, resources: Resources, device: torch.device, effort: Effort) -> Iterator[Row]:
    """The same on any data set of encoded images, of which the first thousands of train are read."""
    split = data.split("train")
    order = np.random.default_rng(run.seed).permutation(min(len(split), effort.small))
    plan = np.split(order[: len(order) // run.batch_size * run.batch_size], len(order) // run.batch_size)
    resources = resources.model_copy(update={"data_share": 0.0})
    pixels = Pixels(split, device, resources.data_share, resources.readers)
    stepper, whole, loss = ready(run, resources, data, device)

    def read() -> int:
        return sum(len(batch) for batch in pixels.ahead(plan))

    def steps() -> int:
        seen = 0
        for step, (parts, mixture) in enumerate(whole.epoch(0)):
            stepper.network.train()
            stepper(parts, loss, mixture, 1e-4, step)
            seen += run.batch_size
            if seen >= len(order):
                break
        return seen

    with ExitStack() as stack:
        count, plain = resources.readers, bare(split.images, split.rows[order], resources.readers, stack)
        for what, work in (("reading", read), ("steps, vgg13 of 1/32 width", steps)):
            rate, bound = beside(effort, work, plain)
            yield Row(
                f"{what}, encoded {split.images.shape[1]} px, {count} readers", rate, "Pillow alone, as many", bound
            )


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
