"""One training run: a plain loop over epochs that can be cut anywhere and goes on from its last checkpoint.

Every random number comes from (seed, epoch, step), so a run that was cut and resumed is the uncut run.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fer import checkpoint
from fer.data.augment import Augmenter, draw_mixture
from fer.data.dataset import DataSet, open_data
from fer.device import pick_device, use_cpu
from fer.errors import UserError
from fer.evaluate import finished, predict_split
from fer.feed import Feed
from fer.files import recover, write_json
from fer.formats import format_of, read_run
from fer.losses import build_loss
from fer.made_by import made_by
from fer.metrics import Counts
from fer.models import build_model, origin
from fer.resources import Resources
from fer.run import FORMAT, Run, chain_faults, resource_faults, run_id
from fer.schedule import lr_at
from fer.step import Part, Stepper
from fer.stop import Stopped, StopSignal

REMEDY = "lower optimizer.lr, set clip_grad_norm, or use precision fp32"
CHECK_EVERY = 50  # steps between looks at the losses where a look waits for the GPU or for other ranks
AGREE_SECONDS = 1.0  # after which several ranks agree again whether to stop


class NonFiniteLoss(UserError):
    """The loss became infinite or not a number; the message names the step, the learning rate and the run."""


def fit(
    name: str,
    run: Run,
    resources: Resources,
    data_dir: str | Path,
    runs_dir: str | Path,
    on_epoch: Callable[[dict[str, Any]], None] = lambda row: None,
    start: str | None = None,
) -> Path:
    """Train `run`, or go on with it where it was cut, and return its folder `runs_dir`/<run id>.

    Inside an initialised torch.distributed group every rank calls this and the ranks share the batches. `on_epoch`
    gets each new row of metrics.jsonl. `start` is the id of the finished run in `runs_dir` that `init_from` names.
    Raises UserError (data missing, weights missing, run to start from missing, unfinished or with another backbone, no
    GPU, a batch that cannot be shared), NonFiniteLoss, and Stopped when SIGTERM or `fer.stop.ask_to_stop` asked for an
    end and the state is saved.
    """
    if (start is None) != (run.init_from is None):
        raise UserError(f"{name}: init_from is {run.init_from}, the run to start from {start}; give both or neither")
    faults = resource_faults(run, resources)
    if faults:
        raise UserError(f"{name}: {faults[0]}")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = pick_device(resources.device)
    if device.type == "cpu":
        use_cpu(resources.cpus_per_worker)
    data = open_data(data_dir)
    folder = Path(runs_dir) / run_id(name, run, data.hash, start)
    stop = StopSignal(folder, leads=rank == 0)
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        recover(folder / "last"), recover(folder / "best")
    if world > 1:
        dist.barrier()
    with stop:
        trainer = Trainer(name, run, resources, data, folder, device, stop, start)
        while trainer.epoch < run.epochs:
            on_epoch(trainer.train_epoch())
    return folder


class Trainer:
    """What a run carries from step to step, and how an epoch is trained, evaluated and saved."""

    def __init__(
        self, name: str, run: Run, resources: Resources, data: DataSet, folder: Path, device: torch.device,
        stop: StopSignal, start: str | None,
    ):  # fmt: skip
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.name, self.run, self.resources, self.data = name, run, resources, data
        self.folder, self.device, self.stop = folder, device, stop
        train, val = data.split("train"), data.split("val")
        if len(train) < self.world:
            raise UserError(f"resources.workers: {self.world} workers for {len(train)} training images; lower workers")
        meta = checkpoint.load_meta(folder / "last") if (folder / "last").exists() else None
        if meta is not None and format_of(meta) != FORMAT:
            raise UserError(f"{folder}: was begun in format {format_of(meta)}, not {FORMAT}; delete it to train anew")
        model: Any = _build(run, folder, len(data.classes), meta is None, start).to(device)
        if resources.sync_batch_norm and self.world > 1:
            if device.type == "cpu":
                raise UserError("resources.sync_batch_norm: works on GPUs only; set it to false")
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.since = time.perf_counter()  # what is embedded before the first epoch counts as training time
        self.feed, self.val_feed = (Feed(model, run, resources, split, data.classes, device) for split in (train, val))
        if meta is None:
            self.feed.begin()
        counts = torch.bincount(train.labels, minlength=len(data.classes))
        about_loss = run.loss, run.class_weights, data.prior().to(device), counts.to(device)
        self.loss, self.val_loss = build_loss(*about_loss), build_loss(*about_loss, expected=True)
        self.augment = Augmenter(run.augment, device)
        self.stepper = Stepper(run, model, device, self.world, resources.compile)
        self.control = dist.new_group(backend="gloo") if self.world > 1 else None
        self.agree = Agreement(self.control) if self.world > 1 else bool
        self.steps = max(1, len(train) // run.batch_size)
        self.epoch, self.step = 0, 0  # epochs done, steps done of the next one
        self.history: list[dict[str, Any]] = []  # one row an epoch
        self.best = -1.0  # val accuracy
        self.counts = Counts(len(data.classes), device)
        self.spent = 0.0  # seconds, by earlier processes in the epoch under way
        if meta is not None:
            self._resume(meta)
        if self.rank == 0:
            about = {"starts_from": origin(run.model, run.init_from), "start": start}
            write_json(folder / "config.json", {**self._about(), **about, "resources": resources.model_dump()})
            _write_metrics(folder, self.history)
        self.progress = Progress(folder, run.epochs) if self.rank == 0 else None

    def _resume(self, meta: dict[str, Any]) -> None:
        """From the last checkpoint, which `meta` describes; its weights are loaded."""
        saved = checkpoint.load_training(self.folder / "last")
        self.stepper.load_state(saved["stepper"])
        self.epoch, self.step, self.spent = meta["epoch"], saved["step"], saved["seconds"]
        self.history = meta["history"]
        self.best = max([row["val_accuracy"] for row in self.history], default=-1.0)
        if self.rank == 0:
            self.counts.load_state(saved["counts"])

    def train_epoch(self) -> dict[str, Any]:
        """Train, evaluate and save; the new row of metrics.jsonl."""
        trained = self._train()
        if self.world > 1:
            for buffer in self.stepper.evaluated.buffers():  # batch-norm statistics differ; those of rank 0 are saved
                dist.broadcast(buffer, 0)
        found = predict_split(self.stepper.evaluated, self.val_feed, self.val_loss, self.rank, self.world)[1]
        seconds = self._seconds()
        row = {
            "epoch": self.epoch + 1,
            "lr": self.stepper.optimizer.param_groups[0]["lr"],  # of the last step
            **{f"train_{key}": value for key, value in trained.items()},
            **{f"val_{key}": value for key, value in found.result().items()},
            "seconds": seconds,
            "images_per_second": trained_images(self.run.batch_size, len(self.feed.split), self.world) / seconds,
            "time": time.time(),
        }
        if not math.isfinite(row["val_loss"]):
            where = f"after epoch {row['epoch']} (lr {row['lr']:.3g})"
            raise NonFiniteLoss(f"{self.folder.name}: val loss is {row['val_loss']} {where}; {REMEDY}")
        self.since, self.spent = time.perf_counter(), 0.0
        self.epoch, self.step, self.history = self.epoch + 1, 0, [*self.history, row]
        self.counts = Counts(len(self.data.classes), self.device)
        if self.rank == 0:
            self._save(row["val_accuracy"] > self.best)
        self.best = max(self.best, row["val_accuracy"])
        return row

    def _train(self) -> dict[str, float]:
        """The rest of an epoch's steps; mean loss and accuracy of all of them."""
        run, labels = self.run, self.feed.split.labels
        self.feed.start_epoch(self.epoch)
        self.stepper.network.train()
        plan = list(batches(run, labels, self.epoch, self.rank, self.world))[self.step :]
        divided = [_divide(index, part, self.resources.accumulate) for index, part in plan]
        pixels = self.feed.batches([index for parts in divided for index, _ in parts])
        unchecked: list[Tensor] = []
        for parts in divided:
            if self.agree(self.stop.asked()):
                self._stop(unchecked)
            logits, labels, value = self._one_step(parts, pixels)
            unchecked.append(value)
            self.counts.update(logits, labels, value)
            self.step += 1
            cheap = self.device.type == "cpu" and self.world == 1
            if cheap or len(unchecked) == CHECK_EVERY or self.step == self.steps:
                self._check_finite(unchecked)
            if self.progress is not None:
                self.progress(self.epoch, self.step, self.steps)
        if self.world > 1:
            self.counts.all_reduce()
        return {key: value for key, value in self.counts.result().items() if key in ("loss", "accuracy")}

    def _one_step(self, parts: list[tuple[np.ndarray, slice]], pixels: Iterator) -> tuple[Tensor, Tensor, Tensor]:
        """The next step, with the images of `parts`, whose pixels come next; logits [B, C], labels [B], mean loss."""
        run, here = self.run, (self.epoch, self.step)
        share = sum(len(index) for index, _ in parts)
        draws = self.augment.draw(share * self.world, _seed(run.seed, *here))
        mixture = draw_mixture(run.augment, run.input.image_size, _seed(run.seed, *here, 1))
        fed = []
        for (index, part), (_, raw) in zip(parts, pixels):
            change = self.augment.changes(draws[part], run.input.image_size)
            fed.append(Part(self.feed(index, raw, change, mixture), *self.feed.truth(index), len(index) / share))
        rate = self._rate(self.step)
        logits, value = self.stepper(fed, self.loss, mixture, rate, _seed(run.seed, *here, self.rank, 2))
        return logits, torch.cat([part.labels for part in fed]), value

    def _rate(self, step: int) -> float:
        """Learning rate of a step of the epoch under way."""
        now = self.epoch + (step + 0.5) / self.steps
        return lr_at(self.run.schedule, self.run.optimizer.lr, now, self.run.epochs)

    def _stop(self, unchecked: list[Tensor]) -> None:
        """Save the state in the middle of the epoch, and end."""
        if unchecked:
            self._check_finite(unchecked)
        if self.world > 1:
            self.counts.all_reduce()
        if self.rank == 0:
            self._save(is_best=False)
        if self.world > 1:
            dist.barrier(group=self.control)  # who ends first may end all
        raise Stopped(
            f"{self.folder.name}: stopped in epoch {self.epoch + 1} after {self.step} of {self.steps} steps, as asked; "
            "the same command goes on",
            self.stop.terminated,
        )

    def _check_finite(self, unchecked: list[Tensor]) -> None:
        """Look at the losses since the last look."""
        values = torch.stack(unchecked)
        unchecked.clear()
        if self.world > 1:
            dist.all_reduce(values)  # so that every rank stops
        bad = (~torch.isfinite(values)).nonzero()
        if len(bad):
            at = self.step - len(values) + int(bad[0])
            where = f"epoch {self.epoch + 1}, step {at + 1} (lr {self._rate(at):.3g})"
            raise NonFiniteLoss(f"{self.folder.name}: loss is {float(values[int(bad[0])])} in {where}; {REMEDY}")

    def _seconds(self) -> float:
        return self.spent + time.perf_counter() - self.since

    def _save(self, is_best: bool) -> None:
        """best, then last, then the line of metrics.jsonl: a cut between them repeats the epoch and doubles nothing."""
        meta = {**self._about(), "epoch": self.epoch, "history": self.history}
        if is_best:
            checkpoint.save(self.folder / "best", self.stepper.evaluated.state_dict(), meta, training=None)
        seconds = self._seconds() if self.step else 0.0
        training = {"stepper": self.stepper.state(), "step": self.step, "seconds": seconds}
        training["counts"] = {key: value.cpu() for key, value in self.counts.state().items()}
        checkpoint.save(self.folder / "last", self.stepper.model.state_dict(), meta, training)
        _write_metrics(self.folder, self.history)

    def _about(self) -> dict[str, Any]:
        """What a checkpoint needs to be used alone: classes, preprocessing, prior, settings, data; and who made it."""
        summary = self.data.summary
        return {
            "format": FORMAT,
            "name": self.name,
            "run_id": self.folder.name,
            "classes": self.data.classes,
            "class_prior": summary["class_prior"],
            "data": {key: value for key, value in summary.items() if key not in ("classes", "class_prior")},
            "data_hash": self.data.hash,
            "config": self.run.model_dump(),
            "made_by": made_by(self.device, torch.get_num_threads()),
        }


