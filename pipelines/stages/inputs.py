"""What DVC would stumble over in the data sets' files, said before it starts: `python -m pipelines.stages.inputs`."""

import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from fer.data.found import LINKED, check_path, is_own, printable
from fer.errors import UserError
from pipelines.data_sets import SETS, Prepared, load
from pipelines.params import load as load_params
from pipelines.stages import ended

NAMED = 3  # files that a message names
IGNORED = (  # as in .dvcignore
    ".DS_Store", "._*", "__MACOSX", "Thumbs.db", "ehthumbs.db", "desktop.ini", "$RECYCLE.BIN", ".Trash-*",
    ".ipynb_checkpoints",
)  # fmt: skip


def inputs() -> None:
    """Raise UserError for a data set that cannot be read: its settings, or a file of it that DVC would stumble over.

    That is a folder that is missing or holds links to nothing, unreadable files or unwritable names. DVC reads every
    file there before a stage runs, and speaks of these in its own words or, with --quiet, not at all.
    """
    params = load_params()
    found: list[str] = []
    for name in params.data:
        try:
            _check(load(params, name))
        except UserError as error:
            found += error.lines
    if found:
        raise UserError(*dict.fromkeys(found))


def _check(one: Prepared) -> None:
    if one.recipe.data.dataset == "sample":
        return
    if one.path.absolute() in (Path("data").absolute(), Path().absolute(), SETS.absolute()):
        raise UserError(
            f"params.yaml: data.{one.name}: {one.path} holds the outputs as well: name a folder of its own, as "
            "data/external"
        )
    check_path(one.path)
    faults: dict[str, list[str]] = {}
    for name in _files(one.path):
        if fault := _fault(name):
            faults.setdefault(fault, []).append(printable(name))
    if faults:
        raise UserError(*(_line(fault, names) for fault, names in faults.items()))


def _files(path: Path) -> Iterator[str]:
    """Every file and link that DVC looks at. It follows .dvcignore within the project alone."""
    ignored = IGNORED if _is_inside(path) else ()
    if not path.is_dir():
        yield str(path)
    for folder, folders, files in os.walk(path):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        folders[:] = sorted(name for name in folders if not _matches(name, ignored))
        for name in sorted([*files, *links]):
            if not _matches(name, ignored):
                yield os.path.join(folder, name)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_inside(path: Path) -> bool:
    return path.absolute().is_relative_to(Path().absolute())


def _fault(name: str) -> str | None:
    if not os.path.exists(name):
        return "is a link to nothing: delete it, or restore what it points to"
    if os.path.isdir(name) and is_own(os.path.basename(name)) and not _is_above(name):
        return LINKED
    if not (os.path.isfile(name) or os.path.isdir(name)):
        return "is no file, such as a named pipe, for which DVC would wait: delete it"
    if printable(name) != name and not _is_inside(Path(name)):
        return "has a name that is not UTF-8, which DVC cannot write outside of the project: rename it"
    if not os.access(name, os.R_OK):
        return "cannot be read: correct its permissions"
    return None


def _is_above(link: str) -> bool:
    """Whether a link leads to a folder that it lies in."""
    return Path(os.path.realpath(os.path.dirname(link))).is_relative_to(os.path.realpath(link))


def _line(fault: str, names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}: {fault}"


if __name__ == "__main__":
    ended(inputs)
