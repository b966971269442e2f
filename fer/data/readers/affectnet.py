"""AffectNet, manually annotated (Mollahosseini et al. 2017): its csv pair with face boxes, or folders of annotations.

The publisher's validation set is `test`, as in publications; val is taken out of train.
"""

import io
import tokenize
import zipfile

import numpy as np
from tqdm import tqdm

from fer.data.found import Entry, Found, one_of, printable
from fer.data.rows import Table, header, whole
from fer.data.source import Face, Source, Wanted, of_faces
from fer.errors import UserError

CLASSES = ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt")
NUMBERS = ("neutral", "happiness", "sadness", "surprise", "fear", "disgust", "anger", "contempt")  # of the publisher
NO_CLASS = range(8, 11)  # none, uncertain, no face
LEFT_OUT = "none, uncertain or no face, as annotated"
TABLES = {"training.csv": "train", "validation.csv": "test"}
COLUMNS = ("subDirectory_filePath", "face_x", "face_y", "face_width", "face_height", "expression")
SETS = {"train_set": "train", "val_set": "test"}
ANNOTATION = "_exp.npy"
NO_NUMBER = (  # what numpy raises for a damaged file
    ValueError, TypeError, EOFError, OSError, SyntaxError, AttributeError, SystemError, tokenize.TokenError,
    zipfile.BadZipFile,
)  # fmt: skip


def read(found: Found, wanted: Wanted) -> Source:
    """Read AffectNet. Raises UserError for annotations and pictures that do not fit, with numbers and an example."""
    tables = {
        name: one_of(copies, f"files {name}")[0]
        for name in TABLES
        if (copies := [[entry] for entry in found.tables() if entry.base.lower() == name and _is_ours(entry)])
    }
    if tables:
        if absent := [name for name in TABLES if name not in tables]:
            raise UserError(f"{found.path}: holds no {absent[0]} of AffectNet: put it there, too")
        return _from_tables(found, tables, wanted)
    if any(entry.base.lower().endswith(ANNOTATION) for entry in found.entries):
        return _from_folders(found, wanted)
    raise found.nothing(
        f"no AffectNet found, neither {' and '.join(TABLES)} nor {' and '.join(SETS)} with images and annotations: "
        "put one of them there or correct the path in params.yaml (class folders: set data.dataset to folders)"
    )


def _is_ours(entry: Entry) -> bool:
    return {"subdirectory_filepath", "expression"} <= set(header(entry))


def _from_tables(found: Found, tables: dict[str, Entry], wanted: Wanted) -> Source:
    by_end: dict[str, list[Entry]] = {}
    for entry in found.pictures():
        by_end.setdefault("/".join(entry.place.split("/")[-2:]).lower(), []).append(entry)
    faces, without, missing, total = [], [], [], 0
    for name, listed in tables.items():
        with listed.opened() as stream:
            content = Table(listed, stream)
            columns = content.columns(COLUMNS, "use the file as AffectNet ships it")
            for where, fields in content:
                path, *box, expression = (fields[column] for column in columns)
                total += 1
                number = whole(expression)
                if number is None or number >= NO_CLASS.stop:
                    raise UserError(f"{where}: expression is '{expression}': must be a whole number from 0 to 10")
                entries = by_end.get(path.replace("\\", "/").lower(), [])
                if number in NO_CLASS:
                    without += [entry.name for entry in entries] or [where.rpartition("/")[2]]
                elif not entries:
                    missing.append(path)
                else:
                    entry = one_of([[entry] for entry in entries], f"pictures {path}")[0]
                    faces.append(Face(entry, TABLES[name], NUMBERS[number], box=_box(box, where)))
    _refuse_missing(found, missing, total, "rows")
    reasons = {LEFT_OUT: without}
    named = [printable(entry.name) for entry in tables.values()]
    return of_faces(found, faces, CLASSES, "tables with boxes", named, wanted, reasons, tables.values())


def _box(texts: list[str], where: str) -> tuple[int, int, int, int]:
    numbers = [whole(text) for text in texts]
    if None in numbers:
        raise UserError(f"{where}: the face's box is '{' '.join(texts)}': must be four whole numbers")
    left, top, width, height = (number or 0 for number in numbers)
    return left, top, left + width, top + height


def _from_folders(found: Found, wanted: Wanted) -> Source:
    pictures: dict[tuple[str, str], Entry] = {}
    annotations: dict[tuple[str, str], Entry] = {}
    for entry in found.entries:
        parts = entry.place.lower().split("/")
        usage = next((SETS[part] for part in parts if part in SETS), None)
        if usage is None or len(parts) < 2:
            continue
        stem = parts[-1].rpartition(".")[0]
        kind, key = None, (usage, stem)
        if entry.is_picture:
            kind = pictures
        elif parts[-1].endswith(ANNOTATION):
            kind, key = annotations, (usage, parts[-1].removesuffix(ANNOTATION))
        if kind is not None and kind.setdefault(key, entry) != entry:
            raise UserError(f"{entry}: {kind[key].name} is of the same set and number: keep one copy of the data set")
    without = [pictures[key].name for key in pictures if key not in annotations]
    _refuse_missing(found, [f"the annotation of {name}" for name in without], len(pictures), "pictures")
    _refuse_missing(found, [f"the picture of {annotations[key].name}" for key in annotations if key not in pictures],
                    len(annotations), "annotations")  # fmt: skip
    faces, left_out = [], []
    for (usage, stem), entry in tqdm(pictures.items(), desc="annotations", unit=" files", disable=None):
        number = _expression(annotations[usage, stem])
        if number in NO_CLASS:
            left_out.append(entry.name)
        else:
            faces.append(Face(entry, usage, NUMBERS[number]))
    used = list(annotations.values())
    roots = sorted({entry.name.rpartition("/")[0] for entry in (*pictures.values(), *used)})
    return of_faces(found, faces, CLASSES, "annotation files", roots, wanted, {LEFT_OUT: left_out}, used)


def _expression(entry: Entry) -> int:
    try:
        value = np.load(io.BytesIO(entry.read()), allow_pickle=False)
        number = whole(str(value.item()))
    except NO_NUMBER:
        number = None
    if number is None or number >= NO_CLASS.stop:
        raise UserError(f"{entry}: holds no number from 0 to 10: restore it")
    return number


def _refuse_missing(found: Found, missing: list[str], total: int, what: str) -> None:
    if missing:
        raise UserError(
            f"{found.path}: {len(missing)} of {total} {what} have no partner, the first lacks {missing[0]}: restore it"
        )
