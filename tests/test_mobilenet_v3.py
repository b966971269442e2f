"""MobileNetV3-Large: names, shapes and numbers of torchvision's; the rows of the paper's table from its formulas."""

import hashlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fer.models.mobilenet_v3 import MobileNetV3, eights

# Table 1 of arXiv 1905.02244: side of the input at 224, channels, kernel, expanded, given, SE, activation, stride
TABLE = [
    (112, 16, 3, 16, 16, False, "RE", 1),
    (112, 16, 3, 64, 24, False, "RE", 2),
    (56, 24, 3, 72, 24, False, "RE", 1),
    (56, 24, 5, 72, 40, True, "RE", 2),
    (28, 40, 5, 120, 40, True, "RE", 1),
    (28, 40, 5, 120, 40, True, "RE", 1),
    (28, 40, 3, 240, 80, False, "HS", 2),
    (14, 80, 3, 200, 80, False, "HS", 1),
    (14, 80, 3, 184, 80, False, "HS", 1),
    (14, 80, 3, 184, 80, False, "HS", 1),
    (14, 80, 3, 480, 112, True, "HS", 1),
    (14, 112, 3, 672, 112, True, "HS", 1),
    (14, 112, 5, 672, 160, True, "HS", 2),
    (7, 160, 5, 960, 160, True, "HS", 1),
    (7, 160, 5, 960, 160, True, "HS", 1),
]
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


def hard_swish(x: Tensor) -> Tensor:
    return x * (x + 3).clamp(0, 6) / 6


def norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    scale = state[f"{name}.weight"] / (state[f"{name}.running_var"] + 0.001).sqrt()
    return (x - state[f"{name}.running_mean"].view(-1, 1, 1)) * scale.view(-1, 1, 1) + state[f"{name}.bias"].view(
        -1, 1, 1
    )


def inverted_residual(x: Tensor, state: dict[str, Tensor], row: tuple) -> Tensor:
    """One row of the table, from the formulas, on width 1."""
    _, before, kernel, expanded, after, squeeze, activation, stride = row
    act = hard_swish if activation == "HS" else torch.relu
    maps, place = x, 0
    if expanded != before:
        maps = act(norm(F.conv2d(maps, state["0.0.weight"]), state, "0.1"))
        place = 1
    maps = F.pad(maps, [kernel // 2] * 4)
    maps = F.conv2d(maps, state[f"{place}.0.weight"], stride=stride, groups=expanded)
    maps = act(norm(maps, state, f"{place}.1"))
    if squeeze:
        place += 1
        means = maps.mean((2, 3))
        hidden = torch.relu(means @ state[f"{place}.fc1.weight"].flatten(1).T + state[f"{place}.fc1.bias"])
        gate = hidden @ state[f"{place}.fc2.weight"].flatten(1).T + state[f"{place}.fc2.bias"]
        maps = maps * ((gate + 3).clamp(0, 6) / 6)[:, :, None, None]
    maps = norm(F.conv2d(maps, state[f"{place + 1}.0.weight"]), state, f"{place + 1}.1")
    return maps + x if stride == 1 and before == after else maps


@pytest.fixture(scope="module")
def whole() -> MobileNetV3:
    torch.manual_seed(0)
    model = MobileNetV3(1.0, 3, None)
    filled(model)
    return model


@pytest.mark.parametrize("index", range(len(TABLE)))
def test_block_is_that_of_the_paper(index: int, whole: MobileNetV3) -> None:
    row, block = TABLE[index], whole.features[index + 1]
    prefix = f"features.{index + 1}.block."
    state = {key.removeprefix(prefix): value for key, value in whole.state_dict().items() if key.startswith(prefix)}
    maps = 2 * torch.randn(2, row[1], 9, 8, generator=torch.manual_seed(index), dtype=torch.float64)
    with torch.inference_mode():
        expected = inverted_residual(maps, state, row)
        assert expected.shape[1] == row[4]
        torch.testing.assert_close(block(maps), expected, rtol=1e-9, atol=1e-9)


def test_first_and_last_layer_are_those_of_the_paper(whole: MobileNetV3) -> None:
    state = whole.state_dict()
    images = torch.randn(2, 3, 37, 36, generator=torch.manual_seed(0), dtype=torch.float64)
    with torch.inference_mode():
        first = hard_swish(norm(F.conv2d(images, state["features.0.0.weight"], None, 2, 1), state, "features.0.1"))
        torch.testing.assert_close(whole.features[0](images), first, rtol=1e-9, atol=1e-9)
        maps = whole.features[:16](images)
        last = hard_swish(norm(F.conv2d(maps, state["features.16.0.weight"]), state, "features.16.1"))
        torch.testing.assert_close(whole(images), last.mean((2, 3)), rtol=1e-9, atol=1e-9)


def test_hard_swish_by_hand() -> None:
    x = torch.tensor([-4.0, -3.0, -1.0, 0.0, 1.0, 3.0, 5.0])
    expected = torch.tensor([0.0, 0.0, -1 / 3, 0.0, 2 / 3, 3.0, 5.0])
    layer = MobileNetV3(0.25, 3, None).features[0][2]
    for function in (hard_swish, layer):
        torch.testing.assert_close(function(x), expected)


def test_batch_norm_by_hand() -> None:
    layer = MobileNetV3(0.25, 3, None).features[0][1].eval()
    layer.running_var.zero_()
    ones = torch.ones(4, 8, 1, 1)
    torch.testing.assert_close(layer(ones), ones / math.sqrt(0.001))
    layer.train()(ones)
    torch.testing.assert_close(layer.running_mean, torch.full((8,), 0.01))


def test_sides_of_the_maps() -> None:
    maps = torch.zeros(1, 3, 224, 224, device="meta")
    sides = []
    for layer in planned(1.0, None).features:
        maps = layer(maps)
        sides.append(maps.shape[2:])
    assert sides[:15] == [(row[0], row[0]) for row in TABLE]
    assert [*sides[15:], maps.shape[1]] == [(7, 7), (7, 7), 960]


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


def test_a_narrow_block_that_would_not_expand_has_no_expansion() -> None:
    model = planned(0.0625, None)  # 8 channels before and after what should be 72
    assert [len(model.features[index].block) for index in (1, 2, 4)] == [2, 2, 3]


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (2, 3, 33, 47), (3, 3, 64, 32), (2, 1, 48, 48)])
def test_batches_and_sizes(shape: tuple[int, ...]) -> None:
    images = torch.randn(shape, generator=torch.manual_seed(0))
    model = MobileNetV3(0.25, shape[1], None).eval()
    assert model(images).shape == (shape[0], model.num_features)
    logits = MobileNetV3(0.25, shape[1], 7).eval()(images)
    assert logits.shape == (shape[0], 7)
    assert torch.isfinite(logits).all()


def test_every_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    model = MobileNetV3(0.25, 3, 5)
    F.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []


def test_dropout_is_a_fifth_and_of_training_alone() -> None:
    torch.manual_seed(0)
    model = MobileNetV3(0.25, 3, 5)
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.2]
    images = torch.randn(4, 3, 32, 32)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


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