class Agreement:
    """Whether any of several ranks wishes to stop: asked about once a second, and at the same step on all of them."""

    def __init__(self, group: Any):
        self.group, self.every, self.since = group, 0, time.monotonic()
        self.steps = -1  # since the last time; nothing is known of their length before the first one

    def __call__(self, wish: bool) -> bool:
        """Called before each step."""
        self.steps += 1
        if self.steps < self.every:
            return False
        found = torch.tensor([float(wish), time.monotonic() - self.since])
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)  # the slowest rank's time
        wished, seconds = found.tolist()
        self.every = max(1, int(self.steps * min(AGREE_SECONDS / max(seconds, 1e-9), 10)))  # steps in a second
        self.steps, self.since = 0, time.monotonic()
        return wished > 0


def _divide(index: np.ndarray, part: slice, count: int) -> list[tuple[np.ndarray, slice]]:
    """A worker's share of a batch in `count` pieces, each with its place in the whole batch."""
    pieces = [piece for piece in np.array_split(index, count) if len(piece)]
    ends = part.start + np.cumsum([len(piece) for piece in pieces])
    return [(piece, slice(int(end) - len(piece), int(end))) for piece, end in zip(pieces, ends)]


def trained_images(batch_size: int, images: int, world: int) -> int:
    """Images of one epoch: whole batches only, so that every step has the configured batch size."""
    return images - images % (batch_size if images >= batch_size else world)


