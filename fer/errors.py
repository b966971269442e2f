"""The exceptions of the project: UserError for what a user can fix, OutOfMemory for a batch that is too large."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # where str.splitlines splits, and what moves the cursor


class UserError(Exception):
    """One line per fault, with the key or file and the remedy. Commands print the lines and exit with status 2.

    Each of `lines` stays one line: a line break or other control character in it, as of a file's name, is escaped.
    """

    def __init__(self, *lines: str):
        super().__init__(*lines)
        self.lines = tuple(CONTROL.sub(lambda found: repr(found[0])[1:-1], line) for line in lines)

    def __str__(self) -> str:
        return "\n".join(self.lines)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def one_line(what: str, remedy: str) -> Iterator[None]:
    """Turn whatever is raised inside into a UserError of one line, unless it is one.

    For frameworks at their start: they let through what their drivers, parsers of addresses and the like raise.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {first_line(error)}; {remedy}") from error


class OutOfMemory(Exception):
    """A batch does not fit into the GPU's memory; a smaller one may."""


SECRET = re.compile(r"([?&][^=&]*(?:pass|pwd|token|secret|key|odbc_connect)[^=&]*)=[^&]*", re.IGNORECASE)
DISK_FAULTS = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is exceeded: free some space",
    errno.EROFS: "the file system is read-only: choose another place",
    errno.EACCES: "permission denied: change the owner or mode, or choose another place",
    errno.EPERM: "permission denied: change the owner or mode, or choose another place",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
    errno.EFBIG: "the file would exceed the size limit: raise it (ulimit -f)",
}


STRANGE = {
    errno.ENOTDIR: "a file is where a folder should be",
    errno.EEXIST: "a file is where a folder should be",
    errno.EISDIR: "a folder is where a file should be",
    errno.ELOOP: "its symbolic links go round in a circle",
}


def disk_error(error: OSError, where: str | os.PathLike) -> UserError | None:
    """The UserError for a full, read-only or forbidden disk, or for the wrong kind of file; None for other errors."""
    place = error.filename2 or error.filename or where  # of a file that cannot be copied or renamed, its new name
    if error.errno in STRANGE:
        return UserError(f"cannot use {place}: {STRANGE[error.errno]}; move it away")
    if error.errno not in DISK_FAULTS:
        return None
    return UserError(f"cannot write {place}: {DISK_FAULTS[error.errno]} and run the command again")


def without_password(uri: str) -> str:
    """`uri` with *** for its passwords, to be shown or stored; of a web address without the whole user."""
    if uri.startswith("sqlite"):
        return uri
    if "://" not in uri:  # a slip of the pen
        return re.sub(r"^(\w+:/+)?.*@", r"\1***@", uri)
    secret = r"(://).*@" if uri.startswith("http") else r"(://[^:@/]*:).*@"
    return SECRET.sub(r"\1=***", re.sub(secret, r"\1***@", uri))
