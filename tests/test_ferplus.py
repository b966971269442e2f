"""Reading FER+ in every form a user has it, every kind of mistake a user can make there, and the real data set."""

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_found import put, tarred, zipped

from fer.data.found import look
from fer.data.labels import VOTE_COLUMNS
from fer.data.readers import ferplus
from fer.data.readers.ferplus import FOLDERS
from fer.data.source import Source, Wanted
from fer.errors import UserError

USAGES = ["Training"] * 24 + ["PublicTest"] * 8 + ["PrivateTest"] * 8
NAMES = [f"fer{row:07d}.png" for row in range(40)]
IMAGES = np.random.default_rng(0).integers(0, 256, (40, 48, 48), dtype=np.uint8)
VOTES = (8 * np.eye(10)[np.arange(40) % 8] + 2 * np.eye(10)[(np.arange(40) + 1) % 8]).astype(int)
OWN_VOTES = VOTES + np.eye(10, dtype=int)[9]  # of label.csv: others, to tell the two sources apart
EMOTIONS = np.array([6, 3, 5, 4, 0, 1, 2, 0])[np.arange(40) % 8]  # those of VOTES; FER2013 has no contempt


def read_ferplus(path: Path, label_source: str = "auto") -> Source:
    with look(path) as found:
        return ferplus.read(found, Wanted(label_source))


PIXELS = [" ".join(map(str, image.ravel())) for image in IMAGES]


def images_csv(emotions: np.ndarray = EMOTIONS, sep: str = ",", order: list[int] | None = None) -> str:
    """fer2013.csv; `order`: of the images, not of their usages."""
    lines = [sep.join([str(emotions[row]), PIXELS[row], usage]) for row, usage in zip(order or range(40), USAGES)]
    return "\n".join([sep.join(["emotion", "pixels", "Usage"]), *lines]) + "\n"


def votes_csv(names: list[str] = NAMES, votes: np.ndarray = VOTES) -> str:
    lines = [",".join([usage, name, *map(str, row)]) for usage, name, row in zip(USAGES, names, votes)]
    return "\n".join([f"Usage,Image name,{','.join(VOTE_COLUMNS)}", *lines]) + "\n"


def rows(root: Path) -> Path:
    return put(root, {"fer2013.csv": images_csv(), "fer2013new.csv": votes_csv()})


def folders(root: Path, pictures: bool = True, labels: bool = True, box: str = "(0, 0, 48, 48)") -> Path:
    for folder, usage in FOLDERS.items():
        (root / folder).mkdir(parents=True)
        own = [row for row in range(40) if USAGES[row] == usage]
        for row in own if pictures else ():
            Image.fromarray(IMAGES[row]).save(root / folder / NAMES[row])
        lines = [f'{NAMES[row]},"{box}",{",".join(map(str, OWN_VOTES[row]))}\n' for row in own]
        if labels:
            (root / folder / "label.csv").write_text("".join(lines))
    return root


# The forms of good files


def archived(name: str, content: bytes) -> Callable[[Path], Path]:
    return lambda root: put(root, {name: content, "fer2013new.csv": votes_csv()})


def as_a_spreadsheet_saves_it(root: Path) -> Path:
    """Semicolons, an index, quotes, blanks, other letters, a byte order mark, Windows line ends, empty rows."""
    lines = [f'{row};0;"{PIXELS[row]}"; {USAGES[row].lower()}' for row in range(40)]
    images = "\r\n".join(["\ufeff;emotion; pixels; Usage", *lines, ";;;", ";;;", ""])
    votes = "\ufeff" + votes_csv().replace(",8", ",8.0").replace("\n", "\r\n")
    return put(root, {"fer2013 (1).csv": images, "fer2013new.csv": votes, "train.csv": "emotion,pixels\n"})


def as_a_spreadsheet_saves_the_labels(root: Path) -> Path:
    folders(root, box="(0,0,48,48)")
    for file in root.glob("*/label.csv"):
        file.write_text(file.read_text().replace(",8", ",8.0") + "," * 11 + "\n")
    for file in list(root.glob("*/*.png")):
        file.rename(file.with_name(file.name.upper()))
    return root


def an_archive_each(root: Path) -> Path:
    for folder in folders(root / "x") and FOLDERS:
        files = {f"{folder}/{file.name}": file.read_bytes() for file in (root / "x" / folder).iterdir()}
        put(root, {f"{folder}.zip": zipped(files)})
    shutil.rmtree(root / "x")
    return root


