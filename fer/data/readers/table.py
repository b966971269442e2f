"""A table of pictures, csv or parquet: a row a face, with its path and a label, or a column of votes for each class."""

import io
import posixpath
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from fer.data.decode import Box
from fer.data.found import Entry, Found, joined, one_of, printable
from fer.data.labels import NO_EMOTION, USAGES, emotion
from fer.data.picture_files import Pictures
from fer.data.readers.folders import in_order
from fer.data.rows import header, table, whole
from fer.data.source import (
    Face,
    Source,
    Wanted,
    check_classes,
    check_names,
    left_over,
    names_of,
    of_faces,
    subjects_of,
)  # fmt: skip
from fer.errors import UserError

COLUMNS = {  # what a column is -> its possible names
    "path": ("path", "file", "filename", "file_name", "image", "image_path", "filepath", "pth"),
    "label": ("label", "emotion", "expression", "class"),
    "split": ("split", "usage", "set", "partition"),
    "subject": ("subject", "subject_id", "person"),
    "box": ("box", "bbox"),
}
INDEX = re.compile(r"|unnamed: \d+|__index_level_\d+__", re.IGNORECASE)  # names that pandas gives to the rows' numbers
NOT_A_NUMBER = ("nan", "<na>")  # what pandas writes for a missing value that was made text
MOST = 8  # columns named in a message
REMEDY = "; one table has a row for every picture, with a column split"


def read(found: Found, wanted: Wanted) -> Source:
    """Read the only table there, and the pictures that it names, relative to itself or to the folder.

    Without a column for the label, the columns of `wanted.classes`, or else all others, hold the votes for the class of
    their name. Raises UserError, with file and row, for what is missing or does not fit; pictures that the table does
    not name are left out.
    """
    if not found.path.is_dir():
        raise UserError(
            f"params.yaml: data: {found.path} is a file: name the folder that holds the table and its pictures"
        )
    tables = [[entry] for entry in found.entries if _is_table(entry)]
    if not tables:
        raise found.nothing(
            f"holds no csv or parquet with a column {COLUMNS['path'][0]}{_others(found)}: put it there or correct "
            "the path in params.yaml"
        )
    entry = one_of(tables, "tables with paths", REMEDY)[0]
    rows = list(_rows(entry))
    if not rows:
        raise UserError(f"{entry}: holds no row: add a row for each picture")
    for _, row in rows:
        row.update({name: "" for name, text in row.items() if name in known() and text.lower() in NOT_A_NUMBER})
    columns = {kind: next((name for name in names if name in rows[0][1]), None) for kind, names in COLUMNS.items()}
    if columns["path"] is None:
        raise UserError(f"{entry}: has no column {COLUMNS['path'][0]}: add it, with the path of each picture")
    entries = _pictures(found, entry, [(where, row[columns["path"]]) for where, row in rows])
    usages = _usages([(where, row[columns["split"]]) for where, row in rows]) if columns["split"] else [""] * len(rows)
    subjects = [joined(printable(row[columns["subject"]])) if columns["subject"] else "" for _, row in rows]
    boxes = [_box(row[columns["box"]], where) if columns["box"] else None for where, row in rows]
    reasons: dict[str, list[str]] = {}
    others = [name for name in rows[0][1] if name not in columns.values() and not INDEX.fullmatch(name)]
    emotions = [name for name in others if emotion(name)]
    if columns["label"] is None:
        single = all(sorted(whole(row[name]) or 0 for name in others)[-2:] == [0, 1] for _, row in rows)
        names = others if single else _vote_columns(entry, others, emotions, wanted.classes)
        votes = _votes(names, rows)
        kept = _first_of_each(entries, boxes, list(zip(votes.tolist(), usages, subjects)), rows, reasons)
        return _voted(found, entry, wanted, names, votes, entries, usages, subjects, boxes, kept, reasons)
    if others:
        reasons["no column that is read here"] = others
    if len(emotions) > 1 and all(whole(row[name]) is not None for _, row in rows for name in emotions):
        raise UserError(
            f"{entry}: has both a column {columns['label']} and votes for {', '.join(emotions)}: leave one of the two "
            "out of the table"
        )
    labels = [joined(row[columns["label"]]) for _, row in rows]
    for (where, _), label in zip(rows, labels):
        if not label:
            raise UserError(f"{where}: has no label: add it or delete the row")
    kept = _first_of_each(entries, boxes, list(zip(labels, usages, subjects)), rows, reasons)
    faces = [Face(entries[i], usages[i], printable(labels[i]), subjects[i], boxes[i]) for i in kept]
    classes = sorted({face.label for face in faces}, key=in_order)
    return of_faces(found, faces, classes, "table", [printable(entry.name)], wanted, reasons, [entry])


def _is_table(entry: Entry) -> bool:
    if entry.head.startswith(b"PAR1"):
        return True
    names = header(entry) if entry.base.lower().endswith((".csv", ".tsv", ".txt")) else []
    return bool({*names} & {*COLUMNS["path"]}) and len(names) > 1


