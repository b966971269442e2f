"""Stage upscale: interpolation to the byte, networks, resuming without mixing data, quality, users' mistakes."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from conftest import wait_for
from PIL import Image
from ruamel.yaml import YAML
from torch import Tensor, nn

from fer.errors import UserError
from fer.files import LOCK
from fer.super_resolution import networks
from fer.super_resolution.dic import Dic
from fer.super_resolution.methods import METHODS
from fer.super_resolution.quality import down_then_up
from fer.super_resolution.swin2sr import PUBLISHED, load_swin2sr
from pipelines import stages
from pipelines.params import Params, SuperResolution, load
from pipelines.stages import run
from pipelines.stages import upscale as stage
from pipelines.stages.upscale import upscale

ROOT = Path(__file__).resolve().parents[1]
INTERPOLATE = {name: row.interpolate for name, row in METHODS.items() if row.interpolate}
OUT = Path("data/upscaled/images.npy")
PARTIAL = Path("data/upscaled.partial")
WEIGHTS = Path("weights")


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def params(method: str, scale: int, **keys: object) -> Params:
    tree = load(ROOT / "params.yaml").model_dump()
    tree["super_resolution"] |= {"method": method, "scale": scale, "device": "cpu", "weights": "weights"} | keys
    return Params.model_validate(tree)


def write_params(**keys: object) -> None:
    """params.yaml in the working directory, for a stage that is run as a command."""
    tree = YAML(typ="safe").load(ROOT / "params.yaml")
    tree["super_resolution"] |= {"device": "cpu", "weights": "weights"} | keys
    YAML().dump(tree, Path("params.yaml"))


def beside() -> list[str]:
    return sorted(path.name for path in Path("data").iterdir() if path.name != LOCK)


def files(folder: Path = OUT.parent) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def facts() -> dict[str, Any]:
    return json.loads((OUT.parent / "upscale.json").read_text())


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "data" / "raw" / "images.npy"
    path.parent.mkdir(parents=True)
    np.save(path, random_images(23, 12, 10))
    return path


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


# Interpolation


@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize("scale", [1, 3, 8])
@pytest.mark.parametrize("method", ["bicubic", "lanczos"])
def test_equals_pillow(method: str, scale: int, channels: tuple) -> None:
    images = random_images(7, 12, 10, *channels)
    out = INTERPOLATE[method](images, scale)
    kernel = Image.Resampling[method.upper()]
    expected = [np.asarray(Image.fromarray(image).resize((10 * scale, 12 * scale), kernel)) for image in images]
    np.testing.assert_array_equal(out, np.stack(expected))
    assert out.dtype == np.uint8


@pytest.mark.parametrize(("method", "scale"), [("none", 2), ("bicubic", 0), ("lanczos", 0)])
def test_refuses_a_scale_it_cannot_do(method: str, scale: int) -> None:
    with pytest.raises(ValueError, match="scale must be"):
        INTERPOLATE[method](random_images(2, 4, 4), scale)


def test_the_tables_know_the_same_methods_and_scales() -> None:
    assert set(get_args(SuperResolution.model_fields["method"].annotation)) == set(METHODS)
    assert set(networks.LOADERS) == set(METHODS) - set(INTERPOLATE)
    assert METHODS["swin2sr"].scales == tuple(PUBLISHED)


@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize(("method", "scale"), [("none", 1), ("bicubic", 2)])
def test_stage_writes_what_numpy_would_save_and_is_silent_without_a_terminal(
    raw: Path, method: str, scale: int, channels: tuple, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    images = random_images(23, 12, 10, *channels)
    np.save(raw, images)
    np.save("expected.npy", INTERPOLATE[method](images, scale))
    for shard in (7, 256):
        monkeypatch.setattr(stage, "SHARD", shard)
        upscale(params(method, scale))
        assert OUT.read_bytes() == Path("expected.npy").read_bytes()
    assert beside() == ["raw", "upscaled"]
    assert sorted(files()) == ["images.npy", "upscale.json"]
    assert capfd.readouterr() == ("", "")


# Networks


class Tint(nn.Module):
    """Stands for a network: enlarges every pixel exactly, whatever the batch, and adds `shift` (of 255) to green.

    `tinted`: only in the first pixels of each image; `above`: only in images with a pixel above that. `room`: the
    largest batch that fits into memory, call by call; the last number is for all later calls.
    """

    def __init__(self, scale: int = 2, shift: float = 0, tinted: int | None = None, above: float = -1, room: Any = ()):
        super().__init__()
        self.scale, self.shift, self.tinted, self.above = scale, shift, tinted, above
        self.room, self.seen = list(room) or [100], list[int]()

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(len(images))
        if len(images) > (self.room.pop(0) if len(self.room) > 1 else self.room[0]):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        larger = images.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3)
        tint = torch.zeros(larger.shape[2:])
        tint.view(-1)[: self.tinted] = self.shift / 255
        larger[:, 1] += tint * (images.amax((1, 2, 3)) > self.above).view(-1, 1, 1)
        return larger


def tinted(images: np.ndarray, scale: int = 2, shift: int = 0) -> np.ndarray:
    """What Tint makes of the images, in whole numbers."""
    colour = images if images.ndim == 4 else np.stack([images] * 3, -1)
    larger = colour.repeat(scale, 1).repeat(scale, 2).astype(int)
    larger[..., 1] += shift
    return larger.clip(0, 255).astype(np.uint8)


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tint]:
    """Puts a Tint in the place of Swin2SR, with some file of weights."""

    def put(*args: Any, **keys: Any) -> Tint:
        network = Tint(*args, **keys)
        monkeypatch.setitem(networks.LOADERS, "swin2sr", lambda *_: network)
        WEIGHTS.mkdir(exist_ok=True)
        (WEIGHTS / "model.safetensors").write_bytes(b"one")
        return network

    return put


@pytest.mark.parametrize("channels", [(), (3,)])
def test_every_batch_is_whole_and_every_image_in_its_place(
    raw: Path, channels: tuple, pretend: Callable[..., Tint], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = random_images(23, 12, 10, *channels)
    np.save(raw, images)
    for shard, batches in ((16, [16, 16]), (5, [16] * 5), (256, [16, 16])):
        monkeypatch.setattr(stage, "SHARD", shard)
        network = pretend(4, 40)
        upscale(params("swin2sr", 4))
        np.testing.assert_array_equal(np.load(OUT), tinted(images, 4, 40))
        assert network.seen == [*[1] * (0 if channels else 4), *batches]  # grey images are probed, one by one


class Amplified(nn.Module):
    """The last digits of what a small DIC computes, which show a sum that was rounded differently."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"num_features": 4, "num_steps": 2, "num_groups": 2, "hg_features": 8, "num_fusion_blocks": 1}
        self.network = Dic(**sizes, num_keypoints=68)

    def forward(self, images: Tensor) -> Tensor:
        return (self.network(images) * 1e5).frac().abs()


