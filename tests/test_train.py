"""A run learns, stops where it must, and can be cut anywhere: what goes on is bit for bit the run that was not cut."""

import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from conftest import CPU, PEOPLE, RESNET, doe, emotion_encoder, make_data, small_run
from safetensors.torch import load_file
from torch import Tensor, nn

from fer import batches as batches_of
from fer import checkpoint, signals, train
from fer.batches import Feed, batches, seed_of, trained_images
from fer.data.dataset import DataSet, open_data
from fer.data.images import sha256
from fer.errors import UserError, disk_error
from fer.evaluate import evaluate, predict_split
from fer.input import Input
from fer.losses import build_loss
from fer.models.network import Network
from fer.models.vgg13 import Vgg13
from fer.optimizer import OPTIMIZERS, build_optimizer
from fer.resources import Resources
from fer.run import FORMAT, Run
from fer.schedule import lr_at
from fer.settings import Section
from fer.signals import Agreement, Sigterm, Stopped, Wish, ask_to_stop
from fer.step import Stepper
from fer.train import NonFiniteLoss, Trainer, fit

HERE = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]
TIMES = ("seconds", "images_per_second", "time")
SGD: dict[str, Any] = {"name": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 0.01}
PLAIN_SGD = SGD | {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0}
STILL = {"optimizer": SGD | {"lr": 1e-20, "weight_decay": 0.0}}  # nothing is learned
KINDS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "ema": {"ema_decay": 0.999},
    "sgd": {
        "optimizer": SGD, "balanced_sampling": 0.5,
        "schedule": {"name": "step", "warmup_epochs": 0, "step_epochs": [1, 2], "step_factors": [0.5, 0.1]},
    },
    "bf16 votes": {"precision": "bf16", "loss": {"name": "vote_sampling"}},
    "parts": {"ema_decay": 0.5},
    "sam mixed": {"sam_rho": 0.05, "augment": {"mixup": 0.4, "cutmix": 1.0}},
    "doe": doe(),
    "augmented doe with ema": doe(augment={}, ema_decay=0.8),
    "same subject": doe("same_subject", ema_decay=0.8),
    "emotion encoder": emotion_encoder(),
}  # fmt: skip
PARTS = Resources(device="cpu", accumulate=4)
FROZEN = {"doe": "backbone.", "augmented doe with ema": "backbone.", "emotion encoder": "identity."}


def resources_of(kind: str) -> Resources:
    return PARTS if kind == "parts" else CPU


def network_of(run: Run) -> Any:
    return train.build_model(run.model, run.input, 8)


def network_seeded(run: Run) -> dict[str, Tensor]:
    """The weights with which the run begins."""
    torch.manual_seed(run.seed)
    return network_of(run).state_dict()


def rate_at(run: Run, epoch: float) -> float:
    return lr_at(run.schedule, run.optimizer.lr, epoch, run.epochs)


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
    return make_data(tmp_path_factory.mktemp("bars") / "data", subjects=PEOPLE)


@pytest.fixture(scope="module")
def uncut(bars: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a whole run of each kind."""
    runs = tmp_path_factory.mktemp("uncut")
    return {kind: fit("x", small_run(**keys), resources_of(kind), bars, runs) for kind, keys in KINDS.items()}


def cut_after(epoch: int) -> Any:
    def on_epoch(row: dict[str, Any]) -> None:
        if row["epoch"] == epoch:
            raise Cut

    return on_epoch


def evaluated(run: Run, data: DataSet, folder: Path) -> dict[str, float]:
    """What the weights in `folder` make of val; the loss is what is expected of it."""
    model = network_of(run)
    checkpoint.load_weights(folder, model)
    counts = torch.bincount(data.split("train").labels)
    loss = build_loss(run.loss, run.class_weights, data.prior(), counts, expected=True)
    return predict_split(model, Feed(model, run, CPU, data.split("val"), data.classes, HERE), loss)[1].result()


# Learning


UNMOVED = {"rotation": 0, "flip": 0, "translation": 0, "scale": 0}


@pytest.mark.parametrize(
    ("keys", "accuracy"),
    [
        ({"epochs": 16, "augment": UNMOVED}, 0.8),
        (emotion_encoder(epochs=10, augment={}), 0.8),
        (doe(epochs=30, batch_size=8), 0.4),  # of random convolutions that do not learn
    ],
)
def test_bars_are_learned(keys: dict[str, Any], accuracy: float, bars: Path, tmp_path: Path) -> None:
    rows = rows_of(fit("x", small_run(**keys), CPU, bars, tmp_path))
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] * 0.6
    assert max(row["val_accuracy"] for row in rows) > accuracy  # chance: .125


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_what_is_promised(kind: str, uncut: dict[str, Path], bars: Path) -> None:
    folder = uncut[kind]
    run, data = small_run(**KINDS[kind]), open_data(bars)
    rows = rows_of(folder)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert re.fullmatch(r"x-s1111-[0-9a-f]{8}", folder.name)
    described = json.loads((folder / "config.json").read_text())
    assert described["run_id"] == folder.name
    assert (described["format"], described["name"]) == (FORMAT, "x")
    assert Run.model_validate(described["config"]) == run
    assert described["data_hash"] == data.hash
    assert described["classes"] == data.classes
    assert described["class_prior"] == data.summary["class_prior"]
    assert described["data"]["dataset"] == "bars"
    assert (described["made_by"]["device"], described["made_by"]["threads"]) == ("cpu", 1)
    assert Resources.model_validate(described.pop("resources")) == resources_of(kind)
    # of the weights' origin the checkpoints tell nothing: they hold the weights
    assert (described.pop("start"), set(described.pop("starts_from"))) == (None, {"random weights"})
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
    result = evaluated(small_run(**KINDS[kind]), open_data(bars), uncut[kind] / "best")
    assert result.keys() == {"accuracy", "balanced_accuracy", "macro_f1", "ece", "loss"}
    for key in result:
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
        fit("x", run, CPU, bars, tmp_path, cut_after(3))
    folder = fit("x", run, CPU, bars, tmp_path)
    assert checkpoint.load_meta(folder / "best")["epoch"] == 2
    assert [row["val_accuracy"] for row in rows_of(folder)] == [0.3, 0.6, 0.6, 0.5]


@pytest.mark.parametrize("images", [False, True], ids=["labels", "images too"])
def test_training_never_looks_at_test(
    images: bool, uncut: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other labels in test: the same run. Other images too: another file, so another id, and the same numbers."""
    data = make_data(tmp_path / "data", subjects=PEOPLE)
    path, pixels, summary = data / "splits" / "test.csv", data / "upscaled" / "images.npy", data / "splits/summary.json"
    table = pd.read_csv(path, keep_default_na=False)
    if images:
        others = np.load(pixels)
        others[table["row"]] = 0
        np.save(pixels, others)
        summary.write_text(json.dumps(json.loads(summary.read_text()) | {"images_sha256": sha256(pixels)}))
    table["label"] = 10**6
    table.to_csv(path, index=False)
    asked: set[str] = set()
    real = DataSet.split

    def split(self: DataSet, name: str) -> Any:
        asked.add(name)
        return real(self, name)

    monkeypatch.setattr(DataSet, "split", split)
    folder = fit("x", small_run(), CPU, data, tmp_path / "runs")
    assert asked == {"train", "val"}
    assert (folder.name != uncut["adamw"].name) == images
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
        fit("x", run, resources_of(kind), bars, tmp_path, cut_after(epoch))
    seen: list[int] = []
    torch.manual_seed(12345)  # what was drawn before is no matter
    folder = fit("x", run, resources_of(kind), bars, tmp_path, lambda row: seen.append(row["epoch"]))
    assert seen == list(range(epoch + 1, 4))
    assert_equal_runs(folder, uncut[kind])


def test_cut_again_and_again(bars: Path, tmp_path: Path, uncut: dict[str, Path]) -> None:
    for epoch in (1, 2, 3):
        with pytest.raises(Cut):
            fit("x", small_run(**KINDS["ema"]), CPU, bars, tmp_path, cut_after(epoch))
    folder = fit("x", small_run(**KINDS["ema"]), CPU, bars, tmp_path)
    assert_equal_runs(folder, uncut["ema"])


# Asked to stop in the middle of an epoch


def stop_where(patch: Any, stops: Any) -> None:
    """Trainers stop before the steps of which `stops(trainer)` says so."""
    real = Trainer.__init__

    def begin(trainer: Any, *arguments: Any) -> None:
        real(trainer, *arguments)
        trainer.wish = lambda: Wish.STOP if stops(trainer) else Wish.NONE

    patch.setattr(Trainer, "__init__", begin)


def stop_before(patch: pytest.MonkeyPatch, *places: tuple[int, int]) -> None:
    """Asked to stop before these (epoch, step), both counted from 0, each once."""
    left = list(places)

    def stops(trainer: Any) -> bool:
        if left and (trainer.epoch, trainer.step) == left[0]:
            left.pop(0)
            return True
        return False

    stop_where(patch, stops)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("epoch", "step"), [(0, 0), (0, 5), (1, 3)])
