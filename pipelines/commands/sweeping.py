"""`fer sweep`: search for better settings of an experiment."""

import threading
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Group
from rich.live import Live
from rich.markdown import Markdown
from rich.spinner import Spinner
from rich.table import Column, Table

from fer.errors import UserError
from fer.files import is_held
from pipelines.commands.terminal import bold, console, doing, with_torch
from pipelines.commands.training import (
    STARTING,
    failures,
    first_failure,
    start_frameworks,
    warn_of_data,
    warn_of_weights,
)


@with_torch
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
    with doing(STARTING):
        flow = start_frameworks()
        from pipelines.sweeps import folder as sweep_folder

        plan, tracker = flow.prepare_sweep(words, new)
    if flow.sweep_recorded(plan, tracker):
        console.print(f"Nothing to do: {plan.folder.name} is complete; raise trials or hours to continue.")
    else:
        if sweep_folder.complete(plan):
            console.print(f"{plan.folder.name}: complete, but not in MLflow's store; recording it")
        warn_of_weights({plan.base.name: plan.base.run})
        warn_of_data(plan.base.name, plan.base.run, plan.data)
        with _Board(plan.folder), flow.flow_page.server_needed():
            state = flow.sweep(words, new, return_state=True)
        failed = failures(state)
        if failed:
            raise first_failure(failed)
    console.print(_trials_table(plan.folder))
    _print_result(plan.folder)


@with_torch
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


@with_torch
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
    path = write(new_name or result["best_name"], result["base"], best, report.sweep_line(result), result["data"])
    console.print(f"{bold(path)}, from {folder.name}; train it with [bold]fer train {path.stem}[/]")


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
    from pipelines.sweeps.files import read_about

    found, about = sweep_folder.read_trials(folder), read_about(folder)
    rows = report.trial_rows(found, about["epochs"])
    columns = [Column(key, justify="right", no_wrap=key in list(rows[0])[:5]) for key in rows[0]] if rows else []
    running = is_held(folder)
    over = _result(folder) is not None and not running
    caption = None if over else report.progress(found, about, running)
    table = Table(
        *columns, title=folder.name, caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1)
    )
    for row in rows[: max(8, console.height - 8) if console.is_terminal else None]:
        table.add_row(*row.values())
    return table


def _result(folder: Path) -> dict[str, Any] | None:
    """result.json, if it is of the budget that the sweep has now."""
    from pipelines.sweeps.files import read_about, read_result

    result = read_result(folder)
    return result if result is not None and result["budget"] == read_about(folder)["budget"] else None


def _print_result(folder: Path) -> None:
    from pipelines import report

    found = _result(folder)
    if found is not None:
        console.print(Markdown(report.sweep_note(found)))
        name = folder.name.rpartition("-")[0]
        console.print(f"Plots and trials.csv: {bold(folder)}.")
        if found["best"]["number"] != 1:  # which is the base, unchanged
            console.print(f"Keep the best: [bold]fer sweep apply {name} --as NAME[/]")
