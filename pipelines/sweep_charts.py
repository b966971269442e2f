"""A sweep's trials as pictures: a line for each across all keys, and accuracy against each key."""

from math import log
from pathlib import Path
from typing import Any

from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from pipelines.space import Dimension, Space
from pipelines.trials import DONE, Trial

COLOURS = "viridis"


def parallel(space: Space, trials: list[Trial], path: Path) -> Path:
    """Parallel coordinates: one line a trial, dashed where it did not end, coloured by its best val accuracy."""
    shown = [trial for trial in trials if trial.rows]
    scale = Normalize(*_limits(shown))
    colours: Any = ScalarMappable(scale, COLOURS)
    figure = Figure(figsize=(2.2 + 1.7 * len(space), 4.8), layout="constrained")
    axes = figure.subplots()
    for trial in sorted(shown, key=lambda trial: trial.best or 0.0):
        heights = [_height(dimension, trial.point[key]) for key, dimension in space.items()]
        heights.append(float(scale(_percent(trial))))
        style = "-" if trial.state == DONE else "--"
        axes.plot(heights, style, color=colours.to_rgba(_percent(trial)), linewidth=2 if trial.state == DONE else 1)
    for place, dimension in enumerate(space.values()):
        axes.axvline(place, color="0.6", linewidth=0.8)
        for label, height in _ticks(dimension):
            axes.annotate(label, (place, height), (3, 3), textcoords="offset points", fontsize=7)
    axes.set_xticks(range(len(space) + 1), [*(_short(key) for key in space), "val accuracy"])
    axes.set_yticks([])
    axes.set_ylim(-0.05, 1.1)
    axes.set_title("Trials; dashed: stopped early", fontsize=10)
    figure.colorbar(colours, ax=axes, label="best val accuracy, %")
    figure.savefig(path, dpi=110)
    return path


def effects(space: Space, trials: list[Trial], importance: dict[str, float], path: Path) -> Path:
    """Best val accuracy against each key, the most important first; hollow: stopped early."""
    keys = sorted(space, key=lambda key: -importance.get(key, 0.0))
    columns = min(4, len(keys))
    lines = -(-len(keys) // columns)
    figure = Figure(figsize=(0.6 + 2.7 * columns, 0.4 + 2.6 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for key, axes in zip(keys, grid.flat):
        for trial in trials:
            if trial.rows:
                place = _height(space[key], trial.point[key])
                filled = {"facecolors": "tab:blue"} if trial.state == DONE else {"facecolors": "none"}
                axes.scatter(place, _percent(trial), edgecolors="tab:blue", **filled)
        ticks = _ticks(space[key])
        axes.set_xticks([height for _, height in ticks], [label for label, _ in ticks], fontsize=7)
        axes.set_xlim(-0.08, 1.08)
        share = f" ({100 * importance[key]:.0f} %)" if key in importance else ""
        axes.set_xlabel(f"{_short(key)}{share}", fontsize=8)
    for axes in grid.flat[len(keys) :]:
        axes.set_visible(False)
    figure.supylabel("best val accuracy, %", fontsize=8)
    figure.suptitle("Filled: ended; hollow: stopped early. In brackets: importance for the rank", fontsize=8)
    figure.savefig(path, dpi=110)
    return path


def _percent(trial: Trial) -> float:
    return 100 * (trial.best or 0.0)


def _limits(trials: list[Trial]) -> tuple[float, float]:
    values = [_percent(trial) for trial in trials]
    low, high = min(values, default=0.0), max(values, default=1.0)
    return low, high if high > low else low + 1.0


def _height(dimension: Dimension, value: Any) -> float:
    """Where a value stands on the axis of its key, 0 to 1."""
    if dimension.kind == "choice":
        return dimension.labels.index(value) / (len(dimension.labels) - 1)
    low, high = dimension.values
    if dimension.kind == "log":
        return log(value / low) / log(high / low)
    return (value - low) / (high - low)


def _ticks(dimension: Dimension) -> list[tuple[str, float]]:
    values = dimension.labels if dimension.kind == "choice" else list(dimension.values)
    return [(_cut(str(value), 22), _height(dimension, value)) for value in values]


def _short(key: str) -> str:
    return key.removeprefix("model.")


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
