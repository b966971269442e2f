"""Experiments: one file each in experiments/, changed by `key=value` on the command line, give a typed run.

Precedence: the defaults of fer.run < `resources` of params.yaml < the file's `base` < the file < the command line. A
layer that changes the `name` of a section resets it: what lower layers set in that section is dropped.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from fer.errors import UserError
from fer.files import write_bytes
from fer.models import MODELS
from fer.models.network import ModelKind
from fer.resources import Resources
from fer.run import Run, chain_faults, resource_faults
from fer.run_folder import SUMMARY, all_runs, named
from fer.settings import Fault, OneOf, Section, check, differing, nearest, section_at, table_of
from pipelines.params import NAME, parse_value, read_text, read_yaml, yaml_of

FOLDER = Path("experiments")
COMMAND_LINE, MACHINE, DEFAULT = "command line", "params.yaml", "default"
CHANGE = re.compile(r"[A-Za-z_][\w.]*=")
ID = re.compile(r"[\w.-]+-s\d+-[0-9a-f]{8}")  # of a run
SUFFIXES = (".yaml", ".yml")


class Recipe(Run):
    """The keys that an experiment's file may have."""

    model: Annotated[ModelKind, OneOf(MODELS)]  # no ensemble, which is not trained
    """The network."""
    base: str | None = None
    """Experiment that this one changes."""
    data: str | None = None
    """Data set to train on, a name under `data` in params.yaml; null: the first there. The run's id has its content."""
    resources: Resources = Resources()
    """Where the run computes; not part of its identity."""


@dataclass(frozen=True)
class Experiment:
    """An experiment with all its values, and where they come from."""

    name: str
    path: Path
    head: str  # the comment at the top of the file
    run: Run
    resources: Resources
    data: str | None  # name of its data set; None: the first of the project
    origins: Mapping[str, str]  # dotted path -> file or COMMAND_LINE, for each value that is not a default
    dropped: list[str]  # values lost when a section was reset


@dataclass(frozen=True)
class Job:
    """A run to be carried out."""

    name: str
    run: Run
    resources: Resources
    data: Path  # folder of the data set
    folder: Path  # data/runs/<run id>
    start: str | None = None  # id of the run that `init_from` names
    fold: str | None = None  # the part of the data that it is trained on, such as 3/10 (fer.data.folds)

    @property
    def title(self) -> str:
        """Name, fold and seed: the run id without the hash."""
        return self.folder.name.rpartition("-")[0]


