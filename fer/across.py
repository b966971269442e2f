"""A finished run, or a checkpoint alone, on the test split of a data set, whose classes are matched by their names."""

import hashlib
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fer.checkpoint import META, load_meta
from fer.data.aliases import Match, match
from fer.data.dataset import DataSet, Split, feed, open_data
from fer.errors import UserError
from fer.evaluate import metrics
from fer.files import write_bytes, write_json
from fer.made_by import made_by
from fer.predict import Predictor
from fer.run_folder import AllScores, read_summary
from fer.settings import Fraction
from fer.stored import Count, Stored, read

ON = "on"  # folder in that of a run: its results on other data sets
AT_ONCE = 1024  # images prepared at once: bounds memory
MAKING = ("method", "scale", "hub_id", "weights")  # of a super-resolution: what decides its images


class Chosen(AllScores):
    """Metrics of a choice among `classes`."""

    classes: list[str]


class Across(Stored):
    """on/<data set>-<hash>.json."""

    run_id: str
    name: str
    dataset: str
    hash: str
    matched: dict[str, str]  # their class -> ours
    left_out: dict[str, Count]  # their class without a partner -> its test images
    unused: list[str]  # our classes without a partner
    images: Count  # test images with a partner
    test_images: Count
    coverage: Fraction  # the former divided by the latter
    all_classes: Chosen
    shared_classes: Chosen
    made_by: dict[str, Any]
    finished: float


def evaluate_across(folder: str | Path, other: str | Path, device: str = "auto") -> dict[str, Any]:
    """Predict the test split in `other`, the folder of another data set, with a run's best checkpoint, or one alone.

    Writes on/<data set>-<hash>.csv and, last, the .json beside it, which it returns; if that is there, it is only read.
    Train and val of `other` are never read. Its images are prepared as `Predictor` does it. Raises UserError if the run
    is not finished, no test image is of a class that it knows, or the images cannot be made like its own.
    """
    folder, other = Path(folder), Path(other)
    about, data = _about(folder), open_data(other)
    path = result_of(folder, data.summary["set"], _hash(data))
    try:
        return read(Across, path, "delete it and run the command again")
    except FileNotFoundError:
        pass
    found, split = match(about["classes"], data.classes), data.split("test")
    kept = np.flatnonzero(np.array(found.theirs)[split.labels] >= 0)
    if not len(kept):
        theirs, ours = ", ".join(data.classes), ", ".join(about["classes"])
        raise UserError(f"{other}: holds no test image of a class of the run: classes {theirs}; of the run: {ours}")
    _refuse_other_making(other, data, about["data"])
    predictor = Predictor(folder, device)
    predictor.temperature = 1.0  # as in the run's own tables, so that both calibration errors are of the network
    if any(predictor.run.model.images_beside().values()):
        raise UserError(f"{folder}: needs a neutral face of the same person beside each face, and {other} has none")
    plain = data.summary.get("super_resolution", {}).get("method", "none") == "none"
    probabilities = _probabilities(predictor, split, kept, plain, folder, other)
    every, shared, chosen = scores(probabilities, split.labels[kept], found)
    result = {
        "run_id": about["run_id"],
        "name": about["name"],
        "dataset": data.summary["set"],
        "hash": _hash(data),
        "test_hash": data.test_hash,
        **_coverage(found, data.classes, split),
        "all_classes": every,
        "shared_classes": shared,
        "made_by": made_by(predictor.device),
        "finished": time.time(),
    }
    images = {"row": split.rows[kept], "name": [split.names[i] for i in kept]}
    images["label"] = [data.classes[i] for i in split.labels[kept].tolist()]
    path.parent.mkdir(exist_ok=True)
    table = pd.concat([pd.DataFrame(images), chosen], axis=1)
    write_bytes(path.with_suffix(".csv"), table.to_csv(index=False, lineterminator="\n").encode())
    write_json(path, result)
    return result


