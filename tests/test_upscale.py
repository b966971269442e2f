"""Stage upscale: interpolation to the byte, networks, resuming without mixing data, quality, users' mistakes."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import DATA, ROOT, environment, prepared, wait_for
from PIL import Image
from ruamel.yaml import YAML
from torch import Tensor, nn

from fer.errors import UserError
from fer.files import LOCK
from fer.super_resolution import networks
from fer.super_resolution.methods import METHODS
from fer.super_resolution.quality import down_then_up
from pipelines import stages
from pipelines.data_sets import Prepared
from pipelines.stages import run
from pipelines.stages import upscale as stage
from pipelines.stages.upscale import upscale

INTERPOLATE = {name: row.interpolate for name, row in METHODS.items() if row.interpolate}
RAW = DATA / "raw/images.npy"
OUT = DATA / "upscaled/images.npy"
PARTIAL = DATA / "upscaled.partial"
WEIGHTS = Path("weights")


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def params(method: str, scale: int, **keys: Any) -> Prepared:
    place = {"weights": "weights"} | {key: keys.pop(key) for key in ("device", "workers", "weights") if key in keys}
    return prepared(super_resolution={"method": method, "scale": scale} | keys, machine=place)


def write_settings(**keys: Any) -> None:
    """Those of the project in the working directory, for a stage that is run as a command."""
    machine = {"device": "cpu", "weights": "weights"} | {key: keys.pop(key) for key in ("workers",) if key in keys}
    (Path("datasets")).mkdir(exist_ok=True)
    for name, changes in (("params.yaml", machine), ("datasets/sample.yaml", keys)):
        tree = YAML(typ="safe").load(ROOT / name)
        tree["super_resolution"] |= changes
        YAML().dump(tree, Path(name))


def fingerprint(method: str, scale: int, shape: tuple[int, ...] = (23, 24, 20)) -> str:
    one = params(method, scale)
    return stage.fingerprint(stage.Worker(one.recipe.super_resolution, one.machine, str(RAW)), shape)


def beside() -> list[str]:
    return sorted(path.name for path in DATA.iterdir() if path.name != LOCK)


def files(folder: Path = OUT.parent) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def facts() -> dict[str, Any]:
    return json.loads((OUT.parent / "upscale.json").read_text())


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["stage", "sample"])
    path = tmp_path / RAW
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


class Tint(nn.Module):
    """Stands for a network: enlarges every pixel exactly, whatever the batch, and adds `shift` (of 255) to green.

    `tinted`: only in the first pixels of each image; `above`: only in images with a pixel above that. `room`: the
    largest batch that fits into memory, call by call; the last number is for all later calls.
    """

    def __init__(self, scale: int = 2, shift: float = 0, tinted: int | None = None, above: float = -1, room: Any = ()):
        super().__init__()
        self.scale, self.shift, self.tinted, self.above = scale, shift, tinted, above
        self.room, self.seen, self.threads = list(room) or [100], list[int](), set[int]()

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(len(images))
        self.threads.add(torch.get_num_threads())
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


# What is written


@pytest.mark.parametrize("method", ["bicubic", "lanczos"])
def test_equals_pillow(method: str) -> None:
    for scale, *channels in ((1,), (3, 3), (8,)):
        images = random_images(7, 12, 10, *channels)
        kernel = Image.Resampling[method.upper()]
        expected = [np.asarray(Image.fromarray(image).resize((10 * scale, 12 * scale), kernel)) for image in images]
        np.testing.assert_array_equal(INTERPOLATE[method](images, scale), np.stack(expected))


@pytest.mark.parametrize(("method", "scale", "channels"), [("none", 1, ()), ("bicubic", 2, (3,))])
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
    assert (beside(), [*files()]) == (["raw", "upscaled"], ["images.npy", "upscale.json"])
    assert capfd.readouterr() == ("", "")


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
    restored = {name: down_then_up(chosen, restore[name], 2) for name in (method, "bicubic")}
    expected = {"method": method, "scale": 2, "raw_shape": [20, 17, *channels], "restored": restored}
    assert found == expected | (own if method == "swin2sr" else {})
    (WEIGHTS / "model.safetensors").write_bytes(b"two")
    upscale(params(method, 2))
    assert (facts() == found) == (method == "lanczos")


def test_images_of_the_same_size_or_too_small_for_the_window_are_not_judged(raw: Path) -> None:
    upscale(params("bicubic", 1))
    assert facts() == {"method": "bicubic", "scale": 1, "raw_shape": [12, 10]}
    for side, judged in ((12, False), (13, True)):
        np.save(raw, random_images(3, 40, side))
        upscale(params("bicubic", 2))
        assert ("restored" in facts()) == judged


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

    def some_files(real: Any, folder: Path, **_: Any) -> None:
        (Path(folder) / "images.npy").unlink(missing_ok=True)

    watch(stage, "allocate_images", lambda real, path, shape: os.close(os.open(path, os.O_CREAT)))
    watch(stage, "write_rows", lambda real, path, first, images: real(path, first, images[: len(images) // 2]))
    watch(Path, "write_bytes", lambda real, path, content: real(path, content[:9]))
    watch(shutil, "rmtree", some_files)
    for owner, name in ((os, "replace"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir")):
        watch(owner, name, lambda *_, **__: None)


@pytest.mark.parametrize("after", ["bicubic", "lanczos"])
def test_killed_at_any_point_the_stage_ends_as_if_it_was_not(
    raw: Path, after: str, shards: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """upscaled/ is of `none`; lanczos was killed; then bicubic is, at every point; then `after` runs through."""
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
        seen = next(folder for folder in (OUT.parent, DATA / "upscaled.old") if folder.exists())
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
    return begun["done"] if begun["fingerprint"] == fingerprint(method, scale, shape) else []


def interrupt(settings: Prepared, patch: pytest.MonkeyPatch) -> None:
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
    images = np.load(RAW)
    images[0, 0, 0] ^= 1
    np.save(RAW, images)


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
    scale = settings.recipe.super_resolution.scale
    monkeypatch.setitem(networks.LOADERS, "swin2sr", lambda *_: Tint(scale, 40))
    upscale(settings)
    assert shards == [0, 8, *([] if kept else [0, 8]), 16]
    np.testing.assert_array_equal(np.load(OUT), tinted(np.load(raw), scale, 40))
    assert beside() == ["raw", "upscaled"]


def test_progress_is_discarded_when_rows_or_shards_have_another_size(
    raw: Path, shards: list[int], pretend: Callable[..., Tint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that turns out to keep grey, as on another device; then shards of another size."""
    for shift in (40, 0):
        pretend(2, shift)
        interrupt(params("swin2sr", 2), monkeypatch)
    monkeypatch.setattr(stage, "SHARD", 4)
    upscale(params("swin2sr", 2))
    assert shards == [0, 8, 0, 8, 0, 4, 8, 12, 16, 20]
    np.testing.assert_array_equal(np.load(OUT), np.load(raw).repeat(2, 1).repeat(2, 2))


