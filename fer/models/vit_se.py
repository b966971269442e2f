"""ViT_SE: squeeze-and-excitation on a vision transformer's pooled output (arXiv 2107.03107)."""

from typing import Literal

import torch
from torch import Tensor, nn

from fer.config import Positive, RunConfig, Section
from fer.models.backbones import BackboneOptions, backbone_faults, build_backbone


class VitSeOptions(Section):
    backbone: BackboneOptions  # published: ViT-B/16 of ImageNet-21k with transformers' pooler
    reduction: Positive  # of the features in the SE block; published 4
    gate: Literal["relu", "sigmoid"]  # of the SE block; published relu; the usual one is a sigmoid


class VitSe(nn.Module):
    """[B, channels, image_size, image_size] -> logits [B, num_labels]."""

    def __init__(self, run: RunConfig, options: VitSeOptions, num_labels: int, pretrained: bool):
        super().__init__()
        self.backbone = build_backbone(options.backbone, run.image_size, run.channels, "options.backbone", pretrained)
        width = self.backbone.num_features
        self.squeeze = nn.Linear(width, width // options.reduction)
        self.excite = nn.Linear(width // options.reduction, width)
        self.gate = torch.relu if options.gate == "relu" else torch.sigmoid
        self.classifier = nn.Linear(width, num_labels)

    def forward(self, pixel_values: Tensor) -> Tensor:
        features = self.backbone(pixel_values)
        return self.classifier(features * self.gate(self.excite(torch.relu(self.squeeze(features)))))


def vit_se_faults(run: RunConfig, options: VitSeOptions) -> list[str]:
    return backbone_faults(options.backbone, run.image_size, run.channels, "options.backbone")
