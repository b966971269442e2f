"""`fer evaluate`, `fer ensemble` and `fer compare`; the tables of runs that other commands print, too."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from fer.errors import UserError
from fer.files import held, write_bytes
from fer.run_folder import data_name, read_summary
from pipelines.commands.terminal import (
    RUNS,
    bold,
    check_target,
    console,
    data_of,
    doing,
    find_model,
    find_run,
    find_runs,
    percents,
    print_rows,
    with_torch,
)

EVEN = 0.5, 1.0  # of `fer predict`: what is told of a run


@with_torch
def evaluate(
    run: Annotated[
        str, typer.Argument(help="A run id, or its first characters; with --on also the folder of a checkpoint.")
    ],
    on: Annotated[
        str | None, typer.Option(metavar="NAME|FOLDER", help="Another data set, here or prepared by another project.")
    ] = None,
) -> None:
    """Show a finished run's results on val and test, class by class; with --on, on the test split of other data."""
    if on is None:
        _evaluate(run)
    else:
        _evaluate_on(run, on)


def _evaluate(run: str) -> None:
    from fer.data.dataset import open_data
    from fer.evaluate import evaluate as evaluate_run
    from fer.evaluate import evened, outdated
    from pipelines.params import load

    folder = find_run(run)
    before, data = read_summary(folder), data_of(folder)
    if before is not None and (again := outdated(before, open_data(data))):
        console.print(f"{folder.name}: {again}", style="yellow")
    with held(folder), doing(f"Evaluating {folder.name}"):
        summary = evaluate_run(folder, data, load().resources)
    print_table([summary])
    rows, confusion = [], summary["test"]["confusion"]
    for index, name in enumerate(summary["classes"]):
        line, recall = confusion[index], summary["test"]["recall"][index]
        wrong = max((count, other) for other, count in enumerate(line) if other != index)
        taken = f"{summary['classes'][wrong[1]]} ({wrong[0]})" if wrong[0] else "-"
        rows.append((name, str(sum(line)), "-" if recall is None else f"{100 * recall:.1f}", taken))
    print_rows(("class", "test images", "recall %", "most often mistaken for"), rows, "Test, class by class")
    for power in EVEN:
        if found := evened(folder, summary, power):
            told = f"accuracy {100 * found['accuracy']:.2f} %, UAR {100 * found['balanced_accuracy']:.2f} %"
            console.print(f"Test with --even {power:g} of fer predict: {told}", highlight=False)
    console.print(f"Predictions, confusion matrix, checkpoint: {bold(folder)}")


def _evaluate_on(run: str, on: str) -> None:
    from fer.across import evaluate_across, result_of
    from pipelines import data_sets, report
    from pipelines.params import load

    folder, params = find_model(run), load()
    is_folder = on not in params.data and Path(on).is_dir()
    other = Path(on) if is_folder else data_sets.folder_of(params, on, "--on")
    with held(folder):
        with doing(f"Evaluating {folder.name} on {on}"):
            result = evaluate_across(folder, other, params.resources.device)
        rows = report.across_rows(result)
        head = f"{folder.name} on {result['dataset']}", *list(rows[0])[1:]
        print_rows(head, (row.values() for row in rows))
        console.print(report.across_note(result), highlight=False, markup=False)
        path = result_of(folder, result["dataset"], result["hash"])
        console.print(f"Predictions, confusion matrices: {bold(path.with_suffix('.*'))}")
        if folder.resolve().parent != RUNS.resolve():
            console.print(f"Not recorded in MLflow: {folder} is no run of this project", style="dim", highlight=False)
            return
        with doing("Recording it in MLflow"):
            from pipelines.tracking import Tracker

            tracker = Tracker(params.tracking.uri, params.tracking.experiment)
            tracker.record_across(folder, result, [path, path.with_suffix(".csv")])


