"""docs/results: the test predictions of the runs that the README reports, and every number recomputed from them."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats

from benchmarks.measure import ROOT
from fer.data.dataset import open_data
from fer.evaluate import metrics
from fer.run_folder import PREDICTIONS, read_rows, read_summary
from fer.statistics import LEVEL, even, mcnemar, share

FOLDER = ROOT / "docs" / "results"
INDEX = "index.csv"
FIRST = 3  # of the classes among a file's columns: name, label, leaked, then a probability for each class
KEPT = {"test": ["", "near", "train", "val"], "test_exact_unleaked": ["", "near"], "test_near_unleaked": [""]}
COLUMNS = ["row", "kind", "seed", "run", "command", "minutes", "val", *KEPT, "uar"]
COMPARED = {
    "test": "test", "test_near_unleaked": "unleaked", "test_leaked": "leaked alone",
    "uar": "UAR", "uar_near_unleaked": "UAR, unleaked",
}  # fmt: skip
KINDS = ("scratch", "imagenet", "ensemble", "ablation")
HEAD = ["| model | runs | val | test | exact | unleaked | UAR | minutes | command |", f"|{9 * '---|'}"]


def predictions(run: str, folder: Path = FOLDER) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Probabilities [n, C] and labels [n] of a run's test images, and which of them are leaked and how ("": not)."""
    table = pd.read_csv(folder / f"{run}.csv", keep_default_na=False)
    names = list(table.columns[FIRST:])
    labels = torch.tensor([names.index(name) for name in table["label"]])
    return torch.tensor(table[names].to_numpy(np.float32)), labels, table["leaked"].to_numpy(str)


def numbers(run: str, folder: Path = FOLDER) -> dict[str, float]:
    """The test numbers of a row of the index, in %, from the predictions."""
    return _numbers(*predictions(run, folder))


def _numbers(probabilities: torch.Tensor, labels: torch.Tensor, leaked: np.ndarray) -> dict[str, float]:
    found = {}
    for name, kinds in KEPT.items():
        rows = torch.from_numpy(np.isin(leaked, kinds))
        found[name] = 100 * metrics(probabilities[rows], labels[rows])["accuracy"]
    return found | {"uar": 100 * metrics(probabilities, labels)["balanced_accuracy"]}


def index(folder: Path = FOLDER) -> pd.DataFrame:
    """docs/results/index.csv. Raises ValueError where a number is not that of the predictions."""
    table = pd.read_csv(folder / INDEX)
    for entry in table.to_dict("records"):
        for name, value in numbers(entry["run"], folder).items():
            if round(value, 2) != entry[name]:
                raise ValueError(f"{folder / INDEX}: {name} of {entry['run']} is {entry[name]}, not {value:.2f}")
    return table


def add(run: Path, row: str, kind: str, command: str, folder: Path = FOLDER) -> None:
    """Copy the test predictions of a finished run, and write its row of the index."""
    summary = read_summary(run)
    if summary is None:
        raise SystemExit(f"{run}: has no summary.json; finish the run")
    table = pd.read_csv(run / PREDICTIONS.format(split="test"), keep_default_na=False)
    kept = table[["name", "label", "leaked", *summary["classes"]]]
    folder.mkdir(parents=True, exist_ok=True)
    kept.to_csv(folder / f"{summary['run_id']}.csv", index=False, float_format="%.6g")
    seed = int(summary["run_id"].split("-s")[-1].split("-")[0])
    minutes = sum(entry["seconds"] for entry in read_rows(run)) / 60
    entry: dict[str, Any] = {"row": row, "kind": kind, "seed": seed, "run": summary["run_id"], "command": command}
    entry |= {"minutes": round(minutes, 1), "val": round(100 * summary["val"]["accuracy"], 2)}
    entry |= {name: round(value, 2) for name, value in numbers(summary["run_id"], folder).items()}
    path = folder / INDEX
    old = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=COLUMNS)
    others = old[old["run"] != entry["run"]].to_dict("records")
    pd.DataFrame([*others, entry], columns=COLUMNS).sort_values(["row", "seed"]).to_csv(path, index=False)