def two_equal_copies_and_a_hidden_one(root: Path) -> Path:
    (folders(root / ".ipynb_checkpoints") / "FER2013Train" / NAMES[0]).unlink()
    return folders(folders(root) / "zz").parent


def in_colour(root: Path) -> Path:
    for file, mode in zip(sorted(folders(root).glob("FER2013Train/*.png")), ("RGB", "P")):
        Image.open(file).convert(mode).save(file)
    return root


BY_ROW = ["fer2013.csv", "fer2013new.csv"]
CLONE = [*BY_ROW, *(f"FERPlus/data/{name}/label.csv" for name in FOLDERS)]
TAR = gzip.compress(tarred({"fer2013/README": b"hello", "fer2013/fer2013.csv": images_csv().encode()}))
AS_KAGGLE = zipped({"train.csv": b"", "fer2013.tar.gz": b"x", "icml_face_data.csv": images_csv().encode()})
GOOD: dict[str, tuple[Callable[[Path], Path], str, list[str]]] = {  # how it is made, label source, what is read
    "rows": (rows, "fer2013new", BY_ROW),
    "tar.gz": (
        archived("fer2013.tar.gz", TAR), "fer2013new", ["fer2013.tar.gz/fer2013/fer2013.csv", "fer2013new.csv"],
    ),
    "zip": (archived("a.zip", AS_KAGGLE), "fer2013new", ["a.zip/icml_face_data.csv", "fer2013new.csv"]),
    "spreadsheet": (as_a_spreadsheet_saves_it, "fer2013new", ["fer2013 (1).csv", "fer2013new.csv"]),
    "folders": (folders, "label_csv", [*FOLDERS]),
    "large letters and odd labels": (as_a_spreadsheet_saves_the_labels, "label_csv", [*FOLDERS]),
    "archives": (an_archive_each, "label_csv", [f"{name}.zip/{name}" for name in FOLDERS]),
    "copies": (two_equal_copies_and_a_hidden_one, "label_csv", [*FOLDERS]),
    "colour": (in_colour, "label_csv", [*FOLDERS]),
    "a clone beside rows": (
        lambda root: folders(rows(root) / "FERPlus/data", pictures=False).parents[1], "label_csv", CLONE,
    ),
    "pictures beside rows": (lambda root: rows(folders(root)), "label_csv", [*FOLDERS]),
    "pictures without label.csv": (
        lambda root: put(folders(root / "images", labels=False).parent, {"fer2013new.csv": votes_csv()}), "fer2013new",
        [*(f"images/{name}" for name in FOLDERS), "fer2013new.csv"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", GOOD)
def test_every_form_gives_the_same_images_and_its_votes(form: str, tmp_path: Path) -> None:
    make, label_source, read = GOOD[form]
    source = read_ferplus(make(tmp_path))
    assert (source.facts["label_source"], source.read) == (label_source, read)
    np.testing.assert_array_equal(source.images, IMAGES)
    assert source.table.columns.tolist() == ["name", "usage", "subject", *VOTE_COLUMNS]
    assert source.table["name"].str.lower().tolist() == NAMES
    assert source.table["usage"].tolist() == ["train"] * 24 + ["val"] * 8 + ["test"] * 8
    votes = OWN_VOTES if label_source == "label_csv" else VOTES
    np.testing.assert_array_equal(source.table[list(VOTE_COLUMNS)], votes)


def test_data_path_may_be_the_file_and_the_label_source_is_the_users_choice(tmp_path: Path) -> None:
    archived("a.zip", AS_KAGGLE)(tmp_path)
    assert read_ferplus(tmp_path / "a.zip").read == ["a.zip/icml_face_data.csv", "fer2013new.csv"]
    source = read_ferplus(rows(folders(tmp_path / "both")), "fer2013new")
    assert source.read == [*FOLDERS, "fer2013new.csv"]
    np.testing.assert_array_equal(source.table[list(VOTE_COLUMNS)], VOTES)


def test_rows_without_a_name_and_names_that_stand_twice(tmp_path: Path) -> None:
    """As in the published files: nameless rows have no picture, and of a name the last row is the one of label.csv."""
    names = ["", NAMES[2], *NAMES[2:]]
    put(rows(tmp_path), {"fer2013new.csv": votes_csv(names)})
    source = read_ferplus(tmp_path)
    assert source.table["name"].tolist() == names
    np.testing.assert_array_equal(source.images, IMAGES)

    folders(tmp_path)
    label_csv = tmp_path / "FER2013Train" / "label.csv"
    label_csv.write_text("".join(label_csv.read_text().splitlines(keepends=True)[2:]))
    (tmp_path / "FER2013Train" / NAMES[0]).unlink()
    (tmp_path / "FER2013Train" / NAMES[1]).unlink()
    source = read_ferplus(tmp_path, "fer2013new")
    assert source.table["name"].tolist() == names[1:]
    np.testing.assert_array_equal(source.table[list(VOTE_COLUMNS)], VOTES[1:])
    np.testing.assert_array_equal(source.images, IMAGES[[2, *range(2, 40)]])
    assert source.left_out["a row without a name, so without a picture"] == ["fer2013new.csv row 2"]

    for file in tmp_path.glob("*/*.png"):
        file.unlink()
    source = read_ferplus(tmp_path)
    assert source.table["name"].tolist() == NAMES[2:]
    np.testing.assert_array_equal(source.images, IMAGES[2:])
    assert source.left_out["a row that no label.csv names"] == ["fer2013new.csv row 2", "fer2013new.csv row 3"]


def test_a_line_that_stands_twice_counts_once(tmp_path: Path) -> None:
    label_csv = folders(tmp_path) / "FER2013Train" / "label.csv"
    label_csv.write_text(label_csv.read_text() + label_csv.read_text().splitlines(keepends=True)[3])
    source = read_ferplus(tmp_path)
    assert len(source.table) == 40
    assert source.left_out["a line that stands twice"] == [f"{label_csv} line 25"]


def test_the_column_emotion_is_compared_where_it_says_something(tmp_path: Path) -> None:
    rows(tmp_path)
    wrong = np.where(np.arange(40) % 3, EMOTIONS, 1)
    for emotions, share in ((EMOTIONS, 1.0), (wrong, 0.6857), (np.full(40, 9), None), (np.zeros(40, int), None)):
        put(tmp_path, {"fer2013.csv": images_csv(emotions)})
        assert read_ferplus(tmp_path).facts.get("emotion_agrees") == share  # of the 35 that are no contempt


# Mistakes


Edit = Callable[[Path], object]
TRAIN_LABELS = "FER2013Train/label.csv"


def edit(file: str, change: Callable[[str], str]) -> Edit:
    return lambda root: (root / file).write_text(change((root / file).read_text()))


def replace(file: str, old: str, new: str) -> Edit:
    return edit(file, lambda text: text.replace(old, new, 1))


def append(file: str, text: str) -> Edit:
    return edit(file, lambda old: old + text)


def first_lines(file: str, count: int) -> Edit:
    return edit(file, lambda text: "".join(text.splitlines(keepends=True)[:count]))


def remove(*files: str) -> Edit:
    return lambda root: [(root / file).unlink() for file in files]


def picture(image: Image.Image, kind: str = "PNG") -> Edit:
    return lambda root: image.save(root / "FER2013Valid" / NAMES[25], kind)


def clone(root: Path) -> Path:
    return folders(rows(root) / "FERPlus/data", pictures=False).parents[1]


def unchanged(root: Path) -> None:
    pass


POINTER = "version https://git-lfs.github.com/spec/v1\n"
CUT = "the file is truncated or edited; fetch it again"
SORTED = [*np.argsort(EMOTIONS[:24], kind="stable").tolist(), *range(24, 40)]  # by emotion, as pandas leaves it
WHOLE = "rows correspond by position, so both files must be whole; fetch {root}"
NAMED = f"{{root}}/FER2013Valid/{NAMES[25]}: "
BAD: dict[str, tuple[Callable[[Path], Path], Edit, str]] = {  # how it is made, what is done to it, the message
    "nothing": (
        rows, remove(*BY_ROW),
        "{root}: no FER+ found, neither pictures in FER2013Train, FER2013Valid, FER2013Test nor fer2013.csv or "
        "icml_face_data.csv, also in an archive: put one of them there, with fer2013new.csv, or correct data.path",
    ),
    "no votes": (
        rows, remove("fer2013new.csv"),
        "{root}: fer2013new.csv not found: download it from the microsoft/FERPlus repository to this place",
    ),
    "a git-lfs pointer": (
        rows, lambda root: put(root, {"fer2013.csv": POINTER}),
        "{root}/fer2013.csv: is a git-lfs pointer, not the file: run `git lfs pull` in the clone it comes from",
    ),
    "fewer rows": (
        rows, first_lines("fer2013.csv", 31),
        f"{{root}}/fer2013.csv: has 30 rows but {{root}}/fer2013new.csv 40: {WHOLE}/fer2013.csv again",
    ),
    "fewer votes": (
        rows, first_lines("fer2013new.csv", 31),
        f"{{root}}/fer2013.csv: has 40 rows but {{root}}/fer2013new.csv 30: {WHOLE}/fer2013new.csv again",
    ),
    "a row that is cut": (
        rows, edit("fer2013.csv", lambda text: text[:-5000]), "{root}/fer2013.csv line 41: has 2 columns instead of 3: "
        + CUT,
    ),
    "no header": (
        rows, edit("fer2013.csv", lambda text: text.partition("\n")[2]), "{root}/fer2013.csv line 1: lacks the columns "
        "pixels, Usage: use fer2013.csv or icml_face_data.csv as Kaggle ships it",
    ),
    "a pixel too few": (
        rows, replace("fer2013.csv", PIXELS[1], PIXELS[1].rpartition(" ")[0]),
        "{root}/fer2013.csv line 3: has 2303 pixels instead of 2304: " + CUT,
    ),
    "a pixel that is no number": (
        rows, replace("fer2013.csv", PIXELS[1], PIXELS[1] + "x"),
        "{root}/fer2013.csv line 3: pixels must be whole numbers separated by blanks: download the file again",
    ),
    "a pixel out of range": (
        rows, replace("fer2013.csv", PIXELS[1], "256 " + PIXELS[1].partition(" ")[2]),
        "{root}/fer2013.csv line 3: a pixel is outside 0..255: download the file again",
    ),
    "text after the last row": (
        rows, append("fer2013.csv", "fer2013/README,0000664,0001750\n"), "{root}/fer2013.csv line 42: "
        "'fer2013/README,0000664,0001750' is no row of pixels: delete what does not belong to the table there",
    ),
    "another usage": (
        rows, replace("fer2013.csv", "PublicTest", "PrivateTest"),
        "{root}/fer2013.csv line 26: Usage is PrivateTest but PublicTest in the same row of {root}/fer2013new.csv: "
        "rows correspond by position, so both files must be in their published order",
    ),
    "another order": (
        rows, lambda root: put(root, {"fer2013.csv": images_csv(order=SORTED)}),
        "{root}/fer2013.csv line 2: from here to line 24 column emotion fits the votes in the same row of "
        "{root}/fer2013new.csv for 10% of the images, and for most if both files are in their published order: "
        "fetch both again",
    ),
    "no usage": (
        rows, replace("fer2013new.csv", "PublicTest", "Public"),
        "{root}/fer2013new.csv line 26: unknown Usage 'Public': must be Training, PublicTest, PrivateTest",
    ),
    "no column": (
        rows, replace("fer2013new.csv", "Image name", "Name"),
        "{root}/fer2013new.csv line 1: lacks the columns Image name: download fer2013new.csv again",
    ),
    "no votes in a cell": (
        rows, replace("fer2013new.csv", ",0\n", ",\n"),
        "{root}/fer2013new.csv line 2: NF has '' votes: must be a whole number, 0 or more",
    ),
    "a split without images": (
        rows, lambda root: [first_lines(name, 33)(root) for name in BY_ROW],
        "{root}: contains no image of PrivateTest: training, validation and test images are all needed",
    ),
    "two files of votes": (
        rows, lambda root: put(root, {"old/fer2013new.csv": votes_csv(votes=VOTES[::-1])}),
        "{root}: holds several files fer2013new.csv: fer2013new.csv, old/fer2013new.csv: "
        "keep one of them there, or set data.path to the one to read",
    ),
    "a clone's label.csv ends early": (
        clone, first_lines(f"FERPlus/data/{TRAIN_LABELS}", 23),
        "{root}/FERPlus/data/FER2013Train/label.csv: has no line for 1 of 40 images that {root}/fer2013new.csv names "
        "(the first: fer0000023.png): restore it from microsoft/FERPlus",
    ),
    "a clone of another name": (
        clone, replace(f"FERPlus/data/{TRAIN_LABELS}", NAMES[0], "x.png"), "{root}/FERPlus/data/FER2013Train/label.csv:"
        " x.png is no Training image in {root}/fer2013new.csv: use files that belong together",
    ),
    "a clone alone": (
        clone, remove(*BY_ROW),
        "{root}: holds the label.csv of FER+ but no images: put fer2013.csv and fer2013new.csv there, too",
    ),
    "no label.csv": (
        folders, remove("FER2013Valid/label.csv"), "{root}/FER2013Valid/label.csv: not found: restore it from "
        "microsoft/FERPlus, or set data.label_source to fer2013new",
    ),
    "label.csv is cut": (
        folders, first_lines(TRAIN_LABELS, 10),
        "{root}/FER2013Train: 14 of 24 pictures have no line in label.csv, which has 10 (the first: fer0000010.png): "
        "restore that file from microsoft/FERPlus, or remove the pictures",
    ),
    "pictures are missing": (
        folders, remove(f"FER2013Train/{NAMES[3]}", f"FER2013Train/{NAMES[5]}"),
        "{root}/FER2013Train/fer0000003.png: not found, but label.csv names it (and 1 more of 24): restore the picture",
    ),
    "another box": (
        lambda root: folders(root, box=""), unchanged,
        "{root}/FER2013Train/label.csv line 1: the box is empty instead of (0, 0, 48, 48): "
        "crop and resize the picture to the face",
    ),
    "two lines that differ": (
        folders, append(TRAIN_LABELS, f'{NAMES[0]},"(0, 0, 48, 48)",0,0,0,0,0,0,0,0,0,1\n'),
        "{root}/FER2013Train/label.csv line 25: fer0000000.png has different votes in line 1: delete the wrong line",
    ),
    "no name": (
        folders, replace(TRAIN_LABELS, NAMES[0], ""), "{root}/FER2013Train/label.csv line 1: the name of the picture "
        "is missing: delete the line or restore the name",
    ),
    "a name that leaves the folder": (
        folders, replace(TRAIN_LABELS, NAMES[0], "../x.png"),
        "{root}/FER2013Train/label.csv line 1: '../x.png' must be a plain file name: remove its folder part",
    ),
    "not csv": (
        folders, append(TRAIN_LABELS, '"' + "x" * 200_000), "{root}/FER2013Train/label.csv line 25: is not valid CSV "
        "(field larger than field limit (131072)): download it again",
    ),
    "a cut picture": (
        folders,
        lambda root: put(root, {f"FER2013Valid/{NAMES[25]}": (root / "FER2013Valid" / NAMES[25]).read_bytes()[:500]}),
        NAMED + "is truncated or damaged (image file is truncated): replace it with the original",
    ),
    "another size": (
        folders, picture(Image.new("L", (96, 48))),
        NAMED + "is 96x48 pixels instead of 48x48: replace it with the original",
    ),
    "16 bits": (
        folders, picture(Image.new("I;16", (48, 48))),
        NAMED + "has 16 bits per pixel instead of 8: replace it with the original",
    ),
    "JPEG": (
        folders, picture(Image.new("L", (48, 48)), "JPEG"),
        NAMED + "is a JPEG, which changes pixels, instead of a PNG: make the pictures again",
    ),
    "class folders": (
        lambda root: put(root, {f"train/{name}/1.jpg": "x" for name in ("happy", "sad")}), unchanged,
        "{root}: holds folders of pictures, as train/happy, which have no votes: set data.dataset to folders, "
        "or to the name of the data set",
    ),
}  # fmt: skip


def refused(path: Path, label_source: str = "auto") -> str:
    with pytest.raises(UserError) as error:
        read_ferplus(path, label_source)
    return str(error.value)


@pytest.mark.parametrize("mistake", BAD)
def test_what_cannot_be_right_is_refused_with_its_cause(mistake: str, tmp_path: Path) -> None:
    make, change, message = BAD[mistake]
    change(make(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    assert refused(tmp_path) == message.format(root=tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_mistakes_with_the_path_and_the_label_source(tmp_path: Path) -> None:
    assert refused(tmp_path / "no") == f"{tmp_path}/no: not found: correct data.path in params.yaml"
    assert refused(rows(tmp_path / "rows"), "label_csv") == (
        f"{tmp_path}/rows: holds no label.csv, which clones of microsoft/FERPlus have in FER2013Train, FER2013Valid, "
        "FER2013Test: set data.label_source to auto or fer2013new"
    )
    inside = folders(tmp_path / "folders") / "FER2013Train"
    assert refused(inside) == f"data.path: {inside} is one of the folders of FER+: name the folder above it"


@pytest.mark.slow
def test_the_real_folders(real_ferplus: Source) -> None:
    assert real_ferplus.images.shape == (35_710, 48, 48)
    assert real_ferplus.table["usage"].value_counts().to_dict() == {"train": 28558, "val": 3579, "test": 3573}
    assert real_ferplus.read == [*FOLDERS]
