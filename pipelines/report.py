"""Finished runs side by side: the same rows for the terminal and the Prefect artifact."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fer.evaluate import read_summary
from fer.made_by import source_hash
from pipelines.halving import expected_epochs, rungs_of
from pipelines.sweep_settings import PROMOTING
from pipelines.trials import RUNNING, Trial, best_of

# Test accuracy in % as the papers report it, each from its own training
PUBLISHED = {
    "ferplus": [
        ("QCS 2025", 91.85, "IR50, MS-Celeb-1M"),
        ("POSTER 2023", 91.62, "IR50 + landmarks"),
        ("DCS 2025", 91.41, "IR50, MS-Celeb-1M"),
        ("DDAMFN 2023", 90.74, "face pre-training"),
        ("Neural Resizer, Swin-B 2022", 89.50, "ImageNet"),
        ("VTFF 2021", 88.81, "face pre-training"),
        ("VGG13 (Barsoum) 2016", 84.99, "from scratch"),
    ]
}
COLUMNS = ("run", "val", "test", "unleaked", "not in train", "UAR", "F1", "ECE", "params", "epoch", "min")
LEGEND = (
    "Accuracy in %: val (chose the epoch), test (read once), unleaked (test without images that also stand in train or "
    "val), not in train (without those in train alone, as in published tables). UAR: mean recall of the classes; "
    "F1: macro; ECE: calibration error; epoch: best / all; min: minutes of training. "
    "*: the code in fer/ has changed since."
)


def finished(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """summary.json of every finished run among `folders`, best val accuracy first."""
    found = [summary for folder in folders if (summary := read_summary(folder)) is not None]
    return sorted(found, key=lambda summary: -summary["val"]["accuracy"])


def row(summary: dict[str, Any]) -> dict[str, str]:
    """One run under COLUMNS, as text; accuracies in %."""
    test = summary["test"]
    cells = (
        summary["run_id"] + ("*" if differs(summary) else ""),
        _percent(summary["val"]["accuracy"]),
        _percent(test["accuracy"]),
        _percent(summary.get("test_unleaked", {}).get("accuracy")),  # of which format 1 knew nothing
        _percent(summary["test_without_train"].get("accuracy")),
        _percent(test["balanced_accuracy"]),
        _percent(test["macro_f1"]),
        f"{test['ece']:.3f}",
        f"{summary['parameters'] / 1e6:.2f}M",
        f"{summary['best_epoch']}/{summary['epochs']}",
        f"{summary['train_seconds'] / 60:.1f}",
    )
    return dict(zip(COLUMNS, cells))


def differs(summary: dict[str, Any]) -> bool:
    """Whether other code of fer/ than today's trained or evaluated the run, or nobody knows."""
    return any(summary.get(key, {}).get("fer") != source_hash() for key in ("trained_by", "made_by"))


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def note(summary: dict[str, Any]) -> str:
    """What a person wants to know of a run at once, as Markdown."""
    test, unleaked, data = summary["test"], summary["test_unleaked"], summary["data"]
    labels = ", ".join(str(data[key]) for key in ("label_source", "label_mode") if key in data)
    best = f"epoch {summary['best_epoch']} of {summary['epochs']}"
    return (
        f"**{_percent(test['accuracy'])} %** of {test['images']} test images, "
        f"**{_percent(unleaked.get('accuracy'))} %** of the {unleaked['images']} that do not stand in train or val; "
        f"{_percent(summary['val']['accuracy'])} % of {summary['val']['images']} val images, which chose {best}.\n\n"
        f"Data: {data['dataset']} ({labels}), hash {summary['data_hash']}. "
        f"`final/` metrics are of the best epoch, the others are curves."
    )


def confusion_picture(summary: dict[str, Any], path: Path) -> Path:
    """The test confusion matrix as a picture: counts, coloured by the share of each true class."""
    return _drawing.submit(_draw_confusion, summary, path).result()


_drawing = ThreadPoolExecutor(1)  # runs end in several threads; matplotlib is made for one, and opens its fonts in each


