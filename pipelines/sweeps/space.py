"""The space of a sweep: which keys of a run vary in which ranges, and the run at a point drawn from it.

A range is a table with one key: {int | float | log: [low, high]}, {factor: [low, high]}, which multiplies the base's
number or all numbers of its table, or {choice: [...]}. A choice may hold tables, and these may hold ranges, so that a
loss brings its own settings: {choice: [{name: focal_pdls, gamma: {float: [0, 4]}}, label_smoothing]}.
"""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from fer.run import Run
from fer.settings import Fault, check, nearest
from pipelines.experiments import Layers
from pipelines.params import NAME

RANGES = ("int", "float", "log", "factor")
KINDS = (*RANGES, "choice")
HOW = "give one of {int: [low, high]}, {float: [low, high]}, {log: [low, high]}, {factor: [low, high]}, {choice: [...]}"
MOST = 100  # values of a choice, each of which is tried in the base before the search
NEVER = ("init_from", "teacher", "teacher_share", "seed", "epochs")  # not meant to be searched
Space = dict[str, Any]  # key of the run -> a range
Point = dict[str, Any]  # a point, as Optuna stores it: name of a range -> number, or label of a choice


class Draw(Protocol):
    """Source of a value for each range: a trial of Optuna, or known values (`Known`)."""

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """A number of an int range."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A number of a float, log or factor range."""

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        """A label of a choice."""


class Known:
    """Gives the values of a known point, and an end of the range, by `high`, for those that it lacks."""

    def __init__(self, params: Point, high: bool = False):
        self.params, self.high = params, high

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """See `Draw`."""
        return self.params.get(name, high if self.high else low)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """See `Draw`."""
        return self.params.get(name, high if self.high else low)

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        """See `Draw`."""
        return self.params.get(name, choices[-1 if self.high else 0])


def changed(base: Run, space: Space, draw: Draw) -> tuple[Run | None, list[Fault]]:
    """The base run with the values of a drawn point, or None and why they do not fit together."""
    whole = base.model_dump()
    layers = Layers(Run, whole)
    for key, given in space.items():
        value = _drawn(given, key, draw, _find(whole, key))
        for part in reversed(key.split(".")):
            value = {part: value}
        layers.lay(value, "")
    return check(Run, layers.tree)


def _drawn(given: Any, name: str, draw: Draw, base: Any = None) -> Any:
    kind, values = _range(given)
    if kind is None:
        table = isinstance(given, dict)
        return {key: _drawn(value, f"{name}.{key}", draw) for key, value in given.items()} if table else given
    if kind == "choice":
        labels = _labels(values)
        place = labels.index(draw.suggest_categorical(name, labels))
        return _drawn(values[place], _below(name, labels, place), draw)
    if kind == "int":
        return draw.suggest_int(name, *values)
    drawn = draw.suggest_float(name, *values, log=kind == "log")
    value = drawn if drawn == base else _rounded(drawn, *values)  # the base's own value is left as it is
    return _times(base, value) if kind == "factor" else value


def _range(given: Any) -> tuple[str | None, Any]:
    """Kind and values of a range; the kind is None for a plain value or a table of keys."""
    if isinstance(given, dict) and len(given) == 1:
        ((kind, values),) = given.items()
        if kind in KINDS:
            return kind, values
    return None, given


def _labels(values: list[Any]) -> list[Any]:
    """Labels of choices: a section's name if it is unique, the JSON of any other table or list, else the value."""
    names = [value.get("name") for value in values if isinstance(value, dict)]

    def label(value: Any) -> Any:
        name = value.get("name") if isinstance(value, dict) else None
        if name is not None and (len(value) == 1 or names.count(name) == 1):
            return name
        return json.dumps(value, default=str) if isinstance(value, dict | list) else value

    return [label(value) for value in values]


def _below(name: str, labels: list[Any], place: int) -> str:
    """Prefix for ranges inside a choice, as in `loss.focal.gamma`; a choice without a name goes by its number."""
    label = labels[place]
    return f"{name}.{label}" if isinstance(label, str) and NAME.fullmatch(label) else f"{name}.{place + 1}"


