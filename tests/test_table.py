"""A table of pictures: the columns people use, csv and parquet, labels and votes, boxes, mistakes."""

import io
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import change, refusal, swap, tells
from PIL import Image
from test_folders import put, read, rows

from fer.data.readers import table
from fer.data.source import UNWANTED

NAMES = [f"faces/{n}.png" for n in range(6)]


def write(root: Path, header: str, *more: str) -> Path:
    change(put(root, NAMES), "labels.csv", lambda text: "\n".join([header, *more]) + "\n")
    return root


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("path,label", "faces/{n}.png,{label}"),
        ("Image;Emotion;comment", "faces\\{n}.png;{label};x"),
        ("filename\tclass", "./faces/../faces/{n}.png\t{label}"),
        ("label,file_name,Split", "{label},FACES/{n}.PNG,{usage}"),
    ],
)
def test_columns_by_the_names_that_people_give_them(header: str, row: str, tmp_path: Path) -> None:
    spelled = ["Training", "val", "PrivateTest", *["train"] * 3]
    text = [row.format(n=n, label="ab"[n % 2], usage=spelled[n]) for n in range(6)]
    source = read(write(tmp_path, header, *text), table.read)
    usages = ["train", "val", "test", "train", "train", "train"] if "Split" in header else [""] * 6
    assert rows(source) == {name: (usages[n], "", "ab"[n % 2], n) for n, name in enumerate(NAMES)}
    assert (source.classes, source.labels, source.read) == (("a", "b"), "hard", ["labels.csv"])


def test_columns_that_are_not_read_are_named(tmp_path: Path) -> None:
    """Such as a subject under a name that is not known here, without which people are on two sides."""
    lines = [f"{name},{'ab'[n % 2]},p{n // 3},{n}" for n, name in enumerate(NAMES)]
    source = read(write(tmp_path, "path,label,participant,age", *lines), table.read)
    assert source.left_out == {"no column that is read here": ["participant", "age"]}
    lines = [f"{name},{'ab'[n % 2]},{['p', 'nan', '<NA>'][n % 3]}" for n, name in enumerate(NAMES)]
    source = read(write(tmp_path, "path,label,subject", *lines), table.read)
    assert [subject for _, subject, _, _ in rows(source).values()] == ["p", "", ""] * 2


def test_parquet_and_paths_relative_to_the_table_or_data_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, NAMES)
    frame = pd.DataFrame({"path": NAMES, "label": [7, 7, 8, 8, 9, 9], "subject": ["a", None, "b", "b", "c", "c"]})
    frame["path"] = [NAMES[0], "1.png", str(tmp_path / NAMES[2]), *NAMES[3:]]
    frame["box"] = [[1, 2, 4, 3]] * 6
    frame.to_parquet(tmp_path / "faces" / "all.parquet")
    source = read(tmp_path, table.read)
    assert rows(source) == {name: ("", "a bbcc"[n].strip(), "778899"[n], n) for n, name in enumerate(NAMES)}
    assert source.images.shape == (6, 4, 4)
    frame.set_index("path").to_parquet(tmp_path / "faces" / "all.parquet")
    assert rows(read(tmp_path, table.read)) == rows(source)
    frame.assign(sha=b"x").to_parquet(tmp_path / "faces" / "all.parquet")  # not of the pictures
    assert read(tmp_path, table.read).images.shape == (6, 4, 4)
    held = pd.DataFrame({"image": [None, *[{"bytes": b"x", "path": None}] * 5], "label": frame["label"]})
    held.to_parquet(tmp_path / "faces" / "all.parquet")
    tells(tmp_path, "/faces/all.parquet: column image holds the pictures themselves:", read, tmp_path, table.read)
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("pyarrow", "fastparquet"):
        monkeypatch.setitem(sys.modules, name, None)
    told = "/faces/all.parquet: needs pyarrow: `pip install pyarrow`, or save the table as csv"
    tells(tmp_path, told, read, tmp_path, table.read)


