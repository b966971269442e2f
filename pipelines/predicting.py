"""`fer predict`: which model, which files, and the table that is written row by row."""

import csv
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from PIL import Image

from fer.data.found import is_own
from fer.errors import UserError
from fer.faces.predict import PLACE, Found
from fer.run_folder import BEST

VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"}
ROWS = 1_000  # of a parquet file, written at once
NO_EFFECT = (("--min-face", "--cropped"), ("--min-face", "--boxes"), ("--margin", "--cropped"))


def check(paths: list[Path] | None, camera: str | None, finders: dict[str, Any], others: dict[str, Any]) -> None:
    """Raises UserError unless there are either files or a camera, and at most one option that says where faces are.

    `finders` are these options, `others` those that have no effect with some of them.
    """
    if bool(paths) == (camera is not None):
        raise UserError("predict: name pictures and videos, or a camera with --camera, and not both")
    given = [name for name, value in finders.items() if value not in (None, False)]
    if len(given) > 1:
        raise UserError(f"{given[0]}: says where the faces are, and so does {given[1]}; leave one out")
    for name, finder in NO_EFFECT:
        if others[name] and finder in given:
            raise UserError(f"{name}: has no effect with {finder}; leave it out")
    if camera is not None and finders["--boxes"] is not None:
        raise UserError("--boxes: is for files, not for a camera; leave it out")


def check_written(files: list[Path], annotated: Path | None, boxes: Path | None, out: Path) -> None:
    """Raises UserError if what is written would replace what is read."""
    read = {place for file in files for place in (file.resolve().parent, file.parent.resolve())}  # of links as well
    if annotated is not None and annotated.resolve() in read:
        raise UserError(f"--annotated {annotated}: holds the pictures themselves; name another folder")
    if boxes is not None and boxes.resolve() == out.resolve():
        raise UserError(f"--out {out}: is the table of --boxes; name another file")


@contextmanager
def until_ctrl_c(wanted: bool) -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed, in which case what has begun is finished first; a second one ends at once.

    Unless it is `wanted`, Ctrl-C is what it always is.
    """
    stop = threading.Event()
    if not wanted:
        yield stop.is_set
        return

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def files(paths: Iterable[Path]) -> tuple[list[Path], int]:
    """The pictures and videos that `paths` name or contain, and how many other files their folders hold.

    Hidden files and those that systems leave behind are left out. Raises UserError for a path that does not exist, a
    folder that cannot be read, and if there is nothing to predict.
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
        inside = [
            one for one in sorted(_every(path)) if one.is_file() and all(map(is_own, one.relative_to(path).parts))
        ]
        chosen = [one for one in inside if one.suffix.lower() in known]
        found += chosen
        others += len(inside) - len(chosen)
    if not found:
        raise UserError(f"{', '.join(map(str, paths))}: no picture or video there")
    return list(dict.fromkeys(found)), others


def _every(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:  # else `walk` goes on without that folder
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None

    seen = set()  # of links to folders above them
    for inside, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(inside)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(inside, name) for name in names)


def checkpoint_of(champions: dict[str, dict[str, str]], dataset: str, runs: Path) -> Path:
    """The folder of the champion of `dataset`. Raises UserError if there is none, or it is not on this machine."""
    name = f"fer-{dataset}"
    if name not in champions:
        known = ", ".join(sorted(champions)) or "none yet"
        raise UserError(f"models:/{name}@champion: no such champion (champions: {known}); name a run with --run")
    if "fer.run_id" not in champions[name]:
        raise UserError(f"models:/{name}@champion: is no run of fer; promote one (`fer promote`) or name it with --run")
    folder = runs / champions[name]["fer.run_id"]
    if not (folder / BEST).is_dir():
        raise UserError(f"{folder}: the champion's checkpoint is not on this machine; name another run with --run")
    return folder


def write(found: Iterable[Found], classes: list[str], path: Path, smoothed: bool = False) -> Iterator[Found]:
    """Pass `found` on, and write a row for each to `path`, .csv or .parquet, as they come.

    `smoothed`: whether there are columns for probabilities averaged over time.
    """
    columns = [*PLACE, "prediction", *classes]
    if smoothed:
        columns += ["track", "smoothed", *(f"smoothed {name}" for name in classes)]
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

    texts, numbers = ("file", "note", "prediction", "smoothed"), ("frame", "face", "track")
    kinds = {name: pa.string() for name in texts} | {name: pa.int64() for name in numbers}
    schema = pa.schema([(name, kinds.get(name, pa.float64())) for name in columns])
    rows: list[dict[str, Any]] = []
    with pq.ParquetWriter(path, schema) as writer:
        try:
            for one in found:
                rows.append(one.row(classes))
                if len(rows) == ROWS:
                    writer.write_table(pa.Table.from_pylist(rows, schema))
                    rows = []
                yield one
        finally:  # also if it is stopped
            writer.write_table(pa.Table.from_pylist(rows, schema))
