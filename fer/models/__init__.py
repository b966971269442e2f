"""The table of models. A new model is a section of settings that builds a network, and a row here."""

from pathlib import Path
from typing import Any

import torch

from fer.files import sha256
from fer.input import Input
from fer.models.backbones import BACKBONES, other_pixels, starts_from
from fer.models.classifier import Classifier
from fer.models.efficientnet_lite import Lite
from fer.models.embedding_difference import DifferenceOfEmbeddings, EmotionEncoder
from fer.models.network import RANDOM, ModelKind, Network
from fer.models.small_resnet import SmallResnet
from fer.models.vgg13 import Vgg13
from fer.models.vit_se import VitSe
from fer.settings import by_name

MODELS = by_name(Classifier, VitSe, DifferenceOfEmbeddings, EmotionEncoder, Vgg13, SmallResnet)


def build_model(model: ModelKind, settings: Input, num_labels: int, pretrained: bool = True) -> Network:
    """The network of a run, `pixel_values` [B, channels, image_size, image_size] -> logits [B, num_labels].

    `pretrained=False` if a checkpoint is loaded afterwards: files of pretrained weights are then not needed. Raises
    UserError if named weights cannot be loaded.
    """
    network: Any = model.build(settings, num_labels, pretrained)
    return network.to(memory_format=torch.channels_last)  # convolutions take a quarter less time


def named_weights(model: ModelKind) -> list[str]:
    """The weights that the model's backbones start from, as their settings name them."""
    return [backbone.weights for backbone in model.backbones().values() if backbone.weights is not None]


def weights_files(model: ModelKind) -> dict[str, str]:
    """SHA-256 of each file among `named_weights` that is there, by its name."""
    return {name: sha256(name) for name in named_weights(model) if Path(name).is_file()}


def packages(model: ModelKind) -> list[str]:
    """Packages beyond the core dependencies that are needed to load the model."""
    lite = any(isinstance(backbone, Lite) for backbone in model.backbones().values())
    return ["efficientnet-lite-pytorch"] if lite else []


def random_backbones(model: ModelKind, init_from: str | None) -> list[str]:
    """Names of the backbones that start from random weights although there are published ones."""
    found = model.backbones()
    if init_from is not None:
        found.pop("backbone")
    published = {key for key, row in BACKBONES.items() if row.source != RANDOM}
    return [one.name for one in found.values() if one.weights is None and one.name in published]


def mistaken_pixels(model: ModelKind, settings: Input) -> list[str]:
    """A line for each backbone whose published weights expect images that are normalised otherwise."""
    found = ((backbone.name, other_pixels(backbone, settings)) for backbone in model.backbones().values())
    return [f"{name}: {otherwise}" for name, otherwise in found if otherwise is not None]


def origin(model: ModelKind, init_from: str | None) -> list[str]:
    """Where the initial weights of the model's backbones come from, for people."""
    found = {key: starts_from(backbone) for key, backbone in model.backbones().items()}
    if init_from is not None:
        found["backbone"] = init_from
    return list(found.values()) or [RANDOM]
