"""What a command says of a Prefect server before anything starts."""

import base64
import logging
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from conftest import free_port, refusal
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from pipelines import flow_page

CREDENTIALS = "anna:secret"


class Server(BaseHTTPRequestHandler):
    """Prefect's answers: anyone may ask for its health, all else wants credentials; below /cloud it has no hello."""

    def do_GET(self) -> None:
        given = self.headers.get("Authorization") == f"Basic {base64.b64encode(CREDENTIALS.encode()).decode()}"
        self.send_response(
            {"/api/health": 200, "/cloud/api/health": 200, "/api/hello": 200 if given else 401}.get(self.path, 404)
        )
        self.end_headers()
        self.wfile.write(b"true")

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_page_that_fails_costs_no_run(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def gone(*words: object, **named: object) -> None:
        raise httpx.ConnectError("gone")

    monkeypatch.setattr(flow_page, "get_run_logger", lambda: logging.getLogger("run"))
    for name in ("create_link_artifact", "create_progress_artifact"):
        monkeypatch.setattr(flow_page, name, gone)
    caplog.set_level(logging.INFO)
    rows = [{"epoch": 1, "train_loss": 1.0, "val_loss": 1.0, "val_accuracy": 0.5}]
    flow_page.Progress("x-s1", 2, "http://127.0.0.1/")(rows)
    assert [record.getMessage() for record in caplog.records] == [
        "x-s1: no progress bar: gone",
        "x-s1: epoch 1 of 2: train loss 1.0000, val loss 1.0000, val accuracy 50.00 %",
    ]


def test_a_server_that_is_not_there_or_refuses_the_credentials_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    flow_page.check_server()
    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        other = f"http://127.0.0.1:{server.server_port}"
        for address in (f"http://127.0.0.1:{free_port()}/api", "http://[::1", "nonsense", other):
            monkeypatch.setenv("PREFECT_API_URL", address)
            line = refusal(flow_page.check_server)
            assert line.startswith(f"PREFECT_API_URL: no Prefect server answers at {address} (")
        assert "the address ends in /api" in line
        monkeypatch.setenv("PREFECT_API_URL", f"{other}/api")
        for given in (None, "anna:wrong"):
            with temporary_settings({PREFECT_API_URL: f"{other}/api", PREFECT_API_AUTH_STRING: given}):
                line = refusal(flow_page.check_server)
            assert line.startswith(f"PREFECT_API_URL: the Prefect server at {other}/api refuses the credentials; set ")
        for path in ("api", "cloud/api"):
            monkeypatch.setenv("PREFECT_API_URL", f"{other}/{path}")
            with temporary_settings({PREFECT_API_URL: f"{other}/{path}", PREFECT_API_AUTH_STRING: CREDENTIALS}):
                flow_page.check_server()
        server.shutdown()
