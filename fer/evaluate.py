"""The numbers of a finished run: its best checkpoint on val and, once, on test, with and without leaked images."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from fer import checkpoint
from fer.config import RunConfig
from fer.data.dataset import Split, open_data
from fer.device import autocast, pick_device
from fer.errors import UserError
from fer.feed import Feed
from fer.files import write_json
from fer.losses import Loss
from fer.metrics import Counts
from fer.models import build_model, origin


def evaluate(folder: str | Path, data_dir: str | Path) -> dict[str, Any]:
    """Predict val and test with `folder`/best; write predictions_{val,test}.csv, then summary.json, which it returns.

    A run that has a summary is not evaluated again: test is read once. Raises UserError when the run is not finished,
    or the data are not those it was trained on.
    """
    folder = Path(folder)
    if (folder / "summary.json").exists():
        return json.loads((folder / "summary.json").read_text())
    last = finished(folder)
    meta = checkpoint.load_meta(folder / "best")
    run = RunConfig.model_validate(meta["config"])
    data = open_data(data_dir)
    if data.hash != meta["data_hash"]:
        raise UserError(
            f"{folder}: was trained on data {meta['data_hash']}, {data_dir} holds {data.hash}; `dvc checkout` those"
        )
    device = pick_device(run.resources.device)
    model = build_model(run, len(data.classes), pretrained=False).to(device)
    checkpoint.load_weights(folder / "best", model)
    summary = {
        "run_id": meta["run_id"],
        "name": meta["name"],
        "data": meta["data"],
        "data_hash": data.hash,
        "classes": data.classes,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trainable_parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "starts_from": origin(run),
        "epochs": last["epoch"],
        "best_epoch": meta["epoch"],
        "train_seconds": sum(row["seconds"] for row in last["history"]),
    }
    for name in ("val", "test"):
        split = data.split(name)
        logits, _ = predict_split(model, Feed(model, run, split, data.classes, device))
        _write_predictions(folder / f"predictions_{name}.csv", split, logits, data.classes)
        summary[name] = metrics(logits, split.labels)
        if name == "test":
            summary["test_without_leaked"] = metrics(logits[~split.leaked], split.labels[~split.leaked])
    summary["finished"] = time.time()
    write_json(folder / "summary.json", summary)
    return summary


def finished(folder: Path) -> dict[str, Any]:
    """checkpoint.json of the run's last epoch. Raises UserError when there are more to come."""
    last = checkpoint.load_meta(folder / "last")
    done, epochs = last["epoch"], last["config"]["epochs"]
    if done < epochs:
        raise UserError(f"{folder}: {done} of {epochs} epochs are done; go on with `fer train {last['name']}`")
    return last


@torch.inference_mode()
def predict_split(
    model: nn.Module, feed: Feed, loss: Loss | None = None, rank: int = 0, world: int = 1
) -> tuple[Tensor, Counts]:
    """Logits float32 [n of this rank, C] on the CPU in the split's order, and the counts of all ranks."""
    model.eval()
    split, device = feed.split, feed.device
    counts = Counts(split.targets.shape[1], device)
    mine, size = np.arange(rank, len(split), world), feed.run.eval_batch_size
    found = [torch.empty(0, split.targets.shape[1], device=device)]
    for index, pixels in feed.batches([mine[first : first + size] for first in range(0, len(mine), size)]):
        with autocast(feed.run.precision, device):
            logits = model(**feed(index, pixels)).float()
        labels, targets = feed.truth(index)
        counts.update(logits, labels, loss(logits, labels, targets) if loss else None)
        found.append(logits)
    if world > 1:
        counts.all_reduce()
    return torch.cat(found).cpu(), counts


def metrics(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """accuracy, balanced_accuracy, macro_f1, ece, images, recall per class, confusion (row = label); logits [n, C]."""
    counts = Counts(logits.shape[1])
    if len(labels):
        counts.update(logits, labels)
    result = {key: value for key, value in counts.result().items() if key != "loss"} if len(labels) else {}
    return {**result, "images": len(labels), "recall": counts.recall(), "confusion": counts.confusion.tolist()}


def _write_predictions(path: Path, split: Split, logits: Tensor, classes: list[str]) -> None:
    """row, name, label, prediction, leaked and one probability per class."""
    probabilities = torch.softmax(logits, 1).numpy()
    table = pd.DataFrame({"row": split.rows, "name": split.names, "label": [classes[i] for i in split.labels.tolist()]})
    table["prediction"] = [classes[i] for i in probabilities.argmax(1)]
    table["leaked"] = split.leaked.numpy()
    table[classes] = np.round(probabilities, 6)
    partial = path.with_name(path.name + ".partial")
    table.to_csv(partial, index=False, lineterminator="\n")
    partial.replace(path)
