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
EVERYTHING: dict[str, Any] = {
    "flip": 0.5, "rotation": 30.0, "scale": 0.3, "translation": 0.2, "brightness": 0.8, "contrast": 0.8,
    "saturation": 0.8, "erasing": 0.5,
}  # fmt: skip


def augmenter(**settings: Any) -> Augmenter:
    return Augmenter(Augment(**(NOTHING | settings)), CPU)


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
    torch.testing.assert_close(draws.mean(0), torch.full((13,), 0.5), atol=0.025, rtol=0)  # standard error .0046
    assert torch.corrcoef(draws.T).sub(torch.eye(13)).abs().max() < 0.08  # standard error .016
    assert not torch.equal(augment.draw(4000, 4), draws)
    assert torch.equal(augment.draw(4000, 3), draws)  # what was drawn before does not matter
    wider = augmenter(skew=0.1).draw(4000, 3)  # nor what else is switched on
    assert torch.equal(wider[:, : Augmenter.PER_IMAGE], draws)


def test_parts_of_ranks_are_the_whole_batch_and_changes_follow_one_another() -> None:
    images, whole = noise(8, channels=3), augmenter(**EVERYTHING)
    draws = whole.draw(8, 0)
    found = whole(images.clone(), draws)
    assert (found.shape, found.dtype) == (images.shape, torch.float32)
    assert 0 <= found.min() < found.max() <= 1
    for part in (slice(0, 4), slice(4, 8)):
        one = augmenter(**EVERYTHING)
        assert torch.equal(one(images[part].clone(), one.draw(8, 0)[part]), found[part])
    one_by_one = images.clone()
    for keys in (["flip", "rotation", "scale", "translation"], ["brightness", "contrast"], ["saturation"], ["erasing"]):
        one_by_one = augmenter(**{key: EVERYTHING[key] for key in keys})(one_by_one, draws)
    assert torch.equal(one_by_one, found)
    assert torch.equal(augmenter()(images.clone(), draws), images)  # nothing changes no bit


# The warp


def test_flip_is_a_mirror_by_its_probability() -> None:
    images = noise(channels=3)
    for draw, wanted in ((0.24, images.flip(3)), (0.26, images)):
        torch.testing.assert_close(fixed(images, {FLIP: draw}, flip=0.25), wanted, atol=1e-5, rtol=0)


def test_where_a_spot_goes() -> None:
    """Ten pixels from the centre of 33; each draw is at the `way` end of its range."""
    right, below, corner = dot(16, 26), dot(26, 16), dot(20, 20, 40)
    for way in (-1, 1):
        turn, far, moved = math.radians(20 * way), 10 * (1 + 0.2 * way), 10 * 0.2 * way
        for image, number, setting, wanted in (
            (right, ANGLE, {"rotation": 20.0}, (16 - 10 * math.sin(turn), 16 + 10 * math.cos(turn))),  # degrees
            (right, ZOOM, {"scale": 0.2}, (16, 16 + far)),
            (right, STRETCH_X, {"stretch": 0.2}, (16, 16 + far)),
            (below, STRETCH_Y, {"stretch": 0.2}, (16 + far, 16)),
            (right, SKEW_X, {"skew": 0.2}, (16 - moved, 26)),
            (below, SKEW_Y, {"skew": 0.2}, (26, 16 - moved)),
            (corner, SHIFT_X, {"translation": 0.1}, (20, 20 - 4 * way)),  # .1 of 40 pixels
            (corner, SHIFT_Y, {"translation": 0.1}, (20 - 4 * way, 20)),
        ):
            found = place(fixed(image, {number: (way + 1) / 2}, **setting))
            assert found == pytest.approx(wanted, abs=0.2), setting


def test_what_comes_in_at_the_edge_is_the_reflected_image() -> None:
    """Shifted by half the side. Ranges that can reflect twice take another way than those that cannot."""
    images = noise(2, side=24)
    expected = torch.cat([images[..., 12:], images.flip(3)[..., :12]], 3)
    for translation, draw in ((0.5, 1.0), (1.0, 0.75)):
        found = fixed(images, {SHIFT_X: draw}, translation=translation)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


# Light and colour


