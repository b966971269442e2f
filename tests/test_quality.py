"""PSNR and SSIM by hand and against torchmetrics, and what is compared with what when a method restores images."""

import json
from math import log10

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.image import structural_similarity_index_measure

from fer.super_resolution.interpolation import bicubic
from fer.super_resolution.quality import down_then_up, grey, psnr, ssim


def noise(*shape: int, seed: int = 0, low: int = 0, high: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, shape, dtype=np.uint8)


def faces(count: int, height: int, width: int) -> np.ndarray:
    """Smooth, as far as it goes, and each different."""
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / (3 + image)) * np.cos(columns / (4 + image)) for image in range(count)]
    return np.rint(127 + 100 * np.stack(waves)).astype(np.uint8)


def tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.astype(np.float64))[:, None]


def test_grey_is_luma_to_the_nearest() -> None:
    reds, greens, blues = noise(3, 5, 40, 30)
    exact = 0.299 * reds + 0.587 * greens + 0.114 * blues
    out = grey(np.stack([reds, greens, blues], -1))
    assert out.dtype == np.uint8
    assert np.abs(out - exact).max() <= 0.5 + 1e-9
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    np.testing.assert_array_equal(grey(np.repeat(levels[..., None], 3, -1)), levels)
    np.testing.assert_array_equal(grey(levels), levels)


def test_psnr_is_the_mean_over_images_of_decibels() -> None:
    """10 log10(255^2 / error): one pixel of four is off by 10, all by 10, all by 255; equal images get 100."""
    one, other = np.zeros((4, 2, 2), np.uint8), np.zeros((4, 2, 2), np.uint8)
    other[0, 0, 0], other[1], other[2] = 10, 10, 255
    decibels = [10 * log10(255**2 / 25), 10 * log10(255**2 / 100), 0, 100]
    assert psnr(one, other) == psnr(other, one) == pytest.approx(sum(decibels) / 4, abs=1e-12)


# SSIM


@pytest.mark.parametrize("shape", [(11, 11), (13, 12), (24, 31)])
def test_ssim_is_that_of_torchmetrics(shape: tuple[int, int]) -> None:
    """Its windows that reach out of the image, which it fills by reflection, do not count here."""
    one = faces(3, *shape)
    other = np.clip(one.astype(int) + noise(3, *shape, high=60) - 30, 0, 255).astype(np.uint8)
    found = ssim(one, other)
    assert 0.3 < found < 0.95
    _, theirs = structural_similarity_index_measure(
        tensor(one), tensor(other), sigma=1.5, kernel_size=11, data_range=255.0, return_full_image=True
    )
    assert isinstance(theirs, torch.Tensor)
    assert found == pytest.approx(float(theirs[..., 5:-5, 5:-5].mean()), abs=1e-6)


def test_ssim_of_images_without_structure() -> None:
    """Constant a and b: (2 a b + C1) / (a^2 + b^2 + C1); here C1 = 6.5025."""
    one, other = np.full((1, 12, 14), 50, np.uint8), np.full((1, 12, 14), 100, np.uint8)
    assert ssim(one, other) == pytest.approx(10006.5025 / 12506.5025, abs=1e-9)


# Restoring


def doubled(small: np.ndarray) -> np.ndarray:
    return small.repeat(2, 1).repeat(2, 2)


def test_a_constant_image_is_restored_without_fault() -> None:
    """Also by a network that answers grey images in colour."""
    for upscale in (doubled, lambda small: np.repeat(doubled(small)[..., None], 3, -1)):
        found = down_then_up(np.full((5, 30, 27), 90, np.uint8), upscale, 2)
        assert json.loads(json.dumps(found)) == {"psnr": 100, "ssim": pytest.approx(1, abs=1e-12)}  # plain numbers


@pytest.mark.parametrize("scale", [2, 3, 8])
def test_what_is_left_over_at_the_edge_is_not_looked_at(scale: int) -> None:
    """50 x 41: the method sees Pillow's bicubic of the largest multiple, and is held against that alone."""
    images, seen = faces(3, 50, 41), list[np.ndarray]()
    height, width = 50 // scale * scale, 41 // scale * scale

    def resized(images: np.ndarray, *size: int) -> np.ndarray:
        return np.stack([np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BICUBIC)) for one in images])

    def upscale(small: np.ndarray) -> np.ndarray:
        seen.append(small)
        return bicubic(small, scale)

    found, whole = down_then_up(images, upscale, scale), images[:, :height, :width].copy()
    np.testing.assert_array_equal(seen[0], resized(whole, width // scale, height // scale))
    larger = resized(seen[0], width, height)
    assert found == {"psnr": psnr(whole, larger), "ssim": ssim(whole, larger)}
    images[:, height:], images[:, :, width:] = 255, 0
    assert down_then_up(images, upscale, scale) == found


def test_colour_is_compared_in_luma() -> None:
    """Of a blue that is 100 too bright in every pixel 11.4 are left, in whole numbers 11 or 12."""
    images = np.stack([faces(2, 24, 24), faces(2, 24, 24)[::-1], np.full((2, 24, 24), 20, np.uint8)], -1)

    def upscale(small: np.ndarray) -> np.ndarray:
        assert small.shape == (2, 12, 12, 3)
        return images + np.array([0, 0, 100], np.uint8)

    assert 10 * log10(255**2 / 144) < down_then_up(images, upscale, 2)["psnr"] < 10 * log10(255**2 / 121)
