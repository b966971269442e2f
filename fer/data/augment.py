"""From uint8 batches to what the model sees, on the device of the batch: resize, augment (training only), normalise.

Every random number of a step comes from one seed, so that a step can be repeated without those before it.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from threading import Barrier

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fer.config import Augment, RunConfig

CACHED = 2**18  # pixels that stay in a CPU's cache from one operation to the next


Change = Callable[[Tensor, slice], Tensor]  # images, and in which rows of their batch they stand -> changed images


def model_input(pixels: Tensor, run: RunConfig, change: Change | None = None) -> Tensor:
    """uint8 [B, H, W] or [B, H, W, 3] -> the model's input float32 [B, run.channels, S, S], normalised.

    `change(images, rows)` gets those images float32 [b, 1 or 3, S, S] in [0, 1] that stand in `rows` of the batch: all
    at once on a GPU, on a CPU a few at a time in each of torch's threads.
    """
    count, side, inference = len(pixels), run.image_size, torch.is_inference_mode_enabled()
    found = torch.empty(count, run.channels, side, side, device=pixels.device)

    def make(rows: slice) -> None:
        with torch.inference_mode(inference):  # which a thread does not inherit
            images = to_float(pixels[rows], side)
            normalize(change(images, rows) if change else images, run, found[rows])

    if pixels.device.type != "cpu":
        make(slice(0, count))
        return found
    threads = torch.get_num_threads()
    per_image = max(side, pixels.shape[1]) ** 2 * (1 if pixels.ndim == 3 else 3)
    at_once = max(1, min(CACHED // per_image, -(-count // threads)))
    parts = [slice(first, min(first + at_once, count)) for first in range(0, count, at_once)]
    for _ in _pool(threads).map(make, parts) if threads > 1 else map(make, parts):
        pass
    return found


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """That many threads in which torch uses one each: a few images are too little to be shared out by torch itself."""
    pool, all_here = ThreadPoolExecutor(threads), Barrier(threads)

    def alone(_: int) -> None:
        all_here.wait()
        torch.get_num_threads()  # else the first operation takes back what is set here
        torch.set_num_threads(1)

    list(pool.map(alone, range(threads)))
    torch.set_num_threads(threads)  # for threads that are yet to start
    return pool


def to_float(pixels: Tensor, image_size: int) -> Tensor:
    """uint8 [B, H, W] or [B, H, W, 3] -> float32 [B, 1 or 3, image_size, image_size] in [0, 1]."""
    images = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    images = images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    if images.shape[-2:] == (image_size, image_size):
        return images
    resized = F.interpolate(images, size=(image_size, image_size), mode="bilinear", antialias=True)
    return resized.clamp_(0, 1)


def normalize(images: Tensor, run: RunConfig, out: Tensor) -> None:
    """float32 [B, 1 or 3, S, S] in [0, 1] -> (x - mean) / std in `out` [B, run.channels, S, S]."""
    if images.shape[1] > run.channels:
        images = images.mean(1, keepdim=True)
    for channel, (mean, std) in enumerate(zip(run.pixel_mean, run.pixel_std, strict=True)):
        source = images[:, min(channel, images.shape[1] - 1)]
        torch.add(images.new_full((), -mean / std), source, alpha=1 / std, out=out[:, channel])


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
            red, green, blue = images.split(1, 1)
            grey = 0.299 * red + 0.587 * green + 0.114 * blue  # luma of ITU-R BT.601
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
