"""A run learns, stops where it must, and can be cut anywhere: resumed, it equals the uncut run bit for bit."""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, NO_AUGMENT, doe, emotion_encoder, make_data, refusal, small_run
from safetensors.torch import load_file
from torch import Tensor

import fer.step
from fer import checkpoint, train
from fer.data.augment import Augmenter
from fer.data.dataset import DataSet, open_data
from fer.evaluate import evaluate
from fer.files import sha256, write_json
from fer.losses import build_loss
from fer.models import build_model
from fer.predict import Predictor
from fer.resources import Resources
from fer.run import FORMAT, Run, run_id
from fer.schedule import lr_at
from fer.signals import Stopped
from fer.train import REMEDY, NonFiniteLoss, fit

STEPS = 6  # of an epoch of the small run
TIMES = ("seconds", "images_per_second", "time")
SGD: dict[str, Any] = {"name": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 0.01}
STILL = {"optimizer": SGD | {"lr": 1e-20, "weight_decay": 0.0}}  # nothing is learned
KINDS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {
        "optimizer": SGD, "balanced_sampling": 0.5, "seed": 2,
        "schedule": {"name": "step", "warmup_epochs": 0, "step_epochs": [1, 2], "step_factors": [0.5, 0.1]},
    },
    "parts": {"precision": "bf16", "loss": {"name": "vote_sampling"}, "ema_decay": 0.5},
    "sam mixed": {"sam_rho": 0.05, "augment": {"mixup": 0.4, "cutmix": 1.0}},
    "doe": doe(),
    "same subject": doe("same_subject", augment={}, ema_decay=0.8),
    "emotion encoder": emotion_encoder(),
}  # fmt: skip
PARTS = Resources(device="cpu", accumulate=4)


def resources_of(kind: str) -> Resources:
    return PARTS if kind == "parts" else CPU


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


def tensors_of(folder: Path, part: str = "last") -> dict[str, Tensor]:
    return load_file(folder / part / "model.safetensors")


def content_of(folder: Path) -> dict[str, Any]:
    """All that a run leaves but the state of its optimizer and its times."""
    metas = {part: checkpoint.load_meta(folder / part) for part in ("last", "best")}
    return {
        "weights": {part: sha256(folder / part / "model.safetensors") for part in metas},
        "metas": {part: meta | {"history": untimed(meta["history"])} for part, meta in metas.items()},
        "rows": untimed(rows_of(folder)),
        "files": sorted(path.name for path in folder.iterdir()),
    }


def assert_equal_runs(one: Path, other: Path) -> None:
    """Bit for bit."""
    assert content_of(one) == content_of(other)
    states = (checkpoint.load_training(folder / "last") for folder in (one, other))
    torch.testing.assert_close(*states, rtol=0, atol=0)


SEEN: dict[str, list[Any]] = {"splits": [], "augment": [], "dropout": []}  # by the uncut runs: names and seeds