def _others(found: Found) -> str:
    """The columns of a csv that is there, though none of them is known as the path."""
    for entry in found.entries:
        names = header(entry) if entry.base.lower().endswith((".csv", ".tsv")) else []
        if len(names) > 1 and all(name.isprintable() for name in names):
            more = ", ..." if len(names) > MOST else ""
            return f" ({printable(entry.name)} has {', '.join(names[:MOST])}{more})"
    return ""


def _rows(entry: Entry) -> Iterator[tuple[str, dict[str, str]]]:
    """File and row, and the text of each column by its name in lower case; class names keep their case."""
    if not entry.head.startswith(b"PAR1"):
        with table(entry) as content:
            names = [_name(written) for written in content.written]
            _refuse_doubles(entry, names)
            for where, fields in content:
                yield where, dict(zip(names, fields))
        return
    try:
        frame = pd.read_parquet(io.BytesIO(entry.read()))
        for column in range(frame.shape[1]):
            frame.iloc[:, column].tolist()  # text is decoded when it is asked for
    except ImportError:
        raise UserError(f"{entry}: needs pyarrow: `pip install pyarrow`, or save the table as csv") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{entry}: is no parquet that can be read ({str(error).splitlines()[0]}): write it again"
        ) from None
    if any(name is not None for name in frame.index.names):
        frame = frame.reset_index()
    names = [_name(str(name)) for name in frame.columns]
    _refuse_doubles(entry, names)
    for name in frame.columns:
        given = frame[name].dropna()
        if str(name).lower() in COLUMNS["path"] and len(given) and isinstance(given.iloc[0], bytes | dict):
            raise UserError(f"{entry}: column {name} holds the pictures themselves: write files, and their paths here")
    for number, values in enumerate(frame.itertuples(index=False), start=1):
        yield f"{entry} row {number}", dict(zip(names, map(_text, values)))


def _name(written: str) -> str:
    """The name of a column; that of one that says something else than votes in lower case."""
    return written.lower() if written.lower() in known() else joined(written)


def _refuse_doubles(entry: Entry, names: Sequence[str]) -> None:
    """Raise UserError for two columns of a name, but those without one, and for two that say the same."""
    named = [name for name in names if not INDEX.fullmatch(name)]
    if twice := [name for name in named if named.count(name) > 1]:
        raise UserError(f"{entry}: has two columns {twice[0]}: rename or delete one")
    for kind in ("label", "split", "subject", "box"):
        if len(alike := [name for name in COLUMNS[kind] if name in named]) > 1:
            raise UserError(f"{entry}: has both {alike[0]} and {alike[1]}, each of which is the {kind}: delete one")


def known() -> set[str]:
    """All names of columns that say something else than votes."""
    return {name for names in COLUMNS.values() for name in names}


def _text(value: Any) -> str:
    if isinstance(value, list | tuple | np.ndarray):
        return " ".join(map(str, value))
    return "" if value is None or value != value else str(value).strip()  # NaN is not itself


def _pictures(found: Found, listed: Entry, paths: Sequence[tuple[str, str]]) -> list[Entry]:
    exact: dict[str, list[Entry]] = {}  # several where two archives hold the same path
    folded: dict[str, list[Entry]] = {}
    for entry in found.entries:
        exact.setdefault(entry.place, []).append(entry)
        folded.setdefault(_folded(entry.place), []).append(entry)
    entries, missing = [], []
    for where, path in paths:
        clean = path.replace("\\", "/")
        if not clean:
            raise UserError(f"{where}: has no path: add it or delete the row")
        if posixpath.isabs(clean):
            clean = posixpath.relpath(clean, found.root.absolute().as_posix())
        places = [posixpath.normpath(posixpath.join(folder, clean)) for folder in (listed.folder, "")]
        close = (folded.get(_folded(place)) for place in places)
        alike = next(filter(None, (*map(exact.get, places), *close)), None)
        if alike is None:
            missing.append(f"{where}: {path}")
        else:
            entries += one_of([[entry] for entry in alike], f"pictures {printable(path)}", remedy="")
    if missing:
        more = f" ({len(missing)} of {len(paths)} pictures are missing)" if len(missing) > 1 else ""
        raise UserError(f"{missing[0]} is not there{more}: restore it, or give its path relative to the table")
    return entries


def _folded(place: str) -> str:
    """A path without case and with joined accents."""
    return joined(place).casefold()


def _usages(values: Sequence[tuple[str, str]]) -> list[str]:
    usages = []
    for where, value in values:
        if value.lower() not in USAGES:
            raise UserError(f"{where}: split is '{value}': must be train, val or test")
        usages.append(USAGES[value.lower()])
    if "val" in usages and "test" not in usages:
        raise UserError(
            f"{values[0][0]}: the table has train and val and no test: write test for val "
            "(split.val_share of train becomes val)"
        )
    return usages


