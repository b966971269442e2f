"""AffectNet's csv pair with face boxes, and its folders with an annotation file for each picture."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_folders import put, read, refused, rows

from fer.data.readers import affectnet

HEADER = "subDirectory_filePath,face_x,face_y,face_width,face_height,facial_landmarks,expression,valence,arousal"
MEANT = ["neutral", "happiness", "sadness", "surprise", "fear", "disgust", "anger", "contempt"]  # by their number
SETS = {"training.csv": "train", "validation.csv": "test"}
IMAGES = "Manually_Annotated/Manually_Annotated_Images"


def tables(root: Path) -> Path:
    """Eleven rows each: all expressions from 0 to 10."""
    names = {name: [f"{n}/{name[:2]}{n}.jpg" for n in range(11)] for name in SETS}
    put(root, [f"{IMAGES}/{path}" for paths in names.values() for path in paths])
    for name, paths in names.items():
        lines = [f"{path},1,2,6,5,0.5;0.5,{n},0.1,-0.2" for n, path in enumerate(paths)]
        (root / name).write_text("\n".join([HEADER, *lines]) + "\n")
    return root


def annotations(root: Path) -> Path:
    for number, folder in enumerate(("train_set", "val_set")):
        put(root, [f"AffectNet/{folder}/images/{n}.jpg" for n in range(9)])
        (root / f"AffectNet/{folder}/annotations").mkdir()
        for n in range(9):
            for kind, value in (("exp", str(n)), ("val", "0.1"), ("aro", "0.2"), ("lnd", "0 0")):
                path = root / f"AffectNet/{folder}/annotations/{n}_{kind}.npy"
                np.save(path, np.array(value) if number or kind != "exp" else np.array(n))  # text, or a number
    return root


def test_tables_with_boxes(tmp_path: Path) -> None:
    source = read(tables(tmp_path), affectnet.read)
    found = rows(source)
    assert len(found) == 16
    for number, (name, usage) in enumerate(SETS.items()):
        for n, label in enumerate(MEANT):
            expected = (usage, "", label, 11 * number + n)
            assert found[f"{IMAGES}/{n}/{name[:2]}{n}.jpg"] == expected
    assert source.images.shape == (16, 5, 6)  # the box, as it lies in the picture
    assert (source.classes, source.read) == (affectnet.CLASSES, ["training.csv", "validation.csv"])
    assert len(source.left_out["none, uncertain or no face, as annotated"]) == 6
    seven = read(tmp_path, affectnet.read, classes=affectnet.CLASSES[:7])
    assert (len(seven.table), len(seven.classes)) == (14, 7)


def test_folders_with_annotations(tmp_path: Path) -> None:
    source = read(annotations(tmp_path), affectnet.read)
    found = rows(source)
    for folder, usage in affectnet.SETS.items():
        for n, label in enumerate(MEANT):
            assert found[f"AffectNet/{folder}/images/{n}.jpg"][:3] == (usage, "", label)
    assert len(found) == 16
    assert len(source.left_out["none, uncertain or no face, as annotated"]) == 2
    assert len(source.left_out["no part of the data set"]) == 54  # valence, arousal, landmarks


def edit(file: str, old: str, new: str) -> Callable[[Path], object]:
    return lambda root: (root / file).write_text((root / file).read_text().replace(old, new, 1))


EXP = "AffectNet/train_set/annotations/3_exp.npy"
MISTAKES: dict[str, tuple[Callable[[Path], Path], Callable[[Path], object], str]] = {
    "one table": (tables, lambda root: (root / "validation.csv").unlink(),
                  "{root}: holds no validation.csv of AffectNet: put it there, too"),
    "a missing picture": (
        tables, lambda root: [(root / IMAGES / f"{n}/tr{n}.jpg").unlink() for n in (2, 5, 9)],  # 9 is no class
        "{root}: 2 of 22 rows have no partner, the first lacks 2/tr2.jpg: restore it",
    ),
    "no expression": (tables, edit("training.csv", ",3,0.1", ",11,0.1"),
                      "{root}/training.csv line 5: expression is '11': must be a whole number from 0 to 10"),
    "no box": (tables, edit("training.csv", ",1,2,6,5,", ",NULL,2,6,5,"),
               "{root}/training.csv line 2: the face's box is 'NULL 2 6 5': must be four whole numbers"),
    "a picture without annotation": (
        annotations, lambda root: (root / EXP).unlink(),
        "{root}: 1 of 18 pictures have no partner, the first lacks the annotation of "
        "AffectNet/train_set/images/3.jpg: restore it",
    ),
    "an annotation without picture": (
        annotations, lambda root: (root / "AffectNet/train_set/images/3.jpg").unlink(),
        f"{{root}}: 1 of 18 annotations have no partner, the first lacks the picture of {EXP}: restore it",
    ),
    "a pickle": (annotations, lambda root: np.save(root / EXP, np.array([{}], dtype=object), allow_pickle=True),
                 f"{{root}}/{EXP}: holds no number from 0 to 10: restore it"),
    "a second copy": (
        annotations, lambda root: put(root, ["old/train_set/images/3.jpg"]),
        "{root}/old/train_set/images/3.jpg: AffectNet/train_set/images/3.jpg is of the same set and number: "
        "keep one copy of the data set",
    ),
    "nothing": (
        lambda root: root, lambda root: None,
        "{root}: no AffectNet found, neither training.csv and validation.csv nor train_set and val_set with images and "
        "annotations: put one of them there or correct data.path (class folders: set data.dataset to folders)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str, tmp_path: Path) -> None:
    make, change, message = MISTAKES[mistake]
    change(make(tmp_path))
    assert refused(tmp_path, affectnet.read) == message.format(root=tmp_path)