def lines(folder: Path = FOLDER, group: str = "") -> list[str]:
    """A table with a line for each row of the index: the mean over its seeds and their standard deviation.

    Of a `group`, the text before ":" in its rows, or of the rows without one.
    """
    found, table = list(HEAD), index(folder)
    for row, part in table[table["row"].map(_group) == group].groupby("row", sort=False):
        shown = " | ".join(_mean(part[name]) for name in ("val", *KEPT, "uar", "minutes"))
        found.append(f"| {row} | {len(part)} | {shown} | `{part['command'].iloc[0]}` |")
    return found


def recalls(row: str, folder: Path = FOLDER) -> list[str]:
    """A line for each class: mean recall over the seeds of a row, and Wilson's 95 % interval of so many hits."""
    known = _runs(index(folder), row, folder)
    runs = [predictions(run, folder) for run in known]
    names = pd.read_csv(folder / f"{known[0]}.csv", nrows=1).columns[FIRST:]
    found = ["| class | images | recall % | 95 % |", "|---|---|---|---|"]
    for number, name in enumerate(names):
        hits = [int((probabilities[labels == number].argmax(1) == number).sum()) for probabilities, labels, _ in runs]
        images, hit = int((runs[0][1] == number).sum()), float(np.mean(hits))
        wilson = share(round(hit), images)
        between = f"{100 * wilson.low:.1f} to {100 * wilson.high:.1f}"
        found.append(f"| {name} | {images} | {100 * hit / images:.1f} | {between} |")
    return found


def evened(row: str, data: Path, folder: Path = FOLDER) -> list[str]:
    """Accuracy and UAR of the runs of a row, as they are and with the classes evened out by half and wholly.

    `data`: the prepared data that they were trained on, whose training images of each class are counted. The numbers
    are from the probabilities in the files, which are calibrated in ensembles alone.
    """
    known = open_data(data)
    images = torch.bincount(known.split("train").labels, minlength=len(known.classes)).numpy()
    runs = _runs(index(folder), row, folder)
    found = ["| run | even | accuracy | UAR |", "|---|---|---|---|"]
    for run in runs:
        if list(pd.read_csv(folder / f"{run}.csv", nrows=0).columns[FIRST:]) != known.classes:
            raise SystemExit(f"{data}: has other classes than {run}, or in another order")
        own, labels, _ = predictions(run, folder)
        for power in (0, 0.5, 1):
            scores = metrics(torch.from_numpy(even(own.numpy(), images, power)), labels)
            shown = f"{100 * scores['accuracy']:.2f} | {100 * scores['balanced_accuracy']:.2f}"
            found.append(f"| {run} | {power:g} | {shown} |")
    return found


def against(control: str, folder: Path = FOLDER) -> list[str]:
    """How far the other rows of the control's group, the text before ":", are from it, on all of test and parts of it.

    Differences of the means over seeds in points, with the simultaneous 95 % intervals and p of Dunnett's test (1955),
    which takes one variance from all rows of the group. Every row needs two runs or more. An image counts as leaked if
    it is so for one of the runs.
    """
    table = index(folder)
    _runs(table, control, folder)  # tells if there is no such row
    group = _with_leaked(table[table["row"].map(_group) == _group(control)], folder)
    rows = [row for row in dict.fromkeys(group["row"]) if row != control]
    found = [f"| {control} against | on | its mean | the other's | difference | 95 % | p |", f"|{7 * '---|'}"]
    for name, shown in COMPARED.items():
        values = {row: part[name].to_numpy() for row, part in group.groupby("row")}
        if np.isnan(values[control]).any():  # no image is leaked
            continue
        test = stats.dunnett(*(values[row] for row in rows), control=values[control], random_state=0)
        bounds, own = test.confidence_interval(LEVEL), values[control].mean()
        for row, low, high, p in zip(rows, bounds.low, bounds.high, test.pvalue):
            mean = values[row].mean()
            cells = f"{own:.2f} | {mean:.2f} | {mean - own:+.2f} | {low:+.2f} to {high:+.2f} | {p:.3f}"
            found.append(f"| {row} | {shown} | {cells} |")
    return found


