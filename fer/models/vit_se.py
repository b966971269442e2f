"""ViT_SE: squeeze-and-excitation on a vision transformer's pooled output (arXiv 2107.03107)."""

from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from fer.errors import UserError
from fer.input import Input
from fer.models.backbones import BACKBONE, backbone_faults, build_backbone
from fer.models.network import Backbone, ModelKind, Network
from fer.settings import Fault, Positive


class VitSe(ModelKind):
    """A vision transformer whose pooled output goes through a squeeze-and-excitation block."""

    name: Literal["vit_se"] = "vit_se"
    backbone: Annotated[Backbone, BACKBONE]
    """The vision transformer; published: ViT-B/16 of ImageNet-21k with transformers' pooler."""
    reduction: Positive = 4
    """Factor by which the SE block squeezes the features; published: 4."""
    gate: Literal["relu", "sigmoid"] = "relu"
    """Gate function of the SE block; published: relu, although a sigmoid is usual."""

    def build(self, settings: Input, num_labels: int, pretrained: bool) -> "VitSeNetwork":
        return VitSeNetwork(self, settings, num_labels, pretrained)

    def faults(self, settings: Input) -> list[Fault]:
        return backbone_faults(self.backbone, settings.image_size, settings.channels, "model.backbone")


class VitSeNetwork(Network):
    """[B, channels, image_size, image_size] -> logits [B, num_labels]. Raises UserError if the SE block has no unit."""

    def __init__(self, model: VitSe, settings: Input, num_labels: int, pretrained: bool):
        super().__init__()
        shape = settings.image_size, settings.channels
        self.backbone = build_backbone(model.backbone, *shape, "model.backbone", pretrained)
        width = self.backbone.num_features
        if model.reduction > width:
            raise UserError(f"model.reduction: {model.reduction} leaves no hidden unit of {width} features")
        self.squeeze = nn.Linear(width, width // model.reduction)
        self.excite = nn.Linear(width // model.reduction, width)
        self.gate = torch.relu if model.gate == "relu" else torch.sigmoid
        self.classifier = nn.Linear(width, num_labels)

    def forward(self, pixel_values: Tensor) -> Tensor:
        features = self.backbone(pixel_values)
        return self.classifier(features * self.gate(self.excite(torch.relu(self.squeeze(features)))))
