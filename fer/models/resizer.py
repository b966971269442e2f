"""Learned image resizer (Talebi & Milanfar 2021, arXiv 2103.09950), as in the Neural Resizer of arXiv 2204.02181."""

import torch.nn.functional as F
from torch import Tensor, nn


class Resizer(nn.Module):
    """[B, channels, H, W] -> [B, channels, size, size]; 3 channels, 1 block, width 16: 12,083 parameters.

    `scale`: the sampling ratio of both bilinear resizes; None: size / input side. The published code samples
    384 -> 224 at 0.584 instead of 224 / 384.
    """

    def __init__(self, size: int, blocks: int, width: int, channels: int, scale: float | None):
        super().__init__()
        self.size, self.scale = size, scale
        self.conv1 = nn.Conv2d(channels, width, 7, padding=3)
        self.conv2 = nn.Conv2d(width, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.resblock = nn.Sequential(*(_Block(width) for _ in range(blocks)))
        self.conv3 = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv4 = nn.Conv2d(width, channels, 7, padding=3)

    def forward(self, images: Tensor) -> Tensor:
        z = F.leaky_relu(self.conv1(images), 0.2)
        z = self.resize(self.bn1(F.leaky_relu(self.conv2(z), 0.2)))
        features = self.bn2(self.conv3(self.resblock(z))) + z
        return self.conv4(features) + self.resize(images)

    def resize(self, images: Tensor) -> Tensor:
        """Bilinear: [B, C, H, W] -> [B, C, size, size]."""
        if self.scale is None:
            return F.interpolate(images, size=(self.size, self.size), mode="bilinear")
        return F.interpolate(images, scale_factor=self.scale, mode="bilinear", recompute_scale_factor=False)


class _Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, images: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.leaky_relu(self.bn1(self.conv1(images)), 0.2))) + images
