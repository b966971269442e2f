"""The command `fer`."""

import gc
import importlib
import io
import json
import logging
import os
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial, wraps
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import typer
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.markdown import Markdown
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.spinner import Spinner
from rich.table import Column, Table

from fer.errors import UserError, disk_error, one_line
from fer.files import held, is_held, write_bytes
from fer.run_folder import data_name, named, read_progress, read_rows, read_summary

app = typer.Typer(
    help="Facial-expression-recognition experiments. `dvc repro` prepares the data; experiments/ is what to train.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Go on silently if nobody reads on, as in `fer train NAME | head`; rich would exit."""
        with suppress(SystemExit):
            super().on_broken_pipe()


console = _Console(width=None if sys.stdout.isatty() else 120)
Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[NAME|FILE]... [KEY=VALUE]...", help="Experiments, and settings to change in all of them."),
]
Yunet = Annotated[Path | None, typer.Option(help="YuNet's file; else OpenCV's Haar cascade finds the faces.")]
MinFace = Annotated[
    int, typer.Option(metavar="PIXELS", help="Side of the smallest face to find; larger is faster.", min=0, max=100_000)
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto, cpu or cuda.")]
RUNS = Path("data/runs")
Command = TypeVar("Command", bound=Callable[..., Any])
STARTING = "Starting Prefect, Ray and MLflow ..."


@contextmanager
def _doing(what: str) -> Iterator[None]:
    """Say what takes seconds: in a moving line on a terminal, elsewhere in one line at the start."""
    if console.is_terminal:
        with console.status(what):
            yield
    else:
        console.print(what, style="dim", highlight=False)
        yield


def _with_torch(command: Command) -> Command:
    """A command that needs torch, whose import takes seconds: on a terminal something moves meanwhile."""

    @wraps(command)
    def imported(*words: Any, **named: Any) -> Any:
        with console.status("Starting"):
            importlib.import_module("fer.evaluate")
        return command(*words, **named)

    return cast("Command", imported)


def _version(wanted: bool) -> None:
    if wanted:
        console.print(f"fer {version('fer-pipeline')}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    wanted: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


class _RunByDefault(typer.core.TyperGroup):
    """`fer sweep NAME` is `fer sweep run NAME`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = not args or args[0] in self.commands or args[0] == "--help"
        return super().parse_args(ctx, args if named else ["run", *args])


sweeps = typer.Typer(
    cls=_RunByDefault,
    no_args_is_help=True,
    help="Search for better settings of an experiment: `fer sweep NAME` runs sweeps/NAME.yaml.",
)
app.add_typer(sweeps, name="sweep")
checks = typer.Typer(no_args_is_help=True, help="Look at the data that `dvc repro` has made.")
app.add_typer(checks, name="data")


@app.command()
@_with_torch
def train(
    words: Words = None,
    every: Annotated[bool, typer.Option("--all", help="All experiments in experiments/.")] = False,
    folds: Annotated[
        str | None,
        typer.Option(metavar="K|subjects", help="Cross-validate: in K folds, or leave one subject out at a time."),
    ] = None,
) -> None:
    """Train and evaluate experiments in parallel, record them in MLflow and register their models.

    Without a name, list the experiments.
    """
    words = _named(words, every)
    if not words:
        return
    _check(words)  # before the frameworks, which take seconds to import
    from pipelines.guard import guarded

    if folds is not None:
        from fer.data.folds import parsed

        parsed(folds)
    with guarded():
        _train(words, folds)


def _train(words: list[str], folds: str | None) -> None:
    with _doing(STARTING):
        flow = _start_frameworks()
        from pipelines import report
        from pipelines.folds import added

        jobs, tracker = flow.prepare(words, folds)
    folders, failed = [job.folder for job in jobs.values()], {}
    if all(flow.recorded(job, tracker) for job in jobs.values()) and (
        folds is None or flow.sums_recorded(jobs, tracker)
    ):
        console.print(f"Nothing to do: {len(folders)} run(s) are finished and recorded.")
    else:
        _warn_of_random_weights({name: job.run for name, job in jobs.items()})
        with _Bars(folders), flow.flow_page.server_needed():
            state = flow.train(words, folds, return_state=True)
        failed = _failures(state)
    ended = [job.folder for name, job in jobs.items() if name not in failed]
    if folds is not None and "flow" not in failed:
        _print_folds([added(made) for made in flow.of_one(jobs, failed)])
    elif "flow" not in failed and (found := report.summaries(ended)):
        _print_table(found)
        _print_champions(tracker, [folder.name for folder in ended])
    if failed:
        raise _first_failure(failed)
    console.print("Look closer: [bold]fer ui[/] (MLflow and Prefect), [bold]fer evaluate RUN[/], [bold]fer compare[/].")


def _start_frameworks() -> Any:
    """The module `pipelines.flow`, whose frameworks take seconds to import."""
    # the bars and the table show it better; Prefect's UI has the whole log
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    # if its server dies, our own line says so; Prefect would say it for each event and batch of its log
    os.environ.setdefault("PREFECT_LOGGING_INTERNAL_LEVEL", "CRITICAL")
    logging.raiseExceptions = False
    with one_line("Prefect, Ray or MLflow does not start", "correct its variables (PREFECT_..., RAY_..., MLFLOW_...)"):
        return importlib.import_module("pipelines.flow")


def _named(words: list[str] | None, every: bool) -> list[str]:
    """`words`, with the names of all experiments if `every`; [] if none is named, after printing a list of them."""
    from pipelines import experiments

    names, changes = experiments.split(words or [])
    if not names and not experiments.known():
        raise UserError(f"{experiments.FOLDER}: no experiments there; run the command in the project's root folder")
    if every:
        return [*experiments.known(), *(name for name in names if name not in experiments.known()), *changes]
    if names:
        return [*names, *changes]
    if changes:
        raise UserError(f"{changes[0]}: name the experiment it is for, one of {', '.join(experiments.known())}")
    _print_experiments()
    return []


def _check(words: list[str]) -> dict[str, Any]:
    """The experiments named in `words`. Raises UserError with all mistakes in them and in params.yaml."""
    from pipelines import experiments
    from pipelines.params import load, machine

    return experiments.load(words, machine(load()))


def _print_experiments() -> None:
    from pipelines import experiments

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("experiment", no_wrap=True)
    table.add_column("what it is")
    for name in experiments.known():
        table.add_row(name, experiments.head(experiments.path_of(name)).partition("\n")[0])
    console.print(table)
    console.print("Train: [bold]fer train NAME... [KEY=VALUE]...[/]; all settings: [bold]fer config NAME[/].")


@app.command()
@_with_torch
def config(words: Words = None) -> None:
    """Show every setting of an experiment: its value, where it comes from, and its meaning."""
    from pipelines import experiments

    words = _named(words, every=False)
    names = [experiments.path_of(name).stem for name in experiments.split(words)[0]]
    for name, found in (_check(words) if words else {}).items():
        if name in names:
            _print_settings(found)


def _print_settings(found: Any) -> None:
    from pipelines import experiments

    if found.head:
        console.print(found.head, highlight=False, markup=False)
    table = Table(title=found.name, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for column in ("setting", "value", "from"):
        table.add_column(column, overflow="fold")
    table.add_column("meaning", style="dim", ratio=1)
    for path, value, source, meaning in experiments.values(found):
        own = source != experiments.DEFAULT
        shown = json.dumps(value) if value is None or isinstance(value, bool | list) else str(value)
        table.add_row(path, escape(shown), source if own else "", escape(meaning), style="bold" if own else "")
    console.print(table)
    for line in found.dropped:
        console.print(f"dropped: {line}", style="yellow", highlight=False)


@app.command()
@_with_torch
def evaluate(
    run: Annotated[str, typer.Argument(help="A run id, or its first characters.")],
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
    from fer.evaluate import outdated
    from pipelines.params import load

    folder = _find(run)
    before, data = read_summary(folder), _data_of(folder)
    if before is not None and (again := outdated(before, open_data(data))):
        console.print(f"{folder.name}: {again}", style="yellow")
    with _doing(f"Evaluating {folder.name}"):
        summary = evaluate_run(folder, data, load().resources)
    _print_table([summary])
    table = Table("class", "test images", "recall %", "most often mistaken for", title="Test, class by class")
    confusion = summary["test"]["confusion"]
    for index, name in enumerate(summary["classes"]):
        line, recall = confusion[index], summary["test"]["recall"][index]
        wrong = max((count, other) for other, count in enumerate(line) if other != index)
        taken = f"{summary['classes'][wrong[1]]} ({wrong[0]})" if wrong[0] else "-"
        table.add_row(name, str(sum(line)), "-" if recall is None else f"{100 * recall:.1f}", taken)
    console.print(table)
    console.print(f"Predictions, confusion matrix, checkpoint: [bold]{folder}[/]")


def _data_of(folder: Path) -> Path:
    """The folder of the data set that a run was trained on."""
    from fer.run_folder import read_config
    from pipelines.data_sets import folder_of_run
    from pipelines.params import load

    return folder_of_run(load(), read_config(folder)["data"])


def _evaluate_on(run: str, on: str) -> None:
    from fer.across import evaluate_across, result_of
    from pipelines import data_sets, report
    from pipelines.params import load

    folder, params = _find(run), load()
    other = Path(on) if Path(on).is_dir() else data_sets.folder_of(params, on, "--on")
    with held(folder):
        with _doing(f"Evaluating {folder.name} on {on}"):
            result = evaluate_across(folder, other, params.resources.device)
        rows = report.across_rows(result)
        table = _table(f"{folder.name} on {result['dataset']}", *list(rows[0])[1:])
        for row in rows:
            table.add_row(*row.values())
        console.print(table)
        console.print(report.across_note(result), highlight=False, markup=False)
        path = result_of(folder, result["dataset"], result["hash"])
        console.print(f"Predictions, confusion matrices: [bold]{path.with_suffix('.*')}[/]")
        with _doing("Recording it in MLflow"):
            from pipelines.tracking import Tracker

            tracker = Tracker(params.tracking.uri, params.tracking.experiment)
            tracker.record_across(folder, result, [path, path.with_suffix(".csv")])


@app.command()
@_with_torch
def ensemble(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run ids, or the start of several ids.")],
    mirror: Annotated[bool, typer.Option("--mirror", help="Each network also sees the mirrored face.")] = False,
) -> None:
    """Average finished runs into one, which is evaluated, recorded and registered like any other.

    Its shares of the networks are fitted on val.
    """
    from fer.ensemble import combine
    from pipelines.params import load

    chosen = [folder for word in runs for folder in _find_all(word)]
    if twice := {folder.name for folder in chosen if chosen.count(folder) > 1}:
        raise UserError(f"{', '.join(sorted(twice))}: named twice; give more of the other ids")
    params = load()
    with _doing(f"Averaging {', '.join(folder.name for folder in chosen)} ..."):
        folder = combine(chosen, _data_of(chosen[0]), params.resources, mirror)
    _record_made(folder, params)
    found = [summary for one in (*chosen, folder) if (summary := read_summary(one)) is not None]
    _print_table(found)


def _record_made(folder: Path, params: Any) -> None:
    """Record a run in MLflow that was made in one go, not trained."""
    from fer.data.dataset import open_data
    from fer.formats import read_run
    from fer.run_folder import CONFIG, read_config
    from pipelines.experiments import Job

    with _doing("Recording and registering it"):
        from pipelines.tracking import Tracker

        tracker = Tracker(params.tracking.uri, params.tracking.experiment, params.tracking.promotion)
        if tracker.recorded(folder):
            return
        content, data = read_config(folder), open_data(_data_of(folder))
        run = read_run(content, folder / CONFIG)
        job = Job(content["name"], run, params.resources, data.folder, folder, content["start"])
        with tracker.record(job, {**data.summary, "hash": data.hash}):
            pass


@app.command()
@_with_torch
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
    from pipelines import comparison

    if report is not None:
        _check_target("--report", report, (".html", ".htm"))
    sides = [comparison.side(word, RUNS) for word in words]
    _print_table([summary for side in sides for summary in side.summaries])
    try:
        data = open_data(_data_of(sides[0].folders[0]))
    except UserError as error:
        data = None
        console.print(f"Copies of a photograph count as images of their own: {error}", style="yellow")
    with console.status("Comparing"):
        found = [side.scores() for side in sides]
    scores = _table("mean over seeds", *found[0])
    for side, values in zip(sides, found):
        scores.add_row(side.name, *(f"{value:.4f}" for value in values.values()))
    console.print(scores)
    recalls = _table("recall %, 95 %", *(side.name for side in sides))
    for name, row in zip(sides[0].classes, zip(*(side.recalls() for side in sides))):
        recalls.add_row(name, *(_percents(recall) for recall in row))
    console.print(recalls)
    with console.status("Comparing"):
        pairs = comparison.pairs(sides, data)
    if pairs:
        _print_pairs(pairs)
    if report is not None:
        from pipelines.page import compared

        write_bytes(report, compared(sides, pairs).encode())
        console.print(f"[bold]{report}[/]", soft_wrap=True)
        _attach(report, [folder for side in sides for folder in side.folders])


def _attach(page: Path, folders: list[Path]) -> None:
    """Log a page to the runs that it compares, in MLflow."""
    from pipelines.params import load
    from pipelines.store import is_missing, tracking_uri

    tracking = load().tracking
    if is_missing(tracking_uri(tracking.uri)):
        return
    with _doing("Logging it to the runs in MLflow"):
        from pipelines.tracking import Tracker

        known = Tracker(tracking.uri, tracking.experiment).attach(page, folders)
    console.print(
        f"MLflow: artifact compare/{page.name} of {known} of {len(folders)} runs", style="dim", highlight=False
    )


def _check_target(option: str, path: Path, ends: tuple[str, ...]) -> None:
    """Raises UserError unless `path` is, or can become, a file of its kind: told before the work, which takes long."""
    if path.suffix not in ends:
        raise UserError(f"{option} {path}: name a file that ends in {' or '.join(ends)}")
    if not os.path.isdir(path.parent) or (os.path.lexists(path) and not os.path.isfile(path)):
        raise UserError(f"{option} {path}: name a file in a folder that exists")


def _print_pairs(pairs: list[Any]) -> None:
    from pipelines.comparison import verdicts

    table = _table("difference, 95 %", "accuracy", "UAR", "differ on", "p")
    for pair in pairs:
        p = "-" if pair.p is None else f"{pair.p:.2g} ({pair.test})"
        gaps = (_percents(gap, sign="+") for gap in (pair.accuracy, pair.balanced_accuracy))
        table.add_row(f"{pair.one.name} - {pair.other.name}", *gaps, f"{100 * pair.differing:.1f} %", p)
    console.print(table)
    for line in verdicts(pairs):
        console.print(line, highlight=False)


def _table(first: str, *others: str) -> Table:
    columns = [Column(first, overflow="fold"), *(Column(other, justify="right") for other in others)]
    return Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)


def _percents(found: Any, sign: str = "") -> str:
    return f"{100 * found.value:{sign}.2f} ({100 * found.low:{sign}.2f}, {100 * found.high:{sign}.2f})"


def _compare_all() -> None:
    from fer.data.datasets import DATASETS
    from fer.formats import format_of
    from fer.run import FORMAT
    from pipelines import folds, report

    damaged: list[str] = []
    summaries = report.summaries(RUNS.glob("*"), damaged)
    summaries = [summary for summary in summaries if "fold" not in summary["data"]]
    sums = folds.sums(damaged)
    _print_folds(sums)
    if not summaries and not damaged and not sums:
        raise UserError(f"{RUNS}: no finished run; train one with `fer train`")
    by_data: dict[str, list[dict[str, Any]]] = {}
    for summary in summaries:
        by_data.setdefault(summary["data_hash"], []).append(summary)
    for data_hash, group in by_data.items():
        data = group[0]["data"]
        title = f"{data_name(data)}, {data.get('label_mode', '')} labels, data {data_hash}"
        _print_table(group, title=title + ("" if format_of(group[0]) == FORMAT else f", format {format_of(group[0])}"))
        row = DATASETS.get(data["dataset"])
        if row is not None and row.published:
            title = f"Published on this data set ({row.protocol})"
            table = Table("published", "test accuracy", "starts from", title=title)
            for name, accuracy, start in row.published:
                table.add_row(name, f"{accuracy:.2f}", start)
            console.print(table)
    if damaged:
        raise UserError(*damaged)


@app.command()
@_with_torch
def predict(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Pictures, videos, animations, or folders of them.")
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="A run id, or a checkpoint's folder; the champion by default.")
    ] = None,
    cropped: Annotated[bool, typer.Option("--cropped", help="Every picture is a face, cropped like the data.")] = False,
    boxes: Annotated[
        Path | None, typer.Option(help="Your own boxes: a table with file, left, top, right, bottom.")
    ] = None,
    camera: Annotated[
        str | None, typer.Option(help="A camera instead of files, by number or address, until Ctrl-C.")
    ] = None,
    smooth: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Average each face of a video over so long.", min=0.01)
    ] = None,
    out: Annotated[Path, typer.Option(help="The table to write: .csv or .parquet.")] = Path("predictions.csv"),
    annotated: Annotated[Path | None, typer.Option(help="A folder for the pictures with their faces marked.")] = None,
    yunet: Yunet = None,
    min_face: MinFace = 0,
    margin: Annotated[
        float | None, typer.Option(help="Side of the crop in sides of the face's box.", min=0.1, max=10)
    ] = None,
    device: Device = "auto",
) -> None:
    """Find faces in pictures and videos and predict their expressions."""
    from PIL import Image

    from fer.faces import annotate, detect
    from fer.faces import predict as faces_in
    from fer.faces import smooth as smoothing
    from fer.faces.boxes import Boxes
    from fer.predict import Predictor
    from pipelines import predicting

    _check_target("--out", out, (".csv", ".parquet"))
    finders = {"--cropped": cropped, "--boxes": boxes, "--yunet": yunet}
    predicting.check(paths, camera, finders, {"--min-face": min_face, "--margin": margin})
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # it is read all the same
    with predicting.until_ctrl_c(camera is not None) as stopped:
        files = _files(paths or [])
        predicting.check_written(files, annotated, boxes, out)
        live = None if camera is None else faces_in.camera(camera, stopped)
        own = None if boxes is None else Boxes(boxes, files)
        detector = own or (None if cropped else detect.build_detector(yunet, min_face))
        predictor = Predictor(_model(run), device)
        if annotated is not None:
            annotated.mkdir(parents=True, exist_ok=True)
        if live is not None and not console.is_terminal:
            console.print(f"Reading camera {camera} until Ctrl-C", style="dim", highlight=False)
        with Progress(*_SO_FAR, console=console, transient=True) as bar:
            pictures = _frames(files, bar) if live is None else _counted(live, bar)
            at_once = faces_in.AT_ONCE if live is None else 1
            found = faces_in.predict(predictor, pictures, detector, margin, at_once)
            if smooth is not None:
                found = smoothing.smooth(found, smooth)
            if annotated is not None:
                found = annotate.annotate(found, annotated, predictor.classes)
            rows = (
                one.row(predictor.classes)
                for one in predicting.write(found, predictor.classes, out, smooth is not None)
            )
            counts = Counter(str(row["prediction"] or row["note"]) for row in rows)
    for what, count in counts.most_common():
        console.print(f"{count:6}  {what}", highlight=False, markup=False)
    console.print(f"[bold]{out}[/]")


def _files(paths: list[Path]) -> list[Path]:
    from pipelines import predicting

    files, others = predicting.files(paths) if paths else ([], 0)
    if others:
        console.print(f"{others} file(s) left out: no picture or video by their names", style="yellow")
    if files and not console.is_terminal:
        console.print(f"Reading {len(files)} file(s)", style="dim", highlight=False)
    return files


_SO_FAR = (*Progress.get_default_columns(), TextColumn("{task.fields[news]}"))


def _frames(files: list[Path], bar: Progress) -> Iterator[Any]:
    """The frames of all files; the bar counts files, and how far each is."""
    from fer.faces.predict import frames

    task = bar.add_task("files", total=len(files), news="")
    for place, file in enumerate(files):
        for frame in frames(file):
            bar.update(task, completed=place + frame.number / frame.of, news=f"{place + 1} of {len(files)}")
            yield frame
    bar.update(task, completed=len(files))


def _counted(frames: Iterator[Any], bar: Progress) -> Iterator[Any]:
    task = bar.add_task("camera, until Ctrl-C", total=None, news="")
    for frame in frames:
        bar.update(task, news=f"{frame.number + 1} frames")
        yield frame


def _model(run: str | None) -> Path:
    """The folder of a checkpoint: of the run that is named, else of the champion of the current data set."""
    if run is not None:
        known = any((Path(run) / name).exists() for name in ("checkpoint.json", "best/checkpoint.json"))
        return Path(run) if known else _find(run)
    return _champion()()[0]


def _champion() -> Callable[[], tuple[Path, str]]:
    """A function that looks who is champion of the current data set: the folder of its run, and its version."""
    from pipelines.predicting import checkpoint_of
    from pipelines.store import check_answers

    name, tracker = _registered(None)

    def find() -> tuple[Path, str]:
        check_answers(tracker.uri)
        with tracker.in_one_line():
            champions = tracker.registry.champions()
        return checkpoint_of(champions, name.removeprefix("fer-"), RUNS), champions[name]["version"]

    return find


@app.command()
@_with_torch
def serve(
    run: Annotated[
        str | None, typer.Option(help="A run id, or a checkpoint's folder; without, the champion, whoever that is.")
    ] = None,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.", min=1, max=65535)] = 8080,
    yunet: Yunet = None,
    min_face: MinFace = 0,
    device: Device = "auto",
    batching: Annotated[
        bool, typer.Option("--batching/--no-batching", help="Faces of several requests share a pass.")
    ] = True,
) -> None:
    """Answer for pictures over HTTP, and with a page, on 127.0.0.1 until Ctrl-C."""
    from fer.faces.detect import build_detector
    from pipelines import serving
    from pipelines.answering import Models

    with closing(serving.listen(port)) as listener:
        serving.set_up()
        detector = build_detector(yunet, min_face)
        folder = None if run is None else _model(run)
        find = _champion() if folder is None else lambda: (folder, None)
        models = Models(find, detector, device)
        console.print(f"{models.now.names['run']} answers: http://127.0.0.1:{port}. Ctrl-C stops it.", highlight=False)
        stop = models.follow(partial(console.print, markup=False, highlight=False)) if folder is None else None
        serving.serve(serving.build_app(models, batching), listener)
        if stop is not None:
            stop()
    console.print("Stopped.")


@app.command()
@_with_torch
def explain(
    run: Annotated[str, typer.Argument(help="A run id, or a checkpoint's folder; or `champion`.")],
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Pictures of faces, cropped like the data; else test images.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder to write, which shows the faces.")] = ...,  # type: ignore[assignment]
    faces: Annotated[int, typer.Option(help="How many test images, drawn by --seed.", min=1)] = 8,
    names: Annotated[str | None, typer.Option(help="Names of test images instead, with commas between them.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draw, the random weights and the random orders.", min=0)] = 0,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Draw what predictions rest on, beside the same of random weights, and test whether that says anything."""
    from fer import explain as explaining
    from fer.files import new_folder
    from fer.predict import Predictor
    from pipelines import explaining as writing

    if os.path.lexists(out):
        raise UserError(f"--out {out}: exists already; name another folder")
    if paths and names is not None:
        raise UserError("--names: is for test images; leave it out, or the pictures")
    folder = _model(None if run == "champion" else run)
    predictor = Predictor(folder, device)
    chosen = writing.read(paths, predictor) if paths else _test_faces(folder, faces, names, seed)
    if why := explaining.no_grad_cam(predictor):
        console.print(f"{explaining.OCCLUSION} alone, without {explaining.GRAD_CAM}: {why}", style="yellow")
    with new_folder(out) as partial, Progress(console=console, transient=True) as bar:
        found = explaining.explain(predictor, chosen.pixels, seed)
        shown = bar.track(found, total=len(chosen.names), description="faces")
        verdicts = writing.write(partial, chosen, shown, predictor.classes)
    table = _table(f"mean of {len(chosen.names)}", *writing.CHECKS)
    for verdict in verdicts:
        table.add_row(verdict.method, *map(writing.shown, writing.checks(verdict).values()))
    console.print(table)
    console.print(writing.LEGEND, style="dim", highlight=False)
    for verdict in verdicts:
        console.print(f"{verdict.method}: {verdict.words}", highlight=False)
    console.print(f"[bold]{out}[/] shows faces: mind where you copy it")


def _test_faces(folder: Path, count: int, names: str | None, seed: int) -> Any:
    from fer.run_folder import CONFIG
    from pipelines.explaining import of_test

    if not (folder / CONFIG).exists():
        raise UserError(f"{folder}: is no run's folder, so its test images are unknown; name pictures of faces")
    return of_test(folder, _data_of(folder), count, None if names is None else names.split(","), seed)


@app.command()
@_with_torch
def export(
    run: Annotated[str | None, typer.Argument(help="A run id, or the start of one; the champion by default.")] = None,
    to: Annotated[
        Literal["folder", "onnx"], typer.Option(help="A folder with a model card, or one ONNX file.")
    ] = "folder",
    out: Annotated[Path | None, typer.Option(help="What to write; exports/<run id> or .onnx by default.")] = None,
) -> None:
    """Write a finished run as a folder that `Predictor` loads, or as an ONNX file for other programs."""
    from fer import export as exporting

    folder = _model(None) if run is None else _find(run)
    target = out or Path("exports") / (folder.name if to == "folder" else f"{folder.name}.onnx")
    with _doing(f"Writing {target}"):
        if to == "folder":
            exporting.write_folder(folder, target)
        else:
            worst = exporting.write_onnx(folder, target)
    if to == "onnx":
        console.print(f"Probabilities as torch's for batches of 1, 3 and 7 faces: to {worst:.1g}", highlight=False)
    console.print(f"[bold]{target}[/]")


Dataset = Annotated[
    str | None, typer.Option(help="The data set whose registered model is meant; the first in params.yaml by default.")
]
Reason = Annotated[str, typer.Option(help="Why, for the history.")]


@app.command()
@_with_torch
def promote(
    version: Annotated[str, typer.Argument(help="A version, `challenger`, or a run id or its first characters.")],
    reason: Reason = "",
    dataset: Dataset = None,
) -> None:
    """Make a version of the registered model champion by hand, until a run is better by the rule."""
    name, tracker = _registered(dataset)
    with tracker.in_one_line():
        _print_move(name, tracker.registry.promote(name, version, reason))


@app.command()
@_with_torch
def rollback(reason: Reason = "", dataset: Dataset = None) -> None:
    """Make the champion before this one champion again."""
    name, tracker = _registered(dataset)
    with tracker.in_one_line():
        _print_move(name, tracker.registry.rollback(name, reason))


@app.command()
@_with_torch
def registry(dataset: Dataset = None) -> None:
    """Show the history of the registered model: every decision about its champion, and the evidence."""
    from datetime import datetime

    name, tracker = _registered(dataset)
    with tracker.in_one_line():
        records, aliases = tracker.registry.history(name), tracker.registry.aliases(name)
    columns = [Column(key, no_wrap=True) for key in ("when", "version", "decision", "champion")]
    columns += [Column(key, justify="right", no_wrap=True) for key in ("val %", "test %")]
    table = Table(*columns, Column("why", ratio=1, overflow="fold"), title=name, box=box.SIMPLE_HEAD, padding=(0, 1))
    for record in records:
        moved = "" if record.before == record.champion else f"{record.before or '-'} -> {record.champion or '-'}"
        known = (record.evidence.get(key) for key in ("val_accuracy", "test_accuracy"))
        shares = ("-" if share is None else f"{100 * share:.2f}" for share in known)
        decision = record.outcome if record.what == "run" else record.what
        when = datetime.fromtimestamp(record.when).strftime("%Y-%m-%d %H:%M")
        why = escape(f"{record.run}: {record.reason} ({record.who}, commit {record.commit})")
        table.add_row(when, record.version, decision, moved, *shares, why)
    console.print(table)
    shown = ", ".join(f"{alias} {version}" for alias, version in sorted(aliases.items())) or "none"
    console.print(f"Aliases of models:/{name}: {shown}. Val decides; test is shown beside.", highlight=False)


def _registered(dataset: str | None) -> tuple[str, Any]:
    """The name of a data set's registered model, and the tracker."""
    from pipelines.params import NAME, load
    from pipelines.store import is_missing, tracking_uri

    params = load()
    if dataset is not None and not NAME.fullmatch(dataset):
        raise UserError(f"--dataset {dataset}: should be the name of a data set, as {params.chosen(None)}")
    if is_missing(uri := tracking_uri(params.tracking.uri)):
        raise UserError(f"tracking.uri: {uri}: nothing is recorded there yet; train a run with `fer train`")
    with _doing("Asking MLflow"):
        from pipelines.tracking import Tracker

        tracker = Tracker(params.tracking.uri, params.tracking.experiment, params.tracking.promotion)
    return f"fer-{dataset or params.chosen(None)}", tracker


def _print_move(name: str, record: Any) -> None:
    before = f"version {record.before}" if record.before else "none"
    console.print(f"models:/{name}@champion: version {record.version}, {record.run} (before: {before})")
    console.print(record.reason, style="dim", highlight=False, markup=False)


@app.command()
@_with_torch
def models(words: Words = None) -> None:
    """Show the cost of the experiments' networks and where their weights come from; all without a name."""
    from fer.data.labels import CLASSES
    from fer.models import origin
    from fer.models.cost import cost
    from pipelines import experiments

    names, changes = experiments.split(words or [])
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True)
    table.add_column("experiment", no_wrap=True)
    for column in ("parameters", "trainable", "GFLOP", "input"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("network: its weights")
    missing = []
    for name, found in _check([*(names or experiments.known()), *changes]).items():
        run = found.run
        networks = [backbone.name for backbone in run.model.backbones().values()] or [run.model.name]
        sources = zip(networks, origin(run.model, run.init_from))
        try:
            price = cost(run.model, run.input, len(CLASSES))
            numbers = f"{price.parameters / 1e6:.2f}M", f"{price.trainable / 1e6:.2f}M", f"{price.gflop:.3g}"
        except UserError as error:
            missing += [f"{name}: {line}" for line in error.lines]
            numbers = "-", "-", "-"
        size = f"{run.input.image_size}x{run.input.image_size}x{run.input.channels}"
        table.add_row(name, *numbers, size, "\n".join(f"{network}: {source}" for network, source in sources))
    console.print(table)
    console.print(
        "trainable: parameters that training changes. GFLOP: forward pass of one image, a multiply-add counts as two; "
        "training costs three times that for the trainable part. input: size of the network's input.",
        style="dim",
    )
    if missing:
        raise UserError(*missing)


Prepared = Annotated[str | None, typer.Argument(metavar="[NAME]", help="A data set; the first in params.yaml if none.")]


@app.command()
def upscale_gallery(
    name: Prepared = None,
    faces: Annotated[int, typer.Option(help="How many faces, evenly spaced in the data.", min=1, max=100)] = 6,
) -> None:
    """Draw the same faces enlarged by every super-resolution method whose weights are available."""
    import numpy as np

    from fer.data.charts import contact_sheet
    from fer.data.images import open_images
    from fer.super_resolution.methods import METHODS, build_upscaler
    from pipelines import data_sets
    from pipelines.params import load

    one = data_sets.load(load(), name)
    config, machine = one.recipe.super_resolution, one.machine
    images = open_images(one.folder / "raw" / "images.npy", "download")
    chosen = images[np.unique(np.linspace(0, len(images) - 1, faces).astype(int))]
    rows, left_out = {"as it is": chosen.repeat(4, 1).repeat(4, 2)}, []
    for key, method in METHODS.items():
        if key == "none":
            continue
        scale = max(method.scales or (8,))
        try:
            with console.status(f"{key} x{scale}"):
                upscale = build_upscaler(key, scale, machine.weights, config.hub_id, config.precision, machine.device)
                rows[f"{key} x{scale}"] = upscale(chosen, 1)
        except UserError as error:
            left_out.append(f"{key} left out: {error}")
    path = one.folder / "upscale_gallery.png"
    contact_sheet(rows, side=4 * images.shape[1]).save(path)
    console.print(f"[bold]{path}[/]: {', '.join(rows)}")
    for line in left_out:
        console.print(line, style="yellow")


@checks.command(name="check")
@_with_torch
def data_check(
    name: Prepared = None,
    faces: Annotated[
        str | None,
        typer.Option(metavar="haar|FILE", help="Name images without a face, by Haar cascade or YuNet's file."),
    ] = None,
) -> None:
    """Look for copies, doubtful labels, blank images and people on two sides; write check.json and check.html."""
    from fer.data.check import NAMED, check
    from fer.data.dataset import open_data
    from fer.data.doubts import doubted
    from fer.data.images import open_images
    from fer.faces.detect import build_detector
    from pipelines import check_page, data_sets, folds
    from pipelines.params import load

    folder = data_sets.folder_of(load(), name)
    detector = None if faces is None else build_detector(None if faces == "haar" else Path(faces))
    slow = "" if detector is None else "; looking for faces takes milliseconds an image"
    with _doing(f"Reading {folder}{slow} ..."):
        found = check(folder, detector)
        data = open_data(folder)
        if (predicted := folds.predictions_for(data)) is not None:
            found["doubted"] = {"by": predicted[0], **doubted(predicted[1], data.classes, NAMED)}
    drawn = found["dataset"] == "sample"  # real faces are private
    images = open_images(folder / "raw" / "images.npy", "download") if drawn else None
    numbers, page = check_page.write(found, folder, images)
    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
    for line in check_page.findings(found):
        style = {"ok": "green", "look": "yellow", "note": "dim"}[line.mark]
        table.add_row(f"[{style}]{line.mark}[/]", line.topic, escape(line.text))
    console.print(table, highlight=False)
    console.print(f"[bold]{page}[/] (open it in a browser), [bold]{numbers}[/]")


@sweeps.command(name="run")
@_with_torch
def sweep_run(
    words: Annotated[list[str], typer.Argument(metavar="NAME|FILE [KEY=VALUE]...", help="A sweep, and changes to it.")],
    new: Annotated[bool, typer.Option("--new", help="Start another sweep if the settings have changed.")] = False,
) -> None:
    """Search, confirm the best with other seeds, record everything in MLflow. Resumes an interrupted sweep."""
    from pipelines.params import load, machine
    from pipelines.sweeps import settings

    settings.load(words, machine(load()))  # before the frameworks, which take seconds to import
    from pipelines.guard import guarded

    with guarded():
        _sweep(words, new)


def _sweep(words: list[str], new: bool) -> None:
    with _doing(STARTING):
        flow = _start_frameworks()
        from pipelines.sweeps import folder as sweep_folder

        plan, tracker = flow.prepare_sweep(words, new)
    if flow.sweep_recorded(plan, tracker):
        console.print(f"Nothing to do: {plan.folder.name} is complete; raise trials or hours to continue.")
    else:
        if sweep_folder.complete(plan):
            console.print(f"{plan.folder.name}: complete, but not in MLflow's store; recording it")
        _warn_of_random_weights({plan.base.name: plan.base.run})
        with _Board(plan.folder), flow.flow_page.server_needed():
            state = flow.sweep(words, new, return_state=True)
        failed = _failures(state)
        if failed:
            raise _first_failure(failed)
    console.print(_trials_table(plan.folder))
    _print_result(plan.folder)


@sweeps.command(name="status")
@_with_torch
def sweep_status(name: Annotated[str | None, typer.Argument(help="A sweep; all sweeps by default.")] = None) -> None:
    """Show the trials of a sweep and the best so far, even while it is running."""
    from pipelines.sweeps import folder as sweep_folder

    found = sweep_folder.folders(name)
    if not found:
        raise UserError(
            f"{sweep_folder.SWEEPS}: no sweep {name or ''} yet; start one with `fer sweep NAME`".replace("  ", " ")
        )
    damaged: list[str] = []
    for folder in found:
        try:
            console.print(_trials_table(folder))
            _print_result(folder)
        except UserError as error:
            damaged += error.lines
    if damaged:
        raise UserError(*damaged)


@sweeps.command(name="apply")
@_with_torch
def sweep_apply(
    name: Annotated[str, typer.Argument(help="A finished sweep.")],
    new_name: Annotated[
        str | None, typer.Option("--as", metavar="EXPERIMENT", help="Name of the new experiment; NAME_best by default.")
    ] = None,
) -> None:
    """Write the best settings of a finished sweep into experiments/ as an experiment based on the sweep's base."""
    from pipelines import report
    from pipelines.experiments import write
    from pipelines.sweeps import folder as sweep_folder
    from pipelines.sweeps.files import read_result

    found = [(folder, result) for folder in sweep_folder.folders(name) if (result := read_result(folder))]
    if not found:
        raise UserError(f"sweep {name}: no finished sweep of that name; run `fer sweep {name}`")
    folder, result = found[0]
    best = sweep_folder.best_run(folder, result).model_dump()
    path = write(new_name or result["best_name"], result["base"], best, report.sweep_line(result))
    console.print(f"{path}, from {folder.name}; train it with [bold]fer train {path.stem}[/]")


@app.command()
@_with_torch
def ui(
    mlflow_port: Annotated[int, typer.Option(help="Port of MLflow.", min=1, max=65535)] = 5000,
    prefect_port: Annotated[int, typer.Option(help="Port of Prefect.", min=1, max=65535)] = 4200,
) -> None:
    """Start the MLflow and Prefect user interfaces on 127.0.0.1 until Ctrl-C."""
    from fer.errors import without_password
    from pipelines.guard import guarded
    from pipelines.params import load
    from pipelines.ui import Server, serve

    tracking = load().tracking
    with _doing("Starting MLflow and Prefect"):
        from pipelines.tracking import Tracker

        tracker = Tracker(tracking.uri, tracking.experiment)
    servers = []
    if tracker.uri.startswith("http"):
        console.print(f"MLflow: {without_password(tracker.uri).rstrip('/')}{tracker.page}", soft_wrap=True)
    else:
        command = _server("mlflow", mlflow_port, "server", "--workers", "1")
        store = {"MLFLOW_BACKEND_STORE_URI": tracker.uri}  # on the command line others would see a password in it
        servers.append(Server("MLflow", mlflow_port, command, tracker.page, store))
    # where the page finds its data, which else is port 4200
    about = {"PREFECT_SERVER_UI_API_URL": f"http://127.0.0.1:{prefect_port}/api"}
    servers.append(Server("Prefect", prefect_port, _server("prefect", prefect_port, "server", "start"), "", about))
    with guarded():
        serve(servers, Path("data/logs"), partial(console.print, soft_wrap=True))


def _server(program: str, port: int, *words: str) -> list[str]:
    """The full command line of a server that is installed beside this Python."""
    return [str(Path(sys.executable).parent / program), *words, "--host", "127.0.0.1", "--port", str(port)]


class _Board:
    """A live table of a sweep's trials, drawn from the files that they write; without a terminal a line per trial."""

    def __init__(self, folder: Path):
        self.folder, self.stop = folder, threading.Event()
        self.live = Live(console=console, transient=True)

    def __enter__(self) -> None:
        self.live.start()
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self.thread.join()
        self.live.stop()

    def _follow(self) -> None:
        spinner, said = Spinner("dots"), ""
        while not self.stop.wait(1.0):
            with suppress(UserError):  # the sweep itself tells
                table = _trials_table(self.folder)
                if console.is_terminal:
                    self.live.update(Group(table, spinner))
                elif table.caption and (line := str(table.caption).partition(";")[0]) != said:
                    said = line
                    console.print(line, style="dim")


def _trials_table(folder: Path) -> Table:
    """Trials, the best first; the caption says how far the sweep is."""
    from pipelines import report
    from pipelines.sweeps import folder as sweep_folder
    from pipelines.sweeps.files import read_about, read_result

    found, about = sweep_folder.read_trials(folder), read_about(folder)
    rows = report.trial_rows(found, about["epochs"])
    columns = [Column(key, justify="right", no_wrap=key in list(rows[0])[:5]) for key in rows[0]] if rows else []
    running = is_held(folder)
    over = read_result(folder) is not None and not running
    caption = None if over else report.progress(found, about, running)
    table = Table(
        *columns, title=folder.name, caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1)
    )
    for row in rows[: max(8, console.height - 8) if console.is_terminal else None]:
        table.add_row(*row.values())
    return table


def _print_result(folder: Path) -> None:
    from pipelines import report
    from pipelines.sweeps.files import read_result

    found = read_result(folder)
    if found is not None:
        console.print(Markdown(report.sweep_note(found)))
        name = folder.name.rpartition("-")[0]
        console.print(
            f"Plots and trials.csv: [bold]{folder}[/]. Keep the best: [bold]fer sweep apply {name} --as NAME[/]"
        )


class _Bars:
    """A progress bar per run, drawn from the files that the runs write, so it works for runs on any machine.

    Without a terminal there is a line for each epoch instead.
    """

    def __init__(self, folders: list[Path]):
        self.folders, self.stop = folders, threading.Event()
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.fields[run]}"),
            BarColumn(bar_width=20),
            TextColumn("epoch"),
            MofNCompleteColumn(),
            TextColumn("{task.fields[news]}"),
            console=console,
        )

    def __enter__(self) -> None:
        self.progress.start()
        self.tasks = [self.progress.add_task("", total=None, run=path.name, news="waiting") for path in self.folders]
        self.told = dict.fromkeys(self.folders, 0)  # epochs
        if not console.is_terminal:
            console.print(f"Training {len(self.folders)} run(s)", style="dim")
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self.thread.join()
        self._look()
        self.progress.stop()

    def _follow(self) -> None:
        while not self.stop.wait(0.5):
            self._look()

    def _look(self) -> None:
        for folder, task in zip(self.folders, self.tasks):
            try:
                rows, now, summary = read_rows(folder), read_progress(folder), read_summary(folder)
            except UserError:  # the run itself tells
                continue
            if now is None:
                continue
            if len(rows) > self.told[folder] and not console.is_terminal:
                self.told[folder] = len(rows)
                line = f"{folder.name}: epoch {len(rows)} of {now['epochs']}"
                console.print(
                    f"{line}, val accuracy {100 * rows[-1]['val_accuracy']:.2f} %", style="dim", soft_wrap=True
                )
            done = now["epoch"] + now["step"] / now["steps"]
            news = f"val accuracy {100 * max(row['val_accuracy'] for row in rows):.2f} %" if rows else "training"
            if summary is not None:
                news += ", evaluated"
            self.progress.update(task, completed=round(done, 1), total=now["epochs"], news=news)


