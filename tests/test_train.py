"""A run learns, stops where it must, and can be cut anywhere: resumed, it equals the uncut run bit for bit."""

import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import CPU, PEOPLE, doe, emotion_encoder, free_port, make_data, small_run
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from fer import checkpoint, signals, train
from fer.batches import Feed, batches, trained_images
from fer.data.augment import Augmenter
from fer.data.dataset import DataSet, open_data
from fer.errors import UserError
from fer.evaluate import evaluate, predict_split
from fer.losses import build_loss
from fer.models import build_model
from fer.resources import Resources
from fer.run import FORMAT, Run, run_id
from fer.schedule import lr_at
from fer.signals import Agreement, Request, Sigterm, Stopped, ask_to_stop
from fer.step import Stepper
from fer.train import NonFiniteLoss, fit

HERE = torch.device("cpu")
STEPS = 6  # of an epoch of the small run
TIMES = ("seconds", "images_per_second", "time")
SGD: dict[str, Any] = {"name": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 0.01}
STILL = {"optimizer": SGD | {"lr": 1e-20, "weight_decay": 0.0}}  # nothing is learned
UNMOVED = {"rotation": 0, "flip": 0, "translation": 0, "scale": 0}
KINDS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {
        "optimizer": SGD, "balanced_sampling": 0.5,
        "schedule": {"name": "step", "warmup_epochs": 0, "step_epochs": [1, 2], "step_factors": [0.5, 0.1]},
    },
    "bf16 votes": {"precision": "bf16", "loss": {"name": "vote_sampling"}},
    "parts": {"ema_decay": 0.5},
    "sam mixed": {"sam_rho": 0.05, "augment": {"mixup": 0.4, "cutmix": 1.0}},
    "doe": doe(),
    "augmented doe with ema": doe(augment={}, ema_decay=0.8),
    "same subject": doe("same_subject"),
    "emotion encoder": emotion_encoder(),
}  # fmt: skip
PARTS = Resources(device="cpu", accumulate=4)
FROZEN = {"doe": "backbone.", "augmented doe with ema": "backbone.", "emotion encoder": "identity."}


def resources_of(kind: str) -> Resources:
    return PARTS if kind == "parts" else CPU


def seeded_network(run: Run) -> Any:
    """As a run begins."""
    torch.manual_seed(run.seed)
    return build_model(run.model, run.input, 8)


def rate_at(run: Run, epoch: float) -> float:
    return lr_at(run.schedule, run.optimizer.lr, epoch, run.epochs)


class Cut(Exception):
    """The process is gone."""


def cut_after(epoch: int) -> Callable[[dict[str, Any]], None]:
    def on_epoch(row: dict[str, Any]) -> None:
        if row["epoch"] == epoch:
            raise Cut

    return on_epoch


class Looks:
    """Counts how often a run asks whether to stop, which is once before each step; yes after `steps` steps."""

    def __init__(self, steps: int | None = None, act: Callable[[], Any] = lambda: True):
        self.steps, self.act, self.count = steps, act, 0

    def __call__(self) -> bool:
        self.count += 1
        return self.steps is not None and self.count == self.steps + 1 and bool(self.act())


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def flat(tree: Any) -> dict[str, Any]:
    """A nested state as path -> leaf."""
    if isinstance(tree, torch.Tensor) or not isinstance(tree, dict | list):
        return {"": tree.tolist() if isinstance(tree, torch.Tensor) else tree}
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {f"{key}.{path}": leaf for key, value in pairs for path, leaf in flat(value).items()}


def same_bytes(one: Path, other: Path, part: str) -> bool:
    """Whether the weights in last/ or best/ are equal."""
    first, second = ((folder / part / "model.safetensors").read_bytes() for folder in (one, other))
    return first == second


def tensors_of(folder: Path, part: str = "last") -> dict[str, Tensor]:
    return load_file(folder / part / "model.safetensors")


def assert_equal_runs(one: Path, other: Path) -> None:
    """Bit-equal weights, optimizer and averaged state, and equal rows of metrics but for their times."""
    for part in ("last", "best"):
        assert same_bytes(one, other, part), part
        first_meta, second_meta = (checkpoint.load_meta(folder / part) for folder in (one, other))
        assert untimed(first_meta.pop("history")) == untimed(second_meta.pop("history"))
        assert first_meta == second_meta
    states = [flat(checkpoint.load_training(folder / "last")) for folder in (one, other)]
    assert len(states[0]) > 20
    assert states[0] == states[1]
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


