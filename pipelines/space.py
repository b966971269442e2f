"""The space of a sweep: which keys of a run vary, within what, and the run that a point of it gives."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fer.run import Run
from fer.settings import Fault, Section, check, nearest, section_at
from pipelines.experiments import Layers

RANGES = ("int", "float", "log", "factor")
HOW = "give one of {int: [low, high]}, {float: [low, high]}, {log: [low, high]}, {factor: [low, high]}, {choice: [...]}"
NEVER = ("init_from", "seed", "epochs")  # not what a search is for
Point = dict[str, Any]  # key -> number, or the label of a choice


@dataclass(frozen=True)
class Dimension:
    """One key and its values: `values` are (low, high) of a range, or the choices."""

    key: str
    kind: str  # int | float | log | factor | choice
    values: tuple[Any, ...]

    @property
    def labels(self) -> list[Any]:
        """The choices as plain values: a section by its name, another table or list as its JSON."""
        return [_label(value) for value in self.values]

    def value(self, label: Any, base: Any) -> Any:
        """What a point's label stands for, where the base has `base`."""
        if self.kind == "choice":
            return self.values[self.labels.index(label)]
        return _times(base, label) if self.kind == "factor" else label

    def round(self, value: Any) -> Any:
        """Four digits are enough, and can be read; within the range."""
        if self.kind in ("int", "choice"):
            return value
        return min(max(float(f"{value:.4g}"), self.values[0]), self.values[1])


Space = dict[str, Dimension]


def _label(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"name"}:
        return value["name"]
    return json.dumps(value) if isinstance(value, dict | list) else value


def changed(base: Run, space: Space, point: Point) -> tuple[Run | None, list[Fault]]:
    """The base run with a point's values, or None and why they do not fit together.

    A key that the section chosen by another one of them does not have has no meaning there, and is left out.
    """
    whole = base.model_dump()
    layers = Layers(Run, whole)
    for key in sorted(point, key=_order):
        if _has(layers.tree, key):
            value = space[key].value(point[key], _find(whole, key))
            for part in reversed(key.split(".")):
                value = {part: value}
            layers.lay(value, "")
    return check(Run, layers.tree)


def _order(key: str) -> tuple[int, bool]:
    """A section comes before its keys, and its name first of all: another name starts it anew."""
    return key.removesuffix(".name").count("."), not key.endswith(".name")


def _has(tree: dict[str, Any], key: str) -> bool:
    kind: type[Section] | None = Run
    for part in key.split("."):
        if kind is None or part not in kind.model_fields:
            return False
        tree = tree.get(part) if isinstance(tree, dict) else {}  # type: ignore[assignment]
        kind = section_at(kind, part, tree)
    return True


def published(base: Run, space: Space) -> Point:
    """The point that leaves the base as it is; KeyError names a dimension that has none."""
    whole = base.model_dump()
    point = {}
    for key, dimension in space.items():
        value = 1.0 if dimension.kind == "factor" else _find(whole, key)
        if dimension.kind == "choice":
            same = [i for i, choice in enumerate(dimension.values) if _over(value, choice) == value]
            if not same:
                raise KeyError(key)
            point[key] = dimension.labels[same[0]]
        elif not _is_number(value) or not dimension.values[0] <= value <= dimension.values[1]:
            raise KeyError(key)
        else:
            point[key] = value
    return point


def fixed_on_the_way(key: str) -> bool:
    """Whether a run that has begun cannot change it and go on."""
    return key in ("optimizer", "optimizer.name") or key.split(".")[0] in ("model", "input", "ema_decay")


def grid(space: Space) -> Iterator[Point]:
    """Every point of a space of choices."""
    for labels in itertools.product(*(dimension.labels for dimension in space.values())):
        yield dict(zip(space, labels))


def read(space: dict[str, Any], base: Run, prefix: str, found: list[str]) -> Space:
    """The dimensions of `space`; what is wrong with them goes to `found`, a line for each key."""
    dimensions: Space = {}
    for key, given in space.items():
        where = f"{prefix}.{key}"
        line = _form_fault(given) or _key_fault(base.model_dump(), str(key), given)
        if line:
            found.append(f"{where}: {line}")
            continue
        ((kind, values),) = given.items()
        if isinstance(_find(base.model_dump(), key), dict):  # a name is short for a table of it alone
            values = [{"name": value} if isinstance(value, str) else value for value in values]
        dimension = Dimension(key, kind, tuple(values))
        if kind == "choice" and (twice := _twice(dimension.labels)):
            found.append(f"{where}: {twice[0]!r} stands in the choices twice")
            continue
        faults = [
            f"{where}: {value!r} cannot work: {line}"
            for value in dimension.labels
            for line in changed(base, {key: dimension}, {key: value})[1]
        ]
        found += faults[:1]
        if not faults:
            dimensions[key] = dimension
    found += _base_faults(dimensions, base, prefix) + _overlaps(dimensions, prefix)
    return dimensions


