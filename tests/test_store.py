"""What the address of the tracking store can be, and that no password in it is shown."""

import http.server
import re
import socket
import sqlite3
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import free_port

from fer.errors import UserError, without_password
from pipelines.store import check_answers

SECRET = "s3cr3t"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        (f"http://{SECRET}@host/x", "http://***@host/x"),
        (f"https://me:{SECRET}@host", "https://***@host"),
        (f"https://me:a@{SECRET}/b@host", "https://***@host"),
        (f"https://host/x?token={SECRET}&page=2", "https://host/x?token=***&page=2"),
        ("postgresql://me@host:1/x", "postgresql://me@host:1/x"),
        (f"postgresql+psycopg://me:{SECRET}@host/x", "postgresql+psycopg://me:***@host/x"),
        (f"postgresql://me:{SECRET}/a?b#c@d@host/x", "postgresql://me:***@host/x"),
        (f"postgresql://:{SECRET}@host/x", "postgresql://:***@host/x"),
        (
            f"postgresql://host/x?user=me&password={SECRET}&sslPassword={SECRET}&application_name=y",
            "postgresql://host/x?user=me&password=***&sslPassword=***&application_name=y",
        ),
        ("sqlite:////home/me:x@work/mlflow.db", "sqlite:////home/me:x@work/mlflow.db"),
    ],
)
def test_no_password_is_shown(uri: str, shown: str) -> None:
    assert without_password(uri) == shown


class Other(http.server.BaseHTTPRequestHandler):
    """A server of something else."""

    def do_GET(self) -> None:
        self.send_error(500)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def other() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def silent() -> Iterator[int]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening.getsockname()[1]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://127.0.0.1:FREE", r"no server answers at http://127.0.0.1:\d+ \(.*refused.*\); start it \(`fer ui`"),
        ("http://127.0.0.1:SILENT", r"no server answers at http://127.0.0.1:\d+ \(.*timed out.*\); start it"),
        ("http://127.0.0.1:OTHER", r"http://127.0.0.1:\d+ answers 500 Internal Server Error; start it"),
        (f"http://me:{SECRET}@127.0.0.1:OTHER", r"http://\*\*\*@.*: leave user and password out .*MLFLOW_TRACKING_USE"),
        (f"http://{SECRET}@127.0.0.1:OTHER", r"http://\*\*\*@.*: leave user and password out .*or MLFLOW_TRACKING_TOK"),
        ("http://[::1", r"no server answers at http://\[::1 \("),
        ("sqlite://", r"'sqlite://' is no tracking store; use sqlite:///FILE"),
        ("./mlruns", r"'./mlruns' is no tracking store; use sqlite:///FILE"),
        (f"oracle://me:{SECRET}@host/x", r"'oracle://me:\*\*\*@host/x' is no tracking store"),
        (
            "sqlite:////nowhere/mlflow.db",
            r"cannot write /nowhere/mlflow.db \(unable to open database file\); set MLFLOW_TRACKING_URI=sqlite:///data/",
        ),
        (
            f"postgresql://me:{SECRET}@127.0.0.1:x/y",
            r"postgresql://me:\*\*\*@127.0.0.1:x/y is no valid address; write",
        ),
        (f"postgresql+unheard://me:{SECRET}@host/x", r"postgresql\+unheard://me:\*\*\*@host/x is no valid address"),
    ],
)
def test_an_address_that_cannot_work_is_one_line(uri: str, message: str, other: int, silent: int) -> None:
    for name, port in (("FREE", free_port()), ("OTHER", other), ("SILENT", silent)):
        uri = uri.replace(name, str(port))
    with pytest.raises(UserError) as caught:
        check_answers(uri)
    (line,) = caught.value.lines
    assert re.match(f"tracking.uri: {message}", line), line
    assert SECRET not in line


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_a_missing_driver_is_named(driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, driver, None)
    with pytest.raises(UserError) as caught:
        check_answers(f"postgresql+{driver}://me:{SECRET}@127.0.0.1:{free_port()}/x")
    (line,) = caught.value.lines
    shown = f"postgresql+{driver}://me:***@127.0.0.1:"
    assert re.match(rf"tracking.uri: {re.escape(shown)}\d+/x needs the Python package {driver}, which is not", line)
    assert line.endswith("`pip install -c constraints.txt -e '.[postgres]'`")


@pytest.mark.parametrize("port", ["FREE", "SILENT", "OTHER"])
def test_a_port_without_postgresql_is_one_line(port: str, other: int, silent: int) -> None:
    pytest.importorskip("psycopg", reason="the extra `postgres` is not installed")
    number = {"FREE": free_port(), "SILENT": silent, "OTHER": other}[port]
    with pytest.raises(UserError) as caught:
        check_answers(f"postgresql+psycopg://me:{SECRET}@127.0.0.1:{number}/x")
    (line,) = caught.value.lines
    assert line.startswith(f"tracking.uri: no database answers at postgresql+psycopg://me:***@127.0.0.1:{number}/x (")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a database, for sure", r"mlflow.db is damaged \(file is not a database\); move it away: the same comma"),
        (None, r"mlflow.db is damaged \(database disk image is malformed\); move it away"),
    ],
)
def test_a_damaged_file_is_one_line(content: bytes | None, message: str, tmp_path: Path) -> None:
    """Random bytes; the first half of a store."""
    path = tmp_path / "mlflow.db"
    check_answers(f"sqlite:///{path}")
    if content is None:
        with sqlite3.connect(path) as store:
            store.execute("create table runs (name text)")
            store.executemany("insert into runs values (?)", [["x" * 1000]] * 100)
        store.close()
        content = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        check_answers(f"sqlite:///{path}")
    assert len(caught.value.lines) == 1
