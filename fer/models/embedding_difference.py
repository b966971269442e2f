"""Difference of Embeddings (DoE), and the emotion encoder that is step one of the disentangled DoE.

DoE compares a face with a neutral one: d = e(target) - e(neutral), logits = MLP(concat(d, e(target))), with a frozen
encoder e. The disentangled DoE takes as e the emotion encoder of step one, which is trained next to a frozen identity
encoder, so that it need not tell people apart: logits = MLP(concat(emotion(x), identity(x))).
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fer.data.dataset import Split
from fer.data.pairs import Pairs
from fer.errors import UserError
from fer.input import Input
from fer.models.backbones import BACKBONE, IDENTITY, ResNet, backbone_faults, build_backbone
from fer.models.network import Backbone, FrozenEncoder, ModelKind
from fer.models.resnet import CaffeInput
from fer.settings import Fault, OneOf, Positive, Section, Width, by_name


def mlp(width: int, hidden: list[int], num_labels: int) -> nn.Sequential:
    """Linear layers with ReLU between them, [B, width] -> [B, num_labels]; published `hidden`: 256, 128, 64, 32."""
    layers: list[nn.Module] = []
    for out in hidden:
        layers += [nn.Linear(width, out), nn.ReLU(inplace=True)]
        width = out
    return nn.Sequential(*layers, nn.Linear(width, num_labels))


class EmotionEncoder(ModelKind):
    """Step one of the disentangled DoE: an encoder that learns emotion, next to a frozen identity encoder."""

    name: Literal["emotion_encoder"] = "emotion_encoder"
    backbone: Annotated[Backbone, BACKBONE]
    """The encoder that learns emotion; published: MobileNetV3-Large."""
    identity: Annotated[Backbone, BACKBONE]
    """The frozen identity encoder; published: ResNet-50 of VGGFace2."""
    hidden: list[Width] = [256, 128, 64, 32]
    """Widths of the head's hidden layers; the default is published."""

    def build(self, settings: Input, num_labels: int, pretrained: bool) -> "EmotionEncoderNetwork":
        return EmotionEncoderNetwork(self, settings, num_labels, pretrained)

    def faults(self, settings: Input) -> list[Fault]:
        shape = settings.image_size, settings.channels
        found = backbone_faults(self.backbone, *shape, "model.backbone")
        found += backbone_faults(self.identity, *shape, IDENTITY)
        if _sees_caffe_input(self.identity) and settings.channels != 3:
            found.append(Fault("model.identity.caffe", "this network expects colour; set input.channels to 3"))
        if _sees_caffe_input(self.identity) and (settings.equalize or settings.flatten or settings.standardize):
            what = "this network expects plain pixels; set input.equalize, flatten and standardize to false"
            found.append(Fault("model.identity.caffe", what))
        return found


def _sees_caffe_input(backbone: Backbone) -> bool:
    return isinstance(backbone, ResNet) and backbone.caffe


class EmotionEncoderNetwork(FrozenEncoder):
    """[B, channels, image_size, image_size] -> logits [B, num_labels]."""

    def __init__(self, model: EmotionEncoder, settings: Input, num_labels: int, pretrained: bool):
        super().__init__()
        shape = settings.image_size, settings.channels
        self.backbone = build_backbone(model.backbone, *shape, "model.backbone", pretrained)
        self.identity = build_backbone(model.identity, *shape, "model.identity", pretrained)
        self.freeze(self.identity)
        self.head = mlp(self.backbone.num_features + self.identity.num_features, model.hidden, num_labels)
        sees_caffe_input = _sees_caffe_input(model.identity)
        self.convert = CaffeInput(settings.normalisation()) if sees_caffe_input else nn.Identity()

    @torch.no_grad()
    def embed(self, pixel_values: Tensor) -> Tensor:
        """Identity embeddings [B, F] of images [B, channels, S, S]."""
        return self.identity(self.convert(pixel_values))

    def forward(self, pixel_values: Tensor, embedding: Tensor | None = None) -> Tensor:
        identity = self.embed(pixel_values) if embedding is None else embedding
        return self.head(torch.cat([self.backbone(pixel_values), identity], 1))


class SameSubject(Section):
    """A neutral face of the same person, as published; the data must name subjects."""

    name: Literal["same_subject"] = "same_subject"


class RandomNeutral(Section):
    """Random neutral faces of the training split, redrawn every epoch."""

    name: Literal["random_neutral"] = "random_neutral"
    references: Positive = 16
    """Neutral training faces to compare with in evaluation; their logits are averaged."""


class Prototype(Section):
    """The mean embedding of the training split's neutral faces."""

    name: Literal["prototype"] = "prototype"


class NoPairing(Section):
    """No neutral face, only the face's own embedding: with `hidden: []` a linear probe, to compare DoE with."""

    name: Literal["none"] = "none"


PAIRINGS = by_name(SameSubject, RandomNeutral, Prototype, NoPairing)


