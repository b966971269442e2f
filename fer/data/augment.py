"""Augmentation of training images, batch by batch, on the device of the batch.

All random numbers of a step come from one seed, so a resumed run can repeat a step without the ones before it.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fer.input import Change, luma
from fer.settings import Fraction, NonNegative, Section


class Augment(Section):
    """Random changes of training images; evaluation uses none of them."""

    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    rotation: Annotated[float, Field(ge=0, le=180)] = 10.0
    """The angle is uniform in +-rotation, degrees."""
    scale: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The zoom is uniform in 1 +- scale."""
    stretch: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Each axis is zoomed by a factor of its own as well, uniform in 1 +- stretch."""
    skew: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Each axis is sheared along the other one by a tangent uniform in +-skew."""
    translation: Fraction = 0.06
    """The shift along each axis is uniform in +-translation, as a fraction of the side."""
    brightness: NonNegative = 0.2
    """The brightness factor is uniform in 1 +- brightness."""
    contrast: NonNegative = 0.2
    """The contrast factor, around the mean of the image, is uniform in 1 +- contrast."""
    saturation: NonNegative = 0.0
    """The saturation factor, around the luma of each pixel, is uniform in 1 +- saturation; no effect on grey images."""
    erasing: Fraction = 0.0
    """Probability that a random rectangle is set to the mean of the image."""
    mixup: NonNegative = 0.0
    """a of Beta(a, a), from which the weight of the other image is drawn, e.g. 0.2; 0: off."""
    cutmix: NonNegative = 0.0
    """a of Beta(a, a), from which the area of another image's patch is drawn, e.g. 1.0; with mixup, one is chosen."""

    @property
    def changes_images(self) -> bool:
        """Whether anything is switched on."""
        return any(self.model_dump().values())


class Augmenter:
    """Random flip, rotation, zoom, shear and shift in one warp, then brightness to erasing; in place.

    Every rank draws the random numbers of the whole batch and uses its part, so a run sees the same images on any
    number of workers.
    """

    PER_IMAGE = 13  # random numbers

    def __init__(self, settings: Augment, device: torch.device):
        self.settings = settings
        self.generator = torch.Generator(device)

    def draw(self, batch_size: int, seed: int) -> Tensor:
        """Uniform numbers for a batch, [batch_size, PER_IMAGE], or 4 more with stretch or skew."""
        self.generator.manual_seed(seed)
        sizes = [self.PER_IMAGE, 4] if self.settings.stretch or self.settings.skew else [self.PER_IMAGE]
        device = self.generator.device
        return torch.cat([torch.rand(batch_size, n, generator=self.generator, device=device) for n in sizes], 1)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """float32 [b, C, S, S] in [0, 1] and a row of `draw` each -> same shape and range; may overwrite `images`."""
        return self.changes(draws, images.shape[-1])(images, slice(None))

    def changes(self, draws: Tensor, side: int) -> Change:
        """The augmentation that the `draws` of a batch describe, for images of `side` pixels.

        Its parameters are computed for the whole batch at once. It may overwrite the images it is given.
        """
        made = (make(draws, side) for make in (self._warp, self._jitter, self._saturate, self._erase))
        changes = [change for change in made if change is not None]

        def change(images: Tensor, rows: slice) -> Tensor:
            for one in changes:
                images = one(images, rows)
            return images

        return change

    def _warp(self, draws: Tensor, side: int) -> Change | None:
        s = self.settings
        if not (s.flip or s.rotation or s.scale or s.stretch or s.skew or s.translation):
            return None
        angle = torch.deg2rad((2 * draws[:, 0] - 1) * s.rotation)
        zoom = 1 + (2 * draws[:, 1] - 1) * s.scale
        flip = torch.where(draws[:, 2] < s.flip, -1.0, 1.0)
        shift = (2 * draws[:, 3:5] - 1) * 2 * s.translation  # grid coordinates run from -1 to 1, so a side is 2
        cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
        across, down = torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)  # where the axes point in the image
        if s.stretch or s.skew:
            factors = 1 + (2 * draws[:, self.PER_IMAGE : self.PER_IMAGE + 2] - 1) * s.stretch
            tangents = (2 * draws[:, self.PER_IMAGE + 2 :] - 1) * s.skew
            across, down = across + tangents[:, :1] * down, down + tangents[:, 1:] * across
            across, down = across / factors[:, :1], down / factors[:, 1:]
        line = (2 * torch.arange(side, device=draws.device) + 1) / side - 1
        by_column = ((across * flip[:, None])[..., None] * line)[:, :, None, :]  # [B, 2, 1, S]
        by_row = (down[..., None] * line + shift[..., None])[..., None]  # [B, 2, S, 1]
        furthest = 2**0.5 / (1 - s.scale) * (1 + s.skew) / (1 - s.stretch) + 2 * s.translation
        once = furthest <= 3  # at most one reflection, for which 2 clamp(x) - x is faster

        def warp(images: Tensor, rows: slice) -> Tensor:
            # two planes viewed as [b, S, S, 2]: faster than the interleaved pairs that affine_grid makes
            grid = by_column[rows] + by_row[rows]
            if once:
                grid.lerp_(grid.clamp(-1, 1), 2.0)
            padding = "border" if once else "reflection"
            return F.grid_sample(images, grid.permute(0, 2, 3, 1), padding_mode=padding, align_corners=False)

        return warp

    def _jitter(self, draws: Tensor, side: int) -> Change | None:
        """Brightness b, then contrast c around the mean m: c b x + (1 - c) b m."""
        s = self.settings
        if not s.brightness and not s.contrast:
            return None
        bright = (1 + (2 * draws[:, 5] - 1) * s.brightness).view(-1, 1, 1, 1)
        contrast = (1 + (2 * draws[:, 6] - 1) * s.contrast).view(-1, 1, 1, 1)
        of_pixel, of_mean = bright * contrast, bright * (1 - contrast)

        def jitter(images: Tensor, rows: slice) -> Tensor:
            rest = images.mean((1, 2, 3), keepdim=True) * of_mean[rows]
            return images.mul_(of_pixel[rows]).add_(rest).clamp_(0, 1)

        return jitter

    def _saturate(self, draws: Tensor, side: int) -> Change | None:
        if not self.settings.saturation:
            return None
        factor = (1 + (2 * draws[:, 12] - 1) * self.settings.saturation).view(-1, 1, 1, 1)

        def saturate(images: Tensor, rows: slice) -> Tensor:
            if images.shape[1] == 1:
                return images
            grey = luma(images)
            return ((images - grey) * factor[rows] + grey).clamp(0, 1)

        return saturate

    def _erase(self, draws: Tensor, side: int) -> Change | None:
        if not self.settings.erasing:
            return None
        height, width = (0.15 + 0.3 * draws[:, 8:10]).unbind(1)  # fractions of the side: 2 to 20 % of the area
        top, left = draws[:, 10] * (1 - height), draws[:, 11] * (1 - width)
        line = (torch.arange(side, device=draws.device) + 0.5) / side
        chosen = (draws[:, 7] < self.settings.erasing)[:, None]
        of_rows = (line >= top[:, None]) & (line < (top + height)[:, None]) & chosen  # [B, S]
        of_columns = (line >= left[:, None]) & (line < (left + width)[:, None])

        def erase(images: Tensor, rows: slice) -> Tensor:
            mask = of_rows[rows, None, :, None] & of_columns[rows, None, None, :]
            return torch.where(mask, images.mean((1, 2, 3), keepdim=True), images)

        return erase


