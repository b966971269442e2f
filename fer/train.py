"""One training run: a plain loop over epochs that can be interrupted anywhere and resumes from its last checkpoint.

Every random number is derived from (seed, epoch, step), so an interrupted and resumed run equals the uninterrupted one.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fer import checkpoint
from fer.batches import Feed, TrainBatches, seed_of
from fer.data.dataset import DataSet, open_data
from fer.data.folds import fold_of, titled
from fer.device import pick_device, use_cpu, use_gpu
from fer.errors import UserError
from fer.evaluate import last_epoch, predict_split
from fer.files import recover, write_json
from fer.formats import format_of, read_run
from fer.losses import build_loss
from fer.made_by import UNKNOWN
from fer.metrics import Counts
from fer.models import build_model, origin, weights_files
from fer.resources import Resources
from fer.run import FORMAT, Run, about, balanced_by, chain_faults, resource_faults, run_id
from fer.run_folder import BEST, CONFIG, LAST, Progress, read_config, write_rows
from fer.schedule import lr_at
from fer.signals import Agreement, Request, Stopped, StopSignal
from fer.step import Stepper
from fer.teacher import teacher_of
from fer.weights import DAMAGE

REMEDY = "lower optimizer.lr, set clip_grad_norm, or use precision fp32"
CHECK_EVERY = 50  # steps between checks of the losses where a check waits for the GPU or for other ranks


class NonFiniteLoss(UserError):
    """The loss became infinite or NaN; the message names the run, the step and the learning rate."""


def fit(
    name: str,
    run: Run,
    resources: Resources,
    data_dir: str | Path,
    runs_dir: str | Path,
    on_epoch: Callable[[dict[str, Any]], None] = lambda row: None,
    start: str | None = None,
    leaves: Callable[[], bool] | None = None,
    fold: str | None = None,
) -> Path:
    """Train `run`, or resume it where it was interrupted, and return its folder `runs_dir`/<run id>.

    Within an initialised torch.distributed group every rank calls this, and the ranks divide the batches. `on_epoch`
    receives each new row of metrics.jsonl. `start` is the id of the finished run in `runs_dir` that `init_from` names.
    `leaves` returns whether this machine is about to be reclaimed, which stops the run as SIGTERM does; all ranks of a
    group call it before the same steps, about once a second. `fold`, such as 3/10: train on that part of the data
    (fer.data.folds). A teacher that `run` names is a finished run in `runs_dir`, too.
    Raises UserError (data or weights missing; the run to start from missing, unfinished or with another backbone; the
    teacher missing, unfinished or of other data; no GPU; a batch that cannot be divided), NonFiniteLoss, and Stopped
    once the state is saved after SIGTERM or `fer.signals.ask_to_stop`.
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
    else:
        use_gpu()
    data = fold_of(open_data(data_dir), fold)
    folder = Path(runs_dir) / run_id(titled(name, fold), run, data.hash, start)
    stop = StopSignal(folder, leads=rank == 0, leaves=leaves)
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        recover(folder / LAST), recover(folder / BEST)
    if world > 1:
        dist.barrier()
    with stop:
        trainer = Trainer(name, run, resources, data, folder, device, stop, start)
        while not run.is_over(trainer.history):
            on_epoch(trainer.train_epoch())
    return folder


