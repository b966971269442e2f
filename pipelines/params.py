"""The only reader of params.yaml: typed, checked as a whole before any work, all faults reported at once."""

import copy
import io
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import YAMLError

from fer.config import Fraction, Positive, RunConfig, Section, faults, nearest
from fer.errors import UserError
from pipelines import space as spaces


class Sample(Section):
    train: Annotated[int, Field(ge=80)]
    val: Annotated[int, Field(ge=40)]
    test: Annotated[int, Field(ge=40)]
    seed: Annotated[int, Field(ge=0)]


class Data(Section):
    dataset: Literal["sample", "ferplus"]
    path: str
    label_source: Literal["auto", "label_csv", "fer2013new"]
    kaggle_competition: str
    votes_url: str
    votes_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    sample: Sample


class SuperResolution(Section):
    method: Literal["none", "bicubic", "lanczos", "dic", "swin2sr"]
    scale: Annotated[int, Field(ge=1, le=16)]
    weights: str
    hub_id: str | None
    precision: Literal["fp32", "bf16", "fp16"]
    grey_tolerance: Annotated[int, Field(ge=0, le=255)]
    device: Literal["auto", "cpu", "cuda"]
    workers: Positive

    @model_validator(mode="after")
    def _scale_fits(self) -> "SuperResolution":
        from fer.super_resolution.methods import METHODS

        scales = METHODS[self.method].scales
        if scales is not None and self.scale not in scales:
            able = " or ".join(map(str, scales))
            if self.method == "none":
                raise ValueError(f"method none keeps the size, so scale must be 1, got {self.scale}")
            raise ValueError(
                f"method {self.method} makes images larger by {able}, so scale must be that, got {self.scale}"
            )
        return self


class Split(Section):
    label_mode: Literal["majority", "probability", "cross_entropy", "multi_target"]
    drop_leaked_train: bool
    prior_min_votes: Positive
    train_share: Annotated[float, Field(gt=0, le=1)]
    seed: Annotated[int, Field(ge=0)]


class Experiment(Section):
    retries: Annotated[int, Field(ge=0)]
    max_worker_failures: Annotated[int, Field(ge=0)]


class Tracking(Section):
    uri: str
    experiment: str


PROMOTING = ("asha", "halving")  # schedulers that pause trials and let the better ones go on


class Sweep(Section):
    """A search for better settings of one model, on val."""

    base: str  # model of params.yaml: the first trial, and what the others change
    seed: Annotated[int, Field(ge=0)]  # of the search
    search: Literal["tpe", "random", "grid"]
    scheduler: Literal["asha", "halving", "pbt", "none"]
    grace_epochs: Positive
    reduction: Annotated[int, Field(ge=2)]
    trials: Positive
    hours: Annotated[float, Field(gt=0)] | None
    at_once: Positive | None
    cpus_per_trial: Positive
    gpus_per_trial: Fraction
    max_failures: Annotated[int, Field(ge=0)]
    confirm_seeds: Annotated[int, Field(ge=0)]
    space: dict[str, Any]  # key of the base -> {kind: values}, see pipelines/space.py


class Params(Section):
    data: Data
    super_resolution: SuperResolution
    split: Split
    experiment: Experiment
    tracking: Tracking
    models: dict[str, RunConfig]  # `train` with each model's own keys laid over it
    sweeps: dict[str, Sweep]

    def named(self, names: list[str]) -> list[str]:
        """`names`, or all models without any. Raises UserError, a line for each name that is no model."""
        unknown = [name for name in names if name not in self.models]
        if unknown:
            known = list(self.models)
            raise UserError(
                "\n".join(f"models.{name}: no such model in params.yaml{nearest(name, known)}" for name in unknown)
            )
        return names or list(self.models)


NAME = re.compile(r"[A-Za-z0-9_-]+")  # of a model: a part of a folder's name and of `--set models.<name>.lr=...`
SECTIONS: dict[str, type[Section]] = {
    "data": Data,
    "super_resolution": SuperResolution,
    "split": Split,
    "experiment": Experiment,
    "tracking": Tracking,
}


def load(path: str | Path = "params.yaml", overrides: tuple[str, ...] | list[str] = ()) -> Params:
    """Read and check params.yaml with `key.path=value` overrides.

    Raises UserError with every fault, one a line, each with its dotted path.
    """
    tree = _read(Path(path))
    for override in overrides:
        _override(tree, override)
    return check(tree, str(path))