def scores(probabilities: Tensor, labels: Tensor, found: Match) -> tuple[dict[str, Any], dict[str, Any], pd.DataFrame]:
    """The metrics of probabilities [n, our classes] and labels [n], in their classes, all of which have a partner.

    First those of a choice among all of our classes, then of one among the shared ones, with their probabilities
    divided by their sum. The table has both choices and the probabilities; it writes classes as `found.names` does.
    """
    every = torch.zeros(len(labels), len(found.names)).index_add_(1, torch.tensor(found.ours), probabilities)
    shared, meant = torch.tensor(found.shared), torch.tensor(found.theirs)[labels]
    among = every[:, shared]
    among /= among.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    names, some = np.array(found.names), [found.names[place] for place in found.shared]
    table = pd.DataFrame({"class": names[meant], "prediction": names[every.argmax(1)]})
    table["prediction_shared"] = names[shared[among.argmax(1)]]
    table[found.names] = every.numpy()
    return (
        {"classes": found.names, **metrics(every, meant)},
        {"classes": some, **metrics(among, torch.searchsorted(shared, meant))},
        table,
    )


def result_of(folder: Path, dataset: str, digits: str) -> Path:
    """The file with the result of a run on another data set; its predictions are beside it, as .csv."""
    name = re.sub(r"[^\w-]", "_", dataset)
    return folder / ON / f"{name}-{digits}.json"


def _about(folder: Path) -> dict[str, Any]:
    """What a finished run, or a checkpoint alone, tells of itself: run_id, name, classes and data."""
    if (folder / META).exists():
        return load_meta(folder)
    summary = read_summary(folder)
    if summary is None:
        raise UserError(f"{folder}: is not finished; run `fer evaluate {folder.name}` first")
    return summary


def _hash(data: DataSet) -> str:
    """16 hex digits of what `evaluate_across` reads: the images, the classes, and test."""
    digest = hashlib.sha256()
    feed(digest, "images", [data.summary["images_sha256"]])
    feed(digest, "classes", data.classes)
    feed(digest, "test", [data.test_hash])
    return digest.hexdigest()[:16]


def _coverage(found: Match, theirs: list[str], split: Split) -> dict[str, Any]:
    counts = torch.bincount(split.labels, minlength=len(theirs)).tolist()
    left_out = {name: count for name, place, count in zip(theirs, found.theirs, counts) if place < 0}
    images = len(split) - sum(left_out.values())
    return {
        "matched": {name: found.names[place] for name, place in zip(theirs, found.theirs) if place >= 0},
        "left_out": left_out,
        "unused": [name for place, name in enumerate(found.names) if place not in found.shared],
        "images": images,
        "test_images": len(split),
        "coverage": images / len(split),
    }


def _refuse_other_making(other: Path, data: DataSet, own: dict[str, Any]) -> None:
    """Raise UserError where the images of `data` were upscaled, and otherwise than those of the run.

    What was not upscaled is resized and upscaled by `Faces.prepare`.
    """
    there, here = data.summary.get("super_resolution", {}), own.get("super_resolution", {})
    if there.get("method", "none") == "none":
        return
    same = all(there.get(key) == here.get(key) for key in MAKING)
    if not same or data.summary["image_shape"][:2] != list(own["image_shape"])[:2]:
        height, width = data.summary["image_shape"][:2]
        raise UserError(
            f"{other}: its images were upscaled by {there['method']} x{there.get('scale')} to {width}x{height} pixels, "
            f"those of the run otherwise: make them again in that project with super_resolution.method none"
        )


def _probabilities(
    predictor: Predictor, split: Split, kept: np.ndarray, plain: bool, folder: Path, other: Path
) -> Tensor:
    """float32 [n, C] of the images at positions `kept`; `plain`: they are not upscaled yet, whatever their size."""
    found = []
    for first in range(0, len(kept), AT_ONCE):
        try:
            images = split.images[split.rows[kept[first : first + AT_ONCE]]]
            found.append(predictor.probabilities(images, photographed=plain))
        except UserError as error:  # images that cannot be made like those of the run
            raise UserError(f"{other}: {error}") from None
    probabilities = torch.from_numpy(np.concatenate(found))
    if not bool(probabilities.isfinite().all()):
        raise UserError(f"{folder}: its checkpoint predicts no numbers, so it is damaged; delete it and train again")
    return probabilities
