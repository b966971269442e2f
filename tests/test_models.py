"""Every model of the table, and every one of experiments/: it computes, learns, and comes back from its file."""

import importlib
import re
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, refusal, small_run
from torch import Tensor, nn

from fer import checkpoint
from fer.input import Input
from fer.models import MODELS, build_model, mistaken_pixels, origin, random_backbones
from fer.models.backbones import BACKBONES, build_backbone
from fer.models.cost import cost
from fer.models.embedding_difference import DifferenceOfEmbeddingsNetwork, SameSubject
from fer.models.network import ModelKind, Network
from fer.run import Run
from pipelines import experiments

LABELS = 5  # not the 8 of FER+: no head is written with a number of classes in it


def backbone(name: str, **settings: Any) -> dict[str, Any]:
    return {"name": name, "weights": None, **settings}


VIT = backbone("vit_tiny_patch16_224", patch_size=8, hidden_size=32, depth=2, num_heads=2, mlp_ratio=2, dropout=0.1)
SWIN = backbone(
    "swin_tiny_patch4_window7_224", patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[1, 2], window_size=4,
    mlp_ratio=2, drop_path_rate=0.1,
)  # fmt: skip
MOBILENET = backbone("mobilenet_v3_large", width=0.25)
RESNET = backbone("resnet50", layers=[1, 1, 1, 1], width=8)
RESNET18 = backbone("resnet18", layers=[1, 1, 1, 1], width=8, max_pool=False)
IR50 = backbone("ir50", layers=[1, 2], width=8)
DLIB = backbone("dlib_resnet", width=8)
LITE0, LITE2 = backbone("efficientnet_lite0"), backbone("efficientnet_lite2")
VGG: dict[str, Any] = {"width": 0.125, "batch_norm": True, "conv_dropout": 0.1, "dense_dropout": 0.1}
HALF = {"head": [16], "head_dropout": 0.1}


def keys(name: str, side: int, **model: Any) -> dict[str, Any]:
    return {"model": {"name": name, **model}, "input": {"image_size": side}}


def classifier(backbone: dict[str, Any], side: int = 16, **options: Any) -> dict[str, Any]:
    return keys("classifier", side, backbone=backbone, **options)


def doe(pairing: dict[str, Any]) -> dict[str, Any]:
    return keys("difference_of_embeddings", 32, backbone=RESNET, pairing=pairing, hidden=[64])


