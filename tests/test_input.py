"""What a network sees of an image: every kind of image and network, by hand; parts and threads change nothing."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fer.input import Input, luma, model_input, to_float
from fer.settings import check

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


def test_resizing_is_an_average_with_antialias() -> None:
    pixels = torch.tensor([[[0, 0, 255, 255]] * 4], dtype=torch.uint8)
    # triangle filter of width 4 around pixel 1/2: weights 3/8 3/8 1/8 of 7/8 within the image
    torch.testing.assert_close(to_float(pixels, 2)[0, 0], torch.tensor([[1 / 7, 6 / 7]] * 2))


def test_a_resized_image_is_grey_as_before_and_does_not_depend_on_its_batch() -> None:
    """Whether colour goes before the size changes or after does not matter."""
    pixels = torch.randint(256, (3, 12, 12, 3), dtype=torch.uint8, generator=torch.manual_seed(0))
    one = Input(image_size=8, channels=1, mean=[0.0], std=[1.0])
    colour = model_input(pixels, Input(image_size=8, mean=[0.0], std=[1.0]))
    torch.testing.assert_close(model_input(pixels, one), luma(colour), atol=1e-6, rtol=0)
    assert 0 <= colour.min() < colour.max() <= 1
    assert all(torch.equal(to_float(pixels[i : i + 1], 64)[0], to_float(pixels, 64)[i]) for i in range(3))


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
    blank = torch.full((1, 16, 16), 7, dtype=torch.uint8)
    torch.testing.assert_close(model_input(blank, every), torch.zeros(1, 1, 16, 16), atol=1e-4, rtol=0)


def test_each_step_of_light_alone() -> None:
    line = torch.arange(8) * 10
    slope = (line[:, None] + 2 * line).to(torch.uint8)[None]
    plain = {"image_size": 8, "channels": 1, "mean": [0.0], "std": [1.0]}
    flat = model_input(slope, Input(**plain, flatten=True))
    torch.testing.assert_close(flat, torch.zeros(1, 1, 8, 8), atol=1e-5, rtol=0)
    standard = model_input(slope, Input(**plain, standardize=True))
    assert float(standard.mean()) == pytest.approx(0, abs=1e-5)
    assert float(standard.std(correction=0)) == pytest.approx(1, abs=1e-5)
    two = torch.tensor([[[10, 10], [10, 200]]], dtype=torch.uint8)
    equal = model_input(two, Input(**(plain | {"image_size": 2}), equalize=True))
    torch.testing.assert_close(equal.flatten(), torch.tensor([0.75, 0.75, 0.75, 1.0]))
    _, (fault,) = check(Input, {"standardize": True})
    assert str(fault) == "standardize: makes mean 0 and standard deviation 1; set mean to [0], std to [1]"


# Parts and threads


@pytest.mark.parametrize(
    ("side", "colour", "parts"), [(48, False, [9]), (200, False, [6, 3]), (200, True, [2, 2, 2, 2, 1])]
)
def test_images_are_changed_a_few_at_a_time(side: int, colour: bool, parts: list[int]) -> None:
    """As many as stay in the cache; `rows` are their places in the batch."""
    shape = (9, side, side, 3) if colour else (9, side, side)
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=torch.manual_seed(0))
    added = torch.linspace(0, 1, 9).view(-1, 1, 1, 1)
    sizes: list[int] = []

    def change(images: Tensor, rows: slice) -> Tensor:
        sizes.append(len(images))
        return images + added[rows]

    found = model_input(pixels, Input(image_size=side, mean=[0.4], std=[0.2]), change)
    expected = ((to_float(pixels, side) + added - 0.4) / 0.2).expand(9, 3, side, side)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert sizes == parts


@pytest.mark.parametrize("inference", [False, True])
def test_threads_share_the_images_and_change_no_bit(inference: bool) -> None:
    """Torch keeps the number of threads it was told to use, in this thread and in a new one."""
    pixels = torch.randint(256, (7, 200, 200), dtype=torch.uint8, generator=torch.manual_seed(0))
    settings = Input(image_size=200, channels=3, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4])
    seen: list[tuple[int, int, int]] = []

    def change(images: Tensor, rows: slice) -> Tensor:
        seen.append((threading.get_ident(), torch.get_num_threads(), rows.start))
        return images.sin_()

    alone = model_input(pixels, settings, change)
    seen.clear()
    torch.set_num_threads(3)
    try:
        with torch.inference_mode(inference):
            found = model_input(pixels, settings, change)
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(1)
    assert torch.equal(found, alone)
    assert sorted(first for _, _, first in seen) == [0, 3, 6]
    assert {threads for _, threads, _ in seen} == {1}
    assert threading.get_ident() not in {thread for thread, _, _ in seen}


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