def test_progress_is_of_the_code_that_dvc_watches(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]["upscale"]["do"]["deps"]
    names = [f"{name}/*.py" if (ROOT / name).is_dir() else name for name in watched if name.startswith(("fer", "pip"))]
    assert set(names) == set(stage.CODE)
    for path in (path for name in names for path in ROOT.glob(name)):
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    seen = {fingerprint("bicubic", 2)}
    monkeypatch.setattr(stage, "ROOT", tmp_path)
    assert fingerprint("bicubic", 2) in seen
    for name in names:
        with next(tmp_path.glob(name)).open("a") as file:
            file.write("# changed\n")
        seen.add(fingerprint("bicubic", 2))
    assert len(seen) == 1 + len(names)


# One writer

DVC = """
import subprocess, sys
command = [sys.executable, "-m", "pipelines.stages.upscale", "sample"]
stage = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=open("stage.err", "w"))
print(stage.pid, flush=True)
stage.wait()
"""


def test_a_stage_ends_with_dvc_and_until_then_no_other_one_begins(
    raw: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The stage is held when dvc is killed: it is still there when the other method is wanted, and then goes on."""
    monkeypatch.setattr(stages, "PATIENCE", 0.2)
    np.save(raw, random_images(600, 48, 48))
    write_settings(method="bicubic", scale=8)
    known = environment(PYTHONPATH=str(ROOT), DVC_STAGE="upscale")
    dvc = subprocess.Popen([sys.executable, "-c", DVC], env=known, stdout=subprocess.PIPE, text=True)
    assert dvc.stdout is not None
    orphan = int(dvc.stdout.readline())
    wait_for(lambda: (PARTIAL / "progress.json").exists() and done_of("bicubic", 8, (600, 384, 384)))
    os.kill(orphan, signal.SIGSTOP)
    dvc.kill()
    dvc.communicate()
    write_settings(method="lanczos", scale=8)
    with pytest.raises(SystemExit) as ended:
        run(upscale)
    assert ended.value.code == 2
    line = rf"error: data/sets/sample: another process \({orphan} on .+\) is working on it; wait for it or stop it\n"
    assert re.fullmatch(line, capsys.readouterr().err)
    assert not OUT.exists()
    os.kill(orphan, signal.SIGCONT)
    monkeypatch.setattr(stages, "PATIENCE", 60)
    run(upscale)
    assert Path("stage.err").read_text() == "error: dvc, which started this stage, is gone; run `dvc repro` again\n"
    np.testing.assert_array_equal(np.load(OUT)[::256], INTERPOLATE["lanczos"](np.load(raw)[::256], 8))


def test_a_worker_that_outlives_its_stage_writes_nothing_to_what_comes_after_it(
    raw: Path, shards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = params("lanczos", 2)
    interrupt(settings, monkeypatch)
    begun = json.loads((PARTIAL / "progress.json").read_text())
    worker = stage.Worker(settings.recipe.super_resolution, settings.machine, str(raw))
    worker.out, worker.of = str(PARTIAL.resolve()), {key: begun[key] for key in ("fingerprint", "batch")}
    for changes in ({"fingerprint": "of another method"}, {"batch": 8}, {}):
        (PARTIAL / "progress.json").write_text(json.dumps(begun | changes))
        if not changes:  # another stage is about to begin
            (PARTIAL / "progress.json").unlink()
        before = files(PARTIAL)
        with pytest.raises(UserError, match="upscaled.partial: another process has begun to upscale there; run `dvc"):
            worker(16)
        assert files(PARTIAL) == before
    (PARTIAL / "progress.json").write_text(json.dumps(begun))
    assert worker(16) == 16


# Disks


def test_a_disk_that_fills_is_one_line_and_the_stage_resumes_and_one_that_is_too_small_is_found_out_before(
    raw: Path, shards: list[int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """In the second of three shards half of the rows fit."""
    np.save("expected.npy", INTERPOLATE["bicubic"](np.load(raw), 2))
    upscale(params("none", 1))
    before, rows = files(), stage.write_rows
    shards.clear()

    def full(path: Path, first: int, images: np.ndarray) -> None:
        rows(path, first, images[: 4 if first == 8 else None])
        if first == 8:
            raise OSError(errno.ENOSPC, "No space left on device")

    write_settings(method="bicubic", scale=2)
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(".")._replace(free=9000)
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(UserError, match=f"^cannot write {PARTIAL}/images.npy: it takes 0.0 MB"):
            upscale(params("bicubic", 2))
        assert (files(), shards, beside()) == (before, [], ["raw", "upscaled"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(stage, "write_rows", full)
        run(upscale)
    assert ended.value.code == 2
    line = "error: cannot write data/sets: the disk is full: free some space and run the command again\n"
    assert capfd.readouterr() == ("", line)
    assert files() == before
    shards.clear()
    run(upscale)
    assert shards == [8, 16]
    assert OUT.read_bytes() == Path("expected.npy").read_bytes()
    assert beside() == ["raw", "upscaled"]


# Several processes


@pytest.mark.soak
def test_a_worker_that_is_killed_changes_no_byte_nor_do_several(raw: Path) -> None:
    """Two processes of Ray against none; one is killed when the first of eight shards is done."""
    np.save(raw, random_images(8 * 256 - 5, 48, 48))
    upscale(params("lanczos", 8))
    expected = files()
    shutil.rmtree(OUT.parent)
    write_settings(method="lanczos", scale=8, workers=2)
    words = [sys.executable, "-m", "pipelines.stages.upscale", "sample"]
    process = subprocess.Popen(words, env=environment(PYTHONPATH=str(ROOT)), stderr=subprocess.PIPE, text=True)
    wait_for(lambda: process.poll() is not None or done_of("lanczos", 8, (8 * 256 - 5, 384, 384)))
    assert process.poll() is None, process.communicate()
    children = psutil.Process(process.pid).children(recursive=True)
    next(child for child in children if " ".join(child.cmdline()).startswith("ray::_Worker")).kill()
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert files() == expected
    assert beside() == ["raw", "upscaled"]
