"""Stage upscale: interpolation to the byte, networks, shards that outlive what kills them, quality, mistakes."""

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fer.data.images import allocate_images, write_rows
from fer.errors import UserError
from fer.super_resolution import methods
from fer.super_resolution.dic import PUBLISHED, Dic
from fer.super_resolution.methods import Method
from fer.super_resolution.quality import down_then_up
from fer.super_resolution.swin2sr import load_swin2sr
from pipelines.params import Params, SuperResolution, load
from pipelines.stages import run
from pipelines.stages import upscale as stage
from pipelines.stages.upscale import upscale

ROOT = Path(__file__).resolve().parents[1]
METHODS = {name: row.interpolate for name, row in methods.METHODS.items() if row.interpolate}
KERNELS = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}
OUT = Path("data/upscaled/images.npy")
PARTIAL = Path("data/upscaled.partial")
AGAIN = "run `dvc repro --force --single-item download` to make it again"


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def params(method: str, scale: int, **keys: object) -> Params:
    tree = load(ROOT / "params.yaml").model_dump()
    tree["super_resolution"] |= {"method": method, "scale": scale, "device": "cpu", "weights": "weights"}
    tree["super_resolution"] |= {key: str(value) if isinstance(value, Path) else value for key, value in keys.items()}
    return Params.model_validate(tree)


def write_params(**keys: object) -> None:
    """params.yaml in the working directory, for a stage that is run as a command."""
    tree = YAML(typ="safe").load(ROOT / "params.yaml")
    tree["super_resolution"] |= {"device": "cpu", "weights": "weights"} | keys
    YAML().dump(tree, Path("params.yaml"))


def beside() -> list[str]:
    return sorted(path.name for path in Path("data").iterdir())


def files(folder: Path = OUT.parent) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "data" / "raw" / "images.npy"
    path.parent.mkdir(parents=True)
    np.save(path, random_images(23, 12, 10))
    return path


@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize("scale", [1, 2, 3, 8])
@pytest.mark.parametrize("method", KERNELS)
def test_equals_pillow(method: str, scale: int, channels: tuple) -> None:
    images = random_images(7, 12, 10, *channels)
    out = METHODS[method](images, scale)
    assert out.dtype == np.uint8
    assert out.shape == (7, 12 * scale, 10 * scale, *channels)
    for image, larger in zip(images, out, strict=True):
        expected = Image.fromarray(image).resize((10 * scale, 12 * scale), KERNELS[method])
        np.testing.assert_array_equal(larger, np.asarray(expected))


@pytest.mark.parametrize("method", METHODS)
def test_scale_one_changes_nothing(method: str) -> None:
    images = random_images(5, 9, 9)
    np.testing.assert_array_equal(METHODS[method](images, 1), images)


@pytest.mark.parametrize("method", METHODS)
def test_refuses_a_scale_it_cannot_do(method: str) -> None:
    with pytest.raises(ValueError, match="scale must be"):
        METHODS[method](random_images(2, 4, 4), 2 if method == "none" else 0)


def test_params_know_every_method() -> None:
    assert set(get_args(SuperResolution.model_fields["method"].annotation)) == set(methods.METHODS)


def test_more_images_than_threads_and_none_at_all() -> None:
    assert METHODS["bicubic"](random_images(0, 4, 4), 2).shape == (0, 8, 8)
    assert METHODS["bicubic"](random_images(1000, 2, 2), 2).shape == (1000, 4, 4)


@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize("method", METHODS)
def test_stage_writes_what_numpy_would_save(
    raw: Path, method: str, channels: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = 1 if method == "none" else 2
    images = random_images(23, 12, 10, *channels)
    np.save(raw, images)
    np.save("expected.npy", METHODS[method](images, scale))
    written = []
    for shard in (1, 7, 23, 256):
        monkeypatch.setattr(stage, "SHARD", shard)
        upscale(params(method, scale))
        written.append(OUT.read_bytes())
    assert set(written) == {Path("expected.npy").read_bytes()}
    assert beside() == ["raw", "upscaled"]
    assert sorted(files()) == ["images.npy", "upscale.json"]


def test_stage_shows_no_bar_without_a_terminal(raw: Path, capfd: pytest.CaptureFixture) -> None:
    upscale(params("bicubic", 2))
    assert capfd.readouterr() == ("", "")


def break_raw(raw: Path, fault: str) -> str:
    """Damage the raw array and return the message that is due."""
    path = "data/raw/images.npy"
    if fault == "missing":
        raw.unlink()
        return f"{path}: not found; run `dvc repro download` to make it or `dvc pull` to fetch it"
    if fault in ("cut", "empty file", "text", "pickle", "zip"):
        whole = raw.read_bytes()
        raw.write_bytes({"cut": whole[:-1], "text": b"hello, world"}.get(fault, b""))
        if fault == "pickle":
            np.save(raw, np.array([{}], dtype=object), allow_pickle=True)
        if fault == "zip":
            with open(raw, "wb") as file:
                np.savez(file, images=np.zeros(3))
            return f"{path}: not a .npy file; {AGAIN}"
        return f"{path}: damaged or not a .npy file; {AGAIN}"
    if fault == "no image":
        np.save(raw, random_images(0, 12, 12))
        return f"{path}: holds no image; {AGAIN}"
    images = random_images(5, 12, 12, 4) if fault == "rgba" else np.zeros((5, 12, 12))
    np.save(raw, images)
    found = f"{images.dtype} {list(images.shape)}"
    return f"{path}: must be uint8 [N, H, W] or [N, H, W, 3], found {found}; {AGAIN}"


@pytest.mark.parametrize(
    "fault", ["missing", "cut", "empty file", "text", "pickle", "zip", "no image", "rgba", "float"]
)
def test_stage_refuses_a_bad_array(raw: Path, fault: str) -> None:
    message = break_raw(raw, fault)
    with pytest.raises(UserError) as caught:
        upscale(params("none", 1))
    assert str(caught.value) == message
    assert beside() == ["raw"]


def test_stage_asks_for_room_before_it_writes(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upscale(params("none", 1))
    before = OUT.read_bytes()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 9000, 9000))
    with pytest.raises(UserError) as caught:
        upscale(params("bicubic", 2))
    assert str(caught.value) == (
        "cannot write data/upscaled.partial/images.npy: it takes 0.0 MB and 0.0 MB are free"
        " (DVC's cache takes as much again): free some space and run the command again"
    )
    assert OUT.read_bytes() == before
    assert not Path("data/upscaled.partial").exists()