def known() -> list[str]:
    """Names of the experiments in experiments/."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """Split words into names or files of experiments, and changes `key=value`. Raises UserError for any other."""
    changes = [word for word in words if CHANGE.match(word)]
    names = [word for word in words if word not in changes]
    for word in names:
        if "=" in word and not word.endswith(SUFFIXES):
            raise UserError(f"{word}: write it as key=value, for example optimizer.lr=3e-4")
    return names, changes


def load(words: list[str], machine: dict[str, Any]) -> dict[str, Experiment]:
    """The experiments named in `words`, with the changes there, and those that their `init_from` names.

    Each comes after the one it starts from; unless that is named as well, `seed` is the only change that applies to it,
    and it is trained on the same data set unless its file names one.
    `machine`: `resources` of params.yaml. Raises UserError with one line per mistake.
    """
    names, changes = split(words)
    files: dict[str, Path] = {}
    for path in map(path_of, names):
        if os.path.realpath(files.setdefault(path.stem, path)) != os.path.realpath(path):
            raise UserError(f"{path}: {files[path.stem]} has the same name; rename one of them")
    found: dict[str, Experiment] = {}
    faults: list[str] = []
    for name in files:
        _add(found, faults, name, files, changes, machine, (), None)
    if faults:
        raise UserError(*dict.fromkeys(faults))
    return found


def _add(
    found: dict[str, Experiment], faults: list[str], name: str, files: dict[str, Path], changes: list[str],
    machine: dict[str, Any], after: tuple[str, ...], data: str | None,
) -> None:  # fmt: skip
    """Read one experiment, and before it those it starts from; `after`: those that start from it, on `data`."""
    if name in found:
        return
    if name in after:
        faults.append(f"{name}: init_from: {' -> '.join([*after, name])} is a circle; set one of them to null")
        return
    if name not in files and not NAME.fullmatch(name):
        faults.append(f"{after[-1]}: init_from: should be the name of an experiment, got {name!r}")
        return
    own = changes if name in files else [change for change in changes if change.startswith("seed=")]
    try:
        experiment = read(files[name] if name in files else path_of(name), own, machine)
    except UserError as error:
        waits = f"{after[-1]}: init_from: " if name not in files else ""
        faults += [waits + line for line in error.lines]
        return
    if name not in files:  # what is named has its own data, in whatever order the words are
        experiment = replace(experiment, data=experiment.data or data)
    first = experiment.run.init_from
    if first is not None:
        _add(found, faults, first, files, changes, machine, (*after, name), experiment.data)
        if first in found:
            if found[first].data != experiment.data and "data" not in found[first].origins:
                faults.append(f"{name}: init_from: {first} is to be trained on other data as well; train them in turn")
            wrong = chain_faults(experiment.run, found[first].run)
            faults += [placed(fault, experiment.origins, experiment.path) for fault in wrong]
    found[name] = experiment


def path_of(word: str) -> Path:
    """The file of an experiment, given its name or path. Raises UserError for an unknown or invalid name."""
    path = Path(word) if word.endswith(SUFFIXES) else FOLDER / f"{word}.yaml"
    if not os.path.lexists(path):  # False for what cannot be the name of a file, too
        raise UserError(f"{path}: no such experiment{nearest(path.stem, known())}")
    if not NAME.fullmatch(path.stem):
        raise UserError(f"{path}: an experiment's name is made of up to 100 letters, digits, _ and -; rename the file")
    return path


def read(
    path: Path, changes: list[str], machine: dict[str, Any], over: tuple[dict[str, Any], str] = ({}, ""),
    asks: str = "", source: str = COMMAND_LINE,
) -> Experiment:  # fmt: skip
    """The experiment in a file. `over`: a layer between the file and the changes, and its name; `source`: theirs.

    Raises UserError with one line per mistake, which says where it is; `asks`, whatever needs this experiment, is put
    before mistakes in its files.
    """
    layers = Layers(Recipe)
    layers.lay({"resources": machine}, MACHINE)
    try:
        files = list(_with_bases(path))
    except UserError as error:
        raise UserError(*(asks + line for line in error.lines)) from None
    for file, tree in reversed(files):
        layers.lay({key: value for key, value in tree.items() if key != "base"}, str(file))
    layers.lay(*over)
    for change in sorted(changes, key=_depth):
        layers.lay(tree_of(change), source)
    if "base" in layers.origins:
        raise UserError(f"{layers.origins['base']}: base: only a file has one; write it into a file of experiments/")
    recipe, faults = check(Recipe, layers.tree)
    if recipe is not None:
        run = Run.model_construct(**{key: getattr(recipe, key) for key in Run.model_fields})
        faults = resource_faults(run, recipe.resources)
    if faults:
        known = (over[1], source)
        sources = [source_of(fault, layers.origins, path) for fault in faults]
        raise UserError(*(f"{'' if where in known else asks}{where}: {fault}" for where, fault in zip(sources, faults)))
    assert recipe is not None
    return Experiment(path.stem, path, head(path), run, recipe.resources, recipe.data, layers.origins, layers.dropped)


def head(path: Path) -> str:
    """The comment at the top of a file."""
    lines = []
    for line in read_text(path).splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return "\n".join(lines)


def values(experiment: Experiment) -> Iterator[tuple[str, Any, str, str]]:
    """Yield every setting: its dotted path, its value, where that comes from, and its meaning."""
    meaning = Recipe.model_fields["data"].description or ""
    yield "data", experiment.data, experiment.origins.get("data", DEFAULT), meaning
    yield from _values(experiment.run, "", experiment.origins)
    yield from _values(experiment.resources, "resources.", experiment.origins)


def _values(
    section: Section, prefix: str, origins: Mapping[str, str], choices: Iterable[str] = ()
) -> Iterator[tuple[str, Any, str, str]]:
    """`choices`: the names of the sections that this one was chosen from."""
    kind = Recipe if isinstance(section, Run) else type(section)
    for key, about in type(section).model_fields.items():
        value, path = getattr(section, key), prefix + key
        if isinstance(value, Section):
            yield from _values(value, f"{path}.", origins, table_of(kind, key))
        else:
            meaning = about.description or (type(section).__doc__ or "").partition("\n")[0]
            if others := [name for name in choices if name != value and key == "name"]:
                meaning += f" Others: {', '.join(others)}."
            yield path, value, origins.get(path, DEFAULT), meaning


def write(name: str, base: str, tree: dict[str, Any], comment: str, data: str | None = None) -> Path:
    """Write experiments/`name`.yaml with what differs between the run `tree` (plain values) and the experiment `base`.

    `data`: the data set that it was trained on, if it names one.
    Raises UserError if the name is taken or not valid.
    """
    path = FOLDER / f"{name}.yaml"
    if not NAME.fullmatch(name):
        raise UserError(f"--as {name}: an experiment's name is made of up to 100 letters, digits, _ and -")
    if os.path.lexists(path):
        raise UserError(f"{path}: exists already; choose another name with --as")
    before = read(path_of(base), [], {})
    own = {} if data in (None, before.data) else {"data": data}
    own |= _difference(Run.model_validate(tree), before.run)
    write_bytes(path, f"# {comment}\n# fer train {name}\n{yaml_of({'base': base, **own})}".encode())
    return path


def _difference(section: Section, base: Section) -> dict[str, Any]:
    """The changes that turn `base` into `section`, which is of the same kind."""
    own: dict[str, Any] = {}
    for key in type(section).model_fields:
        value, old = getattr(section, key), getattr(base, key)
        if value == old:
            continue
        if not isinstance(value, Section):
            own[key] = value
        elif type(value) is type(old):
            own[key] = _difference(value, old)
        else:
            own[key] = {"name": getattr(value, "name", None), **differing(value)}
    return own


def _with_bases(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield a file and the files it is based on, each before its own base."""
    seen: list[Path] = []
    while True:
        if path in seen:
            raise UserError(f"{path}: base: {' -> '.join(file.stem for file in [*seen, path])} is a circle")
        seen.append(path)
        tree = read_yaml(path, "write at least its model there")
        yield path, tree
        base = tree.get("base")
        if base is None:
            return
        if not isinstance(base, str):
            raise UserError(f"{path}: base: should be the name of an experiment, got {base!r}")
        try:
            path = path_of(base)
        except UserError as error:
            raise UserError(f"{path}: base: {error}") from None


