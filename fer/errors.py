"""The one exception for mistakes that a user can mend."""

import errno
import os


class UserError(Exception):
    """Names the key or file at fault and the remedy, in a line for each fault; commands print it, exit status 2."""

    def __init__(self, *lines: str):
        super().__init__(*lines)
        self.lines = tuple(line for text in lines for line in text.splitlines())

    def __str__(self) -> str:
        return "\n".join(self.lines)


DISK_FAULTS = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EROFS: "the file system is read-only: choose a place that can be written",
    errno.EACCES: "permission denied: change the owner or mode, or choose another place",
    errno.EPERM: "permission denied: change the owner or mode, or choose another place",
    errno.EFBIG: "the file would exceed the size limit: raise it (ulimit -f)",
}


def disk_error(error: OSError, where: str | os.PathLike) -> UserError | None:
    """The user's version of a full, read-only or forbidden disk; None when `error` is something else."""
    if error.errno not in DISK_FAULTS:
        return None
    return UserError(f"cannot write {error.filename or where}: {DISK_FAULTS[error.errno]} and run the command again")
