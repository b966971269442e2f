"""Download FER+ into an empty folder: the images from their Kaggle competition, the votes from microsoft/FERPlus."""

import hashlib
import http.client
import shutil
import urllib.error
import urllib.request
from pathlib import Path

from fer.data.sources import KAGGLE_FILES, VOTES_CSV, find_ferplus, find_votes
from fer.errors import UserError, disk_error
from fer.files import write_bytes

TIMEOUT = 30  # seconds without a response


def fill(folder: Path, competition: str, votes_url: str, votes_sha256: str) -> None:
    """Download the missing files of FER+ to `folder`: images and votes if it is empty, votes if it has Kaggle images.

    A folder with nothing but README.md, hidden files and fer2013new.csv counts as empty. Any other path is left alone;
    reading it later reports what is wrong. Raises UserError if a download fails; no file is left half-written.
    """
    if not folder.is_dir():
        return
    found = find_ferplus(folder)
    if found is None and _is_empty(folder):
        found = _fetch_images(folder, competition)
    if found is not None and found.is_file() and find_votes(found, folder) is None:
        fetch_votes(folder / VOTES_CSV, votes_url, votes_sha256)


def fetch_votes(target: Path, url: str, sha256: str) -> None:
    """Download the votes to `target`. Raises UserError if that fails or their SHA-256 is not `sha256`."""
    by_hand = f"or put {VOTES_CSV} of the microsoft/FERPlus repository at {target}"
    if not url.startswith(("https://", "http://")):
        raise UserError(f"data.votes_url: must start with https:// or http://, got '{url}': correct it {by_hand}")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            content = answer.read()
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise UserError(
            f"data.votes_url: {url} cannot be downloaded ({error}): check the connection {by_hand}"
        ) from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise UserError(
            f"data.votes_url: {url} has SHA-256 {digest} instead of {sha256} and was not kept: "
            f"correct data.votes_url or data.votes_sha256 {by_hand}"
        )
    write_bytes(target, content)


def _is_empty(folder: Path) -> bool:
    names = {child.name for child in folder.iterdir()}
    return all(name.startswith(".") or name in ("README.md", VOTES_CSV) for name in names)


def _fetch_images(folder: Path, competition: str) -> Path:
    """Download the files of the competition and copy the one with the images to `folder`."""
    page = f"https://www.kaggle.com/competitions/{competition}"
    try:
        import kagglehub

        found = find_ferplus(Path(kagglehub.competition_download(competition)))
    except Exception as error:  # noqa: BLE001  kagglehub raises its own errors, those of requests and built-in ones
        full = disk_error(error, folder) if isinstance(error, OSError) else None
        raise full or _refused(folder, page, _reason(error)) from None
    if found is None or found.is_dir():
        raise _refused(folder, page, f"it has none of {', '.join(KAGGLE_FILES)}")
    partial = folder / f".{found.name}.partial"
    try:
        shutil.copyfile(found, partial)
        return partial.replace(folder / found.name)
    finally:
        partial.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    """The kind of error without its text, which may contain a signed URL."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return f"{type(error).__name__} {status}" if status else type(error).__name__


def _refused(folder: Path, page: str, reason: str) -> UserError:
    return UserError(
        f"{folder}: contains no data set, and {page} could not be downloaded ({reason}): "
        f"accept the rules at {page}/rules, `pip install kagglehub`, set KAGGLE_API_TOKEN "
        "to a token of https://www.kaggle.com/settings and run the "
        f"command again, or put {' or '.join(KAGGLE_FILES)} and {VOTES_CSV} into {folder} by hand"
    )