def _build(run: Run, folder: Path, num_labels: int, fresh: bool, start: str | None) -> nn.Module:
    """The run's network: of its last checkpoint, of the run `start`, or as its settings say."""
    torch.manual_seed(run.seed)
    model = build_model(run.model, run.input, num_labels, pretrained=fresh)
    if not fresh:
        checkpoint.load_weights(folder / "last", model)
    elif start is not None:
        first = folder.parent / start
        finished(first)
        faults = chain_faults(run, read_run(checkpoint.load_meta(first / "best"), first / "best" / checkpoint.META))
        if faults:
            raise UserError(str(faults[0]))
        checkpoint.load_backbone(first / "best", model)
    return model


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def batches(run: Run, labels: Tensor, epoch: int, rank: int, world: int) -> Iterator[tuple[np.ndarray, slice]]:
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
    trained = trained_images(run.batch_size, images, world)
    size = min(run.batch_size, trained)
    share = size // world
    part = slice(rank * share, (rank + 1) * share)
    for first in range(0, trained, size):
        yield order[first : first + size][part], part


class Progress:
    """progress.json, at most once a second: where a run is, for whoever draws a bar."""

    def __init__(self, folder: Path, epochs: int):
        self.path, self.epochs, self.written = folder / "progress.json", epochs, 0.0

    def __call__(self, epoch: int, step: int, steps: int) -> None:
        now = time.monotonic()
        if now - self.written >= 1 or step == steps:
            self.written = now
            write_json(self.path, {"epoch": epoch, "epochs": self.epochs, "step": step, "steps": steps})


def _write_metrics(folder: Path, history: list[dict[str, Any]]) -> None:
    """metrics.jsonl as the last checkpoint knows it, so that an epoch that was cut and repeated stands there once."""
    partial = folder / "metrics.jsonl.partial"
    partial.write_text("".join(json.dumps(row) + "\n" for row in history))
    os.replace(partial, folder / "metrics.jsonl")