@pytest.fixture
def copied(uncut: dict[str, Path], tmp_path: Path) -> Path:
    """The finished run "adamw", to be changed."""
    return shutil.copytree(uncut["adamw"], tmp_path / uncut["adamw"].name)


def evaluated(run: Run, data: DataSet, folder: Path) -> dict[str, float]:
    """The val metrics of the weights in `folder`."""
    model = build_model(run.model, run.input, 8)
    checkpoint.load_weights(folder, model)
    counts = torch.bincount(data.split("train").labels)
    loss = build_loss(run.loss, run.class_weights, data.prior(), counts, expected=True)
    return predict_split(model, Feed(model, run, CPU, data.split("val"), data.classes, HERE), loss)[1].result()


# Learning


@pytest.mark.parametrize(
    ("keys", "accuracy"),
    [({"epochs": 12, "augment": UNMOVED}, 0.8), (doe(epochs=30, batch_size=8), 0.4)],  # doe: on random convolutions
)
def test_bars_are_learned(keys: dict[str, Any], accuracy: float, bars: Path, tmp_path: Path) -> None:
    rows = rows_of(fit("x", small_run(**keys), CPU, bars, tmp_path))
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] * 0.6
    assert max(row["val_accuracy"] for row in rows) > accuracy  # chance: .125


def test_the_files_of_a_run(uncut: dict[str, Path], bars: Path) -> None:
    folder, run, data = uncut["parts"], small_run(**KINDS["parts"]), open_data(bars)
    rows = rows_of(folder)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert re.fullmatch(r"x-s1111-[0-9a-f]{8}", folder.name)
    described = json.loads((folder / "config.json").read_text())
    assert (described["format"], described["name"], described["run_id"]) == (FORMAT, "x", folder.name)
    assert Run.model_validate(described["config"]) == run
    assert (described["data_hash"], described["classes"]) == (data.hash, data.classes)
    assert (described["class_prior"], described["data"]["dataset"]) == (data.summary["class_prior"], "bars")
    assert (described["made_by"]["device"], described["made_by"]["threads"]) == ("cpu", 1)
    # what a checkpoint does not tell: where it was computed, and where its weights came from
    assert Resources.model_validate(described.pop("resources")) == PARTS
    assert (described.pop("start"), described.pop("starts_from")) == (None, ["random weights"])
    for part in ("last", "best"):
        meta = checkpoint.load_meta(folder / part)
        assert meta == described | {"epoch": meta["epoch"], "history": rows[: meta["epoch"]]}
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
    planned = iter([0.3, 0.6, 0.4, 0.5])
    counts = SimpleNamespace(result=lambda: {"accuracy": next(planned), "loss": 1.0})
    monkeypatch.setattr(train, "predict_split", lambda *_: (None, counts))
    folder = fit("x", small_run(epochs=4), CPU, bars, tmp_path)
    assert checkpoint.load_meta(folder / "best")["epoch"] == 2


