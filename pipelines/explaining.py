"""`fer explain`: which faces, and the pictures and tables that are written of their maps. They go nowhere else."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fer.checkpoint import load_meta
from fer.data.dataset import open_data
from fer.data.found import printable
from fer.errors import UserError
from fer.evaluate import own_data
from fer.explain import STEPS, Explained, Verdict, verdicts
from fer.pictures import batch_of
from fer.predict import Predictor
from fer.run_folder import BEST
from fer.statistics import Interval

CHECKS = ("correlation", "area", "random area", "gain")
LEGEND = (
    "Mean and 95 % interval. Correlation: Spearman's, of the map with that of random weights; near 1, the map shows "
    "the face and not what was learned. Area: how far the probability of the prediction lies below that in random "
    "order while more and more of the face is replaced by its mean, the highest cells of the map first; 0 is chance. "
    "Random area: the same in the order of the map of random weights. Gain: area less random area, face by face."
)


@dataclass(frozen=True, eq=False)
class Chosen:
    """Faces as the network gets them: names, true classes ("" if unknown), uint8 [B, H, W] or [B, H, W, 3]."""

    names: list[str]
    truths: list[str]
    pixels: np.ndarray


def of_test(run: Path, data_dir: Path, count: int, names: list[str] | None, seed: int) -> Chosen:
    """Test images of a run's data: those of these names, or so many drawn at random.

    Raises UserError for a name that is not there, and if the run was trained on other data.
    """
    data = own_data(run, load_meta(run / BEST), open_data(data_dir))
    split = data.split("test")
    if names is None:
        index = np.sort(np.random.default_rng(seed).permutation(len(split))[:count])
    else:
        place = {name: number for number, name in enumerate(split.names)}
        for name in names:
            if name not in place:
                raise UserError(f"--names {name}: not a test image of {data_dir}, such as {split.names[0]}")
        index = np.array([place[name] for name in names])
    truths = [data.classes[label] for label in split.labels[index].tolist()]
    return Chosen([split.names[number] for number in index], truths, split.pixels(index).numpy())


def read(paths: list[Path], predictor: Predictor) -> Chosen:
    """Picture files, each a face, made like the training data. Raises UserError for one that cannot be."""
    pixels = []
    for path in paths:
        try:
            pixels.append(predictor.faces.prepare(batch_of(path)))
        except UserError as error:
            raise UserError(f"{path}: {str(error).removeprefix(f'{path}: ').removeprefix('images: ')}") from None
    return Chosen([printable(str(path)) for path in paths], [""] * len(paths), np.concatenate(pixels))


def write(folder: Path, chosen: Chosen, found: Iterable[Explained], classes: list[str]) -> list[Verdict]:
    """A picture of each face, faces.csv with a row for each, and methods.csv with what they say together."""
    every, rows = [], []
    for number, (name, truth, face, one) in enumerate(zip(chosen.names, chosen.truths, chosen.pixels, found)):
        picture(face, one, f"{name}: {classes[one.label]} {100 * one.probability:.0f} %", folder / _file(number, name))
        line: dict[str, Any] = {"picture": _file(number, name), "name": name, "label": truth}
        line |= {"prediction": classes[one.label], "probability": round(one.probability, 6)}
        for method, seen in one.maps.items():
            values = (seen.similarity, seen.area, seen.control_area)
            line |= {f"{method}: {key}": round(value, 6) for key, value in zip(CHECKS, values)}
        rows.append(line)
        every.append(one)
    said = verdicts(every)
    for name, lines in (("faces.csv", rows), ("methods.csv", [_numbers(verdict) for verdict in said])):
        pd.DataFrame(lines).to_csv(folder / name, index=False, lineterminator="\n")
    return said


def checks(verdict: Verdict) -> dict[str, Interval]:
    """By CHECKS."""
    return dict(zip(CHECKS, (verdict.similarity, verdict.area, verdict.control_area, verdict.gain)))


def _numbers(verdict: Verdict) -> dict[str, Any]:
    line: dict[str, Any] = {"method": verdict.method, "faces": verdict.faces}
    for name, found in checks(verdict).items():
        line |= {
            name: round(found.value, 6),
            f"{name}, low": round(found.low, 6),
            f"{name}, high": round(found.high, 6),
        }
    return line | {"what it means": verdict.words}


def shown(found: Interval) -> str:
    """A mean and its interval; the mean alone if it is of one face."""
    between = f" ({found.low:.2f}, {found.high:.2f})" if np.isfinite(found.low) else ""
    return f"{found.value:.2f}{between}"


def _file(number: int, name: str) -> str:
    return f"{number:03}-{Path(name).stem}.png"


def picture(face: np.ndarray, found: Explained, title: str, path: Path) -> None:
    """The face; for each method its map, that of random weights, and the deletion curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.9 * len(found.maps)), layout="constrained")
    figure.suptitle(title, parse_math=False)
    panels = figure.subplots(len(found.maps), 4, squeeze=False)
    for (plain, ours, other, curves), (method, seen) in zip(panels, found.maps.items()):
        for axes, name, values in (
            (plain, "face", None), (ours, method, seen.values), (other, f"{method}, random weights", seen.control),
        ):  # fmt: skip
            axes.imshow(face, cmap="gray", vmin=0, vmax=255, extent=(0, 1, 1, 0))
            if values is not None:
                most = np.abs(values).max() or 1
                axes.imshow(values, cmap="RdBu_r", vmin=-most, vmax=most, alpha=0.5, extent=(0, 1, 1, 0))
            axes.set_title(name, fontsize=9)
            axes.set_axis_off()
        share = np.linspace(0, 100, STEPS + 1)
        curves.plot(share, seen.curve, label=f"by the map, area {seen.area:.2f}")
        curves.plot(share, seen.control_curve, ":", label=f"by that of random weights, {seen.control_area:.2f}")
        curves.plot(share, seen.chance, "--", color="grey", label="in random order")
        curves.set_ylim(0, 1)
        curves.set_xlabel("% of the face replaced", fontsize=8)
        curves.set_title("probability of the prediction", fontsize=9)
        curves.legend(fontsize=7)
    figure.savefig(path, dpi=100)
