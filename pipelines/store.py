"""The address of the tracking store, checked without MLflow, which itself retries for minutes."""

import os
import socket
import sqlite3
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

from fer.errors import UserError, first_line

SQLITE = "sqlite:///"
PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def tracking_uri(configured: str) -> str:
    """MLFLOW_TRACKING_URI, or else `configured`; a relative SQLite path becomes absolute."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or configured
    if uri.startswith(SQLITE) and not uri.startswith(SQLITE + "/"):
        return SQLITE + str(Path(uri.removeprefix(SQLITE)).resolve())
    return uri


def check_answers(uri: str) -> None:
    """Try the server once, as mlflow retries for minutes. Raises UserError, which does not show a password in `uri`."""
    parts = urlsplit(uri)
    remedy = "start it (`fer ui`, `mlflow server`) or correct tracking.uri or MLFLOW_TRACKING_URI"
    kind = parts.scheme.partition("+")[0]
    try:
        if kind in ("http", "https"):
            urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=5).close()
        elif kind == "sqlite":
            _check_writable(Path(parts.path.removeprefix("/")))
        elif kind in PORTS:
            socket.create_connection((parts.hostname or "localhost", parts.port or PORTS[kind]), timeout=5).close()
        else:
            known = "sqlite:///FILE, postgresql://... or http://..."
            raise UserError(f"tracking.uri: '{without_password(uri)}' is no tracking store; use {known}")
    except urllib.error.HTTPError as error:
        if error.code not in (401, 404):  # it answers; mlflow handles credentials
            answer = f"{error.code} {error.reason}"
            raise UserError(f"tracking.uri: {without_password(uri)} answers {answer}; {remedy}") from None
    except (OSError, ValueError) as error:
        where = without_password(uri)
        raise UserError(f"tracking.uri: no server answers at {where} ({first_line(error)}); {remedy}") from None


def _check_writable(path: Path) -> None:
    try:
        with closing(sqlite3.connect(path)) as store:
            store.execute("begin immediate")
    except sqlite3.OperationalError as error:
        if "locked" not in str(error):  # another process is writing
            raise UserError(
                f"tracking.uri: cannot write {path} ({error}); free some space or choose a writable file"
            ) from None


def without_password(uri: str) -> str:
    """`uri` with *** for its password, to be shown or stored."""
    parts = urlsplit(uri)
    return uri.replace(f":{parts.password}@", ":***@") if parts.password else uri
