"""What lies at a data set's path: the files of a folder and of archives in it, without what is hidden or foreign.

A file is known by its bytes, not by the end of its name. Nothing is written beside the user's files.
"""

import bz2
import gzip
import lzma
import os
import posixpath
import re
import shutil
import stat
import tarfile
import tempfile
import unicodedata
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Any

from fer.errors import UserError, disk_error

LINKS = 40  # that are followed one after another, as in Linux
HEAD = 4096  # bytes that tell what a file is
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".pgm", ".ppm")
PICTURE_MARKS = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*")
# left by macOS, Windows and network disks; names that begin with a dot are left out as well
FOREIGN = {
    "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "@eadir",
    "lost+found", "icon\r", "__pycache__",
}  # fmt: skip
UNFINISHED = (".partial", ".part", ".crdownload", ".download")
HIDDEN = "hidden, half downloaded, or left by the operating system"

CONTROL = re.compile("[\x00-\x1f\x7f]")  # a line break or a tab, with which a name cannot stand in a table
LINKED = (
    "is a link to a folder, in which DVC would see no change: put the folder there, or name the path of its own in "
    "params.yaml"
)
_PACKED: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".rar", ".7z")
_UNREAD = {  # first bytes -> what the file is, and the remedy
    b"Rar!": "is a RAR archive, which is not read: unpack it and delete it",
    b"7z\xbc\xaf": "is a 7z archive, which is not read: unpack it and delete it",
}  # fmt: skip
_MARKS = {
    **_UNREAD,
    b"version https://git-lfs": "is a git-lfs pointer, not the file: run `git lfs pull` in the clone it comes from",
    b"/annex/objects": "is a git-annex pointer, not the file: run `git annex get` in the clone it comes from",
    b"\xff\xfe": "is UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "is UTF-16 text: save it as UTF-8",
}  # fmt: skip
DOCUMENT = {"[Content_Types].xml", "mimetype"}  # files that make a zip a document of Office, an e-book ...
Member = tuple[str, int, Callable[[], IO[bytes]]]  # of an archive: name, size, how it is opened
_DAMAGED = (
    OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, RuntimeError,
    UnicodeError,  # that of a zip with a name that is not UTF-8 and should be
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A file in a folder or an archive."""

    root: Path  # the path in params.yaml, or its folder if it is a file
    name: str  # relative to root, through archives: fer.zip/fer2013/fer2013.csv
    place: str  # relative to root, were the archives unpacked: fer2013/fer2013.csv
    size: int  # bytes
    source: Callable[[], IO[bytes]] = field(repr=False, compare=False)

    def __str__(self) -> str:
        return printable(os.path.join(self.root, self.name))

    @property
    def base(self) -> str:
        """The file name alone."""
        return self.place.rpartition("/")[2]

    @property
    def folder(self) -> str:
        """The folders above it, from `place`; empty at the top."""
        return self.place.rpartition("/")[0]

    @property
    def hidden_archive(self) -> str:
        """The name, without suffix, of the archive it lies in, where `place` does not show it; else empty."""
        shown, there = self.place.split("/"), self.name.split("/")
        if len(shown) == len(there):
            return ""
        return _stem(next((part for part, other in zip(there, shown) if part != other), there[-1]))

    @property
    def is_picture(self) -> bool:
        """Whether its name or, with another name, its first bytes say so."""
        return self.base.lower().endswith(PICTURES) or self.head.startswith(PICTURE_MARKS)

    @contextmanager
    def opened(self) -> Iterator[IO[bytes]]:
        """Its bytes. Raises UserError where they are damaged, encrypted or not readable, also while they are read."""
        try:
            with self.source() as stream:
                yield stream
        except _DAMAGED as error:
            raise UserError(f"{self}: {damage(error)}") from None

    def read(self) -> bytes:
        """All of its bytes. Raises as `opened`."""
        with self.opened() as stream:
            return stream.read()

    @cached_property
    def head(self) -> bytes:
        """Its first bytes; empty if they cannot be read."""
        try:
            with self.source() as stream:
                return stream.read(HEAD)
        except _DAMAGED:
            return b""


class Found:
    """The files of `path`, sorted by name, and what was left out with the reason."""

    def __init__(self, path: Path):
        self.path = path
        self.root = path if path.is_dir() else path.parent
        self.entries: list[Entry] = []
        self.left_out: dict[str, list[str]] = defaultdict(list)  # reason -> names
        self.useless: dict[str, str] = {}  # path of a file that cannot be read -> what it is, and the remedy
        self.open_files = ExitStack()

    def tables(self) -> list[Entry]:
        """The files that may be csv or other text, but no pointers or pages instead of a file."""
        others = [entry for entry in self.entries if not entry.is_picture]
        return [entry for entry in others if _is_text(entry.head) and what_it_is(entry.head) is None]

    def pictures(self) -> list[Entry]:
        """The files whose names are those of pictures."""
        return [entry for entry in self.entries if entry.is_picture]

    def nothing(self, wanted: str) -> UserError:
        """The error for a data set that is not there: the first useless file, if any, or else what was `wanted`."""
        name, reason = next(iter(self.useless.items()), (str(self.path), wanted))
        return UserError(f"{name}: {reason}")

    def refuse_damaged(self) -> None:
        """Raise UserError for the first archive that should have been read and cannot be.

        One of RAR or 7z is none of these: people unpack it and leave it there.
        """
        for name, reason in self.useless.items():
            if name.lower().endswith(ARCHIVES) and reason not in _UNREAD.values():
                raise UserError(f"{name}: {reason}, or delete it")


@contextmanager
def look(path: Path) -> Iterator[Found]:
    """What is in `path`, a folder or a file. Raises UserError if it does not exist or a folder cannot be read."""
    check_path(path)
    found = Found(path)
    with found.open_files:
        files = list(_walk(found, str(path), "", ())) if path.is_dir() else [path.name]
        plain: dict[str, int] = {}
        packed = []
        for name in files:
            entry = _plain(found, name)
            if fault := _fault(name):
                if entry.is_picture or name.lower().endswith((".csv", ".parquet", *ARCHIVES)):
                    raise UserError(f"{entry}: its name {fault}: rename it")
                found.left_out[f"a name that {fault}"].append(printable(name))
                continue
            head = b"" if entry.is_picture else entry.head
            if _is_archive(head):
                packed.append(entry)
                continue
            plain[name] = entry.size
            _judge(found, entry)
            if head.startswith(tuple(_UNREAD)):
                found.left_out["an archive that is not read"].append(name)
            else:
                found.entries.append(entry)
        for entry in packed:
            found.entries += _unpacked(found, entry, plain)
        found.entries.sort(key=lambda entry: entry.name)
        yield found


def check_path(path: Path) -> None:
    """Raise UserError for the path of a data set that does not exist."""
    if str(path).startswith("~") and not path.exists():
        raise UserError(f"params.yaml: data: '{path}': ~ is not expanded: write {path.expanduser()}")
    if not path.exists():
        raise UserError(f"{path}: not found: correct the path under data in params.yaml")


def beside(found: Found) -> Iterator[Entry]:
    """The other files in the folder of a path that is a file."""
    if not found.path.is_dir():
        for child in sorted(found.root.iterdir()):
            if child.is_file() and child != found.path and is_own(child.name):
                yield _plain(found, child.name)


def one_of(
    candidates: list[list[Entry]], what: str, remedy: str = ", or give the path of the one to read in params.yaml"
) -> list[Entry]:
    """The only candidate, each being some files, or the first if all hold the same bytes.

    Raises UserError, which names them with their number of files, if they differ.
    """
    first, *others = candidates
    if all(_same(first, other) for other in others):
        return first
    if any(len(files) > 1 for files in candidates):
        named = [f"{_folder(files)} ({len(files)} file{'s' * (len(files) > 1)})" for files in candidates]
    else:
        named = [printable(files[0].name) for files in candidates]
    raise UserError(f"{first[0].root}: holds several {what}: {', '.join(named)}: keep one of them there{remedy}")


def damage(error: BaseException) -> str:
    """What is wrong with a file that raised `error`, and the remedy."""
    if isinstance(error, RuntimeError):  # zipfile raises it for encryption and unknown compression
        return "is encrypted or has an unknown compression: unpack it by hand"
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read ({error.strerror}): correct its permissions or replace it"
    return f"is truncated or damaged ({error}): download it again"


def what_it_is(head: bytes) -> str | None:
    """For a file that is no data, what its first bytes say, with the remedy."""
    if not head:
        return "is empty: download it again"
    start = head.lstrip()[:200].lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "is a web page, not the file: sign in there and download it again"
    return next((text for mark, text in _MARKS.items() if head.startswith(mark)), None)


def printable(name: str) -> str:
    """`name` with what is no UTF-8 written as escapes, so that it can be printed and stored."""
    return name.encode("utf-8", "backslashreplace").decode()


def joined(name: str) -> str:
    """`name` with letters and their accents joined, as some systems write them and others do not."""
    return unicodedata.normalize("NFC", name)


def _walk(found: Found, folder: str, prefix: str, above: tuple[str, ...]) -> Iterator[str]:
    """Names of all files, relative to the first folder, in order; links to files are followed.

    Raises UserError for a link to a folder, but to one above it, which is left out as DVC does it.
    """
    try:
        children = sorted(os.scandir(folder), key=lambda child: child.name)
    except OSError as error:
        raise UserError(f"{printable(folder)}: {damage(error)}") from None
    here = (*above, os.path.realpath(folder))
    for child in children:
        name = prefix + child.name
        if not is_own(child.name):
            found.left_out[HIDDEN].append(printable(name))
        elif not os.path.exists(child.path):
            found.left_out["a link to nothing"].append(printable(name))
        elif child.is_dir():
            if os.path.realpath(child.path) in here:
                found.left_out["a link to a folder above it"].append(printable(name))
            elif child.is_symlink():
                raise UserError(f"{printable(child.path)}: {LINKED}")
            else:
                yield from _walk(found, child.path, f"{name}/", here)
        elif stat.S_ISREG(child.stat().st_mode):
            yield name
        else:
            found.left_out["no file"].append(printable(name))


def is_own(name: str) -> bool:
    """Whether a file or folder of this name is the user's: not hidden, not foreign, not half downloaded."""
    return not (name.startswith((".", "~$")) or name.lower() in FOREIGN or name.lower().endswith(UNFINISHED))


def _fault(name: str) -> str:
    """Why a file of this name cannot stand in a table; empty if it can."""
    if name != printable(name):
        return "is not UTF-8"
    return "has a control character" if CONTROL.search(name) else ""


def _plain(found: Found, name: str) -> Entry:
    path = os.path.join(found.root, name)
    return Entry(found.root, name, name, os.path.getsize(path), lambda: open(path, "rb"))


def _judge(found: Found, entry: Entry) -> None:
    """Note a file that is something else than its name promises."""
    suffix = PurePosixPath(entry.base.lower()).suffix
    if entry.is_picture or suffix not in (".csv", ".parquet", ".txt", *ARCHIVES):
        return
    reason = what_it_is(entry.head)
    if reason is None and suffix in ARCHIVES and not _is_text(entry.head):
        reason = "is no archive, or damaged: download it again"
    if reason is not None:
        found.useless[str(entry)] = reason


def _is_text(head: bytes) -> bool:
    return bool(head) and b"\0" not in head


def _is_archive(head: bytes) -> bool:
    return head.startswith((b"PK\x03\x04", b"PK\x05\x06", *_PACKED)) or _is_tar(head)


def _is_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar"


def _unpacked(found: Found, archive: Entry, plain: dict[str, int]) -> list[Entry]:
    """The files in an archive; none if they all lie beside it as well, or if it is damaged."""
    try:
        members = _members(found, archive)
    except _DAMAGED as error:
        if isinstance(error, OSError) and disk_error(error, archive.name):
            raise  # no room to unpack it
        found.useless[str(archive)] = damage(error)
        if not archive.base.lower().endswith(ARCHIVES):  # others are refused
            found.left_out["a damaged archive under another name"].append(archive.name)
        return []
    if not members:
        found.left_out["an archive without files"].append(archive.name)
    above = archive.place[: -len(archive.base)]
    stem = _stem(archive.base)
    inner = {name: size for name, size, _ in members}
    for base in (above, f"{above}{stem}/"):
        if inner and all(plain.get(base + name) == size for name, size in inner.items()):
            found.left_out["an archive that is unpacked beside it"].append(printable(archive.name))
            return []
    if not DOCUMENT.isdisjoint(inner):
        return [archive]
    tops = {name.partition("/")[0] for name in inner}
    base = above if len(tops) == 1 else f"{above}{stem}/"
    return [
        Entry(archive.root, f"{archive.name}/{name}", base + name, size, source) for name, size, source in members
    ]  # fmt: skip


def _stem(name: str) -> str:
    """The name of an archive without .zip, .tar.gz ..."""
    while name.lower().endswith(ARCHIVES):
        name = name.rpartition(".")[0]
    return name


def _members(found: Found, archive: Entry) -> list[Member]:
    """Name, size and source of the files in an archive, without the hidden and foreign; the last of a name counts."""
    path = os.path.join(archive.root, archive.name)
    if archive.head.startswith(b"PK"):
        listed = _zip_members(found, path)
    elif _is_tar(archive.head):
        listed = _tar_members(found, archive, found.open_files.enter_context(tarfile.open(path, "r:")))  # noqa: SIM115
    else:
        listed = _packed_members(found, archive, path)
    kept: dict[str, Member] = {}
    for name, size, source in listed:
        parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
        clean = "/".join(parts)
        if not all(map(is_own, parts)):
            found.left_out[HIDDEN].append(printable(f"{archive.name}/{clean}"))
            continue
        if fault := _fault(clean):
            raise UserError(f"{archive}/{printable(clean)}: its name {fault}: unpack the archive and rename it")
        if clean in kept:
            found.left_out["replaced by a later file of that name in the archive"].append(f"{archive.name}/{clean}")
        kept[clean] = (clean, size, source)
    return list(kept.values())


def _zip_members(found: Found, path: str) -> Iterator[Member]:
    archive = found.open_files.enter_context(zipfile.ZipFile(path))
    for info in archive.infolist():
        name = info.filename
        if not info.flag_bits & 0x800:  # the mark of UTF-8, which macOS leaves out
            with suppress(UnicodeError):
                name = name.encode("cp437").decode()
        if not name.endswith(("/", "\\")):
            yield name, info.file_size, lambda info=info: archive.open(info)  # type: ignore[misc]


def _tar_members(found: Found, archive: Entry, tar: tarfile.TarFile) -> Iterator[Member]:
    """Its files and, under their own names, the links to files in it."""
    lies: dict[str, tarfile.TarInfo] = {}  # what lies at a path
    named = []
    for member in _listed(tar):
        path = posixpath.normpath(member.name)
        lies[path] = lies.get(posixpath.normpath(member.linkname), member) if member.islnk() else member
        named.append((member.name, lies[path]))
    for name, member in named:
        file = _followed(name, member, lies)
        if file.isfile():
            yield name, file.size, lambda file=file: tar.extractfile(file)  # type: ignore[misc]
        elif not member.isdir():
            is_link = member.issym() or member.islnk()
            reason = "a link to no file in the archive" if is_link else "no file"
            found.left_out[reason].append(printable(f"{archive.name}/{posixpath.normpath(name)}"))


def _followed(name: str, member: tarfile.TarInfo, lies: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo:
    """What a member of a tar leads to; a link if that is not in it, or the links go round in a circle."""
    path = posixpath.normpath(name)
    for _ in range(LINKS):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(path), member.linkname))
        if not member.issym() or path not in lies:
            break
        member = lies[path]
    return member


