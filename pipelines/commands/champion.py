"""`fer promote`, `fer rollback` and `fer registry`: the registered model of a data set."""

from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Column, Table

from fer.errors import UserError
from pipelines.commands.terminal import console, doing, with_torch

Dataset = Annotated[
    str | None, typer.Option(help="The data set whose registered model is meant; the first in params.yaml by default.")
]
Reason = Annotated[str, typer.Option(help="Why, for the history.")]


@with_torch
def promote(
    version: Annotated[str, typer.Argument(help="A version, `challenger`, or a run id or its first characters.")],
    reason: Reason = "",
    dataset: Dataset = None,
) -> None:
    """Make a version of the registered model champion by hand, until a run is better by the rule."""
    name, tracker = registered(dataset)
    with tracker.in_one_line():
        _print_move(name, tracker.registry.promote(name, version, reason))


@with_torch
def rollback(reason: Reason = "", dataset: Dataset = None) -> None:
    """Make the champion before this one champion again."""
    name, tracker = registered(dataset)
    with tracker.in_one_line():
        _print_move(name, tracker.registry.rollback(name, reason))


@with_torch
def registry(dataset: Dataset = None) -> None:
    """Show the history of the registered model: every decision about its champion, and the evidence."""
    from datetime import datetime

    name, tracker = registered(dataset)
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


def registered(dataset: str | None) -> tuple[str, Any]:
    """The name of a data set's registered model, and the tracker."""
    from pipelines.params import NAME, load
    from pipelines.store import is_missing, tracking_uri

    params = load()
    if dataset is not None and not NAME.fullmatch(dataset):
        raise UserError(f"--dataset {dataset}: should be the name of a data set, as {params.chosen(None)}")
    if is_missing(uri := tracking_uri(params.tracking.uri)):
        raise UserError(f"tracking.uri: {uri}: nothing is recorded there yet; train a run with `fer train`")
    with doing("Asking MLflow"):
        from pipelines.tracking import Tracker

        tracker = Tracker(params.tracking.uri, params.tracking.experiment, params.tracking.promotion)
    return f"fer-{dataset or params.chosen(None)}", tracker


def _print_move(name: str, record: Any) -> None:
    before = f"version {record.before}" if record.before else "none"
    console.print(f"models:/{name}@champion: version {record.version}, {record.run} (before: {before})")
    console.print(record.reason, style="dim", highlight=False, markup=False)
