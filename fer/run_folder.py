"""What lies in a run's folder, data/runs/<run id>: the names of its files, and how they are read and written."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from fer.errors import UserError
from fer.files import write_bytes, write_json
from fer.settings import Fault, Fraction, Natural, NonNegative, Positive, Unfit
from fer.stored import Count, Stored, read, read_lines

CONFIG = "config.json"  # settings, code, versions and machine; written first
LAST, BEST = "last", "best"  # checkpoints (fer/checkpoint.py): of the last epoch, and of the best by val accuracy
METRICS = "metrics.jsonl"  # a row per epoch
PROGRESS = "progress.json"  # the current step
LOG = "log.txt"  # output of its process; log-<rank>.txt of further ranks
SUMMARY = "summary.json"  # its results; written last, so it marks the run as finished
PREDICTIONS = "predictions_{split}.csv"
CONFUSION = "confusion_matrix.png"


class Row(Stored):
    """A row of metrics.jsonl, and of the history in a checkpoint: numbers."""

    __pydantic_extra__: dict[str, float]
    epoch: Positive
    lr: float = 0.0  # an ensemble has neither this nor the next two
    train_loss: float = 0.0
    train_accuracy: Fraction = 0.0
    val_loss: float
    val_accuracy: Fraction
    seconds: NonNegative
    time: float


class Scores(Stored):
    """Metrics of a split, or of a part of it; without images only the last three."""

    accuracy: Fraction | None = None
    balanced_accuracy: Fraction | None = None
    macro_f1: Fraction | None = None
    ece: Fraction | None = None
    images: Count
    recall: list[Fraction | None]
    confusion: list[list[Count]]


class AllScores(Scores):
    """Metrics of a split that has images."""

    accuracy: Fraction
    balanced_accuracy: Fraction
    macro_f1: Fraction
    ece: Fraction


class Enlarged(Stored):
    """How the images of a data set were made larger."""

    method: str
    scale: Positive
    raw_shape: Annotated[list[Positive], Field(min_length=2, max_length=3)] | None = None


class Cropped(Stored):
    """How faces were cut out of photographs."""

    detector: str
    margin: Annotated[float, Field(gt=0)]


class About(Stored):
    """Which data a run was trained on."""

    dataset: str
    set: str | None = None
    """What its project calls it; runs of earlier versions do not know."""
    fold: Annotated[str, Field(pattern=r"^[1-9]\d*/([1-9]\d*|subjects)$")] | None = None
    label_mode: str = ""
    faces: Cropped | None = None
    image_shape: Annotated[list[Positive], Field(min_length=2)]
    super_resolution: Enlarged = Enlarged(method="none", scale=1)


class Summary(Stored):
    """summary.json, of any format."""

    format: Positive = 1
    run_id: str
    name: str
    data: About
    data_hash: str
    test_hash: str = ""  # format 1 has neither this nor leak_hash
    leak_hash: str = ""
    classes: Annotated[list[str], Field(min_length=2)]
    parameters: Count
    epochs: Positive
    best_epoch: Positive
    train_seconds: NonNegative
    finished: float
    val: AllScores
    test: AllScores
    test_unleaked: Scores | None = None
    test_unleaked_exact: Scores | None = None
    test_without_train: Scores | None = None
    test_without_leaked: Scores | None = None  # of format 1, which knew duplicates in train only
    trained_by: dict[str, Any] = {}
    made_by: dict[str, Any] = {}

    @model_validator(mode="after")
    def _fits(self) -> "Summary":
        if self.best_epoch > self.epochs:
            raise Unfit([Fault("best_epoch", f"is {self.best_epoch} of {self.epochs}")])
        unleaked = "test_unleaked" if self.test_unleaked_exact is None else "test_unleaked_exact"
        kept = ("test_without_leaked",) if self.format == 1 else (unleaked, "test_without_train")
        for name in ("val", "test", *kept):
            scores = getattr(self, name)
            if scores is None:
                raise Unfit([Fault(name, "missing")])
            if {len(scores.recall), *map(len, [scores.confusion, *scores.confusion])} != {len(self.classes)}:
                raise Unfit([Fault(name, f"is not of {len(self.classes)} classes")])
        return self


class Began(Stored):
    """config.json."""

    format: Positive = 1
    config: dict[str, Any]
    data: About
    data_hash: str


class Place(Stored):
    """progress.json."""

    epoch: Natural
    epochs: Positive
    step: Count
    steps: Annotated[int, Field(gt=0)]


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write metrics.jsonl from the history of the last checkpoint, so that a repeated epoch appears once."""
    write_bytes(folder / METRICS, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_rows(folder: Path, remedy: str | None = None) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, one per epoch; [] before the end of the first.

    Raises UserError, with the `remedy`, if it is damaged.
    """
    return read_lines(Row, folder / METRICS, remedy or from_checkpoints(folder))


def data_name(about: dict[str, Any]) -> str:
    """What the project of a run calls its data set; `about`: what the run's files say of its data."""
    return str(about.get("set") or about["dataset"])


def read_config(folder: Path) -> dict[str, Any]:
    """config.json. Raises UserError if it is missing or damaged."""
    path, remedy = folder / CONFIG, from_checkpoints(folder)
    try:
        return read(Began, path, remedy)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; {remedy}") from None


def named(runs: Path, word: str) -> list[Path]:
    """The folder in `runs` whose name is `word`, or else all whose names begin with it, sorted; none for no word.

    Runs on folds, whose names have a dot, are among them only if `word` has one.
    """
    word = word.removeprefix(f"{runs}/").removesuffix("/")  # as a shell completes it
    known = all_runs(runs, folds="." in word) if word else []
    return [path for path in known if path.name == word] or [path for path in known if path.name.startswith(word)]


def all_runs(runs: Path, folds: bool = False) -> list[Path]:
    """The folders in `runs`, sorted; those of runs on folds, whose names have a dot, only if asked for."""
    return sorted(path for path in runs.glob("*") if path.is_dir() and (folds or "." not in path.name))


def read_progress(folder: Path) -> dict[str, int] | None:
    """progress.json; None before the first step, or if it is damaged: it is only shown, and written every second."""
    try:
        return read(Place, folder / PROGRESS, "")
    except (FileNotFoundError, UserError):
        return None


def read_summary(folder: Path) -> dict[str, Any] | None:
    """summary.json, or None if the run is not finished; keys of earlier versions get their current names.

    Raises UserError if it is damaged.
    """
    try:
        summary = read(Summary, folder / SUMMARY, f"delete it and run `fer evaluate {folder.name}`")
    except FileNotFoundError:
        return None
    if "test_without_leaked" in summary:
        summary["test_without_train"] = summary.pop("test_without_leaked")
    elif "test_unleaked_exact" not in summary:  # before near duplicates were known
        summary["test_unleaked_exact"] = summary.pop("test_unleaked")
    return summary


def from_checkpoints(folder: Path) -> str:
    """How to get back a file of a run that training and evaluation write from its checkpoints."""
    return f"delete {folder / SUMMARY}, if there is one, and run the command of {folder.name} again, which writes it"


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
