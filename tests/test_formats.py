"""Runs that earlier versions wrote are read as what they were; what no version wrote is refused in one line."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, refusal, small_run

from fer.data.augment import Augment
from fer.formats import read_run
from fer.input import Input
from fer.losses import CrossEntropy
from fer.predict import Predictor
from fer.run import FORMAT, Run
from fer.schedule import Cosine
from pipelines import experiments

FORMAT_1 = ROOT / "tests" / "golden" / "format1"
RUNS = sorted((FORMAT_1 / "runs").iterdir())
CONFIGS: dict[str, dict[str, Any]] = json.loads((FORMAT_1 / "configs.json").read_text())


def read(config: dict[str, Any]) -> Run:
    return read_run({"config": config}, "config.json")


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_checkpoint_of_format_1_gives_the_probabilities_of_then(run: Path) -> None:
    expected = json.loads((run / "expected.json").read_text())
    found = Predictor(run / "best", device="cpu").probabilities(np.array(expected["images"], np.uint8))
    np.testing.assert_allclose(found, np.array(expected["probabilities"]), atol=1e-6)
    paths = [run / "config.json", run / "best" / "checkpoint.json"]
    one, other = (read_run(json.loads(path.read_text()), path) for path in paths)
    assert one == other
    told = f"{run.name}: is of a version that did not note the training images of each class"
    assert refusal(Predictor, run, even=1.0) == told


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_of_format_1_are_those_of_the_experiment_today(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    today = experiments.load([name], {})[name].run.model_dump()
    assert read(CONFIGS[name]).model_dump() == changed(today, BEFORE.get(name, {}))


# experiment, other values of keys of format 1, what that changes today
CHANGES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *(("vgg13_small", {key: value}, {key: value}) for key, value in {
        "seed": 3, "epochs": 3, "batch_size": 3, "class_weights": 0.4, "balanced_sampling": 0.4,
        "clip_grad_norm": None, "ema_decay": 0.9, "sam_rho": 0.1, "precision": "bf16",
        **{f"augment.{key}": 0.375 for key in CONFIGS["vgg13_small"]["augment"]},
    }.items()),
    ("disentangled_doe", {"init_from": "other"}, {"init_from": "other"}),
    ("vgg13_small", {"image_size": 32}, {"input.image_size": 32}),
    ("vgg13_small", {"channels": 3, "pixel_mean": [0.4, 0.4, 0.4], "pixel_std": [0.1, 0.2, 0.2]},
        {"input.channels": 3, "input.mean": [0.4], "input.std": [0.1, 0.2, 0.2]}),
    ("vgg13_small", {"options.width": 0.5}, {"model.width": 0.5}),
    # losses
    ("vgg13_small", {"loss": "focal", "loss_gamma": 1.5}, {"loss": {"name": "focal", "gamma": 1.5}}),
    ("vgg13_small", {"loss": "pdls", "loss_alpha": 0.4}, {"loss": {"name": "pdls", "alpha": 0.4}}),
    ("vgg13_small", {"loss": "label_smoothing"}, {"loss": {"name": "label_smoothing", "alpha": 0.8}}),  # its own: .9
    ("vgg13_small", {"loss": "compensated_focal_pdls"}, {"loss": {"name": "compensated_focal_pdls", "alpha": 0.8}}),
    ("vgg13_small", {"loss": "vote_sampling"}, {"loss": {"name": "vote_sampling"}}),
    ("swin_nr_fpdls", {"loss_alpha": 0.4, "loss_gamma": 0.4}, {"loss.alpha": 0.4, "loss.gamma": 0.4}),
    # optimizers and schedules
    ("vgg13_small", {"lr": 0.4, "weight_decay": 0.3}, {"optimizer.lr": 0.4, "optimizer.weight_decay": 0.3}),
    ("vgg13_small", {"optimizer": "adam"}, {"optimizer": {"name": "adam", "lr": 0.002, "weight_decay": 0.01}}),
    ("vgg13_small", {"optimizer": "sgd"},
        {"optimizer": {"name": "sgd", "lr": 0.002, "weight_decay": 0.01, "momentum": 0.9, "nesterov": False}}),
    ("vgg13_ferplus", {"momentum": 0.4}, {"optimizer.momentum": 0.4}),
    ("vgg13_small", {"min_lr_ratio": 0.4, "warmup_epochs": 0.5},
        {"schedule.min_lr_ratio": 0.4, "schedule.warmup_epochs": 0.5}),
    ("vgg13_small", {"schedule": "constant"}, {"schedule": {"name": "constant", "warmup_epochs": 1.0}}),
    ("vgg13_ferplus", {"step_epochs": [2, 3], "step_factors": [0.2, 0.1]},
        {"schedule.step_epochs": [2, 3], "schedule.step_factors": [0.2, 0.1]}),
    # models
    ("swin_nr_fpdls", {"options.stn": False, "options.head": [3], "options.head_dropout": 0.4},
        {"model.stn": False, "model.head": [3], "model.head_dropout": 0.4}),
    ("swin_nr_fpdls", {"options.resizer_blocks": 3, "options.resizer_channels": 3, "options.resizer_scale": None},
        {"model.resizer.blocks": 3, "model.resizer.channels": 3, "model.resizer.scale": None}),
    ("efficientnet_lite0", {"options.resizer": "bilinear", "options.resizer_size": 64},
        {"model.resizer": {"name": "bilinear", "size": 64}}),
    ("swin_nr_fpdls", {"options.backbone.weights": "a.pth", "options.backbone.settings.drop_path_rate": 0.4},
        {"model.backbone.weights": "a.pth", "model.backbone.drop_path_rate": 0.4}),
    ("vit_se", {"options.reduction": 3, "options.gate": "sigmoid"}, {"model.reduction": 3, "model.gate": "sigmoid"}),
    ("doe", {"options.references": 3, "options.hidden": [3]}, {"model.pairing.references": 3, "model.hidden": [3]}),
    ("doe", {"options.pairing": "prototype"}, {"model.pairing": {"name": "prototype"}}),
    ("emotion_encoder", {"options.identity.settings.max_pool": False}, {"model.identity.max_pool": False}),
]  # fmt: skip
# what recipes that have changed since were then
BEFORE: dict[str, dict[str, Any]] = {
    "swin_nr_fpdls": {"schedule.step_epochs": [15, 30, 45, 60, 75, 90]},
    "vit_se": {"input.std": [0.25], "model.backbone.layer_norm_eps": 1e-12},
    "emotion_encoder": {"augment": Augment().model_dump(), "clip_grad_norm": 1.0},
    "vgg13_ferplus": {
        "input": Input(image_size=64, channels=1).model_dump(), "loss": CrossEntropy().model_dump(),
        "augment.scale": 0.05, "augment.stretch": 0.0, "augment.skew": 0.0,
    },
    **{key: {"input.std": [0.25]} for key in ("doe_tiny", "disentangled_doe_tiny", "emotion_encoder_tiny")},
    "efficientnet_lite0": {
        "epochs": 10, "batch_size": 64, "input.std": [0.25], "loss": CrossEntropy().model_dump(),
        "optimizer.lr": 0.001, "schedule": Cosine().model_dump(), "clip_grad_norm": 1.0, "ema_decay": None,
        "augment": Augment().model_dump(), "unmixed_epochs": 0,
    },
}  # fmt: skip
# what a run of format 1 kept and did not use
UNUSED: list[tuple[str, dict[str, Any]]] = [
    ("vgg13_small", {"loss_alpha": 0.4, "loss_gamma": 0.4, "momentum": 0.4, "step_epochs": [3], "step_factors": [0.4]}),
    ("vgg13_small", {"eval_batch_size": 3, "resources": {"device": "cpu", "workers": 3}}),
    ("vgg13_ferplus", {"min_lr_ratio": 0.4}),
    ("efficientnet_lite0", {"options.head_dropout": 0.4}),  # there is no hidden layer
    ("efficientnet_lite0", {"options.resizer_size": 3, "options.resizer_blocks": 3, "options.resizer_channels": 3}),
    ("efficientnet_lite0", {"options.resizer_scale": 0.4}),
]  # fmt: skip


def changed(tree: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A copy with other values at dotted paths."""
    tree = copy.deepcopy(tree)
    for path, value in values.items():
        *parts, last = path.split(".")
        place = tree
        for part in parts:
            place = place[part]
        place[last] = value
    return tree


