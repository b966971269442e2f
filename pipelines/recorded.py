"""What MLflow is told of a run, params and metrics, from the files of the run."""

import re
from collections.abc import Sequence
from typing import Any

from fer.run import Run
from fer.settings import differing, flatten

FINAL = "final/"  # prefix of the metrics of a finished run
BEST_VAL = "best_val_accuracy"  # metric of every run and trial, to sort by
NOT_METRICS = ("epoch", "time")
LATER = ("lr", "seconds", "images_per_second")  # of metrics.jsonl: in MLflow below train/, as accuracies come first
COMPARED = (  # settings that every run has as params; of the others those that differ from the defaults
    "model.name", "seed", "epochs", "batch_size", "input.image_size", "loss.name", "optimizer.name", "optimizer.lr",
    "optimizer.weight_decay", "schedule.name", "precision",
)  # fmt: skip
DATA_PARAMS = {  # summary.json of the splits -> params
    "dataset": "data.dataset",
    "label_source": "data.label_source",
    "label_mode": "split.label_mode",
    "prior_min_votes": "split.prior_min_votes",
    "train_share": "split.train_share",
    "label_noise": "split.label_noise",
    "seed": "split.seed",
    "dropped_leaked_train": "split.dropped_leaked_train",
}
MEASURED = ("raw_shape", "restored")  # of super_resolution: no settings


def epoch_metrics(row: dict[str, Any]) -> dict[str, float]:
    """The metrics of an epoch, from its row of metrics.jsonl."""
    values = {key: value for key, value in row.items() if key not in NOT_METRICS}
    return {f"train/{key}" if key in LATER else key: value for key, value in values.items()}


def run_params(run: Run) -> dict[str, Any]:
    """The settings that are compared, and those that differ from the defaults; key -> value."""
    every = flatten(run.model_dump())
    return {key: every[key] for key in COMPARED} | flatten(differing(run))


def data_params(data: dict[str, Any]) -> dict[str, Any]:
    """How the data were made, as `data` (summary.json of the splits) tells; key -> value."""
    found = {name: data[key] for key, name in DATA_PARAMS.items() if key in data}
    made = {key: value for key, value in data.get("super_resolution", {}).items() if key not in MEASURED}
    return found | flatten(made, "super_resolution.")


def across_metrics(result: dict[str, Any]) -> dict[str, float]:
    """The metrics of a run on another data set: `on/...` among all classes, `on_shared/...` among the shared ones."""
    values: dict[str, float] = {"on/coverage": result["coverage"], "on/images": result["images"]}
    for prefix, found in (("on", result["all_classes"]), ("on_shared", result["shared_classes"])):
        values |= {f"{prefix}/{key}": found[key] for key in ("accuracy", "balanced_accuracy", "macro_f1", "ece")}
        values |= _recalls(f"{prefix}/recall_", found["classes"], found["recall"])
    return values


def final_metrics(summary: dict[str, Any]) -> dict[str, float]:
    """The metrics of a finished run; their prefix keeps them apart from the curves in the UI."""
    values: dict[str, float] = {f"{FINAL}{key}": summary[key] for key in ("best_epoch", "parameters")}
    values[BEST_VAL] = summary["val"]["accuracy"]
    for split in ("val", "test", "test_unleaked", "test_unleaked_exact", "test_without_train"):
        for key in ("accuracy", "balanced_accuracy", "macro_f1", "ece"):
            if key in summary.get(split, {}):
                values[f"{FINAL}{split}_{key}"] = summary[split][key]
    return values | _recalls(f"{FINAL}test_recall_", summary["classes"], summary["test"]["recall"])


def _recalls(prefix: str, classes: Sequence[str], recalls: Sequence[float | None]) -> dict[str, float]:
    """The metric of each class; what MLflow allows in no name, as the apostrophe of don't know, becomes _.

    Classes that become one by this have their number behind their name.
    """
    names = [re.sub(r"[^\w.\- ]", "_", name) for name in classes]
    names = [name if names.count(name) == 1 else f"{name} {label}" for label, name in enumerate(names)]
    return {prefix + name: recall for name, recall in zip(names, recalls) if recall is not None}
