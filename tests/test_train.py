"""A run learns, stops where it must, and can be cut anywhere: resumed, it equals the uncut run bit for bit."""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CPU, doe, emotion_encoder, refusal, small_run
from safetensors.torch import load_file
from torch import Tensor

from fer import checkpoint, train
from fer.batches import Feed
from fer.data.augment import Augmenter
from fer.data.dataset import DataSet, open_data
from fer.evaluate import evaluate, predict_split
from fer.losses import build_loss
from fer.models import build_model
from fer.resources import Resources
from fer.run import FORMAT, Run, run_id
from fer.schedule import lr_at
from fer.signals import Stopped
from fer.step import Stepper
from fer.train import NonFiniteLoss, fit

STEPS = 6  # of an epoch of the small run
TIMES = ("seconds", "images_per_second", "time")
SGD: dict[str, Any] = {"name": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 0.01}
STILL = {"optimizer": SGD | {"lr": 1e-20, "weight_decay": 0.0}}  # nothing is learned
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
    feed = Feed(model, run, CPU, data.split("val"), data.classes, torch.device("cpu"))
    return predict_split(model, feed, loss)[1].result()


# Learning


def test_bars_are_learned(bars: Path, tmp_path: Path) -> None:
    unmoved = {"rotation": 0, "flip": 0, "translation": 0, "scale": 0}
    rows = rows_of(fit("x", small_run(epochs=12, augment=unmoved), CPU, bars, tmp_path))
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] * 0.6
    assert max(row["val_accuracy"] for row in rows) > 0.8  # chance: .125


def test_the_files_of_a_run(uncut: dict[str, Path], bars: Path) -> None:
    folder, run, data = uncut["parts"], small_run(**KINDS["parts"]), open_data(bars)
    rows = rows_of(folder)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    described = json.loads((folder / "config.json").read_text())
    expected = {
        "format": FORMAT, "name": "x", "run_id": run_id("x", run, data.hash), "config": run.model_dump(),
        "data_hash": data.hash, "classes": data.classes, "class_prior": data.summary["class_prior"],
    }  # fmt: skip
    assert {key: described[key] for key in expected} == expected
    assert folder.name == expected["run_id"]
    assert (described["made_by"]["device"], described["data"]["dataset"]) == ("cpu", "bars")
    # what a checkpoint does not tell: where it was computed, and where its weights came from
    assert Resources.model_validate(described.pop("resources")) == PARTS
    assert (described.pop("start"), described.pop("starts_from")) == (None, ["random weights"])
    for part in ("last", "best"):
        meta = checkpoint.load_meta(folder / part)
        assert meta == described | {"epoch": meta["epoch"], "history": rows[: meta["epoch"]]}
    assert json.loads((folder / "progress.json").read_text()) == {"epoch": 2, "epochs": 3, "step": 6, "steps": 6}


@pytest.mark.parametrize("kind", ["adamw", "same subject"])
def test_best_holds_the_weights_of_the_epoch_with_the_best_val_accuracy(
    kind: str, uncut: dict[str, Path], bars: Path
) -> None:
    """The averaged ones, where the run averages."""
    row = max(rows_of(uncut[kind]), key=lambda row: row["val_accuracy"])
    assert checkpoint.load_meta(uncut[kind] / "best")["epoch"] == row["epoch"]
    result = evaluated(small_run(**KINDS[kind]), open_data(bars), uncut[kind] / "best")
    assert {f"val_{key}": value for key, value in result.items()} == pytest.approx(
        {key: row[key] for key in row if key.startswith("val_")}, abs=1e-9
    )


