"""Random changes of images, each with a known answer, and mixtures of two images."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fer.data.augment import Augment, Augmenter, Mixture, draw_mixture

CPU = torch.device("cpu")
NOTHING = dict.fromkeys(Augment.model_fields, 0.0)
# places of the draws
ANGLE, ZOOM, FLIP, SHIFT_X, SHIFT_Y, BRIGHTNESS, CONTRAST, ERASING, HEIGHT, WIDTH, TOP, LEFT, SATURATION = range(13)
STRETCH_X, STRETCH_Y, SKEW_X, SKEW_Y = range(13, 17)
WARP: dict[str, Any] = {"flip": 0.5, "rotation": 30.0, "scale": 0.3, "translation": 0.2}
LIGHT: dict[str, Any] = {"brightness": 0.8, "contrast": 0.8}


def augmenter(**settings: Any) -> Augmenter:
    return Augmenter(Augment(**(NOTHING | settings)), CPU)


def changed(images: Tensor, seed: int = 0, **settings: Any) -> Tensor:
    augment = augmenter(**settings)
    return augment(images.clone(), augment.draw(len(images), seed))


def fixed(images: Tensor, draws: dict[int, float], **settings: Any) -> Tensor:
    """With draws that are given: 0 is the low end of each range, .5 the middle, 1 the high end."""
    given = torch.full((len(images), Augmenter.PER_IMAGE + 4), 0.5)
    for index, value in draws.items():
        given[:, index] = value
    return augmenter(**settings)(images.clone(), given)


def noise(count: int = 8, side: int = 16, channels: int = 1) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.manual_seed(0))


def dot(row: int, column: int, side: int = 33) -> Tensor:
    """One image with a bright 3x3 spot around a place."""
    image = torch.zeros(1, 1, side, side)
    image[0, 0, row - 1 : row + 2, column - 1 : column + 2] = 1
    return image


def place(image: Tensor) -> tuple[float, float]:
    """Centre of mass, (row, column)."""
    mass = image[0, 0]
    line = torch.arange(len(mass), dtype=torch.float32)
    return float((mass.sum(1) * line).sum() / mass.sum()), float((mass.sum(0) * line).sum() / mass.sum())


# Draws


def test_draws_are_uniform_and_come_from_the_seed() -> None:
    augment = augmenter()
    draws = augment.draw(4000, 3)
    assert draws.shape == (4000, Augmenter.PER_IMAGE)
    assert 0 <= draws.min() < 0.001
    assert 0.999 < draws.max() < 1
    torch.testing.assert_close(draws.mean(0), torch.full((13,), 0.5), atol=0.025, rtol=0)  # standard error .0046
    assert torch.corrcoef(draws.T).sub(torch.eye(13)).abs().max() < 0.08  # standard error .016
    assert not torch.equal(augment.draw(4000, 4), draws)
    assert torch.equal(augment.draw(4000, 3), draws)  # what was drawn before does not matter
    wider = augmenter(skew=0.1).draw(4000, 3)
    assert torch.equal(wider[:, : Augmenter.PER_IMAGE], draws)
    torch.testing.assert_close(wider[:, Augmenter.PER_IMAGE :].mean(0), torch.full((4,), 0.5), atol=0.025, rtol=0)


@pytest.mark.parametrize("ranks", [2, 4])
def test_parts_of_ranks_are_the_whole_batch_and_stay_in_range(ranks: int) -> None:
    images, everything = noise(8, channels=3), WARP | LIGHT | {"saturation": 0.8, "erasing": 0.5}
    whole = changed(images, **everything)
    assert (whole.shape, whole.dtype) == (images.shape, torch.float32)
    assert 0 <= whole.min() < whole.max() <= 1
    for rank in range(ranks):
        one = augmenter(**everything)
        part = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
        assert torch.equal(one(images[part].clone(), one.draw(8, 0)[part]), whole[part])


def test_changes_follow_one_another_and_nothing_changes_no_bit() -> None:
    images = noise(64, channels=3)
    draws = augmenter().draw(64, 0)
    settings: list[dict[str, Any]] = [WARP, LIGHT, {"saturation": 0.8}, {"erasing": 0.5}]
    one_by_one = images.clone()
    for some in settings:
        one_by_one = augmenter(**some)(one_by_one, draws)
    together = augmenter(**{key: value for some in settings for key, value in some.items()})
    assert torch.equal(together(images.clone(), draws), one_by_one)
    assert torch.equal(augmenter()(images.clone(), draws), images)


# The warp


def test_flip_is_a_mirror_by_its_probability() -> None:
    images = noise(channels=3)
    for draw, wanted in ((0.24, images.flip(3)), (0.26, images)):
        torch.testing.assert_close(fixed(images, {FLIP: draw}, flip=0.25), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("draw", "degrees"), [(0.0, 20), (0.75, -10)])
def test_rotation_is_in_degrees(draw: float, degrees: float) -> None:
    row, column = place(fixed(dot(16, 26), {ANGLE: draw}, rotation=20.0))  # 10 right of the centre of 33 pixels
    wanted = (16 + 10 * math.sin(math.radians(degrees)), 16 + 10 * math.cos(math.radians(degrees)))
    assert (row, column) == pytest.approx(wanted, abs=0.2)


@pytest.mark.parametrize(("draw", "factor"), [(0.0, 0.8), (0.5, 1.0), (1.0, 1.2)])
def test_zoom_enlarges_around_the_centre(draw: float, factor: float) -> None:
    assert place(fixed(dot(16, 26), {ZOOM: draw}, scale=0.2)) == pytest.approx((16, 16 + 10 * factor), abs=0.2)


@pytest.mark.parametrize(("draw", "factor"), [(0.0, 0.8), (1.0, 1.2)])
def test_stretch_enlarges_one_axis_and_skew_moves_one_along_the_other(draw: float, factor: float) -> None:
    right, below = dot(16, 26), dot(26, 16)
    far = 16 + 10 * factor
    for number, image, wanted in ((STRETCH_X, right, (16, far)), (STRETCH_Y, below, (far, 16))):
        assert place(fixed(image, {number: draw}, stretch=0.2)) == pytest.approx(wanted, abs=0.2)
    moved = 10 * (1 - factor)
    for number, image, wanted in ((SKEW_X, right, (16 + moved, 26)), (SKEW_Y, below, (26, 16 + moved))):
        assert place(fixed(image, {number: draw}, skew=0.2)) == pytest.approx(wanted, abs=0.2)


@pytest.mark.parametrize(("draw", "pixels"), [(0.0, 4.0), (1.0, -4.0)])
def test_translation_is_a_share_of_the_side(draw: float, pixels: float) -> None:
    image = dot(20, 20, side=40)  # .1 of 40 pixels
    assert place(fixed(image, {SHIFT_X: draw}, translation=0.1)) == pytest.approx((20, 20 + pixels), abs=0.01)
    assert place(fixed(image, {SHIFT_Y: draw}, translation=0.1)) == pytest.approx((20 + pixels, 20), abs=0.01)


def test_what_comes_in_at_the_edge_is_the_reflected_image() -> None:
    """Shifted by half the side. Ranges that can reflect twice take another way than those that cannot."""
    images = noise(2, side=24)
    expected = torch.cat([images[..., 12:], images.flip(3)[..., :12]], 3)
    for translation, draw in ((0.5, 1.0), (1.0, 0.75)):
        found = fixed(images, {SHIFT_X: draw}, translation=translation)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_both_ways_to_reflect_agree() -> None:
    """The same angles, zooms and shifts, drawn from narrow ranges and from wide ones."""
    images, draws = noise(64, side=24), augmenter().draw(64, 0)
    narrow = augmenter(rotation=45.0, scale=0.2, translation=0.6)(images.clone(), draws)
    wide_draws = draws.clone()
    wide_draws[:, ZOOM] = 0.5 + (draws[:, ZOOM] - 0.5) * 0.2 / 0.4
    wide_draws[:, SHIFT_X : SHIFT_Y + 1] = 0.5 + (draws[:, SHIFT_X : SHIFT_Y + 1] - 0.5) * 0.6 / 1.0
    wide = augmenter(rotation=45.0, scale=0.4, translation=1.0)(images.clone(), wide_draws)
    torch.testing.assert_close(narrow, wide, atol=1e-4, rtol=0)
    assert (narrow - images).abs().max() > 0.5


# Light and colour


@pytest.mark.parametrize(("draw", "factor"), [(0.0, 0.5), (0.5, 1.0), (1.0, 1.5)])
def test_brightness_and_contrast_are_factors(draw: float, factor: float) -> None:
    """Contrast is around the mean of each image; what leaves [0, 1] is clipped."""
    images = noise(4)
    mean = images.mean((1, 2, 3), keepdim=True)
    brighter = fixed(images, {BRIGHTNESS: draw}, brightness=0.5)
    torch.testing.assert_close(brighter, (factor * images).clamp(0, 1), atol=1e-6, rtol=0)
    steeper = fixed(images, {CONTRAST: draw}, contrast=0.5)
    torch.testing.assert_close(steeper, (mean + factor * (images - mean)).clamp(0, 1), atol=1e-6, rtol=0)
    both = fixed(images, {BRIGHTNESS: 0.0, CONTRAST: draw}, brightness=0.5, contrast=0.5)  # half as bright, then that
    torch.testing.assert_close(both, 0.5 * (mean + factor * (images - mean)).clamp(0, 2), atol=1e-6, rtol=0)


def colours(*pixels: tuple[float, float, float]) -> Tensor:
    """One image of one row, a pixel for each colour."""
    return torch.tensor(pixels).T.reshape(1, 3, 1, -1)


@pytest.mark.parametrize(
    ("draw", "wanted"),
    [
        # grey .299 * .5 + .587 * .3 + .114 * .1 = .337, of pure blue .114; factors 0, .5, 1 and 1.5
        (0.0, [(0.337, 0.337, 0.337), (0.114, 0.114, 0.114)]),
        (0.25, [(0.4185, 0.3185, 0.2185), (0.057, 0.057, 0.557)]),
        (0.5, [(0.5, 0.3, 0.1), (0.0, 0.0, 1.0)]),
        (0.75, [(0.5815, 0.2815, 0.0), (0.0, 0.0, 1.0)]),  # -.0185, -.057 and 1.443 are clipped
    ],
)
def test_saturation_is_a_factor_around_the_grey_of_each_pixel(draw: float, wanted: list) -> None:
    image = colours((0.5, 0.3, 0.1), (0.0, 0.0, 1.0))
    found = fixed(image, {SATURATION: draw}, saturation=1.0)
    torch.testing.assert_close(found, colours(*wanted), atol=1e-6, rtol=0)
    grey = noise()
    assert torch.equal(fixed(grey, {SATURATION: draw}, saturation=1.0), grey)


# Erasing


def test_erasing_sets_one_rectangle_to_the_mean() -> None:
    images = noise(300, side=40)
    result = changed(images, erasing=1.0)
    for before, after in zip(images[:, 0], result[:, 0]):
        rows, columns = ((before != after).any(axis).nonzero().flatten() for axis in (1, 0))
        height, width = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
        assert 5 <= min(height, width) <= max(height, width) <= 19  # .15 of 40 pixels less one, to .45 and one
        inside = after[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        torch.testing.assert_close(inside, torch.full_like(inside, float(before.mean())), atol=1e-5, rtol=0)
        assert int((before != after).sum()) == height * width
    assert 0.08 < (images != result).float().mean() < 0.1  # the mean of a side is .3: .09 of the area
    assert torch.equal(fixed(images, {ERASING: 0.26}, erasing=0.25), images)
    assert not torch.equal(fixed(images, {ERASING: 0.24}, erasing=0.25), images)


# Mixed images


def mixture(seed: int, side: int = 16, **settings: float) -> Mixture:
    found = draw_mixture(Augment(**(NOTHING | settings)), side, seed)
    assert found is not None
    return found


def test_mixup_is_the_weighted_mean_of_neighbours() -> None:
    for images, partners in ((4, [1, 0, 3, 2]), (5, [1, 0, 3, 2, 4]), (1, [0])):
        assert Mixture.partner(torch.zeros(images, 2)).tolist() == partners
        given = noise(images)
        torch.testing.assert_close(Mixture(0.75, None)(given), 0.75 * given + 0.25 * given[partners])


def test_cutmix_takes_a_rectangle_from_the_other_image() -> None:
    images = noise(4, channels=3)
    wanted = images.clone()
    wanted[:, :, 2:5, 0:7] = images[[1, 0, 3, 2], :, 2:5, 0:7]
    assert torch.equal(Mixture(0.9, (slice(2, 5), slice(0, 7)))(images), wanted)


def test_the_share_of_mixup_is_drawn_from_beta() -> None:
    found = [mixture(seed, mixup=0.5) for seed in range(2000)]
    shares = [one.share for one in found]
    assert 0.5 <= min(shares) < 0.51
    assert max(shares) <= 1
    # of max(x, 1 - x), x ~ Beta(1/2, 1/2), the arcsine law: the mean is 1/2 + 1/pi, the standard deviation .158
    assert abs(sum(shares) / 2000 - (0.5 + 1 / math.pi)) < 4 * 0.158 / 2000**0.5
    assert {one.box for one in found} == {None}
    cut = sum(mixture(seed, mixup=0.3, cutmix=0.9).box is not None for seed in range(400))
    assert 265 < cut < 335  # each batch gets one of the two: 300 expected, standard deviation 8.7


def test_the_share_of_cutmix_is_that_of_the_pixels() -> None:
    found = [mixture(seed, side=40, cutmix=1.0) for seed in range(300)]
    for one in found:
        assert one.box is not None
        rows, columns = one.box
        assert 0 <= rows.start <= rows.stop <= 40
        assert 0 <= columns.start <= columns.stop <= 40
        assert one.share == 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / 1600
    assert 0.45 <= min(one.share for one in found) < 0.6  # half, but for rounding to whole pixels


def test_the_seed_decides_the_mixture() -> None:
    assert draw_mixture(Augment(**NOTHING), 16, 0) is None
    assert mixture(3, cutmix=1.0) == mixture(3, cutmix=1.0) != mixture(4, cutmix=1.0)
