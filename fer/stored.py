"""JSON files read back. Each may have been cut, edited or written by another program: then it is one line."""

import json
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import ConfigDict, Field

from fer.errors import UserError
from fer.settings import Section, check

Count = Annotated[int, Field(ge=0)]


class Stored(Section):
    """What a file must hold for this code to read it; keys beside that are kept."""

    model_config = ConfigDict(extra="allow")


def read(kind: type[Stored], path: Path, remedy: str) -> dict[str, Any]:
    """The content of a JSON file.

    Raises FileNotFoundError if there is none, and UserError, naming the file and the `remedy`, if it cannot be read or
    does not hold what `kind` needs.
    """
    try:
        return checked(kind, json.loads(path.read_bytes(), parse_constant=_refuse), path, remedy)
    except NotADirectoryError as error:
        raise FileNotFoundError(*error.args) from None
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not valid JSON; {remedy}") from None


def read_lines(kind: type[Stored], path: Path, remedy: str) -> list[dict[str, Any]]:
    """The lines of a file, each a JSON table; [] if there is no file. Raises UserError as `read` does."""
    try:
        lines = path.read_bytes().splitlines()
        return [checked(kind, json.loads(line, parse_constant=_refuse), path, remedy) for line in lines]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: its lines are not valid JSON; {remedy}") from None


def checked(kind: type[Stored], content: Any, path: Path, remedy: str) -> dict[str, Any]:
    """`content` as it is, once it is known to be of `kind`. Raises UserError, naming `path`, if it is not."""
    faults = check(kind, content)[1]
    if faults:
        raise UserError(f"{path}: {faults[0]}; {remedy}")
    return content


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")
