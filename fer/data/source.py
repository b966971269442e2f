"""What a reader is asked for, and what it returns."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from fer.data.decode import Box
from fer.data.found import Entry, Found, joined, printable
from fer.data.picture_files import CHUNK, Pictures
from fer.errors import UserError

TEXT_COLUMNS = ("name", "usage", "subject")
# of the tables that are made, in which a class has a column of its own
TAKEN = {*TEXT_COLUMNS, "row", "sha1", "label", "class", "prediction", "prediction_shared", "leaked"}
TAKEN |= {"duplicate_of", "duplicate_in", "duplicate_kind", "fold", "right"}
TAKEN |= {"file", "frame", "seconds", "face", "left", "top", "width", "height", "score", "note", "track", "smoothed"}
FACELESS = "no face found (data.faces)"
UNUSED = "no part of the data set"
UNWANTED = "of a class that data.classes leaves out"


@dataclass(frozen=True)
class Wanted:
    """What the user asks of a reader, which takes what concerns it."""

    label_source: str = "auto"
    subject_pattern: str | None = None
    size: int | None = None
    classes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Source:
    """A data set as it was found: its images, what is known of each, and what was left out."""

    images: np.ndarray | Pictures  # uint8 [N, H, W] or [N, H, W, 3]
    table: pd.DataFrame  # row i describes image i: TEXT_COLUMNS, then `vote_columns`, int64
    classes: tuple[str, ...]
    labels: Literal["votes", "hard"]  # hard: one vote an image
    form: str  # which of the reader's forms it was
    read: list[str]  # the files and folders that were read, relative to the path in params.yaml
    left_out: dict[str, list[str]]  # reason -> names of what was there and is not among the images
    facts: dict[str, Any] = field(default_factory=dict)  # what else the reader has to say

    @property
    def vote_columns(self) -> tuple[str, ...]:
        """The classes, and unknown and NF where voters had that choice."""
        return tuple(name for name in self.table.columns if name not in TEXT_COLUMNS)

    def chunks(self) -> Iterator[np.ndarray]:
        """The images in order, some at a time. Raises UserError for damaged ones."""
        if isinstance(self.images, Pictures):
            return self.images.chunks()
        return (self.images[first : first + CHUNK] for first in range(0, len(self.images), CHUNK))


@dataclass(frozen=True)
class Face:
    """One image of a data set with hard labels: what its row in the table says."""

    entry: Entry
    usage: str  # train, val, test; empty where the data set has no splits
    label: str  # its class
    subject: str = ""
    box: tuple[int, int, int, int] | None = None  # left, top, right, bottom


def of_faces(
    found: Found, faces: Sequence[Face], classes: Sequence[str], form: str, read: list[str], wanted: Wanted,
    left_out: dict[str, list[str]] | None = None, used: Iterable[Entry] = (),
) -> Source:  # fmt: skip
    """A data set of pictures with one label each. `used`: files read beside the pictures.

    Raises UserError for no picture at all, and where `data.subject_pattern` finds no subject.
    """
    classes = list(dict.fromkeys(map(joined, classes)))
    faces = [replace(face, label=joined(face.label), subject=joined(face.subject)) for face in faces]
    check_names(found, classes)
    reasons = dict(left_out or {})
    if wanted.classes is not None:
        chosen = [joined(name) for name in wanted.classes]
        check_classes(chosen, classes)
        reasons[UNWANTED] = [face.entry.name for face in faces if face.label not in chosen]
        classes, faces = chosen, [face for face in faces if face.label in chosen]
    if not faces:
        raise found.nothing("holds no picture of the data set: correct the path in params.yaml")
    images = Pictures([face.entry for face in faces], wanted.size, [face.box for face in faces])
    subjects = [face.subject for face in faces]
    if wanted.subject_pattern is not None:
        subjects = subjects_of([face.entry for face in faces], wanted.subject_pattern, subjects)
    names = names_of([face.entry for face in faces], [face.box for face in faces])
    table = hard_table(names, [face.usage for face in faces], subjects, [face.label for face in faces], classes)
    rest = left_over(found, [*(face.entry for face in faces), *used], reasons)
    return Source(images, table, tuple(classes), "hard", form, read, rest)


def check_names(found: Found, classes: Sequence[str]) -> None:
    """Raise UserError for a single class, one whose name a column has, or that is spelled in two ways."""
    if len(classes) == 1:
        raise UserError(f"{found.path}: holds pictures of one class only, {classes[0]}: add those of another")
    spelled: dict[str, str] = {}
    for label in classes:
        if label in TAKEN:
            raise UserError(f"{found.path}: a class cannot be called {label}, as a column is: rename it")
        if (other := spelled.setdefault(label.casefold(), label)) != label:
            raise UserError(f"{found.path}: a class is called both {other} and {label}: write one of them everywhere")


def names_of(entries: Sequence[Entry], boxes: Sequence[Box | None]) -> list[str]:
    """A name for each face: its picture's, with x, y, width and height of its box if the picture shows several."""
    faces = Counter(entry.place for entry in entries)
    names = []
    for entry, box in zip(entries, boxes):
        name = printable(entry.place)
        if box is not None and faces[entry.place] > 1:
            left, top, right, bottom = box
            name += f"#{left}_{top}_{right - left}_{bottom - top}"
        names.append(name)
    return names