def test_disk_that_is_too_small_is_one_line_and_status_2(raw: Path) -> None:
    """A file-size limit stands in for the full disk, which is found out before the first image is computed."""
    shutil.copy(ROOT / "params.yaml", "params.yaml")
    limited = "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500)); "
    code = limited + "runpy.run_module('pipelines.stages.upscale', run_name='__main__')"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write data")
    assert done.stderr.count("\n") == 1
    assert beside() == ["raw"]


@pytest.mark.parametrize("fault", ["rows", "progress"])
def test_disk_that_fills_in_the_middle_is_one_line_and_the_stage_goes_on_afterwards(
    raw: Path, fault: str, shards: list[int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """In the second of three shards: a file-size limit ends the write half-way, or progress.json finds no room."""
    np.save("expected.npy", METHODS["bicubic"](np.load(raw), 2))
    upscale(params("none", 1))
    before = files()
    shards.clear()
    rows, content_of, limits = stage.write_rows, Path.write_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(path: Path, first: int, images: np.ndarray) -> None:
        if first == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (128 + 480 * 12, limits[1]))
        try:
            rows(path, first, images)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def no_room(self: Path, content: bytes) -> int:
        if b"8" in content.partition(b"done")[2]:
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return content_of(self, content)

    write_params(method="bicubic", scale=2)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        if fault == "rows":
            patch.setattr(stage, "write_rows", limited)
        else:
            patch.setattr(Path, "write_bytes", no_room)
        run(upscale)
    assert ended.value.code == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "error: cannot write data: the file would exceed the size limit: raise it (ulimit -f)"
        " and run the command again\n"
        if fault == "rows"
        else "error: cannot write data/upscaled.partial/progress.json.partial: the disk is full: "
        "free some space and run the command again\n"
    )
    assert files() == before
    assert shards == ([0] if fault == "rows" else [0, 8])
    run(upscale)
    assert shards == ([0, 8, 16] if fault == "rows" else [0, 8, 8, 16])
    assert OUT.read_bytes() == Path("expected.npy").read_bytes()
    assert beside() == ["raw", "upscaled"]


# Networks


class Tint(nn.Module):
    """Stands for a network: every pixel `scale` times as large, bit for bit alike in whatever batch it comes.

    In the first `tinted` pixels of each image, or in all of them, green is larger by `shift` of 255.
    """

    def __init__(self, scale: int = 2, shift: float = 0, tinted: int | None = None):
        super().__init__()
        self.scale, self.shift, self.tinted = scale, shift, tinted

    def forward(self, images: Tensor) -> Tensor:
        larger = images.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3)
        tint = torch.zeros(larger.shape[2:])
        tint.view(-1)[: self.tinted] = self.shift / 255
        return larger + torch.stack([torch.zeros_like(tint), tint, torch.zeros_like(tint)])


def expected_of(images: np.ndarray, scale: int = 2, shift: int = 0) -> np.ndarray:
    """What Tint makes of the images, in whole numbers."""
    colour = images if images.ndim == 4 else np.stack([images] * 3, -1)
    larger = colour.repeat(scale, 1).repeat(scale, 2).astype(int)
    larger[..., 1] += shift
    return larger.clip(0, 255).astype(np.uint8)


def pretend(monkeypatch: pytest.MonkeyPatch, network: Callable[[int], nn.Module]) -> None:
    """`network(scale)` in the place of Swin2SR, with a file of weights that is as good as any."""
    monkeypatch.setitem(methods.METHODS, "swin2sr", Method(scales=(2, 4), load=lambda _, scale, hub_id: network(scale)))
    Path("weights").mkdir(exist_ok=True)
    Path("weights/model.safetensors").write_bytes(b"one")


