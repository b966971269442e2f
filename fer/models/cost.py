"""What a run's network costs: parameters and floating-point operations, without computing or loading anything."""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from fer.input import Input
from fer.models import build_model
from fer.models.network import ModelKind


@dataclass(frozen=True)
class Cost:
    parameters: int
    trainable: int
    gflop: float  # one image forward, in evaluation; a multiplication and an addition are two


def cost(kind: ModelKind, settings: Input, num_labels: int) -> Cost:
    """Counts convolutions, matrix products and attention; what is done per pixel (activations, warps) is not counted.

    Raises UserError when a package of the network is missing.
    """
    with torch.device("meta"):
        model = build_model(kind, settings, num_labels, pretrained=False).eval()
        inputs = model.example(settings)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**inputs)
    parameters = list(model.parameters())
    return Cost(
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
        counter.get_total_flops() / 1e9,
    )
