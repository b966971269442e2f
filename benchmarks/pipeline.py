"""The overhead of Prefect, Ray and MLflow over the bare loop, and the speed-up of further workers."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

from benchmarks.faces import write_faces
from benchmarks.measure import ROOT, Effort, Row
from pipelines.params import read_yaml

NAME = "vgg13_small"
NO_WARMUP = {"schedule.warmup_epochs": 0}
FLOW = "from pipelines.cli import main; main()"
BARE = """
import sys
from fer.evaluate import evaluate
from fer.train import fit
from pipelines import experiments
from pipelines.params import load, machine

_, name, *changes = sys.argv[1:]
found = experiments.load([name, *changes], machine(load()))[name]
data = "data/sets/sample"
evaluate(fit(name, found.run, found.resources, data, "data/runs"), data, found.resources)
"""


@contextmanager
def project(images: int) -> Iterator[Path]:
    """A temporary folder with params.yaml, experiments/ and drawn faces of 48 px."""
    with tempfile.TemporaryDirectory() as folder:
        settings = read_yaml(ROOT / "params.yaml", "restore it")
        settings["data"] = {"sample": "fer/data/sample.py"}  # no other one is there
        (Path(folder) / "params.yaml").write_text(json.dumps(settings))
        shutil.copytree(ROOT / "experiments", Path(folder) / "experiments")
        write_faces(Path(folder) / "data/sets/sample", 48, train=images, val=images // 8, test=images // 8)
        yield Path(folder)


def run(code: str, folder: Path, name: str, **changes: object) -> float:
    """Wall-clock seconds of a new process that runs `code` to train `name` with `changes`. Raises RuntimeError."""
    words = [name, *(f"{key}={value}" for key, value in changes.items())]
    apart = {
        "MLFLOW_TRACKING_URI",
        "PREFECT_API_URL",
        "PREFECT_HOME",
        "RAY_ADDRESS",
    }  # would name the user's own servers
    environment = {key: value for key, value in os.environ.items() if key not in apart} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, "train", *words]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with status {done.returncode}: {done.stderr[-2000:]}")
    return time.perf_counter() - started


def timed(code: str, folder: Path, epochs: int, **changes: object) -> tuple[float, list[float]]:
    """Seconds that such a run takes besides its epochs, and the seconds of each epoch after the first."""
    shutil.rmtree(folder / "data" / "runs", ignore_errors=True)
    total = run(code, folder, NAME, epochs=epochs, **NO_WARMUP, **changes)
    ends = [row["time"] for row in rows(folder)]
    between = [later - earlier for earlier, later in pairwise(ends)]
    return total - epochs * median(between), between


def rows(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl of the only run of a project."""
    (metrics,) = (folder / "data" / "runs").glob("*/metrics.jsonl")
    return [json.loads(text) for text in metrics.read_text().splitlines()]


def overhead(device: torch.device, effort: Effort) -> Iterator[Row]:
    """`fer train` against bare `fit` and `evaluate`, in turn, each in a new process, with one core and with all.

    The first command of a project also creates the stores of MLflow and Prefect, so it is reported separately.
    """
    images = 2 * effort.small
    for threads in sorted({1, torch.get_num_threads()}):
        asked = {"resources.cpus_per_worker": threads, "resources.device": device.type}
        fixed: dict[str, list[float]] = {FLOW: [], BARE: []}
        epochs: dict[str, list[float]] = {FLOW: [], BARE: []}
        with project(images) as folder:
            first, _ = timed(FLOW, folder, effort.epochs, **asked)
            for _ in range(effort.rounds):
                for code, found in fixed.items():
                    beside, between = timed(code, folder, effort.epochs, **asked)
                    found.append(beside)
                    epochs[code] += between
        bare, epoch, bare_epoch = median(fixed[BARE]), median(epochs[FLOW]), median(epochs[BARE])
        note = (
            f"{median(fixed[FLOW]) - bare:+.1f} s a command ({first - bare:+.1f} s the first of a project), "
            f"{100 * (epoch / bare_epoch - 1):+.1f} % an epoch of {bare_epoch:.1f} s"
        )
        what = f"pipeline, {NAME}, {threads} core(s) of {os.cpu_count()}"
        yield Row(what, images / epoch, "fit and evaluate", images / bare_epoch, note)


def workers(device: torch.device, effort: Effort) -> Iterator[Row]:
    """images/s of one run on n workers, with a CPU core or a GPU each, against one worker."""
    most = torch.cuda.device_count() if device.type == "cuda" else os.cpu_count() or 1
    alone = trained_by(1, device, effort) if most > 1 else 0.0
    for count in range(2, most + 1):
        if 64 % count == 0:  # which divides the batch
            yield Row(f"{count} workers, {NAME}", trained_by(count, device, effort), "1 worker", alone)


def trained_by(count: int, device: torch.device, effort: Effort) -> float:
    """images/s of a run on `count` workers, in the best epoch after the first."""
    with project(2 * effort.small) as folder:
        asked = {"resources.workers": count, "resources.cpus_per_worker": 1, "resources.device": device.type}
        run(FLOW, folder, NAME, epochs=1 + effort.rounds, **NO_WARMUP, **asked)
        return max(row["images_per_second"] for row in rows(folder)[1:])


CASES: dict[str, Callable[[torch.device, Effort], Iterator[Row]]] = {"pipeline": overhead, "workers": workers}
