"""One training run: a plain loop over epochs that can be cut anywhere and goes on from its last checkpoint.

Every random number comes from (seed, epoch), so a run that was cut at an epoch's end and resumed is the uncut run.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fer import checkpoint
from fer.config import RunConfig, run_id
from fer.data.augment import Augmenter
from fer.data.dataset import DataSet, open_data
from fer.device import autocast, pick_device
from fer.errors import UserError
from fer.evaluate import finished, predict_split
from fer.feed import Feed
from fer.files import recover, write_json
from fer.losses import Loss, build_loss
from fer.metrics import Counts
from fer.models import build_model, origin
from fer.schedule import lr_at

REMEDY = "lower lr, set clip_grad_norm, or use precision fp32"
CHECK_EVERY = 50  # steps between looks at the losses where a look waits for the GPU or for other ranks


class NonFiniteLoss(UserError):
    """The loss became infinite or not a number; the message names the step, the learning rate and the run."""


@dataclass
class State:
    """What a run carries from epoch to epoch."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: AveragedModel | None
    epoch: int = 0  # epochs done
    history: list[dict[str, Any]] | None = None  # one row an epoch
    best: float = -1.0  # val accuracy

    @property
    def evaluated(self) -> nn.Module:
        """The weights that are evaluated and kept: averaged ones where the run has them."""
        return self.ema.module if self.ema is not None else self.model


def fit(
    name: str,
    run: RunConfig,
    data_dir: str | Path,
    runs_dir: str | Path,
    on_epoch: Callable[[dict[str, Any]], None] = lambda row: None,
    start: str | None = None,
) -> Path:
    """Train `run`, or go on with it where it was cut, and return its folder `runs_dir`/<run id>.

    Inside an initialised torch.distributed group every rank calls this and the ranks share the batches. `on_epoch`
    gets each new row of metrics.jsonl. `start` is the id of the finished run in `runs_dir` that `init_from` names.
    Raises UserError (data missing, weights missing, run to start from missing or unfinished, no GPU) and NonFiniteLoss.
    """
    if (start is None) != (run.init_from is None):
        raise UserError(f"{name}: init_from is {run.init_from}, the run to start from {start}; give both or neither")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = pick_device(run.resources.device)
    if device.type == "cpu":
        torch.set_num_threads(run.resources.cpus_per_worker)
    data = open_data(data_dir)
    folder = Path(runs_dir) / run_id(name, run, data.hash, start)
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        recover(folder / "last"), recover(folder / "best")
    if world > 1:
        dist.barrier()
    train, val = data.split("train"), data.split("val")
    if len(train) < world:
        raise UserError(f"resources.workers: {world} workers for {len(train)} training images; lower workers")
    meta = checkpoint.load_meta(folder / "last") if (folder / "last").exists() else None
    model = _build(run, folder, len(data.classes), meta is None, start).to(device)
    since = time.perf_counter()  # what is embedded before the first epoch counts as training time
    feed, val_feed = (Feed(model, run, split, data.classes, device) for split in (train, val))
    if meta is None:
        feed.choose_references()
    state = _start(run, folder, model, meta, device)
    if rank == 0:
        about = {"name": name, "run_id": folder.name, "starts_from": origin(run), "start": start}
        write_json(folder / "config.json", {**about, **_describe(run, data)})
        _write_metrics(folder, state.history or [])
    counts = torch.bincount(train.labels, minlength=len(data.classes))
    loss = build_loss(run, data.prior().to(device), counts.to(device))
    network: nn.Module = state.model
    if world > 1:
        network = DistributedDataParallel(state.model, device_ids=[device.index] if device.type == "cuda" else None)
    progress = Progress(folder, run.epochs) if rank == 0 else None
    for epoch in range(state.epoch, run.epochs):
        started = time.perf_counter()
        trained = _train_epoch(state, network, feed, loss, epoch, progress, folder.name)
        if world > 1:
            for buffer in state.evaluated.buffers():  # batch-norm statistics differ by rank; those of rank 0 are saved
                dist.broadcast(buffer, 0)
        found = predict_split(state.evaluated, val_feed, loss, rank, world)[1]
        row = {
            "epoch": epoch + 1,
            "lr": state.optimizer.param_groups[0]["lr"],  # of the last step
            **{f"train_{key}": value for key, value in trained.items()},
            **{f"val_{key}": value for key, value in found.result().items()},
            "seconds": time.perf_counter() - since,
            "images_per_second": trained_images(run, len(train)) / (time.perf_counter() - started),
            "time": time.time(),
        }
        if not math.isfinite(row["val_loss"]):
            raise NonFiniteLoss(
                f"{folder.name}: val loss is {row['val_loss']} after epoch {epoch + 1} (lr {row['lr']:.3g}); {REMEDY}"
            )
        since = time.perf_counter()
        state.epoch, state.history = epoch + 1, [*(state.history or []), row]
        if rank == 0:
            _save(state, name, run, data, folder)
        on_epoch(row)
    return folder


