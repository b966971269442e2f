"""The table of models. A new one is an options class, a builder, and a line here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from fer.config import RunConfig, Section, faults
from fer.models.backbones import BACKBONES, RANDOM, BackboneOptions, starts_from
from fer.models.classifier import Classifier, ClassifierOptions, classifier_faults
from fer.models.embedding_difference import (
    DifferenceOfEmbeddings,
    DifferenceOfEmbeddingsOptions,
    EmotionEncoder,
    EmotionEncoderOptions,
    difference_of_embeddings_faults,
    emotion_encoder_faults,
)
from fer.models.vgg13 import Vgg13, Vgg13Options, vgg13_faults
from fer.models.vit_se import VitSe, VitSeOptions, vit_se_faults


@dataclass(frozen=True)
class Model:
    options: type[Section]
    build: Callable[[RunConfig, Any, int, bool], nn.Module]  # (run, options, num_labels, load pretrained weights)
    faults: Callable[[RunConfig, Any], list[str]]  # combinations that cannot work


MODELS = {
    "classifier": Model(ClassifierOptions, Classifier, classifier_faults),
    "vit_se": Model(VitSeOptions, VitSe, vit_se_faults),
    "difference_of_embeddings": Model(
        DifferenceOfEmbeddingsOptions, DifferenceOfEmbeddings, difference_of_embeddings_faults
    ),
    "emotion_encoder": Model(EmotionEncoderOptions, EmotionEncoder, emotion_encoder_faults),
    "vgg13": Model(Vgg13Options, Vgg13, vgg13_faults),
}


def check_options(model: str, options: Any, run: RunConfig | None, prefix: str) -> list[str]:
    """The faults of a model's options, one a line with its dotted path under `prefix`.

    Combinations with the rest of the run are checked where `run` is given.
    """
    row = MODELS[model]
    try:
        checked = row.options.model_validate(options)
    except ValidationError as error:
        return faults(error, row.options, f"{prefix}.options")
    return [f"{prefix}.{line}" for line in row.faults(run, checked)] if run else []


def build_model(run: RunConfig, num_labels: int, pretrained: bool = True) -> nn.Module:
    """The network of a run, `pixel_values` [B, channels, image_size, image_size] -> logits [B, num_labels].

    `pretrained=False` where a checkpoint's weights are to be loaded: the files of pretrained ones are not needed then.
    Raises UserError when named weights cannot be loaded.
    """
    model = MODELS[run.model]
    network: Any = model.build(run, model.options.model_validate(run.options), num_labels, pretrained)
    return network.to(memory_format=torch.channels_last)  # a quarter less time for convolutions


def backbones_of(run: RunConfig) -> dict[str, BackboneOptions]:
    """The backbones of a run by their key in `options`; empty for a model that has none."""
    options = MODELS[run.model].options.model_validate(run.options)
    return {key: value for key, value in options if isinstance(value, BackboneOptions)}


def packages(run: RunConfig) -> list[str]:
    """Packages beyond the core dependencies that the run's network needs when it is loaded."""
    families = {BACKBONES[options.name].family for options in backbones_of(run).values()}
    return ["efficientnet-lite-pytorch"] if families & {"lite0", "lite2"} else []


def random_backbones(run: RunConfig) -> list[str]:
    """Names of the backbones that start from random weights."""
    found = backbones_of(run)
    if run.init_from is not None:
        found.pop("backbone")
    return [options.name for options in found.values() if options.weights is None]


def origin(run: RunConfig) -> list[str]:
    """Where the weights of a run's backbones come from at its start, for people."""
    found = {key: starts_from(options) for key, options in backbones_of(run).items()}
    if run.init_from is not None:
        found["backbone"] = run.init_from
    return list(found.values()) or [RANDOM]
