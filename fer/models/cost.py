"""The cost of a run's network in parameters and floating-point operations, on the meta device."""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from fer.errors import UserError, first_line
from fer.input import Input
from fer.models import build_model
from fer.models.network import ModelKind


@dataclass(frozen=True)
class Cost:
    """Size of a network, and work per image."""

    parameters: int
    trainable: int
    gflop: float  # of one image's forward pass in evaluation; a multiply-add counts as two operations


def cost(kind: ModelKind, settings: Input, num_labels: int) -> Cost:
    """The cost of a model, counting convolutions, matrix products and attention, but not element-wise operations.

    Nothing is computed or loaded. Raises UserError if a package of the network is missing, or its code fails.
    """
    try:
        with torch.device("meta"), torch.no_grad():
            model = build_model(kind, settings, num_labels, pretrained=False).eval()
            inputs = model.example(settings)
            with FlopCounterMode(display=False) as counter:
                logits = model(**inputs)
    except UserError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"model {kind.name}: cannot be counted on tensors without numbers: {what}") from error
    shape = list(logits.shape) if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
    if shape != [1, num_labels]:
        raise UserError(f"model {kind.name}: its forward returns {shape}, must be [1, {num_labels}]")
    parameters = list(model.parameters())
    return Cost(
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
        counter.get_total_flops() / 1e9,
    )
