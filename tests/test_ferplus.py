"""Reading FER+ in every form a user has it, every mistake a user can make there, and the published counts."""

import csv
import gzip
import io
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fer.data.found import look
from fer.data.labels import CLASSES, VOTE_COLUMNS, label_distribution
from fer.data.readers import ferplus
from fer.data.readers.ferplus import FOLDERS
from fer.data.source import Source, Wanted
from fer.errors import UserError

USAGES = ["Training", "Training", "PublicTest", "PublicTest", "PrivateTest", "PrivateTest"]
SPLITS = ["train", "train", "val", "val", "test", "test"]
NAMES = ["a.png", "b.png", "c.png", "d.png", "e.png", "f.png"]
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 48, 48), dtype=np.uint8)
VOTES = np.arange(60).reshape(6, 10)
LABEL_CSV_VOTES = VOTES + 100  # others, to distinguish the two label sources


def read_ferplus(path: Path, label_source: str = "auto") -> Source:
    with look(path) as found:
        return ferplus.read(found, Wanted(label_source))


def images_csv(header: str = "emotion,pixels,Usage", usages: list[str] = USAGES, images: np.ndarray = IMAGES) -> str:
    rows = [f"3,{' '.join(map(str, image.ravel()))},{usage}" for image, usage in zip(images, usages)]
    return "\n".join([header, *rows]) + "\n"


def votes_csv(usages: list[str] = USAGES, names: list[str] = NAMES, votes: np.ndarray = VOTES) -> str:
    rows = [",".join([usage, name, *map(str, row)]) for usage, name, row in zip(usages, names, votes)]
    return "\n".join([f"Usage,Image name,{','.join(VOTE_COLUMNS)}", *rows]) + "\n"


def tar_gz(content: str, member: str = "fer2013/fer2013.csv") -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, data in (("fer2013/README", b"hello"), (member, content.encode())):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


def zipped(members: dict[str, bytes | str], packing: int = zipfile.ZIP_DEFLATED) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", packing) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return packed.getvalue()