@pytest.mark.parametrize("name", CONFIGS)
def test_each_key_of_format_1_decides_what_it_did(name: str) -> None:
    then = read(CONFIGS[name]).model_dump()
    for values, expected in [row[1:] for row in CHANGES if row[0] == name]:
        config = changed(CONFIGS[name], values)
        before = copy.deepcopy(config)
        assert read(config).model_dump() == changed(then, expected)
        assert config == before  # it is left as it was
    for values in [row[1] for row in UNUSED if row[0] == name]:
        assert read(changed(CONFIGS[name], values)).model_dump() == then


# What cannot be read


@pytest.mark.parametrize("found", [FORMAT + 1, "3", None])
def test_a_later_format_is_named(found: Any) -> None:
    assert refusal(read_run, {"format": found, "config": small_run().model_dump()}, "x/checkpoint.json") == (
        f"x/checkpoint.json: format {found} was written by a later version "
        f"(this one reads up to {FORMAT}); update the project"
    )


VGG_1 = CONFIGS["vgg13_small"]
BROKEN: dict[str, tuple[Any, str]] = {
    "no settings": ({}, "holds no settings of a run (KeyError: 'config')"),
    "null": (None, "holds no settings of a run"),
    "format 1 under the number 2": ({"format": 2, "config": VGG_1},
        "config.model: should be a table of keys, got 'vgg13'; its settings cannot be read"),
    "format 1 without a table": ({"config": {**VGG_1, "options": None}}, "holds no settings of a run (TypeError: "),
    "format 1 with a backbone that is gone": ({"config": changed(CONFIGS["efficientnet_lite0"],
        {"options.backbone": {"name": "convnextv2_tiny", "weights": None, "settings": {}}})},
        "config.model.backbone.name: unknown backbone 'convnextv2_tiny'; known: deit_base_patch16_224,"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_settings_are_one_line(case: str) -> None:
    content, message = BROKEN[case]
    assert refusal(read_run, content, "a/config.json").startswith(f"a/config.json: {message}")
