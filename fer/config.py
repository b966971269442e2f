"""One training run, typed and checked, and its id. Fields are keys of `train` and `models.<name>` in params.yaml."""

import difflib
import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A frozen group of keys: unknown keys are refused, no type is converted, no key has a default."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class Augment(Section):
    """Random changes of a training image; evaluation sees none of them."""

    flip: Fraction  # probability of a horizontal flip
    rotation: Annotated[float, Field(ge=0, le=180)]  # degrees, uniform in +-rotation
    scale: Annotated[float, Field(ge=0, lt=1)]  # zoom, uniform in 1 +- scale
    translation: Fraction  # share of the side, uniform in +-translation on each axis
    brightness: NonNegative  # factor uniform in 1 +- brightness
    contrast: NonNegative  # factor uniform in 1 +- contrast, around the image's mean
    saturation: NonNegative  # factor uniform in 1 +- saturation, around each pixel's grey; nothing on grey images
    erasing: Fraction  # probability that one random rectangle is set to the image's mean
    mixup: NonNegative  # a of Beta(a, a), from which the share of the other image is drawn; 0: off
    cutmix: NonNegative  # likewise, of the area of a rectangle; where both are on, a batch gets one by chance

    @property
    def changes_images(self) -> bool:
        return any(self.model_dump().values())


class Resources(Section):
    """Where a run computes. Not part of the run id: a run may move between machines and go on."""

    device: Literal["auto", "cpu", "cuda"]
    workers: Positive  # processes that share the run (DDP)
    cpus_per_worker: Positive
    gpus_per_worker: NonNegative  # used where the device is a GPU; below 1, runs share one
    accumulate: Positive  # parts in which a worker works off its share of a batch, to save memory
    sync_batch_norm: bool  # batch norm over the parts of all workers; on GPUs
    compile: bool  # torch.compile of the training step
    data_share: Fraction  # of the free GPU memory that a split's images may take; larger ones are read ahead
    readers: Annotated[int, Field(ge=0)]  # processes that read ahead

    @model_validator(mode="after")
    def _whole_gpus(self) -> "Resources":
        if self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise ValueError(f"gpus_per_worker above 1 must be a whole number, got {self.gpus_per_worker:g}")
        return self


