"""Finished runs compared on the same test images, from their stored predictions: test is not read again."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fer import statistics
from fer.data.dataset import DataSet
from fer.data.folds import copies_of
from fer.data.near import SAME
from fer.errors import UserError
from fer.evaluate import read_evaluated
from fer.formats import format_of, read_run
from fer.run_folder import CONFIG, PREDICTIONS, SUMMARY, all_runs, named, read_config, read_summary
from fer.settings import flatten
from fer.statistics import Interval


@dataclass(frozen=True)
class Side:
    """One recipe: a run, or several that differ in their seed alone."""

    name: str
    folders: tuple[Path, ...]
    summaries: tuple[dict[str, Any], ...]

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of the probabilities."""
        return self.summaries[0]["classes"]

    @cached_property
    def table(self) -> pd.DataFrame:
        """row, name and label of the test images."""
        return self._read(0, "test")[["row", "name", "label"]]

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 [n]."""
        return self.table["label"].to_numpy(np.int64)

    @cached_property
    def probabilities(self) -> np.ndarray:
        """float32 [runs, n, C], on test."""
        return np.stack([self._of(self._read(run, "test")) for run in range(len(self.folders))])

    def _read(self, run: int, split: str) -> pd.DataFrame:
        images = self.summaries[run][split]["images"]
        return read_evaluated(self.folders[run] / PREDICTIONS.format(split=split), images, self.classes)

    def _of(self, table: pd.DataFrame) -> np.ndarray:
        return table[self.classes].to_numpy(np.float32)

    @cached_property
    def right(self) -> np.ndarray:
        """float64 [n]: the share of the runs that are right on each test image."""
        return (self.probabilities.argmax(2) == self.labels).mean(0)

    @cached_property
    def accuracies(self) -> list[float]:
        """Test accuracy of each run, 0 to 1."""
        return [summary["test"]["accuracy"] for summary in self.summaries]

    @cached_property
    def balanced(self) -> list[float]:
        """UAR of each run on test, 0 to 1."""
        return [summary["test"]["balanced_accuracy"] for summary in self.summaries]

    def scores(self) -> dict[str, float]:
        """Means over the runs: accuracy, UAR, log loss, Brier score, ECE, and the temperature that val asks for."""
        per_run = []
        for run, (summary, found) in enumerate(zip(self.summaries, self.probabilities)):
            val, test = self._read(run, "val"), summary["test"]
            per_run.append(
                {
                    "accuracy": test["accuracy"],
                    "UAR": test["balanced_accuracy"],
                    "log loss": statistics.negative_log_likelihood(found, self.labels),
                    "Brier": statistics.brier(found, self.labels),
                    "ECE": test["ece"],
                    "T": statistics.temperature(self._of(val), val["label"].to_numpy(np.int64)),
                }
            )
        return {key: float(np.mean([scores[key] for scores in per_run])) for key in per_run[0]}

    def recalls(self) -> list[Interval]:
        """Recall of each class on test, with its Wilson interval; over several runs their mean of hits."""
        found = []
        for label in range(len(self.classes)):
            rows = self.labels == label
            hits, images = float(self.right[rows].sum()), int(rows.sum())
            wilson = statistics.share(round(hits), images)
            found.append(replace(wilson, value=hits / images) if images else wilson)
        return found


@dataclass(frozen=True)
class Pair:
    """`one` minus `other`, on the same test images."""

    one: Side
    other: Side
    accuracy: Interval
    balanced_accuracy: Interval
    differing: float  # share of the images on which one of them alone is right; over seeds, of two of their runs
    detectable: float  # difference in accuracy that would stand out from chance
    p: float | None  # of accuracy: exact McNemar for two runs, Welch over seeds; None with one run on one side alone
    balanced_p: float | None  # of UAR: Welch over seeds, else None
    test: str

    @property
    def name(self) -> str:
        """Both sides, for titles."""
        return f"{self.one.name} and {self.other.name}"

    def verdict(self) -> str:
        """In words, whether the two can be told apart."""
        gap, images = 100 * self.accuracy.value, len(self.one.labels)
        apart = self.accuracy.low > 0 or self.accuracy.high < 0
        if apart and (self.p < 1 - statistics.LEVEL if self.p is not None else self.test == ""):
            better, worse = (self.one, self.other) if gap > 0 else (self.other, self.one)
            return f"{better.name} is better than {worse.name} by {abs(gap):.2f} points"
        who = "they" if len(self.one.folders) == len(self.other.folders) == 1 else "two of their runs"
        differ = f"{who} differ on {100 * self.differing:.1f} % of {images:,} images"
        if apart:
            by = "over seeds" if self.test == "Welch" else f"by {self.test}'s test"
            tested = f"p {self.p:.2g}" if self.p is not None else "but each side is the same with every seed"
            return f"not told apart {by}: {abs(gap):.2f} points, {tested}; {differ}"
        return f"not told apart: {differ}, where {100 * self.detectable:.1f} points would stand out"


def verdicts(pairs: Sequence[Pair]) -> list[str]:
    """What can be told apart, a line for each pair, with its names where there are several."""
    return [pair.verdict() if len(pairs) == 1 else f"{pair.name}: {pair.verdict()}" for pair in pairs]


def side(word: str, runs: Path) -> Side:
    """The finished runs that `word` names: a run id, or the start of several that differ in their seed alone.

    Several ids or starts of ids have commas between them. Raises UserError if one names no run, or the runs are of
    several recipes, of one seed, or of several test splits.
    """
    finished = {one: [(path, s) for path in named(runs, one) if (s := read_summary(path))] for one in word.split(",")}
    found = list({folder: (folder, summary) for part in finished.values() for folder, summary in part}.values())
    for one in [one for one, part in finished.items() if not part]:
        known = ", ".join(path.name for path in all_runs(runs) if (path / SUMMARY).exists()) or "none yet"
        raise UserError(f"{one or 'an empty name'}: no finished run in {runs}; finished: {known}")
    recipes = {_recipe(folder): folder.name for folder, _ in found}
    if len(recipes) > 1:
        raise UserError(
            f"{word}: names runs of several recipes, give more of the id, or several with commas: {_apart(recipes)}"
        )
    seeds = {_seed(folder): folder.name for folder, _ in found}
    if len(seeds) < len(found):  # as what they start from differs, or how they are called
        names = ", ".join(folder.name for folder, _ in found)
        raise UserError(f"{word}: names several runs of one seed, give more of the id: {names}")
    splits = {summary.get("test_hash", ""): folder.name for folder, summary in found}
    if len(splits) > 1:
        names = " and ".join(splits.values())
        raise UserError(f"{word}: {names} were not evaluated on the same test images; run `fer evaluate` on each")
    name = found[0][0].name if len(found) == 1 else f"{found[0][1]['name']} ({len(found)} seeds)"
    return Side(name, tuple(folder for folder, _ in found), tuple(summary for _, summary in found))


def _recipe(folder: Path) -> str:
    content = read_config(folder)
    run = read_run(content, folder / CONFIG)  # with the settings that came after it, which are at their defaults
    config = {"format": format_of(content), **run.model_dump(exclude={"seed"})}
    return json.dumps([config, content["data_hash"]], sort_keys=True)


def _apart(recipes: dict[str, str]) -> str:
    """The names of runs by their `_recipe`, each with the settings in which these differ."""
    every = [flatten(config) | {"data": data} for config, data in map(json.loads, recipes)]
    texts = [{f"{key}={json.dumps(value)}" for key, value in one.items()} for one in every]
    common = set.intersection(*texts)
    return "; ".join(f"{name} ({', '.join(sorted(own - common))})" for name, own in zip(recipes.values(), texts))


def _seed(folder: Path) -> int:
    return read_config(folder)["config"]["seed"]


def refuse_apart(sides: Sequence[Side]) -> None:
    """Raises UserError if two sides were not evaluated on the same test images, whatever these are called now."""
    first, same = sides[0], ["row", "label"]
    for other in sides[1:]:
        if other.classes != first.classes or not other.table[same].equals(first.table[same]):
            raise UserError(f"{other.name} and {first.name}: not evaluated on the same test images, so not comparable")


def pairs(sides: Sequence[Side], data: DataSet | None) -> list[Pair]:
    """Every two of the sides. `data`: where copies of a photograph are recognised, if it has the images evaluated on.

    Raises UserError as `refuse_apart` does.
    """
    refuse_apart(sides)
    first = sides[0]
    alike = np.arange(len(first.labels))
    if data is not None and data.test_hash == first.summaries[0].get("test_hash"):
        test = data.split("test")
        threshold = data.summary.get("near_duplicates", SAME)
        alike = copies_of(test.images, test.rows, np.full(len(test.rows), ""), threshold)
    return [_pair(one, other, alike) for one, other in combinations(sides, 2)]


def _pair(one: Side, other: Side, alike: np.ndarray) -> Pair:
    alone = len(one.folders) == len(other.folders) == 1
    seeds = min(len(one.folders), len(other.folders))
    differing = float((one.right * (1 - other.right) + other.right * (1 - one.right)).mean())
    p, balanced_p, test = None, None, ""
    if alone:
        p, test = statistics.mcnemar(one.right > 0.5, other.right > 0.5), "McNemar"
    elif seeds > 1:
        p, test = statistics.between_seeds(one.accuracies, other.accuracies)[1], "Welch"
        balanced_p = statistics.between_seeds(one.balanced, other.balanced)[1]
    accuracy, balanced = (
        statistics.difference(one.right, other.right, one.labels, alike, balanced) for balanced in (False, True)
    )
    detectable = statistics.detectable(len(one.labels), float(np.square(one.right - other.right).mean()))
    return Pair(one, other, accuracy, balanced, differing, detectable, p, balanced_p, test)