def cropped(source: Source, boxes: Mapping[str, Box]) -> Source:
    """A data set of photographs, with these parts of those that had no box; the others of them are left out.

    `boxes`: by the name of the file. Raises UserError if it is not one of pictures, or none is left.
    """
    pictures = source.images
    if not isinstance(pictures, Pictures):
        raise UserError("data.faces: the data set is of cropped faces; remove it")
    found = [box or boxes.get(entry.name) for entry, box in zip(pictures.entries, pictures.boxes)]
    kept = [place for place, box in enumerate(found) if box is not None]
    if not kept:
        raise UserError("data.faces: no face was found in any picture; remove it if they are cropped")
    images = Pictures([pictures.entries[place] for place in kept], pictures.size, [found[place] for place in kept])
    without = [printable(entry.name) for entry, box in zip(pictures.entries, found) if box is None]
    left_out = {**source.left_out, **({FACELESS: without} if without else {})}
    return replace(source, images=images, table=source.table.iloc[kept].reset_index(drop=True), left_out=left_out)


def refuse_settings(wanted: Wanted, keys: Iterable[str], why: str) -> None:
    """Raise UserError if the user has set one of `keys`, which mean nothing for a data set."""
    for key in keys:
        if getattr(wanted, key) is not None:
            raise UserError(f"data.{key}: {why}: remove it")


def check_classes(wanted: Sequence[str], known: Sequence[str]) -> None:
    """Raise UserError unless `data.classes` chooses two or more classes that the data set has."""
    unknown = [name for name in wanted if name not in known]
    if unknown or len(set(wanted)) != len(wanted) or len(wanted) < 2:
        named = f"the data set has no class {unknown[0]}" if unknown else "two or more different classes are needed"
        raise UserError(f"data.classes: {named}; known: {', '.join(known)}")


def hard_table(
    names: Sequence[str], usages: Sequence[str], subjects: Sequence[str], labels: Sequence[str], classes: Sequence[str]
) -> pd.DataFrame:
    """The table of a data set with one label an image: a single vote for its class."""
    described = pd.DataFrame({"name": names, "usage": usages, "subject": subjects})
    place = {label: number for number, label in enumerate(classes)}
    described[list(classes)] = np.eye(len(classes), dtype=np.int64)[[place[label] for label in labels]]
    return described


def left_over(found: Found, used: Iterable[Entry], reasons: dict[str, list[str]]) -> dict[str, list[str]]:
    """By reason, all that was found and not `used`; `reasons` has those that the reader knows.

    Raises UserError for an archive that cannot be read, in which the rest of the data set may be.
    """
    found.refuse_damaged()
    known = {name for names in reasons.values() for name in names} | {entry.name for entry in used}
    other = [printable(entry.name) for entry in found.entries if entry.name not in known]
    result = {**found.left_out, **reasons, UNUSED: other}
    return {reason: [printable(name) for name in names] for reason, names in result.items() if names}


def subjects_of(entries: Sequence[Entry], pattern: str, known: Sequence[str]) -> list[str]:
    """Group 1 of `pattern` in each file name, or in the whole place if the pattern has a slash.

    `known`: the subjects that the data set names itself; empty without. Raises UserError if there are any, and for
    pictures in which it finds nothing, of which it names the first.
    """
    if any(known):
        raise UserError("data.subject_pattern: the data set names its subjects itself: remove one of the two")
    texts = [entry.place if "/" in pattern else entry.base for entry in entries]
    matches = [re.search(pattern, text) for text in texts]
    missing = [text for text, match in zip(texts, matches) if match is None or not match[1]]
    if missing:
        raise UserError(
            f"data.subject_pattern: '{pattern}' finds no subject in {len(missing)} of {len(texts)} file names, "
            f"as {printable(missing[0])}: correct it"
        )
    return [joined(printable(match[1])) for match in matches if match]
