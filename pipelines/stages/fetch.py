"""Download FER2013 or FER+ into an empty folder: images from their Kaggle competition, votes from microsoft/FERPlus."""

import hashlib
import http.client
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path

from fer.data.datasets import DATASETS
from fer.data.found import Found, look
from fer.data.readers.fer2013 import IMAGE_CSVS, pixel_tables
from fer.data.readers.ferplus import VOTES_CSV, look_for
from fer.errors import UserError, disk_error, without_password
from fer.files import write_bytes
from pipelines.data_sets import Data

TIMEOUT = 30  # seconds without a response
KAGGLE_FILES = (IMAGE_CSVS[0], "fer2013.tar.gz", IMAGE_CSVS[1])  # the first that exists is taken


def ensure(path: Path, data: Data) -> None:
    """Fill the folder of a data set that can be downloaded, if it is empty. Raises UserError as `fill` does."""
    missing = () if data.dataset == "sample" else DATASETS[data.dataset].download
    if not missing:
        return
    with look(path) as found:
        if fill(found, data.kaggle_competition, data.votes_url, data.votes_sha256, "votes" in missing):
            sys.stdout.write(f"{data.dataset}: downloaded to {path}\n")


def fill(found: Found, competition: str, votes_url: str, votes_sha256: str, votes: bool = True) -> bool:
    """Download what is missing to a folder: images if it is empty, and votes if it has rows of pixels without.

    A folder with nothing but README.md, fer2013new.csv and what `Found` leaves out counts as empty. Anything else is
    left alone; reading it later reports what is wrong. Returns whether something was downloaded. Raises UserError if
    a download fails; no file is left half-written.
    """
    folder = found.path
    if not folder.is_dir():
        return False
    empty = all(entry.name in ("README.md", VOTES_CSV) for entry in found.entries)
    if empty:
        _fetch_images(folder, competition)
    rows = empty or (bool(pixel_tables(found)) and not look_for(found).pictures)
    if not votes or not rows or any(entry.base.lower() == VOTES_CSV for entry in found.entries):
        return empty
    fetch_votes(folder / VOTES_CSV, votes_url, votes_sha256)
    return True


def fetch_votes(target: Path, url: str, sha256: str) -> None:
    """Download the votes to `target`. Raises UserError if that fails or their SHA-256 is not `sha256`."""
    by_hand = f"or put {VOTES_CSV} of the microsoft/FERPlus repository at {target}"
    shown = without_password(url)
    if not url.startswith(("https://", "http://")):
        raise UserError(f"data.votes_url: must start with https:// or http://, got '{shown}': correct it {by_hand}")
    if "@" in url.split("/")[2]:  # urllib would take the password for a port, and show it
        raise UserError(f"data.votes_url: {shown}: leave user and password out of the address, {by_hand}")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            content = answer.read()
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise UserError(
            f"data.votes_url: {shown} cannot be downloaded ({error}): check the connection {by_hand}"
        ) from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise UserError(
            f"data.votes_url: {shown} has SHA-256 {digest} instead of {sha256} and was not kept: "
            f"correct data.votes_url or data.votes_sha256 {by_hand}"
        )
    write_bytes(target, content)


def _fetch_images(folder: Path, competition: str) -> None:
    """Download the files of the competition and copy the one with the images to `folder`."""
    page = f"https://www.kaggle.com/competitions/{competition}"
    try:
        import kagglehub

        fetched = Path(kagglehub.competition_download(competition))
    except Exception as error:  # noqa: BLE001  kagglehub raises its own errors, those of requests and built-in ones
        full = disk_error(error, folder) if isinstance(error, OSError) else None
        raise full or _refused(folder, page, _reason(error)) from None
    images = next((file for name in KAGGLE_FILES for file in sorted(fetched.rglob(name)) if file.is_file()), None)
    if images is None:
        raise _refused(folder, page, f"it has none of {', '.join(KAGGLE_FILES)}")
    partial = folder / f".{images.name}.partial"
    try:
        shutil.copyfile(images, partial)
        partial.replace(folder / images.name)
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
