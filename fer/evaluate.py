"""The results of a finished run: its best checkpoint on val and, once, on test, with and without leaked images."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.special import softmax
from torch import Tensor, nn

from fer import checkpoint
from fer.batches import Feed
from fer.data.dataset import DataSet, Split, open_data
from fer.data.folds import fold_of
from fer.device import autocast, pick_device
from fer.errors import UserError, first_line
from fer.files import write_bytes, write_json
from fer.formats import format_of, read_run
from fer.losses import Loss
from fer.made_by import made_by
from fer.metrics import Counts
from fer.models import build_model, origin
from fer.models.ensemble import Ensemble
from fer.resources import Resources
from fer.run import FORMAT, training_images
from fer.run_folder import BEST, LAST, PREDICTIONS, SUMMARY, read_config, read_summary
from fer.statistics import even, temperature


def evaluate(folder: str | Path, data_dir: str | Path, resources: Resources) -> dict[str, Any]:
    """Predict val and test with `folder`/best; write predictions_{val,test}.csv, then summary.json, which it returns.

    From val comes the temperature that prediction divides by; it is noted in the checkpoint, and the tables are from
    before it.

    Test is read once: a run whose summary matches the current data is not evaluated again. If only the leak marks have
    changed, their columns are recomputed from the stored predictions. A run that was evaluated on other data keeps its
    results. Raises UserError if the run is not finished, or was trained on other data.
    """
    folder, data = Path(folder), open_data(data_dir)
    summary = read_summary(folder)
    if summary is not None and outdated(summary, data) is None:
        return summary
    meta = checkpoint.load_meta(folder / BEST)
    if format_of(meta) != FORMAT:
        raise UserError(
            f"{folder}: written in format {format_of(meta)}, which can no longer be evaluated; train the run again"
        )
    data = own_data(folder, meta, data)
    if summary is None or summary["test_hash"] != data.test_hash:
        summary = _evaluated(folder, meta, data, resources)
    summary |= _leaks(folder, data) | {"finished": time.time()}
    write_json(folder / SUMMARY, summary)
    return summary


def own_data(folder: Path, meta: dict[str, Any], data: DataSet) -> DataSet:
    """The data set, or its fold, that the run in `folder` was trained on; `meta`: its checkpoint.json.

    Raises UserError if `data` is another one.
    """
    data = fold_of(data, meta["data"].get("fold"))
    if data.hash != meta["data_hash"]:
        raise UserError(
            f"{folder}: was trained on data {meta['data_hash']}, but {data.folder} holds {data.hash}; "
            "`dvc checkout` the former"
        )
    return data


def outdated(summary: dict[str, Any], data: DataSet) -> str | None:
    """What `evaluate` would redo, and why; None if nothing.

    A run of other train or val data, or of an earlier format, keeps its results. Of a run on a fold, `data` is the
    whole data set or that fold.
    """
    data = fold_of(data, summary["data"].get("fold"))
    if format_of(summary) != FORMAT or summary["data_hash"] != data.hash:
        return None
    if summary["test_hash"] != data.test_hash:
        return "the test split has changed since: evaluated again, from its best checkpoint"
    if summary["leak_hash"] != data.leak_hash:
        return "other test images count as leaked since: those columns are computed again, from its predictions"
    return None


def _evaluated(folder: Path, meta: dict[str, Any], data: DataSet, resources: Resources) -> dict[str, Any]:
    run = read_run(meta, folder / BEST / checkpoint.META)
    last = meta if isinstance(run.model, Ensemble) else last_epoch(folder)  # an ensemble was not trained
    device = pick_device(resources.device)
    model = build_model(run.model, run.input, len(data.classes), pretrained=False).to(device)
    checkpoint.load_weights(folder / BEST, model)
    summary = {
        "format": FORMAT,
        "run_id": meta["run_id"],
        "name": meta["name"],
        "data": meta["data"],
        "data_hash": data.hash,
        "test_hash": data.test_hash,
        "classes": data.classes,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trainable_parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "starts_from": origin(run.model, run.init_from),
        "epochs": last["epoch"],
        "best_epoch": meta["epoch"],
        "train_seconds": sum(row["seconds"] for row in last["history"]),
        "trained_by": meta["made_by"],
        "made_by": made_by(device),
    }
    if isinstance(run.model, Ensemble):
        runs = read_config(folder).get("starts_from", ["not stated"])
        summary |= {"members": len(run.model.members), "starts_from": runs}
    for name in ("val", "test"):
        split = data.split(name)
        logits, _ = predict_split(model, Feed(model, run, resources, split, data.classes, device))
        probabilities = torch.softmax(logits, 1)
        if not bool(probabilities.isfinite().all()):
            raise UserError(f"{folder / BEST}: predicts no numbers, so it is damaged; delete {folder} and train again")
        _write_predictions(folder / PREDICTIONS.format(split=name), split, probabilities.numpy(), data.classes)
        summary[name] = metrics(probabilities, split.labels)
        if name == "val":
            heat = round(temperature(probabilities.numpy(), split.labels.numpy()), 4)
            write_json(folder / BEST / checkpoint.META, meta | {"temperature": heat})
    return summary


def _leaks(folder: Path, data: DataSet) -> dict[str, Any]:
    """The columns without leaked images, from predictions_test.csv, whose leak marks are updated."""
    split, path = data.split("test"), folder / PREDICTIONS.format(split="test")
    probabilities = read_predictions(path, split, data.classes)
    _write_predictions(path, split, probabilities, data.classes)
    exact = split.in_train | split.in_val
    kept = {"test_unleaked": ~split.leaked, "test_unleaked_exact": ~exact, "test_without_train": ~split.in_train}
    found = torch.from_numpy(probabilities)
    columns = {name: metrics(found[rows], split.labels[rows]) for name, rows in kept.items()}
    return {"leak_hash": data.leak_hash, **columns}


def evened(folder: Path, summary: dict[str, Any], power: float = 1.0) -> dict[str, Any] | None:
    """The test metrics of a finished run if prediction evens out the classes (fer.statistics.even).

    None if training did, or if its checkpoint or predictions_test.csv, which the summary outlives, is gone or damaged.
    """
    try:
        meta = checkpoint.load_meta(folder / BEST)
        images = training_images(meta)
        table = read_evaluated(folder / PREDICTIONS.format(split="test"), summary["test"]["images"], summary["classes"])
    except UserError:
        return None
    logits = np.log(table[summary["classes"]].to_numpy(np.float32).clip(np.finfo(np.float32).tiny))
    found = even(softmax(logits / meta.get("temperature", 1.0), 1), np.array(images), power)
    return metrics(torch.from_numpy(found), torch.tensor(table["label"].to_numpy(np.int64)))


def last_epoch(folder: Path) -> dict[str, Any]:
    """checkpoint.json of the run's last epoch. Raises UserError if training is not complete."""
    last = checkpoint.load_meta(folder / LAST)
    run = read_run(last, folder / LAST / checkpoint.META)
    if last["epoch"] > run.epochs:
        raise UserError(f"{folder / LAST}: epoch {last['epoch']} of {run.epochs}, so it is damaged; delete {folder}")
    if not run.is_over(last["history"]):
        done = f"{last['epoch']} of {run.epochs} epochs are done"
        folds = f" --folds {fold.partition('/')[2]}" if (fold := last["data"].get("fold")) else ""
        raise UserError(f"{folder}: {done}; finish it with `fer train {last['name']}{folds}`")
    return last