def test_votes_a_column_for_each_class(tmp_path: Path) -> None:
    votes = [[3, 0, 0, 1], [0, 5, 1, 0], [2, 2, 0, 0], [0, 0, 0, 9], [1, 1, 1, 1], [4, 0, 0, 0]]
    text = [f"{name},{v[3]},{v[0]},{v[1]},{v[2]}" for name, v in zip(NAMES, votes)]
    source = read(write(tmp_path, "path,NF,Glad,sad,unknown", *text), table.read)
    assert (source.classes, source.labels, source.vote_columns) == (
        ("Glad", "sad"), "votes", ("Glad", "sad", "unknown", "NF")
    )  # fmt: skip
    assert source.table[list(source.vote_columns)].to_numpy().tolist() == votes
    some = read(tmp_path, table.read, classes=("sad", "Glad"))
    assert some.vote_columns == ("sad", "Glad", "unknown", "NF")
    tells(tmp_path, "data.classes: the data set has no class joy; known: Glad, sad", read, tmp_path, table.read,
          classes=("joy", "sad"))  # fmt: skip
    text = [f"{name},{int(n < 2)},{int(n >= 2)}" for n, name in enumerate(NAMES)]  # single votes are labels
    source = read(write(tmp_path, "path,glad,sad", *text), table.read)
    assert (source.labels, [row[2] for row in rows(source).values()]) == ("hard", ["glad"] * 2 + ["sad"] * 4)
    text = [f"{name},{int(n < 2)},{int(n == 5)},{int(n in (2, 3, 4))}" for n, name in enumerate(NAMES)]
    some = read(write(tmp_path, "path,glad,bored,sad", *text), table.read, classes=("sad", "glad"))
    assert (some.labels, [row[2] for row in rows(some).values()]) == ("hard", ["glad"] * 2 + ["sad"] * 3)
    assert some.left_out[UNWANTED] == NAMES[5:]


def test_a_column_that_is_no_class_beside_votes(tmp_path: Path) -> None:
    text = [f"{name},{n},{9 - n},2{n}" for n, name in enumerate(NAMES)]
    written = write(tmp_path, "path,happy,sad,age", *text)
    told = "/labels.csv: holds votes for happy and sad, and a column age, which is no expression known here: name all"
    tells(tmp_path, told, read, written, table.read)
    assert read(written, table.read, classes=("happy", "sad")).vote_columns == ("happy", "sad")
    told = "data.classes: leaves out the votes for sad of "
    tells(tmp_path, told, read, written, table.read, classes=("happy", "age"))
    told = "/labels.csv: has both a column emotion and votes for happy, sad: leave one of the two out of the table"
    tells(tmp_path, told, read, write(tmp_path, "path,happy,sad,emotion", *text), table.read)
    text = [f"{name},0.{n},0.{9 - n},{'ab'[n % 2]}" for n, name in enumerate(NAMES)]  # scores beside a label
    assert read(write(tmp_path, "path,happy,sad,emotion", *text), table.read).classes == ("a", "b")


@pytest.mark.parametrize("index", ["", "Unnamed: 0", "__index_level_0__"])
def test_the_index_that_pandas_writes_is_no_class(index: str, tmp_path: Path) -> None:
    text = [f"{n},{name},{n},{9 - n}" for n, name in enumerate(NAMES)]
    source = read(write(tmp_path, f"{index},path,happy,sad", *text), table.read)
    assert (source.classes, source.vote_columns) == (("happy", "sad"), ("happy", "sad"))


def test_paths_of_another_system(tmp_path: Path) -> None:
    """Accents in two parts, as macOS has them on disk, and names that differ by their case alone."""
    put(tmp_path, ["fro\u0308h/1.png", "a.png", "A.png"])
    (tmp_path / "labels.csv").write_text("path,label\nfr\u00f6h/1.png,x\na.png,x\nA.png,y\n")
    assert [row[2:] for row in rows(read(tmp_path, table.read)).values()] == [("x", 0), ("x", 1), ("y", 2)]