def _listed(tar: tarfile.TarFile) -> list[tarfile.TarInfo]:
    """All that is in a tar. Raises TarError where it is cut or damaged; tarfile takes what is no header for the end."""
    members = tar.getmembers()
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("its end is missing")
    return members


def _packed_members(found: Found, archive: Entry, path: str) -> Iterator[Member]:
    """Of a compressed tar, or the one file that is compressed; it is unpacked once, to a temporary file."""
    unpack = next(unpack for mark, unpack in _PACKED.items() if archive.head.startswith(mark))
    whole = found.open_files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
    with unpack(path, "rb") as stream:
        shutil.copyfileobj(stream, whole, 1 << 20)
    size = whole.tell()
    whole.seek(0)
    start = whole.read(HEAD)
    whole.seek(0)
    if _is_tar(start):
        return _tar_members(found, archive, found.open_files.enter_context(tarfile.open(fileobj=whole, mode="r:")))
    whole.close()
    return iter([(archive.base.rpartition(".")[0] or archive.base, size, lambda: unpack(path, "rb"))])


def _same(one: list[Entry], other: list[Entry]) -> bool:
    """Whether two candidates hold the same bytes, file by file."""
    pairs = list(zip(_by_place(one), _by_place(other)))
    if len(one) != len(other) or any(a.size != b.size for a, b in pairs):
        return False
    return all(_equal(a, b) for a, b in pairs)


def _by_place(files: list[Entry]) -> list[Entry]:
    return sorted(files, key=lambda entry: (entry.base, entry.place))


def _equal(one: Entry, other: Entry) -> bool:
    with one.opened() as a, other.opened() as b:
        while True:
            part = a.read(1 << 20)
            if part != b.read(1 << 20):
                return False
            if not part:
                return True


def _folder(files: list[Entry]) -> str:
    """The one that holds all of them."""
    return printable(os.path.commonpath([entry.name.rpartition("/")[0] or "." for entry in files]))
