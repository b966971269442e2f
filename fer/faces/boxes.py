"""A user's own boxes of faces, in place of a detector's."""

import csv
import os
from collections.abc import Iterable
from pathlib import Path

from fer.data.found import printable
from fer.data.rows import whole
from fer.errors import UserError, first_line
from fer.faces.detect import Face

COLUMNS = ("left", "top", "right", "bottom")


class Boxes:
    """A table with the columns `file`, `left`, `top`, `right`, `bottom`, in pixels, and perhaps `frame` of a video.

    It is what the stage faces writes. `file` is a path of one of `files`, or counts from the table's folder; without
    `frame` a box holds for all frames. Lines without a box are passed over. Raises UserError for a table that cannot be
    read, a box that is none, and if no line is of one of `files`.
    """

    margin = 1.0

    def __init__(self, path: Path, files: Iterable[Path]):
        known: dict[str, list[str]] = {}  # a file may be named in several ways
        for each in files:
            known.setdefault(os.path.abspath(each), []).append(printable(str(each)))
        self.faces: dict[tuple[str, int | None], list[Face]] = {}
        try:
            with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
                table = csv.DictReader(file)
                missing = [name for name in ("file", *COLUMNS) if name not in (table.fieldnames or ())]
                if missing:
                    raise UserError(f"--boxes {path}: has no column {missing[0]}; give file, {', '.join(COLUMNS)}")
                for row in table:
                    self._add(row, path, table.line_num, known)
        except (OSError, csv.Error) as error:
            reason = error.strerror if isinstance(error, OSError) else first_line(error)
            raise UserError(f"--boxes {path}: cannot be read ({reason})") from None
        if not self.faces:
            raise UserError(f"--boxes {path}: names none of the files to predict in its column file")

    def _add(self, row: dict[str, str], path: Path, line: int, known: dict[str, list[str]]) -> None:
        named = (known.get(os.path.abspath(folder / (row["file"] or ""))) for folder in (Path.cwd(), path.parent))
        names = next((found for found in named if found is not None), [])
        if not names or not row["left"]:
            return
        try:
            left, top, right, bottom = (float(row[key]) for key in COLUMNS)
        except (TypeError, ValueError):
            raise UserError(f"--boxes {path}: line {line}: left, top, right and bottom should be numbers") from None
        frame = whole(row["frame"]) if row.get("frame") else None  # 3.0 where others are empty
        if row.get("frame") and frame is None:
            raise UserError(f"--boxes {path}: line {line}: frame should be a whole number, 0 or more")
        if not (left < right and top < bottom and abs(left + top + right + bottom) < 1e9):
            raise UserError(f"--boxes {path}: line {line}: left should be less than right, and top less than bottom")
        for name in dict.fromkeys(names):
            self.faces.setdefault((name, frame), []).append(Face(left, top, right - left, bottom - top, 1.0))

    def of(self, file: str, frame: int) -> list[Face]:
        """The boxes of a frame: those for all frames, then its own, each in the order of the table."""
        return [*self.faces.get((file, None), []), *self.faces.get((file, frame), [])]
