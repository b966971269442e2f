"""From uint8 batches to what the model sees, on the device of the batch: resize, augment (training only), normalise."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fer.config import Augment, RunConfig


def to_float(pixels: Tensor, image_size: int) -> Tensor:
    """uint8 [B, H, W] or [B, H, W, 3] -> float32 [B, 1 or 3, image_size, image_size] in [0, 1]."""
    images = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    images = images.float() / 255
    if images.shape[-2:] == (image_size, image_size):
        return images
    resized = F.interpolate(images, size=(image_size, image_size), mode="bilinear", antialias=True)
    return resized.clamp(0, 1)


def normalize(images: Tensor, run: RunConfig) -> Tensor:
    """float32 [B, 1 or 3, S, S] in [0, 1] -> the model's input [B, run.channels, S, S]: (x - mean) / std."""
    if images.shape[1] > run.channels:
        images = images.mean(1, keepdim=True)
    mean = torch.tensor(run.pixel_mean, device=images.device).view(1, -1, 1, 1)
    std = torch.tensor(run.pixel_std, device=images.device).view(1, -1, 1, 1)
    return (images - mean) / std


class Augmenter:
    """Random flip, rotation, zoom and shift in one warp, then brightness, contrast, saturation and erasing.

    The random numbers of a whole batch are drawn on every rank and each takes its part, so that a run gives the same
    images on any number of workers.
    """

    PER_IMAGE = 13

    def __init__(self, settings: Augment, seed: int, device: torch.device):
        self.settings = settings
        self.generator = torch.Generator(device).manual_seed(seed)
        self.device = device

    def __call__(self, images: Tensor, batch_size: int, part: slice) -> Tensor:
        """float32 [b, C, S, S] in [0, 1], which is `part` of a batch of `batch_size` images -> same shape and range."""
        draws = torch.rand(batch_size, self.PER_IMAGE, generator=self.generator, device=self.device)[part]
        images = self._warp(images, draws)
        images = self._jitter(images, draws)
        images = self._saturate(images, draws)
        return self._erase(images, draws)

    def _warp(self, images: Tensor, draws: Tensor) -> Tensor:
        s = self.settings
        if not (s.flip or s.rotation or s.scale or s.translation):
            return images
        angle = torch.deg2rad((2 * draws[:, 0] - 1) * s.rotation)
        zoom = 1 + (2 * draws[:, 1] - 1) * s.scale
        flip = torch.where(draws[:, 2] < s.flip, -1.0, 1.0)
        shift = (2 * draws[:, 3:5] - 1) * 2 * s.translation  # the grid runs from -1 to 1: a side is 2
        cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
        matrix = torch.stack(
            [torch.stack([cos * flip, -sin, shift[:, 0]], 1), torch.stack([sin * flip, cos, shift[:, 1]], 1)], 1
        )
        grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)

    def _jitter(self, images: Tensor, draws: Tensor) -> Tensor:
        s = self.settings
        if not s.brightness and not s.contrast:
            return images
        bright = (1 + (2 * draws[:, 5] - 1) * s.brightness).view(-1, 1, 1, 1)
        contrast = (1 + (2 * draws[:, 6] - 1) * s.contrast).view(-1, 1, 1, 1)
        images = images * bright
        mean = images.mean((1, 2, 3), keepdim=True)
        return ((images - mean) * contrast + mean).clamp(0, 1)

    def _saturate(self, images: Tensor, draws: Tensor) -> Tensor:
        if not self.settings.saturation or images.shape[1] == 1:
            return images
        factor = (1 + (2 * draws[:, 12] - 1) * self.settings.saturation).view(-1, 1, 1, 1)
        red, green, blue = images.split(1, 1)
        grey = 0.299 * red + 0.587 * green + 0.114 * blue  # luma of ITU-R BT.601
        return ((images - grey) * factor + grey).clamp(0, 1)

    def _erase(self, images: Tensor, draws: Tensor) -> Tensor:
        if not self.settings.erasing:
            return images
        side = images.shape[-1]
        height, width = (0.15 + 0.3 * draws[:, 8:10]).unbind(1)  # shares of the side: 2 to 20 % of the area
        top, left = draws[:, 10] * (1 - height), draws[:, 11] * (1 - width)
        line = (torch.arange(side, device=images.device) + 0.5) / side
        inside_rows = (line >= top[:, None]) & (line < (top + height)[:, None])
        inside_columns = (line >= left[:, None]) & (line < (left + width)[:, None])
        chosen = (draws[:, 7] < self.settings.erasing).view(-1, 1, 1)
        mask = (inside_rows[:, :, None] & inside_columns[:, None, :] & chosen).unsqueeze(1)
        return torch.where(mask, images.mean((1, 2, 3), keepdim=True), images)
