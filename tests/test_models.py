"""Every model of the table, and every one of params.yaml: it computes, learns, and comes back from its file."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, small_run
from torch import Tensor, nn

from fer import checkpoint
from fer.config import RunConfig
from fer.errors import UserError
from fer.models import MODELS, build_model
from fer.models.vgg13 import Vgg13, Vgg13Options
from pipelines.params import load

LABELS = 5  # not the 8 of FER+: no head is written with a number of classes in it
VIT = {
    "weights": None, "patch_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "dropout": 0.1
}  # fmt: skip
SWIN = {
    "weights": None, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4,
    "mlp_ratio": 2, "drop_path_rate": 0.1,
}  # fmt: skip
VGG: dict[str, Any] = {"width": 0.125, "batch_norm": True, "conv_dropout": 0.1, "dense_dropout": 0.1}
SMALL: dict[str, dict[str, Any]] = {
    "vit": {"model": "vit", "options": VIT},
    "swin": {"model": "swin", "options": SWIN},
    "vgg13": {"model": "vgg13", "options": VGG},
    "vgg13 without batch norm": {"model": "vgg13", "options": VGG | {"batch_norm": False, "width": 0.25}},
}
SHIPPED = load(ROOT / "params.yaml").models


def run_of(name: str) -> RunConfig:
    """16-pixel images for the table's rows; a model of params.yaml as it is."""
    return SHIPPED[name] if name in SHIPPED else small_run(**SMALL[name])


def images_for(run: RunConfig, count: int = 4) -> Tensor:
    return torch.randn(count, run.channels, run.image_size, run.image_size, generator=torch.manual_seed(0))


def built(name: str) -> tuple[RunConfig, nn.Module]:
    torch.manual_seed(0)
    run = run_of(name)
    return run, build_model(run, LABELS)


def test_every_row_of_the_table_is_tested() -> None:
    assert {settings["model"] for settings in SMALL.values()} == set(MODELS)


@pytest.mark.parametrize("name", [*SMALL, *SHIPPED])
def test_forward_backward_and_file(name: str, tmp_path: Path) -> None:
    run, model = built(name)
    images = images_for(run)
    logits = model.train()(images)
    assert logits.shape == (4, LABELS)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()

    logits.logsumexp(1).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.requires_grad, parameter_name
        assert parameter.grad is not None, f"{parameter_name} gets no gradient"
        assert torch.isfinite(parameter.grad).all(), parameter_name

    with torch.inference_mode():
        expected = model.eval()(images)
        assert torch.equal(model(images), expected)
        assert not torch.equal(expected[0], expected[1])
        torch.testing.assert_close(model(images[2:3]), expected[2:3], atol=1e-5, rtol=1e-4)  # images do not mix

        checkpoint.save(tmp_path / "saved", model.state_dict(), {}, None)
        torch.manual_seed(1)
        other = build_model(run, LABELS).eval()
        assert not torch.equal(other(images), expected)
        checkpoint.load_weights(tmp_path / "saved", other)
        assert torch.equal(other(images), expected)


