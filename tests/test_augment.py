"""What the model sees: resizing, normalising and the random changes, each with a known answer."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fer.data.augment import Augment, Augmenter, Mixture, draw_mixture
from fer.input import Input, model_input, normalize, to_float

CPU = torch.device("cpu")
NOTHING = {
    "flip": 0.0, "rotation": 0.0, "scale": 0.0, "translation": 0.0,
    "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "erasing": 0.0,
    "mixup": 0.0, "cutmix": 0.0,
}  # fmt: skip
EVERYTHING: dict[str, Any] = {
    "flip": 0.5, "rotation": 30.0, "scale": 0.3, "translation": 0.2,
    "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "erasing": 0.5,
}  # fmt: skip


def augmenter(**settings: Any) -> Augmenter:
    return Augmenter(Augment(**(NOTHING | settings)), CPU)


def changed(images: Tensor, seed: int = 0, **settings: Any) -> Tensor:
    augment = augmenter(**settings)
    return augment(images.clone(), augment.draw(len(images), seed))


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


class Fixed(Augmenter):
    """An augmenter whose uniform draws are given: 0 is the low end of each range, .5 the middle, 1 the high end."""

    def __init__(self, draws: dict[int, float], **settings: float):
        super().__init__(Augment(**(NOTHING | settings)), CPU)
        self.draws = torch.full((1, self.PER_IMAGE), 0.5)
        for index, value in draws.items():
            self.draws[0, index] = value

    def change(self, image: Tensor) -> Tensor:
        return self(image, self.draws)


ANGLE, ZOOM, FLIP, SHIFT_X, SHIFT_Y = range(5)  # places of the draws
SATURATION = 12


def test_zero_settings_change_no_bit() -> None:
    images = noise()
    assert torch.equal(changed(images), images)


def test_a_warp_by_nothing_is_the_identity() -> None:
    images = noise(side=48)
    torch.testing.assert_close(changed(images, flip=1e-9), images, atol=1e-5, rtol=0)


def test_flip_is_a_mirror() -> None:
    images = noise(channels=3)
    torch.testing.assert_close(changed(images, flip=1.0), images.flip(3), atol=1e-5, rtol=0)


def test_flip_is_drawn_per_image() -> None:
    images = noise(400)
    result = changed(images, flip=0.25)
    mirrored = (result - images.flip(3)).abs().amax((1, 2, 3)) < 1e-4
    same = (result - images).abs().amax((1, 2, 3)) < 1e-4
    assert (mirrored ^ same).all()
    assert 60 < int(mirrored.sum()) < 140  # 100 expected, standard deviation 8.7


@pytest.mark.parametrize(("draw", "turns"), [(1.0, 1), (0.0, -1)])
def test_rotation_by_90_degrees_turns_around_the_centre(draw: float, turns: int) -> None:
    images = noise(1)
    rotated = Fixed({ANGLE: draw}, rotation=90.0).change(images)
    torch.testing.assert_close(rotated, torch.rot90(images, turns, (2, 3)), atol=1e-4, rtol=0)


def test_rotation_is_within_its_range_and_both_ways() -> None:
    # a spot 10 right of the centre of a 33-pixel image
    spots = dot(16, 26).repeat(200, 1, 1, 1)
    angles = []
    for image in changed(spots, rotation=20.0):
        row, column = place(image[None])
        assert math.hypot(row - 16, column - 16) == pytest.approx(10, abs=0.2)
        angles.append(math.degrees(math.atan2(row - 16, column - 16)))
    assert -20.5 < min(angles) < -18
    assert 18 < max(angles) < 20.5


@pytest.mark.parametrize(("draw", "factor"), [(0.0, 0.8), (0.5, 1.0), (1.0, 1.2)])
def test_zoom_enlarges_around_the_centre(draw: float, factor: float) -> None:
    image = dot(16, 26)
    row, column = place(Fixed({ZOOM: draw}, scale=0.2).change(image))
    assert row == pytest.approx(16, abs=0.05)
    assert column - 16 == pytest.approx(10 * factor, abs=0.2)


@pytest.mark.parametrize(("draw", "pixels"), [(0.0, 4.0), (1.0, -4.0)])
def test_translation_is_a_share_of_the_side(draw: float, pixels: float) -> None:
    image = dot(20, 20, side=40)
    row, column = place(Fixed({SHIFT_X: draw}, translation=0.1).change(image))  # .1 of 40 pixels
    assert (row, column) == (pytest.approx(20, abs=0.01), pytest.approx(20 + pixels, abs=0.01))
    row, column = place(Fixed({SHIFT_Y: draw}, translation=0.1).change(image))
    assert (row, column) == (pytest.approx(20 + pixels, abs=0.01), pytest.approx(20, abs=0.01))


def test_what_comes_in_at_the_edge_is_the_reflected_image() -> None:
    white = torch.ones(32, 1, 16, 16)
    torch.testing.assert_close(changed(white, rotation=45.0, scale=0.4, translation=0.3), white, atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [{"rotation": 45.0, "scale": 0.2, "translation": 0.6}, {"scale": 0.5}])
def test_a_fold_of_the_grid_is_the_reflection(settings: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that reflect once are folded by hand; torch's own reflection gives the same."""
    images, paddings = noise(64, side=24), []
    real = F.grid_sample

    def sample(images: Tensor, grid: Tensor, **keys: Any) -> Tensor:
        paddings.append(keys["padding_mode"])
        return real(images, grid, **keys)

    monkeypatch.setattr(F, "grid_sample", sample)
    folded = changed(images, **settings)
    monkeypatch.setattr(Tensor, "lerp_", lambda grid, *_: grid)
    monkeypatch.setattr(F, "grid_sample", lambda *a, **keys: real(*a, **keys | {"padding_mode": "reflection"}))
    torch.testing.assert_close(folded, changed(images, **settings), atol=1e-5, rtol=0)
    assert paddings == ["border"]
    assert (folded - images).abs().max() > 0.5


