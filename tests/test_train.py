"""A run learns, stops where it must, and can be cut anywhere: what goes on is bit for bit the run that was not cut."""

import json
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from conftest import make_data, small_run
from torch import nn

from fer import checkpoint, train
from fer.config import RunConfig
from fer.data.dataset import DataSet, open_data
from fer.errors import UserError, disk_error
from fer.evaluate import predict_split
from fer.losses import build_loss
from fer.models import MODELS, Model
from fer.schedule import lr_at
from fer.train import NonFiniteLoss, batches, fit, trained_images

TIMES = ("seconds", "images_per_second", "time")
KINDS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "ema": {"ema_decay": 0.8},
    "sgd": {"optimizer": "sgd", "schedule": "step", "step_epochs": [1, 2], "step_factors": [0.5, 0.1]},
    "bf16 votes": {"precision": "bf16", "loss": "vote_sampling"},
}


class Cut(Exception):
    """The process is gone."""


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def flat(tree: Any) -> dict[str, Any]:
    """A nested state as path -> leaf."""
    if isinstance(tree, torch.Tensor) or not isinstance(tree, dict | list):
        return {"": tree}
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {f"{key}.{path}": leaf for key, value in pairs for path, leaf in flat(value).items()}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return one == other


def assert_equal_runs(one: Path, other: Path) -> None:
    """Bit-equal weights, optimizer and averaged state, and equal rows of metrics but for their times."""
    for part in ("last", "best"):
        first, second = ((folder / part / "model.safetensors").read_bytes() for folder in (one, other))
        assert first == second, part
        first_meta, second_meta = (checkpoint.load_meta(folder / part) for folder in (one, other))
        assert untimed(first_meta.pop("history")) == untimed(second_meta.pop("history"))
        assert first_meta == second_meta
    states = [flat(checkpoint.load_training(folder / "last")) for folder in (one, other)]
    assert states[0].keys() == states[1].keys()
    assert [path for path in states[0] if not same(states[0][path], states[1][path])] == []
    assert len(states[0]) > 20
    assert untimed(rows_of(one)) == untimed(rows_of(other))
    for folder in (one, other):
        left = sorted(path.name for path in folder.iterdir())
        assert left == ["best", "config.json", "last", "metrics.jsonl", "progress.json"]


@pytest.fixture(scope="module")
def bars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data that no test changes."""
    return make_data(tmp_path_factory.mktemp("bars") / "data")


@pytest.fixture(scope="module")
def uncut(bars: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a whole run of each kind."""
    runs = tmp_path_factory.mktemp("uncut")
    return {kind: fit("x", small_run(**settings), bars, runs) for kind, settings in KINDS.items()}


def cut_after(epoch: int) -> Any:
    def on_epoch(row: dict[str, Any]) -> None:
        if row["epoch"] == epoch:
            raise Cut

    return on_epoch


# Learning


def test_bars_are_learned(bars: Path, tmp_path: Path) -> None:
    folder = fit("x", small_run(epochs=12, augment={"rotation": 0, "flip": 0, "translation": 0}), bars, tmp_path)
    rows = rows_of(folder)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] / 2
    assert max(row["val_accuracy"] for row in rows) > 0.8  # chance: .125


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_what_is_promised(kind: str, uncut: dict[str, Path], bars: Path) -> None:
    folder = uncut[kind]
    run, data = small_run(**KINDS[kind]), open_data(bars)
    rows = rows_of(folder)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert re.fullmatch(r"x-s1111-[0-9a-f]{8}", folder.name)
    described = json.loads((folder / "config.json").read_text())
    assert described["run_id"] == folder.name
    assert RunConfig.model_validate(described["config"]) == run
    assert described["data_hash"] == data.hash
    assert described["classes"] == data.classes
    assert described["class_prior"] == data.summary["class_prior"]
    assert described["data"]["dataset"] == "bars"
    meta = checkpoint.load_meta(folder / "last")
    assert {key: meta[key] for key in described} == described
    assert meta["history"] == rows
    assert json.loads((folder / "progress.json").read_text()) == {"epoch": 2, "epochs": 3, "step": 6, "steps": 6}


