"""Run the servers of `fer ui`, each with its own log file: an unread pipe would fill up and block the server."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from fer.errors import UserError

PATIENCE = 15.0  # seconds that a server gets to shut down
TAIL = 1 << 16  # bytes at the end of a log to search for its last line


def serve(servers: dict[tuple[str, int], list[str]], logs: Path, say: Callable[[str], None]) -> None:
    """Run servers, (name, port on 127.0.0.1) -> command, until one of them exits, or Ctrl-C or SIGTERM; then stop all.

    Their output goes to `logs`/<name>.log, emptied first. Raises UserError if a port is in use, or a server exits.
    """
    for name, port in servers:
        _check_free(name, port)
    logs.mkdir(parents=True, exist_ok=True)
    running: dict[str, subprocess.Popen] = {}
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for (name, port), command in servers.items():
            running[name] = _start(command, _log(logs, name))
            say(f"{name}: http://127.0.0.1:{port}")
        say(f"Logs: {logs}. Ctrl-C stops them.")
        while all(server.poll() is None for server in running.values()):
            time.sleep(0.3)
        name = next(name for name, server in running.items() if server.poll() is not None)
        raise UserError(_why(name, running[name], _log(logs, name)))
    except KeyboardInterrupt:
        say("Stopped.")
    finally:
        _end(running.values())
        signal.signal(signal.SIGTERM, before)


def _check_free(name: str, port: int) -> None:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise UserError(f"--{name.lower()}-port {port}: the port is in use; stop what uses it or choose another")


def _log(logs: Path, name: str) -> Path:
    return logs / f"{name.lower()}.log"


def _start(command: list[str], log: Path) -> subprocess.Popen:
    """In its own session, so that Ctrl-C reaches this process only, and the server's child processes end with it."""
    with log.open("wb") as file:
        return subprocess.Popen(command, start_new_session=True, stdout=file, stderr=subprocess.STDOUT)


def _end(servers: Iterable[subprocess.Popen]) -> None:
    for server in servers:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
    for server in servers:
        try:
            server.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _why(name: str, server: subprocess.Popen, log: Path) -> str:
    return f"{name} exited: {_last_line(log) or f'exit status {server.returncode}'}; its whole output is in {log}"


def _last_line(log: Path) -> str:
    """The last line that is not blank, or ""."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