def _box(text: str, where: str) -> Box:
    parts = text.strip("()[] ").replace(",", " ").split()
    numbers = [whole(part.removeprefix("-")) for part in parts]
    if len(numbers) != 4 or None in numbers or any(part.startswith("-") for part in parts[2:]) or 0 in numbers[2:]:
        raise UserError(f"{where}: the box is '{text}': must be x, y, width and height in pixels, the last two above 0")
    left, top, width, height = (-(n or 0) if part.startswith("-") else n or 0 for n, part in zip(numbers, parts))
    return left, top, left + width, top + height


def _vote_columns(entry: Entry, others: list[str], emotions: list[str], classes: tuple[str, ...] | None) -> list[str]:
    """Those of the columns `others` that hold votes; `emotions`: those named after one."""
    if classes is not None:
        classes = tuple(map(joined, classes))
        check_classes(classes, [name for name in others if name not in NO_EMOTION])
        if lost := [name for name in emotions if name not in classes]:
            raise UserError(
                f"data.classes: leaves out the votes for {lost[0]} of {entry}, without which labels would be others: "
                "name all columns of votes"
            )
        return [*classes, *(name for name in others if name in NO_EMOTION)]
    strange = [name for name in others if name not in emotions and name not in NO_EMOTION]
    if len(emotions) > 1 and strange:
        raise UserError(
            f"{entry}: holds votes for {emotions[0]} and {emotions[1]}, and a column {strange[0]}, which is no "
            "expression known here: name all columns of votes in data.classes, or leave that column out"
        )
    return others


def _votes(names: Sequence[str], rows: Sequence[tuple[str, dict[str, str]]]) -> np.ndarray:
    if len([name for name in names if name not in NO_EMOTION]) < 2:
        where = rows[0][0].rpartition(" ")[0].rpartition(" ")[0]
        raise UserError(f"{where}: has neither a column label nor two or more columns of votes: add one")
    votes = np.zeros((len(rows), len(names)), np.int64)
    for number, (where, row) in enumerate(rows):
        for place, name in enumerate(names):
            if (count := whole(row[name])) is None:
                raise UserError(
                    f"{where}: {name} has '{row[name]}' votes: must be a whole number: 3 of 10, not 0.3; 0 for none"
                )
            votes[number, place] = count
    return votes


def _first_of_each(
    entries: Sequence[Entry], boxes: Sequence[Box | None], said: Sequence[Any],
    rows: Sequence[tuple[str, dict[str, str]]], reasons: dict[str, list[str]],
) -> list[int]:  # fmt: skip
    """The rows but those that say the same of the same face again. Raises UserError where they say something else.

    `said`: what each row says of its face.
    """
    seen: dict[tuple[str, Box | None], int] = {}
    for number, (entry, box) in enumerate(zip(entries, boxes)):
        first = seen.setdefault((entry.name, box), number)
        if said[first] != said[number]:
            other = rows[first][0].rpartition("/")[2]
            raise UserError(
                f"{rows[number][0]}: {entry.place} has another label, split or subject in {other}: delete one "
                "of them, or if each row is a vote, count them in a column for each class (docs/real-data.md)"
            )
        if first != number:
            reasons.setdefault("a row that stands twice", []).append(rows[number][0].rpartition("/")[2])
    return list(seen.values())


def _voted(
    found: Found, listed: Entry, wanted: Wanted, names: list[str], votes: np.ndarray, entries: list[Entry],
    usages: list[str], subjects: list[str], boxes: list[Box | None], kept: list[int], reasons: dict[str, list[str]],
) -> Source:  # fmt: skip
    """The data set with votes; with a single vote an image, it is one of hard labels."""
    classes = [name for name in names if name not in NO_EMOTION]
    check_names(found, classes)
    columns = [*classes, *(name for name in NO_EMOTION if name in names)]
    votes = votes[np.ix_(kept, [names.index(name) for name in columns])]
    if columns == classes and (votes.sum(axis=1) == 1).all():
        labels = np.array(classes)[votes.argmax(axis=1)]
        faces = [Face(entries[i], usages[i], label, subjects[i], boxes[i]) for i, label in zip(kept, labels.tolist())]
        return of_faces(found, faces, classes, "table", [printable(listed.name)], wanted, reasons, [listed])
    chosen = [entries[i] for i in kept]
    if wanted.subject_pattern is not None:
        subjects = subjects_of(entries, wanted.subject_pattern, subjects)
    images = Pictures(chosen, wanted.size, [boxes[i] for i in kept])
    described = pd.DataFrame({
        "name": names_of(chosen, [boxes[i] for i in kept]),
        "usage": [usages[i] for i in kept],
        "subject": [subjects[i] for i in kept],
    })  # fmt: skip
    described[columns] = votes
    rest = left_over(found, [*chosen, listed], reasons)
    return Source(images, described, tuple(classes), "votes", "table", [printable(listed.name)], rest)
