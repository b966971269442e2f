"""One training run: its checked settings, its id, and what its files say of it."""

import hashlib
import json
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from fer.data.augment import Augment
from fer.data.dataset import DataSet, seen_before
from fer.errors import UserError
from fer.input import Input
from fer.losses import LOSSES, CrossEntropy, LossKind
from fer.made_by import made_by
from fer.models import MODELS
from fer.models.ensemble import Ensemble
from fer.models.network import ModelKind
from fer.optimizer import OPTIMIZERS, AdamW, Optimizer
from fer.resources import Resources
from fer.schedule import SCHEDULES, Cosine, Linear, Schedule
from fer.settings import Fault, Fraction, Natural, OneOf, Positive, Section, Seed, Unfit, differing

# The format of everything that a run leaves on disk, and part of its id. A changed default or meaning of a setting
# needs a new format; a new setting whose default changes nothing does not. fer/formats.py reads earlier formats.
FORMAT = 2
BALANCING = "class_weights", "balanced_sampling", "logit_adjustment"  # what makes rare classes count for more


class Run(Section):
    """Everything that determines the results of one run."""

    model: Annotated[ModelKind, OneOf({**MODELS, "ensemble": Ensemble})]
    """The network."""
    init_from: str | None = None
    """Experiment whose best checkpoint initialises the backbone; it is trained first."""
    seed: Seed = 1111
    """Seed of all random numbers."""
    epochs: Positive = 8
    """Passes over the training images."""
    patience: Positive | None = None
    """Early stopping: epochs without a better val accuracy after which training ends; null: off."""
    batch_size: Positive = 64
    """Images per step, over all workers."""
    input: Input = Input()
    """How an image is presented to the network."""
    loss: Annotated[LossKind, OneOf(LOSSES)] = CrossEntropy()
    """What training minimises."""
    teacher: str | None = None
    """Finished run on the same data, perhaps an ensemble, whose answers to the same images are learned as well."""
    teacher_share: Fraction = 0.5
    """With a teacher: share of the cross-entropy with its probabilities in what training minimises."""
    class_weights: Fraction = 0.0
    """Loss weight of an image: (images in its class) ^ -this; 0: no weighting, 1: inverse frequency."""
    balanced_sampling: Fraction = 0.0
    """Sampling weight of an image: (images in its class) ^ -this; 0: each once an epoch, 1: classes equally often.

    It adds to `class_weights`, which then also makes losses and gradients larger."""
    logit_adjustment: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Training adds this times log (share of the class in the training images) to the logits, prediction does not.

    0: off; 1: the network learns as if all classes were as frequent (Menon et al. 2021, arXiv 2007.07314). It adds to
    the two above."""
    optimizer: Annotated[Optimizer, OneOf(OPTIMIZERS)] = AdamW()
    """How gradients update the weights."""
    schedule: Annotated[Schedule, OneOf(SCHEDULES)] = Cosine()
    """How the learning rate changes over the run."""
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are clipped to this norm; null: no clipping."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of averaged weights (EMA), evaluated, e.g. 0.999; min(this, (1 + t) / (10 + t)) t steps after the first."""
    sam_rho: Annotated[float, Field(gt=0)] | None = None
    """Sharpness-aware minimisation: radius of its ascent step, e.g. 0.05; doubles the cost; null: off."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the forward pass (autocast); weights and loss stay fp32. bf16 is fp32 on devices that lack it."""
    augment: Augment = Augment()
    """Random augmentation of training images."""
    unmixed_epochs: Natural = 0
    """Number of epochs at the end of training without augment.mixup and augment.cutmix."""

    @model_validator(mode="after")
    def _fits(self) -> "Run":
        found = self.model.faults(self.input)
        if self.sam_rho and self.precision == "fp16":
            found.append(Fault("sam_rho", "needs precision fp32 or bf16, as fp16 scales its gradients"))
        warmup = self.schedule.warmup_epochs
        if isinstance(self.schedule, Cosine | Linear) and warmup >= self.epochs:
            nothing = f"{warmup:g} leaves nothing of epochs {self.epochs}; set it lower, such as to 0"
            found.append(Fault("schedule.warmup_epochs", nothing))
        if self.init_from is not None:
            backbone = self.model.backbones().get("backbone")
            if backbone is None:
                found.append(Fault("init_from", f"model {self.model.name} has no backbone; set it to null"))
            elif backbone.weights is not None:
                found.append(Fault("model.backbone.weights", "init_from gives them; set one of the two to null"))
        if self.teacher is None and self.teacher_share != type(self).model_fields["teacher_share"].default:
            found.append(Fault("teacher_share", "counts for nothing without a teacher; name one, or leave it out"))
        lost = [key for key in ("equalize", "flatten", "standardize") if getattr(self.input, key)]
        if self.teacher is not None and lost:
            found.append(Fault("teacher", f"needs the brightness that input.{lost[0]} takes away; set that to false"))
        if found:
            raise Unfit(found)
        return self

    def is_over(self, rows: list[dict[str, Any]]) -> bool:
        """Whether training is complete. `rows`: those of metrics.jsonl, one per epoch."""
        values = [row["val_accuracy"] for row in rows]
        since = len(values) - 1 - values.index(max(values)) if values else 0  # epochs since the best
        return len(values) >= self.epochs or (self.patience is not None and since >= self.patience)


