"""params.yaml: where the data of a project are, machine and tracking. Checked before any work, all errors at once."""

import io
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import YAMLError
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from fer.errors import UserError, first_line
from fer.resources import Resources
from fer.settings import Fault, Positive, Section, Unfit, check, nearest

DEEPEST, MOST = 30, 100_000  # levels and values of a settings file
LONGEST = 200  # letters of a value in a message
# what ruamel raises on values that are none of their tag, such as `!!int x` or the date 2001-99-99
WRONG = (YAMLError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")  # of a data set or an experiment: it becomes part of a folder's name
Points = Annotated[float, Field(ge=0, le=100)]


class Upscaling(Section):
    """Where this machine enlarges images, and has the weights for it."""

    weights: str
    """DIC_HELEN.pth or its folder; a model folder of Swin2SR, else it comes from the hub."""
    device: Literal["auto", "cpu", "cuda"]
    workers: Positive
    """Processes, each with a GPU if there is one; more than one run on Ray."""


class Promotion(Section):
    """What a run must show on val to become champion."""

    margin: float | Literal["significant"] = 0.0
    """Points of val accuracy above the champion; significant: an exact McNemar test with p < .05."""
    uar_drop: Points | None = 5.0
    """Points of UAR on val that it may lose; null: any."""
    ece_rise: Points | None = None
    """Points of calibration error (ECE) on val that it may gain; null: any, as a temperature mends it."""

    @field_validator("margin", mode="before")
    @classmethod
    def _is_margin(cls, value: Any) -> Any:
        points = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 100
        if not points and value != "significant":
            raise Unfit([Fault("", f"should be points from 0 to 100, or significant, got {value!r}")])
        return value


class Tracking(Section):
    """Where MLflow stores runs."""

    uri: Annotated[str, Field(min_length=1, max_length=1000)]
    experiment: Annotated[str, Field(min_length=1, max_length=250, pattern=r"^[^\x00-\x1f]+$")]
    promotion: Promotion = Promotion()
    """When a recorded run becomes champion."""


PLAIN = "/._-+=@,~"  # beside letters and digits, what the path of a project may hold


class Params(Section):
    """The content of params.yaml."""

    data: dict[str, str]
    """Name of a data set -> where its publisher's files are; the first is the one that runs take unless told."""
    super_resolution: Upscaling
    resources: Resources = Resources()
    """Where runs compute on this machine, unless an experiment sets it."""
    tracking: Tracking

    @field_validator("data", mode="before")
    @classmethod
    def _has_names(cls, data: Any) -> Any:
        if not data:
            raise Unfit([Fault("", "names no data set: add NAME: FOLDER")])
        for name, files in data.items() if isinstance(data, dict) else ():
            if not isinstance(name, str) or not NAME.fullmatch(name):
                rule = "made of up to 100 letters, digits, _ and -"
                got = repr(name[:LONGEST]) if isinstance(name, str) else f"{name!r}; write it in quotes"
                raise Unfit([Fault("", f"a data set's name is {rule}, got {got}")])
            if not isinstance(files, str) or not files:
                raise Unfit([Fault(name, f"should be where its files are, a path, got {files!r}")])
        return data

    def chosen(self, name: str | None, asks: str = "data") -> str:
        """The data set of that name, or the first without one. Raises UserError, begun with `asks`, for an unknown."""
        if name is not None and name not in self.data:
            raise UserError(f"{asks}: params.yaml has no data set {name!r} under data{nearest(name, list(self.data))}")
        return name or next(iter(self.data))


def load(path: str | Path = "params.yaml") -> Params:
    """Read and check params.yaml. Raises UserError with one line per mistake, each with its dotted path.

    And if the project lies where the frameworks cannot work.
    """
    _check_place(Path.cwd())
    tree = read_yaml(Path(path), f"restore it with `git checkout {path}`")
    params, faults = check(Params, tree)
    if params is None:
        raise UserError(*(f"{path}: {fault}" for fault in faults))
    return params


def _check_place(folder: Path) -> None:
    """Raises UserError for a path that shells and the addresses of databases read otherwise.

    Ray would wait for ever, or MLflow and Prefect keep their databases outside the project.
    """
    odd = [character for character in str(folder) if not character.isalnum() and character not in PLAIN]
    if odd:
        raise UserError(
            f"{str(folder)!r}: Ray, MLflow and Prefect cannot work in a folder with {odd[0]!r} in its path; move the "
            f"project to one with letters, digits and {PLAIN} alone"
        )


def machine(params: Params) -> dict[str, Any]:
    """The `resources` that params.yaml sets explicitly, as plain values."""
    return params.resources.model_dump(exclude_unset=True)


def read_yaml(path: Path, remedy: str) -> dict[str, Any]:
    """The table of keys in a YAML file. Raises UserError if the file is missing or holds anything else."""
    text = read_text(path)
    try:
        tree = _parsed(text)
    except NotYaml as error:
        raise UserError(f"{path}:{error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds no keys; {remedy}")
    return tree


def read_text(path: Path) -> str:
    """The text of a settings file. Raises UserError if it is missing or no text."""
    if path.is_fifo() or path.is_char_device():  # to read it may take for ever
        raise UserError(f"{path}: cannot be read (Not a regular file)")
    try:
        return path.read_text()
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run the command in the project's root folder") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: is not valid YAML: {error}") from None


def parse_value(text: str, change: str) -> Any:
    """The value of `change`, which is `key=value`, parsed as YAML. Raises UserError if it is not valid."""
    try:
        return _parsed(text) if text else None
    except NotYaml as error:
        shown = change if len(change) <= LONGEST else f"{change[:LONGEST]}..."
        reason = " is not valid YAML" if "valid YAML" in str(error) else error
        raise UserError(f"{shown}: the value{reason}") from None


class NotYaml(ValueError):
    """Raised for a text that holds no settings; the message is to follow `FILE:`."""


def _parsed(text: str) -> Any:
    """The value of a YAML text. Raises NotYaml, whatever is wrong with it."""
    try:
        tree = YAML(typ="safe", pure=True).load(text)
    except RecursionError:
        raise NotYaml(f" is nested more than {DEEPEST} levels deep") from None
    except WRONG as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise NotYaml(f"{line} is not valid YAML: {getattr(error, 'problem', None) or first_line(error)}") from None
    _check_plain(tree)
    return tree


def _check_plain(tree: Any) -> None:
    """Raises NotYaml unless a tree ends, and its texts and numbers can be written anywhere."""
    waiting = [(tree, 0)]
    for _ in range(MOST):
        if not waiting:
            return
        value, depth = waiting.pop()
        if depth > DEEPEST:
            raise NotYaml(f" is nested more than {DEEPEST} levels deep, or refers to itself")
        if isinstance(value, dict):
            waiting += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, list | tuple | set):
            waiting += [(part, depth + 1) for part in value]
        elif isinstance(value, int) and value.bit_length() > 64:
            raise NotYaml(" holds a number of more than 64 bits")
        elif isinstance(value, str) and not value.isprintable() and value != value.encode(errors="ignore").decode():
            raise NotYaml(f" holds {value[:LONGEST]!r}, which is no text")
    raise NotYaml(f" holds more than {MOST} values")


def yaml_of(tree: dict[str, Any]) -> str:
    """`tree` as YAML; each list, and each table of plain values below the top level, on one line."""
    writer, buffer = YAML(), io.StringIO()
    writer.width = 4096
    writer.dump({key: _compact(value) for key, value in tree.items()}, buffer)
    return buffer.getvalue()


def _compact(value: Any) -> Any:
    if isinstance(value, str):  # a plain string that begins with ? or : may be read as a key or a value without one
        return DoubleQuotedScalarString(value) if value.startswith(("?", ":")) else value
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
