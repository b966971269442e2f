"""The optimizers: which parameters decay, in every backbone and model, and the settings of each optimizer."""

from functools import cache
from typing import Any

import pytest
import torch
from conftest import small_run
from test_models import LABELS, SMALL, run_of
from torch import nn

from fer.models import build_model
from fer.models.backbones import BACKBONES
from fer.optimizer import OPTIMIZERS, AdamW, build_optimizer
from fer.step import Stepper

CONVOLUTION = nn.modules.conv._ConvNd
SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 1e-3, "weight_decay": 0.05},
    "adam": {"lr": 1e-3, "weight_decay": 0.0},
    "sgd": {"lr": 0.01, "momentum": 0.9, "nesterov": False, "weight_decay": 0.0},
}


class Groups(AdamW):
    """Gives its groups, as torch builds no optimizer of tensors without memory."""

    def build(self, groups: list[dict], fused: bool) -> Any:
        return groups


@cache
def planned(name: str) -> nn.Module:
    """A backbone or a small model, without memory for its tensors."""
    with torch.device("meta"):
        if name in BACKBONES:
            return BACKBONES[name].kind().build(224, 3)
        run = run_of(name)
        return build_model(run.model, run.input, LABELS, pretrained=False)


def decay_of(model: nn.Module, weight_decay: float = 0.3) -> dict[str, float]:
    """The weight decay of each parameter that is in a group, by name; none is in two."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups: Any = build_optimizer(Groups(weight_decay=weight_decay), model)
    found = [(names[id(parameter)], group["weight_decay"]) for group in groups for parameter in group["params"]]
    assert len(dict(found)) == len(found)
    return dict(found)


@pytest.mark.parametrize("name", [*SMALL, "resnet50", "vit_base_patch16_224", "efficientnet_lite2"])
def test_of_all_that_learns_only_weights_of_linear_and_convolution_layers_decay(name: str) -> None:
    model = planned(name)
    found = decay_of(model)
    assert found.keys() == {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    layers = {key for key, layer in model.named_modules() if isinstance(layer, nn.Linear | CONVOLUTION)}
    kernels = {f"{key}.weight" for key in layers} & found.keys()
    assert kernels
    assert found == {key: 0.3 if key in kernels else 0.0 for key in found}
    # what else has several dimensions stands in transformers, and has a name of its own
    shaped = {key.rpartition(".")[2] for key in found.keys() - kernels if model.get_parameter(key).ndim > 1}
    assert shaped <= {"cls_token", "position_embeddings", "relative_position_bias_table"}


class Zoo(nn.Module):
    """Layers with weights of several dimensions, of which no network of ours has all."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        self.decaying = nn.ModuleList([nn.Linear(2, 2), *(kind(2, 2, 3) for kind in convolutions)])
        self.plain = nn.ModuleList([nn.Embedding(3, 2), nn.LayerNorm([2, 2]), nn.BatchNorm2d(2), nn.PReLU(2)])
        self.token = nn.Parameter(torch.ones(1, 1, 2))


def test_every_kind_of_layer_and_weights_that_two_share() -> None:
    found = decay_of(Zoo())
    assert {key for key, value in found.items() if value} == {f"decaying.{number}.weight" for number in range(7)}
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
    model[0].weight = model[1].weight  # type: ignore[assignment]
    assert decay_of(model) == {"0.weight": 0.3}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_without_a_gradient_by_hand(name: str) -> None:
    """A weight of 2 loses rate * decay * 2 = .1; Adam's first step is the rate, .1, in the direction of the decay."""
    model = nn.Linear(2, 1)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 2.0)
        parameter.grad = torch.zeros_like(parameter)
    build_optimizer(OPTIMIZERS[name](lr=0.1, weight_decay=0.5), model).step()
    torch.testing.assert_close(model.weight.detach(), torch.full((1, 2), 1.9))
    assert model.bias.item() == 2.0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_first_step_that_overflows_in_fp16_leaves_nothing_behind(name: str) -> None:
    """torch's fused SGD takes a momentum of uninitialised memory after it; here that memory holds nan."""
    run = small_run(optimizer={"name": name, "lr": 0.1, "weight_decay": 0.0}, precision="fp16", clip_grad_norm=None)
    model = nn.Linear(64, 64, bias=False)
    stepper, before = Stepper(run, model, torch.device("cpu")), model.weight.detach().clone()
    for value in (torch.inf, 0.0):
        model.weight.grad = torch.full((64, 64), value)
        stepper.scaler.scale(torch.ones(()))
        spoilt = [torch.full((64, 64), torch.nan) for _ in range(50)]
        del spoilt
        stepper.update()
    torch.testing.assert_close(model.weight.detach(), before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_builds_with_its_settings(name: str) -> None:
    assert OPTIMIZERS[name]().model_dump() == {"name": name, **SETTINGS[name]}
    changes = {"lr": 0.02, "weight_decay": 0.3} | ({"momentum": 0.7, "nesterov": True} if name == "sgd" else {})
    for settings in (SETTINGS[name], changes):
        network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        built = build_optimizer(OPTIMIZERS[name].model_validate(settings), network)
        assert type(built) is {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}[name]
        adams = {"betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False}
        for group, decay in zip(built.param_groups, (settings["weight_decay"], 0.0), strict=True):
            own = settings | {"weight_decay": decay, "fused": True} | ({"dampening": 0} if name == "sgd" else adams)
            assert {key: group[key] for key in own} == own
