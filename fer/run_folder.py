"""What lies in a run's folder, data/runs/<run id>: the names of its files, and how they are read and written."""

import json
import time
from pathlib import Path
from typing import Any

from fer.errors import UserError
from fer.files import write_bytes, write_json

CONFIG = "config.json"  # settings, code, versions and machine; written first
LAST, BEST = "last", "best"  # checkpoints (fer/checkpoint.py): of the last epoch, and of the best by val accuracy
METRICS = "metrics.jsonl"  # a row per epoch
PROGRESS = "progress.json"  # the current step
LOG = "log.txt"  # output of its process; log-<rank>.txt of further ranks
SUMMARY = "summary.json"  # its results; written last, so it marks the run as finished
PREDICTIONS = "predictions_{split}.csv"
CONFUSION = "confusion_matrix.png"


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write metrics.jsonl from the history of the last checkpoint, so that a repeated epoch appears once."""
    write_bytes(folder / METRICS, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, one per epoch; empty before the end of the first."""
    try:
        return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    except FileNotFoundError:
        return []


def read_progress(folder: Path) -> dict[str, int] | None:
    """progress.json; None before the first step."""
    try:
        return json.loads((folder / PROGRESS).read_text())
    except FileNotFoundError:
        return None


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write summary.json, atomically."""
    write_json(folder / SUMMARY, summary)


def read_summary(folder: Path) -> dict[str, Any] | None:
    """summary.json, or None if the run is not finished; keys of format 1 get their current names.

    Raises UserError when it is not valid JSON.
    """
    try:
        summary = json.loads((folder / SUMMARY).read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(f"{folder / SUMMARY}: not valid JSON; delete it and run `fer evaluate {folder.name}`") from None
    if "test_without_leaked" in summary:  # format 1 knew duplicates in train only
        summary["test_without_train"] = summary.pop("test_without_leaked")
    return summary


class Progress:
    """Writes progress.json at most once a second, for progress bars."""

    def __init__(self, folder: Path, epochs: int):
        self.folder, self.epochs, self.written = folder, epochs, 0.0

    def __call__(self, epoch: int, step: int, steps: int) -> None:
        """Record that `step` of `steps` are done in `epoch`, counted from 0."""
        now = time.monotonic()
        if now - self.written >= 1 or step == steps:
            self.written = now
            place = {"epoch": epoch, "epochs": self.epochs, "step": step, "steps": steps}
            write_json(self.folder / PROGRESS, place, durable=False)  # it can be lost without harm