def resource_faults(run: Run, resources: Resources) -> list[Fault]:
    """Why the batches cannot be divided among the workers and parts of `resources`; empty if they can."""
    parts = resources.workers * resources.accumulate
    if run.batch_size % parts:
        by = f"resources.workers {resources.workers}"
        by += f" times resources.accumulate {resources.accumulate}" if resources.accumulate > 1 else ""
        return [Fault("batch_size", f"{run.batch_size} does not divide by {by}")]
    if (run.augment.mixup or run.augment.cutmix) and run.batch_size // parts % 2:
        cut = f"{run.batch_size} / {resources.workers} workers / {resources.accumulate} parts"
        return [Fault("batch_size", f"augment.mixup and augment.cutmix pair images, but {cut} is odd")]
    return []


def chain_faults(run: Run, start: Run) -> list[Fault]:
    """Why `run` cannot initialise its backbone from `start`, the run that its `init_from` names; empty if it can."""
    ours, theirs = run.model.backbones().get("backbone"), start.model.backbones().get("backbone")
    if theirs is None:
        return [Fault("init_from", f"{run.init_from} has no backbone; set it to null")]
    if ours is not None and not ours.same_network(theirs):
        other = f"{run.init_from} has another backbone ({theirs.name}); give both the same name and settings"
        return [Fault("init_from", other)]
    return []


def chain_pixels(run: Run, start: Run) -> str | None:
    """How `run` prepares images otherwise than `start`, the run that its `init_from` names, if it does."""
    ours, theirs = dict(run.input), dict(start.input)
    other = [key for key in ours if key != "image_size" and ours[key] != theirs[key]]
    if not other:
        return None
    trained = ", ".join(f"input.{key} {theirs[key]}" for key in other)
    return f"{run.init_from} was trained with {trained}, not with {', '.join(str(ours[key]) for key in other)}"


def data_doubts(run: Run, data: DataSet, start: DataSet | None = None) -> list[str]:
    """What `run` asks for in vain of `data`, and what these cannot tell; a line for each.

    `start`: the data of the run that its `init_from` names, if they are others.
    """
    counts, found = data.summary["counts"], []
    if run.loss.of_votes and (data.summary.get("labels") == "hard" or data.summary.get("label_noise")):
        found.append(f"loss {run.loss.name} learns from votes, and these data have a single label an image")
    if run.batch_size > data.summary["totals"]["train"]:
        found.append(f"batch_size {run.batch_size} is more than the {data.summary['totals']['train']} training images")
    for split in ("val", "test"):
        if absent := [name for name in data.classes if not counts[split][name]]:
            found.append(f"{split} holds no image of {', '.join(absent)}, so its numbers say nothing of that")
    if start is not None and (seen := seen_before(data, start)):
        found.append(
            f"{run.init_from}, from which it starts, is trained on {start.summary['set']}, whose train and val hold "
            f"{seen} of the test images that count as unleaked here; divide both data sets alike"
        )
    return found


def run_id(name: str, run: Run, data_hash: str, start: str | None = None) -> str:
    """`<name>-s<seed>-<8 hex>`: the same for the same settings and data, on any machine and number of workers.

    Hashes FORMAT, the settings that differ from their defaults, the training data (`data_hash`), and `start`, the id of
    the run that `init_from` names.
    """
    content: list[Any] = [FORMAT, differing(run), data_hash, start]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return f"{name}-s{run.seed}-{digest[:8]}"


def balanced_by(*metas: dict[str, Any]) -> dict[str, float]:
    """Which of BALANCING runs, or those that they consist of or learned from, were trained with; the largest values.

    `metas`: of each run what `about` returns, with the `balanced` that an ensemble and a student note beside it.
    """
    told = [meta["config"] | meta.get("balanced", {}) for meta in metas]
    found = {key: max(one.get(key, 0.0) for one in told) for key in BALANCING}
    return {key: value for key, value in found.items() if value}


def training_images(meta: dict[str, Any]) -> list[int]:
    """How many training images each class has, in their order; `meta`: as for `balanced_by`.

    Raises UserError if training made rare classes count for more, so that dividing the probabilities by these numbers
    would even them out twice.
    """
    for key, value in balanced_by(meta).items():
        raise UserError(f"{meta['run_id']}: was trained with {key} {value:g}, which evens out the classes already")
    if "counts" not in meta["data"]:
        raise UserError(f"{meta['run_id']}: is of a version that did not note the training images of each class")
    return [meta["data"]["counts"]["train"][name] for name in meta["classes"]]


def about(name: str, run_id: str, run: Run, data: DataSet, device: torch.device) -> dict[str, Any]:
    """What config.json and each checkpoint say of a run, so that it can be used without its data, and who made it."""
    summary = data.summary
    return {
        "format": FORMAT,
        "name": name,
        "run_id": run_id,
        "classes": data.classes,
        "class_prior": summary["class_prior"],
        "data": {key: value for key, value in summary.items() if key not in ("classes", "class_prior")},
        "data_hash": data.hash,
        "config": run.model_dump(),
        "made_by": made_by(device),
    }
