"""Run the servers of `fer ui`, each with its own log file: an unread pipe would fill up and block the server."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fer.errors import UserError

PATIENCE = 15.0  # seconds that a server gets to shut down
TAIL = 1 << 16  # bytes at the end of a log to search for its last line


@dataclass(frozen=True)
class Server:
    """A program that serves pages on 127.0.0.1."""

    name: str
    port: int
    command: list[str]
    page: str = ""  # path of the page to open
    environment: Mapping[str, str] = field(default_factory=dict)  # beside that of this process


def serve(servers: Sequence[Server], logs: Path, say: Callable[[str], None]) -> None:
    """Run the servers until one of them exits, or Ctrl-C or SIGTERM; then stop all.

    Their output goes to `logs`/<name>.log, emptied first. Raises UserError if a port is in use, or a server exits.
    """
    ports: set[int] = set()
    for server in servers:
        _check_free(server)
        if server.port in ports:
            raise UserError(f"--{server.name.lower()}-port {server.port}: another server has it; choose another")
        ports.add(server.port)
    logs.mkdir(parents=True, exist_ok=True)
    running: dict[str, subprocess.Popen] = {}
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for server in servers:
            running[server.name] = _start(server, _log(logs, server.name))
            say(f"{server.name}: http://127.0.0.1:{server.port}{server.page}")
        say(f"Logs: {logs}. Ctrl-C stops them.")
        while all(process.poll() is None for process in running.values()):
            time.sleep(0.3)
        name = next(name for name, process in running.items() if process.poll() is not None)
        raise UserError(_why(name, running[name], _log(logs, name)))
    except KeyboardInterrupt:
        say("Stopped.")
    finally:
        _end(running.values())
        signal.signal(signal.SIGTERM, before)


def _check_free(server: Server) -> None:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", server.port)) == 0:
            option = f"--{server.name.lower()}-port {server.port}"
            raise UserError(f"{option}: the port is in use; stop what uses it or choose another")


def _log(logs: Path, name: str) -> Path:
    return logs / f"{name.lower()}.log"


def _start(server: Server, log: Path) -> subprocess.Popen:
    """In its own session, so that Ctrl-C reaches this process only, and the server's child processes end with it."""
    with log.open("wb") as file:
        return subprocess.Popen(
            server.command,
            env={**os.environ, **server.environment},
            start_new_session=True,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


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
