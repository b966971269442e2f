"""Networks as upscalers: where their weights come from, and how uint8 images pass through them in batches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fer.device import autocast, pick_device
from fer.errors import OutOfMemory, UserError
from fer.super_resolution.dic import load_dic
from fer.super_resolution.swin2sr import PUBLISHED, load_swin2sr

WEIGHTS = "super_resolution.weights"
DIC_FILE = "DIC_HELEN.pth"


def _dic(weights: Path, scale: int, hub_id: str | None) -> nn.Module:
    file = weights / DIC_FILE if weights.is_dir() else weights
    if not file.exists():
        raise UserError(
            f"{WEIGHTS}: {file} not found; download it from the link at "
            "github.com/Maclory/Deep-Iterative-Collaboration, or set super_resolution.method to bicubic"
        )
    return load_dic(file, WEIGHTS)


def _swin2sr(weights: Path, scale: int, hub_id: str | None) -> nn.Module:
    """From the hub where an id is given, else from the folder, or the published network if the folder holds none."""
    if hub_id is not None:
        if Path(hub_id).exists():  # in which DVC would see no change
            raise UserError(f"super_resolution.hub_id: {hub_id} is a folder; name it in super_resolution.weights")
        return load_swin2sr(hub_id, scale, "super_resolution.hub_id")
    if not weights.exists():
        raise UserError(f"{WEIGHTS}: {weights} not found; name a folder; if it is empty, the hub's network is used")
    local = (weights / "config.json").exists()
    return load_swin2sr(str(weights) if local else PUBLISHED[scale], scale, WEIGHTS)


# (weights, scale, hub id) -> a network that maps RGB in [0, 1], [B, 3, H, W] to [B, 3, scale H, scale W]
LOADERS: dict[str, Callable[[Path, int, str | None], nn.Module]] = {"dic": _dic, "swin2sr": _swin2sr}


class NetworkUpscaler:
    """A network as a function of uint8 images. It always sees full batches and, on a CPU, uses one thread.

    That makes the bytes of an image depend on its position in the batch at most, not on how many images there are.
    """

    def __init__(self, network: Any, device: torch.device, precision: str):
        self.device, self.precision = device, precision
        self.network = network.to(device=device, memory_format=torch.channels_last).eval()

    def __call__(self, images: np.ndarray, batch: int) -> np.ndarray:
        """uint8 [N, H, W] or [N, H, W, 3], N >= 1 -> uint8 [N, scale H, scale W, 3].

        Raises OutOfMemory where a smaller batch may fit; UserError where a single image does not fit or the network
        returns NaN or infinity.
        """
        with suppress(torch.OutOfMemoryError), _one_thread(self.device):
            return np.concatenate(
                [self._batch(images[first : first + batch], batch) for first in range(0, len(images), batch)]
            )
        torch.cuda.empty_cache()  # after the error, whose traceback held the tensors
        if batch > 1:
            raise OutOfMemory
        raise UserError("super_resolution: one image does not fit into the GPU's memory; free it or set device: cpu")

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
                f"super_resolution: the network returns NaN or infinity with precision {self.precision}; "
                "set precision to fp32 or use other weights"
            )
        larger = (larger * 255).round().clamp(0, 255).to(torch.uint8)
        return larger[: len(images)].permute(0, 2, 3, 1).cpu().numpy()


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU, how a sum is rounded depends on the number of threads that share it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if device.type == "cpu" else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def build_network(
    method: str, scale: int, weights: Path, hub_id: str | None, precision: str, device: str
) -> NetworkUpscaler:
    """The network `method` on its device. Raises UserError when weights or device are missing or do not fit."""
    place = pick_device(device, "super_resolution.device")
    return NetworkUpscaler(LOADERS[method](weights, scale, hub_id), place, precision)