@with_torch
def ensemble(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run ids, or the start of several ids.")],
    mirror: Annotated[bool, typer.Option("--mirror", help="Each network also sees the mirrored face.")] = False,
) -> None:
    """Average finished runs into one, which is evaluated, recorded and registered like any other.

    Its shares of the networks are fitted on val.
    """
    from fer.ensemble import combine
    from fer.evaluate import evaluate
    from pipelines.params import load

    chosen = [folder for word in runs for folder in find_runs(word)]
    if twice := {folder.name for folder in chosen if chosen.count(folder) > 1}:
        raise UserError(f"{', '.join(sorted(twice))}: named twice; give more of the other ids")
    params = load()
    with doing(f"Averaging {', '.join(folder.name for folder in chosen)} ..."):
        folder = combine(chosen, data_of(chosen[0]), params.resources, mirror)
        for one in chosen:
            evaluate(one, data_of(one), params.resources)  # again, if test has changed since
    _record_made(folder, params)
    found = [summary for one in (*chosen, folder) if (summary := read_summary(one)) is not None]
    print_table(found)


def _record_made(folder: Path, params: Any) -> None:
    """Record a run in MLflow that was made in one go, not trained."""
    from fer.data.dataset import open_data
    from fer.formats import read_run
    from fer.run_folder import CONFIG, read_config
    from pipelines.experiments import Job

    with doing("Recording and registering it"):
        from pipelines.tracking import Tracker, described

        tracker = Tracker(params.tracking.uri, params.tracking.experiment, params.tracking.promotion)
        if tracker.recorded(folder):
            return
        content, data = read_config(folder), open_data(data_of(folder))
        run = read_run(content, folder / CONFIG)
        job = Job(content["name"], run, params.resources, data.folder, folder, content["start"])
        with tracker.record(job, described(data)):
            pass


@with_torch
def compare(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN]...",
            help="Run ids, or the start of several ids that differ in their seed alone; all if none.",
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write all of it, with charts, as one page of HTML.")
    ] = None,
) -> None:
    """Compare finished runs on the same test images, with intervals and tests; without names, list all of them."""
    if runs:
        _compare_pairs(runs, report)
    elif report:
        raise UserError(f"--report {report}: name the runs to compare, `fer compare RUN RUN --report {report}`")
    else:
        _compare_all()


def _compare_pairs(words: list[str], report: Path | None) -> None:
    from fer.data.dataset import open_data
    from pipelines import comparison, page

    if report is not None:
        check_target("--report", report, (".html", ".htm"))
        if len(words) > len(page.COLOURS):
            few = f"a page shows {len(page.COLOURS)} sides at most, each in a colour of its own"
            raise UserError(f"--report {report}: {few}; name fewer than {len(words)}")
    sides = [comparison.side(word, RUNS) for word in words]
    comparison.refuse_apart(sides)
    print_table([summary for side in sides for summary in side.summaries])
    try:
        data = open_data(data_of(sides[0].folders[0]))
    except UserError as error:
        data = None
        console.print(f"Copies of a photograph count as images of their own: {error}", style="yellow")
    with console.status("Comparing"):
        found = [side.scores() for side in sides]
    scores = ((side.name, *(f"{value:.4f}" for value in values.values())) for side, values in zip(sides, found))
    print_rows(("mean over seeds", *found[0]), scores)
    recalls = zip(sides[0].classes, *(map(percents, side.recalls()) for side in sides))
    print_rows(("recall %, 95 %", *(side.name for side in sides)), recalls)
    with console.status("Comparing"):
        pairs = comparison.pairs(sides, data)
    if pairs:
        _print_pairs(pairs)
    if report is not None:
        write_bytes(report, page.compared(sides, pairs).encode())
        console.print(bold(report), soft_wrap=True)
        _attach(report, [folder for side in sides for folder in side.folders])


def _attach(page: Path, folders: list[Path]) -> None:
    """Log a page to the runs that it compares, in MLflow."""
    from pipelines.params import load
    from pipelines.store import is_missing, tracking_uri

    tracking = load().tracking
    if is_missing(tracking_uri(tracking.uri)):
        return
    try:
        with doing("Logging it to the runs in MLflow"):
            from pipelines.tracking import Tracker

            known = Tracker(tracking.uri, tracking.experiment).attach(page, folders)
    except UserError as error:  # the page is there, whatever becomes of its copy
        console.print(f"Not logged to the runs in MLflow: {error}", style="yellow", highlight=False)
        return
    console.print(
        f"MLflow: artifact compare/{page.name} of {known} of {len(folders)} runs",
        style="dim", highlight=False, markup=False,
    )  # fmt: skip


