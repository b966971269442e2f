"""Stage upscale: data/raw/images.npy -> data/upscaled/images.npy, same order, larger by `super_resolution.scale`."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fer.data.images import open_images, write_images
from fer.files import write_json
from fer.super_resolution.interpolation import METHODS, Upscale
from pipelines.params import Params
from pipelines.stages import new_folder, run

RAW = Path("data/raw/images.npy")
UPSCALED = Path("data/upscaled")


def upscale(params: Params) -> None:
    """Upscale all images in batches, which never stand in memory all at once."""
    config = params.super_resolution
    images = open_images(RAW, "download")
    count, height, width, *channels = images.shape
    shape = (count, height * config.scale, width * config.scale, *channels)
    with new_folder(UPSCALED) as folder:
        batches = _batches(images, METHODS[config.method], config.scale, config.batch_size)
        write_images(folder / "images.npy", shape, batches)
        facts = {"method": config.method, "scale": config.scale, "raw_shape": [height, width, *channels]}
        write_json(folder / "upscale.json", facts)


def _batches(images: np.ndarray, method: Upscale, scale: int, size: int) -> Iterator[np.ndarray]:
    with tqdm(total=len(images), desc="upscale", unit="image", disable=None) as bar:
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            yield method(batch, scale)
            bar.update(len(batch))


if __name__ == "__main__":
    run(upscale)