def _form_fault(given: Any) -> str | None:
    if not isinstance(given, dict) or len(given) != 1:
        return HOW
    ((kind, values),) = given.items()
    if kind not in (*RANGES, "choice"):
        return f"no kind of range '{kind}'; {HOW}"
    if not isinstance(values, list):
        return f"{kind} needs a list, got {values!r}"
    if kind == "choice":
        return f"choice needs two values at least, got {values}" if len(values) < 2 else None
    if len(values) != 2 or not all(_is_number(value) for value in values):
        return f"{kind} needs two numbers, [low, high], got {values}"
    low, high = values
    if low >= high:
        return f"the range [{low}, {high}] is empty; low must be below high"
    if kind == "log" and low <= 0:
        return f"a log range must begin above 0, got {low}"
    if kind == "factor" and low < 0:
        return f"a factor must not be negative, got {low}"
    if kind == "int" and not all(isinstance(value, int) for value in values):
        return f"int needs whole numbers, got {values}"
    return None


def _twice(labels: list[Any]) -> list[Any]:
    return [label for i, label in enumerate(labels) if label in labels[:i]]


def _key_fault(tree: dict[str, Any], key: str, given: dict[str, Any]) -> str | None:
    """Whether the key is there, may be searched, and has the type of the range."""
    at: Any = tree
    for part in key.split("."):
        if not isinstance(at, dict):
            return "unknown key; a value has no keys below it"
        if part not in at:
            return f"unknown key{nearest(part, [str(name) for name in at])}"
        at = at[part]
    if key in ("model", "model.name") or key.split(".")[0] in NEVER:
        return "this key cannot be searched; set it in the base"
    (kind,) = given
    if kind == "int" and (not isinstance(at, int) or isinstance(at, bool)):
        return f"an int range, but the base has {at!r}; use {_kinds_for(at)}"
    if kind in ("float", "log") and not isinstance(at, float):
        return f"a {kind} range, but the base has {at!r}; use {_kinds_for(at)}"
    if kind == "factor" and not _floats(at):
        return f"a factor needs a fraction or a table of them, the base has {at!r}; use {_kinds_for(at)}"
    return None


def _kinds_for(value: Any) -> str:
    if isinstance(value, float):
        return "float or log"
    return "int" if _is_number(value) else "choice"


def _base_faults(space: Space, base: Run, prefix: str) -> list[str]:
    """The first trial is the base, so the space must hold it."""
    lines = []
    for key, dimension in space.items():
        try:
            published(base, {key: dimension})
        except KeyError:
            value = 1 if dimension.kind == "factor" else _find(base.model_dump(), key)
            lines.append(
                f"{prefix}.{key}: does not hold the base's {value!r}, which is the first trial; "
                f"{'add it to the choices' if dimension.kind == 'choice' else 'widen the range or use choice'}"
            )
    return lines


def _overlaps(space: Space, prefix: str) -> list[str]:
    """No value may be set by two dimensions."""
    lines = []
    for one, other in itertools.combinations(space, 2):
        both = {path for path in _paths(space[one]) if any(_within(path, end) for end in _paths(space[other]))}
        if both:
            lines.append(f"{prefix}.{other}: {min(both)} is set by {one} too; leave one of them out")
    return lines


def _within(path: str, other: str) -> bool:
    return path == other or path.startswith(f"{other}.") or other.startswith(f"{path}.")


def _paths(dimension: Dimension) -> set[str]:
    def ends(value: Any, path: str) -> set[str]:
        if not isinstance(value, dict):
            return {path}
        return set().union(*(ends(item, f"{path}.{name}") for name, item in value.items()))

    return set().union(*(ends(value, dimension.key) for value in dimension.values))


def _find(tree: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def _over(old: Any, new: Any) -> Any:
    """`new`, laid over `old` where both are tables."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    return {**old, **{key: _over(old.get(key), value) for key, value in new.items()}}


def _times(value: Any, factor: float) -> Any:
    """Every number times `factor`, but for `flip`: a mirror image is not a stronger change."""
    if isinstance(value, dict):
        return {key: item if key == "flip" else _times(item, factor) for key, item in value.items()}
    return value if factor == 1 else float(f"{value * factor:.4g}")


def _floats(value: Any) -> bool:
    return all(map(_floats, value.values())) if isinstance(value, dict) else isinstance(value, float)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