def check(tree: dict, source: str = "params.yaml") -> Params:
    """Turn the plain tree of params.yaml into Params, or raise UserError with all faults."""
    tree = copy.deepcopy(tree)
    train, models, sweeps = tree.pop("train", None), tree.pop("models", None), tree.pop("sweeps", None)
    found: list[str] = []
    sections: dict[str, Any] = {}
    for name, kind in SECTIONS.items():
        sections[name] = _section(kind, tree.pop(name, None), name, found)
    found += [f"{key}: unknown key{nearest(str(key), ['train', 'models', 'sweeps', *SECTIONS])}" for key in tree]
    runs = _runs(train, models, found)
    searches = _sweeps(sweeps if sweeps is not None else {}, models, found)
    if found:
        raise UserError("\n".join(f"{source}: {line}" for line in dict.fromkeys(found)))
    return Params.model_construct(**sections, models=runs, sweeps=searches)


Kind = TypeVar("Kind", bound=Section)


def _section(kind: type[Kind], values: Any, name: str, found: list[str]) -> Kind | None:
    try:
        return kind.model_validate(values if values is not None else {})
    except ValidationError as error:
        found += faults(error, kind, name)
        return None


def _runs(train: Any, models: Any, found: list[str]) -> dict[str, RunConfig]:
    """One RunConfig per model; a fault in `train` is named there once, not once per model."""
    if not isinstance(train, dict) or not isinstance(models, dict) or not models:
        found.append("train and models: must be two tables of keys, with one model at least")
        return {}
    runs = {}
    alone: list[str] = []
    _section(RunConfig, {**train, "model": "", "options": {}}, "train", alone)
    # keys that do not fit together may yet be set apart by every model; a wrong value is wrong though all override it
    found += [line for line in alone if not line.startswith("train: ")]
    found += _name_faults({"loss": train.get("loss")}, None, "train")
    for name, own in models.items():
        prefix = f"models.{name}"
        if not isinstance(name, str) or not NAME.fullmatch(name):
            found.append(f"{prefix}: a model's name is made of letters, digits, _ and -; rename it")
            continue
        if not isinstance(own, dict):
            found.append(f"{prefix}: must be a table of keys")
            continue
        merged = merge(train, own)
        lines: list[str] = []
        run = _section(RunConfig, merged, prefix, lines)
        lines += _name_faults(merged, run, prefix)
        found += [_where(line, prefix, own, alone) for line in lines]
        if run is not None:
            runs[name] = run
    found += _chain_faults(runs, list(models))
    return runs


COMMANDS = ("run", "status", "apply")  # of `fer sweep`: no sweep can have their names


def _sweeps(sweeps: Any, models: Any, found: list[str]) -> dict[str, Sweep]:
    """One Sweep per entry. Whether its space fits the base is asked by those who use it, in `space_of`."""
    if not isinstance(sweeps, dict):
        found.append("sweeps: must be a table of sweeps")
        return {}
    checked = {}
    for name, own in sweeps.items():
        prefix = f"sweeps.{name}"
        if not isinstance(name, str) or not NAME.fullmatch(name) or name in COMMANDS:
            found.append(
                f"{prefix}: a sweep's name is made of letters, digits, _ and -, and is none of "
                f"{', '.join(COMMANDS)}; rename it"
            )
            continue
        sweep = _section(Sweep, own, prefix, found)
        if sweep is not None and isinstance(models, dict):
            if sweep.base not in models:
                found.append(
                    f"{prefix}.base: no model '{sweep.base}' in params.yaml{nearest(sweep.base, list(models))}"
                )
            checked[name] = sweep
    return checked


