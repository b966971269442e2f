"""The learning rate as a function of the epoch. It is stateless, so there is nothing to restore when a run resumes."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fer.settings import Fault, Fraction, NonNegative, Positive, Section, Unfit, by_name


class Schedule(Section):
    """A row of SCHEDULES; each begins with a linear warm-up from 0."""

    name: str
    warmup_epochs: NonNegative = 1.0
    """Epochs over which the learning rate rises from 0 to optimizer.lr."""

    def factor(self, epoch: float, epochs: int) -> float:
        """Multiplier of optimizer.lr at `epoch`, after the warm-up, in a run of `epochs` epochs."""
        raise NotImplementedError


class Cosine(Schedule):
    """Half a cosine that falls to the end of the run (Loshchilov & Hutter 2017, arXiv 1608.03983, equation 5)."""

    name: Literal["cosine"] = "cosine"
    min_lr_ratio: Fraction = 0.01
    """Learning rate at the end of the run, as a share of optimizer.lr."""

    def factor(self, epoch: float, epochs: int) -> float:
        progress = min(1.0, (epoch - self.warmup_epochs) / (epochs - self.warmup_epochs))
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2


class Linear(Schedule):
    """A straight line down to the end of the run; with a long warm-up it is a triangular one-cycle schedule."""

    name: Literal["linear"] = "linear"
    min_lr_ratio: Fraction = 0.0
    """Rate at the end of the run, as a share of optimizer.lr."""

    def factor(self, epoch: float, epochs: int) -> float:
        progress = min(1.0, (epoch - self.warmup_epochs) / (epochs - self.warmup_epochs))
        return 1 - (1 - self.min_lr_ratio) * progress


class Step(Schedule):
    """Piecewise constant: the learning rate changes at the start of given epochs."""

    name: Literal["step"] = "step"
    step_epochs: list[Positive]
    """Epochs, counted from 0, at whose start the learning rate changes."""
    step_factors: list[Annotated[float, Field(gt=0, le=1)]]
    """Learning rate from each of step_epochs on, as a share of optimizer.lr."""

    @model_validator(mode="after")
    def _pairs(self) -> "Step":
        found = []
        if sorted(set(self.step_epochs)) != self.step_epochs:
            found.append(Fault("step_epochs", f"must rise, got {self.step_epochs}"))
        if len(self.step_epochs) != len(self.step_factors):
            found.append(
                Fault("step_factors", f"has {len(self.step_factors)} numbers, step_epochs {len(self.step_epochs)}")
            )
        if found:
            raise Unfit(found)
        return self

    def factor(self, epoch: float, epochs: int) -> float:
        passed = [factor for start, factor in zip(self.step_epochs, self.step_factors) if epoch >= start]
        return passed[-1] if passed else 1.0


class Constant(Schedule):
    """The learning rate stays at optimizer.lr after the warm-up."""

    name: Literal["constant"] = "constant"

    def factor(self, epoch: float, epochs: int) -> float:
        return 1.0


SCHEDULES = by_name(Cosine, Linear, Step, Constant)


def lr_at(schedule: Schedule, lr: float, epoch: float, epochs: int) -> float:
    """Learning rate `epoch` epochs into a run of `epochs` (2.5: half-way through the third), warm-up included."""
    if epoch < schedule.warmup_epochs:
        return lr * epoch / schedule.warmup_epochs
    return lr * schedule.factor(epoch, epochs)