@dataclass(frozen=True)
class Mixture:
    """How a batch is mixed: each image with its neighbour, a random one since the order is shuffled."""

    share: float  # weight of the image itself, in pixels and loss: .5 to 1, of a patch after rounding to whole pixels
    box: tuple[slice, slice] | None  # CutMix: rows and columns of the patch; None: mixup
    own: bool = False  # whether the patch is of the image itself, and the neighbour around it

    @staticmethod
    def partner(images: Tensor) -> Tensor:
        """For [b, ...] the partners 1, 0, 3, 2, ..., int64 [b] on its device; an odd last image is its own partner."""
        return torch.arange(len(images), device=images.device).bitwise_xor(1).clamp_(max=len(images) - 1)

    def __call__(self, images: Tensor) -> Tensor:
        """Float [b, C, S, S] -> the mixed images, same shape."""
        others = images[self.partner(images)]
        if self.box is None:
            return torch.lerp(others, images, self.share)
        around, within = (others, images) if self.own else (images, others)
        mixed = around.clone()
        mixed[:, :, *self.box] = within[:, :, *self.box]
        return mixed


def draw_mixture(settings: Augment, side: int, seed: int) -> Mixture | None:
    """Mixup (Zhang et al. 2018, arXiv 1710.09412) or CutMix (Yun et al. 2019, arXiv 1905.04899) of one batch.

    If both are on, one is chosen at random for each batch, with odds cutmix : mixup. `share` is the larger of the two
    parts, which is no restriction, since either image may come first: a patch that fills more than half is the image's
    own, with the neighbour around it.
    """
    if not (settings.mixup or settings.cutmix):
        return None
    random = np.random.default_rng(seed)
    cut = random.random() < settings.cutmix / (settings.cutmix + settings.mixup) if settings.cutmix else False
    alpha = settings.cutmix if cut else settings.mixup
    share = random.beta(alpha, alpha)
    if not cut:
        return Mixture(max(share, 1 - share), None)
    half = side * (1 - share) ** 0.5 / 2
    rows, columns = (
        slice(round(max(0, centre - half)), round(min(side, centre + half))) for centre in side * random.random(2)
    )
    area = (rows.stop - rows.start) * (columns.stop - columns.start) / side**2
    return Mixture(max(area, 1 - area), (rows, columns), area > 0.5)