COLOUR = {"image_size": 32, "channels": 3, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
SMALL: dict[str, dict[str, Any]] = {
    "vit": classifier(VIT),
    "swin": classifier(SWIN),
    "mobilenet": classifier(MOBILENET, 32, **HALF),
    "resnet": classifier(RESNET, 32, **HALF),
    "resnet of basic blocks": classifier(RESNET18, 32),
    "ir50, dense": classifier(IR50),
    "ir50, mean": classifier(IR50 | {"pool": "mean"}),
    "dlib's": classifier(DLIB, 103),
    "lite0": classifier(LITE0, 32),
    "lite2": classifier(LITE2, 32),
    "stn, neural resizer, head": classifier(
        SWIN, 24, stn=True, resizer={"name": "neural", "size": 16, "channels": 4}, **HALF
    ),
    "bilinear resizer": classifier(
        {"name": "small_resnet", "width": 8}, 24, resizer={"name": "bilinear", "size": 16}
    ),
    "ViT-SE": keys("vit_se", 16, backbone=VIT | {"pool": "pooler"}),
    "ViT-SE with a sigmoid": keys("vit_se", 16, backbone=VIT, reduction=2, gate="sigmoid"),
    "DoE": doe({"name": "random_neutral", "references": 3}),
    "DoE, prototype": doe({"name": "prototype"}),
    "DoE, same subject": doe({"name": "same_subject"}),
    "DoE, no pairing": doe({"name": "none"}),
    "emotion encoder": keys(
        "emotion_encoder", 32, backbone=MOBILENET, identity=RESNET | {"caffe": True}, hidden=[16]
    ) | {"input": COLOUR},
    "vgg13": keys("vgg13", 16, **VGG),
    "small resnet": keys("small_resnet", 16, width=8),
    "small resnet without squeeze": keys("small_resnet", 16, width=8, reduction=0, dropout=0.1),
    "vgg13 without batch norm": keys("vgg13", 16, **VGG | {"batch_norm": False, "width": 0.25}),
}  # fmt: skip
with chdir(ROOT):
    SHIPPED = {name: experiment.run for name, experiment in experiments.load(experiments.known(), {}).items()}
LEARNING = ["ViT-SE", "DoE", "vgg13"]


def run_of(name: str) -> Run:
    """Small images for the table's rows; an experiment as it is."""
    return SHIPPED[name] if name in SHIPPED else small_run(**SMALL[name])


def build(run: Run) -> Network:
    return build_model(run.model, run.input, LABELS)


def built(name: str, seed: int = 0) -> tuple[Run, Network]:
    torch.manual_seed(seed)
    run = run_of(name)
    model = build(run)
    if isinstance(model, DifferenceOfEmbeddingsNetwork):
        model.references.normal_(std=0.05)  # as different as the embeddings of a random encoder
    return run, model


def inputs_for(run: Run, model: nn.Module, count: int = 4) -> dict[str, Tensor]:
    generator, side = torch.manual_seed(0), run.input.image_size
    inputs = {"pixel_values": torch.randn(count, run.input.channels, side, side, generator=generator)}
    if isinstance(model, DifferenceOfEmbeddingsNetwork) and isinstance(model.pairing, SameSubject):
        inputs["neutral"] = torch.randn(count, model.backbone.num_features, generator=generator)
    return inputs


def test_every_row_of_both_tables_is_tested() -> None:
    models = [small_run(**settings).model for settings in SMALL.values()]
    assert {model.name for model in models} == set(MODELS)
    backbones = [one for model in models for one in model.backbones().values()]
    # a row is its family with other defaults
    assert {type(one).__mro__[1] for one in backbones} == {row.kind.__mro__[1] for row in BACKBONES.values()}
    assert {name for name in BACKBONES if name.startswith("efficientnet")} <= {one.name for one in backbones}


# its bias shifts all scores of a query alike, which softmax takes away; behind a last layer that starts at zero
NO_GRADIENT = ("key.bias", "k_proj.bias", "stn.fc_loc.0.weight", "stn.fc_loc.0.bias")


@pytest.mark.parametrize("name", SMALL)
def test_forward_backward_and_file(name: str, tmp_path: Path) -> None:
    run, model = built(name)
    inputs = inputs_for(run, model)
    logits = model.train()(**inputs)
    assert (logits.shape, logits.dtype) == ((4, LABELS), torch.float32)
    nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, f"{key} is frozen and gets a gradient"
            continue
        assert parameter.grad is not None, f"{key} gets no gradient"
        assert torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.any() or key.endswith(NO_GRADIENT) or key.startswith("stn.localization."), key
    with torch.inference_mode():
        expected = model.eval()(**inputs)
        assert torch.equal(model(**inputs), expected)
        assert not torch.equal(expected[0], expected[1])
        third = {key: value[2:3] for key, value in inputs.items()}
        torch.testing.assert_close(model(**third), expected[2:3], atol=1e-5, rtol=1e-4)  # images do not mix
        checkpoint.save(tmp_path / "saved", model.state_dict(), {}, None)
        other = built(name, seed=1)[1].eval()
        assert not torch.equal(other(**inputs), expected)
        checkpoint.load_weights(tmp_path / "saved", other)
        assert torch.equal(other(**inputs), expected)


@pytest.mark.parametrize("name", ["swin", "lite0", "DoE"])
def test_bf16_autocast_is_close_to_fp32(name: str) -> None:
    run, model = built(name)
    inputs = inputs_for(run, model, 16)
    with torch.inference_mode():
        for _ in range(3):
            model.train()(**inputs)  # batch norm's statistics, without which a deep network amplifies every error
        exact = model.eval()(**inputs)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(**inputs).float()
    # bf16 keeps 8 bits: a layer errs by 0.4 %, a dozen layers by a few per cent of the spread of the logits
    assert 0 < (rough - exact).abs().max() < 0.05 * exact.std() + 0.01 * exact.abs().max()


@pytest.mark.parametrize("name", LEARNING)
def test_sixteen_images_are_learned_by_heart(name: str) -> None:
    run, model = built(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # a hundred steps are too few for the published .01
    inputs, labels = inputs_for(run, model, 16), torch.arange(16) % LABELS
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    model.train()
    for _ in range(100):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(**inputs), labels)
        loss.backward()
        optimizer.step()
    with torch.inference_mode():
        logits = model.eval()(**inputs)
    assert torch.equal(logits.argmax(1), labels)
    assert nn.functional.cross_entropy(logits, labels) < 0.2


# The published systems, whole: their sizes, without their weights

MOBILENET_V3 = 5_483_032 - (961 * 1280 + 1281 * 1000)  # without its classifier, 960 -> 1280 -> 1000
# head of 512 with batch norm on 1024 features, 8 classes
SWIN_B, HEAD = 86_743_224, 1024 * 512 + 512 + 2 * 512 + 512 * 8 + 8
PARAMETERS = {
    "swin_nr_fpdls": SWIN_B + HEAD + 12_083 + 2_711_904,
    # ViT-B/16 with pooler 86,389,248; 768 -> 192 -> 768, 768 -> 8
    "vit_se": 86_389_248 + 768 * 192 + 192 + 192 * 768 + 768 + 768 * 8 + 8,
    # 1920 -> 256 -> 128 -> 64 -> 32 -> 8
    "doe": MOBILENET_V3 + 1921 * 256 + 257 * 128 + 129 * 64 + 65 * 32 + 33 * 8,
    "emotion_encoder": MOBILENET_V3 + (25_557_032 - 2049 * 1000)
    + 3009 * 256 + 257 * 128 + 129 * 64 + 65 * 32 + 33 * 8,
    "resnet18": 11_689_512 - 513 * 1000 + 513 * 8,
    "vgg13_ferplus": 8_757_704,
}  # fmt: skip


def test_published_sizes() -> None:
    found = {name: cost(SHIPPED[name].model, SHIPPED[name].input, 8) for name in PARAMETERS}
    assert {name: one.parameters for name, one in found.items()} == PARAMETERS
    frozen = {"doe": MOBILENET_V3, "emotion_encoder": 25_557_032 - 2049 * 1000}
    assert {name: n for name, one in found.items() if (n := one.parameters - one.trainable)} == frozen


def test_operations_by_hand() -> None:
    run = small_run(**keys("vgg13", 16, **VGG | {"batch_norm": False}))
    planned = [(1, 8, 16), (8, 8, 16), (8, 16, 8), (16, 16, 8), (16, 32, 4), *2 * [(32, 32, 4)], *3 * [(32, 32, 2)]]
    convolutions = sum(2 * 9 * before * after * side**2 for before, after, side in planned)
    dense = 2 * (32 * 128 + 128 * 128 + 128 * LABELS)
    assert cost(run.model, run.input, LABELS).gflop * 1e9 == convolutions + dense


def test_where_weights_come_from() -> None:
    sources = {
        "swin_nr_fpdls": ["microsoft/swin-base-patch4-window7-224"], "disentangled_doe": ["emotion_encoder"],
        "emotion_encoder": ["mobilenet_v3_large-8738ca79.pth", "data/weights/resnet50_ft_weight.pkl"],
        "vit_se_tiny": ["random weights"], "vgg13_small": ["random weights"],
    }  # fmt: skip
    assert {name: origin(SHIPPED[name].model, SHIPPED[name].init_from) for name in sources} == sources
    encoder = run_of("emotion encoder").model
    assert random_backbones(encoder, None) == ["mobilenet_v3_large", "resnet50"]
    assert random_backbones(encoder, "another") == ["resnet50"]
    for name in ("doe", "vgg13", "small_resnet_nr"):
        assert random_backbones(run_of(name).model, None) == []


def test_images_that_are_not_those_of_the_published_weights() -> None:
    for name, run in SHIPPED.items():
        assert mistaken_pixels(run.model, run.input) == [], name
    classifier = SHIPPED["efficientnet_lite0"].model
    assert mistaken_pixels(classifier, Input(mean=[0.5], std=[0.25])) == [
        "efficientnet_lite0: the published weights expect input.mean [0.5] and input.std [0.5], not [0.5] and [0.25]"
    ]
    assert len(mistaken_pixels(SHIPPED["emotion_encoder"].model, Input())) == 1  # VGGFace2's network converts its own
    assert mistaken_pixels(SHIPPED["vit_se_tiny"].model, Input()) == []  # random weights


def test_a_gate_without_hidden_units_is_refused() -> None:
    run = small_run(**keys("vit_se", 16, backbone=VIT, reduction=1000))
    assert re.fullmatch(r"model.reduction: 1000 leaves no hidden unit of \d+ features", refusal(build, run))


def test_vgg13_is_the_published_one() -> None:
    model: Any = build_model(SHIPPED["vgg13_ferplus"].model, SHIPPED["vgg13_ferplus"].input, 8)
    kinds = [type(layer).__name__ for layer in model.features]
    assert [kinds.count(kind) for kind in ("Conv2d", "ReLU", "MaxPool2d", "Dropout")] == [10, 10, 4, 4]
    assert [layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)] == [0.25] * 4 + [0.5] * 2