def test_brightness_is_a_factor() -> None:
    images = 0.4 * noise(300)
    factors = changed(images, brightness=0.5).mean((1, 2, 3)) / images.mean((1, 2, 3))
    assert 0.5 <= factors.min() < 0.52
    assert 1.48 < factors.max() <= 1.5
    one = factors[0] * images[0]
    torch.testing.assert_close(changed(images, brightness=0.5)[0], one, atol=1e-5, rtol=0)


def test_contrast_keeps_the_mean() -> None:
    images = 0.5 + 0.2 * (noise(300) - 0.5)
    result = changed(images, contrast=0.5)
    torch.testing.assert_close(result.mean((1, 2, 3)), images.mean((1, 2, 3)), atol=1e-5, rtol=0)
    factors = result.std((1, 2, 3)) / images.std((1, 2, 3))
    assert 0.5 <= factors.min() < 0.52
    assert 1.48 < factors.max() <= 1.5


def colours(*pixels: tuple[float, float, float]) -> Tensor:
    """One image of one row, a pixel for each colour."""
    return torch.tensor(pixels).T.reshape(1, 3, 1, -1)


@pytest.mark.parametrize(
    ("draw", "wanted"),
    [
        # grey .299 * .5 + .587 * .3 + .114 * .1 = .337, of pure blue .114; factors 0, .5, 1, 1.5 and 2
        (0.0, [(0.337, 0.337, 0.337), (0.114, 0.114, 0.114)]),
        (0.25, [(0.4185, 0.3185, 0.2185), (0.057, 0.057, 0.557)]),
        (0.5, [(0.5, 0.3, 0.1), (0.0, 0.0, 1.0)]),
        (0.75, [(0.5815, 0.2815, 0.0), (0.0, 0.0, 1.0)]),  # -.0185, -.057 and 1.443 are cut
        (1.0, [(0.663, 0.263, 0.0), (0.0, 0.0, 1.0)]),
    ],
)
def test_saturation_is_a_factor_around_the_grey_of_each_pixel(draw: float, wanted: list) -> None:
    image = colours((0.5, 0.3, 0.1), (0.0, 0.0, 1.0))
    found = Fixed({SATURATION: draw}, saturation=1.0).change(image)
    torch.testing.assert_close(found, colours(*wanted), atol=1e-6, rtol=0)