def _warn_of_random_weights(runs: dict[str, Any]) -> None:
    from fer.models import random_backbones

    for name, run in runs.items():
        for backbone in random_backbones(run.model, run.init_from):
            console.print(
                f"{name}: {backbone} starts from random weights; do not compare its results with those of papers that "
                "start from pretrained weights",
                style="yellow",
            )


def _failures(state: Any) -> dict[str, BaseException]:
    """name -> error of each failed run; the flow's own error under `flow`."""
    result = state.result(raise_on_failure=False)
    return {"flow": result} if isinstance(result, BaseException) else result


def _first_failure(failed: dict[str, BaseException]) -> BaseException:
    """All failures as one error: a UserError if every one of them is, else a RuntimeError."""
    lines = [
        line if name == "flow" else f"{name}: {line}"
        for name, error in failed.items()
        for line in (error.lines if isinstance(error, UserError) else [str(error)])
    ]
    mine = all(isinstance(error, UserError) for error in failed.values())
    return UserError(*lines) if mine else RuntimeError("\n".join(lines))


def _find(run: str) -> Path:
    """The folder of the one run whose id starts with `run`."""
    found = _find_all(run)
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{run}: matches several runs, give more of the id: {names}")
    return found[0]


def _find_all(run: str) -> list[Path]:
    """The folders of the runs whose id starts with `run`, at least one."""
    if found := named(RUNS, run):
        return found
    names = ", ".join(path.name for path in named(RUNS, ""))
    raise UserError(f"{run}: no such run in {RUNS}; runs: {names or 'none yet'}")


