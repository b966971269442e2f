"""The optimizers, and which parameters are subject to weight decay."""

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from fer.settings import Fault, NonNegative, Section, Unfit, by_name

Rate = Annotated[float, Field(gt=0)]
DECAYS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Optimizer(Section):
    """A row of OPTIMIZERS."""

    name: str
    lr: Rate
    weight_decay: NonNegative

    def build(self, groups: list[dict], fused: bool) -> torch.optim.Optimizer:
        """The optimizer of torch; `groups`: parameter groups, each with `params` and `weight_decay`.

        `fused`: as in `build_optimizer`; without, it is one that a gradient scaler may leave out a step of.
        """
        raise NotImplementedError


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101)."""

    name: Literal["adamw"] = "adamw"
    lr: Rate = 1e-3
    """Peak learning rate."""
    weight_decay: NonNegative = 0.05
    """Decoupled weight decay: each step shrinks the weights by this times the learning rate."""

    def build(self, groups: list[dict], fused: bool) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=self.lr, fused=fused)


class Adam(Optimizer):
    """Adam (Kingma & Ba 2015, arXiv 1412.6980)."""

    name: Literal["adam"] = "adam"
    lr: Rate = 1e-3
    """Peak learning rate."""
    weight_decay: NonNegative = 0.0
    """L2 penalty: this times the weights is added to their gradient."""

    def build(self, groups: list[dict], fused: bool) -> torch.optim.Optimizer:
        return torch.optim.Adam(groups, lr=self.lr, fused=fused)


class Sgd(Optimizer):
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"] = "sgd"
    lr: Rate = 0.01
    """Peak learning rate."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Share of the previous update that carries over to the next."""
    nesterov: bool = False
    """Nesterov momentum: the gradient is taken as if the momentum step had been made already."""
    weight_decay: NonNegative = 0.0
    """L2 penalty: this times the weights is added to their gradient."""

    @model_validator(mode="after")
    def _fits(self) -> "Sgd":
        if self.nesterov and not self.momentum:
            raise Unfit([Fault("nesterov", "needs momentum above 0")])
        return self

    def build(self, groups: list[dict], fused: bool) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, fused=fused)


OPTIMIZERS = by_name(AdamW, Adam, Sgd)


def build_optimizer(settings: Optimizer, model: nn.Module, fused: bool = True) -> torch.optim.Optimizer:
    """The optimizer of `model`, with weight decay only on the weights of linear and convolution layers.

    Biases, norms, class tokens, position embeddings and relative position tables do not decay, whatever their shape.
    Frozen parameters are left out. `fused`: one kernel for all parameters, but not beside a gradient scaler: torch's
    fused SGD takes its momentum from uninitialised memory if the first step overflows.
    """
    decaying = {id(module.weight) for module in model.modules() if isinstance(module, DECAYS)}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return settings.build(
        [
            {"params": [p for p in trainable if id(p) in decaying], "weight_decay": settings.weight_decay},
            {"params": [p for p in trainable if id(p) not in decaying], "weight_decay": 0.0},
        ],
        fused,
    )