def test_saturation_is_drawn_per_image_within_its_range() -> None:
    images = 0.4 + 0.2 * noise(300, channels=3)
    grey = (images * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    factors = ((changed(images, saturation=0.5) - grey).std((1, 2, 3)) / (images - grey).std((1, 2, 3))).tolist()
    assert 0.5 <= min(factors) < 0.52
    assert 1.48 < max(factors) <= 1.5 + 1e-5
    assert 0.9 < sum(factors) / 300 < 1.1  # 1 expected, standard error .017


def test_saturation_leaves_grey_images_alone() -> None:
    grey = noise(channels=1)
    assert torch.equal(changed(grey, saturation=1.0), grey)
    repeated = grey.repeat(1, 3, 1, 1)
    torch.testing.assert_close(changed(repeated, saturation=1.0), repeated, atol=1e-6, rtol=0)


def test_saturation_comes_after_contrast() -> None:
    images = noise(64, channels=3)
    draws = torch.rand(64, Augmenter.PER_IMAGE, generator=torch.manual_seed(0))
    one_by_one = augmenter(saturation=0.9)(changed(images, contrast=0.9), draws)
    assert torch.equal(changed(images, contrast=0.9, saturation=0.9), one_by_one)


def test_saturation_has_a_draw_of_its_own() -> None:
    images = noise(channels=3)
    draws = torch.rand(8, Augmenter.PER_IMAGE, generator=torch.manual_seed(0))
    other = draws.clone()
    other[:, SATURATION] = 1 - draws[:, SATURATION]
    rest = augmenter(**EVERYTHING | {"saturation": 0.0})
    assert torch.equal(rest(images.clone(), draws), rest(images.clone(), other))
    other[:, :SATURATION] = 1 - draws[:, :SATURATION]
    other[:, SATURATION] = draws[:, SATURATION]
    alone = augmenter(saturation=0.8)
    assert torch.equal(alone(images.clone(), draws), alone(images.clone(), other))


def test_erasing_sets_one_rectangle_to_the_mean() -> None:
    images = noise(300, side=40)
    result = changed(images, erasing=1.0)
    for before, after in zip(images[:, 0], result[:, 0]):
        rows, columns = ((before != after).any(axis).nonzero().flatten() for axis in (1, 0))
        height, width = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
        assert min(height, width) >= 5  # .15 of 40 pixels, less one
        assert max(height, width) <= 19  # .45 of 40 pixels, and one
        inside = after[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        torch.testing.assert_close(inside, torch.full_like(inside, float(before.mean())), atol=1e-5, rtol=0)
        assert int((before != after).sum()) == height * width
    share = (images != result).float().mean()
    assert 0.08 < share < 0.1  # the mean of a side is .3: .09 of the area


def test_erasing_is_drawn_per_image() -> None:
    images = noise(400)
    hit = (changed(images, erasing=0.25) != images).any(3).any(2).any(1)
    assert 60 < int(hit.sum()) < 140  # 100 expected, standard deviation 8.7


@pytest.mark.parametrize("channels", [1, 3])
def test_range_and_shape_are_kept(channels: int) -> None:
    images = noise(64, channels=channels)
    result = changed(images, **EVERYTHING)
    assert result.shape == images.shape
    assert result.dtype == torch.float32
    assert result.min() >= 0
    assert result.max() <= 1
    assert not torch.equal(result, images)


def test_the_seed_decides_the_images() -> None:
    images = noise()
    one, same, other = (changed(images, seed=seed, **EVERYTHING) for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    again = augmenter(**EVERYTHING)
    again.draw(5, 9)  # what was drawn before is no matter
    assert torch.equal(again(images.clone(), again.draw(8, 3)), one)


def test_images_of_a_batch_get_different_changes() -> None:
    same = noise(1).repeat(8, 1, 1, 1)
    result = changed(same, rotation=30.0)
    assert len({tuple(image.flatten().tolist()) for image in result}) == 8


@pytest.mark.parametrize("ranks", [2, 4])
def test_parts_of_ranks_are_the_whole_batch(ranks: int) -> None:
    images = noise(8, channels=3)
    whole = changed(images, **EVERYTHING)
    for rank in range(ranks):
        one = augmenter(**EVERYTHING)
        part = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
        assert torch.equal(one(images[part].clone(), one.draw(8, 0)[part]), whole[part])


def test_pixels_become_numbers_from_0_to_1() -> None:
    grey = torch.tensor([[[0, 51], [102, 255]]], dtype=torch.uint8)
    torch.testing.assert_close(to_float(grey, 2), torch.tensor([[[[0.0, 0.2], [0.4, 1.0]]]]))
    colour = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    colour[0, 0, 1] = torch.tensor([255, 0, 51])
    result = to_float(colour, 2)
    assert result.shape == (1, 3, 2, 2)
    torch.testing.assert_close(result[0, :, 0, 1], torch.tensor([1.0, 0.0, 0.2]))


def test_resizing_is_an_average_with_antialias() -> None:
    pixels = torch.tensor([[[0, 0, 255, 255]] * 4], dtype=torch.uint8)
    half = to_float(pixels, 2)
    # triangle filter of width 4 around pixel 1/2: weights 3/8 3/8 1/8 of 7/8 within the image
    torch.testing.assert_close(half[0, 0], torch.tensor([[1 / 7, 6 / 7]] * 2))
    even = torch.full((2, 48, 48), 77, dtype=torch.uint8)
    torch.testing.assert_close(to_float(even, 31), torch.full((2, 1, 31, 31), 77 / 255))


def test_resizing_does_not_depend_on_the_batch() -> None:
    pixels = torch.randint(256, (5, 48, 48, 3), dtype=torch.uint8, generator=torch.manual_seed(0))
    whole = to_float(pixels, 64)
    assert whole.shape == (5, 3, 64, 64)
    assert 0 <= whole.min() < whole.max() <= 1
    assert all(torch.equal(to_float(pixels[i : i + 1], 64)[0], whole[i]) for i in range(5))


def normalized(images: Tensor, settings: Input) -> Tensor:
    out = torch.empty(len(images), settings.channels, *images.shape[2:])
    normalize(images, settings, out)
    return out


def test_grey_is_repeated_for_a_model_of_three_channels() -> None:
    settings = Input(channels=3, mean=[0.5, 0.4, 0.3], std=[0.5, 0.25, 0.1])
    result = normalized(torch.full((2, 1, 4, 4), 0.6), settings)
    assert result.shape == (2, 3, 4, 4)
    # (.6 - .5) / .5, (.6 - .4) / .25, (.6 - .3) / .1
    torch.testing.assert_close(result[1, :, 3, 3], torch.tensor([0.2, 0.8, 3.0]))


def test_one_number_is_for_all_channels() -> None:
    result = normalized(torch.full((2, 3, 4, 4), 0.6), Input(channels=3, mean=[0.5], std=[0.25]))
    torch.testing.assert_close(result, torch.full((2, 3, 4, 4), 0.4))  # (.6 - .5) / .25


def test_colour_becomes_its_luma_for_a_model_of_one_channel() -> None:
    colour = torch.tensor([0.9, 0.6, 0.3]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    result = normalized(colour, Input(channels=1, mean=[0.5], std=[0.25]))
    assert result.shape == (1, 1, 2, 2)
    # grey .299 * .9 + .587 * .6 + .114 * .3 = .6555; (.6555 - .5) / .25
    torch.testing.assert_close(result, torch.full((1, 1, 2, 2), 0.622))


def test_luma_is_kept_by_saturation_and_is_what_a_grey_model_sees() -> None:
    """Saturation turns about the same grey that colour becomes, so a model of one channel does not see it."""
    shape, random = (16, 8, 8, 3), torch.manual_seed(0)
    pixels = torch.randint(96, 160, shape, dtype=torch.uint8, generator=random)  # far enough from black and white
    grey, colour = Input(image_size=8, channels=1), Input(image_size=8, channels=3)
    augment = augmenter(saturation=1.0)
    change = augment.changes(augment.draw(16, 0), 8)
    torch.testing.assert_close(model_input(pixels, grey, change), model_input(pixels, grey), atol=1e-5, rtol=0)
    assert (model_input(pixels, colour, change) - model_input(pixels, colour)).abs().max() > 0.1
    red, green, blue = pixels.double().unbind(3)
    luma = (0.299 * red + 0.587 * green + 0.114 * blue) / 255
    wanted = ((luma - 0.5) / 0.25).float().unsqueeze(1)
    torch.testing.assert_close(model_input(pixels, grey), wanted, atol=1e-5, rtol=0)


# The whole way, a few images at a time


@pytest.mark.parametrize(("side", "channels"), [(48, 1), (200, 1), (200, 3)])
def test_the_model_input_is_made_a_few_images_at_a_time(side: int, channels: int) -> None:
    """200 pixels: 6 grey images at once, 2 coloured ones; the result is that of each alone."""
    shape = (9, side, side) if channels == 1 else (9, side, side, 3)
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=torch.manual_seed(0))
    settings = Input(image_size=side, channels=channels, mean=[0.4], std=[0.2])
    augment = augmenter(**EVERYTHING)
    draws = augment.draw(9, 1)
    sizes: list[int] = []

    def change(images: Tensor, rows: slice) -> Tensor:
        sizes.append(len(images))
        return augment(images, draws[rows])

    found = model_input(pixels, settings, change)
    assert sizes == {(48, 1): [9], (200, 1): [6, 3], (200, 3): [2, 2, 2, 2, 1]}[side, channels]
    assert found.shape == (9, channels, side, side)
    for place in range(9):
        alone = augment(to_float(pixels[place : place + 1], side), draws[place : place + 1])
        torch.testing.assert_close(found[place], (alone[0] - 0.4) / 0.2, atol=1e-5, rtol=0)
    plain = model_input(pixels, settings)
    torch.testing.assert_close(plain, (to_float(pixels, side) - 0.4) / 0.2, atol=1e-5, rtol=0)


@pytest.mark.parametrize("inference", [False, True])
def test_threads_share_the_images_and_change_no_bit(inference: bool) -> None:
    """Nor are more threads than wished left to torch, in a thread that is there or in a new one."""
    pixels = torch.randint(256, (7, 200, 200), dtype=torch.uint8, generator=torch.manual_seed(0))
    settings = Input(image_size=200, channels=3, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4])
    augment = augmenter(**EVERYTHING)
    draws = augment.draw(7, 1)
    seen: list[tuple[int, int, slice]] = []

    def change(images: Tensor, rows: slice) -> Tensor:
        seen.append((threading.get_ident(), torch.get_num_threads(), rows))
        return augment(images, draws[rows])

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
    assert sorted(rows.start for _, _, rows in seen) == [0, 3, 6]
    assert {threads for _, threads, _ in seen} == {1}
    assert threading.get_ident() not in {thread for thread, _, _ in seen}


# Mixed images


def mixture(seed: int, side: int = 16, **settings: float) -> Mixture:
    found = draw_mixture(Augment(**(NOTHING | settings)), side, seed)
    assert found is not None
    return found


@pytest.mark.parametrize(("images", "partners"), [(4, [1, 0, 3, 2]), (5, [1, 0, 3, 2, 4]), (1, [0])])
def test_neighbours_are_mixed(images: int, partners: list[int]) -> None:
    assert Mixture.partner(torch.zeros(images, 2)).tolist() == partners


def test_mixup_is_the_weighted_mean_of_two_images() -> None:
    images = noise(5)
    found = Mixture(0.75, None)(images)
    torch.testing.assert_close(found[0], 0.75 * images[0] + 0.25 * images[1])
    torch.testing.assert_close(found[3], 0.75 * images[3] + 0.25 * images[2])
    torch.testing.assert_close(found[4], images[4])


def test_cutmix_takes_a_rectangle_from_the_other_image() -> None:
    images = noise(4, channels=3)
    found = Mixture(0.9, (slice(2, 5), slice(0, 7)))(images)
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[2:5, 0:7] = True
    assert torch.equal(found[0][:, inside], images[1][:, inside])
    assert torch.equal(found[0][:, ~inside], images[0][:, ~inside])
    assert torch.equal(found[3][:, inside], images[2][:, inside])


def test_without_settings_nothing_is_mixed() -> None:
    assert draw_mixture(Augment(**NOTHING), 16, 0) is None


def test_the_share_of_mixup_is_drawn_from_beta() -> None:
    shares = [mixture(seed, mixup=0.5).share for seed in range(2000)]
    assert 0.5 <= min(shares) < 0.51
    assert max(shares) <= 1
    # of max(x, 1 - x), x ~ Beta(1/2, 1/2), the arcsine law: the mean is 1/2 + 1/pi, the standard deviation .158
    assert abs(sum(shares) / 2000 - (0.5 + 1 / math.pi)) < 4 * 0.158 / 2000**0.5
    assert all(mixture(seed, mixup=0.5).box is None for seed in range(20))


def test_the_share_of_cutmix_is_that_of_the_pixels() -> None:
    for seed in range(300):
        found = mixture(seed, side=40, cutmix=1.0)
        assert found.box is not None
        rows, columns = found.box
        assert 0 <= rows.start <= rows.stop <= 40
        assert 0 <= columns.start <= columns.stop <= 40
        assert found.share == 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / 1600
        assert found.share >= 0.45  # half, but for rounding to whole pixels
    areas = [1 - mixture(seed, side=40, cutmix=1.0).share for seed in range(300)]
    assert max(areas) > 0.4


def test_where_both_are_on_each_batch_gets_one() -> None:
    cut = sum(mixture(seed, mixup=0.3, cutmix=0.9).box is not None for seed in range(400))
    assert 265 < cut < 335  # 300 expected, standard deviation 8.7


def test_the_seed_decides_the_mixture() -> None:
    assert mixture(3, cutmix=1.0) == mixture(3, cutmix=1.0)
    assert len({mixture(seed, mixup=1.0).share for seed in range(50)}) == 50