def put(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def kaggle_files(root: Path) -> Path:
    return put(root, {"fer2013.csv": images_csv(), "fer2013new.csv": votes_csv()})


def official_folders(root: Path) -> Path:
    for first, folder in enumerate(FOLDERS):
        (root / folder).mkdir(parents=True)
        with (root / folder / "label.csv").open("w", newline="") as file:
            for row in (2 * first, 2 * first + 1):
                Image.fromarray(IMAGES[row]).save(root / folder / NAMES[row])
                csv.writer(file).writerow([NAMES[row], "(0, 0, 48, 48)", *LABEL_CSV_VOTES[row]])
    return put(root, {"fer2013new.csv": votes_csv()})


def assert_is_the_small_set(source: Source, votes: np.ndarray = VOTES) -> None:
    np.testing.assert_array_equal(source.images, IMAGES)
    assert source.images.dtype == np.uint8
    assert source.table.columns.tolist() == ["name", "usage", "subject", *VOTE_COLUMNS]
    assert source.table.index.tolist() == list(range(6))
    assert source.table["name"].tolist() == NAMES
    assert source.table["usage"].tolist() == SPLITS
    assert source.table["subject"].tolist() == [""] * 6
    np.testing.assert_array_equal(source.table[list(VOTE_COLUMNS)].to_numpy(dtype=np.int64), votes)


BLANKS = "emotion, Usage, pixels"  # the header of icml_face_data.csv


def icml_csv() -> str:
    rows = [f"3,{usage},{' '.join(map(str, image.ravel()))}" for image, usage in zip(IMAGES, USAGES)]
    return "\n".join([BLANKS, *rows]) + "\n"


FORMS: dict[str, dict[str, bytes | str]] = {  # what is read of each; fer2013new.csv also lies in the zip or beside it
    "fer2013.csv": {"fer2013.csv": images_csv(), "fer2013new.csv": votes_csv()},
    "icml_face_data.csv": {"icml_face_data.csv": icml_csv(), "fer2013new.csv": votes_csv()},
    "fer2013.tar.gz/fer2013/fer2013.csv": {"fer2013.tar.gz": tar_gz(images_csv()), "fer2013new.csv": votes_csv()},
    "kaggle.zip/x/fer2013.csv": {"kaggle.zip": zipped({"x/fer2013.csv": images_csv(), "fer2013new.csv": votes_csv()})},
    "a.zip/icml_face_data.csv": {  # as Kaggle ships it
        "a.zip": zipped({"train.csv": "", "fer2013.tar.gz": "x", "icml_face_data.csv": icml_csv()}),
        "fer2013new.csv": votes_csv(),
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_kaggle_forms_as_a_file_a_folder_or_in_one(form: str, tmp_path: Path) -> None:
    put(tmp_path / "fer", FORMS[form])
    for path in (tmp_path / "fer" / form.split("/")[0], tmp_path / "fer", tmp_path):
        source = read_ferplus(path)
        votes = "kaggle.zip/fer2013new.csv" if "kaggle" in form else "fer2013new.csv"
        prefix = "fer/" if path == tmp_path else ""
        assert source.read == [prefix + form, prefix + votes]
        assert (source.form, source.facts) == ("rows of pixels", {"label_source": "fer2013new"})
        assert_is_the_small_set(source)


def test_windows_line_ends_a_byte_order_mark_quotes_and_another_order_change_nothing(tmp_path: Path) -> None:
    rows = [f'"{" ".join(map(str, image.ravel()))}","{usage}"' for image, usage in zip(IMAGES, USAGES)]
    images = "\r\n".join(["\ufeffpixels,Usage", *rows, "", ""])
    votes = "\ufeff" + votes_csv().replace("\n", "\r\n") + "\r\n"
    assert_is_the_small_set(read_ferplus(put(tmp_path, {"fer2013.csv": images, "fer2013new.csv": votes}), "auto"))


def test_votes_may_lie_beside_the_folder_of_the_images(tmp_path: Path) -> None:
    """As after unpacking fer2013.tar.gz by hand."""
    put(tmp_path, {"fer2013/fer2013.csv": images_csv(), "fer2013new.csv": votes_csv()})
    assert_is_the_small_set(read_ferplus(tmp_path, "auto"))


@pytest.mark.parametrize(
    ("asked", "used", "votes"),
    [
        ("auto", "label_csv", LABEL_CSV_VOTES),
        ("label_csv", "label_csv", LABEL_CSV_VOTES),
        ("fer2013new", "fer2013new", VOTES),
    ],
)
def test_folders(asked: str, used: str, votes: np.ndarray, tmp_path: Path) -> None:
    source = read_ferplus(official_folders(tmp_path), asked)
    assert (source.form, source.facts) == ("pictures", {"label_source": used})
    assert source.read == [*FOLDERS, *(["fer2013new.csv"] if used == "fer2013new" else [])]
    assert_is_the_small_set(source, votes)


def test_unnamed_rows_stay_with_kaggle_and_have_no_picture_in_the_folders(tmp_path: Path) -> None:
    """So do names that are listed twice: a row each."""
    usages, names = [*USAGES, "Training", "Training"], [*NAMES, "", "a.png"]
    votes = np.concatenate([VOTES, [[0] * 9 + [10]], [[7] * 10]])
    images = np.concatenate([IMAGES, np.zeros((1, 48, 48), np.uint8), IMAGES[:1]])
    files = {"fer2013.csv": images_csv(usages=usages, images=images), "fer2013new.csv": votes_csv(usages, names, votes)}
    kaggle = read_ferplus(put(tmp_path / "kaggle", files), "auto")
    assert kaggle.table["name"].tolist() == [*NAMES, "", "a.png"]
    np.testing.assert_array_equal(kaggle.images, images)

    official_folders(tmp_path / "folders")
    folders = read_ferplus(put(tmp_path / "folders", {"fer2013new.csv": files["fer2013new.csv"]}), "fer2013new")
    assert folders.table["name"].tolist() == [*NAMES, "a.png"]
    assert folders.table["NF"].tolist() == [*VOTES[:, 9], 7]
    np.testing.assert_array_equal(folders.images[6], IMAGES[0])


def test_colour_and_palette_pictures_are_read_as_grey(tmp_path: Path) -> None:
    official_folders(tmp_path)
    for name, mode in (("a.png", "RGB"), ("b.png", "P")):
        file = tmp_path / "FER2013Train" / name
        Image.open(file).convert(mode).save(file)
    assert_is_the_small_set(read_ferplus(tmp_path, "fer2013new"))


def test_an_unknown_label_source_is_a_fault_of_the_code(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown label source 'both'; known: auto, label_csv, fer2013new"):
        read_ferplus(tmp_path, "both")


Edit = Callable[[Path], object]


def edit(file: str, change: Callable[[str], str]) -> Edit:
    return lambda root: (root / file).write_text(change((root / file).read_text()))


def replace(file: str, old: str, new: str) -> Edit:
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return edit(file, change)


def remove(*files: str) -> Edit:
    return lambda root: [(root / file).unlink() for file in files]


def set_line(file: str, number: int, line: str) -> Edit:
    def change(text: str) -> str:
        lines = text.splitlines()
        lines[number - 1 : number] = [line] if line else []
        return "\n".join(lines) + "\n"

    return edit(file, change)


def instead(file: str, content: bytes) -> Edit:
    """In the place of fer2013.csv."""
    return lambda root: [(root / "fer2013.csv").unlink(), (root / file).write_bytes(content)]


def picture(image: Image.Image) -> Edit:
    return lambda root: image.save(root / "FER2013Valid" / "d.png")


PIXELS = " ".join(map(str, IMAGES[1].ravel()))
ROWS = images_csv().splitlines(keepends=True)
HALF_TAR = tar_gz(images_csv())[:9000]
DAMAGED_ZIP = zipped({"fer2013.csv": images_csv()}, zipfile.ZIP_STORED).replace(b"emotion,", b"emotioN,")
CUT = "the file is truncated or edited; fetch it again"
NUMBERS = "pixels must be whole numbers separated by blanks: download the file again"
USAGE = "unknown Usage '{}': must be Training, PublicTest, PrivateTest"
VOTES_RULE = "votes: must be a whole number, 0 or more"
NO_COLUMNS = " line 1: lacks the columns pixels, Usage: use fer2013.csv or icml_face_data.csv as Kaggle ships it"
NO_USAGE = ": training, validation and test images are all needed"

# what is done to the files, and the message; {images} and {votes} are the two csv files
KAGGLE_MISTAKES: dict[str, tuple[Edit, str]] = {
    "nothing there": (
        remove("fer2013.csv", "fer2013new.csv"),
        "{root}: no FER+ found, neither pictures in FER2013Train, FER2013Valid, FER2013Test nor fer2013.csv or "
        "icml_face_data.csv, also in an archive: put one of them there, with fer2013new.csv, or correct data.path",
    ),
    "no votes": (
        remove("fer2013new.csv"),
        "{root}: fer2013new.csv not found: download it from the microsoft/FERPlus repository to this place",
    ),
    "file cut between rows": (
        edit("fer2013.csv", lambda text: "".join(ROWS[:5])),
        "{images}: has 4 rows but {votes} 6: rows correspond by position, so both files must be whole; "
        "fetch {images} again",
    ),
    "file cut in a row": (
        edit("fer2013.csv", lambda text: "".join(ROWS[:6]) + ROWS[6][:5000]),
        "{images} line 7: has 2 columns instead of 3: " + CUT,
    ),
    "file cut in the last word": (
        edit("fer2013.csv", lambda text: text[:-5]), "{images} line 7: " + USAGE.format("Private"),
    ),
    "empty file": (edit("fer2013.csv", lambda text: ""), "{images}: is empty: download it again"),
    "no header": (set_line("fer2013.csv", 1, ""), "{images}" + NO_COLUMNS),
    "a pixel too few": (
        set_line("fer2013.csv", 3, f"0,{PIXELS.rsplit(' ', 1)[0]},Training"),
        "{images} line 3: has 2303 pixels instead of 2304: " + CUT,
    ),
    "no pixels": (set_line("fer2013.csv", 3, "0,,Training"), "{images} line 3: has 0 pixels instead of 2304: " + CUT),
    "a pixel that is no number": (
        set_line("fer2013.csv", 3, f"0,{PIXELS}x,Training"), "{images} line 3: " + NUMBERS,
    ),
    "a broken pixel": (set_line("fer2013.csv", 3, f"0,1.5 {PIXELS},Training"), "{images} line 3: " + NUMBERS),
    "a pixel above 255": (
        set_line("fer2013.csv", 3, f"0,256 {PIXELS.split(' ', 1)[1]},Training"),
        "{images} line 3: a pixel is outside 0..255: download the file again",
    ),
    "a pixel below 0": (
        set_line("fer2013.csv", 3, f"0,-1 {PIXELS.split(' ', 1)[1]},Training"),
        "{images} line 3: a pixel is outside 0..255: download the file again",
    ),
    "more images than votes": (
        set_line("fer2013new.csv", 7, ""),
        "{images}: has 6 rows but {votes} 5: rows correspond by position, so both files must be whole; "
        "fetch {votes} again",
    ),
    "another order": (
        edit("fer2013.csv", lambda text: images_csv(usages=USAGES[::-1])),
        "{images} line 2: Usage is PrivateTest but Training in the same row of {votes}: "
        "rows correspond by position, so both files must be in their published order",
    ),
    "unknown usage": (
        replace("fer2013.csv", "PublicTest", "Public"), "{images} line 4: " + USAGE.format("Public"),
    ),
    "unknown usage of votes": (
        replace("fer2013new.csv", "PublicTest", "Public"), "{votes} line 4: " + USAGE.format("Public"),
    ),
    "votes lack a column": (
        edit("fer2013new.csv", lambda text: "\n".join(line.rsplit(",", 1)[0] for line in text.splitlines())),
        "{votes} line 1: lacks the columns NF: download fer2013new.csv again",
    ),
    "votes cut in a row": (
        edit("fer2013new.csv", lambda text: text[:-10]), "{votes} line 7: has 9 columns instead of 12: " + CUT,
    ),
    "votes that are no number": (
        replace("fer2013new.csv", "c.png,20", "c.png,many"), "{votes} line 4: neutral has 'many' " + VOTES_RULE,
    ),
    "negative votes": (
        replace("fer2013new.csv", ",29\n", ",-1\n"), "{votes} line 4: NF has '-1' " + VOTES_RULE,
    ),
    "no votes in a cell": (
        replace("fer2013new.csv", "c.png,20", "c.png,"), "{votes} line 4: neutral has '' " + VOTES_RULE,
    ),
    "a split without images": (
        lambda root: put(root, {"fer2013.csv": "".join(ROWS[:5]), "fer2013new.csv": votes_csv(USAGES[:4])}),
        "{root}: contains no image of PrivateTest" + NO_USAGE,
    ),
    "a cut tar.gz": (
        instead("fer2013.tar.gz", HALF_TAR),
        "{root}/fer2013.tar.gz: is truncated or damaged "
        "(Compressed file ended before the end-of-stream marker was reached): download it again",
    ),
    "a tar.gz that is html": (
        instead("fer2013.tar.gz", b"<html>sign in</html>"),
        "{root}/fer2013.tar.gz: is a web page, not the file: sign in there and download it again",
    ),
    "a tar.gz without the csv": (
        instead("fer2013.tar.gz", tar_gz("x", "fer2013/other.csv")),
        "{root}: no FER+ found, neither pictures in FER2013Train, FER2013Valid, FER2013Test nor fer2013.csv or "
        "icml_face_data.csv, also in an archive: put one of them there, with fer2013new.csv, or correct data.path",
    ),
    "a zip that is html": (
        instead("kaggle.zip", b"<html>sign in</html>"),
        "{root}/kaggle.zip: is a web page, not the file: sign in there and download it again",
    ),
    "a damaged zip": (
        instead("kaggle.zip", DAMAGED_ZIP),
        "{root}/kaggle.zip/fer2013.csv: is truncated or damaged (Bad CRC-32 for file 'fer2013.csv'): download it again",
    ),
}  # fmt: skip

LABELS, LINE = "FER2013Train/label.csv", 'b.png,"(0, 0, 48, 48)",' + ",".join(["1"] * 10)
FOLDER_MISTAKES: dict[str, tuple[Edit, str]] = {
    "no label.csv": (
        remove("FER2013Valid/label.csv"),
        "{root}/FER2013Valid/label.csv: not found: restore it from microsoft/FERPlus, "
        "or set data.label_source to fer2013new",
    ),
    "empty label.csv": (
        edit("FER2013Valid/label.csv", lambda text: ""),
        "{root}/FER2013Valid: 2 of 2 pictures have no line in label.csv, which has 0 (the first: c.png): "
        "restore that file from microsoft/FERPlus, or remove the pictures",
    ),
    "label.csv lacks a column": (
        set_line(LABELS, 2, LINE[:-2]), "{labels} line 2: has 11 columns instead of 12: " + CUT,
    ),
    "another box": (
        set_line(LABELS, 2, LINE.replace("48)", "47)")),
        "{labels} line 2: the box is (0, 0, 48, 47) instead of (0, 0, 48, 48): crop and resize the picture to the face",
    ),
    "broken votes": (set_line(LABELS, 2, LINE[:-1] + "1.5"), "{labels} line 2: NF has '1.5' " + VOTES_RULE),
    "two lines that differ": (
        edit(LABELS, lambda text: text + LINE + "\n"),
        "{labels} line 3: b.png has different votes in line 2: delete the wrong line",
    ),
    "a name that leaves the folder": (
        set_line(LABELS, 2, "../" + LINE),
        "{labels} line 2: '../b.png' must be a plain file name: remove its folder part",
    ),
    "not csv": (
        set_line(LABELS, 2, '"' + "x" * 200_000),
        "{labels} line 2: is not valid CSV (field larger than field limit (131072)): download it again",
    ),
    "a missing picture": (
        remove("FER2013Valid/d.png"), "{picture}: not found, but label.csv names it: restore the picture",
    ),
    "a cut picture": (
        lambda root: put(root, {"FER2013Valid/d.png": (root / "FER2013Valid/d.png").read_bytes()[:500]}),
        "{picture}: is truncated or damaged (image file is truncated): replace it with the original",
    ),
    "a picture of another size": (
        picture(Image.new("L", (96, 48))), "{picture}: is 96x48 pixels instead of 48x48: replace it with the original",
    ),
    "a picture of 16 bits": (
        picture(Image.new("I;16", (48, 48))),
        "{picture}: has 16 bits per pixel instead of 8: replace it with the original",
    ),
}  # fmt: skip


def assert_refused(path: Path, label_source: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        read_ferplus(path, label_source)
    assert str(error.value) == message


@pytest.mark.parametrize("mistake", [*KAGGLE_MISTAKES, *FOLDER_MISTAKES])
def test_mistakes_in_the_files(mistake: str, tmp_path: Path) -> None:
    kaggle = mistake in KAGGLE_MISTAKES
    make, message = (KAGGLE_MISTAKES if kaggle else FOLDER_MISTAKES)[mistake]
    make((kaggle_files if kaggle else official_folders)(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    names = {"images": "fer2013.csv", "votes": "fer2013new.csv", "labels": LABELS, "picture": "FER2013Valid/d.png"}
    paths = {key: str(tmp_path / name) for key, name in names.items()}
    assert_refused(tmp_path, "auto", message.format(root=tmp_path, **paths))
    assert sorted(tmp_path.rglob("*")) == before


def test_mistakes_with_the_path_and_the_label_source(tmp_path: Path) -> None:
    assert_refused(tmp_path / "no", "auto", f"{tmp_path}/no: not found: correct data.path in params.yaml")
    home = "data.path: '~/faces': ~ is not expanded: write the whole path, " + str(Path("~/faces").expanduser())
    assert_refused(Path("~/faces"), "auto", home)
    kaggle = kaggle_files(tmp_path / "kaggle")
    remedy = (
        "holds no label.csv, which clones of microsoft/FERPlus have in FER2013Train, FER2013Valid, FER2013Test: "
        "set data.label_source to auto or fer2013new"
    )
    assert_refused(kaggle, "label_csv", f"{kaggle}: {remedy}")
    folders = official_folders(tmp_path / "folders")
    inside = f"data.path: {folders}/FER2013Train is one of the folders of FER+: name the folder above it"
    assert_refused(folders / "FER2013Train", "auto", inside)
    (folders / "FER2013Train" / "b.png").unlink()
    missing = f"{folders}/FER2013Train/b.png: not found, but fer2013new.csv names it: restore the picture"
    assert_refused(folders, "fer2013new", missing)
    replace("fer2013new.csv", "b.png", "../b.png")(folders)
    name = f"{folders}/fer2013new.csv line 3: '../b.png' must be a plain file name: remove its folder part"
    assert_refused(folders, "fer2013new", name)
    (folders / "fer2013new.csv").unlink()
    votes = f"{folders}: fer2013new.csv not found: download it from the microsoft/FERPlus repository to this place"
    assert_refused(folders, "fer2013new", votes)


# What people's files really look like: drawn discs, whose place is their class, with votes that agree with it.

USAGE_OF = ["Training"] * 24 + ["PublicTest"] * 8 + ["PrivateTest"] * 8
DISC_NAMES = [f"fer{row:07d}.png" for row in range(40)]
DISC_VOTES = (8 * np.eye(10)[np.arange(40) % 8] + 2 * np.eye(10)[(np.arange(40) + 1) % 8]).astype(int)
EMOTION = np.array([6, 3, 5, 4, 0, 1, 2, 0])[np.arange(40) % 8]  # FER2013 has no contempt
SPLIT_COUNTS = {"train": 24, "val": 8, "test": 8}
BOX = "(0, 0, 48, 48)"


def discs() -> np.ndarray:
    y, x = np.mgrid[:48, :48]
    angles = 2 * np.pi * (np.arange(40) % 8) / 8
    away = (y - 24 - 14 * np.sin(angles)[:, None, None]) ** 2 + (x - 24 - 14 * np.cos(angles)[:, None, None]) ** 2
    return (np.random.default_rng(0).integers(0, 40, (40, 48, 48)) + 200 * (away < 60)).astype(np.uint8)


DISCS = discs()


def seen(images: np.ndarray) -> list[int]:
    """The class that each picture shows."""
    points = [(int(24 + 14 * np.sin(angle)), int(24 + 14 * np.cos(angle))) for angle in 2 * np.pi * np.arange(8) / 8]
    return [int(np.argmax([image[point] for point in points])) for image in images]


def rows_csv(order: Sequence[int] = range(40), emotions: Sequence[int] | None = None, sep: str = ",") -> str:
    emotions = [0] * 40 if emotions is None else emotions
    lines = [f"{emotions[row]}{sep}{' '.join(map(str, DISCS[row].ravel()))}{sep}" for row in order]
    return "\n".join([f"emotion{sep}pixels{sep}Usage", *(a + b for a, b in zip(lines, USAGE_OF))]) + "\n"


def disc_votes(votes: np.ndarray = DISC_VOTES) -> str:
    return votes_csv(USAGE_OF, DISC_NAMES, votes)


def rows_of_discs(root: Path, **other: bytes | str) -> Path:
    files = {"fer2013.csv": rows_csv(), "fer2013new.csv": disc_votes()}
    return put(root, files | {name.replace("__", "."): content for name, content in other.items()})


def folders_of_discs(root: Path, pictures: bool = True, labels: bool = True, train: int = 24, box: str = BOX) -> Path:
    for folder, usage in FOLDERS.items():
        own = [row for row in range(40) if USAGE_OF[row] == usage][: train if usage == "Training" else None]
        (root / folder).mkdir(parents=True)
        for row in own if pictures else ():
            Image.fromarray(DISCS[row]).save(root / folder / DISC_NAMES[row])
        lines = [f'{DISC_NAMES[row]},"{box}",{",".join(map(str, DISC_VOTES[row]))}\n' for row in own]
        if labels:
            (root / folder / "label.csv").write_text("".join(lines))
    return root


def append(file: str, text: str) -> Edit:
    return lambda root: (root / file).write_text((root / file).read_text() + text)


def rename_all(change: Callable[[str], str]) -> Edit:
    return lambda root: [file.rename(file.with_name(change(file.name))) for file in list(root.glob("*/*.png"))]


def archived(name: str, content: bytes) -> Edit:
    return lambda root: [(root / "fer2013.csv").unlink(), (root / name).write_bytes(content)]


def plain_tar(member: str) -> bytes:
    return gzip.decompress(tar_gz(rows_csv(), member))


def side_file(root: Path) -> None:
    archived("a.zip", zipped({"fer2013.csv": rows_csv()}))(root)
    put(root, {"._a.zip": b"\0\5\x16\7"})


def an_archive_each(root: Path) -> None:
    for folder in FOLDERS:
        files = {f"{folder}/{file.name}": file.read_bytes() for file in (root / folder).iterdir()}
        put(root, {f"{folder}.zip": zipped(files)})
        shutil.rmtree(root / folder)


def nothing(root: Path) -> None:
    pass


def clone(root: Path) -> None:
    folders_of_discs(root / "FERPlus" / "data", pictures=False)


TRAIN_LABELS = "FER2013Train/label.csv"
EMPTY = "," * 11 + "\n"
AS_ICML = "\n".join(
    [
        ",emotion, Usage, pixels",
        *(f"{row},0,{USAGE_OF[row]},{' '.join(map(str, DISCS[row].ravel()))}" for row in range(40)),
    ]
)
# kind of oddity: from rows or folders, what is done to them, label source and what was read
GOOD: dict[str, tuple[Callable[..., Path], Edit, str, list[str]]] = {
    "A a side file of macOS": (
        rows_of_discs,
        side_file,
        "fer2013new", ["a.zip/fer2013.csv", "fer2013new.csv"],
    ),
    "A a hidden older copy": (
        folders_of_discs, lambda root: folders_of_discs(root / ".ipynb_checkpoints", train=8), "label_csv", [*FOLDERS],
    ),
    "A the same files twice": (
        folders_of_discs, lambda root: folders_of_discs(root / "zz"), "label_csv", [*FOLDERS],
    ),
    "A backslashes": (
        rows_of_discs, archived("a.zip", zipped({"x\\fer2013.csv": rows_csv()})), "fer2013new",
        ["a.zip/x/fer2013.csv", "fer2013new.csv"],
    ),
    "A a folder named csv": (
        rows_of_discs, archived("a.zip", zipped({"fer2013.csv/": "", "fer2013.csv/fer2013.csv": rows_csv()})),
        "fer2013new", ["a.zip/fer2013.csv/fer2013.csv", "fer2013new.csv"],
    ),
    "A a tar without gzip": (
        rows_of_discs, archived("fer2013.tar.gz", plain_tar("fer2013/fer2013.csv")), "fer2013new",
        ["fer2013.tar.gz/fer2013/fer2013.csv", "fer2013new.csv"],
    ),
    "A an archive and what was in it": (
        rows_of_discs, lambda root: put(root, {"fer2013.tar.gz": tar_gz(rows_csv(), "fer2013.csv")}), "fer2013new",
        ["fer2013.csv", "fer2013new.csv"],
    ),
    "A another name and a second csv": (
        rows_of_discs,
        lambda root: [(root / "fer2013.csv").rename(root / "fer2013 (1).csv"),
                      put(root, {"train.csv": "emotion,pixels\n", "test.csv": "pixels\n"})],
        "fer2013new", ["fer2013 (1).csv", "fer2013new.csv"],
    ),
    "A an archive for each folder": (
        folders_of_discs, an_archive_each,
        "label_csv", [f"{name}.zip/{name}" for name in FOLDERS],
    ),
    "G blanks in the box": (lambda root: folders_of_discs(root, box="(0,0,48,48)"), nothing, "label_csv", [*FOLDERS]),
    "G empty lines in label.csv": (folders_of_discs, append(TRAIN_LABELS, EMPTY * 3), "label_csv", [*FOLDERS]),
    "G empty lines in fer2013.csv": (
        rows_of_discs, append("fer2013.csv", ",,\n" * 3), "fer2013new", ["fer2013.csv", "fer2013new.csv"],
    ),
    "G votes as a spreadsheet writes them": (
        folders_of_discs, edit(TRAIN_LABELS, lambda text: text.replace(",8", ",8.0")), "label_csv", [*FOLDERS],
    ),
    "G usages in small letters": (
        rows_of_discs, edit("fer2013.csv", lambda text: text.replace("Training", " training")), "fer2013new",
        ["fer2013.csv", "fer2013new.csv"],
    ),
    "H a clone beside rows": (
        rows_of_discs, clone, "label_csv",
        ["fer2013.csv", "fer2013new.csv", *(f"FERPlus/data/{name}/label.csv" for name in FOLDERS)],
    ),
    "H pictures without label.csv": (
        lambda root: folders_of_discs(root / "images", labels=False),
        lambda root: put(root.parent, {"fer2013new.csv": disc_votes()}), "fer2013new",
        [*(f"images/{name}" for name in FOLDERS), "fer2013new.csv"],
    ),
    "H pictures made in a clone": (
        folders_of_discs, rows_of_discs, "label_csv", [*FOLDERS],
    ),
    "R semicolons": (
        rows_of_discs, lambda root: put(root, {"fer2013.csv": rows_csv(sep=";")}), "fer2013new",
        ["fer2013.csv", "fer2013new.csv"],
    ),
    "R blanks in the header and an index": (
        rows_of_discs, lambda root: [(root / "fer2013.csv").unlink(), put(root, {"icml_face_data.csv": AS_ICML})],
        "fer2013new", ["icml_face_data.csv", "fer2013new.csv"],
    ),
    "R large letters": (folders_of_discs, rename_all(str.upper), "label_csv", [*FOLDERS]),
}  # fmt: skip


@pytest.mark.parametrize("case", GOOD)
def test_good_files_in_odd_shapes_are_read_as_they_are(case: str, tmp_path: Path) -> None:
    make, change, label_source, read = GOOD[case]
    change(make(tmp_path))
    source = read_ferplus(tmp_path)
    assert (source.facts["label_source"], source.read) == (label_source, read)
    assert source.table["usage"].value_counts().to_dict() == SPLIT_COUNTS
    np.testing.assert_array_equal(source.images, DISCS)
    np.testing.assert_array_equal(source.table[list(VOTE_COLUMNS)], DISC_VOTES)


def shuffled(root: Path) -> Path:
    """Sorted by emotion within Training, as pandas leaves it."""
    order = [*np.argsort(EMOTION[:24], kind="stable"), *range(24, 40)]
    return put(root, {"fer2013.csv": rows_csv(order, EMOTION)})


def as_jpeg(root: Path) -> None:
    for file in root.glob("*/*.png"):
        picture = Image.open(file).copy()
        picture.save(file, "JPEG")


BAD: dict[str, tuple[Callable[..., Path], Edit, str]] = {
    "A two copies": (
        lambda root: folders_of_discs(root / "ferplus"), lambda root: folders_of_discs(root.parent / "a_part", train=8),
        "{root}: holds several folders FER2013Train with pictures: a_part/FER2013Train (8 files), ferplus/FER2013Train "
        "(24 files): keep one of them there, or set data.path to the one to read",
    ),
    "A two csv that differ": (
        rows_of_discs, lambda root: put(root, {"old/fer2013.csv": rows_csv()[:-200]}),
        "{root}: holds several csv files with pixels: fer2013.csv, old/fer2013.csv: "
        "keep one of them there, or set data.path to the one to read",
    ),
    "A two files of votes": (
        rows_of_discs, lambda root: put(root, {"old/fer2013new.csv": disc_votes(DISC_VOTES[::-1])}),
        "{root}: holds several files fer2013new.csv: fer2013new.csv, old/fer2013new.csv: "
        "keep one of them there, or set data.path to the one to read",
    ),
    "B another order": (
        rows_of_discs, shuffled,
        "{root}/fer2013.csv line 2: from here to line 24 column emotion fits the votes in the same row of "
        "{root}/fer2013new.csv for 10% of the images, and for most if both files are in their published order: "
        "fetch both again",
    ),
    "C label.csv is cut": (
        folders_of_discs, edit(TRAIN_LABELS, lambda text: "".join(text.splitlines(keepends=True)[:10])),
        "{root}/FER2013Train: 14 of 24 pictures have no line in label.csv, which has 10 (the first: fer0000010.png): "
        "restore that file from microsoft/FERPlus, or remove the pictures",
    ),
    "C pictures are missing": (
        folders_of_discs, remove("FER2013Train/fer0000003.png", "FER2013Train/fer0000005.png"),
        "{root}/FER2013Train/fer0000003.png: not found, but label.csv names it (and 1 more of 24): restore the picture",
    ),
    "C a clone's label.csv is cut": (
        rows_of_discs,
        lambda root: [clone(root), edit(f"FERPlus/data/{TRAIN_LABELS}", lambda text: text[:-150])(root)],
        "{root}/FERPlus/data/FER2013Train/label.csv line 22: has",
    ),
    "C a clone's label.csv ends early": (
        rows_of_discs,
        lambda root: [clone(root), set_line(f"FERPlus/data/{TRAIN_LABELS}", 24, "")(root)],
        "{root}/FERPlus/data/FER2013Train/label.csv: has no line for 1 of 40 images that {root}/fer2013new.csv names "
        "(the first: fer0000023.png): restore it from microsoft/FERPlus",
    ),
    "G a line without a name": (
        folders_of_discs, append(TRAIN_LABELS, ',"(0, 0, 48, 48)",0,0,0,0,0,0,0,0,0,10\n'),
        "{root}/FER2013Train/label.csv line 25: the name of the picture is missing: "
        "delete the line or restore the name",
    ),
    "G an empty box": (
        lambda root: folders_of_discs(root, box=""), nothing,
        "{root}/FER2013Train/label.csv line 1: the box is empty instead of (0, 0, 48, 48): "
        "crop and resize the picture to the face",
    ),
    "H a clone alone": (
        lambda root: folders_of_discs(root, pictures=False), nothing,
        "{root}: holds the label.csv of FER+ but no images: put fer2013.csv and fer2013new.csv there, too",
    ),
    "R class folders": (
        lambda root: put(root, {f"train/{name}/1.jpg": "x" for name in ("happy", "sad")}), nothing,
        "{root}: holds folders of pictures, as train/happy, which have no votes: set data.dataset to folders, "
        "or to the name of the data set",
    ),
    "R text after the last row": (
        rows_of_discs, append("fer2013.csv", "fer2013/README,0000664,0001750\n@inproceedings{x,\n"),
        "{root}/fer2013.csv line 42: 'fer2013/README,0000664,0001750' is no row of pixels: "
        "delete what does not belong to the table there",
    ),
    "R a git-lfs pointer": (
        rows_of_discs, lambda root: put(root, {"fer2013.csv": "version https://git-lfs.github.com/spec/v1\n"}),
        "{root}/fer2013.csv: is a git-lfs pointer, not the file: run `git lfs pull` in the clone it comes from",
    ),
    "R pictures that are git-lfs pointers": (
        folders_of_discs,
        lambda root: put(root, {"FER2013Train/fer0000000.png": "version https://git-lfs.github.com/spec/v1\n"}),
        "{root}/FER2013Train/fer0000000.png: is a git-lfs pointer, not the file: run `git lfs pull` in the clone it "
        "comes from",
    ),
    "R JPEG": (
        folders_of_discs, as_jpeg,
        "{root}/FER2013Train/fer0000000.png: is a JPEG, which changes pixels, instead of a PNG: "
        "make the pictures again",
    ),
    "R votes without names": (
        rows_of_discs,
        edit("fer2013new.csv", lambda text: "\n".join(",".join(f for n, f in enumerate(line.split(",")) if n != 1)
                                                      for line in text.splitlines())),
        "{root}/fer2013new.csv line 1: lacks the columns Image name: download fer2013new.csv again",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_right_is_refused_with_its_cause(case: str, tmp_path: Path) -> None:
    make, change, message = BAD[case]
    change(make(tmp_path))
    with pytest.raises(UserError) as error:
        read_ferplus(tmp_path)
    assert str(error.value).startswith(message.format(root=tmp_path))
    assert "\n" not in str(error.value)


def test_the_column_emotion_is_compared_where_it_says_something(tmp_path: Path) -> None:
    for emotions, share in ((EMOTION, 1.0), (np.where(np.arange(40) % 3, EMOTION, 1), 0.6857), (np.full(40, 9), None)):
        source = read_ferplus(
            put(tmp_path, {"fer2013.csv": rows_csv(emotions=emotions), "fer2013new.csv": disc_votes()})
        )
        assert source.facts.get("emotion_agrees") == share  # of the 35 that are no contempt


def test_a_line_that_stands_twice_counts_once(tmp_path: Path) -> None:
    folders_of_discs(tmp_path)
    edit(TRAIN_LABELS, lambda text: text + text.splitlines(keepends=True)[3])(tmp_path)
    source = read_ferplus(tmp_path)
    assert len(source.table) == 40
    assert source.left_out["a line that stands twice"] == [f"{tmp_path}/{TRAIN_LABELS} line 25"]


PER_CLASS = {  # label.csv, majority
    "train": [8733, 7284, 3136, 3022, 2098, 116, 536, 120],
    "val": [1180, 862, 411, 348, 289, 25, 60, 16],
    "test": [1083, 892, 394, 382, 269, 16, 86, 15],
}


def majority_counts(source: Source) -> dict[str, list[int]]:
    keep, label, _ = label_distribution(source.table[list(VOTE_COLUMNS)].to_numpy(), "majority", 8)
    usage = source.table["usage"].to_numpy()
    return {split: np.bincount(label[keep & (usage == split)], minlength=len(CLASSES)).tolist() for split in PER_CLASS}


@pytest.fixture(scope="module")
def real(ferplus_folder: Path) -> Source:
    return read_ferplus(ferplus_folder)


@pytest.mark.slow
def test_real_folders(ferplus_folder: Path, real: Source) -> None:
    assert real.images.shape == (35_710, 48, 48)
    assert majority_counts(real) == PER_CLASS
    by_row = read_ferplus(ferplus_folder, "fer2013new")
    assert by_row.images.shape == (35_714, 48, 48)  # four names twice
    assert [sum(counts) for counts in majority_counts(by_row).values()] == [25_060, 3_199, 3_153]


@pytest.mark.slow
def test_real_rows_with_the_labels_of_a_clone(ferplus_folder: Path, real: Source, tmp_path: Path) -> None:
    """The same images and votes in the same order as from the folders."""
    texts = [str(value) for value in range(256)]
    images = dict(zip(real.table["name"], np.asarray(real.images).reshape(-1, 48 * 48)))
    table = pd.read_csv(ferplus_folder / "fer2013new.csv", keep_default_na=False)
    with (tmp_path / "fer2013.csv").open("w") as file:
        file.write("pixels,Usage\n")
        for usage, name in zip(table["Usage"], table["Image name"]):
            pixels = images[name].tolist() if name else [0] * 48 * 48
            file.write(f"{' '.join([texts[value] for value in pixels])},{usage}\n")
    shutil.copy(ferplus_folder / "fer2013new.csv", tmp_path)
    for folder in FOLDERS:
        put(tmp_path, {f"FERPlus/data/{folder}/label.csv": (ferplus_folder / folder / "label.csv").read_bytes()})
    source = read_ferplus(tmp_path)
    assert majority_counts(source) == PER_CLASS
    assert source.facts == {"label_source": "label_csv"}
    assert len(source.left_out["a row that no label.csv names"]) == 177  # 173 without a name, four twice
    assert source.table.equals(real.table)
    np.testing.assert_array_equal(source.images, real.images)


def test_no_damaged_byte_of_a_picture_ends_in_a_traceback(tmp_path: Path) -> None:
    official_folders(tmp_path)
    file = tmp_path / "FER2013Valid" / "d.png"
    whole = file.read_bytes()
    messages = []
    for position in [*range(70), *range(70, len(whole), 97), *range(len(whole) - 20, len(whole))]:
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 0x5A]) + whole[position + 1 :])
        try:
            read_ferplus(tmp_path, "auto")
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 25
    assert all(message.startswith(f"{file}: ") for message in messages)