@pytest.fixture(scope="module")
def uncut(bars: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a whole run of each kind."""
    runs, split, draw, drop = tmp_path_factory.mktemp("uncut"), DataSet.split, Augmenter.draw, fer.step.seed_all
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DataSet, "split", lambda data, name: SEEN["splits"].append(name) or split(data, name))
        patch.setattr(Augmenter, "draw", lambda *given: SEEN["augment"].append(given[-1]) or draw(*given))
        patch.setattr(fer.step, "seed_all", lambda *given: SEEN["dropout"].append(given[0]) or drop(*given))
        return {kind: fit("x", small_run(**keys), resources_of(kind), bars, runs) for kind, keys in KINDS.items()}


# Learning


def test_bars_are_learned(bars: Path, tmp_path: Path) -> None:
    unmoved = {"rotation": 0, "flip": 0, "translation": 0, "scale": 0}
    rows = rows_of(fit("x", small_run(epochs=12, augment=unmoved), CPU, bars, tmp_path))
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] * 0.6
    assert max(row["val_accuracy"] for row in rows) > 0.8  # chance: .125


@pytest.mark.usefixtures("uncut")
def test_training_never_looks_at_test_and_draws_anew_in_each_step() -> None:
    assert {*SEEN["splits"]} == {"train", "val"}
    for seeds in (SEEN["augment"], SEEN["dropout"]):
        assert len({*seeds}) == 2 * 3 * STEPS  # two seeds, three epochs


def test_the_files_of_a_run(uncut: dict[str, Path], bars: Path) -> None:
    folder, run, data = uncut["parts"], small_run(**KINDS["parts"]), open_data(bars)
    rows, about, summary = rows_of(folder), json.loads((folder / "config.json").read_text()), dict(data.summary)
    common = {
        "format": FORMAT, "name": "x", "run_id": run_id("x", run, data.hash), "config": run.model_dump(),
        "data_hash": data.hash, "made_by": about["made_by"],
        "classes": summary.pop("classes"), "class_prior": summary.pop("class_prior"), "data": summary,
    }  # fmt: skip
    own = {"resources": PARTS.model_dump(), "start": None, "starts_from": ["random weights"], "weights": {}}
    assert about == common | own
    assert (folder.name, about["made_by"]["device"], len(rows)) == (about["run_id"], "cpu", 3)
    best = max(rows, key=lambda row: row["val_accuracy"])["epoch"]
    for part, epoch in (("last", 3), ("best", best)):
        assert checkpoint.load_meta(folder / part) == common | {"epoch": epoch, "history": rows[:epoch]}
    assert json.loads((folder / "progress.json").read_text()) == {"epoch": 2, "epochs": 3, "step": 6, "steps": 6}


def test_rare_classes_count_in_the_loss_as_the_settings_say(tmp_path: Path) -> None:
    """Of the 12 training images each of the first four classes has two: both losses by hand, from predictions."""
    data, runs = make_data(tmp_path / "data", {"train": 12, "val": 16, "test": 8}), tmp_path / "runs"
    alike = {"model": {"batch_norm": False, "conv_dropout": 0, "dense_dropout": 0}, "augment": NO_AUGMENT, **STILL}
    run = small_run(**alike, epochs=1, batch_size=4, class_weights=1.0, logit_adjustment=2.0)
    folder = fit("x", run, CPU, data, runs)
    faces, counts = np.load(data / "upscaled" / "images.npy"), np.array([2, 2, 2, 2, 1, 1, 1, 1])
    adjusted = Predictor(folder).probabilities(faces[:28]).astype(np.float64) * (counts / 12) ** 2
    labels = np.arange(28) % 8
    right = (adjusted / adjusted.sum(1, keepdims=True))[np.arange(28), labels]
    by_hand = -(12 / 8 / counts[labels] * np.log(right))
    (row,) = rows_of(folder)
    assert row["train_loss"] == pytest.approx(by_hand[:12].mean(), rel=1e-5)
    assert row["val_loss"] == pytest.approx(by_hand[12:].mean(), rel=1e-5)


def test_what_is_kept_follows_from_the_val_metrics(bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """best/ is the first of equal epochs, and what predicts no numbers is not saved."""
    planned = iter([(0.3, 1.0), (0.6, 1.0), (0.4, 1.0), (0.6, 1.0), (0.9, float("nan"))])
    counts = SimpleNamespace(result=lambda: dict(zip(("accuracy", "loss"), next(planned))))
    monkeypatch.setattr(train, "predict_split", lambda *_: (None, counts))
    with pytest.raises(Cut):
        fit("x", small_run(epochs=5), CPU, bars, tmp_path, cut_after(2))
    with pytest.raises(NonFiniteLoss, match=rf": val loss is nan after epoch 5 \(lr .*\); {REMEDY}"):
        fit("x", small_run(epochs=5), CPU, bars, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert [checkpoint.load_meta(folder / part)["epoch"] for part in ("best", "last")] == [2, 4]


def test_best_is_of_the_epoch_that_was_repeated_after_a_crash_between_best_and_last(
    bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere the repeated epoch may be rounded otherwise, and then be no better than those before."""
    planned = iter([(0.5, 1.0), (0.6, 1.0), (0.45, 1.0), (0.4, 1.0), (0.48, 1.0)])
    counts = SimpleNamespace(result=lambda: dict(zip(("accuracy", "loss"), next(planned))))
    monkeypatch.setattr(train, "predict_split", lambda *_: (None, counts))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Cut):
        save = checkpoint.save

        def dying(folder: Path, tensors: Any, meta: dict[str, Any], training: Any) -> None:
            if folder.name == "last" and meta["epoch"] == 2:
                raise Cut
            save(folder, tensors, meta, training)

        patch.setattr(checkpoint, "save", dying)
        fit("x", small_run(epochs=4), CPU, bars, tmp_path)
    with pytest.raises(Cut):
        fit("x", small_run(epochs=4), CPU, bars, tmp_path, cut_after(3))
    (folder,) = tmp_path.iterdir()
    rows, best = rows_of(folder), checkpoint.load_meta(folder / "best")
    assert [row["val_accuracy"] for row in rows] == [0.5, 0.45, 0.4]
    assert (best["epoch"], best["history"]) == (2, rows[:2])