@pytest.fixture
def shards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Shards of 8 images; the first rows of those that were computed and written."""
    written: list[int] = []
    real = stage.write_rows

    def recorded(path: Path, first: int, images: np.ndarray) -> None:
        real(path, first, images)
        written.append(first)

    monkeypatch.setattr(stage, "write_rows", recorded)
    monkeypatch.setattr(stage, "SHARD", 8)
    return written


@pytest.fixture(scope="session")
def swin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small Swin2SR of random numbers, x2."""
    from transformers import Swin2SRConfig, Swin2SRForImageSuperResolution

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"image_size": 16, "embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 8}
    folder = tmp_path_factory.mktemp("swin")
    Swin2SRForImageSuperResolution(Swin2SRConfig(**sizes, upscale=2, initializer_range=0.05)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("channels", [(), (3,)])
def test_every_batch_is_whole_and_every_image_in_its_place(
    raw: Path, channels: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = random_images(23, 12, 10, *channels)
    np.save(raw, images)
    np.save("expected.npy", expected_of(images, 4, 40))
    for shard, batches in ((16, [16, 16]), (5, [16] * 5), (256, [16, 16])):
        monkeypatch.setattr(stage, "SHARD", shard)
        network = Scarce(100)
        network.scale = 4
        pretend(monkeypatch, lambda _, network=network: network)  # type: ignore[misc]
        upscale(params("swin2sr", 4))
        assert OUT.read_bytes() == Path("expected.npy").read_bytes()
        assert network.seen[4 if not channels else 0 :] == batches  # four times one image for the probe


class Amplified(nn.Module):
    """The last digits of what a small DIC computes, so that a sum that was rounded otherwise is seen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"num_features": 8, "num_steps": 2, "num_groups": 2, "hg_features": 8, "num_fusion_blocks": 2}
        self.network = Dic(**sizes, num_keypoints=68)

    def forward(self, images: Tensor) -> Tensor:
        return (self.network(images) * 1e5).frac().abs()


def test_a_networks_bytes_depend_on_neither_shards_nor_threads(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(methods.METHODS, "dic", Method(scales=(8,), load=lambda *_: Amplified()))
    np.save(raw, random_images(40, 16, 13))
    found = []
    for shard, threads in ((16, 1), (256, 2), (32, 3), (48, 4)):
        monkeypatch.setattr(stage, "SHARD", shard)
        torch.set_num_threads(threads)
        try:
            upscale(params("dic", 8))
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
        found.append(np.load(OUT))
    assert found[0].shape == (40, 128, 104, 3)
    for larger in found[1:]:
        np.testing.assert_array_equal(larger, found[0])


def test_dic_of_the_published_sizes_runs_as_a_stage(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "BATCH", 1)
    np.save(raw, random_images(1, 7, 8))
    torch.manual_seed(0)
    network = Dic(**PUBLISHED)
    Path("weights").mkdir()
    torch.save(network.state_dict(), "weights/DIC_HELEN.pth")
    monkeypatch.setattr(stage, "GREY", 255)
    upscale(params("dic", 8))
    with torch.inference_mode():
        image = torch.from_numpy(np.load(raw))[:, None].expand(1, 3, -1, -1) / 255
        exact = (network.eval()(image)[0] * 255).double()
    luma = 0.299 * exact[0] + 0.587 * exact[1] + 0.114 * exact[2]
    assert np.load(OUT).shape == (1, 56, 64)
    assert np.abs(np.load(OUT)[0] - luma.numpy()).max() < 1.1  # rounded twice
    assert luma.std() > 10


@pytest.mark.parametrize("shape", [(1, 9, 13), (1, 9, 13, 3), (2, 8, 8), (5, 3, 5, 3)])
def test_one_image_odd_sides_and_colour(raw: Path, swin: Path, shape: tuple[int, ...]) -> None:
    images = random_images(*shape)
    np.save(raw, images)
    upscale(params("swin2sr", 2, weights=swin))
    assert np.load(OUT).shape == (shape[0], 2 * shape[1], 2 * shape[2], 3)
    colour = torch.from_numpy(images if images.ndim == 4 else np.stack([images] * 3, -1)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        exact = load_swin2sr(str(swin), 2, "")(colour / 255) * 255
    assert np.abs(np.load(OUT) - exact.permute(0, 2, 3, 1).numpy()).max() < 0.51
    assert exact.std() > 20
    assert json.loads((OUT.parent / "upscale.json").read_text())["raw_shape"] == list(shape[1:])


# Grey or colour


@pytest.mark.parametrize(
    ("shift", "tolerance", "stored_grey"),
    [(0, 0, True), (4, 4, True), (5, 4, False), (1, 0, False), (200, 255, True), (200, 199, False)],
)
def test_a_network_keeps_grey_images_grey_within_the_tolerance(
    raw: Path, shift: int, tolerance: int, stored_grey: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = random_images(23, 12, 10) // 5  # up to 51, so that no sum is cut at 255
    np.save(raw, images)
    pretend(monkeypatch, lambda scale: Tint(scale, shift))
    monkeypatch.setattr(stage, "GREY", tolerance)
    upscale(params("swin2sr", 2))
    larger = images.repeat(2, 1).repeat(2, 2)
    if stored_grey:  # .299 v + .587 (v + shift) + .114 v
        np.testing.assert_array_equal(np.load(OUT), larger + round(0.587 * shift))
    else:
        np.testing.assert_array_equal(np.load(OUT), np.stack([larger, larger + shift, larger], -1))


@pytest.mark.parametrize(("tinted", "stored_grey"), [(4, True), (6, False)])
def test_one_pixel_in_a_hundred_may_be_coloured(
    raw: Path, tinted: int, stored_grey: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 480 pixels of an image."""
    pretend(monkeypatch, lambda scale: Tint(scale, 60, tinted))
    np.save(raw, random_images(23, 12, 10) // 2)
    upscale(params("swin2sr", 2))
    assert np.load(OUT).ndim == (3 if stored_grey else 4)


def test_the_last_image_too_tells_whether_a_network_keeps_grey(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last image is bright, and only bright ones are tinted."""

    class Bright(Tint):
        def forward(self, images: Tensor) -> Tensor:
            bright = images.amax((1, 2, 3), keepdim=True) > 0.9
            return torch.where(bright, Tint(2, -60)(images), Tint(2)(images))

    images = random_images(23, 12, 10) // 2
    images[-1] += 128
    np.save(raw, images)
    pretend(monkeypatch, lambda scale: Bright())
    upscale(params("swin2sr", 2))
    assert np.load(OUT).shape == (23, 24, 20, 3)


def test_colour_stays_colour(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grey = random_images(23, 12, 10, 1)
    np.save(raw, np.repeat(grey, 3, -1))
    pretend(monkeypatch, Tint)
    monkeypatch.setattr(stage, "GREY", 255)
    for method in ("swin2sr", "bicubic"):
        upscale(params(method, 2))
        assert np.load(OUT).shape == (23, 24, 20, 3)


# Memory


class Scarce(Tint):
    """Has room for so many images, by turns; then for the last number of them."""

    def __init__(self, *room: int):
        super().__init__(2, 40)
        self.room, self.seen = list(room), list[int]()

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(len(images))
        if len(images) > (self.room.pop(0) if len(self.room) > 1 else self.room[0]):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return super().forward(images)


def test_the_batch_is_halved_for_the_whole_output_when_memory_runs_out(
    raw: Path, shards: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """In the third shard, then in the first again: nothing that larger batches made is left."""
    network = Scarce(*[16] * 6, 5)
    pretend(monkeypatch, lambda scale: network)
    upscale(params("swin2sr", 2))
    assert network.seen == [*[1] * 4, 16, 16, 16, 8, 4, 4, 4, 4, 4, 4]
    assert shards == [0, 8, 0, 8, 16]
    np.testing.assert_array_equal(np.load(OUT), expected_of(np.load(raw), shift=40))
    assert json.loads((OUT.parent / "upscale.json").read_text())["batch"] == 4
    assert capsys.readouterr().err == "".join(
        f"out of memory: all over again with {batch} images at once\n" for batch in (8, 4)
    )


def test_the_halved_batch_outlives_the_process(raw: Path, shards: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    network = Scarce(4)
    pretend(monkeypatch, lambda scale: network)
    interrupt(params("swin2sr", 2), monkeypatch)
    network.room, network.seen = [100], []
    upscale(params("swin2sr", 2))
    assert network.seen == [1, 1, 1, 1, 4, 4]
    assert shards == [0, 8, 16]


@pytest.mark.parametrize("seed", range(5))
def test_memory_that_comes_and_goes_changes_no_byte(raw: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    room = random.Random(seed).choices([2, 3, 5, 9, 100], k=30)
    pretend(monkeypatch, lambda scale: Scarce(*room, 2))
    upscale(params("swin2sr", 2))
    np.testing.assert_array_equal(np.load(OUT), expected_of(np.load(raw), shift=40))


@pytest.mark.parametrize("room", [(0,), (*[100] * 6, 0)])
def test_one_image_that_does_not_fit_is_one_line(
    raw: Path, room: tuple, shards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, or after two shards; when there is room again, it begins with large batches."""
    pretend(monkeypatch, lambda scale: Scarce(*room))
    with pytest.raises(UserError) as caught:
        upscale(params("swin2sr", 2))
    assert str(caught.value) == (
        "super_resolution: one image does not fit into the GPU's memory; free it or set device: cpu"
    )
    assert beside() == (["raw"] if room == (0,) else ["raw", "upscaled.partial"])
    shards.clear()
    network = Scarce(100)
    pretend(monkeypatch, lambda scale: network)
    upscale(params("swin2sr", 2))
    assert shards == [0, 8, 16]
    assert set(network.seen[4:]) == {16}
    np.testing.assert_array_equal(np.load(OUT), expected_of(np.load(raw), shift=40))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_pixels_that_are_no_numbers_are_not_stored_as_black(
    raw: Path, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, lambda scale: Tint(scale, bad, 1))
    with pytest.raises(UserError) as caught:
        upscale(params("swin2sr", 2, precision="bf16"))
    assert str(caught.value) == (
        "super_resolution: the network gives pixels that are no numbers with precision bf16; "
        "set it to fp32, or use other weights"
    )
    assert beside() == ["raw"]


# The file


def test_rows_are_written_in_any_order(raw: Path) -> None:
    images, path = random_images(9, 3, 4, 3), Path("images.npy")
    np.save("expected.npy", images)
    allocate_images(path, images.shape)
    assert path.stat().st_size == Path("expected.npy").stat().st_size
    assert not np.load(path).any()
    for first, last in ((6, 9), (0, 1), (4, 6), (1, 4), (4, 5)):
        write_rows(path, first, images[first:last])
    write_rows(path, 9, images[:0])
    write_rows(path, 2, np.asfortranarray(images[2:4]))
    assert path.read_bytes() == Path("expected.npy").read_bytes()
    for first, rows in ((8, images[:2]), (0, images[..., 0]), (0, images[:, :2])):
        with pytest.raises(ValueError, match=r"do not fit into \(9, 3, 4, 3\)"):
            write_rows(path, first, rows)
    assert path.read_bytes() == Path("expected.npy").read_bytes()


def test_a_disk_that_cannot_give_all_the_room_gets_no_file(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int, offset: int, length: int) -> None:
        assert (offset % 64, length) == (0, 9 * 3 * 4)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        allocate_images(Path("images.npy"), (9, 3, 4))
    assert not Path("images.npy").exists()


# Killed and resumed


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the stage may handle it."""


def kill_at(patch: pytest.MonkeyPatch, point: int) -> None:
    """That change to the disk, counted from 0, is half done, and the process ends."""
    made = count()

    def watch(owner: Any, name: str, half: Callable[..., Any]) -> None:
        real = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if next(made) != point:
                return real(*args, **kwargs)
            half(real, *args, **kwargs)
            raise Killed

        patch.setattr(owner, name, watched)

    def nothing(*_: Any, **__: Any) -> None: ...

    def some_files(real: Any, folder: Path, **_: Any) -> None:
        (Path(folder) / "images.npy").unlink(missing_ok=True)

    watch(stage, "allocate_images", lambda real, path, shape: os.close(os.open(path, os.O_CREAT)))
    watch(stage, "write_rows", lambda real, path, first, images: real(path, first, images[: len(images) // 2]))
    watch(Path, "write_bytes", lambda real, path, content: real(path, content[:9]))
    watch(shutil, "rmtree", some_files)
    for owner, name in ((os, "replace"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir")):
        watch(owner, name, nothing)


@pytest.mark.parametrize("after", ["bicubic", "lanczos"])
def test_killed_at_any_point_the_stage_ends_as_if_it_was_not(
    raw: Path, after: str, shards: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """data/upscaled is of `none`; lanczos was killed; then bicubic is, at every point; then `after` runs through."""
    expected = {}
    for method in ("lanczos", "bicubic", "none"):
        upscale(params(method, 1 if method == "none" else 2))
        expected[method] = files()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 13)
        upscale(params("lanczos", 2))
    assert json.loads((PARTIAL / "progress.json").read_text())["done"] == [0, 8]

    for point in count():
        project = tmp_path / "points" / str(point)
        shutil.copytree(tmp_path / "data", project / "data")
        monkeypatch.chdir(project)
        with monkeypatch.context() as patch:
            kill_at(patch, point)
            try:
                upscale(params("bicubic", 2))
                break
            except Killed:
                pass
        seen = next(folder for folder in (OUT.parent, Path("data/upscaled.old")) if folder.exists())
        assert files(seen) in (expected["none"], expected["bicubic"])
        done = done_of(after)
        shards.clear()
        upscale(params(after, 2))
        assert shards == [first for first in (0, 8, 16) if first not in done], f"point {point}"
        assert files() == expected[after], f"point {point}"
        assert beside() == ["raw", "upscaled"], f"point {point}"
    assert point > 20
    assert files() == expected["bicubic"]


def done_of(method: str) -> list[int]:
    """The shards that progress.json calls done, if it is of that method."""
    path = PARTIAL / "progress.json"
    begun = json.loads(path.read_text()) if path.exists() else {"fingerprint": None}
    config = params(method, 2).super_resolution
    return begun["done"] if begun["fingerprint"] == stage._fingerprint(config, (23, 24, 20)) else []


def interrupt(settings: Params, patch: pytest.MonkeyPatch) -> None:
    """Ends in the last of three shards."""
    real = stage.write_rows

    def killed(path: Path, first: int, images: np.ndarray) -> None:
        if first == 16:
            raise Killed
        real(path, first, images)

    with patch.context() as context, pytest.raises(Killed):
        context.setattr(stage, "write_rows", killed)
        upscale(settings)


def another_pixel() -> None:
    images = np.load("data/raw/images.npy")
    images[0, 0, 0] ^= 1
    np.save("data/raw/images.npy", images)


WEIGHTS = Path("weights")
CHANGES: dict[str, tuple[Callable[[], object], dict[str, object], bool]] = {
    "nothing": (lambda: None, {}, True),
    "place": (lambda: None, {"device": "auto", "workers": 2}, True),  # one shard is left: no Ray
    "README of the weights": (lambda: (WEIGHTS / "README.md").write_text("new"), {}, True),
    "weights elsewhere": (lambda: WEIGHTS.rename("other"), {"weights": "other"}, True),
    "one of the weights' files": (lambda: (WEIGHTS / "model.safetensors").write_bytes(b"two"), {}, False),
    "one more file of weights": (lambda: (WEIGHTS / "config.json").write_text("{}"), {}, False),
    "raw images": (another_pixel, {}, False),
    "precision": (lambda: None, {"precision": "bf16"}, False),
    "another network of the hub": (lambda: None, {"hub_id": "other/network"}, False),
    "scale": (lambda: None, {"scale": 4}, False),
    "progress.json": (lambda: (PARTIAL / "progress.json").write_bytes(b""), {}, False),
    "progress.json, torn": (lambda: (PARTIAL / "progress.json").write_text('{"fingerp'), {}, False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_progress_is_kept_unless_something_else_would_come_out(
    raw: Path, change: str, shards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    act, keys, kept = CHANGES[change]
    pretend(monkeypatch, lambda scale: Tint(scale, 40))
    interrupt(params("swin2sr", 2), monkeypatch)
    assert shards == [0, 8]
    act()
    settings = params("swin2sr", **{"scale": 2} | keys)  # type: ignore[arg-type]
    upscale(settings)
    assert shards == [0, 8, *([] if kept else [0, 8]), 16]
    larger = expected_of(np.load(raw), settings.super_resolution.scale, 40)
    if change == "tolerance":
        larger = np.rint(larger @ [0.299, 0.587, 0.114]).astype(np.uint8)
    np.testing.assert_array_equal(np.load(OUT), larger)
    assert beside() == ["raw", "upscaled"]


def test_progress_in_colour_is_thrown_away_when_the_images_turn_out_grey(
    raw: Path, shards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another device: rows of another shape must not be written into the file that is there."""
    pretend(monkeypatch, lambda scale: Tint(scale, 40))
    interrupt(params("swin2sr", 2), monkeypatch)
    pretend(monkeypatch, Tint)
    upscale(params("swin2sr", 2))
    np.testing.assert_array_equal(np.load(OUT), np.load(raw).repeat(2, 1).repeat(2, 2))


def test_progress_in_shards_of_another_size_is_thrown_away(
    raw: Path, shards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(params("bicubic", 2), monkeypatch)
    monkeypatch.setattr(stage, "SHARD", 4)
    upscale(params("bicubic", 2))
    assert shards == [0, 8, 0, 4, 8, 12, 16, 20]
    np.testing.assert_array_equal(np.load(OUT), METHODS["bicubic"](np.load(raw), 2))


def test_progress_is_of_the_code_that_dvc_watches(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]["upscale"]["deps"]
    paths = [path for name in watched if name.startswith(("fer/", "pipelines/")) for path in code(ROOT / name)]
    assert len(paths) >= 9
    for part in ("fer", "pipelines"):
        shutil.copytree(ROOT / part, tmp_path / "code" / part, ignore=shutil.ignore_patterns("__pycache__"))
    config = params("bicubic", 2).super_resolution
    before = stage._fingerprint(config, (23, 24, 20))
    monkeypatch.setattr(stage, "ROOT", tmp_path / "code")
    seen = {before, stage._fingerprint(config, (23, 24, 20))}
    assert len(seen) == 1
    for changed, path in enumerate(paths, 2):
        with open(tmp_path / "code" / path.relative_to(ROOT), "a") as file:
            file.write("# changed\n")
        seen.add(stage._fingerprint(config, (23, 24, 20)))
        assert len(seen) == changed, path


def code(path: Path) -> list[Path]:
    return sorted(path.glob("*.py")) if path.is_dir() else [path]


SIGKILLS = """
import json, os, random, signal, sys, threading, time
from pathlib import Path
from fer.files import recover
from pipelines.params import load
from pipelines.stages import upscale as stage

stage.SHARD = 4
settings = load()
partial = Path("data/upscaled.partial")
real = stage.write_rows

def write_rows(path, first, images):
    with open("written", "a") as log:
        log.write(f"{first} ")
    real(path, first, images)

stage.write_rows = write_rows

def run(event, seconds):
    # ends with the event-th operation on a file, or after that time
    left = [event]
    def hook(name, arguments):
        if name in ("open", "os.rename", "os.remove", "shutil.rmtree") and "upscaled" in str(arguments[0]):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
    process = os.fork()
    if not process:
        sys.addaudithook(hook)
        if seconds is not None:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        started = time.monotonic()
        stage.upscale(settings)
        Path("took").write_text(f"{-left[0]} {time.monotonic() - started}")
        os._exit(0)
    return os.waitpid(process, 0)[1]

def content():
    return {path.name: path.read_bytes() for path in sorted(Path("data/upscaled").iterdir())}

assert run(0, None) == 0
expected = content()
events, seconds = map(float, Path("took").read_text().split())
chance = random.Random(0)
killed, kept = 0, []
for turn in range(6):
    earlier = Path("data/upscaled/images.npy")
    earlier.write_bytes(b"of an earlier run")
    done = []
    for kill in ((chance.randrange(1, int(events)), None), (0, chance.random() * seconds)):
        Path("written").write_text("")
        status = run(*kill)
        assert status in (0, signal.SIGKILL), status
        killed += status == signal.SIGKILL
        assert not set(Path("written").read_text().split()) & set(done), (turn, kill)
        if not partial.exists():  # too late: it was finished
            assert content() == expected
            done = []
            continue
        recover(Path("data/upscaled"))
        assert earlier.read_bytes() == b"of an earlier run"
        done = [str(first) for first in json.loads((partial / "progress.json").read_text())["done"]] if (
            partial / "progress.json").exists() else []
        kept.append(len(done))
    Path("written").write_text("")
    assert run(0, None) == 0
    assert not set(Path("written").read_text().split()) & set(done), turn
    assert content() == expected
    assert sorted(os.listdir("data")) == ["raw", "upscaled"]
print(json.dumps([killed, kept]))
"""


@pytest.mark.soak
def test_killed_twice_at_random_moments_and_resumed(raw: Path) -> None:
    """By SIGKILL, six times over, with 60 shards; each shard that was done is kept."""
    np.save(raw, random_images(240, 16, 16))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    write_params(method="lanczos", scale=4)
    done = subprocess.run([sys.executable, "-c", SIGKILLS], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    killed, kept = json.loads(done.stdout)
    assert killed > 6
    assert sum(0 < shards < 60 for shards in kept) >= 6


# Quality


@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize(("method", "scale"), [("bicubic", 2), ("lanczos", 3), ("swin2sr", 2)])
def test_upscale_json_tells_how_well_images_are_restored(
    raw: Path, method: str, scale: int, channels: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of images from the first to the last, also by bicubic."""
    monkeypatch.setattr(stage, "JUDGED", 5)
    pretend(monkeypatch, lambda scale: Tint(scale, 3))
    images = random_images(23, 20, 17, *channels)
    np.save(raw, images)
    upscale(params(method, scale))
    facts = json.loads((OUT.parent / "upscale.json").read_text())
    chosen = images[[0, 5, 11, 16, 22]]
    network = method == "swin2sr"
    restore = {
        "bicubic": partial(METHODS["bicubic"], scale=scale),
        "lanczos": partial(METHODS["lanczos"], scale=scale),
        "swin2sr": lambda small: expected_of(small, scale, 3),
    }
    assert facts == {
        "method": method,
        "scale": scale,
        "raw_shape": [20, 17, *channels],
        **({"precision": "fp32", "weights": facts["weights"], "batch": 16, "hub_id": None} if network else {}),
        "restored": {name: down_then_up(chosen, restore[name], scale) for name in {method, "bicubic"}},
    }
    assert 0 < facts["restored"][method]["psnr"] < 20  # noise
    Path("weights/model.safetensors").write_bytes(b"two")
    upscale(params(method, scale))
    again = json.loads((OUT.parent / "upscale.json").read_text())
    assert (again == facts) == (not network)
    if network:
        assert again == facts | {"weights": again["weights"]}


def test_images_of_the_same_size_or_too_small_for_the_window_are_not_judged(raw: Path) -> None:
    upscale(params("bicubic", 1))
    assert json.loads((OUT.parent / "upscale.json").read_text()) == {
        "method": "bicubic", "scale": 1, "raw_shape": [12, 10]
    }  # fmt: skip
    for side, judged in ((12, False), (13, True)):
        np.save(raw, random_images(3, 40, side))
        upscale(params("bicubic", 2))
        assert ("restored" in json.loads((OUT.parent / "upscale.json").read_text())) == judged


# Mistakes in the weights


def spoil(fault: str, swin: Path) -> tuple[dict[str, object], str]:
    """Put what is wrong under `weights`; the settings that lead there, and the message that is due."""
    x2, x8 = {"method": "swin2sr", "scale": 2}, {"method": "dic", "scale": 8}
    folder, dic = Path("weights"), Path("weights/DIC_HELEN.pth")
    if fault == "swin2sr: no folder":
        return x2, "super_resolution.weights: weights not found; name a folder, an empty one for the network of the hub"
    if fault == "dic: no folder":
        return x8, "super_resolution.weights: weights not found; its authors link it at "
    shutil.copytree(swin, folder)
    tensors = folder / "model.safetensors"
    if fault == "dic: no file":
        return x8, "super_resolution.weights: weights/DIC_HELEN.pth not found; its authors link it at "
    if fault == "dic: a web page":
        dic.write_text("<!DOCTYPE html><html>not found</html>")
        return x8, f"super_resolution.weights: {dic}: looks like an html page, not a weights file; "
    if fault == "dic: cut":
        torch.save({"conv_in.0.weight": torch.zeros(192, 3, 3, 3)}, dic)
        dic.write_bytes(dic.read_bytes()[:3000])
        return x8, f"super_resolution.weights: {dic}: not a whole weights file of its kind; "
    if fault == "dic: of another network":
        torch.save({"conv_in.0.weight": torch.zeros(192, 3, 3, 3)}, dic)
        return x8, f"super_resolution.weights: {dic}: tensor HG."
    if fault == "swin2sr: cut":
        tensors.write_bytes(tensors.read_bytes()[:2000])
        return x2, "super_resolution.weights: cannot load 'weights': "
    if fault == "swin2sr: another scale":
        return x2 | {"scale": 4}, "super_resolution.weights: 'weights' makes images 2 times as large, here scale is 4; "
    assert fault == "swin2sr: a tensor is missing"
    some = load_file(tensors)
    del some["swin2sr.first_convolution.weight"]
    save_file(some, tensors)
    return x2, "super_resolution.weights: 'weights' does not fit its config.json: tensor swin2sr.first_convolution"


@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize(
    "fault",
    [
        "dic: no folder",
        "dic: no file",
        "dic: a web page",
        "dic: cut",
        "dic: of another network",
        "swin2sr: no folder",
        "swin2sr: cut",
        "swin2sr: another scale",
        "swin2sr: a tensor is missing",
    ],
)
def test_weights_that_are_none_are_one_line_and_status_2(
    raw: Path, swin: Path, fault: str, channels: tuple, capsys: pytest.CaptureFixture
) -> None:
    np.save(raw, random_images(23, 12, 10, *channels))
    upscale(params("none", 1))
    before = files()
    keys, message = spoil(fault, swin)
    write_params(**keys)
    with pytest.raises(SystemExit) as ended:
        run(upscale)
    assert ended.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {message}")
    assert files() == before
    assert beside() == ["raw", "upscaled"]


def test_a_gpu_that_is_not_there_is_missed_by_networks_alone(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    upscale(params("bicubic", 2, device="cuda"))
    pretend(monkeypatch, Tint)
    with pytest.raises(UserError, match=r"^super_resolution.device: cuda, but this machine has no usable GPU; set it"):
        upscale(params("swin2sr", 2, device="cuda"))


def test_a_hub_id_is_asked_for_before_the_folder(raw: Path, swin: Path) -> None:
    """No hub is at hand; a folder's path stands in its place."""
    with pytest.raises(UserError, match=r"^super_resolution.hub_id: cannot load 'no/such-network': "):
        upscale(params("swin2sr", 2, weights=swin, hub_id="no/such-network"))
    Path("weights").mkdir()
    upscale(params("swin2sr", 2, hub_id=swin))
    assert np.load(OUT).shape == (23, 24, 20, 3)


@pytest.mark.parametrize("channels", [(), (3,)])
def test_a_network_from_the_hub_needs_no_files_here(
    raw: Path, channels: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(raw, random_images(23, 12, 10, *channels))
    pretend(monkeypatch, Tint)
    upscale(params("swin2sr", 2, weights="nowhere"))
    assert np.load(OUT).shape == (23, 24, 20, *channels)
    assert json.loads((OUT.parent / "upscale.json").read_text())["weights"] is None


# Several processes


def ray_workers() -> list[int]:
    """Processes that compute in the working directory."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            mine = process.name.isdigit() and (process / "cwd").readlink() == Path.cwd()
            if mine and (process / "cmdline").read_text().startswith("ray::_Worker"):
                found.append(int(process.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.soak
def test_a_worker_that_is_killed_changes_no_byte_nor_do_several(raw: Path, swin: Path) -> None:
    """Two processes of Ray against none; one is killed when the first of eight shards is done."""
    np.save(raw, random_images(8 * 256 - 5, 8, 8))
    upscale(params("swin2sr", 2, weights=swin))
    expected = files()
    shutil.rmtree(OUT.parent)
    write_params(method="swin2sr", scale=2, weights=str(swin), workers=2)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "pipelines.stages.upscale"]
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    progress = PARTIAL / "progress.json"
    while not progress.exists() or not json.loads(progress.read_text())["done"]:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.kill(ray_workers()[0], signal.SIGKILL)  # the other may still be starting
    assert 1 <= len(json.loads(progress.read_text())["done"]) <= 5
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert files() == expected
    assert beside() == ["raw", "upscaled"]


@pytest.mark.slow
@pytest.mark.soak
def test_what_ends_the_work_of_several_processes() -> None:
    from pipelines.launch import spread

    def work(item: int) -> int:
        if item == 3:
            raise UserError("super_resolution: a line")
        if item == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return item * item

    with pytest.raises(UserError) as caught:
        list(spread(work, [0], 1000, "cpu"))
    message = r"super_resolution.workers: 1000 need a CPU each, there are \d+; lower it"
    assert re.fullmatch(message, str(caught.value))
    died = (
        "super_resolution.workers: a process died four times, as for want of memory; lower it and run the command again"
    )
    for bad, message in ((3, "super_resolution: a line"), (4, died)):
        with pytest.raises(UserError) as caught:
            list(spread(work, [0, 1, 2, bad], 1, "cpu"))
        assert str(caught.value) == message
        assert type(caught.value) is UserError
