"""Swin2SR: the numbers of transformers, padding to whole windows, and networks that do not fit."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fer.errors import UserError
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


@pytest.fixture
def folder(folders: dict[int, str], tmp_path: Path) -> Path:
    """A copy to be damaged."""
    for path in Path(folders[2]).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


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


def refused(source: str | Path, scale: int = 2) -> str:
    """The message about a network, less the key and name that each begins with."""
    with pytest.raises(UserError) as caught:
        load_swin2sr(str(source), scale, KEY)
    message = str(caught.value)
    assert message.isprintable()
    return message.removeprefix(f"{KEY}: ")


def test_another_scale(folders: dict[int, str], tmp_path: Path) -> None:
    assert refused(folders[2], 4) == (
        f"'{folders[2]}' enlarges images by 2, but scale is 4; set scale to 2 or use another network"
    )
    tiny(upscale=2, upsampler="").save_pretrained(tmp_path)  # for clearer images of the same size
    assert refused(tmp_path).startswith(f"'{tmp_path}' enlarges images by 1, but scale is 2; ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_channels_out": 1}, "takes 3 channels and returns 1, but both must be 3; use a network for colour"),
        ({"model_type": "swin"}, "is a network of type swin, not swin2sr; use one such as caidas/swin2SR-classical-"),
    ],
)  # fmt: skip
def test_another_kind_of_network(changes: dict[str, Any], message: str, folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    assert refused(folder).startswith(f"'{folder}' {message}")


def test_tensors_that_do_not_fit(folder: Path) -> None:
    path, ending = folder / "model.safetensors", "download it again or use another network"
    whole = load_file(path)
    first, second = "swin2sr.first_convolution.weight", "upsample.final_convolution.bias"
    save_file({name: tensor for name, tensor in whole.items() if name not in (first, second)}, path)
    assert refused(folder) == (
        f"'{folder}' does not match its config.json: tensor {first} is missing (2 tensors in all); {ending}"
    )
    save_file(whole | {second: torch.ones(4)}, path)
    assert refused(folder) == (
        f"'{folder}' does not match its config.json: tensor {second} has shape [4], the network needs [3] "
        f"(1 tensors in all); {ending}"
    )


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no tensors": lambda folder: (folder / "model.safetensors").unlink(),
    "cut": lambda folder: os.truncate(folder / "model.safetensors", 2000),
    "pickle": lambda folder: [
        (folder / "model.safetensors").unlink(), torch.save(tiny().state_dict(), folder / "pytorch_model.bin")
    ],
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no json": lambda folder: (folder / "config.json").write_text("<html>"),
    "bad value": lambda folder: (folder / "config.json").write_text('{"model_type": "swin2sr", "upscale": "two"}'),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_folder_that_cannot_be_loaded(damage: str, folder: Path) -> None:
    DAMAGE[damage](folder)
    message = refused(folder)
    assert message.startswith(f"cannot load '{folder}': ")
    assert message.endswith(
        ". Use a hub id that can be reached, or a local folder with config.json and model.safetensors"
    )


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files.\nCheck your connection.")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", unreachable)
    assert refused("some/network", 4) == (
        "cannot load 'some/network': We couldn't connect to 'https://huggingface.co' to load the "
        "files. Use a hub id that can be reached, or a local folder with config.json and model.safetensors"
    )
