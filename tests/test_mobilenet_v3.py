"""MobileNetV3-Large: names, shapes and numbers of torchvision's."""

import hashlib

import pytest
import torch
from torch import nn

from fer.models.mobilenet_v3 import MobileNetV3, eights

# Table 1 of arXiv 1905.02244: side of the input at 224, channels, kernel, expanded, given, SE, activation, stride
HEAD = 960 * 1280 + 1280 + 1280 * 1000 + 1000  # both dense layers at 1000 labels


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def planned(width: float, num_labels: int | None) -> MobileNetV3:
    """The network without memory for its tensors."""
    with torch.device("meta"):
        return MobileNetV3(width, 3, num_labels)


def filled(model: nn.Module) -> nn.Module:
    """Every tensor from a formula, in float64; batch norm's variances between .8 and 1.2."""
    state = {}
    for place, (name, tensor) in enumerate(model.state_dict().items()):
        steps = torch.arange(tensor.numel(), dtype=torch.float64) % 997
        wave = torch.sin(0.37 * steps**2 + place).reshape(tensor.shape)
        if tensor.ndim > 1:
            state[name] = wave * 2 / tensor[0].numel() ** 0.5
        elif name.endswith("num_batches_tracked"):
            state[name] = tensor
        else:
            state[name] = 0.2 * wave + float(name.endswith(("weight", "running_var")))
    model.load_state_dict(state)
    return model.double().eval()


def test_names_shapes_and_parameters_of_the_published_file() -> None:
    model = planned(1.0, 1000)
    lines = [f"{name} {list(tensor.shape)}\n" for name, tensor in model.state_dict().items()]
    assert "features.0.0.weight [16, 3, 3, 3]\n" in lines
    assert "features.4.block.2.fc1.weight [24, 72, 1, 1]\n" in lines
    assert "features.16.1.num_batches_tracked []\n" in lines
    assert "classifier.0.weight [1280, 960]\n" in lines
    assert len(lines) == 312
    # of torchvision 0.29.2
    digest = "dcd929075d7ba21fb82be02ef441f20962fa05e2c3435d62f97723089fd3c2fd"
    assert hashlib.sha256("".join(lines).encode()).hexdigest() == digest
    assert parameters(model) == 5_483_032


def test_without_labels_there_is_no_classifier() -> None:
    model, whole = planned(1.0, None), planned(1.0, 1000)
    assert model.num_features == 960
    assert parameters(model) == 5_483_032 - HEAD
    assert {*whole.state_dict()} - {*model.state_dict()} == {
        "classifier.0.weight", "classifier.0.bias", "classifier.3.weight", "classifier.3.bias",
    }  # fmt: skip


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


@pytest.mark.parametrize(
    ("width", "count", "features"), [(0.0625, 114_088, 96), (0.5, 1_734_576, 480), (1.25, 8_164_744, 1200)]
)
def test_width(width: float, count: int, features: int) -> None:
    model = planned(width, 1000)
    assert parameters(model) == count  # of torchvision 0.29.2
    assert model.num_features == features


def test_dropout_is_a_fifth_and_of_training_alone() -> None:
    torch.manual_seed(0)
    model = MobileNetV3(0.25, 3, 5)
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.2]
    images = torch.randn(4, 3, 32, 32)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))
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