def _rounded(value: float, low: float, high: float) -> float:
    """Round to four significant digits, within the range, to be readable."""
    return min(max(float(f"{value:.4g}"), low), high)


def params_of(base: Run, space: Space) -> Point:
    """The point that leaves the base as it is. Raises KeyError with a key of the space that cannot."""
    whole = base.model_dump()
    params: Point = {}
    for key, given in space.items():
        found = _params(given, key, _find(whole, key))
        if found is None:
            raise KeyError(key)
        params |= found
    return params


def _params(given: Any, name: str, value: Any) -> Point | None:
    """The params below `name` that give `value`; None if there are none."""
    kind, values = _range(given)
    if kind == "factor":
        return {name: 1.0} if values[0] <= 1 <= values[1] else None
    if kind in RANGES:
        return {name: value} if _is_number(value) and values[0] <= value <= values[1] else None
    if kind == "choice":
        labels = _labels(values)
        for place, choice in enumerate(values):
            below = _params(choice, _below(name, labels, place), value)
            if below is not None:
                return {name: labels[place], **below}
        return None
    if not isinstance(given, dict):
        return {} if given == value else None
    if not isinstance(value, dict) or not given.keys() <= value.keys():
        return None
    found = [_params(inner, f"{name}.{key}", value[key]) for key, inner in given.items()]
    return None if None in found else _joined(found)  # type: ignore[arg-type]


def grid(space: Space) -> Iterator[Point]:
    """Yield every point of a space of choices, which may hold further choices, but no ranges."""
    for parts in itertools.product(*(_points(given, key) for key, given in space.items())):
        yield _joined(parts)


def _points(given: Any, name: str) -> list[Point]:
    kind, values = _range(given)
    if kind == "choice":
        labels = _labels(values)
        below = [_points(value, _below(name, labels, place)) for place, value in enumerate(values)]
        return [{name: label, **point} for label, points in zip(labels, below) for point in points]
    inner = given.items() if isinstance(given, dict) else ()
    return [_joined(parts) for parts in itertools.product(*(_points(value, f"{name}.{key}") for key, value in inner))]


def _joined(parts: Iterable[Point]) -> Point:
    return {name: value for part in parts for name, value in part.items()}


def size(given: Any) -> int:
    """The number of points of such a space, or of a part of it."""
    kind, values = _range(given)
    if kind == "choice":
        return sum(map(size, values))
    return math.prod(map(size, given.values())) if isinstance(given, dict) else 1


def ranges(given: Any, name: str) -> list[str]:
    """Names of the ranges in it that are not choices."""
    kind, values = _range(given)
    if kind in RANGES:
        return [name]
    inner = values if kind == "choice" else list(given.values()) if isinstance(given, dict) else []
    return [found for value in inner for found in ranges(value, name)]


def read(given: dict[str, Any], base: Run, where: Mapping[str, str], found: list[str]) -> Space:
    """The space given for a sweep; appends one line per mistake to `found`, with what `where` has for its key first."""
    space: Space = {}
    whole = base.model_dump()
    for key, value in given.items():
        line = _form_fault(value) or _key_fault(whole, str(key), value)
        if line:
            found.append(f"{where[key]}.{key}: {line}")
            continue
        one = {key: _sections(value) if isinstance(_find(whole, key), dict) else value}
        lines = _value_faults(base, one)
        found += [f"{where[key]}.{key}: {line}" for line in lines[:1]]
        if not lines:
            space |= one
    found += _base_faults(space, base, where) + _overlaps(space, where)
    return space


def _sections(given: dict[str, Any]) -> dict[str, Any]:
    """Expand names among the choices of a section to tables with that name."""
    kind, values = _range(given)
    if kind != "choice":
        return given
    return {kind: [{"name": value} if isinstance(value, str) else value for value in values]}


