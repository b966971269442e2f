"""Class folders: a folder of pictures for each class, with train, val and test above them, below them or nowhere."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fer.data.found import Entry, Found, joined, printable
from fer.data.labels import USAGES, emotion
from fer.data.source import Face, Source, Wanted, of_faces
from fer.errors import UserError


def read(found: Found, wanted: Wanted) -> Source:
    """Read class folders; the classes are the names of the folders, numbers in order, then words.

    Raises UserError for pictures in no class folder, several copies, or a class that train lacks.
    """
    faces, roots = class_folders(found)
    classes = sorted({face.label for face in faces}, key=in_order)
    _refuse_strangers(faces, found)
    return of_faces(found, faces, classes, "class folders", roots, wanted)


def read_named(
    found: Found, wanted: Wanted, classes: Sequence[str], names: Mapping[str, str] | None = None,
    usage_in_name: Mapping[str, str] | None = None,
) -> Source:  # fmt: skip
    """Read the class folders of a data set whose `classes` are known.

    `names`: folder -> class, else by its English name (angry is anger). `usage_in_name`: what file names begin with, if
    all do -> their split. Raises UserError as `read`, and for a folder that is no class.
    """
    faces, roots = class_folders(found)
    labels = {face.label: (names or {}).get(face.label) or emotion(face.label) for face in faces}
    for folder, label in labels.items():
        if label not in classes:
            raise UserError(f"{found.path}: folder '{printable(folder)}' is none of {', '.join(classes)}: remove it")
    faces = [replace(face, label=labels[face.label] or "") for face in faces]
    if usage_in_name:
        faces = _by_name(faces, usage_in_name)
    return of_faces(found, faces, classes, "class folders", roots, wanted)


def class_folders(found: Found) -> tuple[list[Face], list[str]]:
    """Every picture with its split and class, as the folders say, and the folders above them.

    Raises UserError if they are not laid out as class folders.
    """
    pictures = found.pictures()
    if not pictures:
        raise found.nothing(
            "holds no pictures: put class folders there, as train/happiness/1.png, or correct the path in params.yaml"
        )
    _refuse_doubles(found, pictures)
    parts = [entry.folder.split("/") if entry.folder else [] for entry in pictures]
    above = _common(parts)
    inside = [folders[above:] for folders in parts]
    for entry, folders in zip(pictures, inside):
        if not folders:
            raise UserError(f"{entry}: lies in no class folder: sort the pictures by class, as happiness/1.png")
    firsts, seconds = ({folders[level] for folders in inside if len(folders) > level} for level in (0, 1))
    if any(name.lower() in USAGES for name in firsts):
        faces = _below_splits(found, pictures, inside)
    elif seconds and _are_splits({USAGES.get(name.lower()) for name in seconds}):
        for entry, names in zip(pictures, inside):
            if len(names) < 2 or names[1].lower() not in USAGES:
                raise UserError(f"{entry}: lies beside the folders of the splits, not in them: move or delete it")
        faces = [Face(e, USAGES[names[1].lower()], names[0]) for e, names in zip(pictures, inside)]
    else:
        faces = [Face(entry, "", names[0]) for entry, names in zip(pictures, inside)]
    below = 2 if faces[0].usage else 1
    _refuse_copies(found, {face.label for face in faces}, {names[below] for names in inside if len(names) > below})
    if len({face.label for face in faces}) < 2:
        raise UserError(
            f"{found.path}: holds pictures of one class only, {printable(faces[0].label)}: "
            "name the folder above the classes"
        )
    usages = {face.usage for face in faces}
    if usages != {""} and "train" not in usages:
        raise UserError(f"{found.path}: has {', '.join(sorted(usages))} and no train: name the folder above them")
    if "val" in usages and "test" not in usages:
        raise UserError(
            f"{found.path}: has train and val and no test: rename val to test (split.val_share of train becomes val)"
        )
    roots = sorted({_root(face.entry, len(names)) for face, names in zip(faces, inside)})
    return faces, roots


def _common(parts: list[list[str]]) -> int:
    """How many folders lie above the splits or classes: those that all pictures share, up to a split."""
    shared = 0
    while len({folders[shared] if len(folders) > shared else None for folders in parts} - {None}) == 1 and all(
        len(folders) > shared for folders in parts
    ):
        shared += 1
    for level, name in enumerate(parts[0][:shared]):
        if name.lower() in USAGES:
            return level
    return shared if any(len(folders) > shared for folders in parts) else max(shared - 1, 0)


def _below_splits(found: Found, pictures: Sequence[Entry], inside: Sequence[Sequence[str]]) -> list[Face]:
    faces = []
    folder_of: dict[str, str] = {}
    for entry, names in zip(pictures, inside):
        usage = USAGES.get(names[0].lower())
        if usage is None:
            raise UserError(
                f"{entry}: lies beside the folders of the splits, not in them: move or delete {printable(names[0])}"
            )
        if folder_of.setdefault(usage, names[0]) != names[0]:
            raise UserError(
                f"{found.path}: holds several folders for {usage}: {folder_of[usage]}, {names[0]}: keep one of them"
            )
        if len(names) < 2:
            raise UserError(f"{entry}: lies in no class folder: sort the pictures by class, as train/happiness/1.png")
        faces.append(Face(entry, usage, names[1]))
    return faces


def _are_splits(found: set[str | None]) -> bool:
    """Whether folders are splits that mean these, None being any other name: dev may be a person beside others."""
    return "train" in found or None not in found


def _refuse_doubles(found: Found, pictures: Sequence[Entry]) -> None:
    """Raise UserError for pictures that several archives, or an archive and a folder, have at the same place.

    And for archives whose names alone tell splits apart, as of train.zip and test.zip with a folder images in each.
    """
    places: dict[str, Entry] = {}
    for entry in pictures:
        if (other := places.setdefault(entry.place, entry)) is not entry:
            raise UserError(
                f"{entry}: lies at the same place as {printable(other.name)}: if they are copies, keep one; "
                "if not, unpack the archives into folders of their own"
            )
    archives = {entry.hidden_archive for entry in pictures} - {""}
    splits = {USAGES[name.lower()] for name in archives if name.lower() in USAGES}
    named = any(part.lower() in USAGES for entry in pictures for part in entry.folder.split("/"))
    if len(splits) > 1 and not named:
        raise UserError(
            f"{found.path}: only the names of the archives {', '.join(sorted(archives))} tell the splits: "
            "unpack each into a folder of its name"
        )


def _refuse_copies(found: Found, labels: set[str], below: set[str]) -> None:
    """Raise UserError where the classes are not the folders of `labels`, but those `below` them."""
    if len(below) > 1 and all(emotion(name) for name in below) and not any(emotion(name) for name in labels):
        raise UserError(
            f"{found.path}: holds several folders with class folders: {', '.join(map(printable, sorted(labels)))}: "
            "give the path of the one to read in params.yaml"
        )


def _refuse_strangers(faces: Sequence[Face], found: Found) -> None:
    """Raise UserError for a class that train lacks, as happens where a folder is spelled in two ways."""
    trained = {joined(face.label) for face in faces if face.usage in ("", "train")}
    for face in faces:
        if joined(face.label) not in trained:
            raise UserError(
                f"{found.path}: {face.usage} has a folder {printable(face.label)} and train has none, but "
                f"{', '.join(map(printable, sorted(trained)))}: give them the same names"
            )


def _by_name(faces: list[Face], usage_in_name: Mapping[str, str]) -> list[Face]:
    """The faces with the split that their file names tell, if all of them do."""
    told = [usage_in_name.get(face.entry.base.partition("_")[0]) for face in faces]
    if None in told:
        return faces
    for face, usage in zip(faces, told):
        if (face.usage == "train") != (usage == "train") and face.usage:
            raise UserError(f"{face.entry}: its name says {usage}, its folder {face.usage}: move it back")
    return [replace(face, usage=usage or "") for face, usage in zip(faces, told)]


def _root(entry: Entry, depth: int) -> str:
    """The folder above the splits or classes, by its name in the path."""
    return printable("/".join(entry.name.split("/")[: -1 - depth])) or "."


def in_order(name: str) -> tuple[bool, int, str, str]:
    """The order of class names: numbers, then words."""
    name = joined(name)  # the same order on all systems
    return not name.isdecimal(), int(name) if name.isdecimal() else 0, name.lower(), name
