"""The table of super-resolution methods, and what makes one of them ready to upscale batches of images."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fer.device import autocast
from fer.errors import UserError
from fer.super_resolution.dic import load_dic
from fer.super_resolution.interpolation import bicubic, lanczos, none
from fer.super_resolution.swin2sr import PUBLISHED, load_swin2sr

WEIGHTS = "super_resolution.weights"
DIC_FILE = "DIC_HELEN.pth"
Upscale = Callable[[np.ndarray], np.ndarray]  # uint8 [B, H, W(, 3)] -> uint8 [B, scale H, scale W(, 3)]


@dataclass(frozen=True)
class Method:
    """`interpolate(images, scale)` on the CPU, or `load(weights, scale)`: a network [B, 3, H, W] in [0, 1]."""

    scales: tuple[int, ...] | None = None  # None: any
    interpolate: Callable[[np.ndarray, int], np.ndarray] | None = None
    load: Callable[[Path, int], nn.Module] | None = None


def _dic(weights: Path, scale: int) -> nn.Module:
    file = weights / DIC_FILE if weights.is_dir() else weights
    if not file.exists():
        raise UserError(
            f"{WEIGHTS}: {file} not found; its authors link it at github.com/Maclory/Deep-Iterative-Collaboration; "
            "put it there, or choose super_resolution.method bicubic"
        )
    return load_dic(file, WEIGHTS)


def _swin2sr(weights: Path, scale: int) -> nn.Module:
    """From the folder, where it holds a network; else from the hub."""
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
    """A network that takes and gives uint8 images; halves its batch, for good, when memory runs out."""

    def __init__(self, network: Any, device: torch.device, precision: str, batch_size: int):
        self.device, self.precision, self.batch_size = device, precision, batch_size
        self.network = network.to(device=device, memory_format=torch.channels_last).eval()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W] or [B, H, W, 3], B >= 1 -> uint8 [B, scale H, scale W, 3].

        Raises UserError when one image alone does not fit, or a result is no number.
        """
        found: list[np.ndarray] = []
        done = 0
        while done < len(images):
            try:
                part = self._batch(images[done : done + self.batch_size])
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise UserError(
                        "super_resolution: one image does not fit into the GPU's memory; free it or set device: cpu"
                    ) from None
                self.batch_size //= 2
                torch.cuda.empty_cache()
                continue
            found.append(part)
            done += len(part)
        return np.concatenate(found)

    @torch.inference_mode()
    def _batch(self, images: np.ndarray) -> np.ndarray:
        if len(images) == 1:  # its kernels round otherwise than those for several
            return self._batch(np.concatenate([images, images]))[:1]
        pixels = torch.from_numpy(np.array(images)).to(self.device)  # a copy: torch wants what it may write to
        colour = pixels.unsqueeze(1).expand(-1, 3, -1, -1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        batch: Tensor = (colour.float() / 255).contiguous(memory_format=torch.channels_last)
        with autocast(self.precision, self.device):
            larger = self.network(batch).float()
        if not torch.isfinite(larger).all():
            raise UserError(
                f"super_resolution: the network gives pixels that are no numbers with precision {self.precision}; "
                "set it to fp32, or use other weights"
            )
        return (larger * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def build_upscaler(
    method: str, scale: int, weights: str | Path, precision: str, batch_size: int, device: torch.device
) -> Upscale:
    """The method, with its weights loaded. Raises UserError when they cannot be had or do not fit `scale`."""
    row = METHODS[method]
    if row.interpolate is not None:
        interpolate = row.interpolate
        return lambda images: interpolate(images, scale)
    assert row.load is not None
    return NetworkUpscaler(row.load(Path(weights), scale), device, precision, batch_size)
