"""Fetch FER+ into an empty folder: the images from their Kaggle competition, the votes from microsoft/FERPlus."""

import hashlib
import http.client
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fer.data.sources import KAGGLE_FILES, VOTES_CSV, find_ferplus, find_votes
from fer.errors import UserError, disk_error

TIMEOUT = 30  # seconds without an answer


def complete(folder: Path, competition: str, votes_url: str, votes_sha256: str) -> None:
    """Download into `folder` what FER+ lacks there: images and votes when it is empty, votes beside Kaggle's images.

    Empty means nothing but README.md, hidden files and fer2013new.csv. Anything else is left alone, as is a path that
    is no folder: reading it says what is wrong. Raises UserError where credentials, package, connection or permission
    are missing; no file is ever half-written.
    """
    if not folder.is_dir():
        return
    found = find_ferplus(folder)
    if found is None and _is_empty(folder):
        found = _fetch_images(folder, competition)
    if found is not None and found.is_file() and find_votes(found, folder) is None:
        fetch_votes(folder / VOTES_CSV, votes_url, votes_sha256)


def fetch_votes(target: Path, url: str, sha256: str) -> None:
    """Download the votes to `target`; raises UserError when they cannot be had or are not the expected bytes."""
    by_hand = f"or put {VOTES_CSV} of the microsoft/FERPlus repository at {target}"
    if not url.startswith(("https://", "http://")):
        raise UserError(f"data.votes_url: must start with https:// or http://, got '{url}': correct it {by_hand}")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            content = answer.read()
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise UserError(f"data.votes_url: {url} cannot be fetched ({error}): check the connection {by_hand}") from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise UserError(
            f"data.votes_url: {url} has sha256 {digest} instead of {sha256}, nothing was kept: "
            f"correct data.votes_url or data.votes_sha256 {by_hand}"
        )
    with _whole(target) as partial:
        partial.write_bytes(content)


def has_credentials() -> bool:
    """Whether a Kaggle API token is set, in one of the places where kagglehub looks for it."""
    home = Path.home() / ".kaggle"
    legacy = Path(os.environ.get("KAGGLE_CONFIG_DIR", home)) / "kaggle.json"
    files = (home / "access_token", home / "access_token.txt", legacy)
    names = (("KAGGLE_API_TOKEN",), ("KAGGLE_USERNAME", "KAGGLE_KEY"))
    return any(all(map(os.environ.get, group)) for group in names) or any(file.is_file() for file in files)


def _is_empty(folder: Path) -> bool:
    names = {child.name for child in folder.iterdir()}
    return all(name.startswith(".") or name in ("README.md", VOTES_CSV) for name in names)


def _fetch_images(folder: Path, competition: str) -> Path:
    """Download the competition's files and copy the one with the images into `folder`."""
    by_hand = f"or put {' or '.join(KAGGLE_FILES)} and {VOTES_CSV} into {folder} by hand"
    page = f"https://www.kaggle.com/competitions/{competition}"
    if not has_credentials():
        raise UserError(
            f"{folder}: holds no data set and no Kaggle credentials are set: accept the rules at {page}/rules, create "
            f"an API token at https://www.kaggle.com/settings and set KAGGLE_API_TOKEN, {by_hand}"
        )
    try:
        import kagglehub
    except ModuleNotFoundError:
        raise UserError(f"{folder}: holds no data set: `pip install kagglehub` to download it, {by_hand}") from None
    try:
        downloaded = Path(kagglehub.competition_download(competition))
    except Exception as error:  # noqa: BLE001  kagglehub raises its own, requests' and built-in ones
        raise _refused(error, folder, page, by_hand) from None
    found = find_ferplus(downloaded)
    if found is None or found.is_dir():
        raise UserError(
            f"{page}: holds none of {', '.join(KAGGLE_FILES)}: "
            f"correct data.kaggle_competition in params.yaml, {by_hand}"
        )
    with _whole(folder / found.name) as partial:
        shutil.copyfile(found, partial)
    return folder / found.name


def _refused(error: Exception, folder: Path, page: str, by_hand: str) -> UserError:
    """What to do about a failed download. The error's own text stays out: it may hold a signed address."""
    if isinstance(error, OSError) and (full := disk_error(error, folder)):
        return full
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = f"{type(error).__name__} {status}" if status else type(error).__name__
    if status == 401 or reason == "UnauthenticatedError":
        remedy = "create a new API token at https://www.kaggle.com/settings and set KAGGLE_API_TOKEN"
    elif status == 403:
        remedy = f"accept the competition's rules at {page}/rules"
    elif status == 404:
        remedy = "correct data.kaggle_competition in params.yaml"
    else:
        remedy = "check the connection and run the command again"
    return UserError(f"{page}: the download failed ({reason}): {remedy}, {by_hand}")


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A hidden name to write to, that becomes `target` when the block ends and vanishes when it fails."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
