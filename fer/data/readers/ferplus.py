"""FER+ (Barsoum et al. 2016): FER2013's images with ten crowd votes each.

Images: pictures in the folders FER2013Train, FER2013Valid and FER2013Test, or the rows of fer2013.csv. Votes: a
label.csv in each of those folders, by name, or fer2013new.csv, whose rows are those of fer2013.csv and name the
pictures. Either form of the images goes with either form of the votes.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from fer.data.decode import UNREADABLE
from fer.data.found import Entry, Found, beside, one_of, printable
from fer.data.labels import CLASSES, VOTE_COLUMNS, label_distribution
from fer.data.picture_files import fault
from fer.data.readers.fer2013 import EMOTIONS, IMAGE_CSVS, SIDE, SPLITS, UNKNOWN, Rows, official_usage, pixel_tables
from fer.data.readers.fer2013 import read_rows as read_pixels
from fer.data.rows import check_columns, header, rows, table, whole
from fer.data.source import TEXT_COLUMNS, Source, Wanted, left_over, refuse_settings
from fer.errors import UserError

FOLDERS = {"FER2013Train": "Training", "FER2013Valid": "PublicTest", "FER2013Test": "PrivateTest"}
VOTES_CSV = "fer2013new.csv"
LABEL_CSV = "label.csv"
LABEL_SOURCES = ("auto", "label_csv", "fer2013new")
COLUMNS = (*TEXT_COLUMNS, *VOTE_COLUMNS)
LOSSLESS = ("PNG", "BMP", "PPM", "TIFF")
AGREEMENT = 0.4  # least share of images whose column emotion fits their votes; about .2 by chance
COUNTED = 20  # fewer images say nothing about their order
BLOCK = 500  # images that are compared at a time


@dataclass(frozen=True)
class Places:
    """What is there of FER+."""

    pictures: dict[str, list[Entry]]  # official folder -> its pictures; only the folders that hold any
    labels: dict[str, Entry]  # official folder -> its label.csv
    rows: list[Entry]  # csv files with pixels
    votes: list[Entry]  # files like fer2013new.csv


def read(found: Found, wanted: Wanted) -> Source:
    """Read FER+ in any of its forms. `label_source`: label_csv, fer2013new, or auto for label_csv where it is there.

    Rows are in the order of the file with the votes. Rows of fer2013.csv without a name (not a face) are kept with an
    empty name where fer2013new.csv has the votes. Raises UserError, one line with file, line and remedy, for anything
    missing, damaged or inconsistent; ValueError for an unknown `label_source`.
    """
    why = f"FER+ has {SIDE}x{SIDE} pixels, {len(CLASSES)} classes and no subjects"
    refuse_settings(wanted, ("size", "subject_pattern", "classes"), why)
    if wanted.label_source not in LABEL_SOURCES:
        raise ValueError(f"unknown label source '{wanted.label_source}'; known: {', '.join(LABEL_SOURCES)}")
    places = look_for(found)
    if not places.pictures and not places.rows:
        _refuse(found, places)
    own = places.labels if wanted.label_source != "fer2013new" else {}
    if wanted.label_source == "label_csv" and not own:
        raise UserError(
            f"{found.path}: holds no {LABEL_CSV}, which clones of microsoft/FERPlus have in {', '.join(FOLDERS)}: "
            f"set data.label_source to auto or fer2013new"
        )
    for folder in places.pictures if own else ():
        if folder not in own:
            raise UserError(
                f"{_folder(places.pictures[folder])}/{LABEL_CSV}: not found: restore it from microsoft/FERPlus, "
                "or set data.label_source to fer2013new"
            )
    if places.pictures:
        return _from_pictures(found, places, own)
    return _from_rows(found, places, own)


def look_for(found: Found) -> Places:
    """What is there of FER+. Raises UserError where there are copies that differ."""
    pictures, labels = {}, {}
    for folder in FOLDERS:
        inside = [entry for entry in found.entries if entry.folder.rpartition("/")[2].lower() == folder.lower()]
        by_folder: dict[str, list[Entry]] = {}
        for entry in inside:
            if entry.is_picture:
                by_folder.setdefault(entry.name.rpartition("/")[0], []).append(entry)
        if by_folder:
            pictures[folder] = one_of(list(by_folder.values()), f"folders {folder} with pictures")
        if tables := [[entry] for entry in inside if entry.base.lower() == LABEL_CSV]:
            labels[folder] = one_of(tables, f"files {LABEL_CSV} of {folder}")[0]
    return Places(pictures, labels, pixel_tables(found), vote_tables(found))


def vote_tables(found: Found) -> list[Entry]:
    """The csv files that say of themselves that they are fer2013new.csv, also beside a path that is a file."""
    entries = [*found.tables(), *(entry for entry in beside(found) if entry.base.lower() == VOTES_CSV)]
    return [entry for entry in entries if entry.base.lower() == VOTES_CSV or {"usage", "neutral"} <= set(header(entry))]


def _refuse(found: Found, places: Places) -> None:
    """Raise the UserError for a folder without images of FER+."""
    if places.labels:
        raise UserError(
            f"{found.path}: holds the {LABEL_CSV} of FER+ but no images: put {IMAGE_CSVS[0]} and {VOTES_CSV} there, too"
        )
    if found.path.name in FOLDERS:
        raise UserError(f"params.yaml: data: {found.path} is one of the folders of FER+: name the folder above it")
    folders = {entry.folder for entry in found.pictures() if entry.folder}
    if len(folders) > 1:
        raise UserError(
            f"{found.path}: holds folders of pictures, as {printable(min(folders))}, which have no votes: "
            "set data.dataset to folders, or to the name of the data set"
        )
    raise found.nothing(
        f"no FER+ found, neither pictures in {', '.join(FOLDERS)} nor {' or '.join(IMAGE_CSVS)}, also in an archive: "
        f"put one of them there, with {VOTES_CSV}, or correct the path in params.yaml"
    )


def _votes_file(found: Found, places: Places) -> Entry:
    if not places.votes:
        raise found.nothing(f"{VOTES_CSV} not found: download it from the microsoft/FERPlus repository to this place")
    return one_of([[entry] for entry in places.votes], f"files {VOTES_CSV}")[0]


def _from_pictures(found: Found, places: Places, labels: dict[str, Entry]) -> Source:
    parts, entries, used = [], [], list(labels.values())
    reasons = {"the pictures in the folders are read instead": [entry.name for entry in places.rows]}
    if labels:
        twice = reasons.setdefault("a line that stands twice", [])
        tables = {folder: _label_rows(entry, folder, twice) for folder, entry in labels.items()}
        named_in = LABEL_CSV
    else:
        votes = _votes_file(found, places)
        used.append(votes)
        everything = _vote_rows(votes)
        nameless = everything["name"] == ""
        reasons["a row without a name, so without a picture"] = [
            f"{VOTES_CSV} row {row + 2}" for row in np.flatnonzero(nameless)
        ]
        tables = {folder: everything[~nameless & (everything["usage"] == usage)] for folder, usage in FOLDERS.items()}
        named_in = VOTES_CSV
    for folder, part in tables.items():
        entries += _pair(part["name"].tolist(), folder, places, named_in)
        parts.append(part)
    described = pd.concat(parts)
    _complete(found, described)
    if not labels:  # in the order of the file with the votes
        order = np.argsort(described.index, kind="stable")
        described, entries = described.iloc[order], [entries[row] for row in order]
    shown = [entry.name.rpartition("/")[0] for entry in dict.fromkeys(group[0] for group in places.pictures.values())]
    images = np.empty((len(entries), SIDE, SIDE), dtype=np.uint8)
    for row, entry in enumerate(tqdm(entries, desc="pictures", unit=" images", disable=None)):
        images[row] = _picture(entry)
    rest = left_over(found, [*entries, *used], reasons)
    return _source(images, described, "pictures", shown, used, bool(labels), rest)


def _pair(names: list[str], folder: str, places: Places, named_in: str) -> list[Entry]:
    """The picture of each name, whatever its suffix. Raises UserError for names and pictures without a partner."""
    pictures = places.pictures.get(folder, [])
    by_stem = {entry.base.rpartition(".")[0].lower(): entry for entry in pictures} | {
        entry.base.lower(): entry for entry in pictures
    }
    paired = [by_stem.get(name.lower()) or by_stem.get(name.rpartition(".")[0].lower()) for name in names]
    missing = [name for name, entry in zip(names, paired) if entry is None]
    if missing:
        where = _folder(pictures) if pictures else folder
        more = f" (and {len(missing) - 1} more of {len(names)})" if len(missing) > 1 else ""
        raise UserError(f"{where}/{missing[0]}: not found, but {named_in} names it{more}: restore the picture")
    named = {entry for entry in paired if entry is not None}
    extra = [entry for entry in pictures if entry not in named]
    if extra:
        raise UserError(
            f"{_folder(pictures)}: {len(extra)} of {len(pictures)} pictures have no line in {named_in}, which has "
            f"{len(names)} (the first: {printable(extra[0].base)}): restore that file from microsoft/FERPlus, "
            "or remove the pictures"
        )
    return [entry for entry in paired if entry is not None]


def _from_rows(found: Found, places: Places, labels: dict[str, Entry]) -> Source:
    """The rows of fer2013.csv with the votes of fer2013new.csv by position, or of label.csv by the names there."""
    pixels = one_of([[entry] for entry in places.rows], "csv files with pixels")[0]
    votes_file = _votes_file(found, places)
    votes = _vote_rows(votes_file)
    content = read_pixels(pixels)
    _refuse_other_rows(content, votes, votes_file)
    facts = {} if (share := agreement(content, votes, votes_file)) is None else {"emotion_agrees": share}
    reasons: dict[str, list[str]] = {}
    used, images, described = [pixels, votes_file], content.images, votes
    if labels:
        twice = reasons.setdefault("a line that stands twice", [])
        if absent := [folder for folder in FOLDERS if folder not in labels]:
            raise UserError(
                f"{found.path}: holds no {LABEL_CSV} of {', '.join(absent)}: restore it from microsoft/FERPlus"
            )
        described = pd.concat([_label_rows(entry, folder, twice) for folder, entry in labels.items()])
        order, reasons["a row that no label.csv names"] = _by_name(described, votes, votes_file, labels)
        images = images[order]
        used += labels.values()
    _complete(found, described)
    rest = left_over(found, used, reasons)
    return _source(images, described, "rows of pixels", [pixels.name], used[1:], bool(labels), rest, facts)


def _by_name(
    labels: pd.DataFrame, votes: pd.DataFrame, votes_file: Entry, files: dict[str, Entry]
) -> tuple[list[int], list[str]]:
    """The row of each image of label.csv, the last of its name, and the rows that it leaves out."""
    row_of = {key: row for row, key in enumerate(zip(votes["usage"], votes["name"]))}
    wanted = list(zip(labels["usage"], labels["name"]))
    file_of = {usage: files[folder] for folder, usage in FOLDERS.items()}
    for usage, name in wanted:
        if (usage, name) not in row_of:
            raise UserError(
                f"{file_of[usage]}: {name} is no {usage} image in {votes_file}: use files that belong together"
            )
    named = set(wanted)
    extra = [key for key in row_of if key[1] and key not in named]
    if extra:
        usage, name = extra[0]
        raise UserError(
            f"{file_of[usage]}: has no line for {len(extra)} of {len(row_of)} images that {votes_file} names "
            f"(the first: {name}): restore it from microsoft/FERPlus"
        )
    order = [row_of[key] for key in wanted]
    taken = set(order)
    return order, [f"{VOTES_CSV} row {row + 2}" for row in range(len(votes)) if row not in taken]


def _refuse_other_rows(content: Rows, votes: pd.DataFrame, votes_file: Entry) -> None:
    """Raise UserError unless the rows of the two files can be the same images."""
    own, other = len(content.usages), len(votes)
    if own != other:
        short = content.entry if own < other else votes_file
        raise UserError(
            f"{content.entry}: has {own} rows but {votes_file} {other}: rows correspond by position, "
            f"so both files must be whole; fetch {short} again"
        )
    for where, usage, expected in zip(content.lines, content.usages, votes["usage"]):
        if usage != expected:
            raise UserError(
                f"{where}: Usage is {usage} but {expected} in the same row of {votes_file}: "
                "rows correspond by position, so both files must be in their published order"
            )


def agreement(content: Rows, votes: pd.DataFrame, votes_file: Entry) -> float | None:
    """Share of images whose column emotion is the majority of their votes; None if that column says nothing.

    Raises UserError where fewer than AGREEMENT of a block of BLOCK images or more agree: they are not the same then.
    """
    keep, label, _ = label_distribution(votes[list(VOTE_COLUMNS)].to_numpy(), "majority", len(CLASSES))
    number = np.array([CLASSES.index(name) for name in EMOTIONS])[content.emotions]
    counted = keep & (label != CLASSES.index("contempt")) & (content.emotions != UNKNOWN)  # FER2013 has no contempt
    if counted.sum() < COUNTED or len(set(number[counted])) == 1:
        return None
    agrees, usages = number == label, np.array(content.usages)
    for usage in SPLITS:
        rows_of = np.flatnonzero(counted & (usages == usage))
        for block in np.array_split(rows_of, max(1, len(rows_of) // BLOCK)):
            if len(block) >= COUNTED and agrees[block].mean() < AGREEMENT:
                last = content.lines[block[-1]].rpartition(" ")[2]
                raise UserError(
                    f"{content.lines[block[0]]}: from here to line {last} column emotion fits the votes in the same "
                    f"row of {votes_file} for {agrees[block].mean():.0%} of the images, and for most if both files "
                    "are in their published order: fetch both again"
                )
    return round(float(agrees[counted].mean()), 4)


def _vote_rows(entry: Entry) -> pd.DataFrame:
    """The rows of fer2013new.csv as COLUMNS, with the official usages."""
    found = []
    with table(entry) as content:
        columns = content.columns(["Usage", "Image name", *VOTE_COLUMNS], f"download {VOTES_CSV} again")
        for where, fields in content:
            usage, name, *votes = (fields[column] for column in columns)
            _check_name(name, where)
            found.append((name, official_usage(usage, where), "", *_votes(votes, where)))
    return pd.DataFrame(found, columns=COLUMNS)


def _label_rows(entry: Entry, folder: str, twice: list[str]) -> pd.DataFrame:
    """The rows of one folder's label.csv as COLUMNS; a line that stands there again goes to `twice`."""
    found = []
    seen: dict[str, tuple[str, list[int]]] = {}
    with entry.opened() as stream:
        for where, fields in rows(entry, stream):
            check_columns(len(fields), 2 + len(VOTE_COLUMNS), where)  # name, box, votes
            name, box, *texts = fields
            if not name:
                raise UserError(f"{where}: the name of the picture is missing: delete the line or restore the name")
            _check_name(name, where)
            _check_box(box, where)
            votes = _votes(texts, where)
            first, others = seen.setdefault(name, (where, votes))
            if votes != others:
                line = first.rpartition(" ")[2]
                raise UserError(f"{where}: {name} has different votes in line {line}: delete the wrong line")
            if first != where:
                twice.append(where)
                continue
            found.append((name, FOLDERS[folder], "", *votes))
    return pd.DataFrame(found, columns=COLUMNS)


