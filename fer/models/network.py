"""What every model and backbone has in common: its settings, and what training and prediction ask of the network."""

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
    """What a network is given of one split beside pixels."""

    def begin(self) -> None:
        """Once, before the first epoch of a new run: set what the network keeps of the training data."""

    def start_epoch(self, epoch: int) -> None:
        """Before each epoch of training."""

    def inputs(self, index: Tensor) -> dict[str, Tensor]:
        """Further arguments of `forward` for the images at `index` [B] of the split."""


class Network(nn.Module):
    """A model when it is built: `pixel_values` [B, channels, S, S] -> logits [B, num_labels].

    One of which an encoder never learns says so in `embeds`; what that makes of an image is then computed once where
    nothing augments it, and `forward` takes it as `embedding` [B, F].
    """

    embeds = False
    needs_pixels = True  # `forward` also when it is given the embedding

    def embed(self, pixel_values: Tensor) -> Tensor:
        """The frozen encoder's embeddings [B, F]."""
        raise NotImplementedError

    def beside(
        self, split: Split, classes: list[str], seed: int, embedded: Callable[[np.ndarray], Tensor]
    ) -> Beside | None:
        """What this network is given of a split beside pixels; `embedded(positions)`: their embeddings [n, F]."""
        return None

    def example(self, settings: Input) -> dict[str, Tensor]:
        """Arguments of `forward` for one image, to count what it costs."""
        return {"pixel_values": torch.empty(1, settings.channels, settings.image_size, settings.image_size)}


class FrozenEncoder(Network):
    """A network of which one encoder never learns: no gradient, evaluation mode, embeddings that can be kept."""

    embeds = True

    def __init__(self) -> None:
        super().__init__()
        self.frozen: list[nn.Module] = []  # registered elsewhere, under their own names

    def freeze(self, encoder: nn.Module) -> None:
        """`encoder` learns nothing from here on and stays in evaluation mode."""
        encoder.requires_grad_(False).eval()
        self.frozen.append(encoder)

    def train(self, mode: bool = True) -> "FrozenEncoder":
        super().train(mode)
        for encoder in self.frozen:
            encoder.eval()
        return self


class Backbone(Section):
    """A row of BACKBONES: a named network, of which the other keys can be changed."""

    name: str
    weights: str | None = "pretrained"
    """Where the weights come from: pretrained (the published ones), a hub id, a file or folder; null: random."""

    def build(self, size: int, channels: int) -> Any:
        """Images [B, channels, size, size] -> [B, num_features]; has `num_features` and `load_pretrained(source, key)`.

        Raises UserError when a package is missing.
        """
        raise NotImplementedError

    def faults(self, size: int) -> list[Fault]:
        """What cannot work on images of side `size`."""
        return []

    def same_network(self, other: "Backbone") -> bool:
        """Whether weights of the one fit the other."""
        return self.model_copy(update={"weights": None}) == other.model_copy(update={"weights": None})


class ModelKind(Section):
    """A row of MODELS: the options of a model, and how it is built."""

    name: str

    def build(self, settings: Input, num_labels: int, pretrained: bool) -> Network:
        """The network; `pretrained`: load the weights that its backbones name.

        Raises UserError when they cannot be loaded.
        """
        raise NotImplementedError

    def faults(self, settings: Input) -> list[Fault]:
        """Combinations that cannot work, by their paths in the run: `model.<key>` or `input.<key>`."""
        return []

    def backbones(self) -> dict[str, Backbone]:
        """Its backbones by key; that called `backbone` is what `init_from` gives weights to."""
        return {key: value for key, value in self if isinstance(value, Backbone)}

    def images_beside(self) -> Mapping[str, bool]:
        """Further images that prediction takes with each image, by name, and whether it needs them."""
        return {}