class RunConfig(Section):
    """Everything that decides the numbers of one run, and the resources it asks for."""

    model: str  # row of fer.models.MODELS
    options: dict[str, Any]  # of that model, checked by its own class
    init_from: str | None  # model of params.yaml whose best checkpoint the backbone starts from
    seed: Annotated[int, Field(ge=0)]
    epochs: Positive
    batch_size: Positive  # over all workers
    eval_batch_size: Positive  # per worker; changes no number
    image_size: Positive  # pixels, side of the square that the model sees
    channels: Literal[1, 3]  # of the model's input; grey images are repeated, colour ones averaged
    pixel_mean: list[Fraction]  # per channel, in [0, 1]
    pixel_std: list[Annotated[float, Field(gt=0)]]
    loss: str  # row of fer.losses.LOSSES
    loss_alpha: Fraction  # weight of the true label in label_smoothing and the pdls losses
    loss_gamma: NonNegative  # focusing exponent of focal, focal_pdls
    class_weights: Fraction  # weight of an image's loss: images of its class ^ -this; 0 no weights, 1 inverse frequency
    balanced_sampling: Fraction  # chance to be drawn: images of its class ^ -this; 0 each once, 1 all classes alike
    optimizer: Literal["adamw", "adam", "sgd"]
    lr: Annotated[float, Field(gt=0)]
    momentum: Annotated[float, Field(ge=0, lt=1)]  # sgd
    weight_decay: NonNegative
    schedule: Literal["cosine", "step", "constant"]
    warmup_epochs: NonNegative
    min_lr_ratio: Fraction  # cosine: final lr / lr
    step_epochs: list[Positive]  # step: epochs (the first is 0) from which on ...
    step_factors: list[Annotated[float, Field(gt=0, le=1)]]  # ... the lr is lr times this
    clip_grad_norm: Annotated[float, Field(gt=0)] | None
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None  # evaluates and saves the averaged weights
    sam_rho: Annotated[float, Field(gt=0)] | None  # sharpness-aware minimisation: radius of its step uphill
    precision: Literal["fp32", "bf16", "fp16"]  # of the forward pass; weights and loss stay fp32
    augment: Augment
    resources: Resources

    @model_validator(mode="after")
    def _fits(self) -> "RunConfig":
        found = []
        workers, parts = self.resources.workers, self.resources.accumulate
        if self.batch_size % (workers * parts):
            by = f"resources.workers {workers}" + (f" times resources.accumulate {parts}" if parts > 1 else "")
            found.append(f"batch_size {self.batch_size} does not divide by {by}")
        elif (self.augment.mixup or self.augment.cutmix) and self.batch_size // (workers * parts) % 2:
            found.append(
                f"augment.mixup and cutmix pair images: batch_size {self.batch_size} / {workers} workers / "
                f"{parts} parts is odd"
            )
        if self.sam_rho and self.precision == "fp16":
            found.append("sam_rho needs precision fp32 or bf16, as fp16 scales its gradients")
        for key in ("pixel_mean", "pixel_std"):
            if len(getattr(self, key)) != self.channels:
                found.append(f"{key} has {len(getattr(self, key))} numbers but channels is {self.channels}")
        if self.schedule == "cosine" and self.warmup_epochs >= self.epochs:
            found.append(f"warmup_epochs {self.warmup_epochs:g} leaves nothing of epochs {self.epochs}")
        if sorted(set(self.step_epochs)) != self.step_epochs:
            found.append(f"step_epochs {self.step_epochs} must rise")
        if len(self.step_epochs) != len(self.step_factors):
            found.append(f"step_factors has {len(self.step_factors)} numbers, step_epochs {len(self.step_epochs)}")
        if found:
            raise ValueError("\n".join(found))
        return self


def run_id(name: str, config: RunConfig, data_hash: str, start: str | None = None) -> str:
    """`<name>-s<seed>-<8 hex>`: equal for equal config and data, whatever machine and number of workers.

    `start`: the id of the run that `init_from` names.
    """
    content = [config.model_dump(exclude={"resources", "eval_batch_size"}), data_hash, start]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return f"{name}-s{config.seed}-{digest[:8]}"


def nearest(word: str, known: list[str]) -> str:
    """` (did you mean 'x'?)` or the list of what is known, to end a message about an unknown name."""
    match = [name for name in known if word and name.startswith(word)] or difflib.get_close_matches(word, known, n=1)
    return f", did you mean '{match[0]}'?" if match else f"; known: {', '.join(sorted(known))}"


def faults(error: ValidationError, section: type[BaseModel], prefix: str = "") -> list[str]:
    """One line per fault of a pydantic check, each with its dotted path under `prefix`."""
    lines = []
    for fault in error.errors():
        path = ".".join(str(part) for part in (prefix, *fault["loc"]) if part != "")
        if fault["type"] == "extra_forbidden":
            known = _keys_at(section, fault["loc"][:-1])
            lines.append(f"{path}: unknown key{nearest(str(fault['loc'][-1]), known)}")
        elif fault["type"] == "missing":
            lines.append(f"{path}: missing")
        elif fault["type"] == "value_error":
            lines += [f"{path}: {line}" for line in str(fault["ctx"]["error"]).splitlines()]
        elif fault["type"] in ("model_type", "dict_type"):
            lines.append(f"{path}: should be a table of keys, got {fault['input']!r}")
        else:
            got = "" if isinstance(fault["input"], dict) else f", got {fault['input']!r}"
            message = fault["msg"].removeprefix("Input ").removeprefix("String ")
            lines.append(f"{path}: {message}{got}")
    return lines


def _keys_at(section: type[BaseModel], path: tuple) -> list[str]:
    for part in path:
        annotation = section.model_fields[part].annotation if part in section.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        section = annotation
    return list(section.model_fields)
