"""sweeps/*.yaml: a search for better settings of one experiment, typed and checked."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from fer.errors import UserError
from fer.settings import Fraction, Natural, Positive, Section, Seed, check, nearest
from pipelines import experiments
from pipelines.experiments import COMMAND_LINE, Experiment, Layers
from pipelines.params import NAME, parse_value, read_yaml
from pipelines.sweeps import space as spaces

FOLDER = Path("sweeps")
MOST_POINTS = 10_000  # of a grid
COMMANDS = ("run", "status", "apply")  # of `fer sweep`: no sweep can have their names


class Sweep(Section):
    """A search for better settings of one experiment, on val."""

    base: str
    """Experiment that is the first trial, and that the others change."""
    changes: dict[str, Any] = {}
    """Settings of every trial that differ from the base's."""
    seed: Seed = 1111
    """Seed of the search; trials have the seed of the base."""
    search: Literal["tpe", "random", "grid"] = "tpe"
    """grid: every point of a space of choices, regardless of `trials`."""
    scheduler: Literal["asha", "hyperband", "none"] = "asha"
    """asha: stop a trial at a rung unless it is among the best so far; hyperband: wait until all have reached it."""
    grace_epochs: Positive = 1
    """asha: epochs before the first rung, which every trial gets."""
    reduction: Annotated[int, Field(ge=2)] = 3
    """One in this many trials continues at each rung; with asha and 3 these are at grace_epochs times 1, 3, 9, ..."""
    trials: Positive = 16
    """Number of trials."""
    hours: Annotated[float, Field(gt=0)] | None = None
    """Stop all trials after this time of search (that of earlier starts is taken from their epochs); null: no limit."""
    at_once: Positive | None = None
    """Trials in parallel; null: as many as there is room for."""
    cpus_per_trial: Positive = 1
    """CPU cores per trial."""
    gpus_per_trial: Fraction = 0.0
    """GPUs per trial; 0.5: two trials share one; 0: train on the CPU."""
    restarts: Natural = 2
    """How often a trial whose process dies is restarted, from its last epoch."""
    confirm_seeds: Natural = 3
    """Number of other seeds that best and base are trained with at the end; 0: none."""
    space: dict[str, Any]
    """Key of the experiment -> {int | float | log | factor: [low, high]} or {choice: [...]} (docs/sweeps.md)."""


def known() -> list[str]:
    """Names of the sweeps in sweeps/."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def path_of(word: str) -> Path:
    """The file of a sweep, given its name or path. Raises UserError for an unknown or invalid name."""
    path = Path(word) if word.endswith((".yaml", ".yml")) else FOLDER / f"{word}.yaml"
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such sweep{nearest(path.stem, known())}")
    if not NAME.fullmatch(path.stem) or path.stem in COMMANDS:
        rule = f"made of up to 100 letters, digits, _ and -, and is none of {', '.join(COMMANDS)}"
        raise UserError(f"{path}: a sweep's name is {rule}; rename the file")
    return path


def load(words: list[str], machine: dict[str, Any]) -> tuple[str, Sweep, Experiment, spaces.Space]:
    """Name and settings of the sweep in `words`, with the changes `key=value` there; its base, and its space.

    `changes.KEY=value` and `space.KEY=value` leave the other keys as they are. Raises UserError with one line per
    mistake.
    """
    names, changes = experiments.split(words)
    if len(names) != 1:
        raise UserError(f"fer sweep: name one sweep, one of {', '.join(known())}")
    path = path_of(names[0])
    layers = Layers(Sweep)
    layers.lay(read_yaml(path, "write at least its base and space there"), str(path))
    below = [change for change in changes if change.startswith("changes.")]
    for change in changes:
        if change not in below:
            layers.lay(_tree_of(change, layers.tree), COMMAND_LINE)
    sweep, faults = check(Sweep, layers.tree)
    if sweep is None:
        raise UserError(*(experiments.placed(fault, layers.origins, path) for fault in faults))
    origins = {key: layers.origins.get(key, str(path)) for key in Sweep.model_fields}
    over = sweep.changes, f"{origins['changes']}: changes"
    asks = f"{origins['base']}: base: "
    try:
        file = experiments.path_of(sweep.base)
    except UserError as error:
        raise UserError(*(asks + line for line in error.lines)) from None
    if file.resolve() != (experiments.FOLDER / f"{file.stem}.yaml").resolve():  # by its name `fer sweep apply` finds it
        raise UserError(f"{asks}{file}: is not in {experiments.FOLDER}; move it there, and give its name alone")
    keys = [change.removeprefix("changes.") for change in below]
    base = experiments.read(file, keys, machine, over, asks, f"{COMMAND_LINE}: changes")
    given = {change.partition("=")[0] for change in changes}
    sources = {key: COMMAND_LINE if {"space", f"space.{key}"} & given else str(path) for key in sweep.space}
    return path.stem, sweep, base, _space(sweep, base, origins, sources)


def _tree_of(change: str, tree: dict[str, Any]) -> dict[str, Any]:
    """A change as a nested table; `space.loss.gamma` sets the key `loss.gamma` of the space and keeps its others."""
    path, _, text = change.partition("=")
    table, _, key = path.partition(".")
    before = tree.get(table)
    if table != "space" or not key or not isinstance(before, dict):
        return experiments.tree_of(change)
    return {table: {**before, key: parse_value(text, change)}}


def _space(sweep: Sweep, base: Experiment, origins: Mapping[str, str], sources: Mapping[str, str]) -> spaces.Space:
    """The space of a sweep, whose keys come from `sources`.

    Raises UserError with one line per mistake, in it or between the sweep and its base.
    """
    run, found, grace = base.run, [], f"{origins['grace_epochs']}: grace_epochs: {sweep.grace_epochs}"
    for key, how in (("init_from", "starts"), ("teacher", "learns")):
        if getattr(run, key) is not None:
            other = f"{base.name} {how} from another run ({key}), which trials cannot; use another"
            found.append(f"{origins['base']}: base: {other}")
    if sweep.grace_epochs > run.epochs:
        found.append(f"{grace}, but the base has {run.epochs} epochs; lower it")
    if not sweep.space:
        found.append(f"{origins['space']}: space: holds no key to search; give at least one")
    space = spaces.read(sweep.space, run, {key: f"{source}: space" for key, source in sources.items()}, found)
    ranges = [key for key, given in space.items() if spaces.ranges(given, key)]
    if sweep.search == "grid" and ranges:
        where = f"{origins['search']}: search"
        found.append(f"{where}: grid needs choices only, {ranges[0]} has a range; use tpe or random")
    elif sweep.search == "grid" and (points := spaces.size(space)) > MOST_POINTS:
        where = f"{origins['search']}: search"
        found.append(f"{where}: grid has {points:,} points, {MOST_POINTS:,} at most; use tpe or random")
    if found:
        raise UserError(*found)
    return space