def test_a_class_and_a_person_are_one_however_their_accents_are_written(tmp_path: Path) -> None:
    """Joined as most programs write them, or in two parts as on macOS."""
    joined, parted = "fr\u00f6h", "fro\u0308h"

    def written(*text: str) -> Path:
        (put(tmp_path, NAMES) / "labels.csv").write_text("\n".join(text))
        return tmp_path

    text = [f"{name},{[joined, parted, 'sad'][n % 3]},{[joined, parted][n % 2]}" for n, name in enumerate(NAMES)]
    twice = f"{NAMES[0]},{parted},{parted}"
    for classes in (None, ("sad", parted)):
        source = read(written("path,label,subject", *text, twice), table.read, classes=classes)
        assert source.classes == ((joined, "sad") if classes is None else ("sad", joined))
        assert [row[1:3] for row in rows(source).values()] == [(joined, joined), (joined, joined), (joined, "sad")] * 2
        assert source.left_out == {"a row that stands twice": ["labels.csv line 8"]}
    text = [f"{name},{n},9,{[joined, parted][n % 2]}" for n, name in enumerate(NAMES)]
    source = read(written(f"path,{parted},sad,subject", *text), table.read, classes=("sad", parted))
    assert (source.vote_columns, set(source.table["subject"])) == (("sad", joined), {joined})
    told = f"/labels.csv: has two columns {joined}: rename or delete one"
    tells(tmp_path, told, read, written(f"path,{joined},{parted},subject", *text), table.read)


def test_subjects_from_names_beside_a_column_of_subjects(tmp_path: Path) -> None:
    written = write(tmp_path, "path,label,subject", *(f"{name},{'ab'[n % 2]},p{n}" for n, name in enumerate(NAMES)))
    told = "data.subject_pattern: the data set names its subjects itself: remove one of the two"
    tells(tmp_path, told, read, written, table.read, subject_pattern=r"(\d)")
    write(tmp_path, "path,happy,sad,subject", *(f"{name},3,{n},p{n}" for n, name in enumerate(NAMES)))
    tells(tmp_path, told, read, written, table.read, subject_pattern=r"(\d)")


def test_several_faces_in_a_picture_and_a_row_twice(tmp_path: Path) -> None:
    text = ["faces/0.png,a,0 0 4 4", '"faces/0.png",b,"(4, 4, 4, 4)"', "faces/1.png,a,0 0 4 4", "faces/1.png,a,0 0 4 4"]
    source = read(write(tmp_path, "path,label,box", *text), table.read)
    assert source.images.shape == (3, 4, 4)
    assert source.table["name"].tolist() == ["faces/0.png#0_0_4_4", "faces/0.png#4_4_4_4", "faces/1.png"]
    left_out = {"a row that stands twice": ["labels.csv line 5"], "no part of the data set": NAMES[2:]}
    assert source.left_out == left_out


@pytest.mark.parametrize(("label", "of_one"), [("label", "a"), ("happy,sad", "3,1")])
@pytest.mark.parametrize(("column", "one", "other"), [("split", "train", "test"), ("subject", "p", "q")])
def test_a_picture_twice_with_another_split_or_subject(
    label: str, of_one: str, column: str, one: str, other: str, tmp_path: Path
) -> None:
    text = [f"faces/{n}.png,{of_one},{value}" for n, value in ((0, one), (1, one), (0, other))]
    told = "/labels.csv line 4: faces/0.png has another label, split or subject in labels.csv line 2: delete one of"
    tells(tmp_path, told, read, write(tmp_path, f"path,{label},{column}", *text), table.read)


