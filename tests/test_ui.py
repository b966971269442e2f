"""`fer ui` with small programs as servers: what they write does not stop them, and they end together, with a reason."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fer.errors import UserError
from pipelines import ui
from pipelines.processes import process_id
from pipelines.ui import serve

ROOT = Path(__file__).resolve().parents[1]
SLEEPER = """
import os, time
from pathlib import Path
path = Path({!r})
path.with_suffix(".new").write_text(str(os.getpid()))
path.with_suffix(".new").rename(path)
time.sleep(60)
"""


def program(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(true: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def gone(pid: int) -> bool:
    return process_id(pid) == str(pid)


def written(path: Path) -> int:
    """The process id in a file that a sleeper writes at its start."""
    wait_for(path.exists)
    return int(path.read_text())


@contextmanager
def interrupted_when(true: Callable[[], object]) -> Iterator[None]:
    """Ctrl-C, for this process, once it holds or 30 seconds have passed, unless the block has ended."""
    over = threading.Event()

    def follow() -> None:
        end = time.monotonic() + 30
        while not over.wait(0.05):
            if true() or time.monotonic() > end:
                os.kill(os.getpid(), signal.SIGINT)
                return

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_server_that_writes_much_is_not_stopped_by_it(tmp_path: Path) -> None:
    done, pid, said = tmp_path / "done", tmp_path / "pid", []
    code = f"""
import sys, time
from pathlib import Path
for number in range(2000):
    sys.stderr.write(f"{{number}}: " + "warning " * 12 + "\\n")
    sys.stdout.write("served\\n")
Path({str(done)!r}).touch()
time.sleep(60)
"""
    servers = {("Loud", free_port()): program(code), ("Quiet", free_port()): program(SLEEPER.format(str(pid)))}
    with interrupted_when(lambda: done.exists() and pid.exists()):
        serve(servers, tmp_path / "made" / "logs", said.append)
    assert done.exists()
    assert gone(written(pid))
    log = (tmp_path / "made" / "logs" / "loud.log").read_text()
    assert len(log) > 200_000
    assert "served" in log
    assert said[:2] == [f"{name}: http://127.0.0.1:{port}" for name, port in servers]
    assert said[-1] == "Stopped."


def test_the_end_of_a_server_is_told_with_its_last_words_and_ends_the_other(tmp_path: Path) -> None:
    pid, log = tmp_path / "pid", tmp_path / "short.log"
    log.write_text("of the last time\n" * 10)
    code = f"""
import time
from pathlib import Path
while not Path({str(pid)!r}).exists():
    time.sleep(0.05)
print("starting")
raise SystemExit("store.db: the table is locked\\n\\n  ")
"""
    servers = {("Quiet", free_port()): program(SLEEPER.format(str(pid))), ("Short", free_port()): program(code)}
    with pytest.raises(UserError) as caught:
        serve(servers, tmp_path, lambda line: None)
    assert str(caught.value) == f"Short ended: store.db: the table is locked; all that it wrote is in {log}"
    assert "of the last time" not in log.read_text()
    assert gone(written(pid))


def test_a_server_that_ends_without_a_word_is_told_by_its_exit_status(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^Mute ended: exit status 3; "):
        serve({("Mute", free_port()): program("raise SystemExit(3)")}, tmp_path, lambda line: None)


def test_a_port_in_use_is_one_line_and_nothing_starts(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port, started = other.getsockname()[1], tmp_path / "pid"
        servers = {
            ("First", free_port()): program(SLEEPER.format(str(started))),
            ("MLflow", port): program("import time; time.sleep(60)"),
        }
        with pytest.raises(UserError) as caught:
            serve(servers, tmp_path / "logs", lambda line: None)
    assert str(caught.value).startswith(f"--mlflow-port {port}: the port is in use; ")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_servers_and_what_they_started(tmp_path: Path, number: signal.Signals) -> None:
    pids = [tmp_path / "pid0", tmp_path / "pid1", tmp_path / "child"]
    child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEPER.format(str(pids[2]))!r}])"
    servers = {
        ("A", free_port()): program(SLEEPER.format(str(pids[0]))),
        ("B", free_port()): program(child + SLEEPER.format(str(pids[1]))),
    }
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from pipelines.ui import serve
serve({servers!r}, Path({str(tmp_path)!r}), lambda line: None)
"""
    driver = subprocess.Popen(program(code))
    found = [written(path) for path in pids]
    driver.send_signal(number)
    assert driver.wait(timeout=30) == 0
    wait_for(lambda: all(gone(pid) for pid in found), seconds=5)


def test_a_server_that_does_not_listen_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ui, "PATIENCE", 0.5)
    pid = tmp_path / "pid"
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    before = signal.getsignal(signal.SIGTERM)
    with interrupted_when(pid.exists):
        serve({("Deaf", free_port()): program(deaf + SLEEPER.format(str(pid)))}, tmp_path, lambda line: None)
    assert gone(written(pid))
    assert signal.getsignal(signal.SIGTERM) is before
