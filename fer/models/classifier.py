"""Image classifier in parts: [spatial transformer] -> [resizer] -> backbone -> head.

With all parts this is the Neural Resizer for vision transformers (arXiv 2204.02181).
"""

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fer.config import Fraction, Positive, RunConfig, Section
from fer.models.backbones import BackboneOptions, backbone_faults, build_backbone
from fer.models.resizer import Resizer
from fer.models.stn import SMALLEST, SpatialTransformer


class ClassifierOptions(Section):
    stn: bool  # spatial transformer
    resizer: Literal["none", "bilinear", "neural"]  # none: the backbone sees image_size
    resizer_size: Positive  # pixels: side of what the backbone sees
    resizer_blocks: Positive  # neural: residual blocks, published 1
    resizer_channels: Positive  # neural: published 16
    resizer_scale: Annotated[float, Field(gt=0)] | None  # neural: sampling ratio; null: resizer_size / image_size
    backbone: BackboneOptions
    head: list[Positive]  # hidden layers, each with batch norm, ReLU and dropout; published [512]; []: linear
    head_dropout: Fraction  # published .5


class Classifier(nn.Module):
    """[B, channels, image_size, image_size] -> logits [B, num_labels]."""

    def __init__(self, run: RunConfig, options: ClassifierOptions, num_labels: int, pretrained: bool):
        super().__init__()
        self.resizer_size = options.resizer_size if options.resizer == "bilinear" else None
        self.stn = SpatialTransformer(run.image_size, run.channels) if options.stn else None
        self.resizer = (
            Resizer(
                options.resizer_size,
                options.resizer_blocks,
                options.resizer_channels,
                run.channels,
                options.resizer_scale,
            )
            if options.resizer == "neural"
            else None
        )
        size = backbone_size(run, options)
        self.backbone = build_backbone(options.backbone, size, run.channels, "options.backbone", pretrained)
        layers: list[nn.Module] = []
        width = self.backbone.num_features
        for hidden in options.head:
            layers += [nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
            layers += [nn.Dropout(options.head_dropout)]
            width = hidden
        self.head = nn.Sequential(*layers, nn.Linear(width, num_labels))

    def forward(self, pixel_values: Tensor) -> Tensor:
        images = pixel_values if self.stn is None else self.stn(pixel_values)
        if self.resizer is not None:
            images = self.resizer(images)
        elif self.resizer_size is not None:
            images = F.interpolate(images, size=(self.resizer_size, self.resizer_size), mode="bilinear")
        return self.head(self.backbone(images))


def backbone_size(run: RunConfig, options: ClassifierOptions) -> int:
    """Side of the images that the backbone sees."""
    return run.image_size if options.resizer == "none" else options.resizer_size


def classifier_faults(run: RunConfig, options: ClassifierOptions) -> list[str]:
    found = backbone_faults(options.backbone, backbone_size(run, options), run.channels, "options.backbone")
    if options.stn and run.image_size < SMALLEST:
        found.append(f"image_size {run.image_size} is too small for options.stn: at least {SMALLEST}")
    if options.resizer == "neural" and options.resizer_scale is not None:
        side = int(run.image_size * options.resizer_scale)
        if side != options.resizer_size:
            found.append(
                f"options.resizer_scale {options.resizer_scale:g} of image_size {run.image_size} is {side}, "
                f"not options.resizer_size {options.resizer_size}"
            )
    return found
