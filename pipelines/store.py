"""The address of the tracking store, tried once before MLflow, which itself tries for minutes."""

import http.client
import os
import sqlite3
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from fer.errors import UserError, first_line, without_password

SQLITE = "sqlite:///"
DATABASES = ("postgresql", "mysql", "mssql")
TIMEOUT = 3  # seconds
REMEDY = "start it (`fer ui`, `mlflow server`) or correct tracking.uri or MLFLOW_TRACKING_URI"


def tracking_uri(configured: str) -> str:
    """MLFLOW_TRACKING_URI, or else `configured`; a relative SQLite path becomes absolute."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or configured
    if uri.startswith(SQLITE) and not uri.startswith(SQLITE + "/"):
        return SQLITE + os.path.realpath(uri.removeprefix(SQLITE))
    return uri


def is_missing(uri: str) -> bool:
    """Whether nothing was ever recorded: the SQLite file is not there. A server or another database is asked later."""
    return uri.startswith(SQLITE) and not _file(uri).exists()


def _file(uri: str) -> Path:
    """Of an SQLite address, which may have options behind it."""
    return Path(uri.removeprefix(SQLITE).partition("?")[0])


def check_answers(uri: str) -> None:
    """Try the store once. Raises UserError, in which no password of `uri` is shown."""
    kind, shown = uri.partition(":")[0].partition("+")[0], without_password(uri)
    if kind in ("http", "https"):
        _check_server(uri, shown)
    elif uri.startswith(SQLITE) and uri != SQLITE:
        _check_writable(_file(uri))
    elif kind in DATABASES:
        _check_database(uri, shown)
    else:
        known = "sqlite:///FILE, postgresql+psycopg://... or http://..."
        raise UserError(f"tracking.uri: '{shown}' is no tracking store; use {known}")


def _check_server(uri: str, shown: str) -> None:
    if "@" in uri:  # MLflow would show it in its errors
        raise UserError(
            f"tracking.uri: {shown}: leave user and password out of the address and set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    try:
        urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=TIMEOUT).close()
    except urllib.error.HTTPError as error:
        error.close()
        if error.code not in (401, 404):  # it answers; mlflow handles credentials
            raise UserError(f"tracking.uri: {shown} answers {error.code} {error.reason}; {REMEDY}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"tracking.uri: no server answers at {shown} ({first_line(error)}); {REMEDY}") from None


def _check_database(uri: str, shown: str) -> None:
    from sqlalchemy import create_engine
    from sqlalchemy.exc import ArgumentError, DBAPIError

    timeout = {} if uri.startswith("mssql") else {"connect_timeout": TIMEOUT}
    try:
        engine = create_engine(uri, connect_args=timeout)
        engine.connect().close()
        engine.dispose()
    except ModuleNotFoundError as error:
        raise UserError(
            f"tracking.uri: {shown} needs the Python package {error.name}, which is not installed; for PostgreSQL use "
            "postgresql+psycopg://... and `pip install -c constraints.txt -e '.[postgres]'`"
        ) from None
    except DBAPIError as error:
        raise UserError(f"tracking.uri: no database answers at {shown} ({first_line(error)}); {REMEDY}") from None
    except (ArgumentError, ValueError):  # whose text may hold the password
        raise UserError(
            f"tracking.uri: {shown} is no valid address; write : / ? # and @ in a password as %3A %2F %3F %23 %40"
        ) from None


@contextmanager
def alone(uri: str) -> Iterator[None]:
    """Inside the block no other process is in it for this PostgreSQL: two that create MLflow's tables at once fail."""
    if not uri.startswith("postgresql"):
        yield
        return
    from sqlalchemy import create_engine, text

    engine = create_engine(uri)
    try:
        with engine.connect() as connection:
            connection.execute(text("select pg_advisory_lock(hashtext('fer'))"))
            yield
    finally:
        engine.dispose()  # which ends the connection, and so the lock


def _check_writable(path: Path) -> None:
    try:
        with closing(sqlite3.connect(path)) as store:
            store.execute("begin immediate")
    except sqlite3.OperationalError as error:
        if "locked" not in str(error):  # another process is writing
            raise UserError(
                f"tracking.uri: cannot write {path} ({error}); set MLFLOW_TRACKING_URI=sqlite:///data/mlflow.db, or "
                "to another writable file, or free some space"
            ) from None
    except sqlite3.DatabaseError as error:
        raise UserError(
            f"tracking.uri: {path} is damaged ({error}); move it away: the same command records the runs again"
        ) from None
