"""What a network gets of each batch: pixels, embeddings of its frozen encoder, neutral faces to compare with."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from fer.config import RunConfig
from fer.data.augment import normalize, to_float
from fer.data.dataset import Split
from fer.data.pairs import Pairs
from fer.device import autocast
from fer.models.embedding_difference import DifferenceOfEmbeddings, FrozenEncoder


class Feed:
    """The inputs of a network for one split, on its device.

    What a frozen encoder makes of images that nothing augments is computed once, here. Raises UserError where the data
    do not hold the neutral faces that the model's pairing needs.
    """

    def __init__(self, model: nn.Module, run: RunConfig, split: Split, classes: list[str], device: torch.device):
        self.run, self.split, self.device = run, split, device
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

    def __call__(self, index: np.ndarray, augment: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        """Arguments of the network for the images at `index` of the split."""
        inputs = {}
        if self.embeddings is not None:
            inputs["embedding"] = self.embeddings[index]
        if self.embeddings is None or self.encoder is None or self.encoder.needs_pixels:
            images = to_float(self.split.pixels(index).to(self.device), self.run.image_size)
            inputs["pixel_values"] = normalize(augment(images) if augment else images, self.run)
        if self.neutral is not None:
            inputs["neutral"] = self.neutral[index]
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
        for first in range(0, len(positions), self.run.eval_batch_size):
            pixels = self.split.pixels(positions[first : first + self.run.eval_batch_size]).to(self.device)
            with autocast(self.run.precision, self.device):
                found.append(encoder.embed(normalize(to_float(pixels, self.run.image_size), self.run)).float())
        return torch.cat(found)
