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
from conftest import free_port, refusal

from fer.errors import without_password
from pipelines.store import check_answers, is_missing

SECRET = "s3cr3t"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
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
        (f"mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3D{SECRET}", "mssql+pyodbc:///?odbc_connect=***"),
        (f"https:/me:{SECRET}@host", "https:/***@host"),
        (f"me:{SECRET}@host:5000", "***@host:5000"),
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
def ports() -> Iterator[dict[str, int]]:
    """FREE, of a server of something else, and of one that says nothing."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as other, socket.create_server(("", 0)) as silent:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        yield {"FREE": free_port(), "OTHER": other.server_port, "SILENT": silent.getsockname()[1]}
        other.shutdown()


ME = f"postgresql+psycopg://me:{SECRET}@127.0.0.1"
SHOWN = r"postgresql\+psycopg://me:\*\*\*@127.0.0.1:\d+/x"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://127.0.0.1:FREE", r"no server answers at http://127.0.0.1:\d+ \(.*refused.*\); start it \(`fer ui`"),
        ("http://127.0.0.1:SILENT", r"no server answers at http://127.0.0.1:\d+ \(.*timed out.*\); start it"),
        ("http://127.0.0.1:OTHER", r"http://127.0.0.1:\d+ answers 500 Internal Server Error; start it"),
        (f"http://me:{SECRET}@127.0.0.1:OTHER", r"http://\*\*\*@.*: leave user and password out .*MLFLOW_TRACKING_USE"),
        (f"http://{SECRET}@127.0.0.1:OTHER", r"http://\*\*\*@.*: leave user and password out .*or MLFLOW_TRACKING_TOK"),
        ("http://[::1", r"no server answers at http://\[::1 \("),
        ("http://localhost:abc", r"no server answers at http://localhost:abc \("),
        ("http://local host:5000", r"no server answers at http://local host:5000 \("),
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
        *((f"{ME}:{port}/x", f"no database answers at {SHOWN} \\(") for port in ("FREE", "SILENT", "OTHER")),
    ],
)
def test_an_address_that_cannot_work_is_one_line(uri: str, message: str, ports: dict[str, int]) -> None:
    if uri.startswith(ME):
        pytest.importorskip("psycopg", reason="the extra `postgres` is not installed")
    for name, port in ports.items():
        uri = uri.replace(name, str(port))
    line = refusal(check_answers, uri)
    assert re.match(f"tracking.uri: {message}", line), line
    assert SECRET not in line


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_a_missing_driver_is_named(driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, driver, None)
    line = refusal(check_answers, f"postgresql+{driver}://me:{SECRET}@127.0.0.1:9/x")
    shown = f"postgresql+{driver}://me:***@127.0.0.1:9/x"
    assert line.startswith(f"tracking.uri: {shown} needs the Python package {driver}, which is not")
    assert line.endswith("`pip install -c constraints.txt -e '.[postgres]'`")


def test_a_file_with_options(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db?timeout=60"
    assert is_missing(uri)
    check_answers(uri)
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]
    assert not is_missing(uri)


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    """The first half of a store; random bytes."""
    path = tmp_path / "mlflow.db"
    with sqlite3.connect(path) as store:
        store.execute("create table runs (name text)")
        store.executemany("insert into runs values (?)", [["x" * 1000]] * 100)
    store.close()
    half = path.read_bytes()[: path.stat().st_size // 2]
    for content, fault in (
        (half, "database disk image is malformed"),
        (b"not one, for sure", "file is not a database"),
    ):
        path.write_bytes(content)
        assert f"mlflow.db is damaged ({fault}); move it away: the same" in refusal(check_answers, f"sqlite:///{path}")
