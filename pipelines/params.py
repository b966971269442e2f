"""The only reader of params.yaml: typed, checked as a whole before any work, all faults reported at once."""

import copy
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from fer.config import Positive, RunConfig, Section, faults, nearest
from fer.errors import UserError


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


class Params(Section):
    data: Data
    super_resolution: SuperResolution
    split: Split
    experiment: Experiment
    tracking: Tracking
    models: dict[str, RunConfig]  # `train` with each model's own keys laid over it

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
    train, models = tree.pop("train", None), tree.pop("models", None)
    found: list[str] = []
    sections: dict[str, Any] = {}
    for name, kind in SECTIONS.items():
        sections[name] = _section(kind, tree.pop(name, None), name, found)
    found += [f"{key}: unknown key{nearest(str(key), ['train', 'models', *SECTIONS])}" for key in tree]
    runs = _runs(train, models, found)
    if found:
        raise UserError("\n".join(f"{source}: {line}" for line in dict.fromkeys(found)))
    return Params.model_construct(**sections, models=runs)


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
