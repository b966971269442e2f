"""VGG13 of Barsoum et al. 2016 (arXiv 1608.01041, section 3): the published from-scratch baseline of FER+, 84.99 %."""

from typing import Literal

import torch
from torch import nn

from fer.input import Input
from fer.models.network import ModelKind, Network
from fer.settings import Fault, Fraction, Scale


class Vgg13(ModelKind):
    """Ten 3x3 convolutions in four pooled stages, then two hidden dense layers."""

    name: Literal["vgg13"] = "vgg13"
    width: Scale = 1.0
    """Multiplier on all channel counts; published: 1.0."""
    batch_norm: bool = False
    """Batch norm after every convolution; published: false."""
    conv_dropout: Fraction = 0.25
    """Dropout after each pooling; published: .25."""
    dense_dropout: Fraction = 0.5
    """Dropout after each hidden dense layer; published: .5."""

    def build(self, settings: Input, num_labels: int, pretrained: bool) -> "Vgg13Network":
        return Vgg13Network(self, settings, num_labels)

    def faults(self, settings: Input) -> list[Fault]:
        found = []
        if settings.image_size < 16:
            small = f"{settings.image_size} is too small: VGG13 halves it four times, so 16 at least"
            found.append(Fault("input.image_size", small))
        if round(64 * self.width) < 1:
            found.append(Fault("model.width", f"{self.width} leaves no channel"))
        return found


class Vgg13Network(Network):
    """[B, channels, image_size, image_size] -> logits [B, num_labels].

    At width 1, 64x64 grey input and 8 classes: 8,757,704 parameters (the paper says 8.75 million).
    """

    STAGES = ((64, 64), (128, 128), (256, 256, 256), (256, 256, 256))

    def __init__(self, model: Vgg13, settings: Input, num_labels: int):
        super().__init__()
        layers: list[nn.Module] = []
        width: int = settings.channels
        for stage in self.STAGES:
            for planned in stage:
                out = round(planned * model.width)
                layers += [nn.Conv2d(width, out, 3, padding=1, bias=not model.batch_norm)]
                layers += [nn.BatchNorm2d(out)] if model.batch_norm else []
                layers += [nn.ReLU(inplace=True)]
                width = out
            layers += [nn.MaxPool2d(2), nn.Dropout(model.conv_dropout)]
        self.features = nn.Sequential(*layers)
        hidden, side = round(1024 * model.width), settings.image_size // 16
        self.classifier = nn.Sequential(
            nn.Linear(width * side * side, hidden), nn.ReLU(inplace=True), nn.Dropout(model.dense_dropout),
            nn.Linear(hidden, hidden), nn.ReLU(inplace=True), nn.Dropout(model.dense_dropout),
            nn.Linear(hidden, num_labels),
        )  # fmt: skip
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, channels, image_size, image_size] -> logits [B, num_labels]."""
        return self.classifier(self.features(pixel_values).flatten(1))
