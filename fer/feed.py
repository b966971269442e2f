"""What a network gets of each batch: pixels, embeddings of its frozen encoder, and what else it asks for."""

from collections.abc import Iterator
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from fer.data.augment import Mixture
from fer.data.dataset import Split
from fer.data.pixels import Pixels
from fer.device import autocast, index_on
from fer.input import Change, model_input
from fer.models.network import Network
from fer.resources import Resources
from fer.run import Run


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
