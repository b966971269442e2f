"""VGG13 of Barsoum et al. 2016 (arXiv 1608.01041, section 3): the published from-scratch baseline of FER+, 84.99 %."""

import torch
from torch import nn

from fer.config import Fraction, RunConfig, Section


class Vgg13Options(Section):
    width: float  # factor on every number of channels; 1.0 is the publication
    batch_norm: bool  # after every convolution; false is the publication
    conv_dropout: Fraction  # after each pooling; publication .25
    dense_dropout: Fraction  # after each hidden dense layer; publication .5


class Vgg13(nn.Module):
    """Ten 3x3 convolutions in four pooled stages, then two hidden dense layers.

    At width 1, 64x64 grey input and 8 classes: 8,757,704 parameters (the paper says 8.75 million).
    """

    STAGES = ((64, 64), (128, 128), (256, 256, 256), (256, 256, 256))

    def __init__(self, run: RunConfig, options: Vgg13Options, num_labels: int, pretrained: bool):
        super().__init__()
        layers: list[nn.Module] = []
        width: int = run.channels
        for stage in self.STAGES:
            for planned in stage:
                out = round(planned * options.width)
                layers += [nn.Conv2d(width, out, 3, padding=1, bias=not options.batch_norm)]
                layers += [nn.BatchNorm2d(out)] if options.batch_norm else []
                layers += [nn.ReLU(inplace=True)]
                width = out
            layers += [nn.MaxPool2d(2), nn.Dropout(options.conv_dropout)]
        self.features = nn.Sequential(*layers)
        hidden, side = round(1024 * options.width), run.image_size // 16
        self.classifier = nn.Sequential(
            nn.Linear(width * side * side, hidden), nn.ReLU(inplace=True), nn.Dropout(options.dense_dropout),
            nn.Linear(hidden, hidden), nn.ReLU(inplace=True), nn.Dropout(options.dense_dropout),
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


def vgg13_faults(run: RunConfig, options: Vgg13Options) -> list[str]:
    faults = []
    if run.image_size < 16:
        faults.append(f"image_size {run.image_size} is too small: VGG13 halves it four times, so 16 at least")
    if round(64 * options.width) < 1:
        faults.append(f"options.width {options.width} leaves no channel")
    return faults