def test_brightness_contrast_and_saturation_are_factors() -> None:
    """Contrast is around the mean of each image; what leaves [0, 1] is clipped."""
    images = noise(4)
    mean = images.mean((1, 2, 3), keepdim=True)
    for draw, factor in ((0.0, 0.5), (1.0, 1.5)):
        brighter = fixed(images, {BRIGHTNESS: draw}, brightness=0.5)
        torch.testing.assert_close(brighter, (factor * images).clamp(0, 1), atol=1e-6, rtol=0)
        both = fixed(images, {BRIGHTNESS: 0.0, CONTRAST: draw}, brightness=0.5, contrast=0.5)  # half as bright, then
        torch.testing.assert_close(both, 0.5 * (mean + factor * (images - mean)).clamp(0, 2), atol=1e-6, rtol=0)
    # grey .299 * .5 + .587 * .3 + .114 * .1 = .337, of pure blue .114; factors .5 and 1.5
    colour = torch.tensor([(0.5, 0.3, 0.1), (0.0, 0.0, 1.0)]).T.reshape(1, 3, 1, 2)
    for draw, wanted in (
        (0.25, [(0.4185, 0.3185, 0.2185), (0.057, 0.057, 0.557)]),
        (0.75, [(0.5815, 0.2815, 0.0), (0.0, 0.0, 1.0)]),  # -.0185, -.057 and 1.443 are clipped
    ):
        found = fixed(colour, {SATURATION: draw}, saturation=1.0)
        torch.testing.assert_close(found, torch.tensor(wanted).T.reshape(1, 3, 1, 2), atol=1e-6, rtol=0)
        assert torch.equal(fixed(images, {SATURATION: draw}, saturation=1.0), images)  # grey stays


def test_erasing_sets_one_rectangle_to_the_mean() -> None:
    images, augment = noise(300, side=40), augmenter(erasing=1.0)
    result = augment(images.clone(), augment.draw(300, 0))
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


def test_mixup_is_the_weighted_mean_of_neighbours_and_cutmix_takes_a_rectangle() -> None:
    for count, partners in ((4, [1, 0, 3, 2]), (5, [1, 0, 3, 2, 4]), (1, [0])):
        images = noise(count, channels=3)
        assert Mixture.partner(images).tolist() == partners
        torch.testing.assert_close(Mixture(0.75, None)(images), 0.75 * images + 0.25 * images[partners])
        wanted = images.clone()
        wanted[:, :, 2:5, 0:7] = images[partners, :, 2:5, 0:7]
        assert torch.equal(Mixture(0.9, (slice(2, 5), slice(0, 7)))(images), wanted)
        turned = Mixture(0.9, (slice(2, 5), slice(0, 7)), own=True)(images[partners])  # its own patch, the rest around
        assert torch.equal(turned, wanted)


def test_shares_are_drawn_from_beta_and_the_box_of_cutmix_has_its_share() -> None:
    shares = [mixture(seed, mixup=0.5).share for seed in range(2000)]
    assert 0.5 <= min(shares) < 0.51
    # of max(x, 1 - x), x ~ Beta(1/2, 1/2), the arcsine law: the mean is 1/2 + 1/pi, the standard deviation .158
    assert abs(sum(shares) / 2000 - (0.5 + 1 / math.pi)) < 4 * 0.158 / 2000**0.5
    cut = sum(mixture(seed, mixup=0.3, cutmix=0.9).box is not None for seed in range(400))
    assert 265 < cut < 335  # each batch gets one of the two: 300 expected, standard deviation 8.7
    assert draw_mixture(Augment(**NOTHING), 16, 0) is None
    found = [mixture(seed, side=40, cutmix=1.0) for seed in range(300)]
    for one in found:
        assert one.box is not None
        assert all(0 <= side.start <= side.stop <= 40 for side in one.box)
        area = math.prod(side.stop - side.start for side in one.box) / 1600
        assert (one.share, one.own) == (max(area, 1 - area), area > 0.5)
    assert 0.5 <= min(one.share for one in found) < 0.55
    # a patch of side h, h^2 uniform, around a random place keeps h - h^2 / 4 of each side: on average .321 of the area
    areas = [one.share if one.own else 1 - one.share for seed in range(2000) if (one := mixture(seed, 96, cutmix=1.0))]
    assert abs(sum(areas) / 2000 - (1 / 2 - 1 / 5 + 1 / 48)) < 4 * 0.19 / 2000**0.5
    assert mixture(3, cutmix=1.0) == mixture(3, cutmix=1.0) != mixture(4, cutmix=1.0)  # the seed decides
