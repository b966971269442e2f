"""Cross-validation: a run for each fold, and their sum in data/folds/<id>/, made when the last one has ended."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from fer.data.dataset import DataSet, open_data
from fer.data.doubts import confusion
from fer.data.folds import fold_of, folds_of, titled
from fer.data.pairs import Pairs
from fer.data.split import SPLITS
from fer.errors import UserError, first_line
from fer.evaluate import metrics, read_predictions
from fer.files import write_bytes, write_json
from fer.run import run_id
from fer.run_folder import PREDICTIONS, SUMMARY, AllScores, read_summary
from fer.settings import Fraction, NonNegative, Positive
from fer.stored import Stored, read
from pipelines.experiments import Experiment, Job

FOLDS = Path("data/folds")
TABLE = "predictions.csv"
CONFUSION = "confusion.csv"
SCORES = ("accuracy", "balanced_accuracy", "macro_f1")


class Spread(Stored):
    """Mean and standard deviation (n - 1) of an accuracy or the like."""

    mean: Fraction
    sd: NonNegative
    count: Positive


class Sum(Stored):
    """summary.json of a sum."""

    id: str
    name: str
    folds: str
    runs: dict[str, float]  # run id of each fold -> when it was evaluated
    classes: list[str]
    data: dict[str, Any]
    test: AllScores  # of the predictions of all folds together
    over_folds: dict[str, Spread]
    over_subjects: Spread | None
    val_accuracy: Spread
    train_seconds: NonNegative
    finished: float


def jobs_of(found: Mapping[str, Experiment], data: Mapping[str, DataSet], folds: str, runs: Path) -> dict[str, Job]:
    """A run for each fold of each experiment, by its name with the fold. `data`: that of each experiment.

    Raises UserError if the data cannot be divided so, if an experiment starts from another run, or if a model lacks
    the neutral faces that it compares with in some fold.
    """
    for name, one in found.items():
        for key, how in (("init_from", "start from"), ("teacher", "learn from")):
            if (other := getattr(one.run, key)) is not None:
                told = f"a fold cannot {how} {other}, which was trained on its test images; set it to null"
                raise UserError(f"{name}: {key}: {told}")
    views: dict[Path, dict[str, DataSet]] = {}
    made = {}
    for name, one in found.items():
        whole = data[name]
        if noise := whole.summary.get("label_noise"):
            raise UserError(
                f"{name}: --folds would test on wrong labels (split.label_noise: {noise:g}); take other data"
            )
        if whole.folder not in views:
            views[whole.folder] = {fold: fold_of(whole, fold) for fold in folds_of(whole, folds)}
        for fold, view in views[whole.folder].items():
            _check_pairs(one, fold, view)
            own = titled(name, fold)
            folder = runs / run_id(own, one.run, view.hash)
            made[own] = Job(name, one.run, one.resources, whole.folder, folder, fold=fold)
    return made


def _check_pairs(one: Experiment, fold: str, view: DataSet) -> None:
    same_subject = one.run.model.images_beside().get("neutral")
    if same_subject is None:
        return
    try:
        for name in ("train", "val", "test") if same_subject else ("train",):
            Pairs(view.split(name), view.classes, same_subject)
    except UserError as error:
        raise UserError(f"{one.name}: fold {fold}: {error}") from None


def sum_folder(made: list[Job]) -> Path:
    """Where the sum of the folds of one experiment lies."""
    digest = hashlib.sha256("\n".join(job.folder.name for job in made).encode()).hexdigest()[:8]
    folds = (made[0].fold or "").partition("/")[2]
    return FOLDS / f"{made[0].name}.{'' if folds == 'subjects' else 'folds'}{folds}-s{made[0].run.seed}-{digest}"


def read_sum(folder: Path) -> dict[str, Any] | None:
    """summary.json of a sum; None if there is none. Raises UserError if it is damaged."""
    try:
        return read(Sum, folder / SUMMARY, "delete it and run `fer train` with its --folds again")
    except FileNotFoundError:
        return None


def sums(damaged: list[str]) -> list[dict[str, Any]]:
    """All sums; lines on those that cannot be read go to `damaged`."""
    found = []
    for folder in sorted(FOLDS.glob("*")):
        try:
            found.append(read_sum(folder))
        except UserError as error:
            damaged += error.lines
    return [one for one in found if one is not None]


def added(made: list[Job]) -> dict[str, Any]:
    """The sum of the finished folds of one experiment, made anew only if a fold was evaluated since.

    Writes predictions.csv, in which each image is once, by the fold that did not train on it; confusion.csv, the mean
    prediction for each label on those of them that are in train; and summary.json, last.
    """
    summaries = [summary for job in made if (summary := read_summary(job.folder)) is not None]
    assert len(summaries) == len(made), "some folds are not finished"
    folder, runs = sum_folder(made), {summary["run_id"]: summary["finished"] for summary in summaries}
    known = read_sum(folder)
    if known is not None and known["runs"] == runs and all((folder / name).exists() for name in (TABLE, CONFUSION)):
        return known
    classes = summaries[0]["classes"]
    table = _table(made, classes)
    labels, probabilities = torch.tensor(table["label"].to_numpy(np.int64)), table[classes].to_numpy(np.float32)
    table["right"] = table["label"] == probabilities.argmax(1)
    people = table[table["subject"] != ""].groupby("subject")["right"].mean()
    shown = table.drop(columns="right").assign(label=[classes[label] for label in table["label"]])
    shown.insert(5, "prediction", [classes[label] for label in probabilities.argmax(1)])
    result = {
        "id": folder.name,
        "name": made[0].name,
        "folds": (made[0].fold or "").partition("/")[2],
        "runs": runs,
        "classes": classes,
        "data": {
            key: value for key, value in summaries[0]["data"].items() if key in ("dataset", "set", "images_sha256")
        },
        "parameters": summaries[0]["parameters"],
        "test": metrics(torch.from_numpy(probabilities), labels),
        "over_folds": {key: _spread([summary["test"][key] for summary in summaries]) for key in SCORES},
        "over_subjects": _spread(people.tolist()) if len(people) > 1 else None,
        "val_accuracy": _spread([summary["val"]["accuracy"] for summary in summaries]),
        "train_seconds": sum(summary["train_seconds"] for summary in summaries),
        "finished": max(runs.values()),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / TABLE, shown.to_csv(index=False, lineterminator="\n").encode())
    train = shown[shown["row"].isin(open_data(made[0].data).split("train").rows)]
    write_bytes(folder / CONFUSION, confusion(train, classes).to_csv(index_label="", lineterminator="\n").encode())
    write_json(folder / SUMMARY, result)
    return result


def predictions_for(data: DataSet) -> tuple[str, pd.DataFrame] | None:
    """The sum that is most accurate on this data set and its labels as they are: its id, its predictions.

    None if there is none; a sum whose summary is damaged is none. Raises UserError for damaged predictions.
    """
    splits = [data.split(name) for name in SPLITS]
    labels = {row: data.classes[label] for one in splits for row, label in zip(one.rows.tolist(), one.labels.tolist())}
    fitting = [
        one
        for one in sums([])
        if one["classes"] == data.classes and one["data"]["images_sha256"] == data.summary["images_sha256"]
    ]
    for one in sorted(fitting, key=lambda one: -one["test"]["accuracy"]):
        table = _read_table(FOLDS / one["id"] / TABLE, data.classes)
        if all(labels.get(row) == label for row, label in zip(table["row"].tolist(), table["label"])):
            return one["id"], table
    return None


def _read_table(path: Path, classes: list[str]) -> pd.DataFrame:
    kinds = {"row": np.int64, "name": str, "label": str, **dict.fromkeys(classes, np.float64)}
    try:
        table = pd.read_csv(path, usecols=list(kinds), dtype=kinds, keep_default_na=False)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise UserError(f"{path}: cannot be read ({reason}); delete its folder and run `fer train` again") from None
    if not np.isfinite(table[classes].to_numpy()).all():
        raise UserError(f"{path}: a probability is no number; delete its folder and run `fer train` again")
    return table


def _table(made: list[Job], classes: list[str]) -> pd.DataFrame:
    """The test predictions of all folds, in the order of the rows, with fold and subject."""
    data, parts = open_data(made[0].data), []
    for job in made:
        test = fold_of(data, job.fold).split("test")
        known = {"row": test.rows, "name": test.names, "subject": test.subjects}
        part = pd.DataFrame({**known, "fold": (job.fold or "").partition("/")[0], "label": test.labels.numpy()})
        part[classes] = read_predictions(job.folder / PREDICTIONS.format(split="test"), test, classes)
        parts.append(part)
    return pd.concat(parts).sort_values("row", kind="stable").reset_index(drop=True)


def _spread(values: list[float]) -> dict[str, Any]:
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)), "count": len(values)}
