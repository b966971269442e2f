"""A table of pictures: the columns people use, csv and parquet, labels and votes, boxes, mistakes."""

import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from test_folders import put, read, refused, rows

from fer.data.readers import table

NAMES = [f"faces/{n}.png" for n in range(6)]


def write(root: Path, text: str, name: str = "labels.csv") -> Path:
    (root / name).write_text(text)
    return root


def lines(header: str, *more: str) -> str:
    return "\n".join([header, *more]) + "\n"


def plain(root: Path) -> Path:
    put(root, NAMES)
    return write(root, lines("path,label", *(f"{name},{'ab'[n % 2]}" for n, name in enumerate(NAMES))))


SPELLINGS = {
    "path,label": "faces/{n}.png,{label}",
    "Image;Emotion;comment": "faces\\{n}.png;{label};x",
    "filename\tclass": "./faces/../faces/{n}.png\t{label}",
    "label,file_name,Split": "{label},FACES/{n}.PNG,Training",
}


@pytest.mark.parametrize("header", SPELLINGS)
def test_columns_by_the_names_that_people_give_them(header: str, tmp_path: Path) -> None:
    put(tmp_path, NAMES)
    text = [SPELLINGS[header].format(n=n, label="ab"[n % 2]) for n in range(6)]
    if "Split" in header:
        text[1:3] = [text[1].replace("Training", "val"), text[2].replace("Training", "PrivateTest")]
    source = read(write(tmp_path, lines(header, *text)), table.read)
    usages = ["train", "val", "test", "train", "train", "train"] if "Split" in header else [""] * 6
    assert rows(source) == {name: (usages[n], "", "ab"[n % 2], n) for n, name in enumerate(NAMES)}
    assert (source.classes, source.labels, source.read) == (("a", "b"), "hard", ["labels.csv"])


def test_parquet_and_paths_relative_to_the_table_or_data_path(tmp_path: Path) -> None:
    put(tmp_path, NAMES)
    frame = pd.DataFrame({"path": NAMES, "label": [7, 7, 8, 8, 9, 9], "subject": ["a", None, "b", "b", "c", "c"]})
    frame["path"] = [NAMES[0], "1.png", str(tmp_path / NAMES[2]), *NAMES[3:]]
    frame["box"] = [[0, 0, 4, 4]] * 6
    frame.to_parquet(tmp_path / "faces" / "all.parquet")
    source = read(tmp_path, table.read)
    assert rows(source) == {name: ("", "a bbcc"[n].strip(), "778899"[n], n) for n, name in enumerate(NAMES)}
    assert source.images.shape == (6, 4, 4)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pd.DataFrame({"path": NAMES}).to_parquet(put(tmp_path, NAMES) / "x.parquet")
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "fastparquet", None)
    assert refused(tmp_path, table.read) == (
        f"{tmp_path}/x.parquet: needs pyarrow: `pip install pyarrow`, or save the table as csv"
    )


def test_votes_a_column_for_each_class(tmp_path: Path) -> None:
    put(tmp_path, NAMES)
    votes = [[3, 0, 0, 1], [0, 5, 1, 0], [2, 2, 0, 0], [0, 0, 0, 9], [1, 1, 1, 1], [4, 0, 0, 0]]
    text = [f"{name},{v[2]},{v[0]},{v[1]},{v[3]}" for name, v in zip(NAMES, votes)]
    source = read(write(tmp_path, lines("path,NF,Glad,sad,unknown", *text)), table.read)
    assert (source.classes, source.labels) == (("Glad", "sad"), "votes")
    assert source.vote_columns == ("Glad", "sad", "unknown", "NF")
    assert source.table[list(source.vote_columns)].to_numpy().tolist() == [[v[0], v[1], v[3], v[2]] for v in votes]
    assert [int(image[0, 0]) for image in source.images] == list(range(6))
    assert refused(tmp_path, table.read, classes=("Glad", "sad")).startswith("data.classes: chooses among hard labels")
    text = [f"{name},{int(n < 2)},{int(n >= 2)}" for n, name in enumerate(NAMES)]  # single votes are labels
    source = read(write(tmp_path, lines("path,glad,sad", *text)), table.read)
    assert (source.labels, [row[2] for row in rows(source).values()]) == ("hard", ["glad"] * 2 + ["sad"] * 4)


def test_several_faces_in_a_picture_and_a_row_twice(tmp_path: Path) -> None:
    put(tmp_path, [*NAMES[:2], "faces/new.png"])
    text = ["faces/0.png,a,0 0 4 4", '"faces/0.png",b,"(4, 4, 4, 4)"', "faces/1.png,a,0 0 4 4", "faces/1.png,a,0 0 4 4"]
    source = read(write(tmp_path, lines("path,label,box", *text)), table.read)
    assert (len(source.table), source.images.shape) == (3, (3, 4, 4))
    assert source.left_out == {
        "a row that stands twice": ["labels.csv line 5"],
        "no part of the data set": ["faces/new.png"],
    }


def edit(old: str, new: str) -> Callable[[Path], object]:
    return lambda root: (root / "labels.csv").write_text((root / "labels.csv").read_text().replace(old, new, 1))


TABLE = "{root}/labels.csv"
MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no table": (lambda root: (root / "labels.csv").unlink(),
                 "{root}: holds no csv or parquet with a column path: put it there or correct data.path"),
    "two tables": (lambda root: write(root, "path,label\nx,y\n", "more.csv"),
                   "{root}: holds several tables with paths: labels.csv, more.csv: keep one of them there; "
                   "one table has a row for every picture, with a column split"),
    "missing pictures": (
        lambda root: [(root / NAMES[1]).unlink(), (root / NAMES[2]).unlink()],
        TABLE + " line 3: faces/1.png is not there (2 of 6 pictures are missing): restore it, "
        "or give its path relative to the table",
    ),
    "outside": (edit("faces/0.png", "../0.png"),
                TABLE + " line 2: ../0.png is not there: restore it, or give its path relative to the table"),
    "no label": (edit("0.png,a", "0.png,"), TABLE + " line 2: has no label: add it or delete the row"),
    "two labels": (edit("faces/1.png", "faces/0.png"),
                   TABLE + " line 3: faces/0.png has another label in labels.csv line 2: delete one of them"),
    "another split": (lambda root: write(root, "path,label,split\nfaces/0.png,a,trian\n"),
                      TABLE + " line 2: split is 'trian': must be train, val or test"),
    "no test": (lambda root: write(root, "path,label,split\nfaces/0.png,a,train\nfaces/1.png,a,val\n"),
                TABLE + " line 2: the table has train and val and no test: write test for val "
                "(split.val_share of train becomes val)"),
    "neither label nor votes": (lambda root: write(root, "path,split\nfaces/0.png,train\n"),
                                TABLE + ": has neither a column label nor two or more columns of votes: add one"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str, tmp_path: Path) -> None:
    change, message = MISTAKES[mistake]
    change(plain(tmp_path))
    assert refused(tmp_path, table.read) == message.format(root=tmp_path)