def space_of(params: Params, name: str) -> spaces.Space:
    """The space of a sweep. Raises UserError, a line for each fault: in it, or between the sweep and its base."""
    if name not in params.sweeps:
        raise UserError(f"sweeps.{name}: no such sweep in params.yaml{nearest(name, list(params.sweeps))}")
    sweep, prefix = params.sweeps[name], f"sweeps.{name}"
    base, found = params.models[sweep.base], []
    if base.init_from is not None:
        found.append(f"{prefix}.base: {sweep.base} starts from another run (init_from), trials cannot; name another")
    if sweep.grace_epochs > base.epochs:
        found.append(f"{prefix}.grace_epochs: {sweep.grace_epochs}, but the base has {base.epochs} epochs; lower it")
    elif sweep.scheduler in PROMOTING and 2 * sweep.grace_epochs > base.epochs:
        found.append(
            f"{prefix}.grace_epochs: {sweep.grace_epochs}, but no trial is stopped in the second half of the base's "
            f"{base.epochs} epochs; lower it or set scheduler to none"
        )
    if not sweep.space:
        found.append(f"{prefix}.space: holds no key to search; name one at least")
    space = spaces.read(sweep.space, base, f"{prefix}.space", run_faults, found)
    ranges = [key for key, dimension in space.items() if dimension.kind != "choice"]
    if sweep.search == "grid" and ranges:
        found.append(f"{prefix}.search: grid needs choices alone, {ranges[0]} has a range; use tpe or random")
    if sweep.scheduler == "pbt":
        if sweep.search != "random":
            found.append(f"{prefix}.search: pbt draws its first trials at random; set it to random")
        fixed = [key for key in space if key.split(".")[0] in spaces.NOT_ON_THE_WAY]
        found += [f"{prefix}.space.{key}: a running run cannot change it, as pbt needs; leave it out" for key in fixed]
    if found:
        raise UserError("\n".join(found))
    return space


def run_faults(tree: dict[str, Any]) -> list[str]:
    """What is wrong with the plain tree of one run."""
    lines: list[str] = []
    run = _section(RunConfig, tree, "run", lines)
    lines += _name_faults(tree, run, "run")
    return [line.removeprefix("run.").removeprefix("run: ") for line in lines]


def _chain_faults(runs: dict[str, RunConfig], names: list[str]) -> list[str]:
    """What is wrong with `init_from`: no such model, a circle, another backbone."""
    from fer.models import MODELS, backbones_of
    from fer.models.backbones import settings_of

    lines = []
    for name, run in runs.items():
        start, key = run.init_from, f"models.{name}.init_from"
        if start is None or run.model not in MODELS:
            continue
        if start not in names:
            lines.append(f"{key}: no model '{start}'{nearest(start, names)}")
            continue
        if start not in runs or runs[start].model not in MODELS:
            continue  # its own faults are named already
        chain = [name]
        while (after := runs[chain[-1]].init_from) in runs and after not in chain:
            chain.append(after)
        if after == name:
            lines.append(f"{key}: {' -> '.join([*chain, name])} is a circle; set one of them to null")
            continue
        try:
            ours, theirs = backbones_of(run).get("backbone"), backbones_of(runs[start]).get("backbone")
            same = bool(ours and theirs and ours.name == theirs.name and settings_of(ours) == settings_of(theirs))
        except (ValidationError, KeyError):  # named among the faults of that model
            continue
        if ours is None or theirs is None:
            lines.append(f"{key}: {name if ours is None else start} has no backbone; set it to null")
        elif not same:
            lines.append(f"{key}: {start} has another backbone ({theirs.name}); give both the same name and settings")
        elif ours.weights is not None:
            lines.append(f"models.{name}.options.backbone.weights: init_from gives them; set one to null")
    return lines


def _name_faults(merged: dict, run: RunConfig | None, prefix: str) -> list[str]:
    """Names that no table has, and options that the named model does not take."""
    from fer.losses import LOSSES
    from fer.models import MODELS, check_options

    loss, model = merged.get("loss"), merged.get("model")
    lines = []
    if isinstance(loss, str) and loss not in LOSSES:
        lines.append(f"{prefix}.loss: unknown loss '{loss}'{nearest(loss, list(LOSSES))}")
    if isinstance(model, str) and model not in MODELS:
        lines.append(f"{prefix}.model: unknown model '{model}'{nearest(model, list(MODELS))}")
    elif isinstance(model, str) and isinstance(merged.get("options"), dict):
        lines += check_options(model, merged["options"], run, prefix)
    return lines


def _where(line: str, prefix: str, own: dict, alone: list[str]) -> str:
    """Name the key where it stands in the file: under `train` when the model does not set it itself.

    Keys that do not fit together stand under `train` when they are among its faults `alone`.
    """
    whole = f"train{line.removeprefix(prefix)}"
    if line.startswith(prefix + ":") and whole in alone:
        return whole
    key = line.removeprefix(prefix + ".")
    path = key.split(":")[0].split(".")
    if key == line or not path[0].isidentifier():
        return line
    value: Any = own
    for part in path:
        if not isinstance(value, dict):  # a place in a list that the model sets as a whole
            return line
        if part not in value:
            return f"train.{key}" if path[0] not in ("model", "options") else line
        value = value[part]
    return line