TABLE = "labels.csv"
MISTAKES: list[tuple[str, Callable[[str], str] | None, str]] = [
    (TABLE, lambda text: "picture,label\nfaces/0.png,a\n",
     ": holds no csv or parquet with a column path (labels.csv has picture, label): put it there or correct the path"),
    (TABLE, None, ": holds no csv or parquet with a column path: put it there or correct the path in params.yaml"),
    ("more.csv", lambda text: "path,label\nx,y\n", ": holds several tables with paths: labels.csv, more.csv: keep one"),
    ("faces/[12].png", None, "/labels.csv line 3: faces/1.png is not there (2 of 6 pictures are missing): restore it"),
    (TABLE, swap("faces/0", "../0"), "/labels.csv line 2: ../0.png is not there: restore it, or give its path"),
    (TABLE, swap("0.png,a", "0.png,"), "/labels.csv line 2: has no label: add it or delete the row"),
    (TABLE, swap("0.png,a", "0.png,NaN"), "/labels.csv line 2: has no label: add it or delete the row"),
    (TABLE, swap("faces/1", "faces/0"), "/labels.csv line 3: faces/0.png has another label, split or subject in "),
    (TABLE, lambda text: "path,label,split\nfaces/0.png,a,trian\n", "/labels.csv line 2: split is 'trian': must be"),
    (TABLE, lambda text: "path,label,split\nfaces/0.png,a,train\nfaces/1.png,a,val\n",
     "/labels.csv line 2: the table has train and val and no test: write test for val"),
    (TABLE, lambda text: "path,split\nfaces/0.png,train\n", "/labels.csv: has neither a column label nor two or more"),
    (TABLE, swap("1.png,b", "1.png,B"), ": a class is called both B and b: write one of them everywhere"),
    (TABLE, swap("1.png,b", "1.png,w\xfctend"), "/labels.csv line 3: is not UTF-8: save it as CSV in UTF-8"),
    (TABLE, lambda text: "path,happy,row\nfaces/0.png,3,4\n", ": a class cannot be called row, as a column is: renam"),
    (TABLE, lambda text: "path,label,box\nfaces/0.png,a,0 0 -4 4\n", "/labels.csv line 2: the box is '0 0 -4 4': must"),
    (TABLE, lambda text: "path,label,box\nfaces/0.png,a,0 0 4 0\n", "/labels.csv line 2: the box is '0 0 4 0': must"),
    (TABLE, lambda text: "path,happy,happy,sad\nfaces/0.png,3,1,4\n", "/labels.csv: has two columns happy: rename or"),
    (TABLE, lambda text: "path,label,Label\nfaces/0.png,a,b\n", "/labels.csv: has two columns label: rename or delete"),
    (TABLE, lambda text: "path,label,emotion\nfaces/0.png,1,a\n", "/labels.csv: has both label and emotion, each of"),
    (TABLE, lambda text: "path,label\nfaces/0.png,a\nfaces/1.png,a\n", ": holds pictures of one class only, a: add"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "edit", "message"), MISTAKES, ids=[row[2] for row in MISTAKES])
def test_mistakes(file: str, edit: Callable[[str], str] | None, message: str, tmp_path: Path) -> None:
    write(tmp_path, "path,label", *(f"{name},{'ab'[n % 2]}" for n, name in enumerate(NAMES)))
    change(tmp_path, file, edit)
    tells(tmp_path, message, read, tmp_path, table.read)


def test_two_archives_with_a_picture_of_the_same_path(tmp_path: Path) -> None:
    """Of the same bytes they are one; else none is taken by chance, whether or not the case of the path is right."""
    for name, value in (("part1", 0), ("part2", 0), ("part2", 9)):
        content = io.BytesIO()
        Image.fromarray(np.full((8, 8), value, np.uint8)).save(content, "PNG")
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.writestr("faces/0.png", content.getvalue())
        for path in ("faces/0.png", "Faces/0.PNG") if name == "part2" else ():
            (tmp_path / "labels.csv").write_text(f"path,label\n{path},a\n{path},a\n")
            message = refusal(read, tmp_path, table.read)
            both = "part1.zip/faces/0.png, part2.zip/faces/0.png: keep one"
            told = f"{tmp_path}: holds several pictures {path}: {both}"
            assert message.startswith(told) is (value == 9)
