"""`fer compare --report`: runs compared on one page of HTML, without scripts and without any file beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from fer.data.datasets import DATASETS
from fer.metrics import bin_of
from fer.run_folder import data_name, read_rows
from fer.statistics import Interval
from pipelines import comparison, report
from pipelines.comparison import Pair, Side

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by everyone (Okabe, Ito 2008)
WIDTH, LEFT, RIGHT = 420, 118, 14  # of a chart, and its margins
NAMES = 25  # images listed for each pair and direction


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high`, drawn from `first` to `last` in pixels."""

    low: float
    high: float
    first: float
    last: float

    def __call__(self, value: float) -> float:
        return round(self.first + (value - self.low) / (self.high - self.low) * (self.last - self.first), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Place and label of four to nine round numbers."""
        raw = (self.high - self.low) / 5
        unit = 10.0 ** np.floor(np.log10(raw))
        step = unit * next(each for each in (1, 2, 5, 10) if each * unit >= raw * 0.999)
        values = np.arange(np.ceil(self.low / step), np.floor(self.high / step + 1e-9) + 1) * step
        return [(self(value), f"{value:g}") for value in np.round(values, 9) + 0.0]  # no -0


def compared(sides: Sequence[Side], pairs: Sequence[Pair]) -> str:
    """The page, as HTML; of as many sides as there are COLOURS at most."""
    colours = COLOURS[: len(sides)]
    runs = [summary for side in sides for summary in side.summaries]
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("compare.html").render(
        title=" and ".join(side.name for side in sides),
        data=f"{data_name(runs[0]['data'])}, {len(sides[0].labels):,} test images, data {runs[0]['data_hash']}",
        sides=list(zip(sides, colours)),
        verdicts=comparison.verdicts(pairs),
        columns=report.COLUMNS,
        legend=report.LEGEND,
        published=DATASETS.get(runs[0]["data"]["dataset"]),
        runs=[report.row(summary) for summary in runs],
        scores=[(side.name, side.scores()) for side in sides],
        gaps=_gaps(pairs),
        recalls=_recalls(sides, colours),
        curves=[_curve(sides, colours, *what) for what in CURVES],
        confusions=[(side.name, len(side.folders), _confusion(side)) for side in sides],
        reliability=[(side.name, _reliability(side, colour)) for side, colour in zip(sides, colours)],
        disagreements=[_disagreement(pair) for pair in pairs],
    )


def _whiskers(rows: Sequence[tuple[str, Sequence[tuple[Interval, str, str]]]], zero: bool) -> Markup:
    """Rows of a label and of intervals in points, each with its colour and what it is; `zero`: marked, and in sight."""
    found = [interval for _, intervals in rows for interval, _, _ in intervals]
    low, high = (100 * edge(getattr(each, key) for each in found) for edge, key in ((min, "low"), (max, "high")))
    low, high = (min(low, 0), max(high, 0)) if zero else (max(low, 0), min(high, 100))
    room = max(high - low, 0.1) * 0.05
    axis = Axis(low - room, high + room, LEFT, WIDTH - RIGHT)
    step, top = 13, 6
    parts, y = list[str](), float(top)
    for label, intervals in rows:
        height = step * len(intervals) + 8
        parts.append(_text(LEFT - 8, y + height / 2 + 4, label, "end"))
        for place, (interval, colour, what) in enumerate(intervals):
            middle = y + 4 + step * (place + 0.5)
            ends = [axis(100 * each) for each in (interval.low, interval.value, interval.high)]
            shown = f"{what}: {100 * interval.value:.2f} ({100 * interval.low:.2f} to {100 * interval.high:.2f})"
            parts.append(
                f'<g stroke="{colour}" fill="{colour}"><title>{_safe(shown)}</title>'
                f'<path d="M{ends[0]} {middle}H{ends[2]}" stroke-width="2"/>'
                f'<circle cx="{ends[1]}" cy="{middle}" r="3.5"/></g>'
            )
        y += height
    lines = [_line(x, top, x, y) + _text(x, y + 15, shown) for x, shown in axis.ticks()]
    lines += [_line(axis(0), top, axis(0), y, "currentColor")] if zero else []
    return _svg([*lines, *parts], y + 22)


def _gaps(pairs: Sequence[Pair]) -> list[tuple[str, Markup]]:
    """A chart of the differences of each pair."""
    found = []
    for pair in pairs:
        what = {"accuracy": pair.accuracy, "UAR": pair.balanced_accuracy}
        rows = [(f"{name} {100 * gap.value:+.2f}", [(gap, "currentColor", name)]) for name, gap in what.items()]
        found.append((f"{pair.one.name} minus {pair.other.name}", _whiskers(rows, zero=True)))
    return found


def _recalls(sides: Sequence[Side], colours: Sequence[str]) -> Markup:
    every = [side.recalls() for side in sides]
    rows = []
    for place, name in enumerate(sides[0].classes):
        images = int((sides[0].labels == place).sum())
        if not images:
            continue
        points = [(found[place], colour, side.name) for side, colour, found in zip(sides, colours, every)]
        rows.append((f"{name} ({images})", points))
    return _whiskers(rows, zero=False)


CURVES = (  # title, what is drawn solid and dashed of metrics.jsonl, factor
    ("Accuracy in %", "val_accuracy", "train_accuracy", 100.0),
    ("Loss", "val_loss", "train_loss", 1.0),
)


def _curve(
    sides: Sequence[Side], colours: Sequence[str], title: str, solid: str, dashed: str, factor: float
) -> tuple[str, Markup]:
    """A line for each run: val solid, train dashed; a dot where val chose the epoch."""
    lines = []
    for side, colour in zip(sides, colours):
        for folder, summary in zip(side.folders, side.summaries):
            rows = read_rows(folder)
            for key, dash in ((dashed, "3 3"), (solid, "")):
                points = [(row["epoch"], factor * row[key]) for row in rows if row.get(key) is not None]
                if points:
                    lines.append((points, colour, dash, None if dash else summary["best_epoch"]))
    if not lines:
        return title, Markup("<p>No curves are stored.</p>")
    values = [value for points, *_ in lines for _, value in points]
    low, high, last = min(values), max(values), max(points[-1][0] for points, *_ in lines)
    x, y = Axis(0, max(last, 1), 44, WIDTH - RIGHT), Axis(low, max(high, low + 1e-6), 216, 8)
    parts = [_line(44, at, WIDTH - RIGHT, at) + _text(38, at + 4, shown, "end") for at, shown in y.ticks()]
    parts += [_text(at, 234, shown) for at, shown in x.ticks()] + [_text((44 + WIDTH) / 2, 250, "epoch")]
    for points, colour, dash, best in lines:
        path = " ".join(f"{x(epoch)},{y(value)}" for epoch, value in points)
        faint = f' stroke-dasharray="{dash}" stroke-opacity=".6"' if dash else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.4"{faint}/>')
        parts += [
            f'<circle cx="{x(epoch)}" cy="{y(value)}" r="3.5" fill="{colour}"/>'
            for epoch, value in points
            if epoch == best
        ]
    return title, _svg(parts, 256)


def _confusion(side: Side) -> Markup:
    """Rows: the label; columns: the prediction. Shares of the row in %, below them the counts."""
    size, top, left = len(side.classes), 70, 78
    counts = np.zeros((size, size), int)
    for probabilities in side.probabilities:
        np.add.at(counts, (side.labels, probabilities.argmax(1)), 1)
    cell = (WIDTH - left - 40) / size  # room for the last turned name
    parts = []
    for place, name in enumerate(side.classes):
        middle = left + cell * (place + 0.5)
        parts.append(_text(left - 6, top + cell * (place + 0.5) + 4, name, "end"))
        turned = f'transform="rotate(-45 {middle:.1f} {top - 6})"'
        parts.append(f'<text x="{middle:.1f}" y="{top - 6}" fill="currentColor" {turned}>{_safe(name)}</text>')
    for label, line in enumerate(counts):
        total = max(1, line.sum())
        for predicted, count in enumerate(line):
            share, x, y = count / total, left + cell * predicted, top + cell * label
            dark = "#fff" if share > 0.5 else "currentColor"
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{cell - 1:.1f}" height="{cell - 1:.1f}" fill="#0072b2" '
                f'fill-opacity="{0.05 + 0.95 * share:.2f}"><title>{_safe(side.classes[label])} as '
                f"{_safe(side.classes[predicted])}: {count} of {total}</title></rect>"
            )
            if count:
                middle = x + cell / 2
                parts.append(_text(middle, y + cell / 2, f"{100 * share:.0f}", fill=dark))
                parts.append(_text(middle, y + cell / 2 + 12, f"{count}", fill=dark, size=9))
    return _svg(parts, top + cell * size + 4)


def _reliability(side: Side, colour: str) -> Markup:
    """Accuracy over confidence in bins, as ECE has them; the area of a dot is its share of the predictions."""
    confidence = side.probabilities.max(2).ravel()
    right = (side.probabilities.argmax(2) == side.labels).ravel()
    bins = bin_of(torch.from_numpy(confidence)).numpy()
    axis, up = Axis(0, 100, 44, WIDTH - 28), Axis(0, 100, 316, 26)
    parts = [_line(44, at, WIDTH - 28, at) + _text(38, at + 4, shown, "end") for at, shown in up.ticks()]
    parts += [_line(at, 26, at, 316) + _text(at, 332, shown) for at, shown in axis.ticks()]
    parts += [
        _line(axis(0), up(0), axis(100), up(100), "currentColor"),
        _text((44 + WIDTH) / 2, 348, "confidence in %"),
    ]
    points = []
    for place in np.unique(bins):
        rows = bins == place
        at, hits, many = 100 * confidence[rows].mean(), 100 * right[rows].mean(), int(rows.sum())
        points.append(f"{axis(at)},{up(hits)}")
        radius = max(2.5, 26 * (many / len(bins)) ** 0.5)
        parts.append(
            f'<circle cx="{axis(at)}" cy="{up(hits)}" r="{radius:.1f}" fill="{colour}" fill-opacity=".45">'
            f"<title>{many} predictions, confidence {at:.1f} %, right {hits:.1f} %</title></circle>"
        )
    parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="1.4"/>')
    return _svg(parts, 356)


def _disagreement(pair: Pair) -> dict[str, Any]:
    """On how many images one of two is right alone, and those of which it is surest; over seeds by mean probability."""
    sides = (pair.one, pair.other)
    means = [side.probabilities.mean(0) for side in sides]
    said = [mean.argmax(1) for mean in means]
    right = [one == pair.one.labels for one in said]
    alone = []
    for place, side in enumerate(sides):
        rows = np.flatnonzero(right[place] & ~right[1 - place])
        sure = means[place].max(1)[rows] + means[1 - place].max(1)[rows]
        listed = [_image(pair.one, row, said, means) for row in rows[np.argsort(-sure, kind="stable")][:NAMES]]
        alone.append((side.name, len(rows), listed))
    both, none = int((right[0] & right[1]).sum()), int((~right[0] & ~right[1]).sum())
    return {"title": pair.name, "names": [side.name for side in sides], "both": both, "none": none, "alone": alone}


def _image(side: Side, row: int, said: Sequence[np.ndarray], means: Sequence[np.ndarray]) -> list[str]:
    answers = [f"{side.classes[one[row]]} {100 * mean[row].max():.0f} %" for one, mean in zip(said, means)]
    return [str(side.table["name"].iloc[row]), side.classes[side.labels[row]], *answers]


def _safe(text: str) -> str:
    return str(Markup.escape(text))


def _svg(parts: Sequence[str], height: float) -> Markup:
    """A drawing of parts that are SVG already."""
    return Markup(f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img">' + "".join(parts) + "</svg>")


def _text(x: float, y: float, text: str, anchor: str = "middle", fill: str = "currentColor", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}" font-size="{size}">{_safe(text)}</text>'


def _line(x: float, y: float, to_x: float, to_y: float, colour: str = "var(--line)") -> str:
    return f'<path d="M{x} {y}L{to_x} {to_y}" stroke="{colour}"/>'
