"""`fer train`, `fer config` and `fer models`: experiments before and while they are trained."""

import importlib
import json
import logging
import os
import threading
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from fer.errors import UserError, one_line
from fer.run_folder import read_progress, read_rows, read_summary
from pipelines.commands.results import print_champions, print_folds, print_table
from pipelines.commands.terminal import RUNS, Words, console, doing, with_torch

STARTING = "Starting Prefect, Ray and MLflow ..."


@with_torch
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
    if folds is not None and not words and not every:
        raise UserError("--folds: name the experiment it is for, or --all")
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
    with doing(STARTING):
        flow = start_frameworks()
        from pipelines import report
        from pipelines.folds import added

        jobs, tracker = flow.prepare(words, folds)
    folders, failed = [job.folder for job in jobs.values()], {}
    for name, job in jobs.items():
        if line := report.other_code(job.folder):
            console.print(f"{name}: {line}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    if all(flow.recorded(job, tracker) for job in jobs.values()) and (
        folds is None or flow.sums_recorded(jobs, tracker)
    ):
        console.print(f"Nothing to do: {len(folders)} run(s) are finished and recorded.")
    else:
        warn_of_weights({name: job.run for name, job in jobs.items()})
        for name, job in jobs.items() if folds is None else ():
            first = jobs.get(job.run.init_from or "", job)
            warn_of_data(name, job.run, job.data, first.data)
        with _Bars(folders), flow.flow_page.server_needed():
            state = flow.train(words, folds, return_state=True)
        failed = failures(state)
    ended = [job.folder for name, job in jobs.items() if name not in failed]
    if folds is not None and "flow" not in failed:
        print_folds([added(made) for made in flow.of_one(jobs, failed)])
    elif "flow" not in failed and (found := report.summaries(ended)):
        print_table(found)
        print_champions(tracker, [folder.name for folder in ended])
    if failed:
        raise first_failure(failed)
    console.print("Look closer: [bold]fer ui[/] (MLflow and Prefect), [bold]fer evaluate RUN[/], [bold]fer compare[/].")


def start_frameworks() -> Any:
    """The module `pipelines.flow`, whose frameworks take seconds to import."""
    # the bars and the table show it better; Prefect's UI has the whole log
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    # if its server dies, our own line says so; Prefect would say it for each event and batch of its log
    os.environ.setdefault("PREFECT_LOGGING_INTERNAL_LEVEL", "CRITICAL")
    logging.raiseExceptions = False
    with one_line("Prefect, Ray or MLflow does not start", "correct its variables (PREFECT_..., RAY_..., MLFLOW_...)"):
        return importlib.import_module("pipelines.flow")


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


def warn_of_weights(runs: dict[str, Any]) -> None:
    """A line for each backbone without its published weights, or with other images than its weights were trained on.

    And one for each teacher that sees less than it was trained on.
    """
    from fer.models import mistaken_pixels, random_backbones
    from fer.run import chain_pixels
    from fer.teacher import worse_view

    for name, run in runs.items():
        for backbone in random_backbones(run.model, run.init_from):
            console.print(
                f"{name}: {backbone} starts from random weights; do not compare its results with those of papers that "
                "start from pretrained weights",
                style="yellow",
            )
        start = chain_pixels(run, runs[run.init_from]) if run.init_from in runs else None
        view = worse_view(run, RUNS) if run.teacher is not None and (RUNS / run.teacher).exists() else None
        for line in [*mistaken_pixels(run.model, run.input), *(line for line in (start, view) if line)]:
            console.print(f"{name}: {line}", style="yellow", highlight=False)


def warn_of_data(name: str, run: Any, data: Path, start: Path | None = None) -> None:
    """A line for each thing that a run asks of its data in vain, or that these cannot tell.

    `start`: the data of the run that it starts from.
    """
    from fer.data.dataset import open_data
    from fer.run import data_doubts

    other = None if start in (None, data) else open_data(start)
    for line in data_doubts(run, open_data(data), other):
        console.print(f"{name}: {line}", style="yellow", highlight=False, soft_wrap=True)


def failures(state: Any) -> dict[str, BaseException]:
    """name -> error of each failed run; the flow's own error under `flow`."""
    result = state.result(raise_on_failure=False)
    return {"flow": result} if isinstance(result, BaseException) else result


def first_failure(failed: dict[str, BaseException]) -> BaseException:
    """All failures as one error: a UserError if every one of them is, else a RuntimeError."""
    lines = [
        line if name == "flow" else f"{name}: {line}"
        for name, error in failed.items()
        for line in (error.lines if isinstance(error, UserError) else [str(error)])
    ]
    mine = all(isinstance(error, UserError) for error in failed.values())
    return UserError(*lines) if mine else RuntimeError("\n".join(lines))


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
        table.add_row(name, escape(experiments.head(experiments.path_of(name)).partition("\n")[0]))
    console.print(table)
    console.print("Train: [bold]fer train NAME... [KEY=VALUE]...[/]; all settings: [bold]fer config NAME[/].")


@with_torch
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
        table.add_row(path, escape(shown), escape(source) if own else "", escape(meaning), style="bold" if own else "")
    console.print(table)
    for line in found.dropped:
        console.print(f"dropped: {line}", style="yellow", highlight=False, markup=False)


@with_torch
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
    found, faults = _of_all(names, changes)
    for name, run in ((name, one.run) for name, one in sorted(found.items())):
        networks = [backbone.name for backbone in run.model.backbones().values()] or [run.model.name]
        sources = zip(networks, origin(run.model, run.init_from))
        try:
            price = cost(run.model, run.input, len(CLASSES))
            numbers = f"{price.parameters / 1e6:.2f}M", f"{price.trainable / 1e6:.2f}M", f"{price.gflop:.3g}"
        except UserError as error:
            faults += [f"{name}: {line}" for line in error.lines]
            numbers = "-", "-", "-"
        size = f"{run.input.image_size}x{run.input.image_size}x{run.input.channels}"
        table.add_row(name, *numbers, size, escape("\n".join(f"{network}: {source}" for network, source in sources)))
    console.print(table)
    console.print(
        "trainable: parameters that training changes. GFLOP: forward pass of one image, a multiply-add counts as two; "
        "training costs three times that for the trainable part. input: size of the network's input.",
        style="dim",
    )
    if faults:
        raise UserError(*dict.fromkeys(faults))


def _of_all(names: list[str], changes: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The experiments in `names`, or all, and what is wrong with files of these, as one of them hides no other."""
    from pipelines import experiments

    if names:
        return _check([*names, *changes]), []
    found: dict[str, Any] = {}
    faults: list[str] = []
    try:
        return _check([*experiments.known(), *changes]), []
    except UserError:
        for name in experiments.known():
            try:
                found |= _check([name, *changes])
            except UserError as error:
                faults += error.lines
        if not found:  # as the fault is in none of them
            raise
    return found, faults