@pytest.mark.parametrize("kind", KINDS)
def test_best_is_the_first_epoch_with_the_best_val_accuracy(kind: str, uncut: dict[str, Path], bars: Path) -> None:
    rows = rows_of(uncut[kind])
    accuracies = [row["val_accuracy"] for row in rows]
    meta = checkpoint.load_meta(uncut[kind] / "best")
    assert meta["epoch"] == 1 + accuracies.index(max(accuracies))
    # and the weights are those of that epoch (averaged, where the run averages)
    run, data = small_run(**KINDS[kind]), open_data(bars)
    model = train.build_model(run, 8)
    checkpoint.load_weights(uncut[kind] / "best", model)
    result = predict_split(model, run, data.split("val"), torch.device("cpu"))[1].result()
    for key in ("accuracy", "balanced_accuracy", "macro_f1", "ece"):
        assert result[key] == pytest.approx(rows[meta["epoch"] - 1][f"val_{key}"], abs=1e-9)


def test_best_stays_when_later_epochs_are_worse(bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = iter([0.3, 0.6, 0.6, 0.5])
    real = train.predict_split

    def predicted(*arguments: Any) -> Any:
        logits, counts = real(*arguments)
        result = counts.result() | {"accuracy": next(planned)}
        monkeypatch.setattr(counts, "result", lambda: result)
        return logits, counts

    monkeypatch.setattr(train, "predict_split", predicted)
    run = small_run(epochs=4)
    with pytest.raises(Cut):
        fit("x", run, bars, tmp_path, cut_after(3))
    folder = fit("x", run, bars, tmp_path)
    assert checkpoint.load_meta(folder / "best")["epoch"] == 2
    assert [row["val_accuracy"] for row in rows_of(folder)] == [0.3, 0.6, 0.6, 0.5]


def test_training_never_looks_at_test(data: Path, uncut: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Other labels and images in test: another run id, and the same numbers to the last bit."""
    path = data / "splits" / "test.csv"
    table = pd.read_csv(path, keep_default_na=False)
    images = np.load(data / "upscaled" / "images.npy")
    images[table["row"]] = 0
    np.save(data / "upscaled" / "images.npy", images)
    table["label"] = 10**6
    table.to_csv(path, index=False)
    asked: list[str] = []
    real = DataSet.split

    def split(self: DataSet, name: str) -> Any:
        asked.append(name)
        return real(self, name)

    monkeypatch.setattr(DataSet, "split", split)
    folder = fit("x", small_run(), data, data / "runs")
    assert asked == ["train", "val"]
    assert folder.name != uncut["adamw"].name
    assert untimed(rows_of(folder)) == untimed(rows_of(uncut["adamw"]))
    for part in ("last", "best"):
        first, second = ((run / part / "model.safetensors").read_bytes() for run in (folder, uncut["adamw"]))
        assert first == second


# Cut and resumed


@pytest.mark.parametrize("epoch", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_cut_after_an_epoch_and_resumed(
    kind: str, epoch: int, bars: Path, tmp_path: Path, uncut: dict[str, Path]
) -> None:
    run = small_run(**KINDS[kind])
    with pytest.raises(Cut):
        fit("x", run, bars, tmp_path, cut_after(epoch))
    seen: list[int] = []
    torch.manual_seed(12345)  # what was drawn before is no matter
    folder = fit("x", run, bars, tmp_path, lambda row: seen.append(row["epoch"]))
    assert seen == list(range(epoch + 1, 4))
    assert_equal_runs(folder, uncut[kind])


def test_cut_again_and_again(bars: Path, tmp_path: Path, uncut: dict[str, Path]) -> None:
    for epoch in (1, 2, 3):
        with pytest.raises(Cut):
            fit("x", small_run(**KINDS["ema"]), bars, tmp_path, cut_after(epoch))
    folder = fit("x", small_run(**KINDS["ema"]), bars, tmp_path)
    assert_equal_runs(folder, uncut["ema"])


# What writes while the second epoch, which is the best so far, is saved: best, then last, then metrics.jsonl
WRITES = [
    *[(Path, "write_bytes", call) for call in (1, 2, 3)],  # the weights of both, the training state
    *[(checkpoint, "write_json", call) for call in (1, 2)],
    *[(os, "replace", call) for call in (1, 2, 3)],  # the two checkpoint.json, metrics.jsonl
    *[(Path, "replace", call) for call in (1, 2, 3, 4)],  # two renames of each folder
]
REMOVE = shutil.rmtree


@pytest.mark.parametrize(("module", "function", "call"), WRITES)
def test_cut_while_the_second_epoch_is_saved(
    module: Any, function: str, call: int, bars: Path, tmp_path: Path, uncut: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The process dies at the n-th call of a function that writes, half-way through the file where it writes one."""
    saving, count = [False], [0]
    real_save, real = train._save, getattr(module, function)

    def save(state: Any, *others: Any) -> None:
        saving[0] = state.epoch == 2
        real_save(state, *others)
        saving[0] = False

    def killed(*arguments: Any, **named: Any) -> Any:
        count[0] += saving[0]
        if saving[0] and count[0] == call:
            if function == "write_bytes":
                with open(arguments[0], "wb") as file:
                    file.write(b"half")
            saving[0] = False
            raise Cut
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(train, "_save", save)
        patch.setattr(module, function, killed)
        # a killed process cleans nothing up
        patch.setattr(shutil, "rmtree", lambda *a, **k: None if count[0] == call else REMOVE(*a, **k))
        with pytest.raises(Cut):
            fit("x", small_run(), bars, tmp_path)
    seen: list[int] = []
    folder = fit("x", small_run(), bars, tmp_path, lambda row: seen.append(row["epoch"]))
    assert seen in ([2, 3], [3])  # the first epoch is not done again
    assert_equal_runs(folder, uncut["adamw"])


def test_a_finished_run_is_returned_as_it_is(bars: Path, tmp_path: Path, uncut: dict[str, Path]) -> None:
    shutil.copytree(uncut["adamw"], tmp_path / uncut["adamw"].name)
    before = (tmp_path / uncut["adamw"].name / "last" / "model.safetensors").stat().st_mtime_ns
    seen: list[dict] = []
    folder = fit("x", small_run(), bars, tmp_path, seen.append)
    assert folder == tmp_path / uncut["adamw"].name
    assert seen == []
    assert (folder / "last" / "model.safetensors").stat().st_mtime_ns == before
    assert_equal_runs(folder, uncut["adamw"])


def test_a_line_of_metrics_that_was_lost_or_doubled_is_mended(
    bars: Path, tmp_path: Path, uncut: dict[str, Path]
) -> None:
    folder = shutil.copytree(uncut["adamw"], tmp_path / uncut["adamw"].name)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    for damaged in (lines[:2], [*lines, lines[-1]], [*lines[:2], lines[2][:20]]):
        (folder / "metrics.jsonl").write_text("".join(damaged))
        fit("x", small_run(), bars, tmp_path)
        assert (folder / "metrics.jsonl").read_text() == "".join(lines)


def test_a_damaged_checkpoint_is_named_and_not_trained_over(bars: Path, tmp_path: Path, uncut: dict[str, Path]) -> None:
    folder = shutil.copytree(uncut["adamw"], tmp_path / uncut["adamw"].name)
    (folder / "last" / "training.pt").write_text("<html>")
    with pytest.raises(UserError, match=r"last/training\.pt: damaged"):
        fit("x", small_run(), bars, tmp_path)
    assert (folder / "last" / "training.pt").read_text() == "<html>"


# Numbers that are none


def planted(monkeypatch: pytest.MonkeyPatch, at: int, value: float = float("nan")) -> None:
    """The loss becomes `value` in call number `at` (the first is 0) in training mode."""
    calls = [0]

    def build(run: RunConfig, prior: torch.Tensor) -> Any:
        real = build_loss(run, prior)

        def loss(logits: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            found = real(logits, labels, targets)
            if torch.is_inference_mode_enabled():
                return found
            calls[0] += 1
            return found * value if calls[0] == at + 1 else found

        return loss

    monkeypatch.setattr(train, "build_loss", build)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run(
    value: float, bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uncut: dict[str, Path]
) -> None:
    run = small_run()
    with monkeypatch.context() as patch:
        planted(patch, at=6 + 2, value=value)  # 6 steps an epoch
        with pytest.raises(NonFiniteLoss) as caught:
            fit("x", run, bars, tmp_path)
    folder = tmp_path / uncut["adamw"].name
    rate = lr_at(run, 1 + 2.5 / 6)
    assert str(caught.value) == (
        f"{folder.name}: loss is {value} in epoch 2, step 3 (lr {rate:.3g}); "
        "lower lr, set clip_grad_norm, or use precision fp32"
    )
    assert isinstance(caught.value, UserError)
    assert checkpoint.load_meta(folder / "last")["epoch"] == 1
    assert [row["epoch"] for row in rows_of(folder)] == [1]
    fit("x", run, bars, tmp_path)
    assert_equal_runs(folder, uncut["adamw"])


def test_a_far_too_large_rate_stops_the_run(bars: Path, tmp_path: Path) -> None:
    run = small_run(lr=1e30, optimizer="sgd", clip_grad_norm=None, options={
        "width": 0.0625, "batch_norm": False, "conv_dropout": 0.0, "dense_dropout": 0.0
    })  # fmt: skip
    with pytest.raises(NonFiniteLoss, match=r"^x-s1111-.{8}: loss is (nan|inf) in epoch 1, step 2 \(lr .*e\+2\d\); "):
        fit("x", run, bars, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert not (folder / "last").exists()


def test_weights_spoilt_by_the_last_step_are_not_saved(
    bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [0]
    real = train._update

    def update(state: Any, *others: Any) -> None:
        real(state, *others)
        steps[0] += 1
        if steps[0] == 12:
            next(state.model.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(train, "_update", update)
    run = small_run()
    with pytest.raises(NonFiniteLoss) as caught:
        fit("x", run, bars, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert str(caught.value) == (
        f"{folder.name}: val loss is nan after epoch 2 (lr {lr_at(run, 1 + 5.5 / 6):.3g}); "
        "lower lr, set clip_grad_norm, or use precision fp32"
    )
    assert checkpoint.load_meta(folder / "last")["epoch"] == 1


def test_a_late_look_names_the_step_that_went_wrong() -> None:
    run = small_run(schedule="cosine", epochs=3)
    losses = [torch.tensor(value) for value in (1.0, float("inf"), float("nan"), 2.0)]
    with pytest.raises(NonFiniteLoss) as caught:
        train._check_finite(losses, 1, run, epoch=0, step=9, steps=10, name="x")
    # the four losses are those of steps 7 to 10, counted from 1
    assert str(caught.value).startswith(f"x: loss is inf in epoch 1, step 8 (lr {lr_at(run, 0.75):.3g}); ")
    fine = [torch.tensor(1.0)]
    train._check_finite(fine, 1, run, epoch=0, step=9, steps=10, name="x")
    assert fine == []


# Rate, optimizer, batches


def test_the_rate_of_each_epochs_last_step_is_recorded(bars: Path, tmp_path: Path) -> None:
    run = small_run(epochs=4, schedule="step", warmup_epochs=1, step_epochs=[2, 3], step_factors=[0.5, 0.1])
    rows = rows_of(fit("x", run, bars, tmp_path))
    # warm-up ends at .01: the middle of the last of 6 steps is 11/12 of it; then 1, .5 and .1 times .01
    assert [row["lr"] for row in rows] == pytest.approx([0.01 * 11 / 12, 0.01, 0.005, 0.001])


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_weight_decay_is_for_matrices_and_kernels(optimizer: str) -> None:
    run = small_run(optimizer=optimizer, weight_decay=0.3, momentum=0.7, lr=0.02)
    model = train.build_model(run, 8)
    model.get_parameter("classifier.0.weight").requires_grad = False
    found = train._optimizer(run, model)
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer]
    assert type(found) is kind
    decayed, plain = found.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert {group["lr"] for group in found.param_groups} == {0.02}
    if optimizer == "sgd":
        assert {group["momentum"] for group in found.param_groups} == {0.7}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    kernels = {f"{name}.weight" for name in layers} - {"classifier.0.weight"}
    assert {names[id(parameter)] for parameter in decayed["params"]} == kernels
    others = {name for name in names.values() if name.endswith("bias")}
    norms = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    assert {names[id(parameter)] for parameter in plain["params"]} == others | norms


def test_gradients_are_clipped_to_the_norm() -> None:
    run = small_run(clip_grad_norm=0.5, optimizer="sgd", momentum=0.0, weight_decay=0.0, lr=1.0)
    model = nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    state = train.State(model, train._optimizer(run, model), torch.amp.GradScaler("cpu", enabled=False), None)
    train._update(state, run, model(torch.tensor([[30.0, 40.0]])).sum())
    # a gradient of (30, 40), norm 50, becomes (.3, .4)
    torch.testing.assert_close(before - model.weight.detach(), torch.tensor([[0.3, 0.4]]), atol=1e-5, rtol=0)


def test_averaged_weights_follow_with_their_decay() -> None:
    run = small_run(ema_decay=0.9, optimizer="sgd", momentum=0.0, weight_decay=0.0, lr=1.0, clip_grad_norm=None)
    model = nn.Linear(1, 1, bias=False)
    average = train.AveragedModel(model, multi_avg_fn=train.get_ema_multi_avg_fn(0.9), use_buffers=True)
    state = train.State(model, train._optimizer(run, model), torch.amp.GradScaler("cpu", enabled=False), average)
    nn.init.constant_(model.weight, 10.0)
    weights = []
    for _ in range(3):
        train._update(state, run, model(torch.ones(1, 1)).sum())  # a gradient of 1: 9, 8, 7
        weights.append(float(state.evaluated.get_parameter("weight").detach()))
    assert weights == pytest.approx([9.0, 0.9 * 9 + 0.1 * 8, 0.9 * (0.9 * 9 + 0.1 * 8) + 0.1 * 7])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_batches_share_the_images(world: int) -> None:
    run = small_run(batch_size=16, resources={"workers": world})
    images = 16 * 3 + 5
    parts = [list(batches(run, images, 1, rank, world)) for rank in range(world)]
    assert {len(part) for part in parts} == {3}  # the last five images wait for another epoch
    for step in range(3):
        shares = [part[step] for part in parts]
        whole = np.concatenate([index for index, _ in shares])
        assert {len(index) for index, _ in shares} == {16 // world}
        assert [part for _, part in shares] == [slice(i * 16 // world, (i + 1) * 16 // world) for i in range(world)]
        alone = list(batches(small_run(batch_size=16), images, 1, 0, 1))[step][0]
        assert whole.tolist() == alone.tolist()
    seen = np.concatenate([index for part in parts for index, _ in part])
    assert len(set(seen.tolist())) == len(seen) == 48
    assert seen.max() < images


def test_batches_are_shuffled_anew_by_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        run = small_run(seed=seed, batch_size=16)
        return np.concatenate([index for index, _ in batches(run, 64, epoch, 0, 1)]).tolist()

    assert order(1, 1) == order(1, 1)
    assert len({tuple(order(*pair)) for pair in ((1, 1), (1, 2), (2, 1), (2, 2))}) == 4
    assert order(1, 1) != sorted(order(1, 1)) == list(range(64))


@pytest.mark.parametrize(("images", "workers", "trained"), [(53, 1, 48), (48, 2, 48), (10, 1, 10), (11, 4, 8)])
def test_images_of_an_epoch(images: int, workers: int, trained: int) -> None:
    run = small_run(batch_size=16, resources={"workers": workers})
    assert trained_images(run, images) == trained
    found = [index for rank in range(workers) for index, _ in batches(run, images, 0, rank, workers)]
    assert sum(map(len, found)) == trained


def test_a_batch_larger_than_the_data_is_one_step(bars: Path, tmp_path: Path) -> None:
    folder = fit("x", small_run(batch_size=512, epochs=2), bars, tmp_path)
    assert json.loads((folder / "progress.json").read_text()) == {"epoch": 1, "epochs": 2, "step": 1, "steps": 1}
    # the accuracy counts all 96 images
    accuracy = rows_of(folder)[0]["train_accuracy"] * 96
    assert accuracy == pytest.approx(round(accuracy))


def test_augmentation_is_drawn_anew_in_each_epoch(bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    real = train.Augmenter

    def augmenter(settings: Any, seed: int, device: torch.device) -> Any:
        seeds.append(seed)
        return real(settings, seed, device)

    monkeypatch.setattr(train, "Augmenter", augmenter)
    for seed in (1, 2):
        fit("x", small_run(seed=seed), bars, tmp_path)
    assert len(set(seeds)) == 6


def test_dropout_of_an_epoch_is_that_of_its_rank_and_epoch() -> None:
    seeds = {train._seed(seed, epoch, rank) for seed in range(3) for epoch in range(4) for rank in range(4)}
    assert len(seeds) == 48
    assert train._seed(1, 2, 0) == train._seed(1, 2, 0)


# What cannot start


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(bars: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        fit("x", small_run(resources={"device": "cuda"}), bars, tmp_path)
    assert str(caught.value) == ("resources.device: cuda, but this machine has no usable GPU; set it to auto or cpu")
    assert list(tmp_path.iterdir()) == []


def test_data_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"summary\.json: not found; make the data with `dvc repro`"):
        fit("x", small_run(), tmp_path / "data", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


# Two ranks


class Plain(nn.Module):
    """No batch norm, no dropout: nothing that sees a part of the batch otherwise than the whole."""

    def __init__(self, options: Any, num_labels: int, image_size: int, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(channels * image_size**2, 32), nn.Tanh(), nn.Linear(32, num_labels)
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.layers(pixel_values)


class Normed(Plain):
    """Batch norm, whose statistics differ by rank."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.layers.insert(2, nn.BatchNorm1d(32))


def add_models() -> None:
    for name, build in (("plain", Plain), ("normed", Normed)):
        MODELS[name] = Model(MODELS["vgg13"].options, build, lambda run, options: [])


@pytest.fixture
def more_models() -> Any:
    add_models()
    yield
    del MODELS["plain"], MODELS["normed"]


def _rank(rank: int, port: int, run: RunConfig, data: Path, runs: Path, spoilt: bool) -> None:
    torch.set_num_threads(1)
    add_models()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    rows: list[dict[str, Any]] = []
    if spoilt and rank == 1:
        train.build_loss = lambda run, prior: lambda *batch: build_loss(run, prior)(*batch) * float("nan")
    try:
        fit("x", run, data, runs, rows.append)
    except NonFiniteLoss as error:
        (runs / f"error{rank}.txt").write_text(str(error))
    (runs / f"rows{rank}.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def on_two_ranks(run: RunConfig, data: Path, runs: Path, spoilt: bool = False) -> Path:
    """The run's folder; what both ranks were told is equal."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    runs.mkdir()
    torch.multiprocessing.spawn(_rank, (port, run, data, runs, spoilt), nprocs=2)
    first, second = (json.loads((runs / f"rows{rank}.json").read_text()) for rank in range(2))
    assert untimed(first) == untimed(second)
    return next(path for path in runs.iterdir() if path.is_dir())


@pytest.mark.slow
def test_two_ranks_are_one(bars: Path, tmp_path: Path, more_models: None) -> None:
    alone = fit("x", small_run(model="plain", loss="focal_pdls"), bars, tmp_path / "one")
    run = small_run(model="plain", loss="focal_pdls", resources={"workers": 2})
    folder = on_two_ranks(run, bars, tmp_path / "two")
    assert folder.name == alone.name
    rows = zip(untimed(rows_of(alone)), untimed(rows_of(folder)))
    for one, two in rows:
        assert one == pytest.approx(two, abs=1e-5)
    models = [train.build_model(run, 8) for _ in range(2)]
    for path, model in zip((alone, folder), models):
        checkpoint.load_weights(path / "last", model)
    for one, two in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
    # what two ranks left, one goes on with
    assert fit("x", small_run(model="plain", loss="focal_pdls"), bars, tmp_path / "two") == folder


@pytest.mark.slow
@pytest.mark.parametrize("ema", [None, 0.8])
def test_two_ranks_evaluate_the_weights_they_save(
    ema: float | None, bars: Path, tmp_path: Path, more_models: None
) -> None:
    run = small_run(model="normed", epochs=2, ema_decay=ema, resources={"workers": 2})
    folder = on_two_ranks(run, bars, tmp_path / "two")
    model, data = train.build_model(run, 8), open_data(bars)
    checkpoint.load_weights(folder / "best", model)
    val, loss = data.split("val"), build_loss(run, data.prior())
    result = predict_split(model, run, val, torch.device("cpu"), loss)[1].result()
    row = rows_of(folder)[checkpoint.load_meta(folder / "best")["epoch"] - 1]
    assert result == pytest.approx({key: row[f"val_{key}"] for key in result}, abs=1e-6)


@pytest.mark.slow
def test_both_ranks_stop_at_the_step_where_one_finds_no_number(bars: Path, tmp_path: Path, more_models: None) -> None:
    runs = tmp_path / "two"
    folder = on_two_ranks(small_run(model="plain", resources={"workers": 2}), bars, runs, spoilt=True)
    texts = [(runs / f"error{rank}.txt").read_text() for rank in range(2)]
    assert texts[0] == texts[1]
    assert texts[0].startswith(f"{folder.name}: loss is nan in epoch 1, step 1 (lr ")
    assert not (folder / "last").exists()


@pytest.mark.slow
def test_a_full_disk_is_told_from_damage_and_leaves_no_half_checkpoint(bars: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", small], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    try:
        with pytest.raises(OSError, match="No space left") as caught:
            fit("x", small_run(), bars, small)
        assert "the disk is full: free some space and run the command again" in str(disk_error(caught.value, small))
        (folder,) = small.iterdir()
        assert sorted(path.name for path in folder.iterdir() if path.is_dir()) in ([], ["best"])
    finally:
        subprocess.run(["umount", small], check=True)
