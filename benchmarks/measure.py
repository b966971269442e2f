"""How speed is measured: both sides in turn, each at its best, since other load only ever slows a side down."""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

from fer.made_by import made_by

ROOT = Path(__file__).resolve().parents[1]
Work = Callable[[], float]  # processes images and returns how many


@dataclass(frozen=True)
class Effort:
    """How much is computed per figure; tests use less."""

    seconds: float = 2.0  # minimum per side and round
    rounds: int = 3
    large: int = 512  # images of the sizes of published systems
    small: int = 2048  # images of 48 px
    epochs: int = 8  # of the runs that measure the pipeline's overhead


@dataclass(frozen=True)
class Row:
    """A row of the table: ours, the reference, and a note."""

    what: str
    rate: float  # images per second
    reference: str
    plain: float  # images per second of the reference
    note: str = ""

    def __str__(self) -> str:
        figures = f"{_rounded(self.rate)} | {self.reference} | {_rounded(self.plain)} | {self.rate / self.plain:.2f}"
        return f"| {self.what} | {figures} | {self.note} |"


def _rounded(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{float(f'{value:.3g}'):,.12g}"


HEAD = "| what | images/s | reference | images/s | ratio | |\n|---|---|---|---|---|---|"


def beside(effort: Effort, work: Work, *plain: Work) -> tuple[float, float]:
    """Images/s of `work` and of the fastest of `plain`, each after one warm-up call."""
    sides = (work, *plain)
    for side in sides:
        side()
    best = [0.0] * len(sides)
    for _ in range(effort.rounds):
        best = [max(known, _rate(side, effort.seconds)) for known, side in zip(best, sides)]
    return best[0], max(best[1:])


def _rate(work: Work, seconds: float) -> float:
    done, passed, started = 0.0, 0.0, time.perf_counter()
    while not done or passed < seconds:
        done += work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        passed = time.perf_counter() - started
    return done / passed


def machine(device: torch.device) -> str:
    """Date, commit, hardware and versions of a measurement."""
    about = made_by(device)
    name = about["cpu"] if device.type == "cpu" else about["device"]
    commit = about["commit"][:7] + (" with changes" if about["changed"] is True else "")
    versions = f"Python {about['python']}, torch {about['torch']}"
    where = f"{name}, {about['threads']} threads, {platform.machine()}"
    return f"{date.today()}, commit {commit}, {where}, {versions}"
