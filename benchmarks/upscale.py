"""Super-resolution in batches against a plain loop: one image at a time, fp32, torch's default memory layout."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from fer.super_resolution.dic import PUBLISHED, Dic
from fer.super_resolution.methods import BATCH, METHODS
from fer.super_resolution.networks import NetworkUpscaler

Case = tuple[str, Callable[[], int], str, Callable[[], int]]


def cases(device: torch.device) -> Iterator[Case]:
    """Name, our function, name of the reference, reference; each function returns the number of images it processed.

    The networks have the published sizes and random weights, which does not change their speed.
    """
    from transformers import Swin2SRConfig, Swin2SRForImageSuperResolution

    rng = np.random.default_rng(0)
    faces = rng.integers(0, 256, (512, 48, 48), dtype=np.uint8)
    for name, kernel in (("bicubic", Image.Resampling.BICUBIC), ("lanczos", Image.Resampling.LANCZOS)):
        yield _interpolation(name, kernel, faces)
    gpu = device.type == "cuda"
    # a CPU needs minutes for one 48x48 face
    few = faces[:64] if gpu else np.ascontiguousarray(faces[:4, :16, :16])
    yield _network("DIC x8", Dic(**PUBLISHED), few, device)
    sizes: dict[str, Any] = {"depths": [6] * 6, "num_heads": [6] * 6, "embed_dim": 180, "window_size": 8}
    config = Swin2SRConfig(**sizes, image_size=64, upscale=4, upsampler="pixelshuffle")
    yield _network("Swin2SR x4", _Bare(Swin2SRForImageSuperResolution(config)), few, device)


class _Bare(nn.Module):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images).reconstruction.clamp(0, 1)


def _interpolation(name: str, kernel: Image.Resampling, faces: np.ndarray) -> Case:
    interpolate = METHODS[name].interpolate
    assert interpolate is not None

    def plain() -> int:
        for face in faces:
            np.asarray(Image.fromarray(face).resize((384, 384), kernel))
        return len(faces)

    return f"{name} x8, 48x48", lambda: len(interpolate(faces, 8)), "Pillow, one at a time", plain


def _network(name: str, network: nn.Module, faces: np.ndarray, device: torch.device) -> Case:
    plain_network = copy.deepcopy(network).to(device).eval()  # `NetworkUpscaler` changes its memory layout
    precision = "bf16" if device.type == "cuda" else "fp32"

    ours = NetworkUpscaler(network, device, precision)

    @torch.inference_mode()
    def plain() -> int:
        for face in faces:
            image = torch.from_numpy(face).to(device).expand(1, 3, -1, -1).float() / 255
            (plain_network(image) * 255).round().clamp(0, 255).to(torch.uint8).cpu()
        return len(faces)

    def batched() -> int:
        return len(ours(faces, min(BATCH, len(faces))))

    side = faces.shape[1]
    return f"{name}, {side}x{side}, {precision}", batched, "fp32, one at a time", plain
