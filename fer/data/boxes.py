"""Where the faces of photographs are: what the stage faces finds, and the stage download cuts out."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from fer.data.decode import Box
from fer.errors import UserError
from fer.files import write_json

BOXES, ABOUT = "boxes.csv", "faces.json"


class Seen(NamedTuple):
    """A picture: its file, the square around its largest face and the detector's score, and how many it shows."""

    file: str
    left: int | None = None
    top: int | None = None
    right: int | None = None
    bottom: int | None = None
    score: float | None = None
    faces: int = 0


def write_boxes(folder: Path, seen: Iterable[Seen], about: dict[str, Any]) -> None:
    """Write boxes.csv and faces.json. `about`: the detector and its margin."""
    with (folder / BOXES).open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(Seen._fields)
        table.writerows(seen)
    write_json(folder / ABOUT, about)


def read_boxes(folder: Path) -> tuple[dict[str, Box], dict[str, Any]]:
    """File -> square, of the pictures in which a face was found; and the detector and its margin.

    Raises UserError if the stage faces has not run.
    """
    try:
        with (folder / BOXES).open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["left"]]
    except FileNotFoundError:
        raise UserError(f"{folder / BOXES}: not found; run `dvc repro faces` to make it") from None
    boxes = {row["file"]: (int(row["left"]), int(row["top"]), int(row["right"]), int(row["bottom"])) for row in rows}
    return boxes, json.loads((folder / ABOUT).read_text())
