"""The interfaces of models and backbones: their settings, and what training and prediction need of the network."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fer.data.dataset import Split
from fer.input import Input
from fer.settings import Fault, Section

RANDOM = "random weights"


class Beside(Protocol):
    """Further inputs of a network, beside pixels, for the images of one split."""

    def begin(self) -> None:
        """Called once, before the first epoch of a new run: store in the network what it keeps of the training data."""

    def start_epoch(self, epoch: int) -> None:
        """Called before each training epoch."""

    def inputs(self, index: Tensor) -> dict[str, Tensor]:
        """Further arguments of `forward` for the images at `index` [B] of the split."""


class Network(nn.Module):
    """The network of a model: `pixel_values` [B, channels, S, S] -> logits [B, num_labels].

    With `embeds` it has a frozen encoder: the encoder's output for an image is computed once if nothing augments the
    image, and `forward` takes it as `embedding` [B, F].
    """

    embeds = False
    needs_pixels = True  # in `forward`, even if given the embedding

    def embed(self, pixel_values: Tensor) -> Tensor:
        """The frozen encoder's embeddings [B, F] of images [B, channels, S, S]."""
        raise NotImplementedError

    def beside(
        self, split: Split, classes: list[str], seed: int, embedded: Callable[[np.ndarray], Tensor]
    ) -> Beside | None:
        """Its further inputs for a split, if any; `embedded(positions)` returns embeddings [n, F] of the split."""
        return None

    def example(self, settings: Input) -> dict[str, Tensor]:
        """Arguments of `forward` for one image, from which `fer.models.cost` counts operations."""
        return {"pixel_values": torch.empty(1, settings.channels, settings.image_size, settings.image_size)}


class FrozenEncoder(Network):
    """A network with a frozen encoder: no gradients, always in evaluation mode, embeddings that can be cached."""

    embeds = True

    def __init__(self) -> None:
        super().__init__()
        self.frozen: list[nn.Module] = []  # registered elsewhere, under their own names

    def freeze(self, encoder: nn.Module) -> None:
        """Stop `encoder` from learning, and keep it in evaluation mode."""
        encoder.requires_grad_(False).eval()
        self.frozen.append(encoder)

    def train(self, mode: bool = True) -> "FrozenEncoder":
        super().train(mode)
        for encoder in self.frozen:
            encoder.eval()
        return self


class Backbone(Section):
    """A row of BACKBONES: a named network, whose other keys can be changed."""

    name: str
    weights: str | None = "pretrained"
    """Initial weights: pretrained (the published ones), a hub id, a file or folder; null: random."""

    def build(self, size: int, channels: int) -> Any:
        """A module [B, channels, size, size] -> [B, num_features] with `num_features`, `load_pretrained(source, key)`.

        Raises UserError if a package is missing.
        """
        raise NotImplementedError

    def faults(self, size: int) -> list[Fault]:
        """What cannot work on images of side `size`."""
        return []

    def same_network(self, other: "Backbone") -> bool:
        """Whether the weights of one fit the other."""
        return self.model_copy(update={"weights": None}) == other.model_copy(update={"weights": None})


def too_small(size: int, least: int) -> list[Fault]:
    """The fault of images of side `size` if a network needs `least`."""
    return [Fault("", f"images of {size} px are too small: at least {least}")] if size < least else []


class ModelKind(Section):
    """A row of MODELS: the options of a model, and how it is built."""

    name: str

    def build(self, settings: Input, num_labels: int, pretrained: bool) -> Network:
        """The network; `pretrained`: load the weights that its backbones name.

        Raises UserError if they cannot be loaded.
        """
        raise NotImplementedError

    def faults(self, settings: Input) -> list[Fault]:
        """Combinations that cannot work, by their paths in the run: `model.<key>` or `input.<key>`."""
        return []

    def backbones(self) -> dict[str, Backbone]:
        """Its backbones by key; `init_from` initialises the one called `backbone`."""
        return {key: value for key, value in self if isinstance(value, Backbone)}

    def images_beside(self) -> Mapping[str, bool]:
        """Names of further images that prediction takes with each image, and whether each is required."""
        return {}
