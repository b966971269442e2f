"""Spatial transformer in front of a backbone (Jaderberg et al. 2015, arXiv 1506.02025, as in arXiv 2204.02181)."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST = 18  # pixels: the localization map is 1x1


class SpatialTransformer(nn.Module):
    """One learned affine warp per image, initially the identity. [B, channels, side, side] -> same shape.

    3 channels and side 384: 2,711,904 parameters.
    """

    def __init__(self, side: int, channels: int):
        super().__init__()
        self.localization = nn.Sequential(
            nn.Conv2d(channels, 8, 7), nn.MaxPool2d(2), nn.ReLU(inplace=True),
            nn.Conv2d(8, 10, 5), nn.MaxPool2d(2), nn.ReLU(inplace=True),
        )  # fmt: skip
        left = ((side - 6) // 2 - 4) // 2
        affine = nn.Linear(32, 6)
        nn.init.zeros_(affine.weight)
        with torch.no_grad():
            affine.bias.copy_(torch.tensor([1.0, 0, 0, 0, 1, 0]))
        self.fc_loc = nn.Sequential(nn.Linear(10 * left * left, 32), nn.ReLU(inplace=True), affine)

    def forward(self, images: Tensor) -> Tensor:
        # never in half precision, where theta and the grid are off by pixels; the meta device has no autocast
        exact: AbstractContextManager = nullcontext()
        if not images.is_meta:
            exact = torch.autocast(images.device.type, enabled=False)
        with exact:
            grid = F.affine_grid(self.theta(images), list(images.shape), align_corners=True)
            return F.grid_sample(images, grid, mode="bilinear", align_corners=True)

    def theta(self, images: Tensor) -> Tensor:
        """The warp of each image, [B, 2, 3]: from the place in what is returned to the place in `images`."""
        return self.fc_loc(self.localization(images).flatten(1)).view(-1, 2, 3)