def _votes(texts: Sequence[str], where: str) -> list[int]:
    counts = [whole(text) for text in texts]
    for name, text, count in zip(VOTE_COLUMNS, texts, counts, strict=True):
        if count is None or count > 9999:
            raise UserError(f"{where}: {name} has '{text}' votes: must be a whole number, 0 or more")
    return [count for count in counts if count is not None]


def _check_name(name: str, where: str) -> None:
    """Raise UserError for a name that would read a file outside its folder."""
    if "/" in name or "\\" in name or name in (".", ".."):
        raise UserError(f"{where}: '{name}' must be a plain file name: remove its folder part")


def _check_box(box: str, where: str) -> None:
    numbers = [whole(part) for part in box.strip("()[] ").replace(",", " ").split()]
    if numbers != [0, 0, SIDE, SIDE]:
        raise UserError(
            f"{where}: the box is {box or 'empty'} instead of (0, 0, {SIDE}, {SIDE}): "
            "crop and resize the picture to the face"
        )


def _picture(entry: Entry) -> np.ndarray:
    content = entry.read()
    again = "replace it with the original"
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.format not in LOSSLESS:
                raise UserError(
                    f"{entry}: is a {image.format}, which changes pixels, instead of a PNG: make the pictures again"
                )
            if image.size != (SIDE, SIDE):
                size = f"{image.width}x{image.height}"
                raise UserError(f"{entry}: is {size} pixels instead of {SIDE}x{SIDE}: {again}")
            if image.mode.startswith(("I", "F")):
                raise UserError(f"{entry}: has 16 bits per pixel instead of 8: {again}")
            return np.asarray(image if image.mode == "L" else image.convert("L"))
    except UNREADABLE as error:
        raise UserError(f"{entry}: {fault(content, error, again)}") from None


def _folder(pictures: list[Entry]) -> str:
    return str(pictures[0]).rpartition("/")[0]


def _complete(found: Found, described: pd.DataFrame) -> None:
    for usage in SPLITS:
        if not (described["usage"] == usage).any():
            raise UserError(
                f"{found.path}: contains no image of {usage}: training, validation and test images are all needed"
            )


def _source(
    images: np.ndarray, described: pd.DataFrame, form: str, places: list[str], votes: Sequence[Entry], by_name: bool,
    left_out: dict[str, list[str]], facts: dict | None = None,
) -> Source:  # fmt: skip
    described = described.assign(usage=described["usage"].map(SPLITS)).reset_index(drop=True)
    beside_them = [entry.name for entry in votes if entry.name.rpartition("/")[0] not in places]
    read_files = [printable(name) for name in (*places, *beside_them)]
    more = {"label_source": "label_csv" if by_name else "fer2013new", **(facts or {})}
    return Source(images, described, CLASSES, "votes", form, read_files, left_out, more)
