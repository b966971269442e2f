"""FER2013 (Goodfellow et al. 2013) with its own labels: rows of fer2013.csv, or class folders, as on Kaggle."""

import warnings
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from fer.data.found import Entry, Found, one_of, printable
from fer.data.readers import folders
from fer.data.rows import check_columns, header, table, whole
from fer.data.source import UNWANTED, Source, Wanted, check_classes, hard_table, left_over, refuse_settings
from fer.errors import UserError

SIDE = 48  # pixels, of every image
EMOTIONS = ("anger", "disgust", "fear", "happiness", "sadness", "surprise", "neutral")  # the numbers of column emotion
CLASSES = ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear")
SPLITS = {"Training": "train", "PublicTest": "val", "PrivateTest": "test"}  # official usage -> split
IMAGE_CSVS = ("fer2013.csv", "icml_face_data.csv")
PUBLISHED = f"use {' or '.join(IMAGE_CSVS)} as Kaggle ships it"
UNKNOWN = -1  # emotion of a row that does not say


@dataclass(frozen=True)
class Rows:
    """The rows of fer2013.csv or icml_face_data.csv."""

    entry: Entry
    images: np.ndarray  # uint8 [N, 48, 48]
    usages: list[str]  # official
    emotions: np.ndarray  # int64 [N], an index of EMOTIONS or UNKNOWN
    lines: list[str]  # file and line of each


def read(found: Found, wanted: Wanted) -> Source:
    """Read FER2013 from a csv with pixels, or from class folders. Raises UserError, one line, for what does not fit."""
    entries = pixel_tables(found)
    if not entries:
        return folders.read_named(found, wanted, CLASSES, usage_in_name=SPLITS)
    refuse_settings(wanted, ("size", "subject_pattern"), f"rows of pixels are {SIDE}x{SIDE} and name no subjects")
    entry = one_of([[entry] for entry in entries], "csv files with pixels")[0]
    rows = read_rows(entry)
    bad = np.flatnonzero(rows.emotions == UNKNOWN)
    if len(bad):
        raise UserError(f"{rows.lines[bad[0]]}: emotion must be a whole number, 0 to {len(EMOTIONS) - 1}: {PUBLISHED}")
    labels = np.array([EMOTIONS[emotion] for emotion in rows.emotions])
    classes = wanted.classes or CLASSES
    check_classes(classes, CLASSES)
    kept = np.isin(labels, classes)
    unwanted = [rows.lines[row].rpartition("/")[2] for row in np.flatnonzero(~kept)]
    usages = [SPLITS[usage] for usage in np.array(rows.usages)[kept]]
    names = [""] * len(usages)
    described = hard_table(names, usages, names, labels[kept].tolist(), classes)
    rest = left_over(found, [entry], {UNWANTED: unwanted})
    return Source(rows.images[kept], described, classes, "hard", "rows of pixels", [printable(entry.name)], rest)


def pixel_tables(found: Found) -> list[Entry]:
    """The csv files that say of themselves that they hold pixels and the usage of each image, or else by name."""
    tables = found.tables()
    return [entry for entry in tables if {"pixels", "usage"} <= set(header(entry))] or [
        entry for entry in tables if entry.base.lower() in IMAGE_CSVS
    ]


def read_rows(entry: Entry) -> Rows:
    """All images of a csv. Raises UserError, with the line, for what is no image of 48x48 pixels."""
    images, usages, emotions, lines = [], [], [], []
    with table(entry) as content, warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # NumPy before 2.3 warns of text that is no number
        pixels, usage = content.columns(["pixels", "Usage"], PUBLISHED)
        emotion = content.header.index("emotion") if "emotion" in content.header else None
        for where, fields in tqdm(content.rows, desc=entry.base, unit=" rows", disable=None):
            _refuse_text(fields, where)
            check_columns(len(fields), len(content.header), where)
            usages.append(official_usage(fields[usage], where))
            images.append(_pixels(fields[pixels].strip(' "'), where))
            lines.append(where)
            number = None if emotion is None else whole(fields[emotion])
            emotions.append(number if number is not None and number < len(EMOTIONS) else UNKNOWN)
    if not images:
        raise UserError(f"{entry}: holds no image: download it again")
    return Rows(entry, np.stack(images), usages, np.array(emotions), lines)


def official_usage(text: str, where: str) -> str:
    """Training, PublicTest or PrivateTest, however it is spelled. Raises UserError for anything else."""
    for usage in SPLITS:
        if text.strip(" \"'").lower() == usage.lower():
            return usage
    raise UserError(f"{where}: unknown Usage '{text}': must be {', '.join(SPLITS)}")


def _refuse_text(fields: list[str], where: str) -> None:
    if max(field.count(" ") for field in fields) < SIDE and not any(field.isdigit() for field in fields[:1]):
        text = ",".join(fields)
        shown = text if len(text) < 40 else f"{text[:40]}..."
        raise UserError(f"{where}: '{shown}' is no row of pixels: delete what does not belong to the table there")


def _pixels(text: str, where: str) -> np.ndarray:
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
    return values.astype(np.uint8).reshape(SIDE, SIDE)