def shown(section: str, folder: Path, patch: pytest.MonkeyPatch) -> Any:
    """The module that a section of CONTRIBUTING.md shows."""
    name = section.lower().replace(" ", "_")
    text = (ROOT / "CONTRIBUTING.md").read_text().partition(f"## {section}\n")[2]
    (folder / f"{name}.py").write_text(text.partition("```python\n")[2].partition("```")[0])
    patch.syspath_prepend(folder)
    return importlib.import_module(name)


@torch.inference_mode()
def test_the_backbone_that_contributing_shows_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the weights of a file, but for those of a classifier."""
    kind = shown("A new backbone", tmp_path, monkeypatch).TwoConvolutions
    file, key, images = tmp_path / "weights.pth", "model.backbone", torch.rand(2, 1, 8, 8)
    other = build_backbone(kind(width=4), 8, 1, key, True)
    torch.save({**other.state_dict(), "fc.weight": torch.ones(3, 8)}, file)
    network = build_backbone(kind(width=4, weights=str(file)), 8, 1, key, True)
    assert torch.equal(network(images), other(images))
    assert network(images).shape == (2, network.num_features)
    assert refusal(build_backbone, kind(weights=str(file)), 8, 1, key, True).startswith(
        f"{key}.weights: {file}: tensor first.bias has shape [4], the model needs [32]"
    )
    assert [str(fault) for fault in kind().faults(3)] == ["images of 3 px are too small: at least 4"]


def test_the_model_that_contributing_shows_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = shown("A new model", tmp_path, monkeypatch).TinyCnn(width=4)
    # 4 and 8 kernels of 3x3 with a bias each, and 8 weights and a bias for each class
    assert cost(kind, Input(channels=1), 3).parameters == 4 * (9 + 1) + 8 * (4 * 9 + 1) + 3 * (8 + 1)


def test_a_network_that_fails_or_answers_for_other_classes_is_refused() -> None:
    class Wrong(Network):
        def forward(self, pixel_values: Tensor) -> Tensor:
            return pixel_values.flatten(1)[:, :5]

    class Failing(Wrong):
        def forward(self, x: Tensor) -> Tensor:
            return x

    class Kind(ModelKind):
        name: str = "kind"
        failing: bool = False

        def build(self, settings: Input, num_labels: int, pretrained: bool) -> Network:
            return Failing() if self.failing else Wrong()

    assert refusal(cost, Kind(), Input(), 3) == "model kind: its forward returns [1, 5], must be [1, 3]"
    told = refusal(cost, Kind(failing=True), Input(), 3)
    assert told.startswith("model kind: cannot be counted on tensors without numbers: TypeError: ")
