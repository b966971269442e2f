"""The images of a split come in the requested order, from memory or prefetched by other processes."""

import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_data

from fer.batches import Pixels
from fer.data.dataset import Split, open_data
from fer.files import sha256

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _readers_of_a_clean_process() -> Iterator[None]:
    """Another test may have run a flow in this process; what is forked of it then ends with status 1."""
    before = torch.multiprocessing.get_start_method()
    torch.multiprocessing.set_start_method("forkserver", force=True)
    multiprocessing.set_forkserver_preload(["fer.batches"])  # else each reader imports torch
    yield
    torch.multiprocessing.set_start_method(before, force=True)


@pytest.fixture
def split(tmp_path: Path) -> Split:
    """40 images in colour."""
    folder = make_data(tmp_path / "data")
    grey = np.load(folder / "upscaled" / "images.npy")
    np.save(folder / "upscaled" / "images.npy", np.stack([grey, 255 - grey, grey // 2], -1))
    path = folder / "splits" / "summary.json"
    made_of = {"image_shape": [16, 16, 3], "images_sha256": sha256(folder / "upscaled" / "images.npy")}
    path.write_text(json.dumps(json.loads(path.read_text()) | made_of))
    return open_data(folder).split("val")


PLAN = [np.array([3, 0, 3]), np.array([39]), np.arange(40)[::-1].copy(), np.array([7, 8])]


def wanted(split: Split, index: np.ndarray) -> np.ndarray:
    return np.load(str(split.images.filename))[split.rows[index]]  # type: ignore[attr-defined]


def test_batches_come_in_their_order_read_ahead_or_held(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [np.load(str(split.images.filename))[split.rows[index]] for index in PLAN]  # type: ignore[attr-defined]
    pixels = Pixels(split, CPU, 0.5, 2)
    for kind in ("from the file", "read ahead", "held"):
        pixels.streams = kind == "read ahead"  # as where a GPU has no room
        if kind == "held":
            pixels.load()
            monkeypatch.setattr(Split, "pixels", None)  # the file is not read again
        for expected, batch in zip(wanted, pixels.ahead(PLAN), strict=True):
            assert batch.dtype == torch.uint8
            np.testing.assert_array_equal(batch.numpy(), expected)


class Gpu:
    """Stands for a device of kind cuda, of which only the kind is asked."""

    type = "cuda"


def test_a_split_is_held_where_it_takes_no_more_than_its_share(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[int] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 40 * split.images[0].nbytes, 10**12))
    monkeypatch.setattr(Pixels, "load", lambda pixels: loaded.append(len(pixels.split)))
    for share, held in ((0.499, []), (0.5, [40])):
        Pixels(split, Gpu(), share, 2)  # type: ignore[arg-type]
        assert loaded == held
