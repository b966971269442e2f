"""Runs that earlier versions wrote are read as what they were; what no version wrote is refused in one line."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CPU, ROOT, make_data, small_run

from fer import checkpoint
from fer.data.dataset import open_data
from fer.errors import UserError
from fer.formats import format_of, read_run
from fer.predict import Predictor
from fer.run import FORMAT, Run, run_id
from fer.train import fit
from pipelines import experiments

FORMAT_1 = ROOT / "tests" / "golden" / "format1"
RUNS = sorted((FORMAT_1 / "runs").iterdir())
CONFIGS: dict[str, dict[str, Any]] = json.loads((FORMAT_1 / "configs.json").read_text())


def read(config: dict[str, Any]) -> Run:
    return read_run({"config": config}, "config.json")


# Format 1


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_checkpoint_of_format_1_gives_the_probabilities_of_then(run: Path) -> None:
    expected = json.loads((run / "expected.json").read_text())
    predictor = Predictor(run / "best", device="cpu")
    found = predictor.probabilities(np.array(expected["images"], np.uint8))
    np.testing.assert_allclose(found, np.array(expected["probabilities"]), atol=1e-6)
    assert np.ptp(found, axis=0).max() > 1e-3  # they depend on the image


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_of_format_1_are_those_of_the_experiment_today(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert read(CONFIGS[name]) == experiments.load([name], {})[name].run


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_files_of_a_run_of_format_1_agree(run: Path) -> None:
    files = [run / "config.json", run / "best" / "checkpoint.json"]
    contents = [json.loads(path.read_text()) for path in files]
    assert [format_of(content) for content in contents] == [1, 1]
    one, other = (read_run(content, path) for content, path in zip(contents, files))
    assert one == other


def test_all_models_and_parts_of_format_1_are_among_the_settings() -> None:
    runs = [read(config) for config in CONFIGS.values()]
    assert {run.model.name for run in runs} == {
        "classifier", "difference_of_embeddings", "emotion_encoder", "vgg13", "vit_se",
    }  # fmt: skip
    assert {run.optimizer.name for run in runs} == {"adam", "adamw", "sgd"}
    assert {run.schedule.name for run in runs} == {"constant", "cosine", "step"}


# experiment, other values of keys of format 1, what that changes today
CHANGES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("vgg13_small", {"seed": 3}, {"seed": 3}),
    ("vgg13_small", {"epochs": 3}, {"epochs": 3}),
    ("vgg13_small", {"batch_size": 3}, {"batch_size": 3}),
    ("vgg13_small", {"image_size": 32}, {"input.image_size": 32}),
    ("vgg13_small", {"channels": 3, "pixel_mean": [0.4, 0.4, 0.4], "pixel_std": [0.1, 0.2, 0.2]},
        {"input.channels": 3, "input.mean": [0.4], "input.std": [0.1, 0.2, 0.2]}),
    ("vgg13_small", {"pixel_mean": [0.4]}, {"input.mean": [0.4]}),
    ("vgg13_small", {"pixel_std": [0.4]}, {"input.std": [0.4]}),
    ("vgg13_small", {"class_weights": 0.4}, {"class_weights": 0.4}),
    ("vgg13_small", {"balanced_sampling": 0.4}, {"balanced_sampling": 0.4}),
    ("vgg13_small", {"clip_grad_norm": None}, {"clip_grad_norm": None}),
    ("vgg13_small", {"ema_decay": 0.9}, {"ema_decay": 0.9}),
    ("vgg13_small", {"sam_rho": 0.1}, {"sam_rho": 0.1}),
    ("vgg13_small", {"precision": "bf16"}, {"precision": "bf16"}),
    ("vgg13_small", {"lr": 0.4}, {"optimizer.lr": 0.4}),
    ("vgg13_small", {"weight_decay": 0.4}, {"optimizer.weight_decay": 0.4}),
    ("vgg13_small", {"min_lr_ratio": 0.4}, {"schedule.min_lr_ratio": 0.4}),
    ("vgg13_small", {"warmup_epochs": 0.5}, {"schedule.warmup_epochs": 0.5}),
    ("vgg13_small", {"options.width": 0.5}, {"model.width": 0.5}),
    ("vgg13_small", {"loss": "focal", "loss_gamma": 1.5}, {"loss": {"name": "focal", "gamma": 1.5}}),
    ("vgg13_small", {"loss": "pdls", "loss_alpha": 0.4}, {"loss": {"name": "pdls", "alpha": 0.4}}),
    ("vgg13_small", {"loss": "label_smoothing"}, {"loss": {"name": "label_smoothing", "alpha": 0.8}}),  # its own: .9
    ("vgg13_small", {"loss": "compensated_focal_pdls"}, {"loss": {"name": "compensated_focal_pdls", "alpha": 0.8}}),
    ("vgg13_small", {"loss": "focal_pdls"}, {"loss": {"name": "focal_pdls", "alpha": 0.8, "gamma": 2.0}}),
    *(
        ("vgg13_small", {"loss": loss}, {"loss": {"name": loss}})
        for loss in ("vote_cross_entropy", "vote_sampling", "multi_target")
    ),
    ("vgg13_ferplus", {"momentum": 0.4}, {"optimizer.momentum": 0.4}),
    ("vgg13_ferplus", {"step_epochs": [2, 3]}, {"schedule.step_epochs": [2, 3]}),
    ("vgg13_ferplus", {"step_factors": [0.2, 0.1]}, {"schedule.step_factors": [0.2, 0.1]}),
    ("swin_nr_fpdls", {"loss_alpha": 0.4}, {"loss.alpha": 0.4}),
    ("swin_nr_fpdls", {"loss_gamma": 0.4}, {"loss.gamma": 0.4}),
    ("swin_nr_fpdls", {"options.stn": False}, {"model.stn": False}),
    ("swin_nr_fpdls", {"options.resizer_blocks": 3}, {"model.resizer.blocks": 3}),
    ("swin_nr_fpdls", {"options.resizer_channels": 3}, {"model.resizer.channels": 3}),
    ("swin_nr_fpdls", {"options.resizer_scale": None}, {"model.resizer.scale": None}),
    ("swin_nr_fpdls", {"options.resizer": "bilinear"}, {"model.resizer": {"name": "bilinear", "size": 224}}),
    ("efficientnet_lite0", {"options.resizer": "bilinear", "options.resizer_size": 64},
        {"model.resizer": {"name": "bilinear", "size": 64}}),
    ("swin_nr_fpdls", {"options.resizer_size": 448, "image_size": 768},
        {"model.resizer.size": 448, "input.image_size": 768}),
    ("swin_nr_fpdls", {"options.head": [3]}, {"model.head": [3]}),
    ("swin_nr_fpdls", {"options.head_dropout": 0.4}, {"model.head_dropout": 0.4}),
    ("swin_nr_fpdls", {"options.backbone.weights": "a.pth"}, {"model.backbone.weights": "a.pth"}),
    ("swin_nr_fpdls", {"options.backbone.settings.drop_path_rate": 0.4}, {"model.backbone.drop_path_rate": 0.4}),
    ("vit_se", {"options.reduction": 3}, {"model.reduction": 3}),
    ("vit_se", {"options.gate": "sigmoid"}, {"model.gate": "sigmoid"}),
    ("doe", {"options.references": 3}, {"model.pairing.references": 3}),
    ("doe", {"options.pairing": "prototype"}, {"model.pairing": {"name": "prototype"}}),
    ("doe", {"options.pairing": "same_subject"}, {"model.pairing": {"name": "same_subject"}}),
    ("doe", {"options.hidden": [3]}, {"model.hidden": [3]}),
    ("emotion_encoder", {"options.identity.settings.max_pool": False}, {"model.identity.max_pool": False}),
    ("emotion_encoder", {"options.identity.weights": None}, {"model.identity.weights": None}),
    ("disentangled_doe", {"init_from": "other"}, {"init_from": "other"}),
    ("vgg13_small", {"optimizer": "adam"}, {"optimizer": {"name": "adam", "lr": 0.002, "weight_decay": 0.01}}),
    ("vgg13_small", {"optimizer": "sgd"},
        {"optimizer": {"name": "sgd", "lr": 0.002, "weight_decay": 0.01, "momentum": 0.9, "nesterov": False}}),
    ("vgg13_small", {"schedule": "constant"}, {"schedule": {"name": "constant", "warmup_epochs": 1.0}}),
    ("vgg13_small", {"schedule": "step"},
        {"schedule": {"name": "step", "warmup_epochs": 1.0, "step_epochs": [15], "step_factors": [0.25]}}),
    *(
        ("vgg13_small", {f"augment.{key}": 0.375}, {f"augment.{key}": 0.375})
        for key in CONFIGS["vgg13_small"]["augment"]
    ),
]  # fmt: skip
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


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: f"{change[0]}-{next(iter(change[1]))}")
def test_each_key_of_format_1_decides_what_it_did(change: tuple[str, dict[str, Any], dict[str, Any]]) -> None:
    name, values, expected = change
    config = changed(CONFIGS[name], values)
    assert config != CONFIGS[name]
    before = copy.deepcopy(config)
    assert read(config).model_dump() == changed(read(CONFIGS[name]).model_dump(), expected)
    assert config == before  # it is left as it was


@pytest.mark.parametrize("unused", UNUSED, ids=lambda unused: f"{unused[0]}-{next(iter(unused[1]))}")
def test_what_format_1_did_not_use_is_left_out(unused: tuple[str, dict[str, Any]]) -> None:
    name, values = unused
    config = changed(CONFIGS[name], values)
    assert config != CONFIGS[name]
    assert read(config) == read(CONFIGS[name])


def test_all_keys_of_format_1_are_covered() -> None:
    covered = {path.split(".")[0] for _, values, _ in CHANGES for path in values} | {"model"}
    covered |= {path for _, values in UNUSED for path in values if "." not in path}
    assert covered == set(CONFIGS["vgg13_small"])
    options = {path.split(".")[1] for _, values, _ in CHANGES for path in values if path.startswith("options.")}
    every = {key for config in CONFIGS.values() for key in config["options"]}
    assert every - options <= {"batch_norm", "conv_dropout", "dense_dropout"}  # as width


def test_a_run_of_format_1_is_trained_no_further(tmp_path: Path) -> None:
    data, run = make_data(tmp_path / "data"), small_run()
    folder = tmp_path / "runs" / run_id("x", run, open_data(data).hash)
    shutil.copytree(RUNS[0] / "best", folder / "last")
    with pytest.raises(UserError) as caught:
        fit("x", run, CPU, data, tmp_path / "runs")
    assert str(caught.value) == f"{folder}: was started in format 1, not {FORMAT}; delete it to train again"


# Today's


def test_a_run_of_today_is_read_from_its_files(tmp_path: Path) -> None:
    run = small_run(epochs=1, ema_decay=0.9, loss={"name": "focal", "gamma": 1})
    folder = fit("x", run, CPU, make_data(tmp_path / "data"), tmp_path / "runs")
    config = json.loads((folder / "config.json").read_text())
    for content in (config, checkpoint.load_meta(folder / "best"), checkpoint.load_meta(folder / "last")):
        assert content["format"] == format_of(content) == FORMAT
        assert read_run(content, folder) == run


# What cannot be read


@pytest.mark.parametrize("found", [FORMAT + 1, 99, "3", None, 2.5])
def test_a_later_format_is_named(found: Any) -> None:
    with pytest.raises(UserError) as caught:
        read_run({"format": found, "config": small_run().model_dump()}, "data/runs/x/best/checkpoint.json")
    assert str(caught.value) == (
        f"data/runs/x/best/checkpoint.json: format {found} was written by a later version "
        f"(this one reads up to {FORMAT}); update the project"
    )


GOOD = small_run().model_dump()
VGG_1 = CONFIGS["vgg13_small"]
BROKEN: dict[str, tuple[Any, str]] = {
    "no settings": ({}, "holds no settings of a run (KeyError: 'config')"),
    "a key is missing": ({"format": 2, "config": {key: value for key, value in GOOD.items() if key != "model"}},
        "config.model: missing; its settings cannot be read"),
    "format 1 under the number 2": ({"format": 2, "config": VGG_1},
        "config.model: should be a table of keys, got 'vgg13'; its settings cannot be read"),
    "format 1 without a key": ({"config": {key: value for key, value in VGG_1.items() if key != "image_size"}},
        "holds no settings of a run (KeyError: 'image_size')"),
    "format 1 without a table": ({"config": {**VGG_1, "options": None}}, "holds no settings of a run (TypeError: "),
    "format 1 with an unknown model": ({"config": {**VGG_1, "model": "resnet9000", "options": {}}},
        "config.model.name: unknown model 'resnet9000'; known: classifier, difference_of_embeddings,"),
    "format 1 with an unknown schedule": ({"config": {**VGG_1, "schedule": "linear"}},
        "holds no settings of a run (KeyError: 'linear')"),
    "format 1 with a backbone that is gone": ({"config": changed(CONFIGS["efficientnet_lite0"],
        {"options.backbone": {"name": "convnextv2_tiny", "weights": None, "settings": {}}})},
        "config.model.backbone.name: unknown backbone 'convnextv2_tiny'; known: deit_base_patch16_224,"),
    "null": (None, "holds no settings of a run"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_settings_are_one_line(case: str) -> None:
    content, message = BROKEN[case]
    with pytest.raises(UserError) as caught:
        read_run(content, "a/config.json")
    assert str(caught.value).startswith(f"a/config.json: {message}")
    assert "\n" not in str(caught.value)
