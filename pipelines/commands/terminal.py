"""What the commands share: the terminal, options, tables, and which run is meant."""

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import typer
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from fer.errors import UserError
from fer.run_folder import all_runs, named

RUNS = Path("data/runs")
NARROWEST = 18  # characters of a column of names that does not fit


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
Command = TypeVar("Command", bound=Callable[..., Any])


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Say what takes seconds: in a moving line on a terminal, elsewhere in one line at the start."""
    if console.is_terminal:
        with console.status(escape(what)):
            yield
    else:
        console.print(what, style="dim", highlight=False, markup=False)
        yield


def with_torch(command: Command) -> Command:
    """A command that needs torch, whose import takes seconds: on a terminal something moves meanwhile."""

    @wraps(command)
    def imported(*words: Any, **named: Any) -> Any:
        with console.status("Starting"):
            importlib.import_module("fer.evaluate")
        return command(*words, **named)

    return cast("Command", imported)


def print_rows(columns: Iterable[str], rows: Iterable[Iterable[str]], title: str | None = None) -> None:
    """Print a table, numbers to the right. Where it is too wide names are folded and words wrapped, numbers never."""
    cells = [tuple(map(escape, row)) for row in rows]
    first, *others = columns
    values = [Column(escape(name), justify="right", no_wrap=not any(" " in row[place] for row in cells))
              for place, name in enumerate(others, start=1)]  # fmt: skip
    names = Column(escape(first), overflow="fold")
    table = Table(names, *values, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True)
    table.title = None if title is None else escape(title)
    for row in cells:
        table.add_row(*row)
    wide = console.options.update(width=10_000)
    natural = console.measure(table, options=wide).maximum
    if console.is_terminal and natural > console.width:
        longest = max(map(cell_len, (first, *(row[0] for row in cells))))
        names.width = max(min(longest, NARROWEST), longest - (natural - console.width))
        natural = console.measure(table, options=wide).minimum
    _Console(width=max(natural, console.width)).print(table)


def bold(what: object) -> str:
    """Markup of a path or the like, whose own brackets are none."""
    return f"[bold]{escape(str(what))}[/]"


def percents(found: Any, sign: str = "") -> str:
    """An interval (fer.statistics) in percent: value (low, high)."""
    return f"{100 * found.value:{sign}.2f} ({100 * found.low:{sign}.2f}, {100 * found.high:{sign}.2f})"


def check_target(option: str, path: Path, ends: tuple[str, ...]) -> None:
    """Raises UserError unless `path` is, or can become, a file of its kind: told before the work, which takes long."""
    if path.suffix not in ends:
        raise UserError(f"{option} {path}: name a file that ends in {' or '.join(ends)}")
    if not os.path.isdir(path.parent) or (os.path.lexists(path) and not os.path.isfile(path)):
        raise UserError(f"{option} {path}: name a file in a folder that exists")


def find_run(run: str) -> Path:
    """The folder of the one run whose id starts with `run`."""
    found = find_runs(run)
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{run}: matches several runs, give more of the id: {names}")
    return found[0]


def find_model(run: str) -> Path:
    """The folder `run` if it holds a run or a checkpoint alone, as `fer export` writes it; else as `find_run`."""
    known = any((Path(run) / name).exists() for name in ("checkpoint.json", "best/checkpoint.json"))
    return Path(run) if known else find_run(run)


def find_runs(run: str) -> list[Path]:
    """The folders of the runs whose id starts with `run`, at least one."""
    if found := named(RUNS, run):
        return found
    names = ", ".join(path.name for path in all_runs(RUNS))
    raise UserError(f"{run or 'an empty name'}: no such run in {RUNS}; runs: {names or 'none yet'}")


def data_of(folder: Path) -> Path:
    """The folder of the data set that a run was trained on."""
    from fer.run_folder import read_config
    from pipelines.data_sets import folder_of_run
    from pipelines.params import load

    return folder_of_run(load(), read_config(folder)["data"])