def test_training_never_looks_at_test(bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[str] = set()
    real = DataSet.split
    monkeypatch.setattr(DataSet, "split", lambda data, name: asked.add(name) or real(data, name))
    fit("x", small_run(**doe(epochs=1)), CPU, bars, tmp_path)
    assert asked == {"train", "val"}


# Cut and resumed


@pytest.mark.parametrize("kind", KINDS)
def test_cut_again_and_again_and_resumed(kind: str, bars: Path, tmp_path: Path, uncut: dict[str, Path]) -> None:
    """Asked to stop before certain steps, killed after each epoch; no step is repeated, and the end is the same."""
    run, resources, folder, done = small_run(**KINDS[kind]), resources_of(kind), tmp_path / uncut[kind].name, 0
    for step in (0, 5, STEPS, STEPS + 3, 2 * STEPS, 3 * STEPS):
        looks, killed = Looks(step - done), step > 0 and step % STEPS == 0
        torch.manual_seed(step)  # what was drawn before does not matter
        if killed:
            with pytest.raises(Cut):
                fit("x", run, resources, bars, tmp_path, cut_after(step // STEPS), leaves=looks)
        else:
            with pytest.raises(Stopped) as caught:
                fit("x", run, resources, bars, tmp_path, leaves=looks)
            where = f"epoch {step // STEPS + 1} after {step % STEPS} of 6 steps"
            assert str(caught.value).startswith(f"{folder.name}: stopped in {where}")
            assert caught.value.terminated
        assert looks.count == step - done + (not killed)
        assert len(rows_of(folder)) == step // STEPS
        done = step
    looks = Looks()
    assert fit("x", run, resources, bars, tmp_path, leaves=looks) == folder
    assert looks.count == 0
    assert_equal_runs(folder, uncut[kind])


BRIEF = small_run(epochs=2, batch_size=32, optimizer={"lr": 0.03}, seed=2)  # three steps an epoch


@pytest.fixture(scope="module")
def brief(bars: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The brief run whole, and cut after its first epoch. The second is better than the first."""
    runs = tmp_path_factory.mktemp("brief")
    with pytest.raises(Cut):
        fit("x", BRIEF, CPU, bars, runs / "cut", cut_after(1))
    whole = fit("x", BRIEF, CPU, bars, runs)
    assert checkpoint.load_meta(whole / "best")["epoch"] == 2
    return whole, runs / "cut" / whole.name


def killed_at(call: int, patch: pytest.MonkeyPatch, armed: list[bool]) -> None:
    """The process dies at the n-th write or rename after `armed`, half-way through the file where it writes one."""
    count = itertools.count(1)

    def fatal(real: Callable) -> Callable:
        def called(*arguments: Any) -> Any:
            if armed and "progress" not in str(arguments[0]) and next(count) == call:
                if real is write_bytes:
                    write_bytes(arguments[0], b"half")
                patch.setattr(shutil, "rmtree", lambda *a, **k: None)  # a killed process cleans nothing up
                raise Cut
            return real(*arguments)

        return called

    write_bytes = Path.write_bytes
    for owner, name in ((Path, "write_bytes"), (os, "replace"), (Path, "replace")):
        patch.setattr(owner, name, fatal(getattr(owner, name)))


@pytest.mark.parametrize(
    ("stops", "writes"), [(False, 17), (True, 10)], ids=["at the end of an epoch", "while it stops"]
)
def test_killed_while_it_saves(
    stops: bool, writes: int, bars: Path, tmp_path: Path, brief: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every write: best/, last/ and metrics.jsonl are those of before or of after, and the end is the same."""
    whole, cut = brief
    for call in itertools.count(1):
        folder, armed = shutil.copytree(cut, tmp_path / str(call) / cut.name), list[bool]()
        with monkeypatch.context() as patch:
            killed_at(call, patch, armed)
            looks = Looks(1, lambda armed=armed: armed.append(True) or stops)
            try:
                fit("x", BRIEF, CPU, bars, folder.parent, leaves=looks)
            except Cut:
                pass
            except Stopped:
                assert stops
                break
            else:
                break
        resumed = Looks()
        fit("x", BRIEF, CPU, bars, folder.parent, leaves=resumed)
        assert resumed.count <= 3  # the first epoch is not repeated
        assert_equal_runs(folder, whole)
    assert call == writes + 1


def test_a_file_stops_the_run_and_an_old_one_does_not(
    bars: Path, tmp_path: Path, uncut: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / uncut["adamw"].name
    folder.mkdir()
    (folder / "stop").touch()
    clock = itertools.count(100)  # a second later at each look
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=time.sleep))
    ask_to_stop([folder, tmp_path / "none"], 0)  # nobody trains there
    asking = threading.Thread(target=ask_to_stop, args=([folder, tmp_path / "none"], 10**6))

    def on_epoch(row: dict[str, Any]) -> None:
        asking.start()
        while not (folder / "stop").exists():
            time.sleep(0.001)

    with pytest.raises(Stopped, match="stopped in epoch 2 after 0 of 6 steps") as caught:
        fit("x", small_run(), CPU, bars, tmp_path, on_epoch)
    assert not caught.value.terminated
    asking.join(20)
    assert not asking.is_alive()
    assert not {"stop", "training"} & {path.name for path in folder.iterdir()}
    assert_equal_runs(fit("x", small_run(), CPU, bars, tmp_path), uncut["adamw"])


@pytest.mark.parametrize("main", [True, False], ids=["main thread", "another thread"])
def test_sigterm_stops_a_run_while_it_trains(main: bool, bars: Path, tmp_path: Path, uncut: dict[str, Path]) -> None:
    """What SIGTERM did before, it does again afterwards."""
    heard: list[int] = []
    ended: list[Stopped] = []
    ours = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    handler = None if main else Sigterm()

    def terminated() -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        while handler is not None and not handler.runs[0].terminated:
            time.sleep(0.001)  # the main thread's turn
        return False

    def train_it() -> None:
        try:
            fit("x", small_run(), CPU, bars, tmp_path, leaves=Looks(9, terminated))
        except Stopped as stopped:
            ended.append(stopped)

    try:
        if main:
            train_it()
        else:
            thread = threading.Thread(target=train_it)
            thread.start()
            thread.join(60)
        assert (heard, [stopped.terminated for stopped in ended]) == ([], [True])
        assert "stopped in epoch 2 after 3 of 6 steps" in str(ended[0])
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, ours)
    assert_equal_runs(fit("x", small_run(), CPU, bars, tmp_path), uncut["adamw"])


def test_a_run_that_ended_early_is_finished(bars: Path, tmp_path: Path) -> None:
    run, looks = small_run(epochs=30, patience=1, optimizer={"lr": 1e-6}), Looks()
    folder = fit("x", run, CPU, bars, tmp_path)
    done = len(rows_of(folder))
    assert done < 30
    assert fit("x", run, CPU, bars, tmp_path, leaves=looks) == folder
    assert looks.count == 0
    assert evaluate(folder, bars, CPU)["epochs"] == done


def test_a_line_of_metrics_that_was_lost_or_doubled_is_mended(bars: Path, copied: Path) -> None:
    lines, weights = (copied / "metrics.jsonl").read_text().splitlines(keepends=True), copied / "last/model.safetensors"
    written = weights.stat().st_mtime_ns
    for damaged in (lines[:2], [*lines, lines[-1]], [*lines[:2], lines[2][:20]]):
        (copied / "metrics.jsonl").write_text("".join(damaged))
        fit("x", small_run(), CPU, bars, copied.parent)
        assert (copied / "metrics.jsonl").read_text() == "".join(lines)
    assert weights.stat().st_mtime_ns == written  # a finished run is not trained


def test_a_run_of_another_format_is_refused_and_stays(bars: Path, copied: Path) -> None:
    path = copied / "last" / "checkpoint.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"epoch": 1, "history": meta["history"][:1], "format": 1}))
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught:
        fit("x", small_run(), CPU, bars, copied.parent)
    assert str(caught.value) == f"{copied}: was started in format 1, not {FORMAT}; delete it to train again"
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


# A frozen encoder, and neutral faces to compare with


@pytest.mark.parametrize("kind", FROZEN)
def test_a_frozen_encoder_stays_as_it_was_to_the_last_bit(kind: str, uncut: dict[str, Path]) -> None:
    before = seeded_network(small_run(**KINDS[kind])).state_dict()
    frozen = {name for name in before if name.startswith(FROZEN[kind])}
    assert len({name for name in frozen if name.endswith(("running_mean", "running_var"))}) > 20
    best, last = (tensors_of(uncut[kind], part) for part in ("best", "last"))
    for tensors in (best, last):  # everything else has changed: the other encoder's statistics too
        assert {name for name in before if torch.equal(before[name], tensors[name])} == frozen
    if "doe" in kind:  # its references were chosen once
        assert torch.equal(best["references"], last["references"])
        assert best["references"].shape == (3, 128)
    assert tensors_of(uncut["same subject"])["references"].shape == (0, 128)  # no person's face is kept for another


# A start from another run


@pytest.fixture
def first(bars: Path, uncut: dict[str, Path], tmp_path: Path) -> Path:
    """A finished run of an emotion encoder, beside which others may start."""
    return shutil.copytree(uncut["emotion encoder"], tmp_path / "runs" / uncut["emotion encoder"].name)


SECOND = doe(init_from="first", epochs=2)


def test_a_run_starts_from_the_best_backbone_of_another(first: Path, bars: Path) -> None:
    (first / "last" / "model.safetensors").unlink()  # those weights are not wanted
    path = first / "best" / "checkpoint.json"
    meta = json.loads(path.read_text())
    meta["config"]["model"]["backbone"]["weights"] = "weights/of_somebody.safetensors"  # nor where they came from
    path.write_text(json.dumps(meta))
    run = small_run(**SECOND, **STILL)
    found = fit("x", run, CPU, bars, first.parent, start=first.name)
    ours, theirs, fresh = tensors_of(found), tensors_of(first, "best"), seeded_network(run).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name.startswith("backbone."))
    for name in ("head.0.weight", "head.2.bias"):  # the other run's head is not taken
        torch.testing.assert_close(ours[name], fresh[name], atol=1e-10, rtol=0)
    described = json.loads((found / "config.json").read_text())
    assert (described["start"], described["starts_from"]) == (first.name, ["first"])
    # a backbone that learns may start from a frozen one
    third = small_run(**emotion_encoder(init_from="x", epochs=1), **STILL)
    learned = tensors_of(fit("y", third, CPU, bars, first.parent, start=found.name))
    for name in {name for name in theirs if name.startswith("backbone.") and name.endswith("weight")}:
        torch.testing.assert_close(learned[name], theirs[name], atol=1e-10, rtol=0)


def test_the_run_to_start_from_is_not_needed_to_resume(first: Path, bars: Path) -> None:
    run, data = small_run(**SECOND), open_data(bars)
    whole = fit("x", run, CPU, bars, first.parent, start=first.name)
    shutil.copytree(first, first.with_name("other"))
    with pytest.raises(Cut):
        fit("x", run, CPU, bars, first.parent, cut_after(1), start="other")
    shutil.rmtree(first.with_name("other"))
    resumed = fit("x", run, CPU, bars, first.parent, start="other")
    assert [folder.name for folder in (whole, resumed)] == [
        run_id("x", run, data.hash, start) for start in (first.name, "other")
    ]
    assert same_bytes(whole, resumed, "last")


def test_a_start_that_cannot_be(first: Path, bars: Path, uncut: dict[str, Path]) -> None:
    """Nothing of the run is written; what does not fit otherwise is in test_run.py."""
    runs = first.parent
    plain = shutil.copytree(uncut["adamw"], runs / "plain").name
    half = shutil.copytree(first, runs / "half")
    meta = checkpoint.load_meta(first / "last")
    (half / "last/checkpoint.json").write_text(json.dumps(meta | {"epoch": 2, "history": meta["history"][:2]}))
    both = "x: init_from is {}, the run to start from {}; give both or neither"
    for init_from, start, message in (
        ("first", "y", f"{runs}/y/last: no checkpoint there (checkpoint.json is missing); train the run first"),
        ("first", plain, "init_from: first has no backbone; set it to null"),
        ("first", "half", f"{half}: 2 of 3 epochs are done; finish it with `fer train x`"),
        ("first", None, both.format("first", None)),
        (None, plain, both.format(None, plain)),
    ):
        with pytest.raises(UserError) as caught:
            fit("x", small_run(**SECOND | {"init_from": init_from}), CPU, bars, runs, start=start)
        assert str(caught.value) == message
    assert {path.parent.name for path in runs.glob("*/last")} == {first.name, plain, "half"}


# Numbers that are none


def planted(patch: Any, at: int, value: float = float("nan")) -> None:
    """The loss becomes `value` in call number `at` (the first is 0) in training."""
    calls = itertools.count()

    def build(*arguments: Any, **named: Any) -> Any:
        real = build_loss(*arguments, **named)

        def loss(*batch: Tensor) -> Tensor:
            found = real(*batch)
            return found * value if not torch.is_inference_mode_enabled() and next(calls) == at else found

        return loss

    patch.setattr(train, "build_loss", build)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run(
    value: float, bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uncut: dict[str, Path]
) -> None:
    with monkeypatch.context() as patch:
        planted(patch, at=STEPS + 2, value=value)
        with pytest.raises(NonFiniteLoss) as caught:
            fit("x", small_run(), CPU, bars, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert str(caught.value) == (
        f"{folder.name}: loss is {value} in epoch 2, step 3 (lr {rate_at(small_run(), 1 + 2.5 / 6):.3g}); "
        "lower optimizer.lr, set clip_grad_norm, or use precision fp32"
    )
    assert checkpoint.load_meta(folder / "last")["epoch"] == 1
    assert_equal_runs(fit("x", small_run(), CPU, bars, tmp_path), uncut["adamw"])


def test_weights_spoilt_by_the_last_step_are_not_saved(
    bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, real = itertools.count(1), Stepper.update

    def update(stepper: Any) -> None:
        real(stepper)
        if next(steps) == STEPS:
            next(stepper.model.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(Stepper, "update", update)
    with pytest.raises(NonFiniteLoss, match=r": val loss is nan after epoch 1 \(lr .*\); lower optimizer\.lr"):
        fit("x", small_run(), CPU, bars, tmp_path)
    assert not list(tmp_path.glob("*/last"))


# Batches


@settings(max_examples=60, deadline=None)
@given(
    images=st.integers(4, 70),
    share=st.integers(1, 8),
    world=st.sampled_from([1, 2, 4]),
    power=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_ranks_share_the_batches_of_one(images: int, share: int, world: int, power: float) -> None:
    run, labels = small_run(batch_size=share * world, balanced_sampling=power), torch.arange(images) % 8
    whole = images >= run.batch_size
    trained = images // run.batch_size * run.batch_size if whole else images // world * world
    assert trained == trained_images(run.batch_size, images, world)
    size = run.batch_size if whole else trained
    seen: list[int] = []
    for step in zip(*(batches(run, labels, 3, rank, world) for rank in range(world))):
        places = [slice(rank * size // world, (rank + 1) * size // world) for rank in range(world)]
        assert [(place, len(index)) for index, place in step] == [(place, size // world) for place in places]
        seen += np.concatenate([index for index, _ in step]).tolist()
    assert len(seen) == trained
    assert seen == order_of(run, labels, 3)[:trained]
    assert {*seen} <= {*range(images)}
    if not power:
        assert len(set(seen)) == trained  # each image at most once


def order_of(run: Run, labels: Tensor, epoch: int) -> list[int]:
    return np.concatenate([index for index, _ in batches(run, labels, epoch, 0, 1)]).tolist()


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_the_order_follows_from_seed_and_epoch(power: float) -> None:
    orders = {
        tuple(order_of(small_run(seed=seed, balanced_sampling=power), torch.arange(64) % 8, epoch))
        for seed, epoch in [*itertools.product((1, 2), (1, 2)), (1, 1)]
    }
    assert len(orders) == 4
    assert tuple(range(64)) not in orders


# Three classes of 900, 90 and 10 images; and one of none
UNEVEN = torch.tensor(np.random.default_rng(0).permutation([0] * 900 + [1] * 90 + [3] * 10))


def test_balanced_sampling_draws_the_classes_with_their_shares() -> None:
    run, epochs = small_run(balanced_sampling=0.5, batch_size=10), 20
    drawn = np.array([order_of(run, UNEVEN, epoch) for epoch in range(epochs)])
    assert drawn.shape == (epochs, 1000)
    shares = np.array([0.7034, 0.2224, 0, 0.0741])  # as the roots 30, 9.487 and 3.162
    counts = np.bincount(UNEVEN[drawn.ravel()], minlength=4)
    error = np.sqrt(shares * (1 - shares) / drawn.size)
    np.testing.assert_array_less(abs(counts / drawn.size - shares), 4 * error + 1e-4)
    # and within a class all images alike: those of the smallest
    share = shares[3] / 10
    found = np.bincount(drawn.ravel(), minlength=1000)[UNEVEN == 3] / drawn.size
    np.testing.assert_allclose(found, share, atol=4 * np.sqrt(share / drawn.size), rtol=0)


def test_a_batch_larger_than_the_data_is_one_step(bars: Path, tmp_path: Path) -> None:
    folder = fit("x", small_run(batch_size=512, epochs=2), CPU, bars, tmp_path)
    assert json.loads((folder / "progress.json").read_text()) == {"epoch": 1, "epochs": 2, "step": 1, "steps": 1}
    accuracy = rows_of(folder)[0]["train_accuracy"] * 96  # of all images
    assert accuracy == pytest.approx(round(accuracy))


def test_augmentation_is_drawn_anew_in_each_step(bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seeds = Augmenter.draw, list[int]()
    monkeypatch.setattr(Augmenter, "draw", lambda self, size, seed: seeds.append(seed) or real(self, size, seed))
    for seed in (1, 2):
        fit("x", small_run(seed=seed, epochs=2), CPU, bars, tmp_path)
    assert len(seeds) == len(set(seeds)) == 2 * 2 * STEPS


# What cannot start


def test_what_cannot_start_leaves_nothing(bars: Path, tmp_path: Path) -> None:
    """Every batch that cannot be divided is in test_run.py."""
    two = Resources(device="cpu", workers=2)
    cases: list[tuple[Run, Resources, Path, str]] = [
        (small_run(batch_size=15), two, bars, "x: batch_size: 15 does not divide by resources.workers 2"),
        (small_run(), CPU, tmp_path / "data", "summary.json: not found; make the data with `dvc repro`"),
    ]
    if not torch.cuda.is_available():
        message = "resources.device: cuda, but this machine has no usable GPU; set it to auto or cpu"
        cases.append((small_run(), Resources(device="cuda"), bars, message))
    for run, resources, data, message in cases:
        with pytest.raises(UserError, match=re.escape(message)):
            fit("x", run, resources, data, tmp_path / "runs")
        assert not (tmp_path / "runs").exists()


# Agreement of several ranks, by clocks that are set by hand


@pytest.mark.parametrize(
    ("own", "slowest", "every"),
    [(0.6, 0.6, 1), (5.0, 5.0, 1), (0.01, 0.6, 1), (0.01, 0.01, 100), (0.001, 0.005, 200)],
)
def test_ranks_agree_about_once_a_second(
    own: float, slowest: float, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one rank sees, with seconds per step of its own and of the slowest, which is asked to stop."""
    asked, stops, step, stop = [0], [], 0, 8 * every

    def all_reduce(found: Tensor, operation: Any, group: Any) -> None:
        assert (operation, group) == (dist.ReduceOp.MAX, "group")
        theirs = [float(step >= stop), (step - asked[-1]) * slowest]
        found.copy_(torch.maximum(found, torch.tensor(theirs)))
        asked.append(step)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: own * step))
    quiet: Any = SimpleNamespace(request=lambda: Request.NONE)
    agree = Agreement("group", quiet)
    for step in range(12 * every + 200):
        if agree():
            stops.append(step)
    assert stops == [step for step in asked if step >= stop]
    gaps = np.diff(asked)[1:]
    assert gaps.max() <= every * 1.05 + 1
    np.testing.assert_allclose(gaps[4:], every, rtol=0.05, atol=1)  # after some steps to get there


# Two ranks


@dataclass
class Job:
    """A run on two ranks, and what happens to it."""

    run: Run
    runs: Path
    accumulate: int = 1
    stop: int | None = None  # rank 1 alone is asked to leave, after so many steps
    spoilt: int | None = None  # the loss of rank 1 is no number in this step
    exits: int | None = None  # rank 1 dies before this step
    dies_saving: bool = False  # rank 0 dies before its new checkpoint takes the name last/
    sync: bool = False  # batch norm, which needs GPUs
    device: Literal["cpu", "cuda"] = "cpu"


def _rank(rank: int, port: int, data: Path, jobs: list[Job], told: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    signals.AGREE_SECONDS = 0.0  # ask before every step
    dist.init_process_group("gloo", rank=rank, world_size=2)
    about = []
    for job in jobs:
        patch, rows, error = pytest.MonkeyPatch(), list[dict[str, Any]](), ""
        looks = Looks(job.stop) if rank == 1 else Looks()
        if job.exits is not None and rank == 1:
            looks = Looks(job.exits, partial(os._exit, 1))
        if job.spoilt is not None and rank == 1:
            planted(patch, job.spoilt)
        if job.dies_saving and rank == 0:
            patch.setattr(Path, "replace", lambda path, to: os._exit(1) if to.name == "last" else os.replace(path, to))
        resources = Resources(device=job.device, workers=2, accumulate=job.accumulate, sync_batch_norm=job.sync)
        try:
            fit("x", job.run, resources, data, job.runs, rows.append, leaves=looks)
        except UserError as caught:
            error = str(caught)
        patch.undo()
        about.append([untimed(rows), error])
    (told / f"{rank}.json").write_text(json.dumps(about))
    dist.destroy_process_group()


def on_two_ranks(data: Path, told: Path, *jobs: Job) -> list[tuple[Path, str]]:
    """The folder of each job's run and the error that it ended with, the same on both ranks; one after the other."""
    port = free_port()
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    multiprocessing.set_forkserver_preload([__name__])  # imported once, for all tests
    start = multiprocessing.get_context("forkserver")
    ranks = [start.Process(target=_rank, args=(rank, port, data, list(jobs), told)) for rank in range(2)]
    for process in ranks:
        process.start()
    while not any(process.exitcode for process in ranks) and any(process.is_alive() for process in ranks):
        multiprocessing.connection.wait([process.sentinel for process in ranks if process.is_alive()])
    for process in ranks:
        process.join(3)
        process.kill()  # what is left waits for the other rank
    if any(process.exitcode for process in ranks):
        raise Cut
    first, second = (json.loads((told / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    return [(next(job.runs.iterdir()), error) for job, (_, error) in zip(jobs, first)]


@pytest.mark.slow
def test_two_ranks_are_one(bars: Path, tmp_path: Path) -> None:
    plain = {"model": {"batch_norm": False, "conv_dropout": 0, "dense_dropout": 0}, "optimizer": SGD, "epochs": 2}
    votes = {"loss": {"name": "focal_pdls"}, "class_weights": 0.5, "balanced_sampling": 0.5}
    runs = {
        "plain": small_run(**plain, **votes),
        "doe": small_run(**doe(augment={})),
        "same subject": small_run(**doe("same_subject", ema_decay=0.8)),
    }
    shared = on_two_ranks(bars, tmp_path, *(Job(run, tmp_path / "two" / kind) for kind, run in runs.items()))
    for run, (folder, error) in zip(runs.values(), shared):
        alone = fit("x", run, CPU, bars, tmp_path / "one")
        assert (folder.name, error) == (alone.name, "")
        for one, two in zip(untimed(rows_of(alone)), untimed(rows_of(folder)), strict=True):
            assert one == pytest.approx(two, abs=1e-5)
        ours, theirs = tensors_of(alone), tensors_of(folder)
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-4)
        # one resumes what two left
        looks = Looks()
        assert fit("x", run, CPU, bars, folder.parent, leaves=looks) == folder
        assert looks.count == 0


@pytest.mark.slow
def test_two_ranks_stop_together_and_resume_as_if_they_had_not(bars: Path, tmp_path: Path) -> None:
    """Bit for bit, with batch norm, whose statistics differ by rank."""
    run = small_run(loss={"name": "vote_sampling"}, ema_decay=0.5)
    cut, plain = tmp_path / "cut", small_run(epochs=1)
    found = on_two_ranks(
        bars, tmp_path,
        Job(run, tmp_path / "whole", 2),
        *(Job(run, cut, 2, stop=steps) for steps in (0, 3, STEPS + 2, None)),
        Job(plain, tmp_path / "no ema"),
        Job(plain, tmp_path / "nan", spoilt=2),
        Job(plain, tmp_path / "sync", sync=True),
    )  # fmt: skip
    whole, (resumed, _), (other, _), (spoilt, spoilt_error), (_, sync_error) = found[0][0], *found[4:]
    assert sync_error == "resources.sync_batch_norm: works on GPUs only; set it to false"
    places = ["epoch 1 after 0", "epoch 1 after 3", "epoch 2 after 5"]
    for (_, error), place in zip(found[1:4], places):
        assert error.startswith(f"{whole.name}: stopped in {place} of 6 steps")
    assert_equal_runs(resumed, whole)
    # what is saved are the weights that were evaluated
    for folder, asked in ((whole, run), (other, plain)):
        row = rows_of(folder)[checkpoint.load_meta(folder / "best")["epoch"] - 1]
        result = evaluated(asked, open_data(bars), folder / "best")
        assert result == pytest.approx({key: row[f"val_{key}"] for key in result}, abs=1e-6)
    # the losses are looked at after the epoch, and the step that went wrong is named
    assert spoilt_error.startswith(f"{spoilt.name}: loss is nan in epoch 1, step 3 (lr {rate_at(plain, 2.5 / 6):.3g})")
    assert not (spoilt / "last").exists()


@pytest.mark.slow
def test_a_rank_that_dies_at_any_moment_changes_nothing(bars: Path, tmp_path: Path) -> None:
    """Bit for bit, when both are started again."""
    run, cut = small_run(epochs=2, ema_decay=0.8), tmp_path / "cut"
    for died in (Job(run, cut, exits=STEPS + 3), Job(run, cut, dies_saving=True)):
        with pytest.raises(Cut):
            on_two_ranks(bars, tmp_path, died)
        (folder,) = cut.iterdir()
        assert len(rows_of(folder)) == 1
    (whole, _), (resumed, _) = on_two_ranks(bars, tmp_path, Job(run, tmp_path / "whole"), Job(run, cut))
    assert_equal_runs(resumed, whole)