class Trainer:
    """The state of a run, and how an epoch is trained, evaluated and saved."""

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
        meta = checkpoint.load_meta(folder / LAST) if (folder / LAST).exists() else None
        if meta is not None and format_of(meta) != FORMAT:
            raise UserError(
                f"{folder}: was started in format {format_of(meta)}, not {FORMAT}; delete it to train again"
            )
        if meta is not None and meta["run_id"] != folder.name:
            raise UserError(f"{folder / LAST}: is the checkpoint of another run, {meta['run_id']}; delete it")
        model: Any = _build(run, folder, len(data.classes), meta is None, start).to(device)
        if resources.sync_batch_norm and self.world > 1:
            if device.type == "cpu":
                raise UserError("resources.sync_batch_norm: works on GPUs only; set it to false")
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.since = time.perf_counter()  # computing embeddings before the first epoch counts as training time
        feed, self.val_feed = (Feed(model, run, resources, split, data.classes, device) for split in (train, val))
        if meta is None:
            feed.begin()
        self.batches = TrainBatches(feed, run, resources.accumulate, self.rank, self.world)
        counts = torch.bincount(train.labels, minlength=len(data.classes))
        prior = data.prior(run.loss.needs_prior).to(device)
        about_loss = run.loss, run.class_weights, prior, counts.to(device)
        self.loss, self.val_loss = (
            build_loss(*about_loss, expected, run.logit_adjustment) for expected in (False, True)
        )
        graphs = resources.cuda_graphs and resources.accumulate == 1
        over = meta is not None and run.is_over(meta["history"])
        teacher = None if over else teacher_of(run, data, folder.parent, device, graphs and self.world == 1)
        self.stepper = Stepper(run, model, device, self.world, graphs, teacher)
        self.control = dist.new_group(backend="gloo") if self.world > 1 else None
        self.request = Agreement(self.control, stop) if self.world > 1 else stop.request
        self.steps = self.batches.steps
        self.epoch, self.step = 0, 0  # completed epochs, completed steps of the current one
        self.history: list[dict[str, Any]] = []  # one row per epoch
        self.best, self.best_epoch = -1.0, 0  # best val accuracy so far; of which epoch best/ was at the start
        self.counts = Counts(len(data.classes), device)
        self.spent = 0.0  # seconds that earlier processes spent on the current epoch
        self.about = about(name, folder.name, run, data, device)
        if teacher is not None:
            self.about["balanced"] = balanced_by(checkpoint.load_meta(folder.parent / str(run.teacher) / BEST))
        elif meta is not None and "balanced" in meta:  # training is over, the teacher perhaps gone
            self.about["balanced"] = meta["balanced"]
        if meta is not None:
            self._resume(meta)
        if self.rank == 0:
            known = meta is not None and (folder / CONFIG).exists()
            weights = read_config(folder).get("weights", {}) if known else weights_files(run.model)
            first = {"starts_from": origin(run.model, run.init_from), "start": start, "weights": weights}
            write_json(folder / CONFIG, {**self.about, **first, "resources": resources.model_dump()})
            write_rows(folder, self.history)
        self.progress = Progress(folder, run.epochs) if self.rank == 0 else None

    def _resume(self, meta: dict[str, Any]) -> None:
        """Restore the state of the last checkpoint, described by `meta`; its weights are already loaded."""
        saved = checkpoint.load_training(self.folder / LAST)
        try:
            self.stepper.load_state(saved["stepper"])
            self.step, self.spent = saved["step"], float(saved["seconds"])
            if self.rank == 0:
                self.counts.load_state(saved["counts"])
            fits = self.step in range(self.steps) and math.isfinite(self.spent) and meta["epoch"] <= self.run.epochs
        except DAMAGE:
            fits = False
        if not fits:
            raise checkpoint.foreign(self.folder / LAST)
        self.epoch, self.history = meta["epoch"], meta["history"]
        if (self.folder / BEST).exists():
            self.best_epoch = checkpoint.load_meta(self.folder / BEST)["epoch"]
        made, before = self.about["made_by"], meta.get("made_by", {})
        if others := {*before.get("before", []), before.get("fer", UNKNOWN)} - {made["fer"]}:
            made["before"] = sorted(others)  # the code that trained the epochs so far
        self.best = max([row["val_accuracy"] for row in self.history], default=-1.0)

    def train_epoch(self) -> dict[str, Any]:
        """Train, evaluate and save an epoch; returns its row of metrics.jsonl. Raises NonFiniteLoss and Stopped."""
        trained = self._train()
        if self.world > 1:
            for buffer in self.stepper.evaluated.buffers():
                dist.broadcast(buffer, 0)  # batch norm's statistics differ by rank, and rank 0 saves its own
        found = predict_split(self.stepper.evaluated, self.val_feed, self.val_loss, self.rank, self.world)[1]
        seconds = self._seconds()
        row = {
            "epoch": self.epoch + 1,
            "lr": self.stepper.optimizer.param_groups[0]["lr"],  # of the last step
            **{f"train_{key}": value for key, value in trained.items()},
            **{f"val_{key}": value for key, value in found.result().items()},
            "seconds": seconds,
            "images_per_second": self.batches.images / seconds,
            "time": time.time(),
        }
        if not math.isfinite(row["val_loss"]):
            where = f"after epoch {row['epoch']} (lr {row['lr']:.3g})"
            raise NonFiniteLoss(f"{self.folder.name}: val loss is {row['val_loss']} {where}; {REMEDY}")
        self.epoch, self.step, self.history = self.epoch + 1, 0, [*self.history, row]
        self.counts = Counts(len(self.data.classes), self.device)
        # best/ may be of this very epoch, from before a crash, and may have been rounded otherwise
        is_best = row["val_accuracy"] > self.best or self.epoch == self.best_epoch
        if self.rank == 0:
            self._save(is_best)
        self.since, self.spent = time.perf_counter(), 0.0  # saving counts for no epoch
        self.best = row["val_accuracy"] if is_best else self.best
        return row

    def _train(self) -> dict[str, float]:
        """Take the remaining steps of the epoch; returns mean loss and accuracy over all of its steps."""
        left = self.batches.epoch(self.epoch, self.step)
        self.stepper.network.train()
        unchecked: list[Tensor] = []
        for parts, mixture in left:
            if request := self.request():
                self._stop(request, unchecked)
            seed = seed_of(self.run.seed, self.epoch, self.step, self.rank, 2)
            logits, value = self.stepper(parts, self.loss, mixture, self._rate(self.step), seed)
            labels = torch.cat([part.labels for part in parts])
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

    def _rate(self, step: int) -> float:
        """Learning rate of a step of the current epoch."""
        now = self.epoch + (step + 0.5) / self.steps
        return lr_at(self.run.schedule, self.run.optimizer.lr, now, self.run.epochs)

    def _stop(self, request: Request, unchecked: list[Tensor]) -> None:
        """Save the state in mid-epoch and raise Stopped."""
        if unchecked:
            self._check_finite(unchecked)
        if self.world > 1:
            self.counts.all_reduce()
        if self.rank == 0:
            self._save(is_best=False)
        if self.world > 1:
            dist.barrier(group=self.control)  # the first rank to exit may take the others down
        raise Stopped(
            f"{self.folder.name}: stopped in epoch {self.epoch + 1} after {self.step} of {self.steps} steps; "
            "run the same command to resume",
            terminated=request is Request.LEAVE,
        )

    def _check_finite(self, unchecked: list[Tensor]) -> None:
        """Check the losses since the last check. Raises NonFiniteLoss."""
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
        """best, then last, then metrics.jsonl: if killed in between, the epoch is repeated and still recorded once."""
        meta = {**self.about, "epoch": self.epoch, "history": self.history}
        if is_best:
            checkpoint.save(self.folder / BEST, self.stepper.evaluated.state_dict(), meta, training=None)
        seconds = self._seconds() if self.step else 0.0
        training = {"stepper": self.stepper.state(), "step": self.step, "seconds": seconds}
        training["counts"] = {key: value.cpu() for key, value in self.counts.state().items()}
        checkpoint.save(self.folder / LAST, self.stepper.model.state_dict(), meta, training)
        write_rows(self.folder, self.history)


def _build(run: Run, folder: Path, num_labels: int, fresh: bool, start: str | None) -> nn.Module:
    """The run's network: from its last checkpoint, or fresh, perhaps with the backbone of the run `start`."""
    torch.manual_seed(run.seed)
    model = build_model(run.model, run.input, num_labels, pretrained=fresh)
    if not fresh:
        checkpoint.load_weights(folder / LAST, model)
    elif start is not None:
        first = folder.parent / start
        last_epoch(first)
        faults = chain_faults(run, read_run(checkpoint.load_meta(first / BEST), first / BEST / checkpoint.META))
        if faults:
            raise UserError(str(faults[0]))
        checkpoint.load_backbone(first / BEST, model)
    return model
