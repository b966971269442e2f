"""From uint8 images to the input of a network: resize, optionally augment, normalise; on the device of the images."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from fer.settings import Fault, Fraction, Section, Side, Unfit

CACHED = 2**18  # pixels that stay in a CPU's cache between operations
Change = Callable[[Tensor, slice], Tensor]  # images and their rows in the batch -> augmented images


class Input(Section):
    """How an image is prepared for the network."""

    image_size: Side = 48
    """Side of the network's square input, in pixels."""
    channels: Literal[1, 3] = 3
    """Channels of the input: with 3, grey images are repeated; with 1, colour images become luma."""
    equalize: bool = False
    """Histogram equalisation of each image, as in Barsoum et al. 2016 with the next two."""
    flatten: bool = False
    """Subtract from each image the plane that fits its brightness best: light from one side."""
    standardize: bool = False
    """Subtract from each image its mean and divide it by its standard deviation; with it, mean is [0] and std [1]."""
    mean: list[Fraction] = [0.5]
    """Subtracted from the pixels, which are in [0, 1]: one number for all channels, or one per channel."""
    std: list[Annotated[float, Field(gt=0)]] = [0.25]
    """The pixels are then divided by this: one number for all channels, or one per channel."""

    @model_validator(mode="after")
    def _per_channel(self) -> "Input":
        found = []
        for key, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                found.append(Fault(key, f"has {len(values)} numbers but channels is {self.channels}; give one for all"))
            elif len(values) > 1 and len(set(values)) == 1:
                found.append(Fault(key, f"is the same for all channels; write it once: [{values[0]:g}]"))
        if self.standardize and (set(self.mean), set(self.std)) != ({0.0}, {1.0}):
            found.append(Fault("standardize", "makes mean 0 and standard deviation 1; set mean to [0], std to [1]"))
        if found:
            raise Unfit(found)
        return self

    def normalisation(self) -> list[tuple[float, float]]:
        """(mean, std) of each channel."""
        wide = (values * self.channels if len(values) == 1 else values for values in (self.mean, self.std))
        return list(zip(*wide, strict=True))


def luma(images: Tensor) -> Tensor:
    """Float RGB [B, 3, H, W] -> luma [B, 1, H, W] (ITU-R BT.601)."""
    red, green, blue = images.split(1, 1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def model_input(pixels: Tensor, settings: Input, change: Change | None = None) -> Tensor:
    """uint8 [B, H, W] or [B, H, W, 3] -> normalised float32 [B, channels, S, S], S = `image_size`.

    `change(images, rows)` augments the images in `rows` of the batch, float32 [b, 1 or 3, S, S] in [0, 1]: on a GPU the
    whole batch at once, on a CPU a few images at a time in each of torch's threads.
    """
    count, side, inference = len(pixels), settings.image_size, torch.is_inference_mode_enabled()
    found = torch.empty(count, settings.channels, side, side, device=pixels.device)

    def make(rows: slice) -> None:
        with torch.inference_mode(inference):  # threads do not inherit it
            images = to_float(pixels[rows], side)
            normalize(change(images, rows) if change else images, settings, found[rows])

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
    """Threads in which torch uses one thread each: a few images are too little work for torch to split further."""
    pool, all_here = ThreadPoolExecutor(threads), Barrier(threads)

    def alone(_: int) -> None:
        all_here.wait()
        torch.get_num_threads()  # initialises the thread; otherwise its first operation would reset the number
        torch.set_num_threads(1)

    list(pool.map(alone, range(threads)))
    torch.set_num_threads(threads)  # the default of threads that start later
    return pool


def to_float(pixels: Tensor, image_size: int) -> Tensor:
    """uint8 [B, H, W] or [B, H, W, 3] -> float32 [B, 1 or 3, image_size, image_size] in [0, 1]."""
    images = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    return resized(images.to(torch.float32, memory_format=torch.contiguous_format).div_(255), image_size)


def resized(images: Tensor, image_size: int) -> Tensor:
    """float32 [B, C, H, W] in [0, 1] -> [B, C, image_size, image_size]; the same tensor if it has that size."""
    if images.shape[-2:] == (image_size, image_size):
        return images
    return F.interpolate(images, size=(image_size, image_size), mode="bilinear", antialias=True).clamp_(0, 1)


def even_light(images: Tensor, settings: Input) -> Tensor:
    """float32 [B, C, S, S] in [0, 1] -> each channel with `equalize`, `flatten` and `standardize` done, in that order.

    The published code (`img_util.py` of microsoft/FERPlus) does all three, on equalised values in [-1, 1], which the
    last step makes the same.
    """
    count, channels, side, _ = images.shape
    flat = images.reshape(count * channels, side * side)
    if settings.equalize:
        levels = (flat * 255).round().long()
        histogram = torch.zeros(flat.shape[0], 256, device=flat.device)
        shares = histogram.scatter_add_(1, levels, torch.ones_like(flat)).cumsum(1) / flat.shape[1]
        flat = shares.gather(1, levels)
    if settings.flatten:
        line = torch.linspace(-1, 1, side, device=flat.device) if side > 1 else torch.zeros(1, device=flat.device)
        plane = torch.stack([torch.ones(side, side, device=flat.device), *torch.meshgrid(line, line, indexing="ij")])
        base = F.normalize(plane.reshape(3, -1), dim=1)  # orthogonal, as the axes are centred
        flat = flat - flat @ base.T @ base
    if settings.standardize:
        flat = flat - flat.mean(1, keepdim=True)
        deviation = flat.square().mean(1, keepdim=True).sqrt()
        flat = flat / torch.where(deviation > 1e-6, deviation, 1)
    return flat.reshape(images.shape)


def normalize(images: Tensor, settings: Input, out: Tensor) -> None:
    """Write (x - mean) / std of float32 images [B, 1 or 3, S, S] in [0, 1] to `out` [B, channels, S, S]."""
    if images.shape[1] > settings.channels:
        images = luma(images)
    if settings.equalize or settings.flatten or settings.standardize:
        images = even_light(images, settings)
    for channel, (mean, std) in enumerate(settings.normalisation()):
        source = images[:, min(channel, images.shape[1] - 1)]
        torch.add(images.new_full((), -mean / std), source, alpha=1 / std, out=out[:, channel])