def trained_images(run: RunConfig, images: int) -> int:
    """Images of one epoch: whole batches only, so that every step has the configured batch size."""
    return images - images % run.batch_size if images >= run.batch_size else images - images % run.resources.workers


def _build(run: RunConfig, folder: Path, num_labels: int, fresh: bool, start: str | None) -> nn.Module:
    """The run's network: of its last checkpoint, of the run `start`, or as `options` say."""
    torch.manual_seed(run.seed)
    model: Any = build_model(run, num_labels, pretrained=fresh)
    if not fresh:
        checkpoint.load_weights(folder / "last", model)
    elif start is not None:
        finished(folder.parent / start)
        checkpoint.load_backbone(folder.parent / start / "best", model)
    return model


def _start(run: RunConfig, folder: Path, model: nn.Module, meta: dict[str, Any] | None, device: torch.device) -> State:
    """The state at the run's beginning, or that of its last checkpoint, which `meta` describes."""
    ema = (
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(run.ema_decay), use_buffers=True)
        if run.ema_decay
        else None
    )
    state = State(
        model, _optimizer(run, model), torch.amp.GradScaler(device.type, enabled=run.precision == "fp16"), ema
    )
    if meta is None:
        return state
    saved = checkpoint.load_training(folder / "last")
    state.optimizer.load_state_dict(saved["optimizer"])
    state.scaler.load_state_dict(saved["scaler"])
    if ema is not None:
        ema.load_state_dict(saved["ema"])
    state.epoch, state.history = meta["epoch"], meta["history"]
    state.best = max(row["val_accuracy"] for row in meta["history"])
    return state


def _optimizer(run: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Weight decay on matrices and kernels only, not on biases and norms."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": run.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if run.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=run.lr, momentum=run.momentum)
    kind = torch.optim.AdamW if run.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=run.lr)


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def batches(run: RunConfig, labels: Tensor, epoch: int, rank: int, world: int) -> Iterator[tuple[np.ndarray, slice]]:
    """The index of each batch's images that this rank trains on, and which part of the whole batch it is.

    `labels` [n] of the training images; balanced_sampling draws with their classes' chances, with repetition.
    """
    images = len(labels)
    generator = np.random.default_rng([run.seed, epoch])
    if run.balanced_sampling:
        chance = torch.bincount(labels)[labels].double().pow(-run.balanced_sampling)
        order = generator.choice(images, images, p=(chance / chance.sum()).numpy())
    else:
        order = generator.permutation(images)
    size = min(run.batch_size, trained_images(run, images))
    share = size // world
    part = slice(rank * share, (rank + 1) * share)
    for first in range(0, trained_images(run, images), size):
        yield order[first : first + size][part], part


