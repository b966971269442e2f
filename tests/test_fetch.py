"""Filling an empty folder, with a local web server for GitHub and a fake module for kagglehub."""

import errno
import hashlib
import http.server
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fer.data.found import look
from fer.errors import UserError
from pipelines.stages.fetch import fetch_votes
from pipelines.stages.fetch import fill as fill_found

VOTES = b"Usage,Image name,neutral\n" * 1000
SHA256 = hashlib.sha256(VOTES).hexdigest()
COMPETITION = "faces-challenge"
PAGE = "https://www.kaggle.com/competitions/faces-challenge"
SECRET = "f1a2b3c4d5"
NOWHERE = "http://127.0.0.1:9/votes.csv"


IMAGES = "emotion,pixels,Usage\n"


def fill(path: Path, *arguments: object) -> bool:
    with look(path) as found:
        return fill_found(found, *arguments)  # type: ignore[arg-type]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        if self.path == "/missing.csv":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(VOTES)))
        self.end_headers()
        self.wfile.write(VOTES[:100] if self.path == "/cut.csv" else VOTES)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[http.server.HTTPServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def url(server: http.server.HTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As data/external is in a fresh clone."""
    (tmp_path / "external").mkdir()
    (tmp_path / "external" / "README.md").write_text("Put the files here.")
    (tmp_path / "external" / ".gitkeep").write_text("")
    return tmp_path / "external"


@pytest.fixture
def kagglehub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A kagglehub that serves three files; returns the handles of all requests."""
    monkeypatch.setenv("KAGGLE_API_TOKEN", SECRET)
    served = tmp_path / "cache"
    served.mkdir()
    for name in ("fer2013.tar.gz", "icml_face_data.csv", "example_submission.csv"):
        (served / name).write_text(f"{IMAGES}{name}")
    asked = []

    def competition_download(handle: str) -> str:
        asked.append(handle)
        return str(served)

    install(monkeypatch, competition_download)
    return asked


def install(monkeypatch: pytest.MonkeyPatch, competition_download: Callable[[str], str]) -> None:
    module = types.ModuleType("kagglehub")
    module.competition_download = competition_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kagglehub", module)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def refused(function: Callable[..., None], *arguments: object) -> str:
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    assert SECRET not in str(error.value)
    return str(error.value)


def test_an_empty_folder_is_filled_and_then_left_alone(folder: Path, url: str, server, kagglehub: list[str]) -> None:
    for fetched in (True, False):
        assert fill(folder, COMPETITION, f"{url}/votes.csv", SHA256) == fetched
        assert names(folder) == [".gitkeep", "README.md", "fer2013.tar.gz", "fer2013new.csv"]
    assert (folder / "fer2013.tar.gz").read_text() == f"{IMAGES}fer2013.tar.gz"
    assert (folder / "fer2013new.csv").read_bytes() == VOTES
    assert (kagglehub, server.asked) == ([COMPETITION], ["/votes.csv"])


def test_only_what_is_missing_and_wanted_is_fetched(folder: Path, url: str, server, kagglehub: list[str]) -> None:
    assert fill(folder, COMPETITION, NOWHERE, SHA256, False)  # a set with labels of its own
    assert names(folder) == [".gitkeep", "README.md", "fer2013.tar.gz"]
    assert fill(folder, COMPETITION, f"{url}/votes.csv", SHA256)
    (folder / "fer2013.tar.gz").unlink()
    assert fill(folder, COMPETITION, NOWHERE, SHA256)
    assert names(folder) == [".gitkeep", "README.md", "fer2013.tar.gz", "fer2013new.csv"]
    assert (kagglehub, server.asked) == ([COMPETITION] * 2, ["/votes.csv"])


@pytest.mark.parametrize("content", [["notes.txt"], ["FER2013Train/label.csv"], ["fer2013.csv", "FER2013Train/a.png"]])
def test_a_folder_with_something_else_is_left_alone(content: list[str], folder: Path, kagglehub: list[str]) -> None:
    for name in content:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(IMAGES if name == "fer2013.csv" else "")
    before = names(folder)
    for path in (folder, folder / "README.md"):
        assert not fill(path, COMPETITION, NOWHERE, SHA256)
    assert (names(folder), kagglehub) == (before, [])


def told(folder: Path, reason: str) -> str:
    return (
        f"{folder}: contains no data set, and {PAGE} could not be downloaded ({reason}): "
        f"accept the rules at {PAGE}/rules, `pip install kagglehub`, set KAGGLE_API_TOKEN "
        "to a token of https://www.kaggle.com/settings and run the "
        "command again, or put fer2013.csv or fer2013.tar.gz or icml_face_data.csv and fer2013new.csv into "
        f"{folder} by hand"
    )


class HTTPError(OSError):  # requests' is one too
    def __init__(self, status: int) -> None:
        super().__init__(f"no {status} for https://storage?signature={SECRET}")
        self.response = types.SimpleNamespace(status_code=status)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (HTTPError(403), "HTTPError 403"),
        (ConnectionError(SECRET), "ConnectionError"),
        (ModuleNotFoundError("No module named 'kagglehub'"), "ModuleNotFoundError"),
        (OSError(errno.ENOSPC, "No space left on device", "/cache/x"), None),
    ],
    ids=repr,
)
def test_a_download_that_fails(
    error: Exception, reason: str | None, folder: Path, kagglehub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def competition_download(handle: str) -> str:
        raise error

    install(monkeypatch, competition_download)
    full = "cannot write /cache/x: the disk is full: free some space and run the command again"
    assert refused(fill, folder, COMPETITION, NOWHERE, SHA256) == (told(folder, reason) if reason else full)
    assert names(folder) == [".gitkeep", "README.md"]


def test_a_copy_that_breaks_off_leaves_nothing(
    folder: Path, kagglehub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def copyfile(source: Path, target: Path) -> None:
        assert target.name.startswith(".")  # hidden, so that a killed copy does not count as content
        target.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", copyfile)
    with pytest.raises(OSError, match="No space left"):
        fill(folder, COMPETITION, NOWHERE, SHA256)
    assert names(folder) == [".gitkeep", "README.md"]


def test_a_competition_without_the_images(folder: Path, kagglehub: list[str], tmp_path: Path) -> None:
    for name in ("fer2013.tar.gz", "icml_face_data.csv"):
        (tmp_path / "cache" / name).unlink()
    message = refused(fill, folder, COMPETITION, NOWHERE, SHA256)
    assert message == told(folder, "it has none of fer2013.csv, fer2013.tar.gz, icml_face_data.csv")


@pytest.mark.parametrize(
    ("page", "sha256", "fault"),
    [
        ("{url}/votes.csv", "0" * 64, f"has SHA-256 {SHA256} instead of {'0' * 64} and was not kept: correct "
         "data.votes_url or data.votes_sha256"),
        ("{url}/missing.csv", SHA256, "cannot be downloaded (HTTP Error 404: Not Found): check the connection"),
        ("{url}/cut.csv", SHA256,
         "cannot be downloaded (IncompleteRead(100 bytes read, 24900 more expected)): check the connection"),
        (NOWHERE, SHA256,
         "cannot be downloaded (<urlopen error [Errno 111] Connection refused>): check the connection"),
        ("http://[", SHA256, "cannot be downloaded (Invalid IPv6 URL): check the connection"),
    ],
)  # fmt: skip
def test_votes_that_do_not_come(page: str, sha256: str, fault: str, folder: Path, url: str) -> None:
    page, target = page.format(url=url), folder / "fer2013new.csv"
    by_hand = f"or put fer2013new.csv of the microsoft/FERPlus repository at {target}"
    assert refused(fetch_votes, target, page, sha256) == f"data.votes_url: {page} {fault} {by_hand}"
    assert names(folder) == [".gitkeep", "README.md"]


def test_no_password_of_the_address_is_shown(folder: Path) -> None:
    for address in ("http://me:secret@127.0.0.1/x", "http://127.0.0.1:9/x?token=secret", "ftp://me:secret@host/x"):
        message = refused(fetch_votes, folder / "fer2013new.csv", address, SHA256)
        assert message.startswith("data.votes_url: ")
        assert "***" in message
        assert "secret" not in message
    message = refused(fetch_votes, folder / "fer2013new.csv", f"file://{folder}/README.md", SHA256)
    assert message.startswith(f"data.votes_url: must start with https:// or http://, got 'file://{folder}/README.md'")
