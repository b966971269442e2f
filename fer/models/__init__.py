"""The table of models. A new one is an options class, a builder, and a line here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from torch import nn

from fer.config import RunConfig, Section, faults
from fer.models.transformer import (
    SwinOptions,
    TransformerClassifier,
    VitOptions,
    build_swin,
    build_vit,
    rebuild_swin,
    rebuild_vit,
    swin_faults,
    vit_faults,
)
from fer.models.vgg13 import Vgg13, Vgg13Options, vgg13_faults


@dataclass(frozen=True)
class Model:
    options: type[Section]
    build: Callable[[Any, int, int, int], nn.Module]  # (options, num_labels, image_size, channels)
    faults: Callable[[RunConfig, Any], list[str]]  # combinations that cannot work
    rebuild: Callable[[dict[str, Any]], nn.Module] | None = None  # where the sizes may be those of a weights file


MODELS = {
    "vit": Model(VitOptions, build_vit, vit_faults, rebuild_vit),
    "swin": Model(SwinOptions, build_swin, swin_faults, rebuild_swin),
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


def build_model(run: RunConfig, num_labels: int, sizes: dict[str, Any] | None = None) -> nn.Module:
    """The network of a run, [B, channels, image_size, image_size] -> logits [B, num_labels].

    With the `sizes` of a checkpoint its weights are to be loaded, and the file of the pretrained ones is not needed.
    Raises UserError when named weights cannot be loaded.
    """
    model = MODELS[run.model]
    if sizes is not None and model.rebuild is not None:
        return model.rebuild(sizes)
    return model.build(model.options.model_validate(run.options), num_labels, run.image_size, run.channels)


def sizes_of(model: nn.Module) -> dict[str, Any] | None:
    """What a checkpoint keeps for `build_model`; None for a model that its options describe fully."""
    return model.sizes() if isinstance(model, TransformerClassifier) else None