def _print_table(summaries: list[dict[str, Any]], title: str | None = None) -> None:
    from pipelines import report

    first, *others = report.COLUMNS
    columns = [Column(first, no_wrap=True), *(Column(other, justify="right", no_wrap=True) for other in others)]
    table = Table(*columns, title=title, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for summary in summaries:
        table.add_row(*report.row(summary).values())
    console.print(table)
    console.print(report.LEGEND, style="dim")


def _print_folds(sums: list[dict[str, Any]]) -> None:
    """A row for each cross-validation."""
    from pipelines import report

    rows = [report.folds_row(one) for one in sums]
    if rows:
        table = _table(*rows[0])
        for row in rows:
            table.add_row(*row.values())
        console.print(table)
        console.print(report.FOLDS_LEGEND, style="dim")


def _print_champions(tracker: Any, runs: list[str]) -> None:
    """The champions, and why which of the `runs` did not become one."""
    with tracker.in_one_line():
        for name, tags in tracker.registry.champions().items():
            accuracy = 100 * float(tags.get("val_accuracy", "nan"))
            run = tags.get("fer.run_id", "of another origin")
            console.print(f"models:/{name}@champion: version {tags['version']}, {run}, val {accuracy:.2f} %")
            for record in tracker.registry.history(name):
                if record.run in runs and record.champion != record.version:
                    console.print(f"{record.run}: version {record.version}, {record.reason}", style="dim")


def main() -> None:
    """Entry point. Errors are printed one per line; exit status 2 for mistakes of the user, 1 for other failures."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold what is no text
    try:
        app()
    except UserError as error:
        _fail(error, 2)
    except RuntimeError as error:
        _fail(error, 1)
    except OSError as error:
        known = disk_error(error, "data")
        if known is None:
            raise
        _fail(known, 2)
    finally:
        gc.freeze()  # a last garbage collection of all that Ray, MLflow and torch left would take seconds


def _fail(error: BaseException, status: int) -> None:
    """The only place where a command says what went wrong."""
    for line in str(error).splitlines():
        sys.stderr.write(f"error: {line}\n")
    sys.exit(status)