def _form_fault(given: Any) -> str | None:
    """What is wrong with a range, or with one inside its choices."""
    if not isinstance(given, dict) or len(given) != 1:
        return HOW
    ((kind, values),) = given.items()
    if kind not in KINDS:
        return f"unknown kind of range '{kind}'; {HOW}"
    if not isinstance(values, list):
        return f"{kind} needs a list, got {values!r}"
    if kind == "choice":
        if len(values) < 2:
            return f"choice needs at least two values, got {values}"
        if len(values) > MOST:
            return f"choice has {len(values):,} values, {MOST} at most; use a range"
        inner = [part for value in values for part in _inside(value)]
        faults = [_form_fault(part) for part in inner]
        faults += ["a factor cannot be inside a choice" for part in inner if _range(part)[0] == "factor"]
        return next(filter(None, faults), None)
    if len(values) != 2 or not all(_is_number(value) for value in values):
        return f"{kind} needs two numbers, [low, high], got {values}"
    low, high = values
    if low >= high:
        return f"the range [{low}, {high}] is empty; low must be below high"
    if kind == "log" and low <= 0:
        return f"a log range must start above 0, got {low}"
    if kind == "factor" and low < 0:
        return f"a factor must not be negative, got {low}"
    if kind == "int" and not all(isinstance(value, int) for value in values):
        return f"int needs whole numbers, got {values}"
    return None


def _inside(given: Any) -> Iterator[Any]:
    """The outermost ranges in a value of a choice: itself, or those in its table."""
    if _range(given)[0] is not None:
        yield given
    elif isinstance(given, dict):
        for value in given.values():
            yield from _inside(value)


def _key_fault(tree: dict[str, Any], key: str, given: dict[str, Any]) -> str | None:
    """What is wrong with a key: it is unknown, cannot be searched, or does not have the type of the range."""
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


def _value_faults(base: Run, one: Space) -> list[str]:
    """What is wrong with a choice or with the ends of a range, each set alone in the base."""
    ((key, given),) = one.items()
    kind, values = _range(given)
    if kind != "choice":
        ends = [(values[0], Known({})), (values[1], Known({}, high=True))]
    else:
        labels = _labels(values)
        twice = [label for i, label in enumerate(labels) if label in labels[:i]]
        if twice:
            return [f"{twice[0]!r} is twice in the choices"]
        ends = [(label, Known({key: label}, high)) for label in labels for high in (False, True)]
    return [f"{value!r} cannot work: {fault}" for value, draw in ends for fault in changed(base, one, draw)[1]]


def _base_faults(space: Space, base: Run, where: Mapping[str, str]) -> list[str]:
    """The space must contain the base, which is the first trial."""
    lines = []
    for key, given in space.items():
        try:
            params_of(base, {key: given})
        except KeyError:
            value = 1 if "factor" in given else _find(base.model_dump(), key)
            remedy = "add it to the choices" if "choice" in given else "widen the range or use choice"
            has = f"does not contain the base's {value!r}, which is the first trial; {remedy}"
            lines.append(f"{where[key]}.{key}: {has}")
    return lines


def _overlaps(space: Space, where: Mapping[str, str]) -> list[str]:
    """No value may be set by two keys of the space."""
    lines = []
    for one, other in itertools.combinations(space, 2):
        pairs = itertools.product(_set_by(one, space), _set_by(other, space))
        both = [max(pair, key=len) for pair in pairs if _within(*pair)]
        if both:
            lines.append(f"{where[other]}.{other}: {min(both)} is set by {one} too; leave one of them out")
    return lines


def _within(path: str, other: str) -> bool:
    return path == other or path.startswith(f"{other}.") or other.startswith(f"{path}.")


def _set_by(key: str, space: Space) -> set[str]:
    """Dotted keys that a range sets; a whole section if it chooses among names."""

    def ends(value: Any, path: str) -> set[str]:
        if not isinstance(value, dict) or "name" in value or _range(value)[0] is not None:
            return {path}
        return set().union(*(ends(item, f"{path}.{name}") for name, item in value.items()))

    kind, values = _range(space[key])
    return set().union(*(ends(value, key) for value in values)) if kind == "choice" else {key}


def _find(tree: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def _times(value: Any, factor: float) -> Any:
    """Multiply every number but `flip`, as a larger probability of mirroring is not a stronger augmentation."""
    if isinstance(value, dict):
        return {key: item if key == "flip" else _times(item, factor) for key, item in value.items()}
    return value if factor == 1 else float(f"{value * factor:.4g}")


def _floats(value: Any) -> bool:
    return all(map(_floats, value.values())) if isinstance(value, dict) else isinstance(value, float)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
