"""DIC: sizes and names of the published file; every block and the whole against formulas; padding, batches, files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refusal
from torch import Tensor, nn

from fer.super_resolution.dic import MEAN, PUBLISHED, Dic, load_dic, merge, pad

KEY = "super_resolution.weights"
GOLDEN = Path(__file__).parent / "golden" / "dic_state_dict.txt"
SMALL = {
    "num_features": 4, "num_steps": 2, "num_groups": 3, "hg_features": 8, "num_keypoints": 68, "num_fusion_blocks": 2
}  # fmt: skip


def small(seed: int = 0, **changes: int) -> Dic:
    """Weights are large enough that peaks of heatmaps lie on both sides of .05."""
    model = Dic(**SMALL | changes).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            fan = parameter[0].numel() if parameter.shape[2] < 8 else 16 * parameter.shape[1]
            nn.init.normal_(parameter, std=fan**-0.5, generator=generator)
        elif parameter.numel() > 1:
            nn.init.normal_(parameter, std=0.1, generator=generator)
        else:
            nn.init.uniform_(parameter, 0.1, 0.4, generator=generator)
    return model


def faces(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def test_names_and_shapes_are_those_of_the_published_file() -> None:
    with torch.device("meta"):  # no memory for its tensors
        model = Dic(**PUBLISHED)
    lines = [f"{name}\t{tuple(tensor.shape)}" for name, tensor in model.state_dict().items()]
    assert len(lines) == 296
    assert lines == GOLDEN.read_text().splitlines()
    assert sum(parameter.numel() for parameter in model.parameters()) == 21_803_849
    assert MEAN == (0.509, 0.424, 0.378)


# Outputs, in float64, of the network that gave those of the authors' code with the same weights, all heatmaps included

CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-9}
OUTPUTS = Path(__file__).parent / "golden" / "dic_outputs.npz"


def known(name: str) -> Tensor:
    return torch.from_numpy(np.load(OUTPUTS)[name])


def test_images_and_heatmaps_of_each_step() -> None:
    found = small(num_steps=3).double().steps(faces(2, 3, 8, 16, dtype=torch.float64) - 0.5)
    assert len(found) == 3
    peaks = found[0][1].amax((2, 3))
    assert (peaks < 0.05).any()
    assert (peaks > 0.05).any()
    for step, (images, heatmaps) in enumerate(found):
        torch.testing.assert_close(images[:, :, ::5, ::5], known(f"images{step}"), **CLOSE)
        torch.testing.assert_close(heatmaps[:, ::7, ::3, ::3], known(f"heatmaps{step}"), **CLOSE)


def test_forward_is_the_last_step_with_the_mean() -> None:
    model = small().double()
    model.conv_out[0].weight.mul_(3)  # some leave [0, 1]
    out = model(faces(2, 3, 8, 8, dtype=torch.float64))
    torch.testing.assert_close(out[:, :, ::5, ::5], known("clamped"), **CLOSE)
    assert (out.min(), out.max()) == (0, 1)
    model = small(num_groups=1, num_fusion_blocks=1).double()  # other numbers of groups and blocks
    images = faces(1, 3, 8, 8, dtype=torch.float64) - 0.5
    torch.testing.assert_close(model.steps(images)[-1][0][:, :, ::5, ::5], known("one_group"), **CLOSE)


def test_merge_by_hand() -> None:
    heatmaps = torch.zeros(1, 68, 2, 2)
    heatmaps[0, 36, 0, 0], heatmaps[0, 36, 0, 1] = 4, 1  # left eye, its first
    heatmaps[0, 47, 1, 1] = 0.04  # right eye, its last, too faint
    heatmaps[0, 26, 1, 0], heatmaps[0, 0, 1, 0] = 3, 2  # jaw and brows
    heatmaps[0, 67] = -1  # mouth
    assert merge(heatmaps).tolist() == [
        [[[1, 0.25], [0, 0]], [[0, 0], [0, pytest.approx(0.8)]], [[0, 0], [0, 0]], [[-20, -20], [-20, -20]],
         [[0, 0], [2, 0]]]
    ]  # fmt: skip


def test_padding_by_hand() -> None:
    image = torch.arange(1.0, 7).view(1, 1, 2, 3)
    assert pad(image, 1) is image
    assert pad(image, 3).tolist() == [[[[1, 2, 3], [4, 5, 6], [1, 2, 3]]]]
    # two rows cannot be reflected in two
    assert pad(image, 4).tolist() == [[[[1, 2, 3, 3], [4, 5, 6, 6], [4, 5, 6, 6], [4, 5, 6, 6]]]]
    assert pad(torch.arange(1.0, 4).view(1, 1, 1, 3), 2).tolist() == [[[[1, 2, 3, 3], [1, 2, 3, 3]]]]


def test_other_sizes_are_padded_and_cropped_and_a_batch_is_its_images() -> None:
    model = small().double()
    for (height, width), (rows, columns) in {(12, 20): (16, 24), (8, 9): (8, 16), (5, 16): (8, 16)}.items():
        images = faces(2, 3, height, width, dtype=torch.float64)
        given, first = images.clone(), model(images)
        down, across = ([*range(side), *range(side - 2, -1, -1)] for side in (height, width))  # there and back
        larger = model(images[:, :, down[:rows]][:, :, :, across[:columns]])
        assert torch.equal(first, larger[:, :, : 8 * height, : 8 * width])
        assert torch.equal(images, given)
        torch.testing.assert_close(first, torch.cat([model(image[None]) for image in images]), **CLOSE)
    assert model(faces(1, 3, 3, 13, dtype=torch.float64)).shape == (1, 3, 24, 104)  # too small to reflect


def test_bfloat16_is_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upsampling is in float32: a GPU's autocast would leave it in bfloat16, unlike a CPU's."""
    model, images, interpolate = small(), faces(2, 3, 8, 8).bfloat16().float(), F.interpolate
    expected, kinds = model.steps(images - 0.5), list[torch.dtype]()
    monkeypatch.setattr(F, "interpolate", lambda maps, **own: kinds.append(maps.dtype) or interpolate(maps, **own))
    with torch.autocast("cpu", torch.bfloat16):
        found = model.steps(images - 0.5)
        assert model(images).dtype == torch.float32
    assert {*kinds} == {torch.float32}
    assert found[0][1].dtype == torch.bfloat16  # so it was in use
    for (image, heatmaps), (other, others) in zip(found, expected, strict=True):
        assert (image - other).norm() < 0.02 * other.norm()
        assert (heatmaps - others).norm() < 0.04 * others.norm()


# Files


def test_a_file_is_loaded_strictly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tensors, damage and code in a file: test_weights.py."""
    model, path = small(seed=3), tmp_path / "dic.pth"
    torch.save({"epoch": 1, "netG": model.state_dict()}, path)
    message = "tensor HG.compress_in.bias has shape [16], the model needs [512]; name a file of this very model"
    assert refusal(load_dic, path, KEY) == f"{KEY}: {path}: {message}"
    monkeypatch.setattr("fer.super_resolution.dic.PUBLISHED", SMALL)
    loaded = load_dic(str(path), KEY)
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(loaded(faces(1, 3, 8, 8)), model(faces(1, 3, 8, 8)))
