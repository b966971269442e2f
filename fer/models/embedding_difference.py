"""Difference of Embeddings (DoE), and the emotion encoder that is step one of the disentangled DoE.

DoE compares a face with a neutral one: d = e(target) - e(neutral), logits = MLP(concat(d, e(target))), with a frozen
encoder e. The disentangled DoE takes as e the emotion encoder of step one, which is trained beside a frozen encoder of
identity, so that it need not tell persons apart: logits = MLP(concat(emotion(x), identity(x))).
"""

from typing import Literal

import torch
from torch import Tensor, nn

from fer.config import Positive, RunConfig, Section
from fer.errors import UserError
from fer.models.backbones import BackboneOptions, backbone_faults, build_backbone
from fer.models.resnet50 import caffe_input

PAIRINGS = ("same_subject", "random_neutral", "prototype")


class FrozenEncoder(nn.Module):
    """A network of which one encoder never learns: no gradient, evaluation mode, embeddings that can be kept.

    `embed(pixel_values)` gives that encoder's embeddings [B, F], which `forward` takes as `embedding`.
    """

    needs_pixels = True  # `forward` also when it is given the embedding

    def __init__(self) -> None:
        super().__init__()
        self.frozen: list[nn.Module] = []  # registered elsewhere, under their own names

    def freeze(self, encoder: nn.Module) -> None:
        encoder.requires_grad_(False).eval()
        self.frozen.append(encoder)

    def train(self, mode: bool = True) -> "FrozenEncoder":
        super().train(mode)
        for encoder in self.frozen:
            encoder.eval()
        return self

    def embed(self, pixel_values: Tensor) -> Tensor:
        raise NotImplementedError


def mlp(width: int, hidden: list[int], num_labels: int) -> nn.Sequential:
    """Linear layers with ReLU between them; published hidden widths 256, 128, 64, 32."""
    layers: list[nn.Module] = []
    for out in hidden:
        layers += [nn.Linear(width, out), nn.ReLU(inplace=True)]
        width = out
    return nn.Sequential(*layers, nn.Linear(width, num_labels))


class EmotionEncoderOptions(Section):
    backbone: BackboneOptions  # learns emotion; published MobileNetV3-Large
    identity: BackboneOptions  # frozen; published ResNet-50 of VGGFace2
    hidden: list[Positive]


class EmotionEncoder(FrozenEncoder):
    """[B, channels, image_size, image_size] -> logits [B, num_labels]."""

    def __init__(self, run: RunConfig, options: EmotionEncoderOptions, num_labels: int, pretrained: bool):
        super().__init__()
        self.backbone = build_backbone(options.backbone, run.image_size, run.channels, "options.backbone", pretrained)
        self.identity = build_backbone(options.identity, run.image_size, run.channels, "options.identity", pretrained)
        self.freeze(self.identity)
        self.head = mlp(self.backbone.num_features + self.identity.num_features, options.hidden, num_labels)
        self.pixels = (run.pixel_mean, run.pixel_std) if options.identity.settings.get("caffe") else None

    @torch.no_grad()
    def embed(self, pixel_values: Tensor) -> Tensor:
        """Identity embeddings [B, F]."""
        if self.pixels is not None:
            mean, std = (torch.tensor(values, device=pixel_values.device).view(1, -1, 1, 1) for values in self.pixels)
            pixel_values = caffe_input(pixel_values * std + mean)
        return self.identity(pixel_values)

    def forward(self, pixel_values: Tensor, embedding: Tensor | None = None) -> Tensor:
        identity = self.embed(pixel_values) if embedding is None else embedding
        return self.head(torch.cat([self.backbone(pixel_values), identity], 1))


class DifferenceOfEmbeddingsOptions(Section):
    backbone: BackboneOptions  # frozen; published MobileNetV3-Large
    pairing: Literal["same_subject", "random_neutral", "prototype"]
    references: Positive  # random_neutral: neutral training faces that evaluation compares with
    hidden: list[Positive]


class DifferenceOfEmbeddings(FrozenEncoder):
    """Target faces [B, channels, image_size, image_size] and neutral embeddings [B, F] -> logits [B, num_labels].

    Without neutral embeddings the logits are the mean over the fixed `references` [R, F], chosen once in training and
    kept in the checkpoint: evaluation is deterministic, one image suffices, and no face is stored.
    """

    needs_pixels = False

    def __init__(self, run: RunConfig, options: DifferenceOfEmbeddingsOptions, num_labels: int, pretrained: bool):
        super().__init__()
        self.pairing = options.pairing
        self.backbone = build_backbone(options.backbone, run.image_size, run.channels, "options.backbone", pretrained)
        self.freeze(self.backbone)
        width = self.backbone.num_features
        self.head = mlp(2 * width, options.hidden, num_labels)
        count = {"same_subject": 0, "prototype": 1, "random_neutral": options.references}[options.pairing]
        self.references: Tensor
        self.register_buffer("references", torch.zeros(count, width))

    @torch.no_grad()
    def embed(self, pixel_values: Tensor) -> Tensor:
        """[B, F]."""
        return self.backbone(pixel_values)

    def forward(
        self, pixel_values: Tensor | None = None, embedding: Tensor | None = None, neutral: Tensor | None = None
    ) -> Tensor:
        if embedding is None:
            assert pixel_values is not None
            embedding = self.embed(pixel_values)
        if neutral is not None:
            return self.head(torch.cat([embedding - neutral, embedding], 1))
        if not len(self.references):
            raise UserError("pairing same_subject: give a neutral face of the same person with every image")
        target = embedding.unsqueeze(1).expand(-1, len(self.references), -1)
        return self.head(torch.cat([target - self.references, target], 2)).mean(1)


def emotion_encoder_faults(run: RunConfig, options: EmotionEncoderOptions) -> list[str]:
    found = backbone_faults(options.backbone, run.image_size, run.channels, "options.backbone")
    found += backbone_faults(options.identity, run.image_size, run.channels, "options.identity")
    if options.identity.settings.get("caffe") and run.channels != 3:
        found.append("options.identity.settings.caffe: this network sees colour; set channels to 3")
    return found


def difference_of_embeddings_faults(run: RunConfig, options: DifferenceOfEmbeddingsOptions) -> list[str]:
    return backbone_faults(options.backbone, run.image_size, run.channels, "options.backbone")
