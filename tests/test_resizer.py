"""Resizer and spatial transformer: parameter counts, tensor names, and outputs against formulas written out here."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fer.models.resizer import Resizer
from fer.models.stn import SMALLEST, SpatialTransformer


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Weights, and batch norm's statistics, that hide no mistake."""
    generator = torch.manual_seed(3)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2, generator=generator)
        elif tensor.is_floating_point():
            tensor.normal_(0, 0.2, generator=generator)
    return module.eval()


def test_published_sizes_and_tensor_names() -> None:
    # 7x7, 1x1, norm; block: twice 3x3 and norm; 3x3, norm; 7x7
    block = 2 * (9 * 16 * 16 + 16 + 32)
    by_hand = (49 * 3 * 16 + 16) + (16 * 16 + 16) + 32 + block + (9 * 16 * 16 + 16) + 32 + (49 * 16 * 3 + 3)
    assert sum(p.numel() for p in Resizer(224, 1, 16, 3, None).parameters()) == by_hand == 12_083
    assert {name.rpartition(".")[0] for name in Resizer(8, 2, 4, 3, None).state_dict()} == {
        "conv1", "conv2", "bn1", "conv3", "bn2", "conv4",
        *(f"resblock.{i}.{part}" for i in range(2) for part in ("conv1", "bn1", "conv2", "bn2")),
    }  # fmt: skip
    # 384 -> 378 -> 189 -> 185 -> 92
    stn = SpatialTransformer(384, 3)
    localization = 49 * 3 * 8 + 8 + 25 * 8 * 10 + 10
    assert sum(p.numel() for p in stn.parameters()) == localization + (10 * 92 * 92 + 1) * 32 + 33 * 6 == 2_711_904
    parts = {name.rpartition(".")[0] for name in stn.state_dict()}
    assert parts == {"localization.0", "localization.3", "fc_loc.0", "fc_loc.2"}


@pytest.mark.parametrize(("side", "size", "scale"), [(48, 28, None), (20, 33, None), (48, 28, 0.584)])
def test_resizer_is_its_formula(side: int, size: int, scale: float | None) -> None:
    module = randomised(Resizer(size, 2, 5, 3, scale)).double()
    weights: dict[str, Tensor] = dict(module.state_dict())
    images = torch.randn(2, 3, side, side, dtype=torch.float64, generator=torch.manual_seed(0))

    def convolve(x: Tensor, name: str) -> Tensor:
        kernel = weights[f"{name}.weight"]
        return F.conv2d(x, kernel, weights[f"{name}.bias"], padding=kernel.shape[-1] // 2)

    def norm(x: Tensor, name: str) -> Tensor:
        keys = ("running_mean", "running_var", "weight", "bias")
        mean, variance, factor, shift = (weights[f"{name}.{key}"].view(1, -1, 1, 1) for key in keys)
        return (x - mean) / torch.sqrt(variance + 1e-5) * factor + shift

    def leaky(x: Tensor) -> Tensor:
        return torch.where(x > 0, x, 0.2 * x)

    ratio = scale or size / side
    x = z = bilinear(norm(leaky(convolve(leaky(convolve(images, "conv1")), "conv2")), "bn1"), size, ratio)
    for i in range(2):
        inner = leaky(norm(convolve(x, f"resblock.{i}.conv1"), f"resblock.{i}.bn1"))
        x = x + norm(convolve(inner, f"resblock.{i}.conv2"), f"resblock.{i}.bn2")
    expected = convolve(norm(convolve(x, "conv3"), "bn2") + z, "conv4") + bilinear(images, size, ratio)
    torch.testing.assert_close(module(images), expected, atol=1e-10, rtol=1e-10)


def bilinear(images: Tensor, size: int, ratio: float) -> Tensor:
    """Output pixel i looks at input position (i + .5) / ratio - .5, edges repeated; no smoothing before."""
    side = images.shape[-1]
    at = ((torch.arange(size, dtype=torch.float64) + 0.5) / ratio - 0.5).clamp(0)
    low = at.floor().long().clamp(max=side - 1)
    high = (low + 1).clamp(max=side - 1)
    weight = (at - low).clamp(0, 1)
    rows = images[:, :, low] * (1 - weight).view(-1, 1) + images[:, :, high] * weight.view(-1, 1)
    return rows[..., low] * (1 - weight) + rows[..., high] * weight


def test_spatial_transformer_by_hand() -> None:
    stn = SpatialTransformer(SMALLEST, 1)
    with torch.no_grad():
        images = torch.rand(1, 1, SMALLEST, SMALLEST)
        torch.testing.assert_close(stn(images), images, atol=1e-5, rtol=0)  # a new one changes nothing
        stn.fc_loc[2].bias.copy_(torch.tensor([0.0, -1, 0, 1, 0, 0]))  # x' = -y, y' = x: a quarter turn
        torch.testing.assert_close(stn(images), images.rot90(1, (2, 3)), atol=1e-5, rtol=0)
        stn.fc_loc[2].bias.copy_(torch.tensor([1, 0, 2 * 3 / (SMALLEST - 1), 0, 1, 0]))  # three pixels to the left
        moved = stn(images)
    torch.testing.assert_close(moved[..., :-3], images[..., 3:], atol=1e-5, rtol=0)
    assert moved[..., -3:].abs().max() < 1e-5  # zeros from outside


def test_half_precision_moves_no_pixel() -> None:
    """At 384 pixels bfloat16 would be off by as much as a pixel and a half."""
    ramp = torch.arange(384.0).expand(1, 1, 384, 384)
    stn = SpatialTransformer(384, 1)
    with torch.inference_mode():
        stn.fc_loc[2].bias.mul_(0.9987)  # a trained one is not the identity
        expected = stn(ramp)
        with torch.autocast("cpu", torch.bfloat16):
            found = stn(ramp)
    assert torch.equal(found, expected)
