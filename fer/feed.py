"""What a network gets of each batch: pixels, embeddings of its frozen encoder, neutral faces to compare with."""

from collections.abc import Iterator
from itertools import repeat

import numpy as np
import torch
from torch import Tensor, nn

from fer.config import RunConfig
from fer.data.augment import Change, Mixture, model_input
from fer.data.dataset import Split
from fer.data.pairs import Pairs
from fer.data.pixels import Pixels
from fer.device import autocast, index_on
from fer.models.embedding_difference import DifferenceOfEmbeddings, FrozenEncoder


class Feed:
    """The inputs of a network for one split, on its device.

    What a frozen encoder makes of images that nothing augments is computed once, here. Raises UserError where the data
    do not hold the neutral faces that the model's pairing needs.
    """

    def __init__(self, model: nn.Module, run: RunConfig, split: Split, classes: list[str], device: torch.device):
        self.run, self.split, self.device = run, split, device
        self.pixels = Pixels(split, device, run.resources)
        self.labels, self.targets = split.labels.to(device), split.targets.to(device)
        self.encoder = model if isinstance(model, FrozenEncoder) else None
        training = split.name == "train"
        self.embeddings: Tensor | None = None  # [n, F]
        if self.encoder is not None and not (training and run.augment.changes_images):
            self.embeddings = self._embed(self.encoder, np.arange(len(split)))
        self.neutral: Tensor | None = None  # [n, F]: of each image's partner
        self.pairs: Pairs | None = None
        if isinstance(model, DifferenceOfEmbeddings) and (training or model.pairing == "same_subject"):
            self.pairs = Pairs(split, classes, model.pairing)
            # neutral faces are taken as they are, so they are embedded once whatever the augmentation
            self.candidates = self.embeddings
            if self.candidates is None:
                found = self._embed(model, self.pairs.neutral)
                self.candidates = found.new_zeros(len(split), found.shape[1])
                self.candidates[self.pairs.neutral] = found
            if not training:
                self.neutral = self.candidates[self.pairs.fixed()]

    def truth(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """Labels [B] and targets [B, C] of the images at `index`, on the device."""
        here = index_on(self.device, index)
        return self.labels[here], self.targets[here]

    @property
    def needs_pixels(self) -> bool:
        return self.embeddings is None or self.encoder is None or self.encoder.needs_pixels

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
            images = model_input(pixels, self.run, change)
            inputs["pixel_values"] = mixture(images) if mixture is not None else images
        if self.neutral is not None:
            inputs["neutral"] = self.neutral[here]
        return inputs

    def choose_references(self) -> None:
        """Give a DoE network what evaluation compares with: neutral training faces, or the mean of all of them."""
        if not isinstance(self.encoder, DifferenceOfEmbeddings) or self.pairs is None or self.candidates is None:
            return
        model = self.encoder
        if model.pairing == "random_neutral":
            model.references.copy_(self.candidates[self.pairs.references(len(model.references), self.run.seed)])
        elif model.pairing == "prototype":
            model.references.copy_(self.candidates[self.pairs.neutral].mean(0, keepdim=True))

    def start_epoch(self, epoch: int) -> None:
        """Draw the neutral partners of training; a prototype is the same for all and needs none."""
        if self.pairs is not None and self.pairs.pairing != "prototype" and self.candidates is not None:
            self.neutral = self.candidates[self.pairs.drawn(self.run.seed, epoch)]

    def _embed(self, encoder: FrozenEncoder, positions: np.ndarray) -> Tensor:
        encoder.eval()
        found = []
        size = self.run.eval_batch_size
        for pixels in self.pixels.ahead([positions[first : first + size] for first in range(0, len(positions), size)]):
            with autocast(self.run.precision, self.device):
                found.append(encoder.embed(model_input(pixels, self.run)).float())
        return torch.cat(found)
