"""`fer serve`: a page and an HTTP interface on 127.0.0.1, behind which the champion answers for pictures of faces."""

import asyncio
import os
import signal
import socket
import threading
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client import generate_latest as written
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from fer.device import share_heaps
from fer.errors import UserError
from fer.faces.detect import Detector, Face, crop
from fer.pictures import read_picture
from pipelines.answering import Batches, Model, Models

PAGE = Path(__file__).with_name("serve.html")
HOSTS = {"127.0.0.1", "localhost"}  # others are names of pages elsewhere that were made to lead here
FORMATS = {"image/jpeg": "JPEG", "image/png": "PNG", "image/webp": "WEBP", "image/gif": "GIF"}
BYTES, PIXELS = 20 * 2**20, 50_000_000  # of a picture
REQUESTS = 64  # under way at a time
READERS = 2  # threads that decode pictures and find faces, each with one in memory
SLOWEST = 30.0  # seconds that a request has to arrive, and those under way have to end at a stop
# the page loads nothing but what is in it, and talks to nobody else
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "img-src 'self' blob: data:; media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Metrics:
    """What GET /metrics shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        labels = ("path", "status")
        self.requests = Counter("fer_requests", "Requests that were answered.", labels, registry=self.registry)
        self.seconds = Histogram(
            "fer_request_seconds", "From a request's head to its answer.", ("path",), registry=self.registry
        )
        sizes = (1, 2, 4, 8, 16, 32, 64)
        self.passes = Histogram(
            "fer_pass_faces", "Faces in a pass through the network.", buckets=sizes, registry=self.registry
        )


def build_app(models: Models, together: bool = True) -> FastAPI:
    """The pages and answers; `together`: faces of requests at the same time share passes through the network."""
    metrics, page = Metrics(), PAGE.read_text(encoding="utf-8")
    batches = Batches(together, metrics.passes.observe)
    readers, detecting = ThreadPoolExecutor(READERS, "reader"), threading.Lock()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        working = asyncio.create_task(batches.work())
        yield
        working.cancel()
        with suppress(asyncio.CancelledError):
            await working
        readers.shutdown()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.is_over = lambda: False
    _watch(app, metrics)

    @app.get("/")
    async def start() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": models.now.names, "problem": models.problem or None}

    @app.get("/metrics")
    async def shown() -> Response:
        return Response(written(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.post("/faces")
    async def faces(request: Request, cropped: bool = False) -> dict[str, Any]:
        if batches.under_way >= REQUESTS:
            raise HTTPException(503, f"{REQUESTS} requests are under way; try again later", {"Retry-After": "1"})
        with batches.one_more():
            picture, model = await _body(request), models.now
            see = partial(_seen, picture, model, None if cropped else models.detector, detecting)
            size, found, crops = await asyncio.get_running_loop().run_in_executor(readers, see)
            answers = await batches.answer(model, crops)
        rows = [_row(face, answer, model.predictor.classes) for face, answer in zip(found, answers)]
        return {"faces": rows, "model": model.names, "size": size}

    for kind in (HTTPException, RequestValidationError, UserError, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _told)
    return app


def _watch(app: FastAPI, metrics: Metrics) -> None:
    """Count and time every request, and refuse those that name another host."""

    @app.middleware("http")
    async def counted(request: Request, follow: Callable[[Request], Awaitable[Response]]) -> Response:
        status, start = 500, asyncio.get_running_loop().time()
        try:
            if request.headers.get("host", "").partition(":")[0] in HOSTS:
                answer = await follow(request)
            else:
                answer = await _told(request, HTTPException(421, "Host: send 127.0.0.1 or localhost"))
            status = answer.status_code
            if app.state.is_over():
                answer.headers["Connection"] = "close"  # else the client sends the next one into nothing
            return answer
        finally:
            path = getattr(request.scope.get("route"), "path", "other")
            metrics.requests.labels(path, status).inc()
            metrics.seconds.labels(path).observe(asyncio.get_running_loop().time() - start)


async def _told(_: Request, error: Exception) -> JSONResponse:
    """Every refusal is a line of JSON; the traceback of an error of ours is in the log."""
    status, line, headers = 500, "the server failed; its log says why", None
    if isinstance(error, HTTPException):
        status, line, headers = error.status_code, str(error.detail), error.headers
    elif isinstance(error, RequestValidationError):
        first = error.errors()[0]
        status, line = 422, f"{first['loc'][-1]}: {first['msg']}"
    elif isinstance(error, UserError):
        status, line = 422, str(error).replace("\n", "; ")
    elif isinstance(error, ClientDisconnect):
        status, line = 400, "the connection ended before the picture did"
    return JSONResponse({"error": line}, status, headers)


async def _body(request: Request) -> bytes:
    """The picture of a request. Raises HTTPException if it is too large, too slow, or says to be something else."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() not in FORMATS:
        raise HTTPException(415, f"Content-Type: send the picture itself, as {' or '.join(FORMATS)}")
    too_large = HTTPException(413, f"the picture has more than {BYTES:,} bytes: shrink it")
    if int(request.headers.get("content-length", 0)) > BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(SLOWEST):
            async for part in request.stream():
                body += part
                if len(body) > BYTES:
                    raise too_large
    except TimeoutError:
        raise HTTPException(408, f"the picture did not arrive within {SLOWEST:g} seconds") from None
    return bytes(body)


def _seen(
    content: bytes, model: Model, detector: Detector | None, detecting: threading.Lock
) -> tuple[dict[str, int], list[Face], np.ndarray]:
    """A picture's size, the faces in it, and these prepared for the model; without detector it is one face itself.

    Raises UserError for what is no picture, or does not fit the model.
    """
    picture = read_picture(content, list(FORMATS.values()), PIXELS)
    height, width = picture.shape[:2]
    if detector is None:
        found, crops = [Face(0, 0, width, height, 1)], [picture]
    else:
        with detecting:  # a detector is for one thread; it uses several itself
            found = detector(picture)
        crops = [crop(picture, face, model.margin) for face in found]
    return {"width": width, "height": height}, found, model.predictor.faces.prepare(crops, detector is not None)


def _row(face: Face, answer: np.ndarray, classes: list[str]) -> dict[str, Any]:
    box = {key: round(getattr(face, key), 2) for key in ("left", "top", "width", "height")}
    probabilities = {name: round(float(value), 6) for name, value in zip(classes, answer)}
    return {
        "box": box,
        "score": round(face.score, 3),
        "prediction": classes[int(answer.argmax())],
        "probabilities": probabilities,
    }


def listen(port: int) -> socket.socket:
    """A socket that listens on 127.0.0.1. Raises UserError if the port is in use or forbidden."""
    # asyncio sends answers at once (TCP_NODELAY) only where the socket names its protocol: otherwise each takes 40 ms
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise UserError(f"--port {port}: {error.strerror}; stop what uses it or choose another") from None
    return listener


def set_up() -> None:
    """Set up this process, before it loads a model."""
    share_heaps()
    # decoding and the detector need the other cores; threads of torch that wait for a busy core cost it tenfold
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # our limit is lower than Pillow's


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Answer until Ctrl-C or SIGTERM, and then those requests that are under way."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=int(SLOWEST)
    )
    server = uvicorn.Server(config)
    app.state.is_over = lambda: server.should_exit
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:  # which uvicorn sends again at the end
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
