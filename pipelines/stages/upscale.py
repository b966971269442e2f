"""Stage upscale: data/raw/images.npy -> data/upscaled/images.npy, same order, larger by `super_resolution.scale`.

The images are divided into shards, each written when it is done; a stage that was killed goes on with the next one.
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
import torch
from tqdm import tqdm

from fer.data.images import allocate_images, open_images, sha256, write_rows
from fer.errors import UserError
from fer.files import new_folder, write_json
from fer.super_resolution.methods import BATCH, METHODS, OUT_OF_MEMORY, Upscale, build_upscaler
from fer.super_resolution.quality import down_then_up, grey
from pipelines.params import Params, SuperResolution
from pipelines.stages import run

RAW = Path("data/raw/images.npy")
UPSCALED = Path("data/upscaled")
ROOT = Path(__file__).resolve().parents[2]
# what the images' bytes depend on, as in dvc.yaml
CODE = (
    "pipelines/stages/upscale.py",
    "fer/super_resolution/*.py",
    "fer/data/images.py",
    "fer/device.py",
    "fer/weights.py",
)
SHARD = 256  # images
GREY = 4  # of 255: an image whose three colours differ by no more is stored grey
PROBED = 4  # images that tell whether a network keeps grey images grey
JUDGED = 256  # images for the quality of a method


def upscale(params: Params) -> None:
    """Upscale all images, shard by shard, in this process or in several."""
    config = params.super_resolution
    images = open_images(RAW, "download")
    worker = Worker(config, str(RAW.resolve()))
    worker.load()  # a mistake comes up before anything is written
    worker.stored_grey = _keeps_grey(worker, images)
    count, height, width, *channels = images.shape
    colour = [] if worker.stored_grey else channels or [3] * (METHODS[config.method].load is not None)
    shape = (count, height * config.scale, width * config.scale, *colour)
    with new_folder(UPSCALED, resumable=True) as folder:
        progress = Shards(folder, _fingerprint(config, shape), shape)
        worker.out = str(folder.resolve() / "images.npy")
        while True:
            worker.batch = progress.batch
            torch.cuda.empty_cache()
            try:
                _work_off(worker, progress, config.workers)
                facts = _facts(config, images, worker)
                break
            except torch.OutOfMemoryError:
                progress.halve()
        write_json(folder / "upscale.json", facts)
        progress.path.unlink()


def _work_off(worker: "Worker", progress: "Shards", workers: int) -> None:
    """Every shard that is not done, in this process or in several."""
    count = progress.shape[0]
    shards = [first for first in range(0, count, SHARD) if first not in progress.done]
    with tqdm(total=count, desc="upscale", unit="image", disable=None) as bar:
        bar.update(count - sum(min(SHARD, count - first) for first in shards))
        for first in _finished(worker, shards, workers):
            progress.add(first)
            bar.update(min(SHARD, count - first))


class Worker:
    """Upscales shards of the raw images into the output file; goes to other processes without its network."""

    def __init__(self, config: SuperResolution, raw: str):
        self.config, self.raw, self.out, self.stored_grey, self.batch = config, raw, "", False, BATCH
        self._upscaler: Upscale | None = None

    def load(self) -> Upscale:
        if self._upscaler is None:
            c = self.config
            self._upscaler = build_upscaler(c.method, c.scale, c.weights, c.hub_id, c.precision, c.device)
        return self._upscaler

    def method(self, images: np.ndarray) -> np.ndarray:
        return self.load()(images, self.batch)

    def __call__(self, first: int) -> int:
        """Upscale the images from row `first` on; gives `first`."""
        larger = self.method(np.load(self.raw, mmap_mode="r")[first : first + SHARD])
        write_rows(Path(self.out), first, grey(larger) if self.stored_grey else larger)
        return first

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_upscaler": None}


@dataclass
class Shards:
    """Which shards are in the output, and how many images a network saw at once.

    Begun anew where settings, weights, input or code are not those it began with.
    """

    folder: Path
    fingerprint: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        self.path = self.folder / "progress.json"
        self.done: set[int] = set()
        self.batch = BATCH
        try:
            begun = json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError):  # cut by a power failure
            begun = {}
        if begun.get("fingerprint") == self.fingerprint:
            self.done = set(begun["done"])
            self.batch = begun["batch"] if self.done else BATCH  # where nothing is done, there may be room now
            return
        self._begin()

    def halve(self) -> None:
        """Begin anew, as batches of two sizes in one output would make its bytes a matter of chance."""
        if self.batch == 1:
            raise UserError(OUT_OF_MEMORY)
        self.batch //= 2
        print(f"out of memory: all over again with {self.batch} images at once", file=sys.stderr)  # noqa: T201
        self._begin()

    def _begin(self) -> None:
        self.done = set()
        self.path.unlink(missing_ok=True)  # first: what is left of the rest must not pass for whole
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        allocate_images(self.folder / "images.npy", self.shape)
        self._write()

    def add(self, first: int) -> None:
        self.done.add(first)
        self._write()

    def _write(self) -> None:
        write_json(self.path, {"fingerprint": self.fingerprint, "batch": self.batch, "done": sorted(self.done)})


def _finished(worker: Worker, shards: list[int], workers: int) -> Iterator[int]:
    if workers == 1 or len(shards) < 2:
        yield from map(worker, shards)
        return
    from pipelines.launch import spread  # Ray, which a machine with one GPU needs not have

    yield from spread(worker, shards, min(workers, len(shards)), worker.config.device)


def _keeps_grey(worker: Worker, images: np.ndarray) -> bool:
    """Whether the results are stored grey: the images are, and so are 99 % of the pixels that the method makes."""
    if images.ndim == 4:
        return False
    if METHODS[worker.config.method].load is None:
        return True
    chosen = np.unique(np.linspace(0, len(images) - 1, PROBED).astype(int))
    try:
        larger = worker.load()(images[chosen], 1).astype(np.int16)
    except torch.OutOfMemoryError:
        raise UserError(OUT_OF_MEMORY) from None
    spread = larger.max(-1) - larger.min(-1)
    return bool(np.percentile(spread, 99) <= GREY)


def _fingerprint(config: SuperResolution, shape: tuple[int, ...]) -> str:
    digest = hashlib.sha256()
    kept = config.model_dump(include={"method", "scale", "hub_id", "precision"})
    digest.update(json.dumps([kept, sha256(RAW), _weights_digest(config), SHARD, shape]).encode())
    for path in sorted(path for pattern in CODE for path in ROOT.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _weights_digest(config: SuperResolution) -> str | None:
    """Of the files that the method may read; None without any, as where the network comes from the hub."""
    if METHODS[config.method].load is None or config.hub_id is not None:
        return None
    weights = Path(config.weights)
    files = [weights, *sorted(weights.rglob("*"))]
    files = [path for path in files if path.is_file() and path.suffix != ".md"]
    return hashlib.sha256("".join(sha256(path) for path in files).encode()).hexdigest() if files else None


def _facts(config: SuperResolution, images: np.ndarray, worker: Worker) -> dict[str, Any]:
    """What was done, and how well images are restored that were made smaller by `scale` before, also by bicubic."""
    facts: dict[str, Any] = {"method": config.method, "scale": config.scale, "raw_shape": list(images.shape[1:])}
    if config.scale == 1:
        return facts
    if METHODS[config.method].load is not None:
        facts |= {"precision": config.precision, "weights": _weights_digest(config), "batch": worker.batch}
        facts["hub_id"] = config.hub_id
    chosen = images[np.unique(np.linspace(0, len(images) - 1, JUDGED).astype(int))]
    if min(chosen.shape[1:3]) >= 11 + config.scale:  # the window of SSIM
        bicubic = METHODS["bicubic"].interpolate
        assert bicubic is not None
        facts["restored"] = {
            config.method: down_then_up(chosen, worker.method, config.scale),
            "bicubic": down_then_up(chosen, lambda small: bicubic(small, config.scale), config.scale),
        }
    return facts


if __name__ == "__main__":
    run(upscale)
