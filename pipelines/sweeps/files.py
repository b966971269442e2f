"""The JSON files in the folder of a sweep, read back: each is whole, or one line that says what to do."""

from pathlib import Path
from typing import Any

from pydantic import model_validator

from fer.settings import Fault, Fraction, NonNegative, Positive, Unfit
from fer.stored import Count, Stored, read

ABOUT, NOTE, RESULT = "sweep.json", "trial.json", "result.json"


class Budget(Stored):
    """How much a sweep may search."""

    trials: Positive
    hours: float | None = None
    confirm_seeds: Count = 0


class About(Stored):
    """sweep.json, of any layout."""

    name: str
    run: dict[str, Any]
    epochs: Positive | None = None  # format 1 has it in `run` alone
    budget: Budget

    @model_validator(mode="after")
    def _fits(self) -> "About":
        if self.epochs is None and type(self.run.get("epochs")) is not int:
            raise Unfit([Fault("epochs", "missing")])
        return self


class Note(Stored):
    """trial.json."""

    point: dict[str, Any]
    began: float
    done: bool
    error: str | None


class Best(Stored):
    """The best trial of a result, and the first."""

    val_accuracy: Fraction | None
    epoch: Count


class Numbered(Best):
    """The best trial of a result."""

    number: Positive
    point: dict[str, Any]


class First(Best):
    """The base as a trial; epoch 0: not run."""

    epochs: Positive
    failed: bool = False


class Mean(Stored):
    """Of one number over several seeds."""

    mean: float
    sd: NonNegative | None  # None: of one seed


class Confirmed(Stored):
    """What other seeds gave."""

    best: Mean
    base: Mean
    difference: Mean


class Result(Stored):
    """result.json, of any format."""

    sweep: str
    base: str
    data: str | None = None  # the data set that the base names; not there before November 2026
    best_name: str
    budget: dict[str, Any]
    trials: Positive
    states: dict[str, Count]
    epochs: Positive
    epochs_of_all: Positive
    minutes: NonNegative
    first: First
    best: Numbered
    run: dict[str, Any]
    seeds: list[int]
    confirmed: Confirmed | None
    diverged: list[str] = []
    importance: dict[str, float] = {}


def read_about(folder: Path) -> dict[str, Any]:
    """sweep.json, including that of format 1. Raises UserError if it is damaged."""
    about = read(About, folder / ABOUT, _again(folder))
    return about if "epochs" in about else {**about, "epochs": about["run"]["epochs"]}


def read_note(trial: Path) -> dict[str, Any]:
    """trial.json. Raises UserError if it is damaged."""
    return read(Note, trial / NOTE, without(trial))


def read_result(folder: Path) -> dict[str, Any] | None:
    """result.json; None if the sweep is not finished. Raises UserError if it is damaged."""
    try:
        return read(Result, folder / RESULT, _again(folder))
    except FileNotFoundError:
        return None


def without(trial: Path) -> str:
    """The remedy for a damaged trial."""
    return f"delete {trial}, and the sweep does without it"


def _again(folder: Path) -> str:
    """The remedy for a file that each start of the sweep writes."""
    return f"delete it and run `fer sweep {folder.name.rpartition('-')[0]}` again, which writes it"