@torch.inference_mode()
def predict_split(
    model: nn.Module, feed: Feed, loss: Loss | None = None, rank: int = 0, world: int = 1
) -> tuple[Tensor, Counts]:
    """This rank's logits float32 [n, C], on the CPU in the split's order, and the counts over all ranks."""
    model.eval()
    split, device = feed.split, feed.device
    counts = Counts(split.targets.shape[1], device)
    mine, size = np.arange(rank, len(split), world), feed.batch_size
    found = [torch.empty(0, split.targets.shape[1], device=device)]
    for index, pixels in feed.batches([mine[first : first + size] for first in range(0, len(mine), size)]):
        inputs = feed(index, pixels)  # as in training, in fp32
        with autocast(feed.run.precision, device):
            logits = model(**inputs).float()
        labels, targets = feed.truth(index)
        counts.update(logits, labels, loss(logits, labels, targets) if loss else None)
        found.append(logits)
    if world > 1:
        counts.all_reduce()
    return torch.cat(found).cpu(), counts


def metrics(probabilities: Tensor, labels: Tensor) -> dict[str, Any]:
    """The metrics of probabilities [n, C] and labels [n].

    accuracy, balanced_accuracy, macro_f1, ece, images, recall per class, confusion (row = label). Without images there
    are only the last three.
    """
    counts = Counts(probabilities.shape[1])
    if len(labels):
        counts.add(probabilities, labels)
    result = {key: value for key, value in counts.result().items() if key != "loss"} if len(labels) else {}
    return {**result, "images": len(labels), "recall": counts.recall(), "confusion": counts.confusion.tolist()}