def minus(rows: list[str], others: list[str], folder: Path = FOLDER) -> list[str]:
    """How far the runs of `rows` together are from those of `others` together, on all of test and parts of it.

    Differences of the means over runs in points, with the 95 % interval and p of Welch's t test (1947). An image counts
    as leaked if it is so for one of the runs.
    """
    table = index(folder)
    for row in (*rows, *others):
        _runs(table, row, folder)  # tells if there is no such row
    both = _with_leaked(table[table["row"].isin([*rows, *others])], folder)
    sides = [both[both["row"].isin(names)] for names in (rows, others)]
    found = ["| on | runs | mean | the others' | difference | 95 % | p |", f"|{7 * '---|'}"]
    for name, shown in COMPARED.items():
        ours, theirs = (side[name].to_numpy() for side in sides)
        if np.isnan(theirs).any():  # no image is leaked
            continue
        test = stats.ttest_ind(ours, theirs, equal_var=False)
        low, high = test.confidence_interval(LEVEL)
        means = f"{ours.mean():.2f} | {theirs.mean():.2f} | {ours.mean() - theirs.mean():+.2f}"
        cells = f"{means} | {low:+.2f} to {high:+.2f} | {test.pvalue:.3f}"
        found.append(f"| {shown} | {len(ours)} and {len(theirs)} | {cells} |")
    return found


