"""MobileNetV3-Large: names, shapes and numbers of torchvision's."""

import hashlib

import pytest
import torch
from conftest import filled
from torch import nn

from fer.models.mobilenet_v3 import MobileNetV3, eights

# Table 1 of arXiv 1905.02244: side of the input at 224, channels, kernel, expanded, given, SE, activation, stride
HEAD = 960 * 1280 + 1280 + 1280 * 1000 + 1000  # both dense layers at 1000 labels


def parameters(width: float, num_labels: int | None = 1000) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MobileNetV3(width, 3, num_labels).parameters())


def test_names_shapes_and_parameters_of_the_published_file() -> None:
    """Of torchvision 0.29.2."""
    with torch.device("meta"):
        model = MobileNetV3(1.0, 3, 1000)
    lines = [f"{name} {list(tensor.shape)}\n" for name, tensor in model.state_dict().items()]
    assert "features.4.block.2.fc1.weight [24, 72, 1, 1]\n" in lines
    assert len(lines) == 312
    digest = "dcd929075d7ba21fb82be02ef441f20962fa05e2c3435d62f97723089fd3c2fd"
    assert hashlib.sha256("".join(lines).encode()).hexdigest() == digest
    counts = {0.0625: 114_088, 0.5: 1_734_576, 1.0: 5_483_032, 1.25: 8_164_744}
    assert {width: parameters(width) for width in counts} == counts
    assert parameters(1.0, None) == 5_483_032 - HEAD


def test_logits_are_those_of_torchvision() -> None:
    model = filled(MobileNetV3(0.5, 3, 2))
    images = torch.sin(1e-3 * torch.arange(2 * 3 * 64 * 64, dtype=torch.float64) ** 2).reshape(2, 3, 64, 64)
    # of torchvision 0.29.2, with the same tensors
    expected = [[-84.8376777614628, 41.323645812270954], [-17.46174458591611, 74.71463943963965]]
    with torch.inference_mode():
        torch.testing.assert_close(model(images), torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=0)


@pytest.mark.parametrize(
    ("channels", "rounded"),
    # 20 is half way, and goes up; 11 -> 8, 19 -> 16 and 17.8 -> 16 would lose more than a tenth
    [(0.5, 8), (4, 8), (8.8, 8), (11, 16), (16, 16), (17.7, 16), (17.8, 24), (19, 24), (20, 24), (90, 88), (92, 96)],
)
def test_numbers_of_channels_are_multiples_of_8(channels: float, rounded: int) -> None:
    assert eights(channels) == rounded


def test_dropout_and_batch_norm() -> None:
    model = MobileNetV3(0.25, 3, 5)
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.2]
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.01}


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = MobileNetV3(1.0, 3, 10)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.abs().max() == 0, name
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), name
        else:  # convolution: variance 2 / fan-out; dense: .01
            fan_out = parameter.shape[0] * parameter[0, 0].numel()
            expected = 0.01 if name.startswith("classifier") else (2 / fan_out) ** 0.5
            allowed = 5 * expected / (2 * parameter.numel()) ** 0.5
            assert abs(float(parameter.detach().std()) - expected) < allowed, name
            assert abs(float(parameter.detach().mean())) < 5 * expected / parameter.numel() ** 0.5, name
