"""What a command says of a Prefect server before anything starts."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from conftest import free_port, refusal

from pipelines import flow_page

STATUS = {"/api/health": 401, "/health": 404}  # it wants credentials; it is another one


class Server(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(STATUS[self.path])

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_server_that_is_not_there_is_one_line_and_one_that_wants_credentials_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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
        flow_page.check_server()
        server.shutdown()
