"""Rows of a csv as people's programs write them, with the file and line for messages."""

import csv
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import IO

from fer.data.found import Entry
from fer.errors import UserError

DELIMITERS = ",;\t"


class Table:
    """The rows of an open csv: a header, whose names are compared without case, and then fields by name."""

    def __init__(self, entry: Entry, stream: IO[bytes]):
        self.entry = entry
        self.rows = rows(entry, stream)
        self.written = [name.strip(" \"'") for name in next(self.rows, ("", []))[1]]
        self.header = [name.lower() for name in self.written]

    def columns(self, names: Sequence[str], remedy: str) -> list[int]:
        """The places of these columns. Raises UserError, with the remedy, for those that the header lacks."""
        missing = [name for name in names if name.lower() not in self.header]
        if missing:
            raise UserError(f"{self.entry} line 1: lacks the columns {', '.join(missing)}: {remedy}")
        return [self.header.index(name.lower()) for name in names]

    def __iter__(self) -> Iterator[tuple[str, list[str]]]:
        """`file line n` and the fields of each row. Raises UserError for a row of another length."""
        for where, fields in self.rows:
            check_columns(len(fields), len(self.header), where)
            yield where, fields


@contextmanager
def table(entry: Entry) -> Iterator[Table]:
    """A csv with a header. Raises UserError where the file is damaged, also while it is read."""
    with entry.opened() as stream:
        yield Table(entry, stream)


def header(entry: Entry) -> list[str]:
    """The names in the first row of what may be a csv, in lower case; empty if there is none."""
    lines = entry.head.decode("utf-8-sig", "replace").splitlines()
    first = next((line for line in lines if line.strip()), "")
    try:
        return [name.strip(" \"'").lower() for name in next(csv.reader([first], delimiter=_delimiter(first)))]
    except (csv.Error, StopIteration):
        return []


def rows(entry: Entry, stream: IO[bytes]) -> Iterator[tuple[str, list[str]]]:
    """`file line n` and the stripped fields of each row; a row of empty fields, as spreadsheets leave, is none.

    The delimiter is that of the first row. Raises UserError for what is no csv.
    """
    lines = (_decoded(entry, number, line) for number, line in enumerate(stream, start=1))
    start = [""]  # up to the first row
    while not start[-1].strip() and (line := next(lines, None)) is not None:
        start.append(line)
    reader = csv.reader(chain(start[1:], lines), delimiter=_delimiter(start[-1]))
    try:
        for fields in reader:
            fields = [field.strip() for field in fields]
            if any(fields):
                yield f"{entry} line {reader.line_num}", fields
    except csv.Error as error:
        raise UserError(f"{entry} line {reader.line_num}: is not valid CSV ({error}): download it again") from None


def _decoded(entry: Entry, number: int, line: bytes) -> str:
    try:
        return line.decode().removeprefix("\ufeff")
    except UnicodeDecodeError:
        raise UserError(f"{entry} line {number}: is not UTF-8: save it as CSV in UTF-8") from None


def check_columns(own: int, expected: int, where: str) -> None:
    """Raise UserError unless the row at `where` has as many columns as expected."""
    if own != expected:
        raise UserError(
            f"{where}: has {own} columns instead of {expected}: the file is truncated or edited; fetch it again"
        )


def whole(text: str) -> int | None:
    """A whole number, 0 or more, however it is written (3, 3.0); None if it is none."""
    if text.isascii() and text.isdigit() and len(text) < 10:
        return int(text)
    try:
        number = float(text)
    except ValueError:
        return None
    return int(number) if number.is_integer() and 0 <= number < 1e9 else None


def _delimiter(line: str) -> str:
    unquoted = re.sub('"[^"]*"', "", line)
    return max(DELIMITERS, key=unquoted.count)
