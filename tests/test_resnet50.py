"""ResNet-50: names, shapes and numbers of torchvision's, and of the layout of VGGFace2."""

import hashlib
from typing import Any

import pytest
import torch
from conftest import filled

from fer.models.resnet50 import CaffeInput, ResNet50

PUBLISHED: dict[str, Any] = {
    "channels": 3, "num_labels": 1000, "layers": [3, 4, 6, 3], "width": 64, "max_pool": True, "caffe": False
}  # fmt: skip


def planned(**changes: Any) -> ResNet50:
    """The network without memory for its tensors."""
    with torch.device("meta"):
        return ResNet50(**PUBLISHED | changes)


@pytest.mark.parametrize("changes", [{}, {"caffe": True}, {"max_pool": False}])
def test_names_shapes_and_parameters_of_the_published_file(changes: dict[str, bool]) -> None:
    """Of torchvision 0.29.2."""
    state = planned(**changes).state_dict()
    lines = [f"{name} {list(tensor.shape)}\n" for name, tensor in state.items()]
    assert "layer1.0.downsample.0.weight [256, 64, 1, 1]\n" in lines
    assert len(lines) == 320
    digest = "45c8e0b2d327f1cd29b3d1181bb5f512060349c9662ceb382b545cf1d108ac62"
    assert hashlib.sha256("".join(lines).encode()).hexdigest() == digest
    assert {*state} - {*planned(num_labels=None, **changes).state_dict()} == {"fc.weight", "fc.bias"}


# of torchvision 0.29.2 with the same tensors, its pool or strides changed for the last two
LOGITS = [
    ({}, [[321.9834811592213, -688.8576724354167], [325.18880590874073, -672.5719090105174]]),
    ({"max_pool": False}, [[210.3092319004752, -423.8380615787934], [204.9793780951657, -420.4951329237]]),
    ({"caffe": True}, [[35.04983740543206, -363.1383460167814], [40.091491067362824, -355.932205847358]]),
]


@pytest.mark.parametrize(("changes", "expected"), LOGITS)
def test_logits_are_those_of_torchvision(changes: dict[str, bool], expected: list[list[float]]) -> None:
    model = filled(ResNet50(**PUBLISHED | {"layers": [1, 2, 1, 1], "num_labels": 2} | changes))
    images = torch.sin(1e-3 * torch.arange(2 * 3 * 64 * 64, dtype=torch.float64) ** 2).reshape(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=0)


@pytest.mark.parametrize(
    ("changes", "side", "sides"),
    [
        ({}, 225, [113, 57, 57, 29, 15, 8]),
        ({"caffe": True}, 225, [113, 56, 56, 28, 14, 7]),
        ({"max_pool": False}, 224, [112, 112, 112, 56, 28, 14]),
    ],
)
def test_sides_of_the_maps(changes: dict[str, bool], side: int, sides: list[int]) -> None:
    model = planned(num_labels=None, **changes)
    found = []
    for name in ("conv1", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        model.get_submodule(name).register_forward_hook(lambda layer, given, maps: found.append(maps.shape[2]))
    assert model(torch.zeros(1, 3, side, side, device="meta")).shape == (1, 2048)
    assert found == sides


def test_input_of_the_caffe_layout_by_hand() -> None:
    images = torch.tensor([1.0, 0.5, 0.0]).view(1, 3, 1, 1).repeat(2, 1, 2, 3)
    images[1, 0, 1, 2] = 0.2
    before = images.clone()
    out = CaffeInput([(0.0, 1.0)])(images)
    # blue 0 - 91.4953, green 127.5 - 103.8827, red 255 - 131.0912
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([-91.4953, 23.6173, 123.9088]))
    torch.testing.assert_close(out[1, 2, 1, 2], torch.tensor(51 - 131.0912))
    assert torch.equal(images, before)


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = ResNet50(**PUBLISHED | {"num_labels": 10, "layers": [1, 2, 1, 1], "width": 16})
    for name, parameter in model.named_parameters():
        if name.startswith("fc."):  # uniform in +-1 / sqrt(512)
            assert 0.8 < float(parameter.detach().abs().max()) * 512**0.5 <= 1, name
        elif parameter.ndim == 1:  # the last scale of a block is not zero
            assert (parameter == (1 if name.endswith("weight") else 0)).all(), name
        else:  # variance 2 / fan-out
            expected = (2 / (parameter.shape[0] * parameter[0, 0].numel())) ** 0.5
            allowed = 5 * expected / (2 * parameter.numel()) ** 0.5
            assert abs(float(parameter.detach().std()) - expected) < allowed, name
