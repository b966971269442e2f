"""Image classifier in parts: [spatial transformer] -> [resizer] -> backbone -> head.

With all parts this is the Neural Resizer for vision transformers (arXiv 2204.02181).
"""

from typing import Annotated, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fer.input import Input
from fer.models.backbones import BACKBONE, backbone_faults, build_backbone
from fer.models.network import Backbone, ModelKind, Network
from fer.models.resizer import Resizer
from fer.models.stn import SMALLEST, SpatialTransformer
from fer.settings import Depth, Fault, Fraction, OneOf, Scale, Section, Side, Width, by_name


class NoResizer(Section):
    """No resizing: the backbone gets images of input.image_size."""

    name: Literal["none"] = "none"


class Bilinear(Section):
    """Plain bilinear interpolation: the paper's comparison."""

    name: Literal["bilinear"] = "bilinear"
    size: Side = 224
    """Side of the backbone's input in pixels."""


class Neural(Section):
    """The learned resizer (Talebi & Milanfar 2021, arXiv 2103.09950)."""

    name: Literal["neural"] = "neural"
    size: Side = 224
    """Side of the backbone's input in pixels."""
    blocks: Depth = 1
    """Residual blocks; published: 1."""
    channels: Width = 16
    """Channels of its convolutions; published: 16."""
    scale: Scale | None = None
    """Sampling ratio; published: .584 (384 to 224 px); null: size / image_size."""


RESIZERS = by_name(NoResizer, Bilinear, Neural)


class Classifier(ModelKind):
    """[spatial transformer] -> [resizer] -> backbone -> head."""

    name: Literal["classifier"] = "classifier"
    stn: bool = False
    """Whether a spatial transformer aligns the face first."""
    resizer: Annotated[Section, OneOf(RESIZERS)] = NoResizer()
    """How the image is resized to the backbone's input."""
    backbone: Annotated[Backbone, BACKBONE]
    """The network that turns the image into an embedding."""
    head: list[Width] = []
    """Widths of hidden layers, each with batch norm, ReLU and dropout; published: [512]; []: a linear head."""
    head_dropout: Fraction = 0.5
    """Dropout after each hidden layer of the head; published: .5."""

    def build(self, settings: Input, num_labels: int, pretrained: bool) -> "ClassifierNetwork":
        return ClassifierNetwork(self, settings, num_labels, pretrained)

    def faults(self, settings: Input) -> list[Fault]:
        size = self.backbone_size(settings)
        found = backbone_faults(self.backbone, size, settings.channels, "model.backbone")
        if self.stn and settings.image_size < SMALLEST:
            small = f"{settings.image_size} is too small for model.stn: at least {SMALLEST}"
            found.append(Fault("input.image_size", small))
        if not self.head and self.head_dropout != type(self).model_fields["head_dropout"].default:
            found.append(Fault("model.head_dropout", "has no effect without hidden layers; leave it out"))
        if isinstance(self.resizer, Neural) and self.resizer.scale is not None:
            scale, wanted = self.resizer.scale, self.resizer.size
            side = int(settings.image_size * scale)
            if side != wanted:
                times = f"{scale:g} of input.image_size {settings.image_size}"
                found.append(Fault("model.resizer.scale", f"{times} is {side}, not model.resizer.size {wanted}"))
        return found

    def backbone_size(self, settings: Input) -> int:
        """Side of the backbone's input in pixels."""
        return self.resizer.size if isinstance(self.resizer, Neural | Bilinear) else settings.image_size


class ClassifierNetwork(Network):
    """[B, channels, image_size, image_size] -> logits [B, num_labels]."""

    def __init__(self, model: Classifier, settings: Input, num_labels: int, pretrained: bool):
        super().__init__()
        resizer, channels = model.resizer, settings.channels
        self.resizer_size = resizer.size if isinstance(resizer, Bilinear) else None
        self.stn = SpatialTransformer(settings.image_size, channels) if model.stn else None
        self.resizer: Resizer | None = None
        if isinstance(resizer, Neural):
            self.resizer = Resizer(resizer.size, resizer.blocks, resizer.channels, channels, resizer.scale)
        size = model.backbone_size(settings)
        self.backbone = build_backbone(model.backbone, size, channels, "model.backbone", pretrained)
        layers: list[nn.Module] = []
        width = self.backbone.num_features
        for hidden in model.head:
            layers += [nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
            layers += [nn.Dropout(model.head_dropout)]
            width = hidden
        self.head = nn.Sequential(*layers, nn.Linear(width, num_labels))

    def forward(self, pixel_values: Tensor) -> Tensor:
        images = pixel_values if self.stn is None else self.stn(pixel_values)
        if self.resizer is not None:
            images = self.resizer(images)
        elif self.resizer_size is not None:
            images = F.interpolate(images, size=(self.resizer_size, self.resizer_size), mode="bilinear")
        return self.head(self.backbone(images))