def _train_epoch(
    state: State,
    network: nn.Module,
    feed: Feed,
    loss: Loss,
    epoch: int,
    progress: "Progress | None",
    name: str,
) -> dict[str, float]:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    run, train, device = feed.run, feed.split, feed.device
    torch.manual_seed(_seed(run.seed, epoch, rank))  # dropout, drop path
    augment = Augmenter(run.augment, _seed(run.seed, epoch), device)
    feed.start_epoch(epoch)
    network.train()
    counts = Counts(train.targets.shape[1], device)
    steps = max(1, len(train) // run.batch_size)
    unchecked: list[Tensor] = []
    for step, (index, part) in enumerate(batches(run, train.labels, epoch, rank, world)):
        rate = lr_at(run, epoch + (step + 0.5) / steps)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        inputs = feed(index, partial(augment, batch_size=len(index) * world, part=part))
        labels, targets = train.labels[index].to(device), train.targets[index].to(device)
        with autocast(run.precision, device):
            logits = network(**inputs)
        value = loss(logits, labels, targets)
        unchecked.append(value.detach())
        if (device.type == "cpu" and world == 1) or len(unchecked) == CHECK_EVERY or step == steps - 1:
            _check_finite(unchecked, world, run, epoch, step, steps, name)
        _update(state, run, value)
        counts.update(logits, labels, value)
        if progress is not None:
            progress(epoch, step + 1, steps)
    if world > 1:
        counts.all_reduce()
    return {key: value for key, value in counts.result().items() if key in ("loss", "accuracy")}


def _update(state: State, run: RunConfig, value: Tensor) -> None:
    state.optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(value).backward()
    if run.clip_grad_norm is not None:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.model.parameters(), run.clip_grad_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    if state.ema is not None:
        state.ema.update_parameters(state.model)


def _check_finite(
    unchecked: list[Tensor], world: int, run: RunConfig, epoch: int, step: int, steps: int, name: str
) -> None:
    """Look at the losses since the last look; `step` is that of the newest."""
    values = torch.stack(unchecked)
    unchecked.clear()
    if world > 1:
        dist.all_reduce(values)  # so that every rank stops
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        at = step - len(values) + 1 + int(bad[0])
        rate = lr_at(run, epoch + (at + 0.5) / steps)
        where = f"epoch {epoch + 1}, step {at + 1} (lr {rate:.3g})"
        raise NonFiniteLoss(f"{name}: loss is {float(values[int(bad[0])])} in {where}; {REMEDY}")


class Progress:
    """progress.json, at most once a second: where a run is, for whoever draws a bar."""

    def __init__(self, folder: Path, epochs: int):
        self.path, self.epochs, self.written = folder / "progress.json", epochs, 0.0

    def __call__(self, epoch: int, step: int, steps: int) -> None:
        now = time.monotonic()
        if now - self.written >= 1 or step == steps:
            self.written = now
            write_json(self.path, {"epoch": epoch, "epochs": self.epochs, "step": step, "steps": steps})


def _save(state: State, name: str, run: RunConfig, data: DataSet, folder: Path) -> None:
    """best, then last, then the line of metrics.jsonl: a cut between them repeats the epoch and doubles nothing."""
    assert state.history
    row = state.history[-1]
    meta = {"name": name, "run_id": folder.name, **_describe(run, data)}
    meta |= {"epoch": state.epoch, "history": state.history}
    if row["val_accuracy"] > state.best:
        state.best = row["val_accuracy"]
        checkpoint.save(folder / "best", state.evaluated.state_dict(), meta, training=None)
    training = {
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "ema": state.ema.state_dict() if state.ema is not None else None,
    }
    checkpoint.save(folder / "last", state.model.state_dict(), meta, training)
    _write_metrics(folder, state.history)


def _write_metrics(folder: Path, history: list[dict[str, Any]]) -> None:
    """metrics.jsonl as the last checkpoint knows it, so that an epoch that was cut and repeated stands there once."""
    partial = folder / "metrics.jsonl.partial"
    partial.write_text("".join(json.dumps(row) + "\n" for row in history))
    os.replace(partial, folder / "metrics.jsonl")


def _describe(run: RunConfig, data: DataSet) -> dict[str, Any]:
    """What a checkpoint needs to be used alone: class order, preprocessing, prior, configuration, data."""
    return {
        "classes": data.classes,
        "class_prior": data.summary["class_prior"],
        "data": {key: value for key, value in data.summary.items() if key not in ("classes", "class_prior")},
        "data_hash": data.hash,
        "config": run.model_dump(),
    }
