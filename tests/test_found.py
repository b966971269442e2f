"""What is there: folders and archives as people have them, without what is hidden, foreign, damaged or there twice."""

import bz2
import gzip
import io
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import refusal, tells

from fer.data.found import look, one_of

FILES = {"set/a/1.csv": b"name\nfirst\n", "set/b/2.csv": b"name\nsecond\n"}


def zipped(members: dict[str, bytes], packing: int = zipfile.ZIP_DEFLATED) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", packing) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return packed.getvalue()


def tarred(members: dict[str, bytes], links: Sequence[tuple[str, bytes, str]] = ()) -> bytes:
    """`links`: name, kind and target of each."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        for name, entry.type, entry.linkname in links:
            entry.name, entry.size = name, 0
            tar.addfile(entry)
    return packed.getvalue()


def put(root: Path, files: Mapping[str, bytes | str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def there(path: Path) -> tuple[dict[str, bytes], dict[str, int]]:
    """Name -> content of all entries, and reason -> how many were left out."""
    with look(path) as found:
        return {e.name: e.read() for e in found.entries}, {why: len(names) for why, names in found.left_out.items()}


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
HIDDEN = "hidden, half downloaded, or left by the operating system"


@pytest.mark.parametrize("name", PACKED)
def test_an_archive_is_known_by_its_bytes_and_read_like_a_folder(name: str, tmp_path: Path) -> None:
    put(tmp_path, {name: PACKED[name]})
    for path in (tmp_path, tmp_path / name):
        content, left_out = there(path)
        assert content == {f"{name}/{inner}": data for inner, data in FILES.items()}
        assert left_out == ({HIDDEN: 2} if "mac" in name else {})
    assert os.listdir(tmp_path) == [name]


def test_the_archive_that_a_place_does_not_show(tmp_path: Path) -> None:
    one, two = {"set/1.csv": b""}, {"a/1.csv": b"", "b/1.csv": b""}
    put(tmp_path, {"one.zip": zipped(one), "two.zip": zipped(two), "same": zipped({"same": b""}), "plain.csv": b""})
    with look(tmp_path) as found:
        assert [entry.hidden_archive for entry in found.entries] == ["one", "", "same", "", ""]


def test_a_name_in_utf8_without_the_mark_of_it_and_one_with_a_line_break(tmp_path: Path) -> None:
    content = zipped({"w\u00fctend/1.csv": b"", "2.csv": b""})
    for start in (b"PK\x03\x04\x14\x00", b"PK\x01\x02\x14\x03\x14\x00"):
        assert start + b"\x00\x08" in content
        content = content.replace(start + b"\x00\x08", start + b"\x00\x00")
    put(tmp_path, {"mac.zip": content})
    assert sorted(there(tmp_path)[0]) == ["mac.zip/2.csv", "mac.zip/w\u00fctend/1.csv"]
    put(tmp_path, {"Icon\r": b"", "no\tes\n": b""})
    assert there(tmp_path)[1] == {HIDDEN: 1, "a name that has a control character": 1}
    put(tmp_path, {"a\nb.png": b""})
    tells(tmp_path, "/a\\nb.png: its name has a control character: rename it", there, tmp_path)
    (tmp_path / "a\nb.png").unlink()
    put(tmp_path, {"x.zip": zipped({"a\nb.png": b""})})
    tells(
        tmp_path,
        "/x.zip/a\\nb.png: its name has a control character: unpack the archive and rename it",
        there,
        tmp_path,
    )


@pytest.mark.parametrize("name", ["a/w\udcfctend.png", "w\udcfctend/a.png", "notes \udcfc.txt"])
def test_a_name_in_a_tar_that_is_not_utf8(name: str, tmp_path: Path) -> None:
    put(tmp_path, {"x.tar": tarred({**FILES, name: b""})})
    told = name.replace("\udcfc", "\\udcfc")
    tells(tmp_path, f"/x.tar/{told}: its name is not UTF-8: unpack the archive and rename it", there, tmp_path)


def test_a_single_file_compressed_zipped_or_misnamed(tmp_path: Path) -> None:
    put(tmp_path, {"1.csv.gz": gzip.compress(b"a,b\n"), "2.csv.zip": zipped({"2.csv": b"a,b\n"}), "3.tar.gz": b"a,b\n"})
    with look(tmp_path) as found:
        assert [entry.place for entry in found.tables()] == ["1.csv", "2.csv", "3.tar.gz"]
        assert {entry.read() for entry in found.tables()} == {b"a,b\n"}


def test_links_are_followed_and_what_is_hidden_or_foreign_is_left_out_with_the_reason(tmp_path: Path) -> None:
    hidden = [".git/x.csv", "._x.zip", "__MACOSX/x.csv", "Thumbs.db", "a/Desktop.ini", "~$x.csv", "x.zip.crdownload"]
    put(tmp_path / "disk", FILES)
    root = put(tmp_path / "root", dict.fromkeys(hidden, b"\0\x05\x16\x07"))
    for name in FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(tmp_path / "disk" / name)
    for name, target in (("gone", "nowhere"), ("a/round", root)):
        (root / name).symlink_to(target)
    os.mkfifo(root / "pipe")
    Path(os.fsdecode(os.fsencode(root) + b"/\xfc.txt")).write_text("x")
    reasons = ("a link to nothing", "a link to a folder above it", "no file", "a name that is not UTF-8")
    assert there(root) == (FILES, {HIDDEN: 7, **dict.fromkeys(reasons, 1)})
    Path(os.fsdecode(os.fsencode(root) + b"/\xfc.png")).write_text("x")
    tells(root, "/\\udcfc.png: its name is not UTF-8: rename it", there, root)
    (root / "b").symlink_to(tmp_path / "disk/set")
    tells(root, "/b: is a link to a folder, in which DVC would see no change: put the folder there, or ", there, root)


LEADING = [
    ("./set/hard.csv", tarfile.LNKTYPE, "./set/a/1.csv"),
    ("set/b/soft.csv", tarfile.SYMTYPE, "../a/./1.csv"),
    ("set/b/again.csv", tarfile.SYMTYPE, "soft.csv"),
    ("set/c/hard.csv", tarfile.LNKTYPE, "set/b/again.csv"),  # a link to soft.csv, which is not beside it
    ("set/b/hard.csv", tarfile.LNKTYPE, "set/b/again.csv"),
]
ASTRAY = [
    ("set/gone.csv", tarfile.SYMTYPE, "nowhere"),
    ("set/b/up.csv", tarfile.SYMTYPE, "../1.csv"),
    ("set/out.csv", tarfile.SYMTYPE, "/etc/hostname"),
    ("set/above.csv", tarfile.SYMTYPE, "../../x.tar"),
    ("set/never.csv", tarfile.LNKTYPE, "set/d.csv"),
    ("set/folder", tarfile.SYMTYPE, "a"),
    ("set/itself.csv", tarfile.SYMTYPE, "itself.csv"),
    ("set/itself too.csv", tarfile.LNKTYPE, "set/itself too.csv"),
    ("set/round.csv", tarfile.SYMTYPE, "trip.csv"),
    ("set/trip.csv", tarfile.SYMTYPE, "round.csv"),
]


@pytest.mark.parametrize("dot", ["", "./"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_links_in_a_tar_to_its_files_are_read_like_files(dot: str, pack: Callable, tmp_path: Path) -> None:
    pipe = ("set/pipe", tarfile.FIFOTYPE, "")
    members = {dot + name: content for name, content in FILES.items()}
    put(tmp_path, {"x.tar": pack(tarred(members, [*LEADING, *ASTRAY, pipe]))})
    linked = ["set/hard.csv", "set/b/soft.csv", "set/b/again.csv", "set/b/hard.csv"]
    with look(tmp_path) as found:
        content = {entry.place: (entry.read(), entry.size) for entry in found.entries}
        left_out = dict(found.left_out)
    assert content == {
        name: (data, len(data)) for name, data in {**FILES, **dict.fromkeys(linked, FILES["set/a/1.csv"])}.items()
    }
    astray = sorted(["set/c/hard.csv", *(name for name, _, _ in ASTRAY)])
    assert sorted(left_out.pop("a link to no file in the archive")) == [f"x.tar/{name}" for name in astray]
    assert left_out == {"no file": ["x.tar/set/pipe"]}


@pytest.mark.parametrize(
    ("members", "where"), [(FILES, ""), (FILES, "x/"), ({"a.csv": b"a", "b.csv": b"b"}, "x/"), ({"a.csv": b"a"}, "")]
)
def test_an_archive_beside_what_was_unpacked_from_it_is_the_same_data(
    members: dict[str, bytes], where: str, tmp_path: Path
) -> None:
    put(tmp_path, {"x.zip": zipped(members), **{where + name: data for name, data in members.items()}})
    content, left_out = there(tmp_path)
    assert (len(content), left_out) == (len(members), {"an archive that is unpacked beside it": 1})
    (tmp_path / where / next(iter(members))).write_bytes(b"another size")  # then both are there
    assert len(there(tmp_path)[0]) == 2 * len(members)


def test_several_candidates_are_named_unless_they_are_the_same(tmp_path: Path) -> None:
    with look(put(tmp_path, {"a/x.csv": b"1", "b/x.csv": b"1", "c/x.csv": b"2", "c/y.csv": b"3"})) as found:
        one, same, other, more = found.entries
        assert one_of([[one], [same]], "tables") == [one]
        many = ": holds several tables: {}: keep one of them there, or give the path of the one to read in params.yaml"
        tells(tmp_path, many.format("a/x.csv, c/x.csv"), one_of, [[one], [other]], "tables")
        tells(tmp_path, many.format("a (1 file), c (2 files)"), one_of, [[one], [other, more]], "tables")


LFS = "is a git-lfs pointer, not the file: run `git lfs pull` in the clone it comes from"
USELESS: dict[str, tuple[bytes, str]] = {
    "fer.csv": (b"version https://git-lfs.github.com/spec/v1\n", LFS),
    "annex.csv": (b"/annex/objects/SHA256E-s3--0.csv\n", "is a git-annex pointer, not the file: run `git annex get`"),
    "page.zip": (b"\n<!DOCTYPE html><html>", "is a web page, not the file: sign in there and download it again"),
    "x.rar": (b"Rar!\x1a\x07\0", "is a RAR archive, which is not read: unpack it and delete it"),
    "empty.csv": (b"", "is empty: download it again"),
    "excel.csv": ("a,b\n".encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
    "noise.zip": (b"\0\1\2\3", "is no archive, or damaged: download it again"),
    "cut.zip": (zipped(FILES)[:-30], "is truncated or damaged ( ... ): download it again"),
    "name.zip": (
        zipped({"\u00fc": b""}).replace("\u00fc".encode(), b"\xfc\xfc"),
        "is truncated or damaged ( ... ): download it again",
    ),
    "cut.tar.gz": (gzip.compress(tarred(FILES))[:-20], "is truncated or damaged ( ... ): download it again"),
    "cut.tar": (tarred(FILES)[:1024], "is truncated or damaged (its end is missing): download it again"),
    "empty.zip": (b"", "is empty: download it again"),
    "fer.zip": (b"version https://git-lfs.github.com/spec/v1\n", LFS),
}


@pytest.mark.parametrize("name", USELESS)
def test_what_a_file_is_instead_is_said_where_nothing_else_is_there(name: str, tmp_path: Path) -> None:
    def nothing() -> None:
        with look(put(tmp_path, {name: USELESS[name][0]})) as found:
            raise found.nothing("no data")

    tells(tmp_path, f"/{name}: {USELESS[name][1]}", nothing)


def test_a_tar_that_is_cut_or_has_a_damaged_header_is_not_read_as_if_whole(tmp_path: Path) -> None:
    """Wherever the cut is: between two files, in a header, in the names that are too long for one."""
    path, members = tmp_path / "x.tar", {**FILES, "set/empty.csv": b"", f"set/{'long' * 40}.csv": b"name\n" * 300}
    whole = tarred(members)
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512  # of the last file
    cuts = [*range(512, end + 512, 512), *np.random.default_rng(0).integers(300, end + 512, 200).tolist()]
    damaged = [whole[:cut] for cut in cuts]
    damaged += [gzip.compress(content) for content in damaged[:5]]
    damaged.append(whole.replace(b"set/b/2.csv", b"set/b/3.csv"))  # its checksum is another
    for content in damaged:
        path.write_bytes(content)
        with look(tmp_path) as found:
            assert found.entries == []
            assert list(found.useless) == [str(path)]
            assert found.useless[str(path)].startswith("is truncated or damaged (")
    path.write_bytes(whole[: end + 512])
    assert len(there(tmp_path)[0]) == len(members)


def test_an_encrypted_or_damaged_member_is_named(tmp_path: Path) -> None:
    whole = zipped({"x.csv": b"name\n"}, zipfile.ZIP_STORED)
    locked = bytearray(whole)
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        locked[whole.index(mark) + place] |= 1
    put(tmp_path, {"damaged.zip": whole.replace(b"name", b"nama"), "locked.zip": bytes(locked)})
    with look(tmp_path) as found:
        bad, secret = found.entries
        tells(tmp_path, "/damaged.zip/x.csv: is truncated or damaged (Bad CRC ... ): download it again", bad.read)
        tells(tmp_path, "/locked.zip/x.csv: is encrypted or has an unknown compression: unpack it", secret.read)
    odd = bytearray(zipped({"\xe9.csv": b"name\n"}, zipfile.ZIP_STORED))  # whole at its end alone
    odd[odd.index("\xe9".encode())] = 0xFF
    put(tmp_path, {"odd.zip": bytes(odd)})
    with look(tmp_path / "odd.zip") as found:
        assert "is truncated or damaged" in refusal(found.entries[0].read)