def taught(one: Experiment, runs: Path) -> Experiment:
    """The experiment with the whole id of its teacher, of which it may name the start.

    A whole id is left as it is, since a student that is finished does not need its teacher any more.
    Raises UserError unless the start is that of one finished run in `runs`.
    """
    word = one.run.teacher
    if word is None or ID.fullmatch(word):
        return one
    found = [folder.name for folder in named(runs, word) if (folder / SUMMARY).exists()]
    asks = f"{one.origins['teacher']}: teacher: {word}"
    if not found:
        known = [folder.name for folder in all_runs(runs) if (folder / SUMMARY).exists()]
        raise UserError(f"{asks}: no finished run in {runs}; finished: {', '.join(known) or 'none yet'}")
    if len(found) > 1:
        raise UserError(f"{asks}: names several runs, give more of the id: {', '.join(found)}")
    return replace(one, run=one.run.model_copy(update={"teacher": found[0]}))


def _depth(change: str) -> int:
    """Nesting depth of a change. Outer ones go first, so that a section's name does not drop keys given with it."""
    return change.partition("=")[0].removesuffix(".name").count(".")


def tree_of(change: str) -> dict[str, Any]:
    """`optimizer.lr=3e-4` as a nested table. Raises UserError if the value is not valid YAML."""
    path, _, text = change.partition("=")
    value = parse_value(text, change)
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


@dataclass
class Layers:
    """Tables of keys merged layer by layer, with the origin of each value."""

    kind: type[Section]
    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)

    def lay(self, over: dict[str, Any], source: str) -> None:
        """Merge a table over the layers so far; `source`: its name in messages."""
        self.tree = self._lay(self.tree, over, self.kind, source, "")

    def _lay(self, tree: dict, over: dict, kind: type[Section] | None, source: str, prefix: str) -> dict[str, Any]:
        merged = dict(tree)
        for key, value in over.items():
            path = f"{prefix}{key}"
            table = table_of(kind, key) if kind is not None else {}
            if table and isinstance(value, str):
                value = {"name": value}
            inner = section_at(kind, key, {}) if kind is not None and not table else None
            if isinstance(value, dict) and (table or inner is not None):
                before = merged.get(key)
                before = before if isinstance(before, dict) else {}
                if table and kind is not None:
                    before, value = self._named(kind, key, before, value, source, path)
                    inner = table.get(str({**before, **value}.get("name")))
                merged[key] = self._lay(before, value, inner, source, f"{path}.")
            else:
                merged[key] = value
                self.origins.pop(path, None)  # keeps them in the order of the layers
                self.origins[path] = source
        return merged

    def _named(
        self, kind: type[Section], key: str, before: dict, value: dict, source: str, path: str
    ) -> tuple[dict, dict]:
        """The section's keys of lower layers, and of this layer; the former are dropped if the name changes."""
        default = getattr(kind.model_fields[key].default, "name", None)
        name = before.get("name", default)
        wanted = value.get("name", name)
        if wanted == name:
            return before if name is None else {"name": name, **before}, value
        lost = [place for place in self.origins if place.startswith(f"{path}.") and place != f"{path}.name"]
        for place in lost:
            self.dropped.append(f"{place} of {self.origins.pop(place)}: {source} takes {key} {wanted}")
        return {}, value


def placed(fault: Fault, origins: Mapping[str, str], path: Path) -> str:
    """A fault with the file, or the command line, that it is in."""
    return f"{source_of(fault, origins, path)}: {fault}"


def source_of(fault: Fault, origins: Mapping[str, str], path: Path) -> str:
    """The file, or the command line, that sets the key of a fault."""
    parts = fault.path.split(".")
    for count in range(len(parts), 0, -1):
        start = ".".join(parts[:count])
        sources = [source for place, source in origins.items() if place == start or place.startswith(f"{start}.")]
        if sources:
            return sources[-1]
    return str(path)