@pytest.mark.parametrize("name", SMALL)
def test_a_parameter_that_gets_a_gradient_gets_one_that_is_not_zero(name: str) -> None:
    run, model = built(name)
    nn.functional.cross_entropy(model(images_for(run, 16)), torch.arange(16) % LABELS).backward()
    # keys of attention: their bias shifts all scores of a query alike, which softmax takes away
    exact_zero = [key for key, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert [key for key in exact_zero if not key.endswith(("key.bias", "k_proj.bias"))] == []


@pytest.mark.parametrize("name", SMALL)
def test_the_seed_decides_the_weights(name: str) -> None:
    one, same = built(name)[1].state_dict(), built(name)[1].state_dict()
    assert all(torch.equal(one[key], same[key]) for key in one)


@pytest.mark.parametrize("name", SMALL)
def test_training_draws_and_evaluation_does_not(name: str) -> None:
    run, model = built(name)
    images = images_for(run, 8)
    model.train()
    # swin draws per image whether a layer is left out
    assert any(not torch.equal(model(images), model(images)) for _ in range(5))


@pytest.mark.parametrize("name", SMALL)
def test_bf16_autocast_is_close_to_fp32(name: str) -> None:
    run, model = built(name)
    images = images_for(run, 16)
    with torch.inference_mode():
        exact = model.eval()(images)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(images).float()
    # bf16 keeps 8 bits: a layer errs by 0.4 %, a dozen layers by a few per cent of the spread of the logits
    assert 0 < (rough - exact).abs().max() < 0.05 * exact.std() + 0.01 * exact.abs().max()


@pytest.mark.parametrize("name", SMALL)
def test_sixteen_images_are_learned_by_heart(name: str) -> None:
    run, model = built(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    images, labels = images_for(run, 16), torch.arange(16) % LABELS
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(100):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
    with torch.inference_mode():
        logits = model.eval()(images)
    assert torch.equal(logits.argmax(1), labels)
    assert nn.functional.cross_entropy(logits, labels) < 0.2


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["vit", "swin", "vgg13"])
def test_grey_and_colour(name: str, channels: int) -> None:
    run = small_run(
        **SMALL[name], channels=channels, pixel_mean=[0.5] * channels, pixel_std=[0.25] * channels, image_size=32
    )
    assert build_model(run, LABELS)(images_for(run)).shape == (4, LABELS)


def test_vgg13_is_the_published_one() -> None:
    model = build_model(SHIPPED["vgg13_ferplus"], 8)
    # convolutions: 9 in out + out
    planned = [(1, 64), (64, 64), (64, 128), (128, 128), (128, 256), *5 * [(256, 256)]]
    convolutions = sum(9 * before * after + after for before, after in planned)
    # dense: 256 maps of 4x4 -> 1024 -> 1024 -> 8
    dense = (256 * 16 + 1) * 1024 + (1024 + 1) * 1024 + (1024 + 1) * 8
    assert sum(p.numel() for p in model.parameters()) == convolutions + dense == 8_757_704
    assert isinstance(model, Vgg13)
    kinds = [type(layer).__name__ for layer in model.features]
    assert [kinds.count(kind) for kind in ("Conv2d", "ReLU", "MaxPool2d", "Dropout")] == [10, 10, 4, 4]
    assert [layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)] == [0.25] * 4 + [0.5] * 2


def test_vgg13_has_one_bias_for_each_convolution() -> None:
    for batch_norm in (False, True):
        model = Vgg13(Vgg13Options(**VGG | {"batch_norm": batch_norm}), LABELS, 16, 1)
        biases = [layer.bias is not None for layer in model.modules() if isinstance(layer, nn.Conv2d)]
        assert biases == [not batch_norm] * 10  # batch norm has its own
        assert sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules()) == 10 * batch_norm


def test_vgg13_takes_sizes_that_do_not_divide_by_16() -> None:
    assert Vgg13(Vgg13Options(**VGG), LABELS, 47, 1)(torch.zeros(2, 1, 47, 47)).shape == (2, LABELS)


def test_options_reach_the_transformers() -> None:
    vit: Any = built("vit")[1]
    config = vit.network.config
    assert (config.patch_size, config.hidden_size, config.num_hidden_layers) == (8, 32, 2)
    assert (config.num_attention_heads, config.intermediate_size, config.hidden_dropout_prob) == (2, 64, 0.1)
    assert (config.image_size, config.num_channels, config.num_labels) == (16, 1, LABELS)
    swin: Any = built("swin")[1]
    config = swin.network.config
    assert (config.patch_size, config.embed_dim, config.depths, config.num_heads) == (2, 16, [1, 1], [1, 2])
    assert (config.window_size, config.mlp_ratio, config.drop_path_rate) == (4, 2, 0.1)
    assert (config.image_size, config.num_channels, config.num_labels) == (16, 1, LABELS)


# Weights from a folder, as transformers writes and the hub serves them

