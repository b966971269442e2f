"""images.npy: what is opened and what is refused, and that rows are written in place on a disk that holds them."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import refusal

from fer.data.images import allocate_images, open_images, write_rows
from fer.errors import UserError

AGAIN = "; run `dvc repro --force --single-item upscale` to make it again"
MISSING = "not found; run `dvc repro upscale` to make it or `dvc pull` to fetch it"
DAMAGED = f"damaged or not a .npy file{AGAIN}"
FORM = "must be uint8 [N, H, W] or [N, H, W, 3], found"


def put(path: Path, first: int, images: np.ndarray) -> None:
    with path.open("r+b") as file:
        write_rows(file, first, images)


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def saved(array: np.ndarray) -> Callable[[Path], object]:
    return lambda path: np.save(path, array, allow_pickle=True)


def archive(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, images=np.zeros(3))


FAULTS: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: path.unlink(), MISSING),
    (lambda path: os.truncate(path, path.stat().st_size - 1), DAMAGED),
    (lambda path: path.write_text("<html>"), DAMAGED),
    (saved(np.array([{}], dtype=object)), DAMAGED),
    (archive, f"not a .npy file{AGAIN}"),
    (saved(random_images(5, 12, 12, 4)), f"{FORM} uint8 [5, 12, 12, 4]{AGAIN}"),
    (saved(np.zeros((5, 12, 12))), f"{FORM} float64 [5, 12, 12]{AGAIN}"),
]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # numpy leaves the bad file open
def test_a_bad_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "images.npy"
    for damage, message in FAULTS:
        np.save(path, random_images(5, 12, 12))
        damage(path)
        assert refusal(open_images, path, "upscale") == f"{path}: {message}"


@pytest.mark.parametrize("shape", [(9, 4, 3), (9, 4, 3, 3)])
def test_rows_are_written_in_any_order_and_stay_on_the_disk(tmp_path: Path, shape: tuple[int, ...]) -> None:
    images, path = random_images(*shape), tmp_path / "images.npy"
    np.save(tmp_path / "expected.npy", images)
    allocate_images(path, images.shape)
    assert not np.load(path).any()
    for first, last in ((6, 9), (0, 1), (4, 6), (1, 4)):
        put(path, first, images[first:last])
    put(path, 2, np.asfortranarray(images[2:4]))
    for first, rows in ((8, images[:2]), (0, images[:, :2])):
        with pytest.raises(ValueError, match=r"do not fit into \(9, 4, 3"):
            put(path, first, rows)
    assert path.read_bytes() == (tmp_path / "expected.npy").read_bytes()
    opened = open_images(path, "upscale")
    assert isinstance(opened, np.memmap)
    assert not opened.flags.writeable
    np.testing.assert_array_equal(opened, images)


def test_a_disk_without_the_room_gets_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "images.npy"
    with pytest.raises(UserError, match=r"it takes 10,000,000,000.0 MB and [\d,.]+ MB are free \(DVC's cache takes as"):
        allocate_images(path, (10**12, 100, 100))

    def full(_: int, offset: int, length: int) -> None:
        assert (offset % 64, length) == (0, 9 * 3 * 4)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        allocate_images(path, (9, 3, 4))
    assert list(tmp_path.iterdir()) == []
