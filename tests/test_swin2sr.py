"""Swin2SR: the numbers of transformers, padding to whole windows, and networks that do not fit."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refusal
from safetensors.torch import load_file, save_file
from torch import Tensor

from fer.super_resolution.swin2sr import load_swin2sr

KEY = "super_resolution.weights"
TINY = {"image_size": 16, "embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 8}


def tiny(**changes: Any) -> Any:
    """Numbers large enough that some lie outside of [0, 1]."""
    from transformers import Swin2SRConfig, Swin2SRForImageSuperResolution

    torch.manual_seed(0)
    config = Swin2SRConfig(**TINY | {"initializer_range": 0.15} | changes)
    return Swin2SRForImageSuperResolution(config).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Scale -> folder."""
    found = {}
    for scale in (2, 4):
        found[scale] = str(tmp_path_factory.mktemp("swin2sr"))
        tiny(upscale=scale).save_pretrained(found[scale])
    return found


def faces(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


# Numbers


@pytest.mark.parametrize("scale", [2, 4])
@torch.inference_mode()
def test_numbers_are_those_of_transformers_on_whole_windows(scale: int, folders: dict[int, str]) -> None:
    """Other sizes are filled up to whole windows by reflection, and cropped."""
    model, network = load_swin2sr(folders[scale], scale, KEY), tiny(upscale=scale)
    assert not any(module.training for module in model.modules())
    square = faces(2, 3, 16, 24)
    expected = network(pixel_values=square).reconstruction
    assert (expected < 0).any()
    assert (expected > 1).any()
    assert torch.equal(model(square), expected.clamp(0, 1))
    images = faces(2, 3, 13, 17)
    rows, columns = [*range(13), 11, 10, 9], [*range(17), *range(15, 8, -1)]
    expected = network(pixel_values=images[:, :, rows][:, :, :, columns]).reconstruction
    assert torch.equal(model(images), expected[:, :, : 13 * scale, : 17 * scale].clamp(0, 1))
    assert model(faces(1, 3, 3, 9)).shape == (1, 3, 3 * scale, 9 * scale)


@torch.inference_mode()
def test_half_precision_and_channels_last_are_close(folders: dict[int, str], tmp_path: Path) -> None:
    model, images = load_swin2sr(folders[2], 2, KEY), faces(2, 3, 16, 16)
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images)
    assert out.dtype == torch.float32
    assert 0 < (out - expected).abs().mean() < 0.01
    tiny().half().save_pretrained(tmp_path)
    assert load_swin2sr(str(tmp_path), 2, KEY)(images).dtype == torch.float32
    out = model.to(memory_format=torch.channels_last)(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("upsampler", ["pixelshuffle_aux", "pixelshuffledirect", "nearest+conv"])
@torch.inference_mode()
def test_other_upsamplers(upsampler: str, tmp_path: Path) -> None:
    tiny(upscale=4, upsampler=upsampler).save_pretrained(tmp_path)
    assert load_swin2sr(str(tmp_path), 4, KEY)(faces(2, 3, 9, 16)).shape == (2, 3, 36, 64)


# Mistakes


def config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path)


FIRST, LAST = "swin2sr.first_convolution.weight", "upsample.final_convolution.bias"
UNFIT, REMEDY = "does not match its config.json: tensor", "download it again or use another network"
OTHERS: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: config(folder, upscale=4),
        "enlarges images by 4, but scale is 2; set scale to 4 or use another network"),
    (lambda folder: config(folder, upsampler=""), "enlarges images by 1, but scale is 2; "),  # makes them clearer
    (lambda folder: config(folder, num_channels_out=1),
        "takes 3 channels and returns 1, but both must be 3; use a network for colour"),
    (lambda folder: config(folder, model_type="swin"),
        "is a network of type swin, not swin2sr; use one such as caidas/swin2SR-classical-"),
    (lambda folder: tensors(folder, lambda all: {key: all[key] for key in all if key not in (FIRST, LAST)}),
        f"{UNFIT} {FIRST} is missing (2 tensors in all); {REMEDY}"),
    (lambda folder: tensors(folder, lambda all: all | {LAST: torch.ones(4)}),
        f"{UNFIT} {LAST} has shape [4], the network needs [3] (1 tensors in all); {REMEDY}"),
]  # fmt: skip
LOST = "Use a hub id that can be reached, or a local folder with config.json and model.safetensors"


def copy_of(folders: dict[int, str], folder: Path, spoil: Callable[[Path], object]) -> Path:
    spoil(Path(shutil.copytree(folders[2], folder)))
    return folder


def test_another_network_is_named(folders: dict[int, str], tmp_path: Path) -> None:
    for number, (spoil, message) in enumerate(OTHERS):
        folder = copy_of(folders, tmp_path / str(number), spoil)
        assert refusal(load_swin2sr, str(folder), 2, KEY).startswith(f"{KEY}: '{folder}' {message}")


def test_a_folder_or_a_hub_that_gives_no_network(
    folders: dict[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = '{"model_type": "swin2sr", "upscale": "two"}'
    damage: tuple[Callable[[Path], object], ...] = (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        lambda folder: os.truncate(folder / "model.safetensors", 2000),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "config.json").write_text("<html>"),
        lambda folder: (folder / "config.json").write_text(bad),
    )
    for number, spoil in enumerate(damage):
        folder = copy_of(folders, tmp_path / str(number), spoil)
        message = refusal(load_swin2sr, str(folder), 2, KEY)
        assert message.startswith(f"{KEY}: cannot load '{folder}': ")
        assert message.endswith(f". {LOST}")

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect to 'https://x' to load the files.\nCheck your connection.")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", unreachable)
    why = "We couldn't connect to 'https://x' to load the files."
    assert refusal(load_swin2sr, "some/network", 4, KEY) == f"{KEY}: cannot load 'some/network': {why} {LOST}"