def _with_leaked(runs: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """With accuracy and UAR on the images that are leaked for none of the runs, and accuracy on the others; in %.

    Which images are leaked depends on the training images that a row keeps: runs are compared on the same ones.
    """
    found = [predictions(run, folder) for run in runs["run"]]
    copies = torch.from_numpy(np.any([leaked != "" for _, _, leaked in found], 0))
    return runs.assign(**pd.DataFrame([_by_leak(*one[:2], copies) for one in found], runs.index))


def _by_leak(probabilities: torch.Tensor, labels: torch.Tensor, copies: torch.Tensor) -> dict[str, float]:
    """nan on leaked images if there are none."""
    others = metrics(probabilities[~copies], labels[~copies])
    on_copies = metrics(probabilities[copies], labels[copies])["accuracy"] if copies.any() else np.nan
    found = {"test_near_unleaked": others["accuracy"], "uar_near_unleaked": others["balanced_accuracy"]}
    return {name: 100 * value for name, value in (found | {"test_leaked": on_copies}).items()}


def together(runs: list[str], folder: Path = FOLDER) -> list[str]:
    """The test numbers of the mean of several runs' probabilities, in %. A run that is named twice counts twice."""
    found = _on_same_images(runs, folder)
    leaked = np.where(np.any([one[2] != "" for one in found], 0), "near", "")
    scores = _numbers(torch.stack([one[0] for one in found]).mean(0), found[0][1], leaked)
    names = ("test", "test_near_unleaked", "uar")
    return ["| test | unleaked | UAR |", "|---|---|---|", f"| {' | '.join(f'{scores[name]:.2f}' for name in names)} |"]


def pair(run: str, other: str, folder: Path = FOLDER) -> list[str]:
    """Two single runs: their accuracy on test, the images that one of them alone has right, and the exact McNemar p."""
    both = _on_same_images([run, other], folder)
    first, second = ((probabilities.argmax(1) == labels).numpy() for probabilities, labels, _ in both)
    means = f"{100 * first.mean():.2f} | {100 * second.mean():.2f}"
    alone = f"{(first & ~second).sum()} and {(second & ~first).sum()} of {len(first)}"
    head = "| test | the other's | right alone | p |"
    return [head, "|---|---|---|---|", f"| {means} | {alone} | {mcnemar(first, second):.3f} |"]


def _on_same_images(runs: list[str], folder: Path) -> list[tuple[torch.Tensor, torch.Tensor, np.ndarray]]:
    for run in runs:
        if not (folder / f"{run}.csv").exists():
            raise SystemExit(f"{folder}: has no {run}.csv")
    found = [predictions(run, folder) for run in runs]
    for run, (_, labels, _) in zip(runs, found):
        if not labels.equal(found[0][1]):
            raise SystemExit(f"{folder / run}.csv: has other test images than {runs[0]}.csv")
    return found


def mistaken(row: str, folder: Path = FOLDER) -> list[str]:
    """A line for each test image that every run of a row gets wrong, the surest mistakes first; names, no pictures."""
    runs = _runs(index(folder), row, folder)
    whole = [pd.read_csv(folder / f"{run}.csv", keep_default_na=False) for run in runs]
    classes = whole[0].columns[FIRST:]
    mean = np.mean([one[classes].to_numpy() for one in whole], 0)
    labels = whole[0]["label"].to_numpy()
    wrong = np.all([classes[one[classes].to_numpy().argmax(1)] != labels for one in whole], 0)
    found = ["| image | label | taken for | probability |", "|---|---|---|---|"]
    for place in sorted(np.flatnonzero(wrong), key=lambda place: -mean[place].max()):
        taken = classes[mean[place].argmax()]
        found.append(f"| {whole[0]['name'][place]} | {labels[place]} | {taken} | {mean[place].max():.2f} |")
    return found


def _runs(table: pd.DataFrame, row: str, folder: Path) -> list[str]:
    """The runs of a row of the index, `table`."""
    runs = table.loc[table["row"] == row, "run"].tolist()
    if not runs:
        raise SystemExit(f"{folder / INDEX}: has no row {row}")
    return runs


def _group(row: str) -> str:
    return row.rpartition(":")[0]


def _mean(values: pd.Series) -> str:
    spread = f" ± {values.std():.2f}" if len(values) > 1 and values.name != "minutes" else ""
    return f"{values.mean():.2f}{spread}" if values.name != "minutes" else f"{values.mean():.1f}"


def main() -> None:
    """Check docs/results and print its tables, or add a run to it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--add", type=Path, metavar="RUN_FOLDER", help="a finished run")
    parser.add_argument("--row", help="with --add: the name of its row, the same for all seeds")
    parser.add_argument("--kind", choices=KINDS, help="with --add")
    parser.add_argument("--command", help="with --add: the command that trains it, without the seed")
    parser.add_argument("--recalls", metavar="ROW", help="class by class")
    parser.add_argument("--mistaken", metavar="ROW", help="the test images that all of its runs get wrong")
    parser.add_argument("--against", metavar="ROW", help="the other rows of its group, the text before the colon")
    parser.add_argument("--mean-of", nargs="+", metavar="ROW", help="with --minus: two sets of rows, pooled")
    parser.add_argument("--minus", nargs="+", metavar="ROW")
    parser.add_argument("--even", metavar="ROW", help="its runs with the classes evened out")
    parser.add_argument("--data", type=Path, help="with --even: the prepared data, such as data/sets/ferplus_votes")
    parser.add_argument("--together", nargs="+", metavar="RUN", help="the mean of their predictions")
    parser.add_argument("--pair", nargs=2, metavar="RUN", help="two single runs")
    asked = parser.parse_args()
    for one, other in (("even", "data"), ("mean_of", "minus")):
        if (getattr(asked, one) is None) != (getattr(asked, other) is None):
            parser.error(f"give both --{one.replace('_', '-')} and --{other}, or neither")
    if asked.add is not None:
        if None in (asked.row, asked.kind, asked.command):
            parser.error("--add needs --row, --kind and --command")
        add(asked.add, asked.row, asked.kind, asked.command)
    asked_for: dict[Callable[..., list[str]], list[Any]] = {
        recalls: [asked.recalls], mistaken: [asked.mistaken], against: [asked.against],
        evened: [asked.even, asked.data], minus: [asked.mean_of, asked.minus],
        together: [asked.together], pair: asked.pair or [None],
    }  # fmt: skip
    for table, values in asked_for.items():
        if values[0] is not None:
            print("\n".join(table(*values)))  # noqa: T201
            return
    for group in dict.fromkeys(index()["row"].map(_group)):
        print("\n".join([*lines(group=group), ""]))  # noqa: T201


if __name__ == "__main__":
    main()