def _draw_confusion(summary: dict[str, Any], path: Path) -> Path:
    from matplotlib.figure import Figure

    names, confusion = summary["classes"], summary["test"]["confusion"]
    shares = [[count / max(1, sum(line)) for count in line] for line in confusion]
    figure = Figure(figsize=(7, 6.2), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i, line in enumerate(confusion):
        for j, count in enumerate(line):
            axes.text(j, i, str(count), ha="center", va="center", color="white" if shares[i][j] > 0.5 else "black")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    test, dataset = summary["test"], summary["data"]["dataset"]
    axes.set_title(f"{summary['run_id']} on {dataset} test: {_percent(test['accuracy'])} % of {test['images']}")
    figure.savefig(path, dpi=110)
    return path


def trial_rows(trials: list[Trial], epochs: int) -> list[dict[str, str]]:
    """A sweep's trials as text, the best first; accuracies in %."""
    best = best_of(trials)
    first = best.number if best else 0
    ordered = sorted(trials, key=lambda trial: (trial.number == first, trial.rank), reverse=True)
    return [
        {
            "trial": str(trial.number),
            "state": trial.state,
            "epoch": f"{trial.epoch}/{epochs}",
            "val": _percent(trial.best),
            "min": f"{trial.seconds / 60:.1f}",
            **{key: value if isinstance(value, str) else f"{value}" for key, value in trial.point.items()},
        }
        for trial in ordered
    ]


def progress(trials: list[Trial], about: dict[str, Any], spent: float, running: bool) -> str:
    """How far a sweep is, the best so far, and the time that is left. `about`: sweep.json."""
    budget, ended, best = about["budget"], [trial for trial in trials if trial.state != RUNNING], best_of(trials)
    parts = [f"{len(ended)} of {budget['trials']} trials ended"]
    if best is not None:
        parts.append(f"best so far {_percent(best.best)} % (trial {best.number})")
    epochs = sum(trial.epoch for trial in trials)
    parts.append(f"{epochs} epochs, {spent / 60:.1f} min")
    if not running:
        parts.append(f"no process works on it; `fer sweep {about['name']}` goes on")
    elif len(ended) >= budget["trials"]:
        parts.append("the search is over: best and base are trained with other seeds")
    elif epochs:
        left = spent / epochs * max(0, _epochs_of_all(about) - epochs)
        limit = None if budget["hours"] is None else max(0.0, budget["hours"] * 3600 - spent)
        parts.append(f"about {left / 60:.0f} min left" + (f", {limit / 60:.0f} at most" if limit is not None else ""))
    return "; ".join(parts)


def _epochs_of_all(about: dict[str, Any]) -> int:
    """With asha and halving most trials wait until the search ends, so it is epochs that tell how far it is."""
    reduction, epochs = about["reduction"], about["epochs"]
    rungs = rungs_of(about["grace_epochs"], reduction, epochs) if about["scheduler"] in PROMOTING else []
    return expected_epochs(rungs, reduction, about["budget"]["trials"], epochs)


def sweep_line(result: dict[str, Any]) -> str:
    """Where an experiment comes from."""
    found, best = result["confirmed"], result["best"]
    if found is None:
        return f"sweep {result['sweep']}, trial {best['number']}: val {_percent(best['val_accuracy'])} %, not confirmed"
    return (
        f"sweep {result['sweep']}, trial {best['number']}: val {_mean(found['best'])} %, "
        f"{result['base']} {_mean(found['base'])} % ({len(result['seeds'])} seeds)"
    )


def sweep_note(result: dict[str, Any]) -> str:
    """What a sweep found, as Markdown."""
    best, states, first = result["best"], result["states"], result["first"]
    stopped = f" when it was stopped after epoch {first['epoch']}" if first["epoch"] < first["epochs"] else ""
    share = 100 * result["epochs"] / result["epochs_of_all"]
    counts = ", ".join(f"{count} {state}" for state, count in states.items() if count)
    lines = [
        f"{result['trials']} trials ({counts}) in {result['minutes']:.1f} min, {result['epochs']} of "
        f"{result['epochs_of_all']} epochs ({share:.0f} %).",
        f"Best: trial {best['number']}, **{_percent(best['val_accuracy'])} %** on val; {result['base']} as it is, "
        f"trial 1: {_percent(first['val_accuracy'])} %{stopped}. Both with the seed of the search.",
    ]
    found = result["confirmed"]
    if found:
        ours, base, pair = found["best"], found["base"], found["difference"]
        lines.append(
            f"With {len(result['seeds'])} other seeds: best {_mean(ours)} %, {result['base']} {_mean(base)} %, "
            f"difference of pairs **{_mean(pair)}** points (mean +- standard deviation, val)."
        )
    elif best["number"] == 1:
        lines.append(f"Nothing is better than {result['base']} as it is.")
    if result.get("importance"):
        ranked = ", ".join(f"{key} {100 * share:.0f} %" for key, share in result["importance"].items())
        lines.append(f"Importance for a trial's rank: {ranked}.")
    lines.append("Settings: " + ", ".join(f"{key} {value}" for key, value in best["point"].items()) + ".")
    return "\n\n".join(lines)


def _mean(values: dict[str, Any]) -> str:
    return f"{100 * values['mean']:.2f} +- {100 * values['sd']:.2f}"
