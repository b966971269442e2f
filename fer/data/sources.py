"""Readers of data sets in the form their publishers ship: one array of images and one table."""

import csv
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import IO, NoReturn

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from fer.data.labels import VOTE_COLUMNS
from fer.errors import UserError

SIDE = 48  # pixels, of every FER2013 image
USAGES = {"Training": "train", "PublicTest": "val", "PrivateTest": "test"}  # official usage -> split
FOLDERS = {"FER2013Train": "Training", "FER2013Valid": "PublicTest", "FER2013Test": "PrivateTest"}
IMAGE_CSVS = ("fer2013.csv", "icml_face_data.csv")
TARBALL = "fer2013.tar.gz"  # holds fer2013/fer2013.csv
KAGGLE_FILES = (IMAGE_CSVS[0], TARBALL, IMAGE_CSVS[1])  # the first that exists is read
TARBALLS = (".tar.gz", ".tgz")
VOTES_CSV = "fer2013new.csv"
LABEL_CSV = "label.csv"
BOX = f"(0, 0, {SIDE}, {SIDE})"  # of the face, in a label.csv
LABEL_SOURCES = ("auto", "label_csv", "fer2013new")
TABLE_COLUMNS = ("name", "usage", "subject", *VOTE_COLUMNS)

_DAMAGED = (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Source:
    """A data set as its publisher ships it, with no image dropped."""

    images: np.ndarray  # uint8 [N, 48, 48]
    table: pd.DataFrame  # row i describes image i; TABLE_COLUMNS; usage is train, val or test; votes are int64
    facts: dict[str, str]  # dataset, form, label_source


def read_ferplus(path: Path, label_source: str) -> Source:
    """Read FER+ from a folder or file: the official folder layout, or a Kaggle csv with fer2013new.csv.

    `label_source` is label_csv, fer2013new or auto (label_csv for the folders, fer2013new for a Kaggle csv). Rows are
    in the order of the file with the votes; an image that fer2013new.csv names twice gives two rows. Kaggle rows
    without a name (not a face) are kept, with an empty name.

    Raises UserError, one line with file, line and remedy, for anything missing, damaged or inconsistent; ValueError for
    an unknown `label_source`.
    """
    if label_source not in LABEL_SOURCES:
        raise ValueError(f"unknown label source '{label_source}'; known: {', '.join(LABEL_SOURCES)}")
    if not path.exists():
        raise UserError(f"{path}: not found: correct data.path in params.yaml")
    found = find_ferplus(path)
    if found is None:
        raise UserError(
            f"{path}: no FER+ found, neither the folders {', '.join(FOLDERS)} nor {', '.join(KAGGLE_FILES)} nor a .zip "
            f"with one of the csv files: put one of them there, with {VOTES_CSV}, or correct data.path"
        )
    if not found.is_dir():
        if label_source == "label_csv":
            raise UserError(
                f"{found}: has no {LABEL_CSV}, which only the folder layout has: set data.label_source to fer2013new"
            )
        return _read_kaggle(found, _votes_file(found, path))
    if label_source == "fer2013new":
        return _read_folders(found, _named_rows(_votes_file(found, path)), "fer2013new")
    return _read_folders(found, pd.concat([_label_rows(found, folder) for folder in FOLDERS]), "label_csv")


def find_ferplus(path: Path) -> Path | None:
    """The folder that contains FER2013Train and the others, or the Kaggle file: `path` itself or something in it.

    Searches the folder first, then its direct subfolders. None if nothing is recognised.
    """
    if path.is_file():
        return path if path.name.endswith((".csv", ".zip", *TARBALLS)) else None
    subfolders = sorted(child for child in path.iterdir() if child.is_dir()) if path.is_dir() else []
    for root in (path, *subfolders):
        if any((root / folder).is_dir() for folder in FOLDERS):
            return root
        files = (root / name for name in KAGGLE_FILES if (root / name).is_file())
        zips = (file for file in sorted(root.glob("*.zip")) if _zip_member(file, IMAGE_CSVS))
        if file := next(chain(files, zips), None):
            return file
    return None


def find_votes(found: Path, path: Path) -> Path | None:
    """The fer2013new.csv for `found` (see `find_ferplus`): next to it, in `path`, or in `found` if that is a .zip."""
    beside = found if found.is_dir() else found.parent
    for file in (beside / VOTES_CSV, path / VOTES_CSV):
        if file.is_file():
            return file
    return found if found.suffix == ".zip" and _zip_member(found, (VOTES_CSV,)) else None


def _votes_file(found: Path, path: Path) -> Path:
    votes = find_votes(found, path)
    if votes is None:
        folder = found if found.is_dir() else found.parent
        raise UserError(
            f"{folder / VOTES_CSV}: not found: download it from the microsoft/FERPlus repository to this place"
        )
    return votes


def _read_kaggle(found: Path, votes_file: Path) -> Source:
    """Read a Kaggle csv, one image per row. Its rows correspond to those of fer2013new.csv by position."""
    table = _votes_rows(votes_file)
    member = _zip_member(found, IMAGE_CSVS) if found.suffix == ".zip" else None
    if found.suffix == ".zip" and member is None:
        raise UserError(f"{found}: contains none of {', '.join(IMAGE_CSVS)}: download the competition's files again")
    with _opened(found, IMAGE_CSVS) as stream:
        images = _pixel_rows(stream, found, table["usage"].tolist(), votes_file)
    form = f"{found.name}/{PurePosixPath(member).name}" if member else found.name
    return _source(images, table, form, "fer2013new", found)


def _pixel_rows(stream: IO[bytes], file: Path, usages: list[str], votes_file: Path) -> np.ndarray:
    """The images of a Kaggle csv, uint8 [N, 48, 48]; its N rows must have these usages."""
    header = [name.strip(' "') for name in stream.readline().decode("utf-8-sig", "replace").strip().split(",")]
    missing = [name for name in ("pixels", "Usage") if name not in header]
    if missing:
        raise UserError(
            f"{file} line 1: lacks the columns {', '.join(missing)}: use {' or '.join(IMAGE_CSVS)} as Kaggle ships it"
        )
    pixels, usage = header.index("pixels"), header.index("Usage")
    images = np.empty((len(usages), SIDE * SIDE), dtype=np.uint8)
    rows = 0
    bar = tqdm(stream, desc=file.name, total=len(usages), unit=" rows", disable=None)
    with bar, warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # NumPy before 2.3 warns of text that is no number
        for number, line in enumerate(bar, start=2):
            fields = line.strip().split(b",")
            if fields == [b""]:
                continue
            where = f"{file} line {number}"
            _check_columns(len(fields), len(header), where)
            if rows == len(usages):
                raise UserError(
                    f"{where}: {votes_file} ends after {rows} rows, before this one: use two files that belong together"
                )
            if (own := fields[usage].decode("utf-8", "replace").strip(' "')) != usages[rows]:
                _refuse_usage(where, own, usages[rows], votes_file)
            images[rows] = _pixels(fields[pixels].strip(b' "'), where)
            rows += 1
    if rows != len(usages):
        raise UserError(
            f"{file}: ends after {rows} rows but {votes_file} has {len(usages)}: the file is incomplete; fetch it again"
        )
    return images.reshape(-1, SIDE, SIDE)


def _refuse_usage(where: str, own: str, other: str, votes_file: Path) -> NoReturn:
    if own not in USAGES:
        raise UserError(f"{where}: unknown Usage '{own}': must be {', '.join(USAGES)}")
    raise UserError(
        f"{where}: Usage is {own} but {other} in the same row of {votes_file}: "
        "rows correspond by position, so both files must be in their published order"
    )


def _pixels(text: bytes, where: str) -> np.ndarray:
    try:
        values = np.fromstring(text, dtype=np.int64, sep=" ")
    except (ValueError, DeprecationWarning):
        raise UserError(f"{where}: pixels must be whole numbers separated by blanks: download the file again") from None
    if values.size != SIDE * SIDE:
        raise UserError(
            f"{where}: has {values.size} pixels instead of {SIDE * SIDE}: the file is truncated or edited; "
            "fetch it again"
        )
    if values.min() < 0 or values.max() > 255:
        raise UserError(f"{where}: a pixel is outside 0..255: download the file again")
    return values


def _votes_rows(file: Path) -> pd.DataFrame:
    """The rows of fer2013new.csv as TABLE_COLUMNS, with the official usages."""
    wanted = ("Usage", "Image name", *VOTE_COLUMNS)
    rows = []
    with _opened(file, (VOTES_CSV,)) as stream:
        lines = _csv_lines(stream, file)
        header = [name.strip() for name in next(lines, (0, []))[1]]
        missing = [name for name in wanted if name not in header]
        if missing:
            raise UserError(f"{file} line 1: lacks the columns {', '.join(missing)}: download {VOTES_CSV} again")
        usage, name, *votes = (header.index(column) for column in wanted)
        for number, fields in lines:
            where = f"{file} line {number}"
            _check_columns(len(fields), len(header), where)
            if fields[usage] not in USAGES:
                raise UserError(f"{where}: unknown Usage '{fields[usage]}': must be {', '.join(USAGES)}")
            rows.append((fields[name], fields[usage], "", *_votes((fields[column] for column in votes), where)))
    return pd.DataFrame(rows, columns=TABLE_COLUMNS)


def _named_rows(file: Path) -> pd.DataFrame:
    table = _votes_rows(file)
    for name in table["name"]:
        _check_name(name, str(file))
    return table[table["name"] != ""]


def _label_rows(root: Path, folder: str) -> pd.DataFrame:
    """The rows of one folder's label.csv as TABLE_COLUMNS."""
    file = root / folder / LABEL_CSV
    if not file.is_file():
        raise UserError(f"{file}: not found: restore it from microsoft/FERPlus, or set data.label_source to fer2013new")
    rows = []
    seen: dict[str, tuple[int, list[int]]] = {}
    with _opened(file, ()) as stream:
        for number, fields in _csv_lines(stream, file):
            where = f"{file} line {number}"
            _check_columns(len(fields), 2 + len(VOTE_COLUMNS), where)  # name, box, votes
            name, box, *texts = fields
            _check_name(name, where)
            if box != BOX:
                raise UserError(f"{where}: the box is {box} instead of {BOX}: crop and resize the picture to the face")
            votes = _votes(texts, where)
            first, others = seen.setdefault(name, (number, votes))
            if votes != others:
                raise UserError(f"{where}: {name} has different votes in line {first}: delete the wrong line")
            rows.append((name, FOLDERS[folder], "", *votes))
    return pd.DataFrame(rows, columns=TABLE_COLUMNS)


def _csv_lines(stream: IO[bytes], file: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and stripped fields of every non-empty line."""
    reader = csv.reader(line.decode("utf-8", "replace").removeprefix("\ufeff") for line in stream)
    try:
        for fields in reader:
            if fields:
                yield reader.line_num, [field.strip() for field in fields]
    except csv.Error as error:
        raise UserError(f"{file} line {reader.line_num}: is not valid CSV ({error}): download it again") from None


def _check_columns(own: int, expected: int, where: str) -> None:
    if own != expected:
        raise UserError(
            f"{where}: has {own} columns instead of {expected}: the file is truncated or edited; fetch it again"
        )


def _votes(texts: Iterable[str], where: str) -> list[int]:
    texts = list(texts)
    for name, text in zip(VOTE_COLUMNS, texts, strict=True):
        if not (text.isascii() and text.isdigit() and len(text) <= 4):
            raise UserError(f"{where}: {name} has '{text}' votes: must be a whole number, 0 or more")
    return [int(text) for text in texts]


def _check_name(name: str, where: str) -> None:
    """Raise UserError for a name that would read a file outside its folder."""
    if "/" in name or "\\" in name or name in (".", ".."):
        raise UserError(f"{where}: '{name}' must be a plain file name: remove its folder part")


def _read_folders(root: Path, table: pd.DataFrame, label_source: str) -> Source:
    folders = {usage: root / folder for folder, usage in FOLDERS.items()}
    images = np.empty((len(table), SIDE, SIDE), dtype=np.uint8)
    named_in = LABEL_CSV if label_source == "label_csv" else VOTES_CSV
    pairs = zip(table["usage"], table["name"])
    for row, (usage, name) in enumerate(tqdm(pairs, desc=root.name, total=len(table), unit=" images", disable=None)):
        images[row] = _picture(folders[usage] / name, named_in)
    return _source(images, table, "folders", label_source, root)


def _picture(file: Path, named_in: str) -> np.ndarray:
    try:
        with Image.open(file, formats=("PNG",)) as image:
            if image.size != (SIDE, SIDE):
                size = f"{image.width}x{image.height}"
                raise UserError(f"{file}: is {size} pixels instead of {SIDE}x{SIDE}: replace it with the original")
            if image.mode.startswith("I"):
                raise UserError(f"{file}: has 16 bits per pixel instead of 8: replace it with the original")
            return np.asarray(image if image.mode == "L" else image.convert("L"))
    except FileNotFoundError:
        raise UserError(f"{file}: not found, but {named_in} names it: restore the picture") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise UserError(f"{file}: is not a readable PNG: replace it with the original") from None


def _source(images: np.ndarray, table: pd.DataFrame, form: str, label_source: str, where: Path) -> Source:
    for usage in USAGES:
        if not (table["usage"] == usage).any():
            raise UserError(
                f"{where}: contains no image of {usage}: training, validation and test images are all needed"
            )
    table = table.assign(usage=table["usage"].map(USAGES)).reset_index(drop=True)
    return Source(images, table, {"dataset": "ferplus", "form": form, "label_source": label_source})


def _zip_member(file: Path, names: tuple[str, ...]) -> str | None:
    """The member of a .zip with one of these file names; the earliest in `names` wins."""
    try:
        with zipfile.ZipFile(file) as archive:
            return _member(archive, names)
    except _DAMAGED as error:
        raise _unreadable(file, error) from None


def _member(archive: zipfile.ZipFile, names: tuple[str, ...]) -> str | None:
    members = [member for member in archive.namelist() if PurePosixPath(member).name in names]
    return min(members, key=lambda member: (names.index(PurePosixPath(member).name), member), default=None)


@contextmanager
def _opened(file: Path, names: tuple[str, ...]) -> Iterator[IO[bytes]]:
    """A stream of a csv: the file itself, the csv in a .tar.gz, or the member of a .zip that `names` lists."""
    try:
        with ExitStack() as stack:
            if file.name.endswith(".zip"):
                archive = stack.enter_context(zipfile.ZipFile(file))
                yield stack.enter_context(_open_member(archive, _member(archive, names) or "", file))
            elif file.name.endswith(TARBALLS):
                yield _tar_entry(stack.enter_context(tarfile.open(file, mode="r|gz")), file)
            else:
                yield stack.enter_context(file.open("rb"))
    except _DAMAGED as error:
        raise _unreadable(file, error) from None


def _open_member(archive: zipfile.ZipFile, name: str, file: Path) -> IO[bytes]:
    try:
        return archive.open(name)
    except RuntimeError:  # zipfile raises it for encryption and unknown compression
        raise UserError(f"{file}: {name} is encrypted or has an unknown compression: unpack it by hand") from None


def _tar_entry(tar: tarfile.TarFile, file: Path) -> IO[bytes]:
    for entry in tar:
        if PurePosixPath(entry.name).name in IMAGE_CSVS and (stream := tar.extractfile(entry)) is not None:
            return stream
    raise UserError(f"{file}: contains neither {' nor '.join(IMAGE_CSVS)}: download {TARBALL} again")


def _unreadable(file: Path, error: Exception) -> UserError:
    if isinstance(error, OSError) and error.errno is not None:
        return UserError(f"{file}: cannot be read ({error.strerror}): correct its permissions or replace it")
    return UserError(f"{file}: is truncated or damaged ({error}): download it again")
