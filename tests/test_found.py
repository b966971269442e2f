"""What is there: folders and archives as people have them, without what is hidden, foreign, damaged or there twice."""

import bz2
import gzip
import io
import lzma
import os
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from fer.data.found import look, one_of
from fer.errors import UserError

FILES = {"set/a/1.csv": b"name\nfirst\n", "set/b/2.csv": b"name\nsecond\n"}


def zipped(members: dict[str, bytes], packing: int = zipfile.ZIP_DEFLATED) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", packing) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return packed.getvalue()


def tarred(members: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def put(root: Path, files: Mapping[str, bytes | str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def there(path: Path) -> tuple[dict[str, bytes], dict[str, list[str]]]:
    """Name -> content of all entries, and what was left out."""
    with look(path) as found:
        return {entry.name: entry.read() for entry in found.entries}, dict(found.left_out)


PACKED: dict[str, bytes] = {
    "x.zip": zipped(FILES),
    "x.tar": tarred(FILES),
    "x.tar.gz": gzip.compress(tarred(FILES)),
    "x.tar.bz2": bz2.compress(tarred(FILES)),
    "x.tar.xz": lzma.compress(tarred(FILES)),
    "unpacked by the browser.tar.gz": tarred(FILES),
    "backslashes.zip": zipped({name.replace("/", "\\"): content for name, content in FILES.items()}),
    "folder entries.zip": zipped({"set/": b"", "set/a/1.csv/": b"", **FILES}),
    "climbing.zip": zipped({f"../../{name}": content for name, content in FILES.items()}),
    "from a mac.zip": zipped({**FILES, "__MACOSX/set/a/._1.csv": b"\0", "set/.DS_Store": b"\0"}),
}


@pytest.mark.parametrize("name", PACKED)
def test_an_archive_is_known_by_its_bytes_and_read_like_a_folder(name: str, tmp_path: Path) -> None:
    put(tmp_path, {name: PACKED[name]})
    for path in (tmp_path, tmp_path / name):
        content, left_out = there(path)
        assert content == {f"{name}/{inner}": data for inner, data in FILES.items()}
        assert sum(map(len, left_out.values())) == (2 if "from" in name else 0)
    with look(tmp_path) as found:
        assert [entry.place for entry in found.entries] == list(FILES)
        assert sorted(os.listdir(tmp_path)) == [name]


def test_a_single_file_in_another_shape(tmp_path: Path) -> None:
    """Compressed alone; zipped alone, as Kaggle does; or a csv whatever its name."""
    put(tmp_path, {"1.csv.gz": gzip.compress(b"a,b\n"), "2.csv.zip": zipped({"2.csv": b"a,b\n"}), "3.tar.gz": b"a,b\n"})
    with look(tmp_path) as found:
        assert [(entry.place, entry.read()) for entry in found.tables()] == [
            ("1.csv", b"a,b\n"), ("2.csv", b"a,b\n"), ("3.tar.gz", b"a,b\n"),
        ]  # fmt: skip


def test_what_is_hidden_foreign_or_half_downloaded_is_left_out_with_the_reason(tmp_path: Path) -> None:
    hidden = [".git/x.csv", "._x.zip", "__MACOSX/x.csv", "Thumbs.db", "set/Desktop.ini", "~$x.csv", "x.zip.crdownload"]
    put(tmp_path, {**FILES, **dict.fromkeys(hidden, b"\0\x05\x16\x07")})
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "set" / "round").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xfc.txt")).write_text("x")
    content, left_out = there(tmp_path)
    assert content == FILES
    assert {reason: len(names) for reason, names in left_out.items()} == {
        "hidden, half downloaded, or left by the operating system": 7,
        "a link to nothing": 1,
        "a link to a folder above it": 1,
        "no file": 1,
        "a name that is not UTF-8": 1,
    }
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xfc.png")).write_text("x")
    with pytest.raises(UserError, match=r"\\udcfc.png: its name is not UTF-8: rename it$"):
        there(tmp_path)


def test_a_linked_folder_is_read(tmp_path: Path) -> None:
    put(tmp_path / "disk", FILES)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "faces").symlink_to(tmp_path / "disk" / "set")
    assert there(tmp_path / "data")[0] == {f"faces/{name[4:]}": data for name, data in FILES.items()}


@pytest.mark.parametrize(
    ("members", "where"), [(FILES, ""), (FILES, "x/"), ({"a.csv": b"a", "b.csv": b"b"}, "x/"), ({"a.csv": b"a"}, "")]
)
def test_an_archive_beside_what_was_unpacked_from_it_is_the_same_data(
    members: dict[str, bytes], where: str, tmp_path: Path
) -> None:
    put(tmp_path, {"x.zip": zipped(members), **{where + name: data for name, data in members.items()}})
    content, left_out = there(tmp_path)
    assert (len(content), left_out) == (len(members), {"an archive that is unpacked beside it": ["x.zip"]})
    (tmp_path / where / next(iter(members))).write_bytes(b"another size")  # then both are there
    assert len(there(tmp_path)[0]) == 2 * len(members)


def test_several_candidates_are_named_unless_they_are_the_same(tmp_path: Path) -> None:
    put(tmp_path, {"a/x.csv": b"1", "b/x.csv": b"1", "c/x.csv": b"2", "c/y.csv": b"3"})
    with look(tmp_path) as found:
        one, same, other, more = found.entries
        assert one_of([[one], [same]], "tables") == [one]
        for candidates, named in (
            ([[one], [other]], "a/x.csv, c/x.csv"),
            ([[one], [other, more]], "a (1 file), c (2 files)"),
        ):
            with pytest.raises(UserError) as caught:
                one_of(candidates, "tables")
            remedy = "keep one of them there, or set data.path to the one to read"
            assert str(caught.value) == f"{tmp_path}: holds several tables: {named}: {remedy}"


CLONE = "in the clone it comes from"
USELESS = {
    "fer.csv": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
                f"is a git-lfs pointer, not the file: run `git lfs pull` {CLONE}"),
    "annex.csv": (b"/annex/objects/SHA256E-s3--0.csv\n",
                  f"is a git-annex pointer, not the file: run `git annex get` {CLONE}"),
    "page.zip": (b"\n<!DOCTYPE html><html>", "is a web page, not the file: sign in there and download it again"),
    "x.rar": (b"Rar!\x1a\x07\0", "is a RAR archive, which is not read: unpack it and delete it"),
    "empty.csv": (b"", "is empty: download it again"),
    "excel.csv": ("a,b\n".encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
    "noise.zip": (b"\0\1\2\3", "is no archive, or damaged: download it again"),
    "cut.zip": (zipped(FILES)[:-30], "is truncated or damaged (File is not a zip file): download it again"),
    "cut.tar.gz": (gzip.compress(tarred(FILES))[:-20], "is truncated or damaged (Compressed file ended before the "
                   "end-of-stream marker was reached): download it again"),
}  # fmt: skip


@pytest.mark.parametrize("name", USELESS)
def test_what_a_file_is_instead_is_said_where_nothing_else_is_there(name: str, tmp_path: Path) -> None:
    content, reason = USELESS[name]
    put(tmp_path, {name: content})
    with look(tmp_path) as found:
        assert str(found.nothing("no data")) == f"{tmp_path}/{name}: {reason}"


def test_an_encrypted_or_damaged_member_is_named(tmp_path: Path) -> None:
    whole = zipped({"x.csv": b"name\n"}, zipfile.ZIP_STORED)
    locked = bytearray(whole)
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        locked[whole.index(mark) + place] |= 1
    put(tmp_path, {"damaged.zip": whole.replace(b"name", b"nama"), "locked.zip": bytes(locked)})
    with look(tmp_path) as found:
        for entry, fault in zip(
            found.entries,
            (
                "damaged.zip/x.csv: is truncated or damaged (Bad CRC-32 for file 'x.csv'): download it again",
                "locked.zip/x.csv: is encrypted or has an unknown compression: unpack it by hand",
            ),
        ):
            with pytest.raises(UserError) as caught:
                entry.read()
            assert str(caught.value) == f"{tmp_path}/{fault}"
