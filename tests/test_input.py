"""What a network sees of an image: every kind of image and network, by hand; parts and threads change nothing."""

import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fer.input import Input, luma, model_input, to_float

MEANS, STDS = [0.5, 0.4, 0.3], [0.5, 0.25, 0.1]
COLOUR = [[51, 102, 204], [255, 0, 0], [0, 255, 0], [0, 0, 255]]  # four pixels, of which a 2x2 image is made
GREYS = [0.3858, 0.299, 0.587, 0.114]  # .299 * .2 + .587 * .4 + .114 * .8; then the three weights


def images_of(pixels: list[Any]) -> Tensor:
    """One image of 2x2."""
    found = torch.tensor(pixels, dtype=torch.uint8)
    return found.reshape(1, 2, 2, *found.shape[1:])


def test_colour_and_grey_for_networks_of_colour_and_of_grey() -> None:
    found = model_input(images_of(COLOUR), Input(image_size=2, mean=MEANS, std=STDS))
    rows = [[(pixel[i] / 255 - MEANS[i]) / STDS[i] for pixel in COLOUR] for i in range(3)]
    torch.testing.assert_close(found, torch.tensor(rows).reshape(1, 3, 2, 2))
    found = model_input(images_of(COLOUR), Input(image_size=2, channels=1, mean=[0.4], std=[0.25]))
    torch.testing.assert_close(found, torch.tensor([(grey - 0.4) / 0.25 for grey in GREYS]).reshape(1, 1, 2, 2))
    grey = [0, 51, 102, 255]
    row = torch.tensor([(value / 255 - 0.4) / 0.25 for value in grey]).reshape(1, 1, 2, 2)
    for pixels in (grey, [[value] * 3 for value in grey]):  # a colour image that has no colour is the same
        for channels in (1, 3):
            found = model_input(images_of(pixels), Input(image_size=2, channels=channels, mean=[0.4], std=[0.25]))
            torch.testing.assert_close(found, row.expand(1, channels, 2, 2))


def test_resizing_is_an_average_with_antialias_before_or_after_colour_goes() -> None:
    pixels = torch.tensor([[[0, 0, 255, 255]] * 4], dtype=torch.uint8)
    # triangle filter of width 4 around pixel 1/2: weights 3/8 3/8 1/8 of 7/8 within the image
    torch.testing.assert_close(to_float(pixels, 2)[0, 0], torch.tensor([[1 / 7, 6 / 7]] * 2))
    pixels = torch.randint(256, (3, 12, 12, 3), dtype=torch.uint8, generator=torch.manual_seed(0))
    grey, colour = (
        model_input(pixels, Input(image_size=8, channels=channels, mean=[0.0], std=[1.0])) for channels in (1, 3)
    )
    torch.testing.assert_close(grey, luma(colour), atol=1e-6, rtol=0)
    assert 0 <= colour.min() < colour.max() <= 1


# Light


def published(image: np.ndarray) -> np.ndarray:
    """uint8 [S, S] as FERPlus's training code prepares it: equalise, subtract the fitted plane, scale."""
    shares = np.bincount(image.ravel(), minlength=256).cumsum() / image.size
    equal = (2 * shares - 1)[image.ravel()]
    down, across = np.mgrid[: len(image), : len(image)].reshape(2, -1)
    columns = np.stack([down, across, np.ones(image.size)], 1)
    rest = equal - columns @ np.linalg.lstsq(columns, equal, rcond=None)[0]
    return (rest / max(np.sqrt(np.mean(rest**2)), 1e-6)).reshape(image.shape)


def test_equalised_flattened_and_standardised_as_published() -> None:
    every = Input(image_size=16, channels=1, equalize=True, flatten=True, standardize=True, mean=[0.0], std=[1.0])
    pixels = torch.randint(256, (4, 16, 16), dtype=torch.uint8, generator=torch.manual_seed(0)) // 5 * 3
    pixels[1] //= 40  # a dark one
    found = model_input(pixels, every)
    wanted = np.stack([published(image) for image in pixels.numpy()])
    np.testing.assert_allclose(found[:, 0].numpy(), wanted, atol=1e-4)
    changed = model_input(pixels, every, lambda images, rows: images.flip(3))  # light comes after augmentation
    torch.testing.assert_close(changed, found.flip(3), atol=1e-4, rtol=0)
    two = torch.tensor([[[10, 10], [10, 200]]], dtype=torch.uint8)
    equal = model_input(two, Input(image_size=2, channels=1, equalize=True, mean=[0.0], std=[1.0]))
    torch.testing.assert_close(equal.flatten(), torch.tensor([0.75, 0.75, 0.75, 1.0]))  # one step alone
    blank = torch.full((1, 16, 16), 7, dtype=torch.uint8)
    torch.testing.assert_close(model_input(blank, every), torch.zeros(1, 1, 16, 16), atol=1e-4, rtol=0)


# Parts and threads


@pytest.mark.parametrize("inference", [False, True])
def test_threads_share_the_images_and_change_no_bit(inference: bool) -> None:
    """Torch keeps the number of threads it was told to use; `rows` are the images' places in the batch."""
    pixels = torch.randint(256, (7, 200, 200), dtype=torch.uint8, generator=torch.manual_seed(0))
    settings, added = Input(image_size=200, mean=[0.4], std=[0.2]), torch.linspace(0, 1, 7).view(-1, 1, 1, 1)
    seen: list[tuple[int, int, int]] = []

    def change(images: Tensor, rows: slice) -> Tensor:
        seen.append((threading.get_ident(), torch.get_num_threads(), rows.start))
        return images.add_(added[rows])

    alone = model_input(pixels, settings, change)
    expected = ((to_float(pixels, 200) + added - 0.4) / 0.2).expand(7, 3, 200, 200)
    torch.testing.assert_close(alone, expected, atol=1e-5, rtol=0)
    seen.clear()
    torch.set_num_threads(3)
    try:
        with torch.inference_mode(inference):
            found = model_input(pixels, settings, change)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)
    assert torch.equal(found, alone)
    assert sorted(first for _, _, first in seen) == [0, 3, 6]
    assert {threads for _, threads, _ in seen} == {1}
    assert threading.get_ident() not in {thread for thread, _, _ in seen}


def test_images_are_left_as_they_are_whatever_their_layout_and_number() -> None:
    wide = torch.randint(256, (10, 40, 20), dtype=torch.uint8, generator=torch.manual_seed(0))
    pixels, before, settings = wide[::2, ::2], wide.clone(), Input(image_size=20, channels=3)
    found = model_input(pixels, settings, lambda images, rows: images.zero_().add_(0.75))
    assert torch.equal(wide, before)
    assert found.is_contiguous()
    torch.testing.assert_close(found, torch.ones(5, 3, 20, 20))  # (.75 - .5) / .25
    assert torch.equal(model_input(pixels, settings), model_input(pixels.contiguous(), settings))
    assert model_input(pixels[:0], settings).shape == (0, 3, 20, 20)
