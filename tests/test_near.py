"""Near duplicates: the same photograph changed a little is found, another one is not."""

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageDraw

from fer.data.near import SIDE, nearest, pairs, thumbnails

RNG = np.random.default_rng(1)
# smooth noise: as different from each other as photographs of different people
PHOTOS = np.stack(
    [np.asarray(Image.fromarray(RNG.integers(0, 256, (6, 6), np.uint8)).resize((48, 48), 3)) for _ in range(40)]
)
BLANK = np.full((2, 48, 48), 9, np.uint8)


def watermarked(photo: np.ndarray) -> np.ndarray:
    image = Image.fromarray(photo)
    ImageDraw.Draw(image).text((3, 36), "st", fill=220)
    return np.asarray(image)


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mirrored": lambda photo: photo[:, ::-1],
    "watermark": watermarked,
    "brighter": lambda photo: (photo * 0.7 + 60).astype(np.uint8),
    "shifted": lambda photo: np.roll(photo, 1, axis=1),
    "larger": lambda photo: np.asarray(Image.fromarray(photo).resize((96, 96), 3)),
    "in colour": lambda photo: np.repeat(photo[..., None], 3, axis=2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_nearest_to_its_original_and_above_the_threshold(change: str) -> None:
    changed = thumbnails(np.stack([CHANGES[change](photo) for photo in PHOTOS[::-1]]), change == "mirrored")
    rows, cosines = nearest(changed, thumbnails(PHOTOS))
    assert (rows.tolist(), cosines.min() > 0.94) == (list(range(39, -1, -1)), True)
    assert nearest(changed[:20], thumbnails(PHOTOS[:20]))[1].max() < 0.9  # their originals are not among them


def test_a_blank_image_is_like_none_and_nothing_is_near_to_nothing() -> None:
    assert nearest(thumbnails(BLANK), thumbnails(PHOTOS))[1].tolist() == [0, 0]
    rows, cosines = nearest(thumbnails(PHOTOS[:2]), thumbnails(BLANK[:0]))
    assert (rows.tolist(), cosines.tolist()) == ([-1, -1], [-1, -1])


def test_pairs_far_apart_and_in_the_mirror() -> None:
    noise = RNG.integers(0, 256, (1100, SIDE, SIDE), np.uint8)  # more than are compared at once
    noise[[590, 1080]], noise[1099] = noise[3], noise[1098, :, ::-1]
    assert pairs(thumbnails(noise)).T.tolist() == [[3, 590], [3, 1080], [590, 1080]]
    assert pairs(thumbnails(noise), mirrored=True).T.tolist() == [[1098, 1099]]