def test_best_is_the_first_of_equal_epochs(bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = iter([0.3, 0.6, 0.4, 0.6])
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


def test_augmentation_is_drawn_anew_in_each_step(bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seeds = Augmenter.draw, list[int]()
    monkeypatch.setattr(Augmenter, "draw", lambda self, size, seed: seeds.append(seed) or real(self, size, seed))
    for seed in (1, 2):
        fit("x", small_run(seed=seed, epochs=2), CPU, bars, tmp_path)
    assert len(seeds) == len(set(seeds)) == 2 * 2 * STEPS


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


def test_killed_at_any_write_of_a_save(bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """best/, last/ and metrics.jsonl are those of before or of after, and the end is the same."""
    run = small_run(epochs=2, batch_size=32, optimizer={"lr": 0.03}, seed=2)  # three steps an epoch
    with pytest.raises(Cut):
        fit("x", run, CPU, bars, tmp_path / "cut", cut_after(1))
    whole = fit("x", run, CPU, bars, tmp_path / "whole")
    assert checkpoint.load_meta(whole / "best")["epoch"] == 2  # so that best/ is written anew
    for call in itertools.count(1):
        folder, armed = shutil.copytree(tmp_path / "cut" / whole.name, tmp_path / str(call) / whole.name), list[bool]()
        with monkeypatch.context() as patch:
            killed_at(call, patch, armed)
            try:
                looks = Looks(1, lambda armed=armed: armed.append(True))
                fit("x", run, CPU, bars, folder.parent, leaves=looks)
                break
            except Cut:
                pass
        resumed = Looks()
        fit("x", run, CPU, bars, folder.parent, leaves=resumed)
        assert resumed.count <= 3  # the first epoch is not repeated
        assert_equal_runs(folder, whole)
    assert call == 18


def test_a_finished_run_is_not_trained_but_its_rows_are_mended(bars: Path, tmp_path: Path) -> None:
    run, looks = small_run(epochs=30, patience=1, optimizer={"lr": 1e-6}), Looks()
    folder = fit("x", run, CPU, bars, tmp_path)
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    assert len(lines) < 30  # it ended early
    for damaged in (lines[:1], [*lines, lines[-1]], [*lines[:-1], lines[-1][:20]]):
        metrics.write_text("".join(damaged))
        assert fit("x", run, CPU, bars, tmp_path, leaves=looks) == folder
        assert metrics.read_text() == "".join(lines)
    assert looks.count == 0
    assert evaluate(folder, bars, CPU)["epochs"] == len(lines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 1}, f"{{}}: was started in format 1, not {FORMAT}; delete it to train again"),
        ({"run_id": "y"}, "{}/last: is the checkpoint of another run, y; delete it"),
    ],
)
def test_a_run_of_another_format_or_name_is_refused_and_stays(
    changes: dict[str, Any], message: str, bars: Path, copied: Path
) -> None:
    path = copied / "last" / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    assert refusal(fit, "x", small_run(), CPU, bars, copied.parent) == message.format(copied)
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


# A frozen encoder, and neutral faces to compare with


@pytest.mark.parametrize("kind", ["doe", "same subject", "emotion encoder"])
def test_a_frozen_encoder_stays_as_it_was_to_the_last_bit(kind: str, uncut: dict[str, Path]) -> None:
    run = small_run(**KINDS[kind])
    torch.manual_seed(run.seed)  # as a run begins
    before = build_model(run.model, run.input, 8).state_dict()
    prefix = "identity." if kind == "emotion encoder" else "backbone."
    frozen = {name for name in before if name.startswith(prefix)}
    best, last = (tensors_of(uncut[kind], part) for part in ("best", "last"))
    if kind == "same subject":  # no person's face is kept for another
        assert best["references"].shape == (0, 128)
        frozen.add("references")
    for tensors in (best, last):  # everything else has changed: the other encoder's statistics too
        assert {name for name in before if torch.equal(before[name], tensors[name])} == frozen
    if kind == "doe":  # its references were chosen once
        assert torch.equal(best["references"], last["references"])


# A start from another run


@pytest.fixture
def first(uncut: dict[str, Path], tmp_path: Path) -> Path:
    """A finished run of an emotion encoder, beside which others may start."""
    return shutil.copytree(uncut["emotion encoder"], tmp_path / "runs" / uncut["emotion encoder"].name)


