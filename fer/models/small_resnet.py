"""A residual network for small faces: the best accuracy for the compute of a CPU among the forms that we tried."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fer.input import Input
from fer.models.network import Backbone, ModelKind, Network, too_small
from fer.settings import Channels, Depth, Fault, Fraction, Natural
from fer.weights import load_strictly, read_tensors


class SmallResnet(ModelKind):
    """Residual blocks (He et al. 2016, arXiv 1512.03385) with squeeze and excitation (Hu et al. 2018, 1709.01507).

    Each stage halves the side and, from the second on, doubles the channels.
    """

    name: Literal["small_resnet"] = "small_resnet"
    width: Channels = 48
    """Channels of the stem and of the first stage; multiples of 16 are fastest."""
    blocks: Annotated[list[Depth], Field(min_length=1)] = [1, 2, 2]
    """Residual blocks of each stage."""
    reduction: Natural = 4
    """Channels of a block for each hidden unit of its squeeze-and-excitation; 0: without it."""
    dropout: Fraction = 0.0
    """Before the last layer."""

    def build(self, settings: Input, num_labels: int, pretrained: bool) -> "SmallResnetNetwork":
        form = self.width, self.blocks, self.reduction
        return SmallResnetNetwork(*form, settings.channels, num_labels, self.dropout)

    def faults(self, settings: Input) -> list[Fault]:
        return [
            *(fault.under("input.image_size") for fault in too_small(settings.image_size, 2 ** len(self.blocks))),
            *_no_gate(self.width, self.reduction, "model.reduction"),
        ]


class SmallResnetBackbone(Backbone):
    """The same network without its last layer, for models in parts."""

    name: Literal["small_resnet"] = "small_resnet"
    weights: str | None = None
    """Initial weights: a file, such as that of a checkpoint of the model small_resnet; null: random."""
    width: Channels = 48
    """Channels of the stem and of the first stage; multiples of 16 are fastest."""
    blocks: Annotated[list[Depth], Field(min_length=1)] = [1, 2, 2]
    """Residual blocks of each stage."""
    reduction: Natural = 4
    """Channels of a block for each hidden unit of its squeeze-and-excitation; 0: without it."""

    def build(self, size: int, channels: int) -> "SmallResnetNetwork":
        return SmallResnetNetwork(self.width, self.blocks, self.reduction, channels, None)

    def faults(self, size: int) -> list[Fault]:
        return [*too_small(size, 2 ** len(self.blocks)), *_no_gate(self.width, self.reduction, "reduction")]


def _no_gate(width: int, reduction: int, key: str) -> list[Fault]:
    return [Fault(key, f"{reduction} leaves no hidden unit of {width} channels")] if reduction > width else []


class SmallResnetNetwork(Network):
    """[B, channels, S, S] -> logits [B, num_labels], or embeddings [B, num_features] without `num_labels`.

    With the default settings, grey 48x48 input and 8 classes: 1.57 million parameters, 0.22 GFLOP per image.
    """

    def __init__(
        self,
        width: int,
        blocks: list[int],
        reduction: int,
        channels: int,
        num_labels: int | None,
        dropout: float = 0.0,
    ):
        super().__init__()
        layers: list[nn.Module] = [_conv(channels, width, 1), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
        for stage, count in enumerate(blocks):
            after = width * 2**stage
            for block in range(count):
                layers.append(_Block(before, after, stride=1 if block else 2, reduction=reduction))
                before = after
        self.num_features = before
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.classifier: nn.Module = nn.Identity() if num_labels is None else nn.Linear(before, num_labels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def load_pretrained(self, source: str, key: str) -> None:
        """Load all but the last layer from file `source`. Raises UserError naming `key` if the weights do not fit."""
        load_strictly(self, read_tensors(source, key), f"{key}: {source}", optional=("classifier.",))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, channels, S, S] -> logits [B, num_labels] or embeddings [B, num_features]."""
        return self.classifier(self.dropout(self.features(pixel_values).mean((2, 3))))


def _conv(channels: int, out: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)


class _Block(nn.Module):
    """Two 3x3 convolutions, squeeze-and-excitation, and a skip connection (1x1 where the shape changes)."""

    def __init__(self, channels: int, out: int, stride: int, reduction: int):
        super().__init__()
        self.body = nn.Sequential(
            _conv(channels, out, stride), nn.BatchNorm2d(out), nn.ReLU(),
            _conv(out, out, 1), nn.BatchNorm2d(out),
        )  # fmt: skip
        hidden = out // reduction if reduction else 0
        self.gate = nn.Sequential(nn.Linear(out, hidden), nn.ReLU(), nn.Linear(hidden, out)) if hidden else None
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or channels != out:
            self.skip = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        found = self.body(x)
        if self.gate is not None:
            found = found * torch.sigmoid(self.gate(found.mean((2, 3))))[..., None, None]
        return torch.relu(found + self.skip(x))