def test_stopped_in_an_epoch_and_resumed(
    kind: str,
    epoch: int,
    step: int,
    bars: Path,
    tmp_path: Path,
    uncut: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = small_run(**KINDS[kind])
    with monkeypatch.context() as patch:
        stop_before(patch, (epoch, step))
        with pytest.raises(Stopped) as caught:
            fit("x", run, resources_of(kind), bars, tmp_path)
    name = uncut[kind].name
    assert str(caught.value) == (
        f"{name}: stopped in epoch {epoch + 1} after {step} of 6 steps, as asked; the same command goes on"
    )
    assert len(rows_of(tmp_path / name)) == epoch
    steps: list[tuple[int, int]] = []
    real = Trainer._rate

    def rate(trainer: Any, step: int) -> float:
        steps.append((trainer.epoch, step))
        return real(trainer, step)

    monkeypatch.setattr(Trainer, "_rate", rate)
    torch.manual_seed(12345)  # what was drawn before is no matter
    folder = fit("x", run, resources_of(kind), bars, tmp_path)
    assert steps[0] == (epoch, step)  # no step is done again
    assert len(steps) == 18 - 6 * epoch - step
    assert_equal_runs(folder, uncut[kind])


def test_stopped_again_and_again(
    bars: Path, tmp_path: Path, uncut: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [(0, 1), (0, 2), (1, 5), (2, 0), (2, 5)]
    stop_before(monkeypatch, *places)
    for _ in places:
        with pytest.raises(Stopped):
            fit("x", small_run(**KINDS["sam mixed"]), CPU, bars, tmp_path)
    assert_equal_runs(fit("x", small_run(**KINDS["sam mixed"]), CPU, bars, tmp_path), uncut["sam mixed"])


@pytest.mark.parametrize("write", ["weights", "state", "json", "rename"])
def test_killed_while_it_stops(
    write: str, bars: Path, tmp_path: Path, uncut: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The epoch's own checkpoint is still there, or the new one is."""
    owner, name, call = {
        "weights": (Path, "write_bytes", 1), "state": (Path, "write_bytes", 2), "json": (checkpoint, "write_json", 1),
        "rename": (Path, "replace", 2),
    }[write]  # fmt: skip
    calls, real_stop, real = [-1000], Trainer._stop, getattr(owner, name)

    def stop(*arguments: Any) -> None:
        calls[0] = 0
        real_stop(*arguments)

    def killed(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise Cut
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        stop_before(patch, (1, 3))
        patch.setattr(Trainer, "_stop", stop)
        patch.setattr(owner, name, killed)
        patch.setattr(shutil, "rmtree", lambda *a, **k: None if calls[0] == call else REMOVE(*a, **k))
        with pytest.raises(Cut):
            fit("x", small_run(), CPU, bars, tmp_path)
    assert_equal_runs(fit("x", small_run(), CPU, bars, tmp_path), uncut["adamw"])


def test_a_file_stops_the_run_and_an_old_one_does_not(bars: Path, tmp_path: Path, uncut: dict[str, Path]) -> None:
    folder = tmp_path / uncut["adamw"].name
    folder.mkdir()
    (folder / "stop").touch()
    asked: list[int] = []
    ask_to_stop([folder, tmp_path / "none"], 0)  # nobody trains there
    asking = threading.Thread(target=ask_to_stop, args=([folder, tmp_path / "none"], 60))

    def on_epoch(row: dict[str, Any]) -> None:
        asked.append(row["epoch"])
        if row["epoch"] == 1:
            asking.start()
            time.sleep(1.1)

    with pytest.raises(Stopped, match="stopped in epoch 2 after 0 of 6 steps"):
        fit("x", small_run(), CPU, bars, tmp_path, on_epoch)
    assert asked == [1]
    asking.join(5)
    assert not asking.is_alive()
    assert not {"stop", "training"} & {path.name for path in folder.iterdir()}
    assert_equal_runs(fit("x", small_run(), CPU, bars, tmp_path), uncut["adamw"])


TERMINATED = """
import json, sys, torch
from pathlib import Path
from fer.resources import Resources
from fer.run import Run
from fer.signals import Stopped
from fer.train import fit
torch.set_num_threads(1)
try:
    fit("x", Run.model_validate_json(sys.argv[1]), Resources(device="cpu"), sys.argv[2], sys.argv[3])
except Stopped as stopped:
    print(stopped)
    sys.exit(3)
"""


@pytest.mark.slow
def test_terminated_at_any_time_it_saves_and_goes_on(bars: Path, tmp_path: Path) -> None:
    """SIGTERM to the process at several moments of a longer run, until one process ends it."""
    run = small_run(epochs=30, batch_size=4)
    whole = fit("x", run, CPU, bars, tmp_path / "whole")
    words = [sys.executable, "-c", TERMINATED, run.model_dump_json(), str(bars), str(tmp_path / "cut")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    progress = tmp_path / "cut" / whole.name / "progress.json"
    stops = 0
    for moment in (0.05, 0.3, 0.1, 0.7, None):
        before = progress.read_text() if progress.exists() else ""
        process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
        while moment and (not progress.exists() or progress.read_text() == before) and process.poll() is None:
            time.sleep(0.005)
        if moment:
            time.sleep(moment)
            process.terminate()
        said, _ = process.communicate()
        assert process.returncode in (0, 3), said
        stops += process.returncode == 3
        assert ("as asked; the same command goes on" in said) == (process.returncode == 3)
    assert stops >= 2
    assert_equal_runs(progress.parent, whole)


def test_a_run_in_a_thread_hears_of_sigterm_while_it_trains(bars: Path, tmp_path: Path, uncut: dict[str, Path]) -> None:
    """And what SIGTERM did before, it does before and after that."""
    heard: list[int] = []
    ours = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    trained, ended = threading.Event(), []

    def train_it() -> None:
        try:
            fit("x", small_run(), CPU, bars, tmp_path, lambda row: (trained.set(), time.sleep(1)))
        except Stopped as stopped:
            ended.append(stopped)

    try:
        Sigterm()
        thread = threading.Thread(target=train_it)
        thread.start()
        assert trained.wait(60)
        os.kill(os.getpid(), signal.SIGTERM)
        thread.join(60)
        assert (heard, [stopped.terminated for stopped in ended]) == ([], [True])
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, ours)
    assert_equal_runs(fit("x", small_run(), CPU, bars, tmp_path), uncut["adamw"])


# What writes while the second epoch, which is the best so far, is saved: best, then last, then metrics.jsonl
WRITES = [
    *[(Path, "write_bytes", call) for call in range(1, 7)],  # weights, training state, both checkpoint.json, rows
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
    real_save, real = train.Trainer._save, getattr(module, function)

    def save(trainer: Any, is_best: bool) -> None:
        saving[0] = trainer.epoch == 2
        real_save(trainer, is_best)
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
        patch.setattr(train.Trainer, "_save", save)
        patch.setattr(module, function, killed)
        # a killed process cleans nothing up
        patch.setattr(shutil, "rmtree", lambda *a, **k: None if count[0] == call else REMOVE(*a, **k))
        with pytest.raises(Cut):
            fit("x", small_run(), CPU, bars, tmp_path)
    seen: list[int] = []
    folder = fit("x", small_run(), CPU, bars, tmp_path, lambda row: seen.append(row["epoch"]))
    assert seen in ([2, 3], [3])  # the first epoch is not done again
    assert_equal_runs(folder, uncut["adamw"])


def curve(patch: pytest.MonkeyPatch, *values: float) -> None:
    """Val accuracies of the epochs, whatever the network finds."""
    real = Trainer.train_epoch
    given = iter(values)

    def train_epoch(trainer: Any) -> dict[str, Any]:
        row = real(trainer)
        row["val_accuracy"] = next(given)
        return row

    patch.setattr(Trainer, "train_epoch", train_epoch)


@pytest.mark.parametrize(
    ("patience", "values", "epochs"),
    [
        (None, [0.5, 0.4, 0.4, 0.4, 0.4], 5),
        (2, [0.5, 0.4, 0.4], 3),
        (2, [0.5, 0.4, 0.6, 0.6, 0.5], 5),  # equal is not better
        (1, [0.1, 0.2, 0.3, 0.2], 4),
        (1, [0.3, 0.1], 2),
        (9, [0.3, 0.1, 0.1, 0.1, 0.1], 5),
    ],
)
def test_patience_ends_a_run_that_gets_no_better(
    patience: int | None, values: list[float], epochs: int, bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small_run(epochs=5, patience=patience)
    with monkeypatch.context() as patch:
        curve(patch, *values)
        folder = fit("x", run, CPU, bars, tmp_path)
    assert len(rows_of(folder)) == epochs


def test_a_run_that_ended_early_is_finished_and_not_gone_on_with(bars: Path, tmp_path: Path) -> None:
    run = small_run(epochs=30, patience=1, optimizer={"lr": 1e-6})
    folder = fit("x", run, CPU, bars, tmp_path)
    rows = rows_of(folder)
    values = [row["val_accuracy"] for row in rows]
    assert len(rows) < 30
    assert values[-1] <= max(values[:-1])
    seen: list[dict] = []
    assert fit("x", run, CPU, bars, tmp_path, seen.append) == folder
    assert seen == []
    assert evaluate(folder, bars, CPU)["epochs"] == len(rows)


def test_a_finished_run_is_returned_as_it_is(bars: Path, tmp_path: Path, uncut: dict[str, Path]) -> None:
    shutil.copytree(uncut["adamw"], tmp_path / uncut["adamw"].name)
    before = (tmp_path / uncut["adamw"].name / "last" / "model.safetensors").stat().st_mtime_ns
    seen: list[dict] = []
    folder = fit("x", small_run(), CPU, bars, tmp_path, seen.append)
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
        fit("x", small_run(), CPU, bars, tmp_path)
        assert (folder / "metrics.jsonl").read_text() == "".join(lines)


def test_a_damaged_checkpoint_is_named_and_not_trained_over(bars: Path, tmp_path: Path, uncut: dict[str, Path]) -> None:
    folder = shutil.copytree(uncut["adamw"], tmp_path / uncut["adamw"].name)
    (folder / "last" / "training.pt").write_text("<html>")
    with pytest.raises(UserError, match=r"last/training\.pt: damaged"):
        fit("x", small_run(), CPU, bars, tmp_path)
    assert (folder / "last" / "training.pt").read_text() == "<html>"


# Formats


def keys_of(tree: Any) -> set[str]:
    """Of all tables in it."""
    if isinstance(tree, dict):
        return set(tree).union(*map(keys_of, tree.values()))
    return set().union(*map(keys_of, tree)) if isinstance(tree, list) else set()


@pytest.mark.parametrize("kind", ["adamw", "parts", "doe"])
def test_files_of_a_run_tell_format_and_maker_and_checkpoints_no_machine(kind: str, uncut: dict[str, Path]) -> None:
    config = json.loads((uncut[kind] / "config.json").read_text())
    for part in ("last", "best"):
        meta = checkpoint.load_meta(uncut[kind] / part)
        assert (meta["format"], meta["made_by"]) == (FORMAT, config["made_by"])
        assert meta.pop("made_by").keys() >= {"commit", "fer", "torch", "device", "cpu"}  # what was, not what is asked
        assert keys_of(meta) & {*Resources.model_fields, "resources"} == set()
        assert keys_of(meta) > {"config", "epoch", "history", "layers" if kind == "doe" else "width"}
    assert (config["format"], config["resources"]) == (FORMAT, resources_of(kind).model_dump())


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("other", [1, FORMAT + 1, None])
def test_a_run_of_another_format_is_refused_and_stays(
    other: int | None, bars: Path, tmp_path: Path, uncut: dict[str, Path]
) -> None:
    folder = shutil.copytree(uncut["adamw"], tmp_path / uncut["adamw"].name)
    path = folder / "last" / "checkpoint.json"
    meta = json.loads(path.read_text()) | {"epoch": 1, "format": other}
    if other is None:  # as the first one wrote it
        del meta["format"]
    path.write_text(json.dumps(meta))
    before = content_of(folder)
    with pytest.raises(UserError) as caught:
        fit("x", small_run(), CPU, bars, tmp_path)
    assert str(caught.value) == f"{folder}: was begun in format {other or 1}, not {FORMAT}; delete it to train anew"
    assert content_of(folder) == before


# A frozen encoder, and neutral faces to compare with


@pytest.mark.parametrize("kind", FROZEN)
def test_a_frozen_encoder_stays_as_it_was_to_the_last_bit(kind: str, uncut: dict[str, Path]) -> None:
    run = small_run(**KINDS[kind])
    torch.manual_seed(run.seed)
    before = network_of(run).state_dict()
    frozen = {name for name in before if name.startswith(FROZEN[kind])}
    assert len({name for name in frozen if name.endswith(("running_mean", "running_var"))}) > 20
    for part in ("best", "last"):
        after = load_file(uncut[kind] / part / "model.safetensors")
        same_as_before = {name for name in before if torch.equal(before[name], after[name])}
        assert same_as_before == frozen  # and everything else has changed: the other encoder's statistics too


@pytest.mark.parametrize("kind", ["doe", "augmented doe with ema"])
def test_references_are_chosen_once_and_kept(kind: str, uncut: dict[str, Path]) -> None:
    best, last = (load_file(uncut[kind] / part / "model.safetensors") for part in ("best", "last"))
    assert best["references"].shape == (3, 128)
    assert torch.equal(best["references"], last["references"])
    assert best["references"].std(0).max() > 1e-3


def test_no_face_of_a_person_is_kept_for_another(uncut: dict[str, Path]) -> None:
    assert load_file(uncut["same subject"] / "best" / "model.safetensors")["references"].shape == (0, 128)


def compared_with(references: int) -> dict[str, Any]:
    return doe()["model"] | {"pairing": {"name": "random_neutral", "references": references}}


def losses(keys: dict[str, Any], data: Path, runs: Path, part: str) -> list[float]:
    """Of three epochs in which nothing is learned."""
    return [row[f"{part}_loss"] for row in rows_of(fit("x", small_run(**keys, **STILL), CPU, data, runs))]


def test_training_draws_partners_anew_and_evaluation_does_not(bars: Path, tmp_path: Path) -> None:
    """All images are in every epoch, so only other partners change the mean loss."""
    for pairing in ("random_neutral", "same_subject"):
        found = losses(doe(pairing), bars, tmp_path, "train")
        assert min(abs(one - other) for one, other in zip(found, [*found[1:], found[0]])) > 1e-5
    constant = losses(doe("prototype"), bars, tmp_path, "train")
    assert constant == pytest.approx([constant[0]] * 3, abs=1e-6)
    for pairing in ("random_neutral", "same_subject", "prototype"):
        found = losses(doe(pairing), bars, tmp_path, "val")
        assert found == pytest.approx([found[0]] * 3, abs=1e-6)


def test_training_compares_with_partners_and_evaluation_with_references(bars: Path, tmp_path: Path) -> None:
    def with_references(count: int, part: str) -> list[float]:
        return losses(doe(model=compared_with(count)), bars, tmp_path, part)

    assert with_references(2, "train") == with_references(12, "train")
    assert with_references(2, "val")[0] != pytest.approx(with_references(12, "val")[0], abs=1e-5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (doe("same_subject"), r"^model\.pairing: same_subject needs data that name subjects; "),
        (doe(model=compared_with(13)), r"^model\.pairing\.references: 13 asked for, .* has 12 neutral"),
    ],
)
def test_neutral_faces_that_the_data_do_not_hold(
    keys: dict[str, Any], message: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        fit("x", small_run(**keys), CPU, data, tmp_path / "runs")


# A start from another run


@pytest.fixture
def first(bars: Path, uncut: dict[str, Path], tmp_path: Path) -> Path:
    """A finished run of an emotion encoder, beside which others may start."""
    return shutil.copytree(uncut["emotion encoder"], tmp_path / "runs" / uncut["emotion encoder"].name)


SECOND = doe(init_from="first", epochs=2)


def test_a_run_starts_from_the_best_backbone_of_another(first: Path, bars: Path) -> None:
    (first / "last" / "model.safetensors").unlink()  # those weights are not wanted
    found = fit("x", small_run(**SECOND), CPU, bars, first.parent, start=first.name)
    theirs = load_file(first / "best" / "model.safetensors")
    for part in ("best", "last"):
        ours = load_file(found / part / "model.safetensors")
        names = {name for name in ours if name.startswith("backbone.")}
        assert names == {name for name in theirs if name.startswith("backbone.")}
        assert [name for name in names if not torch.equal(ours[name], theirs[name])] == []
    described = json.loads((found / "config.json").read_text())
    assert (described["start"], described["starts_from"]) == (first.name, ["first"])


def test_the_head_of_the_other_run_is_not_taken(first: Path, bars: Path) -> None:
    """But that for its backbone, the run begins as one without a start."""
    run = small_run(**SECOND, **STILL)
    found = load_file(fit("x", run, CPU, bars, first.parent, start=first.name) / "last" / "model.safetensors")
    torch.manual_seed(run.seed)
    fresh = network_of(run).state_dict()
    for name in ("head.0.weight", "head.2.bias"):
        torch.testing.assert_close(found[name], fresh[name], atol=1e-10, rtol=0)


def test_a_learning_backbone_may_start_from_a_frozen_one(first: Path, bars: Path) -> None:
    second = fit("x", small_run(**SECOND), CPU, bars, first.parent, start=first.name)
    run = small_run(**emotion_encoder(init_from="second", epochs=1), **STILL)
    third = fit("y", run, CPU, bars, first.parent, start=second.name)
    theirs, ours = (load_file(folder / "best" / "model.safetensors") for folder in (second, third))
    learned = {name for name in theirs if name.startswith("backbone.") and name.endswith("weight")}
    for name in learned:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-10, rtol=0)


def test_the_run_it_starts_from_is_part_of_its_id(first: Path, bars: Path) -> None:
    shutil.copytree(first, first.with_name("other"))
    folders = [fit("x", small_run(**SECOND), CPU, bars, first.parent, start=start) for start in (first.name, "other")]
    assert folders[0] != folders[1]
    alone = fit("x", small_run(**SECOND | {"init_from": None}), CPU, bars, first.parent)
    assert alone not in folders
    # the same backbone twice, and another one
    weights = [load_file(folder / "last" / "model.safetensors") for folder in (*folders, alone)]
    name = "head.0.weight"
    assert torch.equal(weights[0][name], weights[1][name])
    assert not torch.equal(weights[0][name], weights[2][name])


def test_resuming_does_not_need_the_run_it_started_from(first: Path, bars: Path, tmp_path: Path) -> None:
    run = small_run(**SECOND | {"epochs": 3})
    whole = shutil.move(fit("x", run, CPU, bars, first.parent, start=first.name), tmp_path / "whole")
    with pytest.raises(Cut):
        fit("x", run, CPU, bars, first.parent, cut_after(1), start=first.name)
    shutil.rmtree(first)
    assert_equal_runs(fit("x", run, CPU, bars, first.parent, start=first.name), whole)


def test_a_start_that_is_not_there(bars: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        fit("x", small_run(**SECOND), CPU, bars, tmp_path, start="y-s1-00000000")
    assert str(caught.value) == (
        f"{tmp_path}/y-s1-00000000/last: no checkpoint there (checkpoint.json is missing); train the run first"
    )


def test_a_start_that_is_not_finished(bars: Path, tmp_path: Path) -> None:
    with pytest.raises(Cut):
        fit("first", small_run(**KINDS["emotion encoder"]), CPU, bars, tmp_path, cut_after(2))
    (first,) = tmp_path.iterdir()
    with pytest.raises(UserError) as caught:
        fit("x", small_run(**SECOND), CPU, bars, tmp_path, start=first.name)
    assert str(caught.value) == f"{first}: 2 of 3 epochs are done; go on with `fer train first`"


@pytest.mark.parametrize(
    "backbone",
    [RESNET | {"width": 8}, {"name": "mobilenet_v3_large", "weights": None}],
    ids=["wider", "of another name"],
)
def test_a_start_with_another_backbone(backbone: dict[str, Any], first: Path, bars: Path) -> None:
    run = small_run(**SECOND | {"model": doe()["model"] | {"backbone": backbone}})
    with pytest.raises(UserError) as caught:
        fit("x", run, CPU, bars, first.parent, start=first.name)
    assert str(caught.value) == (
        "init_from: first has another backbone (resnet50); give both the same name and settings"
    )
    assert list(first.parent.glob("*/last")) == [first / "last"]


def test_a_start_without_a_backbone(bars: Path, uncut: dict[str, Path], tmp_path: Path) -> None:
    start = shutil.copytree(uncut["adamw"], tmp_path / uncut["adamw"].name)
    with pytest.raises(UserError, match="^init_from: first has no backbone; set it to null$"):
        fit("y", small_run(**SECOND), CPU, bars, tmp_path, start=start.name)


def test_where_the_weights_of_a_start_came_from_is_no_matter(first: Path, bars: Path) -> None:
    """Of a backbone only the network has to be the same."""
    path = first / "best" / "checkpoint.json"
    meta = json.loads(path.read_text())
    meta["config"]["model"]["backbone"]["weights"] = "weights/of_somebody.safetensors"
    path.write_text(json.dumps(meta))
    fit("x", small_run(**SECOND), CPU, bars, first.parent, start=first.name)


@pytest.mark.parametrize(("init_from", "start"), [("first", None), (None, "y-s1-00000000")])
def test_a_start_is_named_and_given_or_neither(
    init_from: str | None, start: str | None, bars: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"^x: init_from is {init_from}, the run to start from {start}; give both or"):
        fit("x", small_run(**SECOND | {"init_from": init_from}), CPU, bars, tmp_path, start=start)
    assert list(tmp_path.iterdir()) == []


# Numbers that are none


def planted(monkeypatch: pytest.MonkeyPatch, at: int, value: float = float("nan")) -> None:
    """The loss becomes `value` in call number `at` (the first is 0) in training mode."""
    calls = [0]

    def build(*arguments: Any, **named: Any) -> Any:
        real = build_loss(*arguments, **named)

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
            fit("x", run, CPU, bars, tmp_path)
    folder = tmp_path / uncut["adamw"].name
    rate = rate_at(run, 1 + 2.5 / 6)
    assert str(caught.value) == (
        f"{folder.name}: loss is {value} in epoch 2, step 3 (lr {rate:.3g}); "
        "lower optimizer.lr, set clip_grad_norm, or use precision fp32"
    )
    assert isinstance(caught.value, UserError)
    assert checkpoint.load_meta(folder / "last")["epoch"] == 1
    assert [row["epoch"] for row in rows_of(folder)] == [1]
    fit("x", run, CPU, bars, tmp_path)
    assert_equal_runs(folder, uncut["adamw"])


def test_a_far_too_large_rate_stops_the_run(bars: Path, tmp_path: Path) -> None:
    model = {"batch_norm": False, "conv_dropout": 0.0, "dense_dropout": 0.0}
    run = small_run(optimizer=SGD | {"lr": 1e30}, clip_grad_norm=None, model=model)
    with pytest.raises(NonFiniteLoss, match=r"^x-s1111-.{8}: loss is (nan|inf) in epoch 1, step 2 \(lr .*e\+2\d\); "):
        fit("x", run, CPU, bars, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert not (folder / "last").exists()


def test_weights_spoilt_by_the_last_step_are_not_saved(
    bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [0]
    real = Stepper.update

    def update(stepper: Any) -> None:
        real(stepper)
        steps[0] += 1
        if steps[0] == 12:
            next(stepper.model.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(Stepper, "update", update)
    run = small_run()
    with pytest.raises(NonFiniteLoss) as caught:
        fit("x", run, CPU, bars, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert str(caught.value) == (
        f"{folder.name}: val loss is nan after epoch 2 (lr {rate_at(run, 1 + 5.5 / 6):.3g}); "
        "lower optimizer.lr, set clip_grad_norm, or use precision fp32"
    )
    assert checkpoint.load_meta(folder / "last")["epoch"] == 1


def test_a_late_look_names_the_step_that_went_wrong() -> None:
    run = small_run(epochs=3)
    trainer: Any = SimpleNamespace(run=run, world=1, epoch=0, step=10, steps=10, folder=Path("x"))
    trainer._rate = lambda step: Trainer._rate(trainer, step)
    losses = [torch.tensor(value) for value in (1.0, float("inf"), float("nan"), 2.0)]
    with pytest.raises(NonFiniteLoss) as caught:
        Trainer._check_finite(trainer, losses)
    # the four losses are those of steps 7 to 10, counted from 1
    assert str(caught.value).startswith(f"x: loss is inf in epoch 1, step 8 (lr {rate_at(run, 0.75):.3g}); ")
    fine = [torch.tensor(1.0)]
    Trainer._check_finite(trainer, fine)
    assert fine == []


# Rate, optimizer, batches


def test_the_rate_of_each_epochs_last_step_is_recorded(bars: Path, tmp_path: Path) -> None:
    schedule = {"name": "step", "warmup_epochs": 1, "step_epochs": [2, 3], "step_factors": [0.5, 0.1]}
    run = small_run(epochs=4, schedule=schedule)
    rows = rows_of(fit("x", run, CPU, bars, tmp_path))
    # warm-up ends at .01: the middle of the last of 6 steps is 11/12 of it; then 1, .5 and .1 times .01
    assert [row["lr"] for row in rows] == pytest.approx([0.01 * 11 / 12, 0.01, 0.005, 0.001])


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_weight_decay_is_for_matrices_and_kernels(optimizer: str) -> None:
    momentum = {"momentum": 0.7} if optimizer == "sgd" else {}
    settings = OPTIMIZERS[optimizer](lr=0.02, weight_decay=0.3, **momentum)
    model = network_of(small_run())
    model.get_parameter("classifier.0.weight").requires_grad = False
    found = build_optimizer(settings, model)
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


class Tokens(nn.Module):
    """What transformers hold beside layers, of as many dimensions as kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Parameter(torch.ones(1, 1, 4)), nn.Parameter(torch.ones(1, 5, 4))
        self.table, self.norm = nn.Embedding(7, 4), nn.LayerNorm([3, 4])
        self.layer, self.kernel = nn.Linear(4, 4), nn.Conv1d(4, 4, 3)
        self.last = nn.Linear(4, 4, bias=False)


def test_tokens_positions_and_tables_do_not_decay() -> None:
    model = Tokens()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, plain = build_optimizer(small_run(optimizer={"weight_decay": 0.3}).optimizer, model).param_groups
    assert {names[id(parameter)] for parameter in decayed["params"]} == {"layer.weight", "kernel.weight", "last.weight"}
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)


def test_gradients_are_clipped_to_the_norm() -> None:
    run = small_run(clip_grad_norm=0.5, optimizer=PLAIN_SGD)
    model = nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    stepper = Stepper(run, model, HERE)
    model(torch.tensor([[30.0, 40.0]])).sum().backward()
    stepper.update()
    # a gradient of (30, 40), norm 50, becomes (.3, .4)
    torch.testing.assert_close(before - model.weight.detach(), torch.tensor([[0.3, 0.4]]), atol=1e-5, rtol=0)


def averages(decay: float, steps: int, resumed: int | None = None) -> list[float]:
    """The averaged weight after each step, where the weight itself is 9, 8, 7, ...; from a saved state after one."""
    run = small_run(ema_decay=decay, optimizer=PLAIN_SGD, clip_grad_norm=None)
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 10.0)
    stepper = Stepper(run, model, HERE)
    found = []
    for step in range(steps):
        if step == resumed:
            buffer = io.BytesIO()
            torch.save(stepper.state(), buffer)
            again = nn.Linear(1, 1, bias=False)
            again.load_state_dict(model.state_dict())
            model, stepper = again, Stepper(run, again, HERE)
            stepper.load_state(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
        stepper.optimizer.zero_grad()
        model(torch.ones(1, 1)).sum().backward()  # a gradient of 1
        stepper.update()
        found.append(float(stepper.evaluated.get_parameter("weight").detach()))
    return found


def test_averaged_weights_follow_with_their_decay_which_grows() -> None:
    # the first are the weights themselves; then min(d, (1 + t) / (10 + t)), t = 1, 2, ..., of the average is kept
    second = 2 / 11 * 9 + 9 / 11 * 8
    third = 3 / 12 * second + 9 / 12 * 7
    fourth = 4 / 13 * third + 9 / 13 * 6
    assert averages(0.999, 4) == pytest.approx([9.0, second, third, fourth])
    low = 0.2 * second + 0.8 * 7
    assert averages(0.2, 4) == pytest.approx([9.0, second, low, 0.2 * low + 0.8 * 6])


def test_averaged_weights_keep_their_whole_decay_in_the_end() -> None:
    """.8 is reached with t = 35."""
    found = averages(0.8, 40)
    for t in range(1, 40):
        kept = (1 + t) / (10 + t) if t < 35 else 0.8
        assert found[t] == pytest.approx(kept * found[t - 1] + (1 - kept) * (9 - t), abs=1e-4), t


@pytest.mark.parametrize("decay", [0.999, 0.5])
@pytest.mark.parametrize("resumed", [1, 2, 8, 15])
def test_averaging_goes_on_where_it_was(decay: float, resumed: int) -> None:
    assert averages(decay, 20, resumed) == averages(decay, 20)


def test_a_slow_average_ends_near_the_weights(bars: Path, tmp_path: Path) -> None:
    """In 96 steps a constant decay of .999 would leave it at its random start, of which it would keep 91 %."""
    keys = {"epochs": 16, "augment": UNMOVED}
    alone, averaged = (fit("x", small_run(**keys, ema_decay=ema), CPU, bars, tmp_path) for ema in (None, 0.999))
    one, other = (rows_of(folder)[-1] for folder in (alone, averaged))
    assert other["train_loss"] == one["train_loss"]  # what is trained is the same
    assert min(one["val_accuracy"], other["val_accuracy"]) > 0.8
    assert other["val_loss"] < one["val_loss"] + 0.2
    state = checkpoint.load_training(averaged / "last")["stepper"]["ema"]
    assert int(state["n_averaged"]) == 96
    trained = load_file(averaged / "last" / "model.safetensors")
    fresh = network_seeded(small_run())
    names = [name for name, tensor in trained.items() if tensor.ndim > 1]
    assert len(names) == 13
    away, moved = (
        sum(float((trained[name] - base(name)).square().sum()) for name in names) ** 0.5
        for base in (lambda name: state[f"module.{name}"], lambda name: fresh[name])
    )
    assert away < moved / 4


@pytest.mark.parametrize("world", [1, 2, 4])
def test_batches_share_the_images(world: int) -> None:
    run = small_run(batch_size=16)
    images = 16 * 3 + 5
    labels = torch.arange(images) % 8
    parts = [list(batches(run, labels, 1, rank, world)) for rank in range(world)]
    assert {len(part) for part in parts} == {3}  # the last five images wait for another epoch
    for step in range(3):
        shares = [part[step] for part in parts]
        whole = np.concatenate([index for index, _ in shares])
        assert {len(index) for index, _ in shares} == {16 // world}
        assert [part for _, part in shares] == [slice(i * 16 // world, (i + 1) * 16 // world) for i in range(world)]
        alone = list(batches(small_run(batch_size=16), labels, 1, 0, 1))[step][0]
        assert whole.tolist() == alone.tolist()
    seen = np.concatenate([index for part in parts for index, _ in part])
    assert len(set(seen.tolist())) == len(seen) == 48
    assert seen.max() < images


def order_of(run: Run, labels: Tensor, epoch: int) -> list[int]:
    return np.concatenate([index for index, _ in batches(run, labels, epoch, 0, 1)]).tolist()


def test_batches_are_shuffled_anew_by_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return order_of(small_run(seed=seed, batch_size=16), torch.arange(64) % 8, epoch)

    assert order(1, 1) == order(1, 1)
    assert len({tuple(order(*pair)) for pair in ((1, 1), (1, 2), (2, 1), (2, 2))}) == 4
    assert order(1, 1) != sorted(order(1, 1)) == list(range(64))


@pytest.mark.parametrize(("images", "workers", "trained"), [(53, 1, 48), (48, 2, 48), (10, 1, 10), (11, 4, 8)])
def test_images_of_an_epoch(images: int, workers: int, trained: int) -> None:
    run = small_run(batch_size=16)
    assert trained_images(16, images, workers) == trained
    labels = torch.zeros(images, dtype=torch.int64)
    found = [index for rank in range(workers) for index, _ in batches(run, labels, 0, rank, workers)]
    assert sum(map(len, found)) == trained


# Three classes of 900, 90 and 10 images; and one of none
UNEVEN = torch.tensor(np.random.default_rng(0).permutation([0] * 900 + [1] * 90 + [3] * 10))


@pytest.mark.parametrize(
    ("power", "shares"),
    [
        (1.0, [1 / 3, 1 / 3, 0, 1 / 3]),
        (0.5, [0.7034, 0.2224, 0, 0.0741]),  # as the roots 30, 9.487 and 3.162
        (0.0, [0.9, 0.09, 0, 0.01]),
    ],
)
def test_balanced_sampling_draws_the_classes_with_their_shares(power: float, shares: list[float]) -> None:
    run, epochs = small_run(balanced_sampling=power, batch_size=10), 20
    drawn = np.array([order_of(run, UNEVEN, epoch) for epoch in range(epochs)])
    assert drawn.shape == (epochs, 1000)
    wanted = np.array(shares)
    counts = np.bincount(UNEVEN[drawn.ravel()], minlength=4)
    error = np.sqrt(wanted * (1 - wanted) / drawn.size)
    np.testing.assert_array_less(abs(counts / drawn.size - wanted), 4 * error + 1e-4)
    # and within a class the images alike: those of the smallest
    rare = np.flatnonzero(UNEVEN == 3)
    share = shares[3] / len(rare)
    found = np.bincount(drawn.ravel(), minlength=1000)[rare] / drawn.size
    np.testing.assert_allclose(found, share, atol=4 * np.sqrt(share / drawn.size), rtol=0)


def test_without_balanced_sampling_every_image_comes_once() -> None:
    assert sorted(order_of(small_run(balanced_sampling=0.0, batch_size=10), UNEVEN, 3)) == list(range(1000))
    assert len(set(order_of(small_run(balanced_sampling=0.1, batch_size=10), UNEVEN, 3))) < 700  # 1 - 1/e of them


@pytest.mark.parametrize("world", [2, 4])
def test_balanced_batches_are_the_same_for_any_number_of_workers(world: int) -> None:
    run = small_run(balanced_sampling=1.0, batch_size=16)
    ranks = [list(batches(run, UNEVEN, 2, rank, world)) for rank in range(world)]
    whole = np.concatenate([index for step in zip(*ranks) for index, _ in step])
    assert whole.tolist() == order_of(run, UNEVEN, 2)


def test_balanced_batches_come_from_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return order_of(small_run(seed=seed, balanced_sampling=1.0), UNEVEN, epoch)

    assert order(1, 1) == order(1, 1)
    assert len({tuple(order(*pair)) for pair in ((1, 1), (1, 2), (2, 1), (2, 2))}) == 4


def test_a_batch_larger_than_the_data_is_one_step(bars: Path, tmp_path: Path) -> None:
    folder = fit("x", small_run(batch_size=512, epochs=2), CPU, bars, tmp_path)
    assert json.loads((folder / "progress.json").read_text()) == {"epoch": 1, "epochs": 2, "step": 1, "steps": 1}
    # the accuracy counts all 96 images
    accuracy = rows_of(folder)[0]["train_accuracy"] * 96
    assert accuracy == pytest.approx(round(accuracy))


def test_augmentation_is_drawn_anew_in_each_step(bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    real = batches_of.Augmenter.draw

    def draw(augmenter: Any, batch_size: int, seed: int) -> Tensor:
        seeds.append(seed)
        return real(augmenter, batch_size, seed)

    monkeypatch.setattr(batches_of.Augmenter, "draw", draw)
    for seed in (1, 2):
        fit("x", small_run(seed=seed), CPU, bars, tmp_path)
    assert len(seeds) == len(set(seeds)) == 2 * 3 * 6


def test_the_random_numbers_of_a_step_are_its_own() -> None:
    seeds = {seed_of(*place) for place in itertools.product(range(3), range(4), range(4), range(3))}
    assert len(seeds) == 144
    assert seed_of(1, 2, 0) == seed_of(1, 2, 0)


# What cannot start


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(bars: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        fit("x", small_run(), Resources(device="cuda"), bars, tmp_path)
    assert str(caught.value) == ("resources.device: cuda, but this machine has no usable GPU; set it to auto or cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("keys", "resources", "message"),
    [
        ({"batch_size": 15}, {"workers": 2}, "15 does not divide by resources.workers 2"),
        (
            {"batch_size": 18},
            {"workers": 2, "accumulate": 2},
            "18 does not divide by resources.workers 2 times resources.accumulate 2",
        ),
        (
            {"batch_size": 12, "augment": {"mixup": 0.2}},
            {"workers": 2, "accumulate": 2},
            "augment.mixup and augment.cutmix pair images, but 12 / 2 workers / 2 parts is odd",
        ),
        (
            {"batch_size": 5, "augment": {"cutmix": 1.0}},
            {},
            "augment.mixup and augment.cutmix pair images, but 5 / 1 workers / 1 parts is odd",
        ),
    ],
)
def test_a_batch_that_cannot_be_shared_out(
    keys: dict[str, Any], resources: dict[str, Any], message: str, bars: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        fit("x", small_run(**keys), Resources(device="cpu", **resources), bars, tmp_path)
    assert str(caught.value) == f"x: batch_size: {message}"
    assert list(tmp_path.iterdir()) == []


def test_odd_parts_are_fine_where_nothing_is_mixed(bars: Path, tmp_path: Path) -> None:
    fit("x", small_run(batch_size=15, epochs=1), Resources(device="cpu", accumulate=3), bars, tmp_path)


def test_batch_norm_over_several_workers_needs_gpus(
    bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, alone = small_run(epochs=1), Resources(device="cpu", sync_batch_norm=True)
    fit("x", run, alone, bars, tmp_path / "one")  # which has all images
    for name, value in {"is_initialized": True, "get_rank": 0, "get_world_size": 2, "barrier": None}.items():
        monkeypatch.setattr(dist, name, lambda value=value: value)
    with pytest.raises(UserError) as caught:
        fit("x", run, alone.model_copy(update={"workers": 2}), bars, tmp_path / "two")
    assert str(caught.value) == "resources.sync_batch_norm: works on GPUs only; set it to false"
    assert not list((tmp_path / "two").glob("*/last"))


def test_data_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"summary\.json: not found; make the data with `dvc repro`"):
        fit("x", small_run(), CPU, tmp_path / "data", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


# Agreement of several ranks, by clocks that are set by hand


def agreed(
    patch: pytest.MonkeyPatch, steps: int, seconds: list[float], wishes: Any = lambda rank, step: False
) -> tuple[list[int], list[int]]:
    """The steps at which the ranks asked each other, and those at which they were told to stop: the same on all.

    `seconds`: what a step takes on each rank.
    """
    meeting, here, told = (
        threading.Barrier(len(seconds), timeout=20),
        threading.local(),
        [torch.empty(2)] * len(seconds),
    )

    def all_reduce(found: Tensor, operation: Any, group: Any) -> None:
        assert (operation, group) == (dist.ReduceOp.MAX, "group")
        here.asked.append(here.step)
        told[here.rank] = found.clone()
        meeting.wait()
        found.copy_(torch.stack(told).amax(0))
        meeting.wait()

    def rank_of(rank: int) -> tuple[list[int], list[int]]:
        here.rank, here.clock, here.asked, stops = rank, 1000.0 * rank, [], []
        stop: Any = SimpleNamespace(wish=lambda: Wish.STOP if wishes(rank, here.step) else Wish.NONE)
        agree = Agreement("group", stop)
        for here.step in range(steps):
            if agree():
                stops.append(here.step)
            here.clock += seconds[rank]
        return here.asked, stops

    patch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: here.clock))
    patch.setattr(dist, "all_reduce", all_reduce)
    with ThreadPoolExecutor(len(seconds)) as pool:
        first, *others = pool.map(rank_of, range(len(seconds)))
    assert others == [first] * len(others)
    return first


@pytest.mark.parametrize("seconds", [[0.6, 0.6], [0.6, 0.01], [5.0, 5.0, 5.0]])
def test_slow_steps_are_asked_about_each(seconds: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    asked, stops = agreed(monkeypatch, 40, seconds)
    assert (asked[0], stops) == (0, [])
    assert set(np.diff(asked)) <= {1, 2}


@pytest.mark.parametrize(("seconds", "a_second"), [([0.01, 0.01], 100), ([0.001, 0.005], 200), ([0.25, 0.25], 4)])
def test_fast_steps_are_asked_about_once_a_second(
    seconds: list[float], a_second: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, stops = agreed(monkeypatch, 2000, seconds)
    assert (asked[0], stops) == (0, [])
    gaps = np.diff(asked)
    assert gaps.max() <= a_second * 1.05
    np.testing.assert_allclose(gaps[4:], a_second, rtol=0.05, atol=1)  # after some steps to get there


@pytest.mark.parametrize("seconds", [[0.6, 0.6], [0.01, 0.02, 0.01]])
def test_the_wish_of_one_rank_is_told_to_all_at_the_same_step(
    seconds: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, stops = agreed(monkeypatch, 400, seconds, lambda rank, step: rank == 1 and step >= 137)
    assert stops == [step for step in asked if step >= 137]
    assert (stops[0] - 137) * max(seconds) <= 1.1


# Two ranks


class PlainNetwork(Network):
    """No batch norm, no dropout: nothing that sees a part of the batch otherwise than the whole."""

    def __init__(self, settings: Input, num_labels: int):
        super().__init__()
        pixels = settings.channels * settings.image_size**2
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 32), nn.Tanh(), nn.Linear(32, num_labels))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.layers(pixel_values)


class Plain(Vgg13):
    """Stands for vgg13 in a run, and builds another network."""

    def build(self, settings: Input, num_labels: int, pretrained: bool) -> Any:
        return PlainNetwork(settings, num_labels)


class Normed(Vgg13):
    """With batch norm, whose statistics differ by rank."""

    def build(self, settings: Input, num_labels: int, pretrained: bool) -> Any:
        network = PlainNetwork(settings, num_labels)
        network.layers.insert(2, nn.BatchNorm1d(32))
        return network


def with_model(model: Section, **keys: Any) -> Run:
    return small_run(**keys).model_copy(update={"model": model})


TWO = Resources(device="cpu", workers=2)


def _rank(
    rank: int, port: int, settings: dict[str, Any], model: Section | None, resources: Resources, data: Path, runs: Path,
    spoilt: bool, stop: tuple[int, int] | None, asked: int | None, dies: str | None,
) -> None:  # fmt: skip
    run = Run.model_validate(settings)
    if model is not None:
        run = run.model_copy(update={"model": model})
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    rows: list[dict[str, Any]] = []
    if spoilt and rank == 1:
        train.build_loss = lambda *about, **named: lambda *batch: build_loss(*about)(*batch) * float("nan")
    if stop:
        stop_where(pytest.MonkeyPatch(), lambda trainer: (trainer.epoch, trainer.step) == stop)
    if asked == rank:
        looks = itertools.count()
        signals.StopSignal.wish = lambda stop: Wish(next(looks) > 0)  # type: ignore[method-assign]
    if dies == "in an epoch" and rank == 1:
        batches_of.draw_mixture = lambda *about: os._exit(1) if about[2] == seed_of(run.seed, 1, 3, 1) else None
    if dies == "between epochs" and rank == 1:
        train.predict_split = lambda *about: os._exit(1) if rows else predict_split(*about)
    if dies == "while it saves" and rank == 0:
        rename = Path.replace
        Path.replace = lambda path, target: (  # type: ignore[method-assign]
            os._exit(1) if rows and target.name == "last" else rename(path, target)
        )
    try:
        fit("x", run, resources, data, runs, rows.append)
    except (NonFiniteLoss, Stopped) as error:
        (runs / f"error{rank}.txt").write_text(str(error))
    (runs / f"rows{rank}.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def on_two_ranks(
    run: Run, data: Path, runs: Path, resources: Resources = TWO, spoilt: bool = False,
    stop: tuple[int, int] | None = None, asked: int | None = None, dies: str | None = None,
) -> Path:  # fmt: skip
    """The run's folder; what both ranks were told is equal."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    runs.mkdir(exist_ok=True)
    model = run.model if isinstance(run.model, Plain | Normed) else None
    about = port, run.model_dump(), model, resources, data, runs, spoilt, stop, asked, dies
    torch.multiprocessing.spawn(_rank, about, nprocs=2)
    first, second = (json.loads((runs / f"rows{rank}.json").read_text()) for rank in range(2))
    assert untimed(first) == untimed(second)
    return next(path for path in runs.iterdir() if path.is_dir())


VOTES = {"loss": {"name": "focal_pdls"}, "class_weights": 0.5, "balanced_sampling": 0.5}


@pytest.mark.slow
@pytest.mark.parametrize("run", [
    with_model(Plain(), **VOTES),
    small_run(**doe(augment={})),
    small_run(**doe("same_subject", ema_decay=0.8)),
], ids=["plain", "doe", "same subject"])  # fmt: skip
def test_two_ranks_are_one(run: Run, bars: Path, tmp_path: Path) -> None:
    alone = fit("x", run, CPU, bars, tmp_path / "one")
    folder = on_two_ranks(run, bars, tmp_path / "two")
    assert folder.name == alone.name
    rows = zip(untimed(rows_of(alone)), untimed(rows_of(folder)))
    for one, two in rows:
        assert one == pytest.approx(two, abs=1e-5)
    models = [network_of(run) for _ in range(2)]
    for path, model in zip((alone, folder), models):
        checkpoint.load_weights(path / "last", model)
    for one, two in zip(*(model.state_dict().values() for model in models)):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
    # what two ranks left, one goes on with
    assert fit("x", run, CPU, bars, tmp_path / "two") == folder


@pytest.mark.slow
@pytest.mark.parametrize("ema", [None, 0.8])
def test_two_ranks_evaluate_the_weights_they_save(ema: float | None, bars: Path, tmp_path: Path) -> None:
    run = with_model(Normed(), epochs=2, ema_decay=ema)
    folder = on_two_ranks(run, bars, tmp_path / "two")
    result = evaluated(run, open_data(bars), folder / "best")
    row = rows_of(folder)[checkpoint.load_meta(folder / "best")["epoch"] - 1]
    assert result == pytest.approx({key: row[f"val_{key}"] for key in result}, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("places", [[(0, 3)], [(0, 0), (1, 5)]])
def test_two_ranks_that_are_stopped_go_on_as_if_they_were_not(
    places: list[tuple[int, int]], bars: Path, tmp_path: Path
) -> None:
    """Bit for bit, with batch norm, whose statistics differ by rank."""
    run = with_model(Normed(), loss={"name": "vote_sampling"}, ema_decay=0.5)
    parts = Resources(device="cpu", workers=2, accumulate=2)
    whole = on_two_ranks(run, bars, tmp_path / "whole", parts)
    for place in places:
        assert on_two_ranks(run, bars, tmp_path / "cut", parts, stop=place).name == whole.name
    assert_equal_runs(on_two_ranks(run, bars, tmp_path / "cut", parts), whole)


@pytest.mark.slow
def test_a_rank_that_dies_at_any_moment_changes_nothing(bars: Path, tmp_path: Path) -> None:
    """Bit for bit, when both are started again."""
    run = with_model(Normed(), epochs=2, ema_decay=0.8)
    whole = on_two_ranks(run, bars, tmp_path / "whole")
    for moment in ("in an epoch", "between epochs", "while it saves"):
        with pytest.raises(torch.multiprocessing.ProcessExitedException):
            on_two_ranks(run, bars, tmp_path / moment, dies=moment)
        assert len(rows_of(tmp_path / moment / whole.name)) == 1, moment
        assert_equal_runs(on_two_ranks(run, bars, tmp_path / moment), whole)


@pytest.mark.slow
def test_both_ranks_stop_where_one_is_asked(bars: Path, tmp_path: Path) -> None:
    """Rank 1 alone is asked, after its first look: both stop at the next step where they agree."""
    run = with_model(Plain(), batch_size=4)
    folder = on_two_ranks(run, bars, tmp_path / "two", asked=1)
    texts = [(folder.parent / f"error{rank}.txt").read_text() for rank in range(2)]
    assert texts == [f"{folder.name}: stopped in epoch 1 after 1 of 24 steps, as asked; the same command goes on"] * 2


@pytest.mark.slow
def test_both_ranks_stop_at_the_step_where_one_finds_no_number(bars: Path, tmp_path: Path) -> None:
    runs = tmp_path / "two"
    folder = on_two_ranks(with_model(Plain()), bars, runs, spoilt=True)
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
            fit("x", small_run(), CPU, bars, small)
        assert "the disk is full: free some space and run the command again" in str(disk_error(caught.value, small))
        (folder,) = small.iterdir()
        assert sorted(path.name for path in folder.iterdir() if path.is_dir()) in ([], ["best"])
    finally:
        subprocess.run(["umount", small], check=True)
