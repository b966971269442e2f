"""The optimizers: which parameters decay, in every backbone and model, and the settings of each optimizer."""

from functools import cache
from typing import Any

import pytest
import torch
from conftest import small_run
from test_models import LABELS, SHIPPED, SMALL, SWIN, classifier, run_of
from torch import nn

from fer.models import build_model
from fer.models.backbones import BACKBONES
from fer.optimizer import OPTIMIZERS, AdamW, build_optimizer

CONVOLUTION = nn.modules.conv._ConvNd
SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 1e-3, "weight_decay": 0.05},
    "adam": {"lr": 1e-3, "weight_decay": 0.0},
    "sgd": {"lr": 0.01, "momentum": 0.9, "nesterov": False, "weight_decay": 0.0},
}


class Groups(AdamW):
    """Gives its groups, as torch builds no optimizer of tensors without memory."""

    def build(self, groups: list[dict]) -> Any:
        return groups


@cache
def planned(name: str) -> nn.Module:
    """A backbone, a small model or an experiment's, without memory for its tensors."""
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


EVERY = [*BACKBONES, *SMALL, *SHIPPED]


@pytest.mark.parametrize("name", EVERY)
def test_of_all_that_learns_only_weights_of_linear_and_convolution_layers_decay(name: str) -> None:
    model = planned(name)
    found = decay_of(model)
    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    assert found.keys() == dict(model.named_parameters()).keys() - frozen
    encoders = {"difference_of_embeddings": "backbone", "emotion_encoder": "identity"}
    encoder = None if name in BACKBONES else encoders.get(run_of(name).model.name)
    assert {key.partition(".")[0] for key in frozen} == ({encoder} if encoder else set())
    layers = {key for key, layer in model.named_modules() if isinstance(layer, nn.Linear | CONVOLUTION)}
    kernels = {f"{key}.weight" for key in layers} & found.keys()
    assert kernels
    assert found == {key: 0.3 if key in kernels else 0.0 for key in found}
    # what else has several dimensions stands in transformers, and has a name of its own
    shaped = {key.rpartition(".")[2] for key in found.keys() - kernels if model.get_parameter(key).ndim > 1}
    assert shaped <= {"cls_token", "position_embeddings", "relative_position_bias_table"}


def test_how_many_numbers_decay() -> None:
    def decaying(name: str) -> int:
        model = planned(name)
        return sum(model.get_parameter(key).numel() for key, value in decay_of(model).items() if value)

    # patches of 16x16x3; each of 12 layers: query, key, value, output, and the MLP of 4 times the width
    assert decaying("vit_base_patch16_224") == 768 * 768 + 12 * 12 * 768**2
    # patches of 4x4x3; blocks as above; between stages four tokens become one of twice the width
    blocks = sum(depth * 12 * (96 * 2**stage) ** 2 for stage, depth in enumerate([2, 2, 6, 2]))
    assert decaying("swin_tiny_patch4_window7_224") == 48 * 96 + blocks + sum(8 * (96 * 2**i) ** 2 for i in range(3))
    # the published network, less its dense layer and the scales and shifts of 53 norms
    assert decaying("resnet50") == 25_557_032 - 2049 * 1000 - 53_120


class Zoo(nn.Module):
    """Layers with weights of several dimensions, of which no network of ours has all."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        self.decaying = nn.ModuleList([nn.Linear(2, 2), *(kind(2, 2, 3) for kind in convolutions)])
        self.plain = nn.ModuleList([nn.Embedding(3, 2), nn.LayerNorm([2, 2]), nn.BatchNorm2d(2), nn.PReLU(2)])
        self.token = nn.Parameter(torch.ones(1, 1, 2))


def test_every_kind_of_layer() -> None:
    found = decay_of(Zoo())
    assert {key for key, value in found.items() if value} == {f"decaying.{number}.weight" for number in range(7)}


def test_weights_that_two_layers_share_decay_once() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
    model[0].weight = model[1].weight  # type: ignore[assignment]
    assert decay_of(model) == {"0.weight": 0.3}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_without_a_gradient_a_step_takes_decay_times_rate_of_what_decays(name: str) -> None:
    run = small_run(**classifier(SWIN, head=[8]))
    model = build_model(run.model, run.input, LABELS)
    optimizer = build_optimizer(OPTIMIZERS[name](lr=0.1, weight_decay=0.5), model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)  # nothing is zero
            parameter.grad = torch.zeros_like(parameter)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    optimizer.step()
    decay = decay_of(model)
    for key, parameter in model.named_parameters():
        expected = 0.95 * before[key] if decay[key] else before[key]
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=0)


def test_adam_adds_decay_to_the_gradient() -> None:
    model = nn.Linear(2, 1)
    nn.init.constant_(model.weight, 2.0)
    nn.init.constant_(model.bias, 2.0)
    optimizer = build_optimizer(OPTIMIZERS["adam"](lr=0.1, weight_decay=0.5), model)
    model.weight.grad, model.bias.grad = torch.zeros(1, 2), torch.zeros(1)
    optimizer.step()  # the first step of Adam is the rate in the direction of the gradient
    torch.testing.assert_close(model.weight.detach(), torch.full((1, 2), 1.9))
    assert model.bias.item() == 2.0


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
