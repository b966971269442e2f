"""Random changes of training images, in batches, on the device of the batch.

Every random number of a step comes from one seed, so that a step can be repeated without those before it.
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
    """Random changes of a training image; evaluation sees none of them."""

    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    rotation: Annotated[float, Field(ge=0, le=180)] = 10.0
    """Degrees; the angle is uniform in +-rotation."""
    scale: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The zoom is uniform in 1 +- scale."""
    translation: Fraction = 0.06
    """Share of the side; the shift is uniform in +-translation on each axis."""
    brightness: NonNegative = 0.2
    """The factor on brightness is uniform in 1 +- brightness."""
    contrast: NonNegative = 0.2
    """The factor on contrast, around the image's mean, is uniform in 1 +- contrast."""
    saturation: NonNegative = 0.0
    """The factor on saturation, around each pixel's luma, is uniform in 1 +- saturation; grey images have none."""
    erasing: Fraction = 0.0
    """Probability that one random rectangle is set to the image's mean."""
    mixup: NonNegative = 0.0
    """a of Beta(a, a), from which the share of the other image is drawn, e.g. 0.2; 0: off."""
    cutmix: NonNegative = 0.0
    """a of Beta(a, a), from which the other image's share of the area is drawn, e.g. 1.0; beside mixup: by chance."""
    unmixed_epochs: Annotated[int, Field(ge=0)] = 0
    """Epochs at the end of training without mixup and cutmix."""

    @property
    def changes_images(self) -> bool:
        return any(self.model_dump(exclude={"unmixed_epochs"}).values())


class Augmenter:
    """Random flip, rotation, zoom and shift in one warp, then brightness, contrast, saturation and erasing; in place.

    The random numbers of a whole batch are drawn on every rank and each takes its part, so that a run gives the same
    images on any number of workers.
    """

    PER_IMAGE = 13

    def __init__(self, settings: Augment, device: torch.device):
        self.settings = settings
        self.generator = torch.Generator(device)

    def draw(self, batch_size: int, seed: int) -> Tensor:
        """Uniform numbers for a batch, [batch_size, PER_IMAGE]."""
        self.generator.manual_seed(seed)
        return torch.rand(batch_size, self.PER_IMAGE, generator=self.generator, device=self.generator.device)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """float32 [b, C, S, S] in [0, 1] and [b, PER_IMAGE] -> same shape and range; `images` may be overwritten."""
        return self.changes(draws, images.shape[-1])(images, slice(None))

    def changes(self, draws: Tensor, side: int) -> Change:
        """What `draws` [B, PER_IMAGE] make of images of `side` px, worked out for the whole batch at once.

        Images given to it may be overwritten.
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
        if not (s.flip or s.rotation or s.scale or s.translation):
            return None
        angle = torch.deg2rad((2 * draws[:, 0] - 1) * s.rotation)
        zoom = 1 + (2 * draws[:, 1] - 1) * s.scale
        flip = torch.where(draws[:, 2] < s.flip, -1.0, 1.0)
        shift = (2 * draws[:, 3:5] - 1) * 2 * s.translation  # the grid runs from -1 to 1: a side is 2
        cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
        line = (2 * torch.arange(side, device=draws.device) + 1) / side - 1
        by_column = (torch.stack([cos * flip, sin * flip], 1)[..., None] * line)[:, :, None, :]  # [B, 2, 1, S]
        by_row = (torch.stack([-sin, cos], 1)[..., None] * line + shift[..., None])[..., None]  # [B, 2, S, 1]
        once = 2**0.5 / (1 - s.scale) + 2 * s.translation <= 3  # one reflection at most: 2 clamp(x) - x is faster

        def warp(images: Tensor, rows: slice) -> Tensor:
            # two planes seen as [b, S, S, 2]: faster than pairs of numbers, of which affine_grid makes them
            grid = by_column[rows] + by_row[rows]
            if once:
                grid.lerp_(grid.clamp(-1, 1), 2.0)
            padding = "border" if once else "reflection"
            return F.grid_sample(images, grid.permute(0, 2, 3, 1), padding_mode=padding, align_corners=False)

        return warp

    def _jitter(self, draws: Tensor, side: int) -> Change | None:
        """b x, then its contrast c around the mean m of that: c b x + (1 - c) b m."""
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
        height, width = (0.15 + 0.3 * draws[:, 8:10]).unbind(1)  # shares of the side: 2 to 20 % of the area
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
    """What a batch is mixed with: image i and its neighbour, which the shuffled order made a random one."""

    share: float  # of the image itself in pixels and loss, .5 to 1
    box: tuple[slice, slice] | None  # cutmix: rows and columns that come from the neighbour; None: mixup

    @staticmethod
    def partner(images: Tensor) -> Tensor:
        """For [b, ...] the index 1, 0, 3, 2, ..., int64 [b] on its device; a last one alone is its own."""
        return torch.arange(len(images), device=images.device).bitwise_xor(1).clamp_(max=len(images) - 1)

    def __call__(self, images: Tensor) -> Tensor:
        """Float [b, C, S, S] -> the mixed images, same shape."""
        others = images[self.partner(images)]
        if self.box is None:
            return torch.lerp(others, images, self.share)
        mixed = images.clone()
        mixed[:, :, *self.box] = others[:, :, *self.box]
        return mixed


def draw_mixture(settings: Augment, side: int, seed: int) -> Mixture | None:
    """Mixup (Zhang et al. 2018, arXiv 1710.09412) or CutMix (Yun et al. 2019, arXiv 1905.04899) of one batch.

    Where both are on, each batch gets one of them by chance. The share is that of the larger part, as either image may
    stand for the first.
    """
    if not (settings.mixup or settings.cutmix):
        return None
    random = np.random.default_rng(seed)
    cut = random.random() < settings.cutmix / (settings.cutmix + settings.mixup) if settings.cutmix else False
    alpha = settings.cutmix if cut else settings.mixup
    share = random.beta(alpha, alpha)
    share = max(share, 1 - share)
    if not cut:
        return Mixture(share, None)
    half = side * (1 - share) ** 0.5 / 2
    rows, columns = (
        slice(round(max(0, centre - half)), round(min(side, centre + half))) for centre in side * random.random(2)
    )
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return Mixture(1 - area / side**2, (rows, columns))
