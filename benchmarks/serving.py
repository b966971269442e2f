"""How many requests `fer serve` answers, how fast, in how much memory, and what becomes of them when it stops.

`python -m benchmarks.serving RUN`: threads of this process send the same pictures again and again, each over one
connection, to two servers, with and without batching: photographs of 640x480 pixels with two drawn faces, and drawn
faces of 48x48 pixels.
"""

import argparse
import http.client
import io
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import machine
from fer.data.labels import CLASSES
from fer.data.sample import draw_face
from pipelines.serving import listen

CLIENTS = (1, 8, 32)
HEADERS = {"Content-Type": "image/jpeg"}


def pictures() -> dict[str, tuple[str, bytes]]:
    """What is sent -> where to, and the JPEG."""
    rng, photograph = np.random.default_rng(0), Image.new("RGB", (640, 480), (150, 150, 150))
    faces = [Image.fromarray(draw_face(rng, name)) for name in CLASSES[:2]]
    for face, side, place in zip(faces, (160, 240), ((40, 60), (330, 150))):
        photograph.paste(face.resize((side, side), Image.Resampling.BICUBIC), place)
    return {"photograph": ("/faces", _jpeg(photograph)), "cropped face": ("/faces?cropped=true", _jpeg(faces[0]))}


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


@contextmanager
def server(words: list[str], port: int) -> Iterator[subprocess.Popen]:
    """`fer serve` on that port, ready. Raises UserError if something else listens there, which would be measured."""
    listen(port).close()
    command = [str(Path(sys.executable).with_name("fer")), "serve", "--port", str(port), *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        if process.poll() is not None:
            raise SystemExit(process.returncode)
        yield process
    finally:
        process.terminate()
        process.wait()


def load(port: int, picture: tuple[str, bytes], clients: int, over: threading.Event) -> tuple[list[float], list[str]]:
    """Seconds of each answer, and what else happened, until `over` or the server is gone."""
    seconds, others = list[float](), list[str]()

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while not over.is_set():
            start = time.perf_counter()
            try:
                connection.request("POST", picture[0], picture[1], HEADERS)
                answer = connection.getresponse()
                answer.read()
            except ConnectionRefusedError:
                others.append("refused")
                return
            except (OSError, http.client.HTTPException) as error:
                others.append(type(error).__name__)
                return
            if answer.status == 200:
                seconds.append(time.perf_counter() - start)
            else:
                others.append(str(answer.status))

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seconds, others


def measured(port: int, picture: tuple[str, bytes], clients: int, length: float) -> str:
    """Requests a second, and the 50th and 95th percentile of the milliseconds that an answer takes."""
    load(port, picture, clients, _after(1))
    start = time.perf_counter()
    seconds, others = load(port, picture, clients, _after(length))
    rate = len(seconds) / (time.perf_counter() - start)
    middle, late = (1000 * np.percentile(seconds, share) for share in (50, 95))
    return f"{rate:.0f} | {middle:.0f} | {late:.0f}{f' | {others}' if others else ''}"


def _after(length: float) -> threading.Event:
    over = threading.Event()
    threading.Timer(length, over.set).start()
    return over


def metric(port: int, name: str) -> float:
    """A value of GET /metrics, summed over its labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


def memory(port: int, picture: tuple[str, bytes], requests: int) -> list[float]:
    """MiB that the server holds at first, and after each fifth of so many more requests from 8 clients."""
    first, held = metric(port, "fer_requests_total"), [metric(port, "process_resident_memory_bytes") / 2**20]
    for fifth in range(1, 6):
        while metric(port, "fer_requests_total") < first + fifth * requests / 5:
            load(port, picture, 8, _after(3))
        held.append(metric(port, "process_resident_memory_bytes") / 2**20)
    return held


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run id, or the folder of a run or a checkpoint")
    parser.add_argument("--port", type=int, default=8098, help="and the one after it")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each figure")
    parser.add_argument("--requests", type=int, default=5000, help="of cropped faces, while the memory is looked at")
    asked = parser.parse_args()
    sent, words = pictures(), ["--run", asked.run]
    print(f"{machine(torch.device('cpu'))}\n\n| sent | batching | clients | requests/s | p50, ms | p95, ms |")  # noqa: T201
    print(f"|{6 * '---|'}", flush=True)  # noqa: T201
    with server(words, asked.port) as process, server([*words, "--no-batching"], asked.port + 1):
        for what, picture in sent.items():
            for clients in CLIENTS:
                for batching, port in (("on", asked.port), ("off", asked.port + 1)):
                    row = measured(port, picture, clients, asked.seconds)
                    print(f"| {what} | {batching} | {clients} | {row} |", flush=True)  # noqa: T201
        start, held = time.perf_counter(), memory(asked.port, sent["cropped face"], asked.requests)
        over = f"{asked.requests:,} requests in {(time.perf_counter() - start) / 60:.0f} min"
        print(f"memory over {over}: {', '.join(f'{one:.0f}' for one in held)} MiB", flush=True)  # noqa: T201
        threading.Timer(2, process.send_signal, (signal.SIGTERM,)).start()
        seconds, others = load(asked.port, sent["photograph"], 32, threading.Event())
    counts = {what: others.count(what) for what in sorted(set(others))}
    print(f"SIGTERM under 32 clients: {len(seconds)} answered, then {counts}; status {process.wait()}")  # noqa: T201


if __name__ == "__main__":
    main()
