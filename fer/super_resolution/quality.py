"""How well a method restores images that were shrunk: PSNR and SSIM against the originals."""

from collections.abc import Callable

import numpy as np
from PIL import Image

LUMA = np.array([299, 587, 114], dtype=np.uint32)  # thousandths, ITU-R BT.601
WINDOW = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))  # of SSIM: a Gaussian, in each direction
WINDOW /= WINDOW.sum()


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
    """Mean structural similarity of uint8 [B, H, W], H and W at least 11 (Wang et al. 2004, equation 13).

    The window is Gaussian, 11 pixels wide, standard deviation 1.5; only positions where it fits entirely count. K1 =
    .01, K2 = .03.
    """
    return float(np.mean([_ssim(x, y) for x, y in zip(one.astype(np.float64), other.astype(np.float64), strict=True)]))


def _ssim(x: np.ndarray, y: np.ndarray) -> float:
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = _local_mean(x), _local_mean(y)
    vx, vy, vxy = _local_mean(x * x) - mx * mx, _local_mean(y * y) - my * my, _local_mean(x * y) - mx * my
    return (((2 * mx * my + c1) * (2 * vxy + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()


def _local_mean(image: np.ndarray) -> np.ndarray:
    """[H, W] -> [H - 10, W - 10], weighted by WINDOW; first the columns, then the rows."""
    for _ in range(2):
        height = len(image) - len(WINDOW) + 1
        total = np.zeros((height, image.shape[1]))
        for first, weight in enumerate(WINDOW):
            total += weight * image[first : first + height]
        image = total.T
    return image


def down_then_up(images: np.ndarray, upscale: Callable[[np.ndarray], np.ndarray], scale: int) -> dict[str, float]:
    """PSNR (dB) and SSIM of uint8 `images` [B, H, W(, 3)] after shrinking by `scale` and enlarging by `upscale`.

    Pillow's bicubic shrinks, with antialiasing. H and W are cropped to multiples of `scale`; colour is compared in
    luma.
    """
    height, width = (side - side % scale for side in images.shape[1:3])
    whole = images[:, :height, :width]
    size = (width // scale, height // scale)
    small = np.stack([np.asarray(Image.fromarray(i).resize(size, Image.Resampling.BICUBIC)) for i in whole])
    one, other = grey(whole), grey(upscale(small))
    return {"psnr": psnr(one, other), "ssim": ssim(one, other)}
