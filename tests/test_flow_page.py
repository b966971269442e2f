"""What a command says of a Prefect server before anything starts."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from conftest import free_port

from fer.errors import UserError
from pipelines import flow_page


class Closed(BaseHTTPRequestHandler):
    """A server that wants credentials."""

    def do_GET(self) -> None:
        self.send_error(401)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_server_that_is_not_there_is_one_line_and_one_that_wants_credentials_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    flow_page.check_server()
    for address in (f"http://127.0.0.1:{free_port()}/api", "http://[::1", "nonsense"):
        monkeypatch.setenv("PREFECT_API_URL", address)
        with pytest.raises(UserError) as caught:
            flow_page.check_server()
        (line,) = caught.value.lines
        assert line.startswith(f"PREFECT_API_URL: no Prefect server answers at {address} (")
    server = HTTPServer(("127.0.0.1", 0), Closed)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{server.server_port}/api")
    flow_page.check_server()
    server.shutdown()
    server.server_close()