SECOND = doe(init_from="first", epochs=2)


def test_a_run_starts_from_the_best_backbone_of_another(first: Path, bars: Path) -> None:
    (first / "last" / "model.safetensors").unlink()  # those weights are not wanted
    found = fit("x", small_run(**SECOND, **STILL), CPU, bars, first.parent, start=first.name)
    ours, theirs = tensors_of(found), tensors_of(first, "best")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name.startswith("backbone."))
    described = json.loads((found / "config.json").read_text())
    assert (described["start"], described["starts_from"]) == (first.name, ["first"])
    # a backbone that learns may start from a frozen one
    third = small_run(**emotion_encoder(init_from="x", epochs=1), **STILL)
    learned = tensors_of(fit("y", third, CPU, bars, first.parent, start=found.name))
    for name in {name for name in theirs if name.startswith("backbone.") and name.endswith("weight")}:
        torch.testing.assert_close(learned[name], theirs[name], atol=1e-10, rtol=0)


def test_the_run_to_start_from_is_not_needed_to_resume(first: Path, bars: Path) -> None:
    run = small_run(**SECOND)
    whole = fit("x", run, CPU, bars, first.parent, start=first.name)
    shutil.copytree(first, first.with_name("other"))
    with pytest.raises(Cut):
        fit("x", run, CPU, bars, first.parent, cut_after(1), start="other")
    shutil.rmtree(first.with_name("other"))
    resumed = fit("x", run, CPU, bars, first.parent, start="other")
    assert resumed.name == run_id("x", run, open_data(bars).hash, "other") != whole.name
    assert same_bytes(whole, resumed, "last")


def test_a_start_that_cannot_be(first: Path, bars: Path, uncut: dict[str, Path]) -> None:
    """Nothing of the run is written; what does not fit otherwise is in test_run.py."""
    runs = first.parent
    plain = shutil.copytree(uncut["adamw"], runs / "plain").name
    half = shutil.copytree(first, runs / "half")
    meta = checkpoint.load_meta(first / "last")
    (half / "last/checkpoint.json").write_text(json.dumps(meta | {"epoch": 2, "history": meta["history"][:2]}))
    for init_from, start, message in (
        ("first", "y", f"{runs}/y/last: no checkpoint there (checkpoint.json is missing); train the run first"),
        ("first", plain, "init_from: first has no backbone; set it to null"),
        ("first", "half", f"{half}: 2 of 3 epochs are done; finish it with `fer train x`"),
        (None, plain, f"x: init_from is None, the run to start from {plain}; give both or neither"),
    ):
        assert (
            refusal(fit, "x", small_run(**SECOND | {"init_from": init_from}), CPU, bars, runs, start=start) == message
        )
    assert {path.parent.name for path in runs.glob("*/last")} == {first.name, plain, "half"}


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
    return (
        f"{folder.name}: loss is nan in epoch {epoch}, step {step} (lr {rate:.3g}); "
        "lower optimizer.lr, set clip_grad_norm, or use precision fp32"
    )


def test_a_loss_that_is_no_number_stops_the_run(
    bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uncut: dict[str, Path]
) -> None:
    with monkeypatch.context() as patch:
        planted(patch, at=STEPS + 2)
        with pytest.raises(NonFiniteLoss) as caught:
            fit("x", small_run(), CPU, bars, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert str(caught.value) == bad_loss(small_run(), folder, 2, 3)
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


def test_what_cannot_start_leaves_nothing(bars: Path, tmp_path: Path) -> None:
    two, runs = Resources(device="cpu", workers=2), tmp_path / "runs"
    for run, resources, data, message in (
        (small_run(batch_size=15), two, bars, "x: batch_size: 15 does not divide by resources.workers 2"),
        (small_run(), CPU, tmp_path / "data", "summary.json: not found; make the data with `dvc repro`"),
    ):
        assert message in refusal(fit, "x", run, resources, data, runs)
        assert not runs.exists()
