"""Encoded images are those of the array, to the byte, in every use; what is damaged is one line."""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, prepared, refusal, small_run, tells
from PIL import Image
from safetensors.torch import load_file

from fer.batches import Pixels
from fer.data import encoded
from fer.data.check import check
from fer.data.dataset import open_data
from fer.data.encoded import Encoded, Shards
from fer.data.images import open_images
from fer.evaluate import evaluate
from fer.run_folder import read_rows
from fer.signals import Stopped
from fer.super_resolution import networks
from fer.train import fit
from pipelines.data_sets import Prepared
from pipelines.stages.download import download
from pipelines.stages.split import split
from pipelines.stages.upscale import upscale

STORES = ("array", "encoded")
RAW, UP = "raw/images.npy", "upscaled/images.npy"
TIMES = ("seconds", "images_per_second", "time")
RNG = np.random.default_rng(3)
FORMATS: dict[str, dict[str, Any]] = {
    "png": {}, "bmp": {}, "tiff": {}, "ppm": {}, "webp": {"lossless": True}, "jpeg": {"quality": 90}
}  # fmt: skip
AS_THEY_ARE: dict[str, dict[str, Any]] = {
    "one size": {}, "sizes that differ": {}, "made small": {"size": 20}, "in grey": {}, "boxes": {"size": 24}
}  # fmt: skip


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder. Readers start from a clean process, as another test may have run a flow in this one."""
    monkeypatch.chdir(tmp_path)
    before = torch.multiprocessing.get_start_method()
    torch.multiprocessing.set_start_method("forkserver", force=True)
    multiprocessing.set_forkserver_preload(["fer.batches"])
    yield tmp_path
    torch.multiprocessing.set_start_method(before, force=True)


def stored(store: str, dataset: str = "folders", path: str = "faces", **changes: Any) -> Prepared:
    """The data set called `store`, kept so."""
    own = {key: changes.pop(key) for key in ("super_resolution", "split", "machine") if key in changes}
    return replace(prepared(dataset, path, {**changes, "store": store}, **own), name=store)


def picture(mode: str, width: int = 30, height: int = 22) -> Image.Image:
    """Smooth noise."""
    return Image.fromarray(RNG.integers(0, 256, (4, 6, 3), dtype=np.uint8)).resize((width, height), 3).convert(mode)


def write_pictures(folder: Path, kind: str) -> None:
    """Every format, mode and way to lie, in a list; with other sizes, or boxes that also reach beyond the edge."""
    folder.mkdir()
    lines = ["path,label,split" + ",box" * (kind == "boxes")]
    modes = ("L",) if kind == "in grey" else ("L", "RGB", "RGBA", "P")
    for number, (name, options) in enumerate(FORMATS.items()):
        for mode in modes:
            for turn in range(1, 9) if name in ("jpeg", "webp", "png") and mode in ("L", "RGB") else (1,):
                if (name in ("jpeg", "ppm") and mode in ("RGBA", "P")) or (name == "webp" and kind == "in grey"):
                    continue
                side = 3 * (turn - 1) if kind in ("sizes that differ", "made small") else 0
                size = (22, 30) if turn > 4 else (30, 22)  # upright they are alike
                exif = Image.Exif()
                exif[0x0112] = turn
                file = f"{len(lines):03}.{name}"
                extra = {"exif": exif} if turn > 1 else {}
                picture(mode, size[0] + side, size[1]).save(folder / file, **options, **extra)
                box = f",{turn} 2 {20 + number} 19" if kind == "boxes" else ""  # some end beyond the edge
                usage = ("train", "val", "test")[len(lines) % 3]
                lines.append(f"{file},{('happy', 'sad')[len(lines) // 3 % 2]},{usage}{box}")
    (folder / "list.csv").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("kind", AS_THEY_ARE)
def test_every_picture_is_decoded_to_the_pixels_of_the_array(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(Path("faces"), kind)
    monkeypatch.setattr(encoded, "SHARD", 4000)
    opened = []
    for store in STORES:
        one = stored(store, "table", **AS_THEY_ARE[kind])
        download(one)
        opened.append(open_images(one.folder / RAW, "download"))
    array, images = opened
    assert isinstance(images, Encoded)
    assert (images.shape, images.ndim, images.dtype, len(images)) == (array.shape, array.ndim, array.dtype, len(array))
    assert (images.ndim == 3) == (kind == "in grey")
    np.testing.assert_array_equal(images[:], array)
    folders = [Path("data/sets") / store / "raw" for store in STORES]
    for name in ("labels.csv", "source.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    delivered = b"".join(path.read_bytes() for path in sorted(Path("faces").iterdir()) if path.suffix != ".csv")
    shards = sorted(folders[1].glob("*.bin"))
    assert (len(shards) > 1, b"".join(path.read_bytes() for path in shards)) == (True, delivered)


def write_folders(folder: Path, count: int = 48, side: int = 16) -> None:
    """Class folders with splits: bars at the height of their class, and in test a mirrored copy of one in train."""
    for number in range(count):
        usage, label = ("train", "train", "val", "test")[number // 4 % 4], number % 4
        image = np.array(picture("RGB", side, side)) // 2
        image[label * side // 4 : (label + 1) * side // 4] += 120
        path = folder / usage / "abcd"[label] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    first = Image.open(folder / "train/a/000.png")
    first.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "test/a/999.png")


def made(store: str, **changes: Any) -> Path:
    """The folder of the data set after its stages."""
    one = stored(store, **changes)
    for stage in (download, upscale, split):
        stage(one)
    return one.folder


def test_rows_are_chosen_as_of_an_array() -> None:
    write_folders(Path("faces"))
    array, images = (open_data(made(store)).images for store in STORES)
    mask = np.arange(len(array)) % 5 == 0
    for rows in (
        0,
        -1,
        np.int64(3),
        slice(2, 9, 3),
        slice(None, None, -1),
        [4, 1, 4],
        np.array([-2, 0]),
        mask,
        mask.nonzero()[0][:0],
    ):
        np.testing.assert_array_equal(images[rows], array[rows])
    with pytest.raises(IndexError):
        images[len(array)]


@pytest.mark.parametrize("method", ["bicubic", "lanczos", "swin2sr"])
def test_they_are_enlarged_when_they_are_read_or_by_a_network_before(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folders(Path("faces"))
    Path("weights").mkdir()
    Path("weights/model.safetensors").write_bytes(b"one")
    monkeypatch.setitem(networks.LOADERS, "swin2sr", lambda *_: torch.nn.Upsample(scale_factor=2))
    keys: dict[str, Any] = {"super_resolution": {"method": method, "scale": 2}, "machine": {"weights": "weights"}}
    array, images = (made(store, **keys) for store in STORES)
    np.testing.assert_array_equal(open_data(images).images[:], np.load(array / UP))
    assert (array / "upscaled/upscale.json").read_bytes() == (images / "upscaled/upscale.json").read_bytes()
    assert ((images / UP).stat().st_size < 10_000) == (method != "swin2sr")
    plain = made("encoded")
    assert open_data(plain).images.shape[1:] == (16, 16, 3)


def test_splits_and_checks_are_those_of_the_array() -> None:
    write_folders(Path("faces"))
    array, images = (made(store, split={"drop_leaked_train": "none"}) for store in STORES)
    for name in ("train.csv", "val.csv", "test.csv"):
        assert (array / "splits" / name).read_bytes() == (images / "splits" / name).read_bytes()
    assert "train/a/000.png,train,mirrored" in (images / "splits/test.csv").read_text()
    assert check(array) == check(images)
    summaries = [json.loads((folder / "splits/summary.json").read_text()) for folder in (array, images)]
    assert [summary.pop("images_sha256") for summary in summaries] == [
        hashlib.sha256((folder / UP).read_bytes()).hexdigest() for folder in (array, images)
    ]
    assert summaries[0] == summaries[1]


COLOUR: dict[str, Any] = {
    "input": {"image_size": 16, "channels": 3},
    "batch_size": 4,
    "loss": {"name": "cross_entropy"},
}


def result(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], bytes]:
    """Weights, rows and predictions."""
    rows = [{key: value for key, value in row.items() if key not in TIMES} for row in read_rows(folder)]
    return load_file(folder / "last/model.safetensors"), rows, (folder / "predictions_test.csv").read_bytes()


def test_a_run_equals_that_on_the_array_cut_or_not(project: Path) -> None:
    write_folders(Path("faces"))
    array, images = (made(store) for store in STORES)
    run = small_run(**COLOUR, epochs=2)
    here, ahead = (CPU.model_copy(update={"readers": readers}) for readers in (0, 2))
    looks = iter(range(100))
    with pytest.raises(Stopped):
        fit("x", run, ahead, images, "cut", leaves=lambda: next(looks) == 8)  # in the second epoch
    whole = [fit("x", run, here, data, "runs") for data in (array, images)]
    whole.append(fit("x", run, ahead, images, "cut"))
    for folder, data in zip(whole, (array, images, images)):
        evaluate(folder, data, here)
    (weights, rows, predicted), *others = map(result, whole)
    for other in others:
        torch.testing.assert_close(other[0], weights, rtol=0, atol=0)
        assert (other[1], other[2]) == (rows, predicted)
    assert whole[0].name != whole[1].name == whole[2].name


def test_pictures_added_at_the_end_leave_the_full_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoded, "SHARD", 3000)
    write_folders(Path("faces"))

    def shards() -> list[bytes]:
        return [path.read_bytes() for path in sorted((made("encoded") / "raw").glob("*.bin"))]

    before = shards()
    assert shards() == before
    assert max(map(len, before)) <= 3000
    picture("RGB", 16, 16).save("faces/val/d/zzz.png")
    after = shards()
    assert (before[:-1], len(before) > 5) == (after[: len(before) - 1], True)
    assert after[len(before) - 1].startswith(before[-1])


def resize_index(path: Path) -> None:
    index = np.load(path)
    index["shape"][3] = 8, 8, 3
    np.save(path, index)


def swap_rows(path: Path) -> None:
    index = np.load(path)
    np.save(path, index[::-1])


def flip(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[700] ^= 1
    path.write_bytes(whole)


SHARD = "raw/images-00000.bin"
AGAIN = "; run `dvc checkout` or, to make it again, `dvc repro --force --single-item download`"
FAULTS: dict[str, tuple[str, Callable[[Path], object]]] = {
    f"/{SHARD}: has ... says{AGAIN}": (SHARD, lambda path: os.truncate(path, path.stat().st_size - 1)),
    f"/{SHARD}: not found; run `dvc repro download` to make it or `dvc pull` to fetch it": (SHARD, Path.unlink),
    f"/{SHARD}: the picture of row 0 is damaged{AGAIN}": (SHARD, flip),
    f"/{UP}: not an index of images of one size ... upscale` to make it again": (UP, resize_index),
    f"/{UP}: its SHA-256 is ... ; run `dvc repro`": (UP, swap_rows),
}


@pytest.mark.parametrize("message", FAULTS)
def test_damage_is_one_line(message: str) -> None:
    write_folders(Path("faces"), 16, 24)
    folder = made("encoded")
    name, damage = FAULTS[message]
    damage(folder / name)

    def whole() -> None:
        open_data(folder).images[:]

    tells(folder, message, whole)


def test_a_picture_that_a_reader_cannot_decode_is_one_line() -> None:
    write_folders(Path("faces"))
    folder = made("encoded")
    size = len(open_data(folder).images)
    with Shards(folder / "raw", (size, 16, 16, 3), [None] * size) as shards:
        for _ in range(size):
            shards.add(b"of a format that this Pillow does not know")
    (folder / UP).write_bytes((folder / RAW).read_bytes())
    summary = json.loads((folder / "splits/summary.json").read_text())
    summary["images_sha256"] = hashlib.sha256((folder / UP).read_bytes()).hexdigest()
    (folder / "splits/summary.json").write_text(json.dumps(summary))
    pixels = Pixels(open_data(folder).split("val"), torch.device("cpu"), 0.5, 1)
    for pixels.decodes in (True, False):
        pixels.streams = not pixels.decodes  # in a process, as for a GPU without the room
        told = refusal(list, pixels.ahead([np.arange(3)]))
        assert told.startswith(f"{folder / SHARD}: the picture of row ")
        assert told.endswith(": install the Pillow of constraints.txt")


def test_batches_come_in_their_order_from_threads_and_processes() -> None:
    write_folders(Path("faces"))
    array, images = (open_data(made(store)).split("train") for store in STORES)
    plan = [np.array([3, 0, 3]), np.array([23]), np.arange(24)[::-1].copy(), *np.arange(20).reshape(10, 2)]
    pixels = Pixels(images, torch.device("cpu"), 0.5, 2)
    for kind in ("threads", "processes", "held"):
        pixels.decodes, pixels.streams = kind == "threads", kind == "processes"
        if kind == "held":
            pixels.load()
        for index, batch in zip(plan, pixels.ahead(plan), strict=True):
            torch.testing.assert_close(batch, array.pixels(index), rtol=0, atol=0)


def test_rows_of_pixels_stay_an_array() -> None:
    Path("faces").mkdir()
    rows = [
        f"{n % 7},{' '.join(['9'] * 2304)},{usage}" for n, usage in enumerate(["Training"] * 7 + ["PublicTest"] * 7)
    ]
    rows += [row.replace("PublicTest", "PrivateTest") for row in rows[7:]]
    Path("faces/fer2013.csv").write_text("\n".join(["emotion,pixels,Usage", *rows]))
    assert refusal(download, stored("encoded", "fer2013")) == (
        "data.store: the rows of pixels of this data set are kept as an array only: set it to array"
    )
    assert not (Path("data/sets/encoded") / "raw").exists()
