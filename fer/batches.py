"""The arguments of the network for each batch of a split: which images, in which order, augmented how.

Every random number is derived from (seed, epoch, step), so that a resumed run has the batches of the uninterrupted one.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fer.data.augment import Augmenter, Mixture, draw_mixture
from fer.data.dataset import Split
from fer.data.encoded import Encoded
from fer.data.images import Images, open_images
from fer.device import autocast, index_on
from fer.errors import UserError
from fer.input import Change, model_input
from fer.models.network import Network
from fer.resources import Resources
from fer.run import Run
from fer.step import Part


class TrainBatches:
    """This rank's share of the training batches. `accumulate`: parts of each share."""

    def __init__(self, feed: "Feed", run: Run, accumulate: int, rank: int, world: int):
        self.feed, self.run, self.accumulate, self.rank, self.world = feed, run, accumulate, rank, world
        self.augment = Augmenter(run.augment, feed.device)
        self.images = trained_images(run.batch_size, len(feed.split), world)  # per epoch, over all ranks
        self.steps = max(1, len(feed.split) // run.batch_size)

    def epoch(self, epoch: int, done: int = 0) -> Iterator[tuple[list[Part], Mixture | None]]:
        """For each step of `epoch` after the first `done`: the parts of the batch, and how its images are mixed.

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
        """The step of the images in `parts`, whose pixels are next in `pixels`."""
        run, here = self.run, (self.run.seed, epoch, step)
        share = sum(len(index) for index, _ in parts)
        draws = self.augment.draw(share * self.world, seed_of(*here))
        mixture = None
        if epoch < run.epochs - run.unmixed_epochs:
            mixture = draw_mixture(run.augment, run.input.image_size, seed_of(*here, 1))
        fed = []
        for (index, part), (_, raw) in zip(parts, pixels):
            change = self.augment.changes(draws[part], run.input.image_size)
            fed.append(Part(self.feed(index, raw, change, mixture), *self.feed.truth(index), len(index) / share))
        return fed, mixture


def batches(run: Run, labels: Tensor, epoch: int, rank: int, world: int) -> Iterator[tuple[np.ndarray, slice]]:
    """For each batch, the indices of this rank's images, and their place in the whole batch.

    `labels`: [n], of the training images. With balanced_sampling images are drawn with replacement, else shuffled.
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
    """Images of an epoch over all ranks: whole batches only, so that every step has the configured batch size."""
    return images - images % (batch_size if images >= batch_size else world)


def _divide(index: np.ndarray, part: slice, count: int) -> list[tuple[np.ndarray, slice]]:
    """A worker's share of a batch in `count` parts, each with its place in the whole batch."""
    pieces = [piece for piece in np.array_split(index, count) if len(piece)]
    ends = part.start + np.cumsum([len(piece) for piece in pieces])
    return [(piece, slice(int(end) - len(piece), int(end))) for piece, end in zip(pieces, ends)]


def seed_of(*parts: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class Feed:
    """The inputs of a network for one split, on its device.

    The embeddings of a frozen encoder are computed once, here, if nothing augments the images. Raises UserError if the
    data lack what the network needs.
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
        self.batch_size = resources.eval_batch_size  # in evaluation
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
        """Whether the network is given images, not just embeddings."""
        return self.embeddings is None or self.model.needs_pixels

    def batches(self, plan: list[np.ndarray]) -> Iterator[tuple[np.ndarray, Tensor | None]]:
        """Each index in `plan` with its pixels, uint8 [B, H, W(, 3)], or None if the network needs no pixels."""
        yield from zip(plan, self.pixels.ahead(plan) if self.needs_pixels else repeat(None))

    def __call__(
        self,
        index: np.ndarray,
        pixels: Tensor | None,
        change: Change | None = None,
        mixture: Mixture | None = None,
    ) -> dict[str, Tensor]:
        """Arguments of the network for the images at `index` of the split, given the `pixels` from `batches`."""
        inputs, here = {}, index_on(self.device, index)
        if self.embeddings is not None:
            inputs["embedding"] = self.embeddings[here]
        if pixels is not None:
            images = model_input(pixels, self.run.input, change)
            inputs["pixel_values"] = mixture(images) if mixture is not None else images
        return inputs if self.beside is None else inputs | self.beside.inputs(here)

    def begin(self) -> None:
        """Before the first epoch of a new run: let the network store what it keeps of the training data."""
        if self.beside is not None:
            self.beside.begin()

    def start_epoch(self, epoch: int) -> None:
        """To be called before each training epoch."""
        if self.beside is not None:
            self.beside.start_epoch(epoch)

    def _embedded(self, positions: np.ndarray) -> Tensor:
        """The frozen encoder's embeddings [n, F] of the unaugmented images at `positions`."""
        if self.embeddings is not None:
            return self.embeddings[index_on(self.device, positions)]
        return self._embed(positions)

    def _embed(self, positions: np.ndarray) -> Tensor:
        self.model.eval()
        found, size = [], self.batch_size
        for pixels in self.pixels.ahead([positions[first : first + size] for first in range(0, len(positions), size)]):
            images = model_input(pixels, self.run.input)
            with autocast(self.run.precision, self.device):
                found.append(self.model.embed(images).float())
        return torch.cat(found)


class Pixels:
    """uint8 images by their index in the split.

    A GPU holds the whole split if that takes no more than `data_share` of its free memory; otherwise `readers`
    processes prefetch from the file. A CPU reads the memory-mapped file, which the system caches. Encoded images are
    decoded there by as many threads: to hand images from process to process takes half as long as to decode them.
    """

    def __init__(self, split: Split, device: torch.device, data_share: float, readers: int):
        self.split, self.device, self.readers = split, device, readers
        self.resident: Tensor | None = None
        self.streams = device.type == "cuda"
        self.decodes = not self.streams and isinstance(split.images, Encoded) and readers > 0
        if self.streams:
            free, _ = torch.cuda.mem_get_info(device)
            if len(split) * int(np.prod(split.images.shape[1:])) <= data_share * free:
                self.load()

    def load(self) -> None:
        """Keep the whole split on the device from here on."""
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
        """Each batch in turn; a streamed split is prefetched while the device works."""
        if self.decodes:
            yield from self._decoded(batches)
            return
        if not self.streams:
            yield from map(self, batches)
            return
        file = _File(Path(str(self.split.images.filename)), self.split.rows)  # type: ignore[union-attr]
        loader = DataLoader(
            file,
            sampler=batches,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=self.readers,
            prefetch_factor=2 if self.readers else None,
            pin_memory=self.device.type == "cuda",
        )
        for pixels in loader:
            if isinstance(pixels, str):
                raise UserError(pixels)
            yield pixels.to(self.device, non_blocking=True)

    def _decoded(self, batches: Sequence[np.ndarray]) -> Iterator[Tensor]:
        """Each batch in turn, decoded by a thread while the network works."""
        images, rows = self.split.images, self.split.rows
        assert isinstance(images, Encoded)
        pool, waiting = ThreadPoolExecutor(self.readers), deque[Future[np.ndarray]]()
        try:
            for index in batches:
                waiting.append(pool.submit(images.read, rows[index]))
                if len(waiting) > 2 * self.readers:
                    yield torch.from_numpy(waiting.popleft().result())
            while waiting:
                yield torch.from_numpy(waiting.popleft().result())
        finally:
            pool.shutdown(cancel_futures=True)


class _File(Dataset):
    """The image file, opened in each reader process, since a memory map cannot be sent there."""

    def __init__(self, path: Path, rows: np.ndarray):
        self.path, self.rows = path, rows
        self.images: Images | None = None

    def __getitem__(self, index: np.ndarray) -> Tensor | str:
        """The images, or what is wrong with them: an exception would arrive with its traceback as its message."""
        try:
            if self.images is None:
                self.images = open_images(self.path, "upscale")
            images, rows = self.images, self.rows[index]
            return torch.from_numpy(images.read(rows) if isinstance(images, Encoded) else images[rows])
        except UserError as error:
            return str(error)
