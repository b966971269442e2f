import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from fer.errors import UserError
from fer.super_resolution.interpolation import METHODS
from pipelines.params import Params, SuperResolution, load
from pipelines.stages.upscale import upscale

ROOT = Path(__file__).resolve().parents[1]
KERNELS = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}
OUT = Path("data/upscaled/images.npy")
AGAIN = "run `dvc repro --force --single-item download` to make it again"


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def params(method: str, scale: int, batch_size: int = 1024) -> Params:
    keys = {"method": method, "scale": scale, "batch_size": batch_size}
    return load(ROOT / "params.yaml", [f"super_resolution.{key}={value}" for key, value in keys.items()])


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
    assert set(get_args(SuperResolution.model_fields["method"].annotation)) == set(METHODS)


def test_more_images_than_threads_and_none_at_all() -> None:
    assert METHODS["bicubic"](random_images(0, 4, 4), 2).shape == (0, 8, 8)
    assert METHODS["bicubic"](random_images(1000, 2, 2), 2).shape == (1000, 4, 4)


@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize("method", METHODS)
def test_stage_writes_what_numpy_would_save(raw: Path, method: str, channels: tuple) -> None:
    scale = 1 if method == "none" else 2
    images = random_images(23, 12, 10, *channels)
    np.save(raw, images)
    np.save("expected.npy", METHODS[method](images, scale))
    written = []
    for batch_size in (1, 7, 23, 1024):
        upscale(params(method, scale, batch_size))
        written.append(OUT.read_bytes())
    assert set(written) == {Path("expected.npy").read_bytes()}
    assert sorted(path.name for path in Path("data").iterdir()) == ["raw", "upscaled"]


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
    assert not Path("data/upscaled").exists()
    assert not Path("data/upscaled.partial").exists()


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


def test_disk_that_fills_on_the_way_is_one_line_and_status_2(raw: Path) -> None:
    """A file-size limit stands in for the full disk: the write fails in the middle, with some batches on disk."""
    shutil.copy(ROOT / "params.yaml", "params.yaml")
    limited = "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500)); "
    stage = limited + "runpy.run_module('pipelines.stages.upscale', run_name='__main__')"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", stage], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write data")
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in Path("data").iterdir()) == ["raw"]