DROPOUT = {"vit": "dropout", "swin": "drop_path_rate"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """name -> folder with the network of `built(name)`, which has 5 classes."""
    folders = {}
    for name in DROPOUT:
        model: Any = built(name)[1]
        folders[name] = str(tmp_path_factory.mktemp("weights") / name)
        model.network.save_pretrained(folders[name])
    return folders


def from_file(name: str, folder: str, **changes: Any) -> RunConfig:
    options = SMALL[name]["options"] | {"weights": folder, DROPOUT[name]: 0.3}
    return small_run(model=name, options=options, **changes)


@pytest.mark.parametrize("name", DROPOUT)
def test_weights_of_a_file_with_other_classes(name: str, weights: dict[str, str]) -> None:
    original = built(name)[1].state_dict()
    torch.manual_seed(5)
    model: Any = build_model(from_file(name, weights[name]), 8)
    loaded = model.state_dict()
    head = {"network.classifier.weight", "network.classifier.bias"}
    assert set(loaded) == set(original)
    assert loaded["network.classifier.weight"].shape == (8, 32)
    assert [key for key in original if key not in head and not torch.equal(original[key], loaded[key])] == []
    run = run_of(name)
    assert model(images_for(run)).shape == (4, 8)
    # what is no size comes from params.yaml
    found = model.network.config
    assert (found.hidden_dropout_prob if name == "vit" else found.drop_path_rate) == 0.3


@pytest.mark.parametrize("name", DROPOUT)
def test_weights_of_a_file_with_the_same_classes_keep_their_head(name: str, weights: dict[str, str]) -> None:
    run, original = built(name)
    model = build_model(from_file(name, weights[name]), LABELS).eval()
    with torch.inference_mode():
        assert torch.equal(model(images_for(run)), original.eval()(images_for(run)))


@pytest.mark.parametrize("name", DROPOUT)
def test_a_file_of_another_image_size_or_depth_of_colour(name: str, weights: dict[str, str]) -> None:
    with pytest.raises(UserError) as caught:
        build_model(from_file(name, weights[name], image_size=32), 8)
    assert str(caught.value) == (
        f"image_size 32 does not fit '{weights[name]}', which was trained with 16: set image_size=16"
    )
    colour = from_file(name, weights[name], channels=3, pixel_mean=[0.5] * 3, pixel_std=[0.25] * 3)
    with pytest.raises(UserError) as caught:
        build_model(colour, 8)
    assert str(caught.value) == f"channels 3 does not fit '{weights[name]}', which was trained with 1: set channels=1"


def test_a_file_of_another_architecture(weights: dict[str, str]) -> None:
    with pytest.raises(UserError) as caught:
        build_model(from_file("vit", weights["swin"]), 8)
    # a ViT of 12 layers, as a config.json of another kind leaves the sizes to the defaults: 16 tensors a layer,
    # class token, positions, patches (weight, bias), last norm (weight, bias)
    assert str(caught.value) == NOT_WHOLE.format(weights["swin"], 12 * 16 + 6)


NOT_WHOLE = (
    "options.weights: '{}' holds no whole ViTForImageClassification with its config.json: {} tensors are missing "
    "or of another shape, among them vit.embeddings.cls_token; name other weights or change model"
)


def test_a_file_without_its_config(weights: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((Path(weights["vit"]) / "model.safetensors").read_bytes())
    with pytest.raises(UserError) as caught:
        build_model(from_file("vit", str(tmp_path)), 8)
    assert str(caught.value) == NOT_WHOLE.format(tmp_path, 12 * 16 + 6)


@pytest.mark.parametrize("damage", ["no folder", "no file", "html", "cut"])
def test_weights_that_cannot_be_loaded(damage: str, weights: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    if damage != "no folder":
        folder.mkdir()
        for path in Path(weights["vit"]).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = folder / "model.safetensors"
    if damage == "no file":
        tensors.unlink()
    elif damage == "html":
        tensors.write_text("<!DOCTYPE html><html>not found</html>")
    elif damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:2000])
    with pytest.raises(UserError) as caught:
        build_model(from_file("vit", str(folder)), 8)
    message = str(caught.value)
    assert message.startswith(f"options.weights: cannot load '{folder}': ")
    assert message.endswith(
        " Give a hub id that can be reached, a local folder with config.json and model.safetensors, or null."
    )
    assert "\n" not in message


def test_pickled_weights_are_not_read(weights: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_bytes((Path(weights["vit"]) / "config.json").read_bytes())
    state = copy.deepcopy(built("vit")[1].state_dict())
    torch.save({key.removeprefix("network."): value for key, value in state.items()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"options\.weights: cannot load"):
        build_model(from_file("vit", str(folder)), 8)
