"""One run out of several finished ones: their networks, averaged with the shares that fit val best."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import softmax

from fer import checkpoint
from fer.batches import Feed
from fer.data.dataset import DataSet, open_data
from fer.device import pick_device
from fer.errors import UserError
from fer.evaluate import evaluate, predict_split, read_predictions
from fer.files import held, write_json
from fer.formats import format_of, read_run
from fer.input import Input
from fer.losses import CrossEntropy, build_loss
from fer.models import build_model
from fer.models.ensemble import Ensemble, Member
from fer.resources import Resources
from fer.run import FORMAT, Run, about, balanced_by, run_id
from fer.run_folder import BEST, CONFIG, PREDICTIONS, read_summary, write_rows
from fer.schedule import Constant
from fer.statistics import temperature

NAME = "ensemble"
ROUNDS, CONVERGED = 20_000, 1e-7  # of the shares' fit: at most, and the change of a share at its end


def combine(folders: list[Path], data_dir: str | Path, resources: Resources, mirror: bool = False) -> Path:
    """Make and evaluate the ensemble of the finished runs in `folders`; returns its folder, beside theirs.

    From the runs' stored predictions of val each network gets its temperature, then the shares minimise the
    cross-entropy. Test is read once, at the end.
    Raises UserError if a run is not finished, was trained on other data or cannot be a member, and if another process
    makes the same ensemble.
    """
    data = open_data(data_dir)
    metas = [finished(folder, data) for folder in folders]
    found, labels = _on_val(folders, data)
    heats = [round(temperature(one, labels), 4) for one in found]
    members = [_member(folder, meta, heat) for folder, meta, heat in zip(folders, metas, heats)]
    shares = fitted(np.stack([softmax(np.log(one) / heat, 1) for one, heat in zip(found, heats)]), labels)
    run = Run(
        model=Ensemble(members=members, weights=shares, mirror=mirror),
        input=Input(image_size=_side(members, data), channels=1 if data.images.ndim == 3 else 3, mean=[0.0], std=[1.0]),
        seed=metas[0]["config"]["seed"],
        epochs=1,
        schedule=Constant(warmup_epochs=0),
    )
    with torch.device("meta"):  # refuses what cannot be a member, before there is a folder
        build_model(run.model, run.input, len(data.classes), pretrained=False)
    start = "+".join(meta["run_id"] for meta in metas)
    folder = folders[0].parent / run_id(NAME, run, data.hash, start)
    with held(folder):
        if read_summary(folder) is None:
            _write(folder, run, start, folders, data, resources)
        evaluate(folder, data_dir, resources)
    return folder


def fitted(probabilities: np.ndarray, labels: np.ndarray) -> list[float]:
    """The shares [M] that minimise the cross-entropy of the mean of probabilities [M, n, C]; labels [n].

    Expectation-maximisation of a mixture of fixed members (Dempster et al. 1977), from equal shares.
    """
    right = probabilities[:, np.arange(len(labels)), labels].clip(1e-12)  # [M, n]
    shares, before = np.full(len(right), 1 / len(right)), np.zeros(len(right))
    for _ in range(ROUNDS):
        if abs(shares - before).max() < CONVERGED:
            break
        before, shares = shares, shares * (right / (shares @ right)).mean(1)
    shares = shares.round(4)
    shares[shares.argmax()] += 1 - shares.sum()
    return [round(float(share), 4) for share in shares]


def _side(members: list[Member], data: DataSet) -> int:
    """The side from which the members resize: that of the images, or of oblong ones that of all members."""
    height, width = data.images.shape[1:3]
    sides = sorted({member.input.image_size for member in members})
    if height == width:
        return int(height)
    if len(sides) > 1:
        raise UserError(
            f"ensemble: images of {width}x{height} pixels need runs of one input.image_size, not {sides[0]} and "
            f"{sides[-1]}; set data.size, which makes the images square, and train them again"
        )
    return sides[0]


def finished(folder: Path, data: DataSet) -> dict[str, Any]:
    """The checkpoint.json of the best epoch of a run. Raises UserError if it is not finished, or of other data."""
    summary = read_summary(folder)
    if summary is None:
        raise UserError(f"{folder}: the run is not finished; finish it with `fer train`")
    meta = checkpoint.load_meta(folder / BEST)
    if meta["data_hash"] != data.hash or format_of(meta) != FORMAT:
        raise UserError(f"{folder}: was trained on other data than {data.folder} holds, or by an earlier version")
    return meta


def _member(folder: Path, meta: dict[str, Any], heat: float) -> Member:
    run = read_run(meta, folder / BEST / checkpoint.META)
    if isinstance(run.model, Ensemble):
        raise UserError(f"{folder}: is an ensemble itself; name its members")
    return member_of(run, heat)


def member_of(run: Run, heat: float = 1.0) -> Member:
    """The network of a run as a member of an ensemble; `heat`: its temperature."""
    return Member(model=run.model, input=run.input, precision=run.precision, temperature=heat)


def _on_val(folders: list[Path], data: DataSet) -> tuple[np.ndarray, np.ndarray]:
    path, val = PREDICTIONS.format(split="val"), data.split("val")
    found = np.stack([read_predictions(folder / path, val, data.classes) for folder in folders])
    return found.astype(np.float64).clip(np.finfo(np.float32).tiny), val.labels.numpy()


def _write(folder: Path, run: Run, start: str, folders: list[Path], data: DataSet, resources: Resources) -> None:
    """The files of a run of one epoch, in which the val metrics are those of the ensemble."""
    device = pick_device(resources.device)
    model: Any = build_model(run.model, run.input, len(data.classes), pretrained=False)
    for member, source in zip(model.members, folders):
        checkpoint.load_weights(source / BEST, member)
    model.to(device)
    split = data.split("val")
    counts = torch.bincount(data.split("train").labels, minlength=len(data.classes)).to(device)
    loss = build_loss(CrossEntropy(), 0.0, data.prior().to(device), counts)
    found = predict_split(model, Feed(model, run, resources, split, data.classes, device), loss)[1].result()
    spent = sum(summary["train_seconds"] for summary in map(read_summary, folders) if summary is not None)
    val = {f"val_{key}": value for key, value in found.items()}
    history = [{"epoch": 1, **val, "seconds": spent, "time": time.time()}]
    balanced = balanced_by(*(checkpoint.load_meta(source / BEST) for source in folders))
    header = about(NAME, folder.name, run, data, device) | {"balanced": balanced}
    names = [source.name for source in folders]
    write_json(folder / CONFIG, {**header, "starts_from": names, "start": start, "resources": resources.model_dump()})
    checkpoint.save(folder / BEST, model.state_dict(), {**header, "epoch": 1, "history": history}, training=None)
    write_rows(folder, history)
