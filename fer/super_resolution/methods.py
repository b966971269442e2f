"""The table of super-resolution methods. Importing it does not load torch; building a network does."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fer.super_resolution.interpolation import bicubic, lanczos, none

BATCH = 16  # images per forward pass: enough to keep a GPU busy; another number rounds differently
# images uint8 [N, H, W] or [N, H, W, 3] and the batch size -> uint8 [N, scale H, scale W] or [N, scale H, scale W, 3]
Upscale = Callable[[np.ndarray, int], np.ndarray]


@dataclass(frozen=True)
class Method:
    """One method: `interpolate(images, scale)`, or None for a network, which `networks.LOADERS` loads."""

    scales: tuple[int, ...] | None = None  # None: any
    interpolate: Callable[[np.ndarray, int], np.ndarray] | None = None


METHODS = {
    "none": Method(scales=(1,), interpolate=none),
    "bicubic": Method(interpolate=bicubic),
    "lanczos": Method(interpolate=lanczos),
    "dic": Method(scales=(8,)),
    "swin2sr": Method(scales=(2, 4)),
}


def build_upscaler(
    method: str, scale: int, weights: str | Path, hub_id: str | None, precision: str, device: str
) -> Upscale:
    """The method, with its weights loaded. Raises UserError when they cannot be loaded or do not fit `scale`."""
    interpolate = METHODS[method].interpolate
    if interpolate is not None:
        return lambda images, batch: interpolate(images, scale)
    from fer.super_resolution.networks import build_network  # loads torch, which takes two seconds

    return build_network(method, scale, Path(weights), hub_id, precision, device)
