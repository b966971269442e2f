"""The table of super-resolution methods, and what makes one of them ready to upscale batches of images."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fer.device import autocast, pick_device
from fer.errors import UserError
from fer.super_resolution.dic import load_dic
from fer.super_resolution.interpolation import bicubic, lanczos, none
from fer.super_resolution.swin2sr import PUBLISHED, load_swin2sr

WEIGHTS = "super_resolution.weights"
DIC_FILE = "DIC_HELEN.pth"
OUT_OF_MEMORY = "super_resolution: one image does not fit into the GPU's memory; free it or set device: cpu"
BATCH = 16  # images that a network sees at once: a GPU is busy with these, and other numbers round otherwise
# uint8 [N, H, W(, 3)] and images per batch -> uint8 [N, scale H, scale W(, 3)]
Upscale = Callable[[np.ndarray, int], np.ndarray]


@dataclass(frozen=True)
class Method:
    """`interpolate(images, scale)` on the CPU, or `load(weights, scale, hub_id)`: a network [B, 3, H, W] in [0, 1]."""

    scales: tuple[int, ...] | None = None  # None: any
    interpolate: Callable[[np.ndarray, int], np.ndarray] | None = None
    load: Callable[[Path, int, str | None], nn.Module] | None = None


def _dic(weights: Path, scale: int, hub_id: str | None) -> nn.Module:
    file = weights / DIC_FILE if weights.is_dir() else weights
    if not file.exists():
        raise UserError(
            f"{WEIGHTS}: {file} not found; its authors link it at github.com/Maclory/Deep-Iterative-Collaboration; "
            "put it there, or choose super_resolution.method bicubic"
        )
    return load_dic(file, WEIGHTS)


def _swin2sr(weights: Path, scale: int, hub_id: str | None) -> nn.Module:
    """Of the hub, if an id is given; else from the folder, where it holds a network; else the published one."""
    if hub_id is not None:
        return load_swin2sr(hub_id, scale, "super_resolution.hub_id")
    if not weights.exists():
        raise UserError(f"{WEIGHTS}: {weights} not found; name a folder, an empty one for the network of the hub")
    local = (weights / "config.json").exists()
    return load_swin2sr(str(weights) if local else PUBLISHED[scale], scale, WEIGHTS)


METHODS = {
    "none": Method(scales=(1,), interpolate=none),
    "bicubic": Method(interpolate=bicubic),
    "lanczos": Method(interpolate=lanczos),
    "dic": Method(scales=(8,), load=_dic),
    "swin2sr": Method(scales=tuple(PUBLISHED), load=_swin2sr),
}


class NetworkUpscaler:
    """A network that takes and gives uint8 images, always in whole batches and, on the CPU, with one thread.

    So an image's bytes depend on its place in the batch at most, never on how many images come with it.
    """

    def __init__(self, network: Any, device: torch.device, precision: str):
        self.device, self.precision = device, precision
        self.network = network.to(device=device, memory_format=torch.channels_last).eval()

    def __call__(self, images: np.ndarray, batch: int) -> np.ndarray:
        """uint8 [N, H, W] or [N, H, W, 3], N >= 1 -> uint8 [N, scale H, scale W, 3].

        Raises torch.OutOfMemoryError, and UserError when a result is no number.
        """
        with _one_thread(self.device):
            return np.concatenate(
                [self._batch(images[first : first + batch], batch) for first in range(0, len(images), batch)]
            )

    @torch.inference_mode()
    def _batch(self, images: np.ndarray, batch: int) -> np.ndarray:
        filled = np.concatenate([images, *[images[-1:]] * (batch - len(images))])
        pixels = torch.from_numpy(filled).to(self.device)
        colour = pixels.unsqueeze(1).expand(-1, 3, -1, -1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        inputs: Tensor = (colour.float() / 255).contiguous(memory_format=torch.channels_last)
        with autocast(self.precision, self.device):
            larger = self.network(inputs).float()
        if not torch.isfinite(larger).all():
            raise UserError(
                f"super_resolution: the network gives pixels that are no numbers with precision {self.precision}; "
                "set it to fp32, or use other weights"
            )
        larger = (larger * 255).round().clamp(0, 255).to(torch.uint8)
        return larger[: len(images)].permute(0, 2, 3, 1).cpu().numpy()


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """Sums are split over a CPU's threads, and rounded by how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if device.type == "cpu" else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def build_upscaler(
    method: str, scale: int, weights: str | Path, hub_id: str | None, precision: str, device: str
) -> Upscale:
    """The method, with its weights loaded. Raises UserError when they cannot be had or do not fit `scale`."""
    row = METHODS[method]
    if row.interpolate is not None:
        interpolate = row.interpolate
        return lambda images, batch: interpolate(images, scale)
    assert row.load is not None
    place = pick_device(device, "super_resolution.device")
    return NetworkUpscaler(row.load(Path(weights), scale, hub_id), place, precision)
