"""`fer ui` with small programs as servers: what they write does not stop them, and they end together, with a reason."""

import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import free_port, refusal, wait_for

from pipelines import ui
from pipelines.processes import process_id
from pipelines.ui import Server, serve


@pytest.fixture(autouse=True)
def _heard() -> Iterator[None]:
    """A shell lets what it starts in the background ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def shell(code: str) -> list[str]:
    return ["bash", "-c", code]


def sleeper(path: Path) -> str:
    """Code that writes its process id to a file, whole, and stays."""
    return f"echo $$ > {path}.new; mv {path}.new {path}; exec sleep 600"


def gone(path: Path) -> bool:
    """Whether the sleeper that wrote this file has ended."""
    pid = path.read_text().strip()
    return process_id(int(pid)) == pid


@contextmanager
def signalled_when(true: Callable[[], object], number: signal.Signals) -> Iterator[None]:
    """This process gets the signal once it holds, or after a minute, unless the block has ended."""
    over = threading.Event()

    def follow() -> None:
        for _ in range(1200):
            if over.wait(0.05):
                return
            if true():
                break
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_servers_and_what_they_started_and_none_is_stopped_by_what_it_writes(
    tmp_path: Path, number: signal.Signals
) -> None:
    """A pipe that nobody reads would hold 64 kB."""
    wrote, pid, child = (tmp_path / name for name in ("wrote", "pid", "child"))
    line = "warning " * 12
    loud = f"for i in {{1..2000}}; do echo $i: $line >&2; echo served; done; touch {wrote}; exec sleep 600"
    servers = [
        Server("Loud", free_port(), shell(loud), "/runs", {"line": line}),
        Server("Quiet", free_port(), shell(f"bash -c '{sleeper(child)}' & {sleeper(pid)}")),
    ]
    said: list[str] = []
    before = signal.getsignal(signal.SIGTERM)
    with signalled_when(lambda: all(path.exists() for path in (wrote, pid, child)), number):
        serve(servers, tmp_path / "made" / "logs", said.append)
    wait_for(lambda: gone(pid) and gone(child))
    log = (tmp_path / "made" / "logs" / "loud.log").read_text()
    assert (wrote.exists(), len(log) > 200_000, "served" in log) == (True, True, True)
    assert said[:2] == [f"{one.name}: http://127.0.0.1:{one.port}{one.page}" for one in servers]
    assert said[-1] == "Stopped."
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("echo starting; printf 'store.db: the table is locked\\n\\n  '; exit 1", "store.db: the table is locked"),
        ("exit 3", "exit status 3"),
    ],
)
def test_the_end_of_a_server_is_told_with_its_last_words_and_ends_the_other(
    tmp_path: Path, code: str, reason: str
) -> None:
    pid, log = tmp_path / "pid", tmp_path / "short.log"
    log.write_text("of the last time\n" * 10)
    short = f"until [ -e {pid} ]; do sleep 0.05; done; {code}"
    servers = [Server("Quiet", free_port(), shell(sleeper(pid))), Server("Short", free_port(), shell(short))]
    told = f"Short exited: {reason}; its whole output is in {log}"
    assert refusal(serve, servers, tmp_path, lambda line: None) == told
    assert "of the last time" not in log.read_text()
    assert gone(pid)


def test_a_port_in_use_is_one_line_and_nothing_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        servers = [
            Server("First", free_port(), shell(sleeper(tmp_path / "pid"))), Server("MLflow", port, shell("sleep 600"))
        ]  # fmt: skip
        line = refusal(serve, servers, tmp_path / "logs", lambda line: None)
    assert line.startswith(f"--mlflow-port {port}: the port is in use; ")
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_does_not_listen_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ui, "PATIENCE", 0.5)
    pid = tmp_path / "pid"
    with signalled_when(pid.exists, signal.SIGINT):
        serve([Server("Deaf", free_port(), shell(f"trap '' TERM; {sleeper(pid)}"))], tmp_path, lambda line: None)
    assert gone(pid)


@pytest.mark.slow
def test_the_address_of_the_store_is_on_no_command_line(
    project: Path, empty_store: Path, here: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may hold a password, and every user of the machine can read command lines."""
    shutil.copy(empty_store, project / "mlflow.db")
    started: list[Server] = []
    monkeypatch.setattr(ui, "serve", lambda servers, *_: started.extend(servers))
    assert here("ui").returncode == 0
    assert [server.name for server in started] == ["MLflow", "Prefect"]
    assert started[0].environment == {"MLFLOW_BACKEND_STORE_URI": f"sqlite:///{project}/mlflow.db"}
    assert "sqlite" not in " ".join(word for server in started for word in server.command)
