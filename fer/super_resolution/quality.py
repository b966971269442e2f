"""How well a method restores images that were made small: PSNR and SSIM against the originals."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

LUMA = np.array([299, 587, 114], dtype=np.uint32)  # thousandths, ITU-R BT.601


def grey(images: np.ndarray) -> np.ndarray:
    """uint8 [B, H, W] or [B, H, W, 3] -> uint8 [B, H, W], rounded luma."""
    if images.ndim == 3:
        return images
    red, green, blue = (images[..., channel] * LUMA[channel] for channel in range(3))
    red += green
    red += blue
    red += np.uint32(500)
    red //= np.uint32(1000)
    return red.astype(np.uint8)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Mean over the images of 10 log10(255^2 / mean squared error), dB; uint8 [B, H, W]; equal images count 100 dB."""
    error = ((one.astype(np.float64) - other) ** 2).mean((1, 2))
    return float(np.minimum(10 * np.log10(255**2 / np.maximum(error, 1e-12)), 100).mean())


def ssim(one: np.ndarray, other: np.ndarray) -> float:
    """Mean structural similarity of uint8 [B, H, W], H and W 11 at least (Wang et al. 2004, equation 13).

    Gaussian window of 11 pixels and standard deviation 1.5, K1 = .01, K2 = .03, where the window fits whole.
    """
    line = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = (torch.outer(line, line) / line.sum() ** 2).view(1, 1, 11, 11)
    x, y = (torch.from_numpy(images.astype(np.float64)).unsqueeze(1) for images in (one, other))

    def mean(images: torch.Tensor) -> torch.Tensor:
        return F.conv2d(images, window)

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    return float((((2 * mx * my + c1) * (2 * vxy + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())


def down_then_up(images: np.ndarray, upscale: Callable[[np.ndarray], np.ndarray], scale: int) -> dict[str, float]:
    """PSNR (dB) and SSIM of uint8 `images` [B, H, W(, 3)] that are made smaller by `scale` and larger again.

    Smaller: Pillow's bicubic, which smooths. H and W are cut to multiples of `scale`; colour is compared in luma.
    """
    height, width = (side - side % scale for side in images.shape[1:3])
    whole = images[:, :height, :width]
    size = (width // scale, height // scale)
    small = np.stack([np.asarray(Image.fromarray(i).resize(size, Image.Resampling.BICUBIC)) for i in whole])
    one, other = grey(whole), grey(upscale(small))
    return {"psnr": psnr(one, other), "ssim": ssim(one, other)}
