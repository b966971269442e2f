"""What Prefect, Ray and MLflow cost beside the bare loop, and what a second worker gives, on runs of `fer train`."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.faces import write_faces
from benchmarks.measure import ROOT, Effort, Row

NAME = "vgg13_small"
FLOW = "from pipelines.cli import main; main()"
BARE = """
import sys
from fer.evaluate import evaluate
from fer.train import fit
from pipelines.params import load

_, name, *overrides = sys.argv[1:]
run = load(overrides=[word for word in overrides if word != "--set"]).models[name]
evaluate(fit(name, run, "data", "data/runs"), "data")
"""


@contextmanager
def project(images: int) -> Iterator[Path]:
    """A temporary folder with params.yaml and drawn faces of 48 px."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(ROOT / "params.yaml", folder)
        write_faces(Path(folder) / "data", 48, train=images, val=images // 8, test=images // 8)
        yield Path(folder)


def run(code: str, folder: Path, name: str, **changes: object) -> float:
    """Seconds that `code` takes, from its start to its end, to train `name` with changes to it; words as of `fer`."""
    words = [word for key, value in changes.items() for word in ("--set", f"models.{name}.{key}={value}")]
    apart = {"MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_HOME", "RAY_ADDRESS"}  # of the user's own servers
    environment = {key: value for key, value in os.environ.items() if key not in apart} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, "train", name, *words]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with status {done.returncode}: {done.stderr[-2000:]}")
    return time.perf_counter() - started


def line(seconds: dict[int, float]) -> tuple[float, float]:
    """Fixed seconds and seconds per epoch through two measured lengths, seconds of a run by its epochs."""
    (few, short), (many, long) = sorted(seconds.items())
    slope = (long - short) / (many - few)
    return short - few * slope, slope


def overhead(device: torch.device, effort: Effort) -> Iterator[Row]:
    """T(n) = fixed + n * epoch, for n epochs of `fer train` and of the bare `fit` and `evaluate`, in new processes."""
    images = 2 * effort.small
    threads = torch.get_num_threads()
    taken: dict[str, dict[int, float]] = {FLOW: {}, BARE: {}}
    for epochs in effort.epochs:
        for code, seconds in taken.items():
            with project(images) as folder:
                asked = {"epochs": epochs, "warmup_epochs": 0, "resources.cpus_per_worker": threads}
                seconds[epochs] = run(code, folder, NAME, **asked, **{"resources.device": device.type})
    (fixed, epoch), (bare_fixed, bare_epoch) = line(taken[FLOW]), line(taken[BARE])
    lengths = " and ".join(str(epochs) for epochs in effort.epochs)
    note = f"{fixed - bare_fixed:+.1f} s fixed, {100 * (epoch / bare_epoch - 1):+.1f} % an epoch of {bare_epoch:.1f} s"
    yield Row(f"pipeline, {NAME}, {lengths} epochs", images / epoch, "fit and evaluate", images / bare_epoch, note)


def workers(device: torch.device, effort: Effort) -> Iterator[Row]:
    """images/s of one run on n workers, a CPU core or a GPU each, against one worker; nothing where there is one."""
    most = torch.cuda.device_count() if device.type == "cuda" else os.cpu_count() or 1
    alone = trained_by(1, device, effort) if most > 1 else 0.0
    for count in range(2, most + 1):
        if 64 % count == 0:  # the batch divides by it
            yield Row(f"{count} workers, {NAME}", trained_by(count, device, effort), "1 worker", alone)


def trained_by(count: int, device: torch.device, effort: Effort) -> float:
    """images/s of `count` workers, in the best epoch after the first."""
    with project(2 * effort.small) as folder:
        asked = {"resources.workers": count, "resources.cpus_per_worker": 1, "resources.device": device.type}
        run(FLOW, folder, NAME, epochs=1 + effort.rounds, warmup_epochs=0, **asked)
        (metrics,) = (folder / "data" / "runs").glob("*/metrics.jsonl")
        rows = [json.loads(text) for text in metrics.read_text().splitlines()]
    return max(row["images_per_second"] for row in rows[1:])


CASES: dict[str, Callable[[torch.device, Effort], Iterator[Row]]] = {"pipeline": overhead, "workers": workers}
