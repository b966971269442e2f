"""Several trained networks as one: the weighted mean of their probabilities. It is made, not trained."""

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fer.device import autocast
from fer.errors import UserError
from fer.input import Input, normalize, resized
from fer.models import MODELS, build_model
from fer.models.network import Backbone, ModelKind, Network
from fer.settings import Fault, Fraction, OneOf, Section, Unfit


class Member(Section):
    """One of the networks, as its own run describes it."""

    model: Annotated[ModelKind, OneOf(MODELS)]
    """The network."""
    input: Input = Input()
    """How an image is presented to it."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of its forward pass."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides its logits, so that it is as sure as it is right (Guo et al. 2017, arXiv 1706.04599, section 4.2)."""


class Ensemble(ModelKind):
    """Trained networks whose probabilities are averaged; `fer ensemble` makes it."""

    name: Literal["ensemble"] = "ensemble"
    members: Annotated[list[Member], Field(min_length=1)]
    """The networks."""
    weights: list[Fraction]
    """Share of each; they sum to 1."""
    mirror: bool = False
    """Whether each network also sees the mirrored face."""

    @model_validator(mode="after")
    def _fits(self) -> "Ensemble":
        if len(self.weights) != len(self.members) or abs(sum(self.weights) - 1) > 1e-6:
            message = f"should be {len(self.members)} shares that sum to 1, got {self.weights}"
            raise Unfit([Fault("weights", message)])
        return self

    def build(self, settings: Input, num_labels: int, pretrained: bool) -> "EnsembleNetwork":
        if pretrained:
            raise UserError("model.name: an ensemble is not trained; make one of finished runs with `fer ensemble`")
        return EnsembleNetwork(self, num_labels)

    def backbones(self) -> dict[str, Backbone]:
        found = ((number, member.model.backbones()) for number, member in enumerate(self.members))
        return {f"members.{number}.{key}": value for number, backbones in found for key, value in backbones.items()}


class EnsembleNetwork(Network):
    """[B, channels, H, W] in [0, 1] -> log of the mean probabilities, [B, num_labels]."""

    def __init__(self, model: Ensemble, num_labels: int):
        super().__init__()
        self.settings = model
        networks = (build_model(member.model, member.input, num_labels, False) for member in model.members)
        self.members = nn.ModuleList(networks)
        if any(network.embeds for network in self.members):
            raise UserError("networks with a frozen encoder, which take embeddings, cannot be averaged or teach")

    def forward(self, pixel_values: Tensor) -> Tensor:
        views = [pixel_values, pixel_values.flip(-1)] if self.settings.mirror else [pixel_values]
        total = torch.zeros((), device=pixel_values.device)
        for network, member, weight in zip(self.members, self.settings.members, self.settings.weights):
            for view in views:
                total = total + weight * _probabilities(network, member, view)
        return (total / len(views)).clamp_min(torch.finfo(torch.float32).tiny).log()


def _probabilities(network: nn.Module, member: Member, images: Tensor) -> Tensor:
    """What the network alone would answer, from the same input and in the same precision."""
    side, channels = member.input.image_size, member.input.channels
    prepared = torch.empty(images.shape[0], channels, side, side, device=images.device)
    normalize(resized(images.float().contiguous(), side), member.input, prepared)
    with autocast("fp32" if images.is_meta else member.precision, images.device):  # the meta device has no autocast
        return torch.softmax(network(prepared).float() / member.temperature, 1)
