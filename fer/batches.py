"""Which images, in which order, changed how: the arguments of the network for each batch of a split.

Every random number comes from (seed, epoch, step), so that a run that was cut has the batches of the uncut run.
"""

from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fer.data.augment import Augmenter, Mixture, draw_mixture
from fer.data.dataset import Split
from fer.device import autocast, index_on
from fer.input import Change, model_input
from fer.models.network import Network
from fer.resources import Resources
from fer.run import Run
from fer.step import Part


class TrainBatches:
    """The batches of the training split, this rank's share of each."""

    def __init__(self, feed: "Feed", run: Run, accumulate: int, rank: int, world: int):
        self.feed, self.run, self.accumulate, self.rank, self.world = feed, run, accumulate, rank, world
        self.augment = Augmenter(run.augment, feed.device)
        self.images = trained_images(run.batch_size, len(feed.split), world)  # of an epoch, of all ranks
        self.steps = max(1, len(feed.split) // run.batch_size)

    def epoch(self, epoch: int, done: int = 0) -> Iterator[tuple[list[Part], Mixture | None]]:
        """What goes into each step that is left after `done`: the parts of a batch, and how they are mixed.

        May leave the network in evaluation mode.
        """
        self.feed.start_epoch(epoch)
        plan = list(batches(self.run, self.feed.split.labels, epoch, self.rank, self.world))[done:]
        divided = [_divide(index, part, self.accumulate) for index, part in plan]
        pixels = self.feed.batches([index for parts in divided for index, _ in parts])
        return (self._step(epoch, step, parts, pixels) for step, parts in enumerate(divided, done))

    def _step(
        self, epoch: int, step: int, parts: list[tuple[np.ndarray, slice]], pixels: Iterator
    ) -> tuple[list[Part], Mixture | None]:
        """Of the images of `parts`, whose pixels come next."""
        run, here = self.run, (self.run.seed, epoch, step)
        share = sum(len(index) for index, _ in parts)
        draws = self.augment.draw(share * self.world, seed_of(*here))
        mixture = None
        if epoch < run.epochs - run.augment.unmixed_epochs:
            mixture = draw_mixture(run.augment, run.input.image_size, seed_of(*here, 1))
        fed = []
        for (index, part), (_, raw) in zip(parts, pixels):
            change = self.augment.changes(draws[part], run.input.image_size)
            fed.append(Part(self.feed(index, raw, change, mixture), *self.feed.truth(index), len(index) / share))
        return fed, mixture


def batches(run: Run, labels: Tensor, epoch: int, rank: int, world: int) -> Iterator[tuple[np.ndarray, slice]]:
    """The index of each batch's images that this rank trains on, and which part of the whole batch it is.

    `labels` [n] of the training images; balanced_sampling draws with their classes' chances, with repetition.
    """
    images = len(labels)
    generator = np.random.default_rng([run.seed, epoch])
    if run.balanced_sampling:
        chance = torch.bincount(labels)[labels].double().pow(-run.balanced_sampling)
        order = generator.choice(images, images, p=(chance / chance.sum()).numpy())
    else:
        order = generator.permutation(images)
    trained = trained_images(run.batch_size, images, world)
    size = min(run.batch_size, trained)
    share = size // world
    part = slice(rank * share, (rank + 1) * share)
    for first in range(0, trained, size):
        yield order[first : first + size][part], part


def trained_images(batch_size: int, images: int, world: int) -> int:
    """Images of one epoch: whole batches only, so that every step has the configured batch size."""
    return images - images % (batch_size if images >= batch_size else world)


def _divide(index: np.ndarray, part: slice, count: int) -> list[tuple[np.ndarray, slice]]:
    """A worker's share of a batch in `count` pieces, each with its place in the whole batch."""
    pieces = [piece for piece in np.array_split(index, count) if len(piece)]
    ends = part.start + np.cumsum([len(piece) for piece in pieces])
    return [(piece, slice(int(end) - len(piece), int(end))) for piece, end in zip(pieces, ends)]


def seed_of(*parts: int) -> int:
    """One seed of several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class Feed:
    """The inputs of a network for one split, on its device.

    What a frozen encoder makes of images that nothing augments is computed once, here. Raises UserError where the data
    do not hold what the network asks for.
    """

    def __init__(
        self,
        model: Network,
        run: Run,
        resources: Resources,
        split: Split,
        classes: list[str],
        device: torch.device,
    ):
        self.model, self.run, self.split, self.device = model, run, split, device
        self.batch_size = resources.eval_batch_size  # of what is only evaluated
        self.pixels = Pixels(split, device, resources.data_share, resources.readers)
        self.labels, self.targets = split.labels.to(device), split.targets.to(device)
        changed = split.name == "train" and run.augment.changes_images
        self.embeddings: Tensor | None = None  # [n, F]
        if model.embeds and not changed:
            self.embeddings = self._embed(np.arange(len(split)))
        self.beside = model.beside(split, classes, run.seed, self._embedded)

    def truth(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """Labels [B] and targets [B, C] of the images at `index`, on the device."""
        here = index_on(self.device, index)
        return self.labels[here], self.targets[here]

    @property
    def needs_pixels(self) -> bool:
        return self.embeddings is None or self.model.needs_pixels

    def batches(self, plan: list[np.ndarray]) -> Iterator[tuple[np.ndarray, Tensor | None]]:
        """Each index of `plan` with its pixels, uint8 [B, H, W(, 3)], which are None for a network that needs none."""
        yield from zip(plan, self.pixels.ahead(plan) if self.needs_pixels else repeat(None))

    def __call__(
        self,
        index: np.ndarray,
        pixels: Tensor | None,
        change: Change | None = None,
        mixture: Mixture | None = None,
    ) -> dict[str, Tensor]:
        """Arguments of the network for the images at `index` of the split, whose pixels `batches` gave."""
        inputs, here = {}, index_on(self.device, index)
        if self.embeddings is not None:
            inputs["embedding"] = self.embeddings[here]
        if pixels is not None:
            images = model_input(pixels, self.run.input, change)
            inputs["pixel_values"] = mixture(images) if mixture is not None else images
        return inputs if self.beside is None else inputs | self.beside.inputs(here)

    def begin(self) -> None:
        """Before the first epoch of a new run: what the network keeps of the training data."""
        if self.beside is not None:
            self.beside.begin()

    def start_epoch(self, epoch: int) -> None:
        """Before each epoch of training."""
        if self.beside is not None:
            self.beside.start_epoch(epoch)

    def _embedded(self, positions: np.ndarray) -> Tensor:
        """The frozen encoder's embeddings [n, F] of the images at `positions`, not augmented."""
        if self.embeddings is not None:
            return self.embeddings[index_on(self.device, positions)]
        return self._embed(positions)

    def _embed(self, positions: np.ndarray) -> Tensor:
        self.model.eval()
        found, size = [], self.batch_size
        for pixels in self.pixels.ahead([positions[first : first + size] for first in range(0, len(positions), size)]):
            with autocast(self.run.precision, self.device):
                found.append(self.model.embed(model_input(pixels, self.run.input)).float())
        return torch.cat(found)


class Pixels:
    """uint8 images by their index in the split.

    A GPU holds the whole split where that takes no more than `data_share` of its free memory; else `readers` processes
    read ahead from the file. A CPU reads the memory-mapped file, which the system keeps in memory.
    """

    def __init__(self, split: Split, device: torch.device, data_share: float, readers: int):
        self.split, self.device, self.readers = split, device, readers
        self.resident: Tensor | None = None
        self.streams = device.type == "cuda"
        if self.streams:
            free, _ = torch.cuda.mem_get_info(device)
            if len(split) * split.images[0].nbytes <= data_share * free:
                self._load()

    def _load(self) -> None:
        self.streams, step = False, 1024
        shape = (len(self.split), *self.split.images.shape[1:])
        self.resident = torch.empty(shape, dtype=torch.uint8, device=self.device)
        for first in range(0, len(self.split), step):
            part = np.arange(first, min(first + step, len(self.split)))
            self.resident[first : first + step] = self.split.pixels(part).to(self.device)

    def __call__(self, index: np.ndarray) -> Tensor:
        """uint8 [B, H, W] or [B, H, W, 3]."""
        if self.resident is not None:
            return self.resident[index_on(self.device, index)]
        return self.split.pixels(index).to(self.device)

    def ahead(self, batches: Sequence[np.ndarray]) -> Iterator[Tensor]:
        """Each batch in turn; while the device works on one, the next are read where they come from a file."""
        if not self.streams:
            yield from map(self, batches)
            return
        file = _File(Path(str(self.split.images.filename)), self.split.rows)  # type: ignore[attr-defined]
        loader = DataLoader(
            file,
            sampler=batches,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=self.readers,
            prefetch_factor=4 if self.readers else None,
            pin_memory=self.device.type == "cuda",
        )
        for pixels in loader:
            yield pixels.to(self.device, non_blocking=True)


class _File(Dataset):
    """Opened anew in each reader: a memory map does not travel."""

    def __init__(self, path: Path, rows: np.ndarray):
        self.path, self.rows = path, rows
        self.images: np.ndarray | None = None

    def __getitem__(self, index: np.ndarray) -> Tensor:
        if self.images is None:
            self.images = np.load(self.path, mmap_mode="r")
        return torch.from_numpy(self.images[self.rows[index]])