def test_a_networks_bytes_depend_on_neither_shards_nor_threads(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(networks.LOADERS, "dic", lambda *_: Amplified())
    np.save(raw, random_images(20, 16, 13))
    found = []
    for shard, threads in ((16, 1), (256, 3)):
        monkeypatch.setattr(stage, "SHARD", shard)
        torch.set_num_threads(threads)
        try:
            upscale(params("dic", 8))
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
        found.append(np.load(OUT))
    assert found[0].shape == (20, 128, 104, 3)
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("shape", [(1, 9, 13), (2, 5, 8, 3)])
def test_a_real_network_in_grey_and_colour(raw: Path, shape: tuple[int, ...]) -> None:
    """The stage's bytes are the network's numbers, rounded once."""
    from transformers import Swin2SRConfig, Swin2SRForImageSuperResolution

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"image_size": 16, "embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 8}
    Swin2SRForImageSuperResolution(Swin2SRConfig(**sizes, upscale=2, initializer_range=0.05)).save_pretrained(WEIGHTS)
    images = random_images(*shape)
    np.save(raw, images)
    upscale(params("swin2sr", 2))
    colour = torch.from_numpy(images if images.ndim == 4 else np.stack([images] * 3, -1)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        exact = load_swin2sr(str(WEIGHTS), 2, "")(colour / 255) * 255
    assert np.abs(np.load(OUT) - exact.permute(0, 2, 3, 1).numpy()).max() < 0.51
    assert exact.std() > 20
    assert facts()["raw_shape"] == list(shape[1:])


@pytest.mark.parametrize(
    ("tint", "grey"),
    [
        ({"shift": 4}, True),  # in all pixels, by no more than the tolerance
        ({"shift": 5}, False),
        ({"shift": 60, "tinted": 4}, True),  # in 4 of 480 pixels, less than one in a hundred
        ({"shift": 60, "tinted": 6}, False),
        ({"shift": 60, "above": 0.9}, False),  # in the last image alone
    ],
)
def test_a_network_keeps_grey_images_grey_within_the_tolerance(
    raw: Path, tint: dict[str, Any], grey: bool, pretend: Callable[..., Tint]
) -> None:
    images = random_images(23, 12, 10) // 5  # up to 51, so that no sum is clipped
    images[-1, 0, 0] = 255
    np.save(raw, images)
    pretend(2, **tint)
    upscale(params("swin2sr", 2))
    assert np.load(OUT).ndim == (3 if grey else 4)
    if tint == {"shift": 4}:  # .299 v + .587 (v + 4) + .114 v
        larger = images.repeat(2, 1).repeat(2, 2)
        np.testing.assert_array_equal(np.load(OUT)[:-1], larger[:-1] + round(0.587 * 4))


def test_colour_stays_colour(raw: Path, pretend: Callable[..., Tint]) -> None:
    np.save(raw, np.repeat(random_images(23, 12, 10, 1), 3, -1))
    pretend(2)
    for method in ("swin2sr", "bicubic"):
        upscale(params(method, 2))
        assert np.load(OUT).shape == (23, 24, 20, 3)


def test_the_batch_is_halved_for_the_whole_output_when_memory_runs_out(
    raw: Path, shards: list[int], pretend: Callable[..., Tint], capsys: pytest.CaptureFixture
) -> None:
    """In the third shard, then in the first again: nothing that larger batches made is left."""
    network = pretend(2, 40, room=[*[16] * 6, 5])
    upscale(params("swin2sr", 2))
    assert network.seen == [*[1] * 4, 16, 16, 16, 8, 4, 4, 4, 4, 4, 4]
    assert shards == [0, 8, 0, 8, 16]
    np.testing.assert_array_equal(np.load(OUT), tinted(np.load(raw), shift=40))
    assert facts()["batch"] == 4
    assert capsys.readouterr().err == "".join(
        f"out of memory: starting over with {batch} images per batch\n" for batch in (8, 4)
    )


def test_the_halved_batch_survives_the_process(
    raw: Path, shards: list[int], pretend: Callable[..., Tint], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(2, 40, room=[4])
    interrupt(params("swin2sr", 2), monkeypatch)
    network = pretend(2, 40)
    upscale(params("swin2sr", 2))
    assert network.seen == [1, 1, 1, 1, 4, 4]
    assert shards == [0, 8, 16]


@pytest.mark.parametrize("room", [[0], [*[100] * 6, 0]])
def test_one_image_that_does_not_fit_is_one_line(
    raw: Path, room: list[int], shards: list[int], pretend: Callable[..., Tint]
) -> None:
    """At once, or after two shards; when there is room again, it begins with full batches."""
    pretend(2, 40, room=room)
    with pytest.raises(UserError) as caught:
        upscale(params("swin2sr", 2))
    message = "super_resolution: one image does not fit into the GPU's memory; free it or set device: cpu"
    assert str(caught.value) == message
    assert beside() == (["raw"] if room == [0] else ["raw", "upscaled.partial"])
    shards.clear()
    network = pretend(2, 40)
    upscale(params("swin2sr", 2))
    assert shards == [0, 8, 16]
    assert set(network.seen[4:]) == {16}


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_nan_and_infinity_are_not_stored_as_black(raw: Path, bad: float, pretend: Callable[..., Tint]) -> None:
    pretend(2, bad, 1)
    with pytest.raises(UserError) as caught:
        upscale(params("swin2sr", 2, precision="bf16"))
    assert str(caught.value) == (
        "super_resolution: the network returns NaN or infinity with precision bf16; "
        "set precision to fp32 or use other weights"
    )
    assert beside() == ["raw"]


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
    interrupt(params("lanczos", 2), monkeypatch)

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


def done_of(method: str, scale: int = 2, shape: tuple[int, ...] = (23, 24, 20)) -> list[int]:
    """The shards that progress.json calls done, if it is of that method."""
    path = PARTIAL / "progress.json"
    begun = json.loads(path.read_text()) if path.exists() else {"fingerprint": None}
    config = params(method, scale).super_resolution
    return begun["done"] if begun["fingerprint"] == stage.fingerprint(config, shape) else []


def interrupt(settings: Params, patch: pytest.MonkeyPatch) -> None:
    """Run the stage; it ends in the last of three shards."""
    real = stage.write_rows

    def killed(path: Path, first: int, images: np.ndarray) -> None:
        if first == 16:
            raise Killed
        real(path, first, images)

    with patch.context() as context, pytest.raises(Killed):
        context.setattr(stage, "write_rows", killed)
        upscale(settings)
    assert json.loads((PARTIAL / "progress.json").read_text())["done"] == [0, 8]


def another_pixel() -> None:
    images = np.load("data/raw/images.npy")
    images[0, 0, 0] ^= 1
    np.save("data/raw/images.npy", images)


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
    "progress.json, truncated": (lambda: (PARTIAL / "progress.json").write_text('{"fingerp'), {}, False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_progress_is_kept_unless_something_else_would_come_out(
    raw: Path, change: str, shards: list[int], pretend: Callable[..., Tint], monkeypatch: pytest.MonkeyPatch
) -> None:
    act, keys, kept = CHANGES[change]
    pretend(2, 40)
    interrupt(params("swin2sr", 2), monkeypatch)
    act()
    settings = params("swin2sr", **{"scale": 2} | keys)  # type: ignore[arg-type]
    scale = settings.super_resolution.scale
    monkeypatch.setitem(networks.LOADERS, "swin2sr", lambda *_: Tint(scale, 40))
    upscale(settings)
    assert shards == [0, 8, *([] if kept else [0, 8]), 16]
    np.testing.assert_array_equal(np.load(OUT), tinted(np.load(raw), scale, 40))
    assert beside() == ["raw", "upscaled"]


def test_progress_is_discarded_when_rows_or_shards_have_another_size(
    raw: Path, shards: list[int], pretend: Callable[..., Tint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that turns out to keep grey, as on another device; then shards of another size."""
    pretend(2, 40)
    interrupt(params("swin2sr", 2), monkeypatch)
    pretend(2)
    interrupt(params("swin2sr", 2), monkeypatch)
    monkeypatch.setattr(stage, "SHARD", 4)
    upscale(params("swin2sr", 2))
    assert shards == [0, 8, 0, 8, 0, 4, 8, 12, 16, 20]
    np.testing.assert_array_equal(np.load(OUT), np.load(raw).repeat(2, 1).repeat(2, 2))


def test_progress_is_of_the_code_that_dvc_watches(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]["upscale"]["deps"]
    names = [f"{name}/*.py" if (ROOT / name).is_dir() else name for name in watched if name.startswith(("fer", "pip"))]
    assert set(names) == set(stage.CODE)
    for path in (path for name in names for path in ROOT.glob(name)):
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    config = params("bicubic", 2).super_resolution
    seen = {stage.fingerprint(config, (23, 24, 20))}
    monkeypatch.setattr(stage, "ROOT", tmp_path)
    assert stage.fingerprint(config, (23, 24, 20)) in seen
    for name in names:
        with next(tmp_path.glob(name)).open("a") as file:
            file.write("# changed\n")
        seen.add(stage.fingerprint(config, (23, 24, 20)))
    assert len(seen) == 1 + len(names)


# One writer

DVC = """
import subprocess, sys
command = [sys.executable, "-m", "pipelines.stages.upscale"]
stage = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=open("stage.err", "w"))
print(stage.pid, flush=True)
stage.wait()
"""


def test_a_stage_ends_with_dvc_and_until_then_no_other_one_begins(
    raw: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The stage is held when dvc is killed: it is still there when the other method is wanted, and then goes on."""
    monkeypatch.setattr(stages, "PATIENCE", 0.2)
    np.save(raw, random_images(1000, 48, 48))
    write_params(method="bicubic", scale=8)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DVC_STAGE": "upscale", "OMP_NUM_THREADS": "1"}
    dvc = subprocess.Popen([sys.executable, "-c", DVC], env=environment, stdout=subprocess.PIPE, text=True)
    assert dvc.stdout is not None
    orphan = int(dvc.stdout.readline())
    wait_for(lambda: (PARTIAL / "progress.json").exists() and done_of("bicubic", 8, (1000, 384, 384)))
    os.kill(orphan, signal.SIGSTOP)
    dvc.kill()
    dvc.communicate()
    write_params(method="lanczos", scale=8)
    with pytest.raises(SystemExit) as ended:
        run(upscale)
    assert ended.value.code == 2
    line = rf"error: data: another process \({orphan} on .+\) is working on it; wait for it or stop it\n"
    assert re.fullmatch(line, capsys.readouterr().err)
    assert not OUT.exists()
    os.kill(orphan, signal.SIGCONT)
    monkeypatch.setattr(stages, "PATIENCE", 60)
    run(upscale)
    assert Path("stage.err").read_text() == "error: dvc, which started this stage, is gone; run `dvc repro` again\n"
    larger, images = np.load(OUT, mmap_mode="r"), np.load(raw)
    for first in range(0, 1000, stage.SHARD):
        np.testing.assert_array_equal(larger[first], INTERPOLATE["lanczos"](images[first : first + 1], 8)[0])


@pytest.mark.parametrize("change", ["method", "batch", "folder"])
def test_a_worker_that_outlives_its_stage_writes_nothing_to_what_comes_after_it(
    raw: Path, change: str, shards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[stage.Worker] = []
    real = stage.Worker.__call__
    with monkeypatch.context() as context:
        context.setattr(stage.Worker, "__call__", lambda self, first: (left.append(self), real(self, first))[1])
        interrupt(params("lanczos", 2), monkeypatch)
    if change == "method":
        interrupt(params("bicubic", 2), monkeypatch)
    elif change == "batch":
        progress = json.loads((PARTIAL / "progress.json").read_text())
        (PARTIAL / "progress.json").write_text(json.dumps({**progress, "batch": 8}))
    else:  # another stage is about to begin
        (PARTIAL / "progress.json").unlink()
    before = files(PARTIAL)
    with pytest.raises(UserError, match="upscaled.partial: another process has begun to upscale there; run `dvc"):
        left[0](16)
    assert files(PARTIAL) == before


# Disks


def test_disk_that_fills_in_the_middle_is_one_line_and_the_stage_resumes_afterwards(
    raw: Path, shards: list[int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """In the second of three shards half of the rows fit, as does progress.json not the first time."""
    np.save("expected.npy", INTERPOLATE["bicubic"](np.load(raw), 2))
    upscale(params("none", 1))
    before = files()
    shards.clear()
    rows = stage.write_rows

    def full(path: Path, first: int, images: np.ndarray) -> None:
        rows(path, first, images[: 4 if first == 8 else None])
        if first == 8:
            raise OSError(errno.ENOSPC, "No space left on device")

    write_params(method="bicubic", scale=2)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(stage, "write_rows", full)
        run(upscale)
    assert ended.value.code == 2
    line = "error: cannot write data: the disk is full: free some space and run the command again\n"
    assert capfd.readouterr() == ("", line)
    assert files() == before
    shards.clear()
    run(upscale)
    assert shards == [8, 16]
    assert OUT.read_bytes() == Path("expected.npy").read_bytes()
    assert beside() == ["raw", "upscaled"]


def test_disk_that_is_too_small_is_found_out_before_an_image_is_computed(
    raw: Path, shards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    upscale(params("none", 1))
    before = files()
    shards.clear()
    usage = shutil.disk_usage(".")._replace(free=9000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="^cannot write data/upscaled.partial/images.npy: it takes 0.0 MB"):
        upscale(params("bicubic", 2))
    assert (files(), shards, beside()) == (before, [], ["raw", "upscaled"])


# Quality


@pytest.mark.parametrize(("method", "channels"), [("lanczos", ()), ("swin2sr", (3,)), ("swin2sr", ())])
def test_upscale_json_tells_how_well_images_are_restored(
    raw: Path, method: str, channels: tuple, pretend: Callable[..., Tint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of images from the first to the last, also by bicubic."""
    monkeypatch.setattr(stage, "JUDGED", 5)
    pretend(2, 3)
    images = random_images(23, 20, 17, *channels)
    np.save(raw, images)
    upscale(params(method, 2))
    found, chosen = facts(), images[[0, 5, 11, 16, 22]]
    own = {"precision": "fp32", "weights": found.get("weights"), "batch": 16, "hub_id": None}
    restore = {name: lambda small, name=name: INTERPOLATE[name](small, 2) for name in ("bicubic", "lanczos")}
    restore["swin2sr"] = lambda small: tinted(small, 2, 3)
    assert found == {
        "method": method,
        "scale": 2,
        "raw_shape": [20, 17, *channels],
        **(own if method == "swin2sr" else {}),
        "restored": {name: down_then_up(chosen, restore[name], 2) for name in (method, "bicubic")},
    }
    assert 0 < found["restored"][method]["psnr"] < 20  # noise
    (WEIGHTS / "model.safetensors").write_bytes(b"two")
    upscale(params(method, 2))
    assert (facts() == found) == (method == "lanczos")
    assert facts() == found | ({"weights": facts()["weights"]} if method == "swin2sr" else {})


def test_images_of_the_same_size_or_too_small_for_the_window_are_not_judged(raw: Path) -> None:
    upscale(params("bicubic", 1))
    assert facts() == {"method": "bicubic", "scale": 1, "raw_shape": [12, 10]}
    for side, judged in ((12, False), (13, True)):
        np.save(raw, random_images(3, 40, side))
        upscale(params("bicubic", 2))
        assert ("restored" in facts()) == judged


# Weights and devices


@pytest.mark.parametrize(
    ("method", "scale", "folder", "message"),
    [
        ("swin2sr", 2, False, "weights not found; name a folder; if it is empty, the hub's network is used"),
        ("swin2sr", 2, True, "cannot load 'weights': "),
        ("dic", 8, False, "weights not found; download it from the link at "),
        ("dic", 8, True, "weights/DIC_HELEN.pth: looks like an html page, not a weights file; "),
    ],
)
def test_weights_that_cannot_be_used_are_one_line_and_status_2(
    raw: Path, method: str, scale: int, folder: bool, message: str, capsys: pytest.CaptureFixture
) -> None:
    upscale(params("none", 1))
    before = files()
    if folder:
        WEIGHTS.mkdir()
        (WEIGHTS / "config.json").write_text("{")
        (WEIGHTS / "DIC_HELEN.pth").write_text("<!DOCTYPE html><html>not found</html>")
    write_params(method=method, scale=scale)
    with pytest.raises(SystemExit) as ended:
        run(upscale)
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: super_resolution.weights: {message}")
    assert files() == before
    assert beside() == ["raw", "upscaled"]


def test_where_swin2sr_comes_from(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hub by its id, even without a folder; from a folder; published, where the folder is empty."""
    asked: list[tuple[str, int, str]] = []
    monkeypatch.setattr(networks, "load_swin2sr", lambda *args: asked.append(args) or Tint(args[1]))
    upscale(params("swin2sr", 2, hub_id="some/network"))
    WEIGHTS.mkdir()
    upscale(params("swin2sr", 4))
    assert facts()["weights"] is None
    (WEIGHTS / "config.json").write_text("{}")
    upscale(params("swin2sr", 2))
    assert facts()["weights"] is not None
    key = "super_resolution.weights"
    assert asked == [("some/network", 2, "super_resolution.hub_id"), (PUBLISHED[4], 4, key), ("weights", 2, key)]


def test_a_gpu_that_is_not_there_is_missed_by_networks_alone(
    raw: Path, pretend: Callable[..., Tint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    upscale(params("bicubic", 2, device="cuda"))
    pretend(2)
    with pytest.raises(UserError, match=r"^super_resolution.device: cuda, but this machine has no usable GPU; set it"):
        upscale(params("swin2sr", 2, device="cuda"))


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
def test_a_worker_that_is_killed_changes_no_byte_nor_do_several(raw: Path) -> None:
    """Two processes of Ray against none; one is killed when the first of eight shards is done."""
    np.save(raw, random_images(8 * 256 - 5, 48, 48))
    upscale(params("lanczos", 8))
    expected = files()
    shutil.rmtree(OUT.parent)
    write_params(method="lanczos", scale=8, workers=2)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "pipelines.stages.upscale"]
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    progress = PARTIAL / "progress.json"
    while not progress.exists() or not json.loads(progress.read_text())["done"]:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.kill(ray_workers()[0], signal.SIGKILL)  # the other may still be starting
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