def merge(base: dict, over: dict) -> dict:
    """`over` laid on `base`, table by table; `options` belongs to one model and is taken whole."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict) and key != "options"
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _read(path: Path) -> dict:
    try:
        tree = YAML(typ="safe", pure=True).load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run the command in the project's root folder") from None
    except (YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path}:{line} is not valid YAML: {problem}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds no keys; restore it with `git checkout {path}`")
    return _unshared(tree)


def _unshared(value: Any) -> Any:
    """A copy in which what YAML anchors and aliases share stands on its own, so that `--set` changes one place."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def _override(tree: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {override}: write it as key.path=value, for example --set train.lr=3e-4")
    try:
        value = YAML(typ="safe", pure=True).load(text) if text else None
    except YAMLError:
        raise UserError(f"--set {override}: the value is not valid YAML") from None
    *parents, last = key.strip().split(".")
    for part in parents:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise UserError(f"--set {override}: '{part}' is a value, not a table of keys")
    tree[last] = value


def add_model(path: str | Path, name: str, run: dict[str, Any], base: str, comment: str) -> None:
    """Write `run` (a RunConfig as plain values) into the file as models.<name>, after the other models.

    It holds what `base` sets and what differs from `train`; every other line stays as it is. Raises UserError when the
    name is taken, or the file is written in a way that leaves no place for it.
    """
    path = Path(path)
    tree = _read(path)
    if not NAME.fullmatch(name):
        raise UserError(f"--as {name}: a model's name is made of letters, digits, _ and -")
    if name in tree.get("models", {}):
        raise UserError(f"models.{name}: is in {path} already; give another name with --as")
    own = _own_keys(run, tree["train"], tree["models"].get(base, {}))
    text = _with_model(path.read_text(), name, own, comment)
    try:
        added = YAML(typ="safe", pure=True).load(text)
        fits = added == {**tree, "models": {**tree["models"], name: own}}
    except YAMLError:
        fits = False
    if not fits:
        raise UserError(f"{path}: `models:` is not written as a block of lines; write models.{name} by hand: {own}")
    if check(added, str(path)).models[name].model_dump() != run:
        raise UserError(f"{path}: `train` has changed since the sweep; change it back, or run the sweep again")
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def _own_keys(run: dict[str, Any], train: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """The keys of `run` that a model must set: those that `base` sets, in its order, and what differs from `train`."""
    own = {}
    for key in [*(key for key in base if key in run), *(key for key in run if key not in base)]:
        value, default = run[key], train.get(key)
        if key != "options" and isinstance(value, dict) and isinstance(default, dict):
            value = _own_keys(value, default, base.get(key, {}))
            if value:
                own[key] = value
        elif key in base or key == "options" or value != default:
            own[key] = value
    return own


def _with_model(text: str, name: str, own: dict[str, Any], comment: str) -> str:
    """The file's text with one more entry at the end of the block `models:`."""
    lines = text.splitlines(keepends=True)
    heads = [i for i, line in enumerate(lines) if re.match(r"[^\s#]", line)]
    first = next((i for i in heads if lines[i].startswith("models:")), len(lines) - 1)
    end = next((i for i in heads if i > first), len(lines))
    while end > first + 1 and (not lines[end - 1].strip() or lines[end - 1].startswith("#")):
        end -= 1  # blank lines and comments before the next section are its own
    indent = next((found[1] for line in lines[first + 1 : end] if (found := re.match(r"( +)[^\s#]", line))), "  ")
    writer, buffer = YAML(), io.StringIO()
    writer.width = 4096
    writer.dump({name: _compact(own)}, buffer)
    entry = [f"# {comment}\n", *buffer.getvalue().splitlines(keepends=True)]
    if not lines[end - 1].endswith("\n"):
        lines[end - 1] += "\n"
    return "".join([*lines[:end], "\n", *(indent + line for line in entry), *lines[end:]])


def _compact(value: Any) -> Any:
    """Lists, and tables of plain values, in one line."""
    if isinstance(value, list):
        short = CommentedSeq(map(_compact, value))
        short.fa.set_flow_style()
        return short
    if not isinstance(value, dict):
        return value
    table = CommentedMap((key, _compact(item)) for key, item in value.items())
    if not any(isinstance(item, dict) for item in value.values()):
        table.fa.set_flow_style()
    return table
