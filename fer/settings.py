"""Checked settings: typed sections, sections chosen by name, and faults that name their key."""

import difflib
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema

# Limits far beyond what is of use, so that a slip is told at once and not by a worker that runs out of memory
Natural = Annotated[int, Field(ge=0, le=10**6)]
Positive = Annotated[int, Field(gt=0, le=10**6)]
Width = Annotated[int, Field(gt=0, le=2**14)]  # of a layer
# of convolutions; with fewer, gradients of 1x1 ones with a stride corrupt memory (torch 2.13, channels last, AVX2)
Channels = Annotated[int, Field(ge=8, le=2**14)]
Depth = Annotated[int, Field(gt=0, le=1000)]  # a number of layers
Side = Annotated[int, Field(gt=0, le=2**12)]  # of an image, in pixels
Scale = Annotated[float, Field(gt=0, le=16)]  # of the widths of a published network
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what every generator of random numbers takes
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
_SHORT = reprlib.Repr()  # a value in a message
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100
_SHORT.maxlist = _SHORT.maxdict = 10


class Section(BaseModel):
    """A frozen group of keys. Unknown keys are rejected, and no types are converted.

    The line under a field gives its meaning and unit; `fer config` shows it.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )


class OneOf:
    """Annotates a field that holds one of several sections, chosen by `name`: `Annotated[Base, OneOf(TABLE)]`."""

    def __init__(self, table: Mapping[str, type[Section]]):
        self.table = table

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        kinds: Any = Union[tuple(self.table.values())]  # noqa: UP007, of a tuple
        return handler.generate_schema(Annotated[kinds, Field(discriminator="name")])


@dataclass(frozen=True)
class Fault:
    """What is wrong with one key: its dotted path, and a message with the remedy."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message

    def under(self, prefix: str) -> "Fault":
        """The same fault, for a section at `prefix`."""
        return Fault(".".join(part for part in (prefix, self.path) if part), self.message)


class Unfit(ValueError):
    """Raised by a section's validator for keys that are valid on their own but not together."""

    def __init__(self, faults: list[Fault]):
        super().__init__("; ".join(map(str, faults)))
        self.faults = faults


Kind = TypeVar("Kind", bound=Section)


def check(kind: type[Kind], tree: Any) -> tuple[Kind | None, list[Fault]]:
    """The section that a plain tree describes and no faults, or None and all of its faults."""
    try:
        return kind.model_validate(tree), []
    except ValidationError as error:
        return None, list(_faults(error, kind))


def table_of(section: type[Section], key: str) -> Mapping[str, type[Section]]:
    """The sections that the field `key` chooses from by name; empty for any other field."""
    field = section.model_fields.get(key)
    return next((one.table for one in (field.metadata if field else ()) if isinstance(one, OneOf)), {})


def section_at(section: type[Section], key: str, value: Any) -> type[Section] | None:
    """The class of the section at `key` with this value; None if there is no section."""
    table = table_of(section, key)
    if table:
        return table.get(str(value.get("name"))) if isinstance(value, dict) else None
    field = section.model_fields.get(key)
    annotation = field.annotation if field else None
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def differing(section: Section) -> dict[str, Any]:
    """The plain values that differ from the defaults; a named section keeps its `name` if anything in it differs."""
    found: dict[str, Any] = {}
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if key == "name" or value == field.get_default(call_default_factory=True):
            continue
        found[key] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, Section):
        return value
    return ({"name": value.name} if hasattr(value, "name") else {}) | differing(value)


def nearest(word: str, known: list[str]) -> str:
    """The end of a message about an unknown name: `, did you mean 'x'?`, or the list of known names."""
    match = [name for name in known if word and name.startswith(word)] or difflib.get_close_matches(word, known, n=1)
    return f", did you mean '{match[0]}'?" if match else f"; known: {', '.join(sorted(known))}"


def _faults(error: ValidationError, kind: type[Section]) -> Iterator[Fault]:
    for fault in error.errors():
        path, section = _place(kind, fault["loc"])
        if fault["type"] == "value_error" and isinstance(fault["ctx"]["error"], Unfit):
            yield from (inner.under(path) for inner in fault["ctx"]["error"].faults)
        elif fault["type"] == "extra_forbidden":
            yield Fault(path, f"unknown key{_known_in(section, str(fault['loc'][-1]))}")
        elif fault["type"] == "union_tag_invalid":
            known = list(table_of(section, str(fault["loc"][-1])))
            word = str(fault["ctx"]["tag"])
            yield Fault(f"{path}.name", f"unknown {path.rpartition('.')[2]} '{word}'{nearest(word, known)}")
        elif fault["type"] == "union_tag_not_found":
            yield Fault(f"{path}.name", "missing")
        elif fault["type"] == "missing":
            yield Fault(path, "missing")
        elif fault["type"] in ("model_type", "dict_type", "model_attributes_type"):
            yield Fault(path, f"should be a table of keys, got {_SHORT.repr(fault['input'])}")
        else:
            got = "" if isinstance(fault["input"], dict) else f", got {_SHORT.repr(fault['input'])}"
            yield Fault(path, fault["msg"].removeprefix("Input ").removeprefix("String ").removeprefix("List ") + got)


def _place(kind: type[Section], loc: tuple[int | str, ...]) -> tuple[str, type[Section]]:
    """The dotted path of a pydantic location, and the section that holds its last key."""
    path: list[str] = []
    section = kind
    table: Mapping[str, type[Section]] = {}
    for number, part in enumerate(loc):
        if part in table:  # pydantic names the chosen section in between
            section, table = table[str(part)], {}
            continue
        path.append(str(part))
        table = table_of(section, str(part))
        inner = section_at(section, str(part), None)
        if inner is not None and number + 1 < len(loc):
            section = inner
    return ".".join(path), section


def _known_in(section: type[Section], word: str) -> str:
    name = section.model_fields["name"].default if "name" in section.model_fields else None
    known = [key for key in section.model_fields if key != "name"]
    if isinstance(name, str):
        return f" of '{name}'{nearest(word, known)}" if known else f": '{name}' has no keys"
    return nearest(word, known)


def name_of(section: type[Section]) -> str:
    """The name by which a section is chosen: the default of its key `name`."""
    (name,) = get_args(section.model_fields["name"].annotation)
    return name


def by_name(*sections: type[Kind]) -> dict[str, type[Kind]]:
    """A table of sections by name."""
    return {name_of(section): section for section in sections}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"augment": {"flip": .5}} -> {"augment.flip": .5}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
