"""`fer predict`: which model, which files, and the table that is written row by row."""

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from fer.errors import UserError
from fer.faces.predict import PLACE, Found
from fer.run_folder import BEST

VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"}
ROWS = 1_000  # of a parquet file, written at once


def files(paths: Iterable[Path]) -> tuple[list[Path], int]:
    """The pictures and videos that `paths` name or contain, and how many other files their folders hold.

    Hidden files are left out. Raises UserError for a path that does not exist, and if there is nothing to predict.
    """
    known = set(Image.registered_extensions()) | VIDEOS
    found: list[Path] = []
    others = 0
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: not found; give pictures, videos, or folders of them")
        if not path.is_dir() and not path.is_file():  # to read a pipe or a device may take for ever
            raise UserError(f"{path}: no regular file; give pictures, videos, or folders of them")
        if not path.is_dir():
            found.append(path)
            continue
        inside = [one for one in sorted(path.rglob("*")) if one.is_file() and not _hidden(one.relative_to(path))]
        chosen = [one for one in inside if one.suffix.lower() in known]
        found += chosen
        others += len(inside) - len(chosen)
    if not found:
        raise UserError(f"{', '.join(map(str, paths))}: no picture or video there")
    return found, others


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def checkpoint_of(champions: dict[str, dict[str, str]], dataset: str, runs: Path) -> Path:
    """The folder of the champion of `dataset`. Raises UserError if there is none, or it is not on this machine."""
    name = f"fer-{dataset}"
    if name not in champions:
        known = ", ".join(sorted(champions)) or "none yet"
        raise UserError(f"models:/{name}@champion: no such champion (champions: {known}); name a run with --run")
    folder = runs / champions[name]["fer.run_id"]
    if not (folder / BEST).is_dir():
        raise UserError(f"{folder}: the champion's checkpoint is not on this machine; name another run with --run")
    return folder


def write(found: Iterable[Found], classes: list[str], path: Path) -> Iterator[Found]:
    """Pass `found` on, and write a row for each to `path`, .csv or .parquet, as they come."""
    columns = [*PLACE, "prediction", *classes]
    if path.suffix == ".parquet":
        yield from _write_parquet(found, classes, columns, path)
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        for one in found:
            table.writerow(one.row(classes))
            file.flush()
            yield one


def _write_parquet(found: Iterable[Found], classes: list[str], columns: list[str], path: Path) -> Iterator[Found]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts, numbers = ("file", "note", "prediction"), ("frame", "face")
    kinds = {name: pa.string() for name in texts} | {name: pa.int64() for name in numbers}
    schema = pa.schema([(name, kinds.get(name, pa.float64())) for name in columns])
    rows: list[dict[str, Any]] = []
    with pq.ParquetWriter(path, schema) as writer:
        for one in found:
            rows.append(one.row(classes))
            if len(rows) == ROWS:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows = []
            yield one
        writer.write_table(pa.Table.from_pylist(rows, schema))