def read_predictions(path: Path, split: Split, classes: list[str]) -> np.ndarray:
    """The exact probabilities float32 [n, C] in predictions_*.csv of the images in `split`, in their order.

    Raises UserError if it is missing or damaged, or of other images.
    """
    table = read_evaluated(path, len(split), classes)
    if not (np.array_equal(table["row"], split.rows) and np.array_equal(table["label"], split.labels)):
        raise _no_predictions(path, f"of other images than {split.name} holds")
    return table[classes].to_numpy(np.float32)


def read_evaluated(path: Path, images: int, classes: list[str]) -> pd.DataFrame:
    """predictions_*.csv of so many images: row, name, label (its index in `classes`) and a probability per class.

    Raises UserError if it is missing or damaged.
    """
    text = {"name": str, "label": str}
    try:
        table = pd.read_csv(path, usecols=["row", *text, *classes], dtype=text, keep_default_na=False)
        shares = table[classes].to_numpy(np.float32)
        reason = "" if ((shares >= 0) & (shares <= 1)).all() else "not between 0 and 1"
        table["label"] = table["label"].map({name: index for index, name in enumerate(classes)})
        reason = "a label that is no class" if table["label"].isna().any() else reason
        reason = f"{len(table)} of {images} images" if len(table) != images else reason
    except (OSError, ValueError, TypeError, OverflowError) as error:
        reason = first_line(error)
    if reason:
        raise _no_predictions(path, reason)
    return table


def _no_predictions(path: Path, reason: str) -> UserError:
    again = f"delete {path.parent / SUMMARY} and run `fer evaluate {path.parent.name}`"
    return UserError(f"{path}: no predictions there ({reason}); {again}")


def _write_predictions(path: Path, split: Split, probabilities: np.ndarray, classes: list[str]) -> None:
    """Columns: row, name, label, prediction, leaked, and a probability per class that reads back exactly.

    leaked: train or val, where an image with the same pixels is; near, if one of them holds a near duplicate; or empty.
    """
    table = pd.DataFrame({"row": split.rows, "name": split.names, "label": [classes[i] for i in split.labels.tolist()]})
    table["prediction"] = [classes[i] for i in probabilities.argmax(1)]
    marks = {"train": split.in_train, "val": split.in_val, "near": split.near}
    table["leaked"] = np.select([mark.numpy() for mark in marks.values()], list(marks), "")
    table[classes] = probabilities
    write_bytes(path, table.to_csv(index=False, lineterminator="\n").encode())
