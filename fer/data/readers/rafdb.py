"""RAF-DB, basic emotions (Li et al. 2017): the list of labels with aligned pictures, or class folders, as on Kaggle."""

from fer.data.found import Entry, Found, one_of, printable
from fer.data.readers import folders
from fer.data.rows import whole
from fer.data.source import Face, Source, Wanted, of_faces
from fer.errors import UserError

CLASSES = ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear")
NUMBERS = {  # of the publisher
    "1": "surprise", "2": "fear", "3": "disgust", "4": "happiness", "5": "sadness", "6": "anger", "7": "neutral",
}  # fmt: skip
LISTS = ("list_patition_label.txt", "list_partition_label.txt")  # the publisher spells it in the first way
ALIGNED = "_aligned"


def read(found: Found, wanted: Wanted) -> Source:
    """Read RAF-DB. Raises UserError for a list and pictures that do not fit, with numbers and the first example."""
    lists = [entry for entry in found.entries if entry.base.lower() in LISTS]
    if not lists:
        places = {entry.folder for entry in found.pictures() if _stem(entry) + ALIGNED in entry.base.lower()}
        if len(places) == 1:  # not a folder for each class
            raise UserError(f"{found.path}: holds aligned pictures and no {LISTS[0]}: put EmoLabel of RAF-DB there")
        return folders.read_named(found, wanted, CLASSES, NUMBERS)
    listed = one_of([[entry] for entry in lists], f"files {LISTS[0]}")[0]
    pictures, other = _pictures(found)
    stems = {_stem(entry): entry for entry in pictures}
    faces, missing = [], []
    seen: dict[str, str] = {}
    for where, name, label in _lines(listed):
        if name in seen:
            raise UserError(f"{where}: {name} stands in {seen[name]} as well: delete one of them")
        seen[name] = where.rpartition("/")[2]
        usage = name.partition("_")[0].lower()
        if usage not in ("train", "test"):
            raise UserError(f"{where}: '{name}' begins with neither train_ nor test_: restore the name")
        if (entry := stems.pop(name.rpartition(".")[0].lower(), None)) is None:
            missing.append(name)
        else:
            faces.append(Face(entry, usage, label))
    if missing:
        raise UserError(
            f"{listed}: names {len(missing)} of {len(seen)} pictures that are not there (the first: {missing[0]}): "
            "put Image/aligned of RAF-DB there, whole"
        )
    if stems:
        raise UserError(
            f"{listed}: has no line for {len(stems)} of {len(pictures)} pictures "
            f"(the first: {next(iter(stems.values()))}): restore the list"
        )
    roots = sorted({printable(entry.name.rpartition("/")[0]) for entry in pictures})
    reasons = {"the aligned pictures are read instead": [entry.name for entry in other]}
    return of_faces(found, faces, CLASSES, "list", [*roots, printable(listed.name)], wanted, reasons, [listed])


def _pictures(found: Found) -> tuple[list[Entry], list[Entry]]:
    """The aligned pictures, or the original ones where there are no others, and those not read."""
    aligned: list[Entry] = []
    original: list[Entry] = []
    for entry in found.pictures():
        (aligned if entry.base.rpartition(".")[0].lower().endswith(ALIGNED) else original).append(entry)
    chosen = aligned or original
    by_folder: dict[str, list[Entry]] = {}
    for entry in chosen:
        by_folder.setdefault(entry.name.rpartition("/")[0], []).append(entry)
    if not by_folder:
        raise found.nothing("holds a list of RAF-DB and no pictures: put Image/aligned of RAF-DB there")
    return one_of(list(by_folder.values()), "folders of pictures of RAF-DB"), original if aligned else []


def _stem(entry: Entry) -> str:
    return entry.base.rpartition(".")[0].lower().removesuffix(ALIGNED)


def _lines(entry: Entry) -> list[tuple[str, str, str]]:
    """File and line, name and class of each line."""
    found = []
    for number, line in enumerate(entry.read().decode("utf-8-sig", "replace").splitlines(), start=1):
        fields = line.replace(",", " ").split()
        if not fields:
            continue
        where = f"{entry} line {number}"
        label = whole(fields[1]) if len(fields) == 2 else None
        if label is None or str(label) not in NUMBERS:
            raise UserError(f"{where}: '{line.strip()[:60]}' is no name and number from 1 to 7: restore the list")
        found.append((where, fields[0], NUMBERS[str(label)]))
    return found
