"""Stage upscale: raw/images.npy -> upscaled/images.npy, same order, larger by `super_resolution.scale`.

The images are processed in shards, and each shard is written when it is done. A stage that was killed resumes with the
next one. Encoded images are not enlarged here, unless by a network: their index says how that is done in reading.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fer.data.encoded import Encoded
from fer.data.images import Images, allocate_images, open_images, write_rows
from fer.errors import OutOfMemory, UserError
from fer.files import new_folder, sha256, write_json
from fer.super_resolution.interpolation import bicubic
from fer.super_resolution.methods import BATCH, METHODS, Upscale, build_upscaler
from fer.super_resolution.quality import down_then_up, grey
from pipelines.data_sets import Prepared, SuperResolution
from pipelines.params import Upscaling
from pipelines.stages import run

ROOT = Path(__file__).resolve().parents[2]
# the code that decides the bytes of the images, as in dvc.yaml
CODE = (
    "pipelines/stages/upscale.py",
    "fer/super_resolution/*.py",
    "fer/data/decode.py",
    "fer/data/encoded.py",
    "fer/data/images.py",
    "fer/device.py",
    "fer/weights.py",
)
PROGRESS = "progress.json"  # in the output folder until it is complete
SHARD = 256  # images
GREY = 4  # of 255: a pixel whose channels differ by at most this counts as grey
PROBED = 4  # images that decide whether a network keeps grey images grey
JUDGED = 256  # images on which the quality of a method is measured


def upscale(one: Prepared) -> None:
    """Write all images, larger, to upscaled/, with what was done and how well in upscale.json.

    Raises UserError for images, weights or a device that cannot be used; upscaled/ then stays as it was.
    """
    config, raw = one.recipe.super_resolution, one.folder / "raw" / "images.npy"
    images = open_images(raw, "download")
    worker = Worker(config, one.machine, str(raw.resolve()))
    if isinstance(images, Encoded) and not _is_network(config):
        with new_folder(one.folder / "upscaled") as folder:
            np.save(folder / "images.npy", images.enlarged(config.method, config.scale))
            write_json(folder / "upscale.json", _facts(images, worker))
        return
    worker.load()  # so that a mistake is reported before anything is written
    worker.stored_grey = _keeps_grey(worker, images)
    count, height, width, *channels = images.shape
    colour = [] if worker.stored_grey else channels or [3] * _is_network(config)
    shape = (count, height * config.scale, width * config.scale, *colour)
    with new_folder(one.folder / "upscaled", resumable=True) as folder:
        progress = Shards(folder, fingerprint(worker, shape), shape)
        worker.out = str(folder.resolve())
        while True:
            worker.batch, worker.of = progress.batch, progress.of
            try:
                _process(worker, progress, one.machine.workers)
                facts = _facts(images, worker)
                break
            except OutOfMemory:
                progress.halve()
        check_same(folder, progress.of)
        write_json(folder / "upscale.json", facts)
        progress.path.unlink()


def _process(worker: "Worker", progress: "Shards", workers: int) -> None:
    """Every shard that is not done yet, in this process or in several."""
    count = progress.shape[0]
    shards = [first for first in range(0, count, SHARD) if first not in progress.done]
    with tqdm(total=count, desc="upscale", unit="image", disable=None) as bar:
        bar.update(count - sum(min(SHARD, count - first) for first in shards))
        for first in _finished(worker, shards, workers):
            progress.add(first)
            bar.update(min(SHARD, count - first))


class Worker:
    """Upscales shards of the raw images into the output folder. Pickled without its network, which each process loads.

    `of`: what the output is of, as `Shards.of`.
    """

    def __init__(self, config: SuperResolution, machine: Upscaling, raw: str):
        self.config, self.machine, self.raw = config, machine, raw
        self.out, self.stored_grey, self.batch = "", False, BATCH
        self.of: dict[str, Any] = {}
        self._upscaler: Upscale | None = None

    def load(self) -> Upscale:
        """The method, loaded at the first call. Raises UserError as `build_upscaler` does."""
        if self._upscaler is None:
            c, m = self.config, self.machine
            self._upscaler = build_upscaler(c.method, c.scale, m.weights, c.hub_id, c.precision, m.device)
        return self._upscaler

    def method(self, images: np.ndarray) -> np.ndarray:
        """uint8 [N, H, W] or [N, H, W, 3] -> uint8, `scale` times as large."""
        return self.load()(images, self.batch)

    def __call__(self, first: int) -> int:
        """Upscale and write the shard that begins with image `first`; returns `first`.

        Raises UserError if another output has been begun in the folder: this process may have outlived its stage.
        """
        larger = self.method(open_images(self.raw, "download")[first : first + SHARD])
        folder = Path(self.out)
        with open(folder / "images.npy", "r+b") as file:  # before the check, so that a later file is never written to
            check_same(folder, self.of)
            write_rows(file, first, grey(larger) if self.stored_grey else larger)
        return first

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_upscaler": None}


@dataclass
class Shards:
    """Which shards are written, and the batch size they were made with: progress.json in the output folder.

    Starts over where settings, weights, input or code differ from those recorded there. The lock on the data folder
    keeps other stages away; `check_same` finds what it cannot, as a worker that outlives its killed stage.
    """

    folder: Path
    fingerprint: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        self.path = self.folder / PROGRESS
        self.done: set[int] = set()
        self.batch = BATCH
        try:
            begun = json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError):  # ValueError: truncated by a power failure
            begun = {}
        if begun.get("fingerprint") == self.fingerprint:
            self.done = set(begun["done"])
            self.batch = begun["batch"] if self.done else BATCH  # with nothing done, try the full batch again
            self._write()
            return
        self._start_over()

    def halve(self) -> None:
        """Start over with half the batch: two batch sizes in one output would leave its bytes to chance."""
        self.batch //= 2
        print(f"out of memory: starting over with {self.batch} images per batch", file=sys.stderr)  # noqa: T201
        self._start_over()

    def _start_over(self) -> None:
        self.done = set()
        self.path.unlink(missing_ok=True)  # first, so that a half-deleted folder never looks valid
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        allocate_images(self.folder / "images.npy", self.shape)
        self._write()

    @property
    def of(self) -> dict[str, Any]:
        """What the output is of, to the byte."""
        return {"fingerprint": self.fingerprint, "batch": self.batch}

    def add(self, first: int) -> None:
        """Record that the shard that begins with image `first` is written."""
        check_same(self.folder, self.of)
        self.done.add(first)
        self._write()

    def _write(self) -> None:
        write_json(self.path, self.of | {"done": sorted(self.done)})


def check_same(folder: Path, of: dict[str, Any]) -> None:
    """Raises UserError if the output in `folder` is not of this any more."""
    try:
        begun = json.loads((folder / PROGRESS).read_text())
    except FileNotFoundError:
        begun = {}
    if {key: begun.get(key) for key in of} != of:
        raise UserError(f"{folder}: another process has begun to upscale there; run `dvc repro` again")


def _finished(worker: Worker, shards: list[int], workers: int) -> Iterator[int]:
    if workers == 1 or len(shards) < 2:
        yield from map(worker, shards)
        return
    from pipelines.launch import spread  # Ray, which one process does not need

    yield from spread(worker, shards, min(workers, len(shards)), worker.machine.device)


def _is_network(config: SuperResolution) -> bool:
    return METHODS[config.method].interpolate is None


def _keeps_grey(worker: Worker, images: Images) -> bool:
    """Whether the output is stored in grey: the input is grey, and so are 99 % of the pixels that the method makes."""
    if images.ndim == 4:
        return False
    if not _is_network(worker.config):
        return True
    chosen = np.unique(np.linspace(0, len(images) - 1, PROBED).astype(int))
    larger = worker.load()(images[chosen], 1).astype(np.int16)
    spread = larger.max(-1) - larger.min(-1)
    return bool(np.percentile(spread, 99) <= GREY)


def fingerprint(worker: Worker, shape: tuple[int, ...]) -> str:
    """SHA-256 of all that decides the output: settings, raw images, weights, shard size, output shape and CODE."""
    digest = hashlib.sha256()
    kept = worker.config.model_dump()
    digest.update(json.dumps([kept, sha256(Path(worker.raw)), _weights_digest(worker), SHARD, shape]).encode())
    for path in sorted(path for pattern in CODE for path in ROOT.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _weights_digest(worker: Worker) -> str | None:
    """Of the files that the method may read; None where it reads none, as when the network comes from the hub."""
    if not _is_network(worker.config) or worker.config.hub_id is not None:
        return None
    weights = Path(worker.machine.weights)
    files = [weights, *sorted(weights.rglob("*"))]
    files = [path for path in files if path.is_file() and path.suffix != ".md"]
    return hashlib.sha256("".join(sha256(path) for path in files).encode()).hexdigest() if files else None


def _facts(images: Images, worker: Worker) -> dict[str, Any]:
    """What was done, and how well the method and bicubic restore images that were shrunk by `scale`."""
    config = worker.config
    facts: dict[str, Any] = {"method": config.method, "scale": config.scale, "raw_shape": list(images.shape[1:])}
    if config.scale == 1:
        return facts
    if _is_network(config):
        facts |= {"precision": config.precision, "weights": _weights_digest(worker), "batch": worker.batch}
        facts["hub_id"] = config.hub_id
    chosen = images[np.unique(np.linspace(0, len(images) - 1, JUDGED).astype(int))]
    if min(chosen.shape[1:3]) >= 11 + config.scale:  # what is left after cropping must hold the window of SSIM
        facts["restored"] = {
            config.method: down_then_up(chosen, worker.method, config.scale),
            "bicubic": down_then_up(chosen, lambda small: bicubic(small, config.scale), config.scale),
        }
    return facts


if __name__ == "__main__":
    run(upscale)
