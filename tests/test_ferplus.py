"""Reading FER+ in every form a user has it, every kind of mistake a user can make there, and the real data set."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import change, lines, swap, tells
from PIL import Image
from test_found import put, zipped

from fer.data.found import look
from fer.data.labels import VOTE_COLUMNS
from fer.data.readers import ferplus
from fer.data.readers.ferplus import FOLDERS
from fer.data.source import Source, Wanted

USAGES = ["Training"] * 24 + ["PublicTest"] * 8 + ["PrivateTest"] * 8
NAMES = [f"fer{row:07d}.png" for row in range(40)]
IMAGES = np.random.default_rng(0).integers(0, 256, (40, 48, 48), dtype=np.uint8)
PIXELS = [" ".join(map(str, image.ravel())) for image in IMAGES]
VOTES = (8 * np.eye(10)[np.arange(40) % 8] + 2 * np.eye(10)[(np.arange(40) + 1) % 8]).astype(int)
OWN_VOTES = VOTES + np.eye(10, dtype=int)[9]  # of label.csv: others, to tell the two sources apart
EMOTIONS = np.array([6, 3, 5, 4, 0, 1, 2, 0])[np.arange(40) % 8]  # those of VOTES; FER2013 has no contempt


def read(path: Path, label_source: str = "auto") -> Source:
    with look(path) as found:
        return ferplus.read(found, Wanted(label_source))


def votes_of(source: Source) -> list[list[int]]:
    return source.table[list(VOTE_COLUMNS)].to_numpy().tolist()


def images_csv(emotions: np.ndarray = EMOTIONS, order: list[int] | range = range(40)) -> str:
    """fer2013.csv; `order`: of the images, not of their usages."""
    rows = [f"{emotions[row]},{PIXELS[row]},{usage}" for row, usage in zip(order, USAGES)]
    return "\n".join(["emotion,pixels,Usage", *rows]) + "\n"


def votes_csv(names: list[str] = NAMES) -> str:
    rows = [",".join([usage, name, *map(str, votes)]) for usage, name, votes in zip(USAGES, names, VOTES)]
    return "\n".join([f"Usage,Image name,{','.join(VOTE_COLUMNS)}", *rows]) + "\n"


def rows(root: Path) -> Path:
    return put(root, {"fer2013.csv": images_csv(), "fer2013new.csv": votes_csv()})


def png(pixels: np.ndarray, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue().decode("latin-1")


def folders(root: Path, pictures: bool = True, box: str = "(0, 0, 48, 48)") -> Path:
    for folder, usage in FOLDERS.items():
        own = [row for row in range(40) if USAGES[row] == usage]
        listed = [f'{NAMES[row]},"{box}",{",".join(map(str, OWN_VOTES[row]))}\n' for row in own]
        shown = {NAMES[row]: png(IMAGES[row]).encode("latin-1") for row in own if pictures}
        put(root / folder, {"label.csv": "".join(listed), **shown})
    return root


# The forms of good files


def clone(root: Path) -> Path:
    return folders(rows(root) / "FERPlus/data", pictures=False).parents[1]


def kaggle(root: Path) -> Path:
    packed = {"train.csv": b"", "fer2013.tar.gz": b"x", "icml_face_data.csv": images_csv().encode()}
    return put(root, {"a.zip": zipped(packed), "fer2013new.csv": votes_csv()}) / "a.zip"


def spreadsheet(root: Path) -> Path:
    """Semicolons, an index, quotes, blanks, other letters, a byte order mark, Windows line ends, empty rows."""
    saved = [f'{row};0;"{PIXELS[row]}"; {USAGES[row].lower()}' for row in range(40)]
    images = "\r\n".join(["\ufeff;emotion; pixels; Usage", *saved, ";;;", ";;;", ""])
    votes = "\ufeff" + votes_csv().replace(",8", ",8.0").replace("\n", "\r\n")
    return put(root, {"fer2013 (1).csv": images, "fer2013new.csv": votes, "train.csv": "emotion,pixels\n"})


def other_letters(root: Path) -> Path:
    """And pictures in colour, and an equal copy."""
    change(folders(root, box="(0,0,48,48)"), "*/label.csv", lambda text: text.replace(",8", ",8.0") + "," * 11 + "\n")
    for file, mode in zip(sorted(root.glob("*/*.png")), ["RGB", "P", *["L"] * 38]):
        Image.open(file).convert(mode).save(file.with_name(file.name.upper()))
        file.unlink()
    return shutil.copytree(root / "FER2013Test", root / "zz/FER2013Test").parents[1]


def archives(root: Path) -> Path:
    for folder in folders(root / "x") and FOLDERS:
        files = {f"{folder}/{file.name}": file.read_bytes() for file in (root / "x" / folder).iterdir()}
        put(root, {f"{folder}.zip": zipped(files)})
    shutil.rmtree(root / "x")
    return root


def pictures_without_labels(root: Path) -> Path:
    change(folders(root / "images"), "*/label.csv", None)
    return put(root, {"fer2013new.csv": votes_csv()})


BY_ROW = ["fer2013.csv", "fer2013new.csv"]
GOOD: list[tuple[Callable[[Path], Path], str, list[str]]] = [  # how it is made, label source, what is read
    (rows, "fer2013new", BY_ROW),
    (kaggle, "fer2013new", ["a.zip/icml_face_data.csv", "fer2013new.csv"]),
    (spreadsheet, "fer2013new", ["fer2013 (1).csv", "fer2013new.csv"]),
    (folders, "label_csv", [*FOLDERS]),
    (other_letters, "label_csv", [*FOLDERS]),
    (archives, "label_csv", [f"{name}.zip/{name}" for name in FOLDERS]),
    (clone, "label_csv", [*BY_ROW, *(f"FERPlus/data/{name}/label.csv" for name in FOLDERS)]),
    (lambda root: rows(folders(root)), "label_csv", [*FOLDERS]),
    (pictures_without_labels, "fer2013new", [*(f"images/{name}" for name in FOLDERS), "fer2013new.csv"]),
]


@pytest.mark.parametrize(("make", "label_source", "read_files"), GOOD)
def test_every_form_gives_the_same_images_and_its_votes(
    make: Callable[[Path], Path], label_source: str, read_files: list[str], tmp_path: Path
) -> None:
    source = read(make(tmp_path))
    assert (source.facts["label_source"], source.read) == (label_source, read_files)
    np.testing.assert_array_equal(source.images, IMAGES)
    assert source.table["name"].str.lower().tolist() == NAMES
    assert source.table["usage"].tolist() == ["train"] * 24 + ["val"] * 8 + ["test"] * 8
    assert votes_of(source) == (OWN_VOTES if label_source == "label_csv" else VOTES).tolist()


def test_the_label_source_is_the_users_choice(tmp_path: Path) -> None:
    source = read(rows(folders(tmp_path)), "fer2013new")
    assert (source.read, votes_of(source)) == ([*FOLDERS, "fer2013new.csv"], VOTES.tolist())


def test_rows_without_a_name_and_names_and_lines_that_stand_twice(tmp_path: Path) -> None:
    """As in the published files: nameless rows have no picture, and of a name the last row is the one of label.csv."""
    names, label_csv = ["", NAMES[2], *NAMES[2:]], "FER2013Train/label.csv"
    put(rows(tmp_path), {"fer2013new.csv": votes_csv(names)})
    assert read(tmp_path).table["name"].tolist() == names
    change(folders(tmp_path), label_csv, lambda text: lines(2)(text) + lines(3, 4)(text))
    change(tmp_path, "FER2013Train/fer000000[01].png", None)
    source = read(tmp_path, "fer2013new")
    assert (source.table["name"].tolist(), votes_of(source)) == (names[1:], VOTES[1:].tolist())
    np.testing.assert_array_equal(source.images, IMAGES[[2, *range(2, 40)]])
    assert source.left_out["a row without a name, so without a picture"] == ["fer2013new.csv row 2"]
    change(tmp_path, "*/*.png", None)
    source = read(tmp_path)
    assert source.table["name"].tolist() == NAMES[2:]
    np.testing.assert_array_equal(source.images, IMAGES[2:])
    assert source.left_out["a row that no label.csv names"] == ["fer2013new.csv row 2", "fer2013new.csv row 3"]
    assert source.left_out["a line that stands twice"] == [f"{tmp_path}/{label_csv} line 23"]


def test_the_column_emotion_is_compared_where_it_says_something(tmp_path: Path) -> None:
    wrong = np.where(np.arange(40) % 3, EMOTIONS, 1)
    for emotions, share in ((EMOTIONS, 1.0), (wrong, 0.6857), (np.full(40, 9), None), (np.zeros(40, int), None)):
        put(rows(tmp_path), {"fer2013.csv": images_csv(emotions)})
        assert read(tmp_path).facts.get("emotion_agrees") == share  # of the 35 that are no contempt


TRAIN, PICTURE = "FER2013Train/label.csv", f"FER2013Valid/{NAMES[25]}"
SORTED = [*np.argsort(EMOTIONS[:24], kind="stable").tolist(), *range(24, 40)]  # by emotion, as pandas leaves it
# how it is made, which file is changed and how, the message
MISTAKES: list[tuple[Callable[[Path], Path], str, Callable[[str], str] | None, str]] = [
    (rows, "*.csv", None, ": no FER+ found, neither pictures in FER2013Train, ... or correct the path in params.yaml"),
    (rows, "fer2013new.csv", None, ": fer2013new.csv not found: download it from the microsoft/FERPlus repository"),
    (rows, "fer2013.csv", lines(0, 31), "/fer2013.csv: has 30 rows but /fer2013new.csv 40: ... /fer2013.csv again"),
    (rows, "fer2013.csv", lambda text: text[:-5000], "/fer2013.csv line 41: has 2 columns instead of 3: the file is"),
    (rows, "fer2013.csv", lines(1), "/fer2013.csv line 1: lacks the columns pixels, Usage: use fer2013.csv or icml"),
    (rows, "fer2013.csv", swap(PIXELS[1], "1 2"), "/fer2013.csv line 3: has 2 pixels instead of 2304: ... again"),
    (rows, "fer2013.csv", swap(PIXELS[1], PIXELS[1] + "x"), "/fer2013.csv line 3: pixels must be whole numbers"),
    (rows, "fer2013.csv", swap(PIXELS[1], "256" + PIXELS[1][PIXELS[1].index(" "):]),
     "/fer2013.csv line 3: a pixel is outside 0..255: download the file again"),
    (rows, "fer2013.csv", lambda text: text + "fer2013/README,0000664,0001750\n",
     "/fer2013.csv line 42: 'fer2013/README,0000664,0001750' is no row of pixels: delete what does not belong"),
    (rows, "fer2013.csv", swap("PublicTest", "PrivateTest"), "/fer2013.csv line 26: Usage is PrivateTest but PublicTest"
     " in the same row of /fer2013new.csv: ... both files must be in their published order"),
    (rows, "fer2013.csv", lambda text: images_csv(order=SORTED),
     "/fer2013.csv line 2: from here to line 24 column emotion fits ... published order: fetch both again"),
    (rows, "fer2013new.csv", swap("PublicTest", "Public"), "/fer2013new.csv line 26: unknown Usage 'Public': must be"),
    (rows, "fer2013new.csv", swap(",0\n", ",\n"), "/fer2013new.csv line 2: NF has '' votes: must be a whole number"),
    (rows, "*.csv", lines(0, 33), ": contains no image of PrivateTest: training, validation and test images are all"),
    (clone, f"FERPlus/data/{TRAIN}", lines(0, 23), f"/FERPlus/data/{TRAIN}: has no line for 1 of 40 images that "
     "/fer2013new.csv names (the first: fer0000023.png): restore it from microsoft/FERPlus"),
    (clone, f"FERPlus/data/{TRAIN}", swap(NAMES[0], "x.png"), f"/FERPlus/data/{TRAIN}: x.png is no Training image in"),
    (clone, "*.csv", None, ": holds the label.csv of FER+ but no images: put fer2013.csv and fer2013new.csv there"),
    (folders, "FER2013Valid/label.csv", None, "/FER2013Valid/label.csv: not found: ... label_source to fer2013new"),
    (folders, TRAIN, lines(0, 10), "/FER2013Train: 14 of 24 pictures have no line in label.csv, which has 10 (the "
     "first: fer0000010.png): restore that file from microsoft/FERPlus, or remove the pictures"),
    (folders, "*/fer000000[35].png", None, "/FER2013Train/fer0000003.png: not found, but label.csv names it (and 1 more"
     " of 24): restore the picture"),
    (folders, TRAIN, swap("(0, 0, 48, 48)", ""), f"/{TRAIN} line 1: the box is empty instead of (0, 0, 48, 48): crop"),
    (folders, TRAIN, lambda text: text + f'{NAMES[0]},"(0, 0, 48, 48)",0,0,0,0,0,0,0,0,0,1\n',
     f"/{TRAIN} line 25: fer0000000.png has different votes in line 1: delete the wrong line"),
    (folders, TRAIN, swap(NAMES[0], ""), f"/{TRAIN} line 1: the name of the picture is missing: delete the line or"),
    (folders, TRAIN, swap(NAMES[0], "../x.png"), f"/{TRAIN} line 1: '../x.png' must be a plain file name: remove its"),
    (folders, TRAIN, lambda text: text + '"' + "x" * 200_000, f"/{TRAIN} line 25: is not valid CSV ( ... it again"),
    (folders, PICTURE, lambda text: text[:500], f"/{PICTURE}: is truncated or damaged ( ... it with the original"),
    (folders, PICTURE, lambda _: png(np.zeros((48, 96), np.uint8)), f"/{PICTURE}: is 96x48 pixels instead of 48x48:"),
    (folders, PICTURE, lambda _: png(np.zeros((48, 48), np.uint16)), f"/{PICTURE}: has 16 bits per pixel instead of 8"),
    (folders, PICTURE, lambda _: png(IMAGES[25], "JPEG"), f"/{PICTURE}: is a JPEG, which changes pixels, instead of a"),
    (lambda root: put(root, {"train/sad/1.jpg": "x", "train/happy/1.jpg": "x"}), "train/a.txt", lambda _: "",
     ": holds folders of pictures, as train/happy, which have no votes: set data.dataset to folders"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "file", "edit", "message"), MISTAKES, ids=[row[3][:60] for row in MISTAKES])
def test_what_cannot_be_right_is_refused_with_its_cause(
    make: Callable[[Path], Path], file: str, edit: Callable[[str], str] | None, message: str, tmp_path: Path
) -> None:
    change(make(tmp_path), file, edit)
    tells(tmp_path, message, read, tmp_path)


def test_mistakes_with_the_path_and_the_label_source(tmp_path: Path) -> None:
    tells(tmp_path, "/no: not found: correct the path under data in params.yaml", read, tmp_path / "no")
    tells(tmp_path, "/rows: holds no label.csv, ... to auto or fer2013new", read, rows(tmp_path / "rows"), "label_csv")
    inside = folders(tmp_path / "x") / "FER2013Train"
    tells(
        tmp_path,
        "params.yaml: data: /x/FER2013Train is one of the folders of FER+: name the folder above",
        read,
        inside,
    )


@pytest.mark.slow
def test_the_real_folders(real_ferplus: Source) -> None:
    assert real_ferplus.images.shape == (35_710, 48, 48)
    assert real_ferplus.table["usage"].value_counts().to_dict() == {"train": 28558, "val": 3579, "test": 3573}
    assert real_ferplus.read == [*FOLDERS]