def test_a_run_keeps_by_which_code_it_was_trained(bars: Path, tmp_path: Path) -> None:
    run = small_run(epochs=3)
    for code, epoch in (("one", 1), ("two", 2), ("one", 3)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fer.made_by.source_hash", lambda code=code: code)
            with suppress(Cut):
                fit("x", run, CPU, bars, tmp_path, cut_after(epoch) if epoch < 3 else lambda row: None)
    (folder,) = tmp_path.iterdir()
    made = checkpoint.load_meta(folder / "last")["made_by"]
    assert (made["fer"], made["before"]) == ("one", ["two"])


# Cut and resumed


@pytest.mark.parametrize("kind", KINDS)
def test_cut_again_and_again_and_resumed(kind: str, bars: Path, tmp_path: Path, uncut: dict[str, Path]) -> None:
    """Stopped before a step or killed after an epoch; no step is repeated, and the end is the same."""
    run, resources, folder, done = small_run(**KINDS[kind]), resources_of(kind), tmp_path / uncut[kind].name, 0
    for step in (5, STEPS, STEPS + 3, 3 * STEPS, 3 * STEPS):
        looks, epoch, killed = Looks(step - done), step // STEPS, step % STEPS == 0
        torch.manual_seed(step)  # what was drawn before does not matter
        if step == done:
            assert fit("x", run, resources, bars, tmp_path, leaves=looks) == folder
        else:
            with pytest.raises(Cut if killed else Stopped) as caught:
                fit("x", run, resources, bars, tmp_path, cut_after(epoch), leaves=looks)
            message = f"{folder.name}: stopped in epoch {epoch + 1} after {step % STEPS} of 6 steps; "
            assert str(caught.value) == ("" if killed else f"{message}run the same command to resume")
        assert (looks.count, len(rows_of(folder))) == (step - done + (not killed), epoch)
        if step == 5:  # as if they had taken long
            state = checkpoint.load_training(folder / "last")
            torch.save(state | {"seconds": 1000.0}, folder / "last" / "training.pt")
        done = step
    assert rows_of(folder)[0]["seconds"] > 1000
    assert_equal_runs(folder, uncut[kind])


def killed_at(call: int, patch: pytest.MonkeyPatch, armed: list[bool]) -> None:
    """The process dies at the n-th write or rename after `armed`, half-way through the file where it writes one."""
    count = itertools.count(1)

    def fatal(name: str, real: Callable) -> Callable:
        def called(path: Any, *rest: Any) -> Any:
            if not armed or "progress" in str(path) or next(count) != call:
                return real(path, *rest)
            if name == "write_bytes":
                real(path, b"half")
            patch.setattr(shutil, "rmtree", lambda *a, **k: None)  # a killed process cleans nothing up
            raise Cut

        return called

    for owner, name in ((Path, "write_bytes"), (os, "replace"), (Path, "replace")):
        patch.setattr(owner, name, fatal(name, getattr(owner, name)))


def test_killed_at_any_write_of_a_save(bars: Path, tmp_path: Path) -> None:
    """best/, last/ and metrics.jsonl are those of before or of after, and the end is the same."""
    run = small_run(epochs=2, batch_size=32, optimizer={"lr": 0.03}, seed=2)  # three steps an epoch
    with pytest.raises(Cut):
        fit("x", run, CPU, bars, tmp_path / "cut", cut_after(1))
    whole = fit("x", run, CPU, bars, tmp_path / "whole")
    assert checkpoint.load_meta(whole / "best")["epoch"] == 2  # so that best/ is written anew
    for call in itertools.count(1):
        folder, armed = shutil.copytree(tmp_path / "cut" / whole.name, tmp_path / str(call) / whole.name), list[bool]()
        with pytest.MonkeyPatch.context() as patch, suppress(Cut):
            killed_at(call, patch, armed)
            fit("x", run, CPU, bars, folder.parent, leaves=Looks(1, lambda armed=armed: armed.append(True)))
            break
        resumed = Looks()
        fit("x", run, CPU, bars, folder.parent, leaves=resumed)
        assert resumed.count <= 3  # the first epoch is not repeated
        assert_equal_runs(folder, whole)
    assert call > 10


def test_a_finished_run_is_not_trained_but_its_rows_are_mended(bars: Path, tmp_path: Path) -> None:
    run, looks = small_run(epochs=30, patience=1, optimizer={"lr": 1e-6}), Looks()
    folder = fit("x", run, CPU, bars, tmp_path)
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    for damaged in (lines[:1], [*lines, lines[-1]], [*lines[:-1], lines[-1][:20]]):
        metrics.write_text("".join(damaged))
        assert fit("x", run, CPU, bars, tmp_path, leaves=looks) == folder
        assert metrics.read_text() == "".join(lines)
    assert looks.count == 0
    assert evaluate(folder, bars, CPU)["epochs"] == len(lines) < 30  # it ended early


# A frozen encoder, and a start from another run


@pytest.mark.parametrize("kind", ["doe", "same subject", "emotion encoder"])
def test_a_frozen_encoder_stays_as_it_was_to_the_last_bit(kind: str, uncut: dict[str, Path]) -> None:
    run = small_run(**KINDS[kind])
    torch.manual_seed(run.seed)  # as a run begins
    before = build_model(run.model, run.input, 8).state_dict()
    frozen = {name for name in before if name.startswith("identity." if "encoder" in kind else "backbone.")}
    if kind == "same subject":  # no person's face is kept for another
        frozen.add("references")
    best, last = (tensors_of(uncut[kind], part) for part in ("best", "last"))
    for tensors in (best, last):  # everything else has changed: the other encoder's statistics too
        assert {name for name in before if torch.equal(before[name], tensors[name])} == frozen
    assert kind != "doe" or torch.equal(best["references"], last["references"])  # chosen once


SECOND = small_run(**doe(init_from="first", epochs=2))


@pytest.fixture
def runs(uncut: dict[str, Path], tmp_path: Path) -> Path:
    """A folder with a finished run of an emotion encoder, beside which others may start."""
    return shutil.copytree(uncut["emotion encoder"], tmp_path / "runs" / "first").parent


def test_a_run_starts_from_the_best_backbone_of_another(runs: Path, bars: Path) -> None:
    theirs = tensors_of(runs / "first", "best")
    (runs / "first" / "last" / "model.safetensors").unlink()  # those weights are not wanted
    second = small_run(**doe(init_from="first", epochs=2), **STILL)
    found = fit("x", second, CPU, bars, runs, start="first")
    described, ours = json.loads((found / "config.json").read_text()), tensors_of(found)
    assert (described["start"], described["starts_from"]) == ("first", ["first"])
    third = fit("y", small_run(**emotion_encoder(init_from="x", epochs=1), **STILL), CPU, bars, runs, start=found.name)
    for name in {name for name in theirs if name.startswith("backbone.")}:
        assert torch.equal(ours[name], theirs[name])
        if name.endswith("weight"):  # a backbone that learns may start from a frozen one
            torch.testing.assert_close(tensors_of(third)[name], theirs[name], atol=1e-10, rtol=0)


def test_the_run_to_start_from_is_not_needed_to_resume(runs: Path, bars: Path) -> None:
    whole, other = fit("x", SECOND, CPU, bars, runs, start="first"), shutil.copytree(runs / "first", runs / "other")
    with pytest.raises(Cut):
        fit("x", SECOND, CPU, bars, runs, cut_after(1), start="other")
    shutil.rmtree(other)
    resumed = fit("x", SECOND, CPU, bars, runs, start="other")
    assert resumed.name == run_id("x", SECOND, open_data(bars).hash, "other") != whole.name
    assert content_of(whole)["weights"] == content_of(resumed)["weights"]


def test_what_cannot_start_leaves_nothing(runs: Path, bars: Path, uncut: dict[str, Path]) -> None:
    """What does not fit otherwise is in test_run.py."""
    two, none, plain, half = Resources(device="cpu", workers=2), small_run(**doe()), small_run(), runs / "half"
    older, copy = runs / uncut["adamw"].name, runs / run_id("y", plain, open_data(bars).hash)
    for folder, changes in ((half, {"epoch": 2}), (older, {"format": 1}), (copy, {})):
        shutil.copytree(uncut["emotion encoder" if folder == half else "adamw"], folder)
        meta = checkpoint.load_meta(folder / "last") | changes
        write_json(folder / "last/checkpoint.json", meta | {"history": meta["history"][: meta["epoch"]]})
    before = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    no_data = f"{runs}/splits/summary.json: not found; make the data with `dvc repro`"
    no_start = f"{runs}/z/last: no checkpoint there (checkpoint.json is missing); train the run first"
    for name, run, resources, data, start, message in (
        ("x", small_run(batch_size=15), two, bars, None, "x: batch_size: 15 does not divide by resources.workers 2"),
        ("x", plain, CPU, runs, None, no_data),
        ("x", none, CPU, bars, "y", "x: init_from is None, the run to start from y; give both or neither"),
        ("z", SECOND, CPU, bars, "z", no_start),
        ("z", SECOND, CPU, bars, copy.name, "init_from: first has no backbone; set it to null"),
        ("z", SECOND, CPU, bars, "half", f"{half}: 2 of 3 epochs are done; finish it with `fer train x`"),
        ("x", plain, CPU, bars, None, f"{older}: was started in format 1, not {FORMAT}; delete it to train again"),
        ("y", plain, CPU, bars, None, f"{copy}/last: is the checkpoint of another run, {older.name}; delete it"),
    ):  # fmt: skip
        assert refusal(fit, name, run, resources, data, runs, start=start) == message
    assert {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()} == before


# Numbers that are none


def planted(patch: Any, at: int) -> None:
    """The loss becomes no number in call number `at` (the first is 0) in training."""
    calls = itertools.count()

    def build(*arguments: Any, **named: Any) -> Any:
        real = build_loss(*arguments, **named)

        def loss(*batch: Tensor) -> Tensor:
            found = real(*batch)
            return found * float("nan") if not torch.is_inference_mode_enabled() and next(calls) == at else found

        return loss

    patch.setattr(train, "build_loss", build)


def bad_loss(run: Run, folder: Path, epoch: int, step: int) -> str:
    rate = lr_at(run.schedule, run.optimizer.lr, epoch - 1 + (step - 0.5) / STEPS, run.epochs)
    return f"{folder.name}: loss is nan in epoch {epoch}, step {step} (lr {rate:.3g}); {REMEDY}"


def test_a_loss_that_is_no_number_stops_the_run(bars: Path, tmp_path: Path, uncut: dict[str, Path]) -> None:
    folder = tmp_path / uncut["adamw"].name
    with pytest.MonkeyPatch.context() as patch:
        planted(patch, at=STEPS + 2)
        with pytest.raises(NonFiniteLoss) as caught:
            fit("x", small_run(), CPU, bars, tmp_path)
    assert str(caught.value) == bad_loss(small_run(), folder, 2, 3)
    assert checkpoint.load_meta(folder / "last")["epoch"] == 1
    assert_equal_runs(fit("x", small_run(), CPU, bars, tmp_path), uncut["adamw"])
