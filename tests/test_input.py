"""What a network sees of an image: every kind of image and network, by hand. test_augment.py has more of it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fer.input import Input, luma, model_input

MEANS, STDS = [0.5, 0.4, 0.3], [0.5, 0.25, 0.1]
COLOUR = [[51, 102, 204], [255, 0, 0], [0, 255, 0], [0, 0, 255]]  # four pixels, of which a 2x2 image is made
GREYS = [0.3858, 0.299, 0.587, 0.114]  # .299 * .2 + .587 * .4 + .114 * .8; then the three weights


def images_of(pixels: list[Any]) -> Tensor:
    """One image of 2x2."""
    found = torch.tensor(pixels, dtype=torch.uint8)
    return found.reshape(1, 2, 2, *found.shape[1:])


@pytest.mark.parametrize(
    ("channels", "mean", "std", "expected"),
    [
        (1, [0.5], [0.25], [(0.5, 0.25)]),
        (3, [0.5], [0.25], [(0.5, 0.25)] * 3),
        (3, MEANS, [0.25], [(0.5, 0.25), (0.4, 0.25), (0.3, 0.25)]),
        (3, [0.5], STDS, [(0.5, 0.5), (0.5, 0.25), (0.5, 0.1)]),
        (3, MEANS, STDS, [(0.5, 0.5), (0.4, 0.25), (0.3, 0.1)]),
    ],
)
def test_mean_and_std_of_each_channel(channels: Any, mean: list, std: list, expected: list) -> None:
    assert Input(channels=channels, mean=mean, std=std).normalisation() == expected


def test_colour_for_a_network_of_colour() -> None:
    found = model_input(images_of(COLOUR), Input(image_size=2, mean=MEANS, std=STDS))
    rows = [[(pixel[i] / 255 - MEANS[i]) / STDS[i] for pixel in COLOUR] for i in range(3)]
    torch.testing.assert_close(found, torch.tensor(rows).reshape(1, 3, 2, 2))


def test_colour_for_a_network_of_grey() -> None:
    found = model_input(images_of(COLOUR), Input(image_size=2, channels=1, mean=[0.4], std=[0.25]))
    torch.testing.assert_close(found, torch.tensor([(grey - 0.4) / 0.25 for grey in GREYS]).reshape(1, 1, 2, 2))


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_for_either_network(channels: Any) -> None:
    grey = [0, 51, 102, 255]
    found = model_input(images_of(grey), Input(image_size=2, channels=channels, mean=[0.4], std=[0.25]))
    row = torch.tensor([(value / 255 - 0.4) / 0.25 for value in grey]).reshape(1, 1, 2, 2)
    torch.testing.assert_close(found, row.expand(1, channels, 2, 2))
    coloured = images_of([[value] * 3 for value in grey])  # a colour image that has no colour is the same
    torch.testing.assert_close(
        model_input(coloured, Input(image_size=2, channels=channels, mean=[0.4], std=[0.25])), found
    )


def test_luma_weighs_the_colours() -> None:
    images = torch.tensor(COLOUR).T.reshape(1, 3, 2, 2) / 255
    torch.testing.assert_close(luma(images), torch.tensor(GREYS).reshape(1, 1, 2, 2))
    same = torch.rand(2, 1, 4, 4, generator=torch.manual_seed(0))
    torch.testing.assert_close(luma(same.repeat(1, 3, 1, 1)), same)  # the weights add up to one


def test_a_resized_image_is_grey_as_before() -> None:
    """Whether colour goes before the size changes or after is no matter."""
    pixels = torch.randint(256, (3, 12, 12, 3), dtype=torch.uint8, generator=torch.manual_seed(0))
    one = Input(image_size=8, channels=1, mean=[0.0], std=[1.0])
    colour = model_input(pixels, Input(image_size=8, mean=[0.0], std=[1.0]))
    torch.testing.assert_close(model_input(pixels, one), luma(colour), atol=1e-6, rtol=0)
    assert 0 <= colour.min() < colour.max() <= 1


@pytest.mark.parametrize("threads", [1, 3])
def test_images_are_left_as_they_are_whatever_their_layout(threads: int) -> None:
    wide = torch.randint(256, (10, 40, 20), dtype=torch.uint8, generator=torch.manual_seed(0))
    pixels, before = wide[::2, ::2], wide.clone()
    settings = Input(image_size=20, channels=3)
    torch.set_num_threads(threads)
    try:
        found = model_input(pixels, settings, lambda images, rows: images.zero_().add_(0.75))
        plain = model_input(pixels, settings)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(wide, before)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    torch.testing.assert_close(found, torch.ones(5, 3, 20, 20))  # (.75 - .5) / .25
    assert torch.equal(plain, model_input(pixels.contiguous(), settings))


def test_no_images_are_none() -> None:
    assert model_input(torch.zeros(0, 8, 8, dtype=torch.uint8), Input(image_size=6)).shape == (0, 3, 6, 6)
