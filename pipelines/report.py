"""Finished runs and sweeps as tables, notes and plots, for the terminal, Prefect and MLflow."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fer.checkpoint import load_meta
from fer.errors import UserError
from fer.made_by import source_hash
from fer.run_folder import LAST, data_name, read_summary
from pipelines.sweeps.folder import RUNNING, Trial, best_of

COLUMNS = ("run", "val", "test", "unleaked", "exact", "unseen", "UAR", "F1", "ECE", "params", "epoch", "min")
LEGEND = (
    "Accuracy in %: val (chose the epoch, and the shares of an ensemble), test (read once), unleaked (test images of "
    "which neither train nor val holds a copy or a near duplicate), exact (without exact copies alone), "
    "unseen (without exact copies of training images alone); published numbers are on all of test, copies included. "
    "UAR: mean recall of the classes; "
    "F1: macro; ECE: calibration error; epoch: best / all; min: minutes of training. "
    "*: the code in fer/ has changed since."
)


FOLDS_LEGEND = (
    "Accuracy in %: test, each image by the fold that did not train on it; mean +- standard deviation over folds and "
    "over subjects; val: mean over folds."
)


def summaries(folders: Iterable[Path], damaged: list[str] | None = None) -> list[dict[str, Any]]:
    """summary.json of every finished run in `folders`, the best val accuracy first.

    Lines on summaries that cannot be read go to `damaged`; without it the first one raises UserError.
    """
    found = []
    for folder in folders:
        try:
            found.append(read_summary(folder))
        except UserError as error:
            if damaged is None:
                raise
            damaged += error.lines
    return sorted(filter(None, found), key=lambda summary: -summary["val"]["accuracy"])


def row(summary: dict[str, Any]) -> dict[str, str]:
    """A run as text, by COLUMNS; accuracies in %."""
    test = summary["test"]
    cells = (
        summary["run_id"] + ("*" if differs(summary) else ""),
        _percent(summary["val"]["accuracy"]),
        _percent(test["accuracy"]),
        _percent(summary.get("test_unleaked", {}).get("accuracy")),  # earlier versions do not have it
        _percent(summary.get("test_unleaked_exact", {}).get("accuracy")),  # nor has format 1 this
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
    """Whether the run was trained or evaluated by other code in fer/ than the current one, if in part, or unknown."""
    mixed = "before" in summary.get("trained_by", {})
    return mixed or any(summary.get(key, {}).get("fer") != source_hash() for key in ("trained_by", "made_by"))


def other_code(folder: Path) -> str:
    """What to know of a run that other code in fer/ than there is now trained, at least in part; "" if none did."""
    last = folder / LAST
    try:
        summary = read_summary(folder)
        if summary is None and not last.exists():
            return ""
        made = load_meta(last).get("made_by", {}) if summary is None else summary.get("trained_by", {})
    except UserError:  # of a damaged file, which the run itself tells of
        return ""
    if made.get("fer") == source_hash() and "before" not in made:
        return ""
    what = "goes on from a checkpoint" if summary is None else "was trained"
    return f"{what}, at least in part, by other code in fer/ than there is now; delete {folder} to train it anew"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def note(summary: dict[str, Any]) -> str:
    """The result of a run in a few sentences, as Markdown."""
    test, data = summary["test"], summary["data"]
    unleaked = summary.get("test_unleaked", summary["test_unleaked_exact"])
    double = "a copy or a near duplicate" if "test_unleaked" in summary else "a copy"  # of an earlier version
    labels = ", ".join(str(data[key]) for key in ("label_source", "label_mode") if key in data)
    made, networks = summary.get("trained_by", {}), summary.get("members")  # the latter of an ensemble alone
    chose = f"which chose epoch {summary['best_epoch']} of {summary['epochs']}"
    if networks:
        chose = f"to which temperatures and shares of the {networks} networks were fitted"
    return (
        f"**{_percent(test['accuracy'])} %** of {test['images']} test images, "
        f"**{_percent(unleaked.get('accuracy'))} %** of the {unleaked['images']} "
        f"of which neither train nor val holds {double}; "
        f"{_percent(summary['val']['accuracy'])} % of {summary['val']['images']} val images, {chose}.\n\n"
        f"Data: {data_name(data)} ({labels}), {_images(data)}, hash {summary['data_hash']}. "
        f"Metrics in `final/` are those of the best epoch; the others are curves. "
        f"Code: commit {made.get('commit', 'unknown')}{' (with changes)' if made.get('changed') is True else ''}."
    )


def folds_row(result: dict[str, Any]) -> dict[str, str]:
    """The sum of folds as text; accuracies in %."""
    people = result["over_subjects"]
    return {
        "folds": result["id"],
        "images": str(result["test"]["images"]),
        "test": _percent(result["test"]["accuracy"]),
        "over folds": _mean(result["over_folds"]["accuracy"]),
        "over subjects": _mean(people) if people else "-",
        "UAR": _percent(result["test"]["balanced_accuracy"]),
        "F1": _percent(result["test"]["macro_f1"]),
        "val": _mean(result["val_accuracy"]),
        "min": f"{result['train_seconds'] / 60:.1f}",
    }


def folds_note(result: dict[str, Any]) -> str:
    """The sum of folds in a sentence, as Markdown."""
    return (
        f"**{_percent(result['test']['accuracy'])} %** of {result['test']['images']} images, each predicted by the one "
        f"of {len(result['runs'])} folds that did not train on it; {_mean(result['over_folds']['accuracy'])} % over "
        "folds (mean +- standard deviation)."
    )


def across_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """A run on another data set, class by class, as text: first all, then each shared class; in %."""
    every, some = result["all_classes"], result["shared_classes"]
    theirs = {ours: [name for name, own in result["matched"].items() if own == ours] for ours in some["classes"]}
    counts = dict(zip(every["classes"], map(sum, every["confusion"])))
    recalls = dict(zip(every["classes"], every["recall"]))
    rows = [("accuracy", "", result["images"], every["accuracy"], some["accuracy"])]
    rows += [("UAR", "", result["images"], every["balanced_accuracy"], some["balanced_accuracy"])]
    rows += [
        (f"recall {name}", " or ".join(theirs[name]), counts[name], recalls[name], recall)
        for name, recall in zip(some["classes"], some["recall"])
    ]
    choices = f"% among all {len(every['classes'])}", f"% among {len(some['classes'])} shared"
    head = ("", f"in {result['dataset']}", "images", *choices)
    return [dict(zip(head, (row[0], row[1], str(row[2]), _percent(row[3]), _percent(row[4])))) for row in rows]


def across_note(result: dict[str, Any]) -> str:
    """What a run was evaluated on, and what was left out, in a few sentences."""
    left_out = ", ".join(f"{name} ({count} images)" for name, count in result["left_out"].items())
    return (
        f"{result['images']} of {result['test_images']} test images of {result['dataset']} "
        f"({_percent(result['coverage'])} %) are of a class that the run knows"
        + (f"; without a partner: {left_out}" if left_out else "")
        + ("; classes that only the run has: " + ", ".join(result["unused"]) if result["unused"] else "")
        + "."
    )


def _images(data: dict[str, Any]) -> str:
    """`96x96 images, upscaled by lanczos x2`."""
    side = "x".join(map(str, data["image_shape"][:2]))
    made = data.get("super_resolution", {})
    known = made.get("method", "none") != "none"
    return f"{side} images" + (f", upscaled by {made['method']} x{made['scale']}" if known else "")


def confusion_picture(summary: dict[str, Any], path: Path) -> Path:
    """Plot the test confusion matrix: counts, coloured by their share of the true class."""
    from matplotlib.figure import Figure

    names, confusion = summary["classes"], summary["test"]["confusion"]
    shares = [[count / max(1, sum(line)) for count in line] for line in confusion]
    figure = Figure(figsize=(7, 6.2), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i, line in enumerate(confusion):
        for j, count in enumerate(line):
            axes.text(j, i, str(count), ha="center", va="center", color="white" if shares[i][j] > 0.5 else "black")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    test, dataset = summary["test"], data_name(summary["data"])
    axes.set_title(f"{summary['run_id']} on {dataset} test: {_percent(test['accuracy'])} % of {test['images']}")
    figure.savefig(path, dpi=110)
    return path


def trial_rows(trials: list[Trial], epochs: int) -> list[dict[str, str]]:
    """The trials of a sweep as text, the best first; accuracies in %."""
    best = best_of(trials)
    first = best.number if best else 0
    ordered = sorted(trials, key=lambda trial: (trial.number == first, trial.rank), reverse=True)
    keys = dict.fromkeys(key for trial in trials for key in trial.point)
    return [
        {
            "trial": str(trial.number),
            "state": trial.state,
            "epoch": f"{trial.epoch}/{epochs}",
            "val": _percent(trial.best),
            "min": f"{trial.seconds / 60:.1f}",
            **{key: _shown(trial.point[key]) if key in trial.point else "" for key in keys},
        }
        for trial in ordered
    ]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def progress(trials: list[Trial], about: dict[str, Any], running: bool) -> str:
    """How far a sweep is, and the best trial so far. `about`: sweep.json."""
    ended, best = [trial for trial in trials if trial.state != RUNNING], best_of(trials)
    wanted = about.get("wanted", about["budget"]["trials"])  # earlier versions do not have it
    parts = [f"{len(ended)} of {wanted} trials finished"]
    if running and len(ended) >= wanted:
        parts[0] += ", confirming the best"
    if best is not None:
        parts.append(f"best so far {_percent(best.best)} % (trial {best.number})")
    minutes = sum(trial.seconds for trial in trials) / 60
    parts.append(f"{sum(trial.epoch for trial in trials)} epochs, {minutes:.1f} min of training")
    if not running:
        parts.append(f"not running; `fer sweep {about['name']}` resumes it")
    return "; ".join(parts)


def sweep_line(result: dict[str, Any]) -> str:
    """A line on the best trial of a sweep, for the experiment made from it."""
    found, best = result["confirmed"], result["best"]
    which = f"Trial {best['number']} of sweep {result['sweep']}. Own score: val"
    if found is None:
        return f"{which} {_percent(best['val_accuracy'])} %, not confirmed"
    return f"{which} {_mean(found['best'])} %, {result['base']} {_mean(found['base'])} % ({_seeds(result)})"


def sweep_note(result: dict[str, Any]) -> str:
    """The result of a sweep, as Markdown."""
    best, states, first = result["best"], result["states"], result["first"]
    how = "before it failed" if first.get("failed") else f"when stopped after epoch {first['epoch']}"
    stopped = f" {how}" if first["epoch"] < first["epochs"] else ""
    base = f"{_percent(first['val_accuracy'])} %{stopped}" if first["epoch"] else "no whole epoch of it"
    share = 100 * result["epochs"] / result["epochs_of_all"]
    counts = ", ".join(f"{count} {state}" for state, count in states.items() if count)
    lines = [
        f"{result['trials']} trials ({counts}), {result['minutes']:.1f} min of training, {result['epochs']} of "
        f"{result['epochs_of_all']} epochs ({share:.0f} %).",
        f"Best: trial {best['number']}, **{_percent(best['val_accuracy'])} %** on val; {result['base']} unchanged: "
        f"{base}. Both with the seed of {result['base']}.",
    ]
    found = result["confirmed"]
    if found:
        ours, base, pair = found["best"], found["base"], found["difference"]
        meaning = "val" if pair["sd"] is None else "mean +- standard deviation, val"
        lines.append(
            f"With {_seeds(result, 'other ')}: best {_mean(ours)} %, {result['base']} {_mean(base)} %, "
            f"paired difference **{_mean(pair)}** points ({meaning})."
        )
    elif best["number"] == 1:
        lines.append(f"Nothing is better than {result['base']} unchanged.")
    if result.get("diverged"):
        lines.append(f"Left out, as best or base came to no number there: {'; '.join(result['diverged'])}.")
    if result.get("importance"):
        ranked = ", ".join(f"{key} {100 * share:.0f} %" for key, share in result["importance"].items())
        lines.append(f"Importance for the rank of a trial: {ranked}.")
    lines.append("Settings: " + ", ".join(f"{key} {_shown(value)}" for key, value in best["point"].items()) + ".")
    return "\n\n".join(lines)


def _seeds(result: dict[str, Any], which: str = "") -> str:
    count = len(result["seeds"])
    return f"{count} {which}seed{'s' if count > 1 else ''}"


def _mean(values: dict[str, Any]) -> str:
    spread = "" if values["sd"] is None else f" +- {100 * values['sd']:.2f}"  # None: of one seed
    return f"{100 * values['mean']:.2f}{spread}"