def _print_pairs(pairs: list[Any]) -> None:
    from pipelines.comparison import verdicts

    rows = []
    for pair in pairs:
        p = "-" if pair.p is None else f"{pair.p:.2g} ({pair.test})"
        balanced_p = "-" if pair.balanced_p is None else f"{pair.balanced_p:.2g}"
        gaps = (percents(gap, sign="+") for gap in (pair.accuracy, pair.balanced_accuracy))
        rows.append((f"{pair.one.name} - {pair.other.name}", *gaps, f"{100 * pair.differing:.1f} %", p, balanced_p))
    print_rows(("difference, 95 %", "accuracy", "UAR", "differ on", "p", "p of UAR"), rows)
    for line in verdicts(pairs):
        console.print(line, highlight=False)


def _compare_all() -> None:
    from fer.data.datasets import DATASETS
    from fer.formats import format_of
    from fer.run import FORMAT
    from pipelines import folds, report

    damaged: list[str] = []
    summaries = report.summaries(RUNS.glob("*"), damaged)
    summaries = [summary for summary in summaries if "fold" not in summary["data"]]
    sums = folds.sums(damaged)
    print_folds(sums)
    if not summaries and not damaged and not sums:
        raise UserError(f"{RUNS}: no finished run; train one with `fer train`")
    by_data: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for summary in summaries:
        key = summary["data_hash"], summary.get("test_hash", ""), summary.get("leak_hash", "")
        by_data.setdefault(key, []).append(summary)
    trained_on = [data_hash for data_hash, _, _ in by_data]
    for (data_hash, test_hash, leak_hash), group in by_data.items():
        data = group[0]["data"]
        title = f"{data_name(data)}, {data.get('label_mode', '')} labels, data {data_hash}"
        if trained_on.count(data_hash) > 1:
            title += f", test split {test_hash}, leaks {leak_hash}; `fer evaluate RUN` takes the present ones"
        print_table(group, title=title + ("" if format_of(group[0]) == FORMAT else f", format {format_of(group[0])}"))
        row = DATASETS.get(data["dataset"])
        if row is not None and row.published:
            title = f"Published on this data set ({row.protocol})"
            published = ((name, f"{accuracy:.2f}", start) for name, accuracy, start in row.published)
            print_rows(("published", "test accuracy", "starts from"), published, title)
    if damaged:
        raise UserError(*damaged)


def print_table(summaries: list[dict[str, Any]], title: str | None = None) -> None:
    """A row for each finished run."""
    from pipelines import report

    print_rows(report.COLUMNS, (report.row(summary).values() for summary in summaries), title)
    console.print(report.LEGEND, style="dim")


def print_folds(sums: list[dict[str, Any]]) -> None:
    """A row for each cross-validation."""
    from pipelines import report

    rows = [report.folds_row(one) for one in sums]
    if rows:
        print_rows(rows[0], (row.values() for row in rows))
        console.print(report.FOLDS_LEGEND, style="dim")


def print_champions(tracker: Any, runs: list[str]) -> None:
    """The champions of the data that the `runs` were trained on, and why which of them did not become one."""
    with tracker.in_one_line():
        for name, tags in tracker.registry.champions().items():
            decided = [record for record in tracker.registry.history(name) if record.run in runs]
            if not decided:
                continue
            run, val = tags.get("fer.run_id", "of another origin"), tags.get("val_accuracy", "")
            with suppress(ValueError):  # as somebody wrote in MLflow
                val = f"{100 * float(val):.2f} %"
            console.print(f"models:/{name}@champion: version {tags['version']}, {run}, val {val or '-'}")
            for record in decided:
                if record.champion != record.version:
                    said = f"{record.run}: version {record.version}, {record.reason}"
                    console.print(said, style="dim", markup=False)