class DifferenceOfEmbeddings(ModelKind):
    """A face compared with a neutral one by a frozen encoder."""

    name: Literal["difference_of_embeddings"] = "difference_of_embeddings"
    backbone: Annotated[Backbone, BACKBONE]
    """The frozen encoder; published: MobileNetV3-Large."""
    pairing: Annotated[Section, OneOf(PAIRINGS)] = RandomNeutral()
    """Which neutral face each image is compared with."""
    hidden: list[Width] = [256, 128, 64, 32]
    """Widths of the head's hidden layers; the default is published."""

    def build(self, settings: Input, num_labels: int, pretrained: bool) -> "DifferenceOfEmbeddingsNetwork":
        return DifferenceOfEmbeddingsNetwork(self, settings, num_labels, pretrained)

    def faults(self, settings: Input) -> list[Fault]:
        return backbone_faults(self.backbone, settings.image_size, settings.channels, "model.backbone")

    def images_beside(self) -> Mapping[str, bool]:
        return {} if isinstance(self.pairing, NoPairing) else {"neutral": isinstance(self.pairing, SameSubject)}


class DifferenceOfEmbeddingsNetwork(FrozenEncoder):
    """Target faces [B, channels, image_size, image_size] and neutral embeddings [B, F] -> logits [B, num_labels].

    Without neutral embeddings the logits are averaged over the fixed `references` [R, F], chosen once in training and
    kept in the checkpoint: evaluation is deterministic, needs one image only, and no face is stored.
    """

    needs_pixels = False

    def __init__(self, model: DifferenceOfEmbeddings, settings: Input, num_labels: int, pretrained: bool):
        super().__init__()
        self.pairing = model.pairing
        shape = settings.image_size, settings.channels
        self.backbone = build_backbone(model.backbone, *shape, "model.backbone", pretrained)
        self.freeze(self.backbone)
        width = self.backbone.num_features
        self.head = mlp(width if isinstance(model.pairing, NoPairing) else 2 * width, model.hidden, num_labels)
        count = model.pairing.references if isinstance(model.pairing, RandomNeutral) else 0
        self.references: Tensor
        self.register_buffer("references", torch.zeros(1 if isinstance(model.pairing, Prototype) else count, width))

    @torch.no_grad()
    def embed(self, pixel_values: Tensor) -> Tensor:
        """Embeddings [B, F] of images [B, channels, S, S]."""
        return self.backbone(pixel_values)

    def forward(
        self, pixel_values: Tensor | None = None, embedding: Tensor | None = None, neutral: Tensor | None = None
    ) -> Tensor:
        if embedding is None:
            assert pixel_values is not None
            embedding = self.embed(pixel_values)
        if isinstance(self.pairing, NoPairing):
            return self.head(embedding)
        if neutral is not None:
            return self.head(torch.cat([embedding - neutral, embedding], 1))
        if not len(self.references):
            raise UserError("pairing same_subject: give a neutral face of the same person with every image")
        target = embedding.unsqueeze(1).expand(-1, len(self.references), -1)
        return self.head(torch.cat([target - self.references, target], 2)).mean(1)

    def beside(
        self, split: Split, classes: list[str], seed: int, embedded: Callable[[np.ndarray], Tensor]
    ) -> "NeutralFaces | None":
        if isinstance(self.pairing, NoPairing) or (split.name != "train" and not isinstance(self.pairing, SameSubject)):
            return None
        return NeutralFaces(self, split, classes, seed, embedded)

    def example(self, settings: Input) -> dict[str, Tensor]:
        if isinstance(self.pairing, NoPairing):
            return super().example(settings)
        neutral = torch.empty(1, self.backbone.num_features)  # as embedded before
        return {**super().example(settings), "neutral": neutral}


class NeutralFaces:
    """The neutral faces to compare those of one split with, as embeddings (fer.models.network.Beside).

    They are never augmented, so they are embedded once. Raises UserError if the data lack the faces that the pairing
    needs.
    """

    def __init__(
        self,
        network: DifferenceOfEmbeddingsNetwork,
        split: Split,
        classes: list[str],
        seed: int,
        embedded: Callable[[np.ndarray], Tensor],
    ):
        self.network, self.seed = network, seed
        self.pairs = Pairs(split, classes, isinstance(network.pairing, SameSubject))
        self.faces = embedded(self.pairs.neutral)  # [neutral images, F]
        self.place = np.zeros(len(split), np.int64)  # of a neutral image among them
        self.place[self.pairs.neutral] = np.arange(len(self.faces))
        self.partner: Tensor | None = None  # int64 [n]: the neutral face for each image
        if split.name != "train":
            self.partner = self._places(self.pairs.fixed())

    def begin(self) -> None:
        """Choose the references of evaluation: some neutral training faces, or the mean of all."""
        if isinstance(self.network.pairing, RandomNeutral):
            chosen = self.pairs.references(self.network.pairing.references, self.seed)
            self.network.references.copy_(self.faces[self._places(chosen)])
        elif isinstance(self.network.pairing, Prototype):
            self.network.references.copy_(self.faces.mean(0, keepdim=True))

    def start_epoch(self, epoch: int) -> None:
        """Draw the neutral faces of this training epoch; a prototype, the same for all, needs none."""
        if not isinstance(self.network.pairing, Prototype):
            self.partner = self._places(self.pairs.drawn(self.seed, epoch))

    def inputs(self, index: Tensor) -> dict[str, Tensor]:
        """`neutral` [B, F] for the images at `index` [B]; nothing if the references are used."""
        return {} if self.partner is None else {"neutral": self.faces[self.partner[index]]}

    def _places(self, images: np.ndarray) -> Tensor:
        return torch.from_numpy(self.place[images]).to(self.faces.device)
