"""A checkpoint alone gives the answers that the evaluation gave, softened by its temperature."""

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CLASSES, CPU, NO_AUGMENT, doe, emotion_encoder, make_data, refusal, small_run
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.special import softmax

from fer.ensemble import combine
from fer.evaluate import evaluate, evened, metrics, read_evaluated
from fer.predict import Predictor, _load_pyfunc
from fer.resources import Resources
from fer.train import fit

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "colour, resized": {"input": {"channels": 3, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "image_size": 24}},
    "random_neutral, bf16, averaged": doe(augment={}, precision="bf16", ema_decay=0.8),
    "prototype": doe("prototype"),
    "emotion_encoder": emotion_encoder(),
}


@pytest.fixture(scope="module", params=KINDS)
def run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, np.ndarray, np.ndarray]:
    """A checkpoint moved away from its run and data, images, and what the evaluation said of them."""
    place, moved = tmp_path_factory.mktemp("place"), tmp_path_factory.mktemp("moved") / "model"
    data = make_data(place / "data")
    folder = fit("x", small_run(epochs=2, **KINDS[request.param]), CPU, data, place / "runs")
    evaluate(folder, data, CPU)
    images, wanted = np.load(data / "upscaled" / "images.npy")[-40:], softer(folder)  # of test
    shutil.copytree(folder / "best", moved)
    shutil.rmtree(place)
    return moved, images, wanted


def softer(folder: Path) -> np.ndarray:
    """What the evaluation said of test, divided by the temperature that val asked for."""
    logits = np.log(read_evaluated(folder / "predictions_test.csv", 40, CLASSES)[CLASSES].to_numpy(np.float32))
    return softmax(logits / json.loads((folder / "best" / "checkpoint.json").read_text())["temperature"], 1)


def test_probabilities_are_those_of_the_evaluation(run: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder, images, wanted = run
    predictor = Predictor(folder)
    found = predictor.probabilities(images)
    assert (predictor.classes, found.dtype) == (CLASSES, np.float32)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    np.testing.assert_array_equal(_load_pyfunc(str(folder)).predict({"images": images}), found)  # as a server does it
    alone = np.concatenate([predictor.probabilities(images[i : i + 1]) for i in (0, 7, 39)])
    # bf16 has 8 bits; a batch of another size may round otherwise
    atol = 2e-3 if predictor.run.precision == "bf16" else 2e-6
    np.testing.assert_allclose(alone, wanted[[0, 7, 39]], atol=atol)
    np.testing.assert_allclose(predictor.probabilities(images[::-1]), found[::-1], atol=1e-6)  # another memory layout
    in_colour = np.repeat(images[..., None], 3, axis=3)
    np.testing.assert_allclose(predictor.probabilities(in_colour), found, atol=1e-5)
    assert predictor.probabilities(images[:0]).shape == (0, 8)
    assert np.log(found).std(0).max() * predictor.temperature > 1e-3  # they do depend on the image
    if not predictor.run.model.images_beside():
        assert refusal(predictor.probabilities, images, neutral=images).startswith("neutral: give one such face per")


def test_a_network_that_computes_no_numbers_predicts_nothing(bars: Path, tmp_path: Path) -> None:
    folder = fit("x", small_run(), CPU, bars, tmp_path / "runs") / "best"
    weights = load_file(folder / "model.safetensors")
    weights["classifier.6.bias"][0] = torch.nan
    save_file(weights, folder / "model.safetensors")
    told = "its network computes no numbers; train it again, or name another run"
    assert told in refusal(Predictor(folder).probabilities, np.load(bars / "upscaled" / "images.npy")[:2])


def test_pictures_of_pillow_are_those_of_their_files(bars: Path, tmp_path: Path) -> None:
    folder = fit("x", small_run(), CPU, bars, tmp_path / "runs") / "best"
    predictor = Predictor(folder)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    for picture in (noise.quantize(16), noise.convert("CMYK"), noise.convert("1"), noise.convert("RGBA")):
        picture.save(tmp_path / (name := f"{picture.mode}.tiff"))
        np.testing.assert_array_equal(predictor.probabilities([picture]), predictor.probabilities([tmp_path / name]))
    deep = Image.fromarray(np.full((16, 16), 300, np.uint16))
    assert refusal(predictor.probabilities, [deep]).startswith("images: ")


def test_json_may_hold_pictures_as_base64_and_paths_in_every_form_that_mlflow_takes(bars: Path, tmp_path: Path) -> None:
    from mlflow.pyfunc.scoring_server import infer_and_parse_data

    folder = fit("x", small_run(epochs=1), CPU, bars, tmp_path)
    served, face = _load_pyfunc(str(folder / "best")), np.load(bars / "upscaled" / "images.npy")[0]
    Image.fromarray(face).save(path := tmp_path / "face.png")
    text = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    wanted = served.predict(face)
    for one in (text, str(path)):
        for body in (
            {"inputs": [one]},
            {"inputs": {"images": [one]}},
            {"instances": [one]},
            {"dataframe_split": {"columns": ["images"], "data": [[one]]}},
            {"dataframe_records": [{"images": one}]},
        ):
            pd.testing.assert_frame_equal(served.predict(infer_and_parse_data(body)), wanted)
    assert refusal(served.predict, ["data:image/png;base64,?"]).startswith("images: no base64 after `data:image/")
    assert refusal(served.predict, {"images": None}).startswith("images: NoneType; wanted: uint8 [H, W], [B, H, W]")
    assert refusal(served.predict, {"images": [[[1, 2], [3]]]}) == "images: a nested list whose rows differ in length"
    assert refusal(served.predict, ["x" * 5000]).endswith("x: not a file; give the path of a picture")
    for table, told in (
        (
            pd.DataFrame({"images": [text], "photographed": [True]}),
            "photographed: this model takes no such column; known",
        ),
        ({"faces": [text]}, "faces: this model takes no such column; known: images"),
        ({}, "images: missing; give the faces there"),
    ):
        assert refusal(served.predict, table).startswith(told)


# A neutral face beside the image


@pytest.fixture(scope="module")
def people(bars: Path) -> tuple[np.ndarray, np.ndarray]:
    """The test images of `bars`, and for each the first other neutral one of the same person."""
    table = pd.read_csv(bars / "splits" / "test.csv", keep_default_na=False)
    images = np.load(bars / "upscaled" / "images.npy")
    neutral = table[table["label"] == 0]
    partners = [
        neutral["row"][(neutral["subject"] == face.subject) & (neutral["row"] != face.row)].iloc[0]
        for face in table.itertuples()
    ]
    return images[table["row"]], images[partners]


@pytest.mark.parametrize(("precision", "rounding"), [("fp32", 2e-6), ("bf16", 2e-3)])
def test_same_subject_compares_with_the_face_that_is_given(
    precision: str, rounding: float, bars: Path, people: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    folder = fit("x", small_run(**doe("same_subject"), epochs=1, precision=precision), CPU, bars, tmp_path)
    evaluate(folder, bars, Resources(device="cpu", eval_batch_size=16))
    wanted, (images, partners), predictor = softer(folder), people, Predictor(folder / "best")
    served = _load_pyfunc(str(folder / "best")).predict({"images": images, "neutral": partners})
    np.testing.assert_allclose(served, wanted, atol=rounding)
    for predictor.batch_size in (256, 7):
        found = predictor.probabilities(images, neutral=partners)
        np.testing.assert_allclose(found, wanted, atol=rounding)
    assert abs(predictor.probabilities(images, neutral=partners[::-1]) - wanted).max() > 2 * rounding
    told = "neutral: this model needs such a face of the same person with every image"
    assert refusal(predictor.probabilities, images) == told


@pytest.mark.parametrize("pairing", ["random_neutral", "prototype"])
def test_a_face_that_is_given_replaces_the_references(
    pairing: str, bars: Path, people: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    predictor = Predictor(fit("x", small_run(**doe(pairing), epochs=1), CPU, bars, tmp_path) / "best")
    images, partners = people
    found = predictor.probabilities(images, neutral=partners)
    assert abs(found - predictor.probabilities(images)).max() > 1e-4

    def embedded(faces: np.ndarray) -> torch.Tensor:
        small = torch.from_numpy(faces)[:, None] / 255
        resized = torch.nn.functional.interpolate(small, size=(32, 32), mode="bilinear", antialias=True).clamp(0, 1)
        return predictor.model.backbone((resized - 0.5) / 0.25)

    with torch.no_grad():
        target, neutral = embedded(images), embedded(partners)
        wanted = torch.softmax(predictor.model.head(torch.cat([target - neutral, target], 1)), 1)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    predictor.model.references.zero_()
    np.testing.assert_allclose(predictor.probabilities(images, neutral=partners), found, atol=1e-6)
    told = "give one such face per image, and only to a model that compares two faces"
    for beside in ({"neutral": partners[:39]}, {"smiling": partners}):
        assert refusal(predictor.probabilities, images, **beside) == f"{next(iter(beside))}: {told}"


VIT = {"patch_size": 4, "hidden_size": 24, "depth": 1, "num_heads": 2, "mlp_ratio": 1}
MODELS: dict[str, dict[str, Any]] = {"classifier": {"name": "classifier"}, "difference_of_embeddings": doe()["model"]}


def cut(row: dict) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("model", MODELS)
def test_a_checkpoint_of_pretrained_weights_needs_their_file_no_more(model: str, bars: Path, tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    sizes = {"image_size": 16, "patch_size": 4, "num_channels": 1, "hidden_size": 24, "num_hidden_layers": 1}
    pretrained = ViTModel(ViTConfig(**sizes, num_attention_heads=2, intermediate_size=24), add_pooling_layer=False)
    pretrained.save_pretrained(weights := tmp_path / "pretrained")
    backbone = {"name": "vit_tiny_patch16_224", "weights": str(weights), **VIT}
    slow = {"lr": 1e-12, "weight_decay": 0.0}  # a rate at which nothing is learned
    run = small_run(model={**MODELS[model], "backbone": backbone}, augment=NO_AUGMENT, epochs=2, optimizer=slow)
    with pytest.raises(KeyboardInterrupt):
        fit("vit", run, CPU, bars, tmp_path / "runs", on_epoch=cut)
    shutil.rmtree(weights)
    folder = fit("vit", run, CPU, bars, tmp_path / "runs")  # goes on without it
    assert evaluate(folder, bars, CPU)["starts_from"] == [str(weights)]
    assert Predictor(folder / "best").probabilities(np.zeros((2, 16, 16), np.uint8)).shape == (2, 8)
    for part in ("best", "last"):
        found = load_file(folder / part / "model.safetensors")
        for name, tensor in pretrained.state_dict().items():
            torch.testing.assert_close(found[f"backbone.network.{name}"], tensor, atol=1e-9, rtol=0)


def test_even_classes_are_those_of_the_evaluation_too(tmp_path: Path) -> None:
    """Of the 20 training images four classes have three each, the others two."""
    data, runs = make_data(tmp_path / "data", {"train": 20, "val": 16, "test": 40}), tmp_path / "runs"
    folder = fit("x", small_run(epochs=2, batch_size=4), CPU, data, runs)
    summary = evaluate(folder, data, CPU)
    faces, labels = np.load(data / "upscaled" / "images.npy")[-40:], (np.arange(40) + 36) % 8
    images = np.array([3, 3, 3, 3, 2, 2, 2, 2])
    for power in (0.5, 1.0):
        found, wanted = Predictor(folder, even=power).probabilities(faces), softer(folder) / images**power
        np.testing.assert_allclose(found, wanted / wanted.sum(1, keepdims=True), atol=1e-6)
        assert not np.allclose(found, Predictor(folder).probabilities(faces), atol=1e-3)
        in_tables, by_hand = evened(folder, summary, power), metrics(torch.from_numpy(found), torch.from_numpy(labels))
        assert in_tables is not None
        for key in ("accuracy", "balanced_accuracy", "ece", "images"):  # ece: from the probabilities themselves
            assert in_tables[key] == pytest.approx(by_hand[key], rel=1e-4)


@pytest.mark.parametrize("key", ["class_weights", "balanced_sampling", "logit_adjustment"])
def test_what_training_made_even_is_not_made_so_again(bars: Path, tmp_path: Path, key: str) -> None:
    """By its own settings, those of a member of an ensemble, or of a teacher; neither of these changes an id."""
    plain, folder = (fit("x", small_run(**given, epochs=1), CPU, bars, tmp_path) for given in ({}, {key: 0.5}))
    summary, _ = (evaluate(one, bars, CPU) for one in (folder, plain))
    student = fit("x", small_run(teacher=folder.name, epochs=1), CPU, bars, tmp_path)
    evaluate(student, bars, CPU)
    mixed = [combine(members, bars, CPU) for members in ([plain, folder], [folder, plain], [plain, student])]
    assert Predictor(combine([plain], bars, CPU), even=1.0).images is not None
    assert {getattr(Predictor(one).run, key) for one in (student, *mixed)} == {0.0}
    for one in (folder, student, *mixed):
        told = f"{one.name}: was trained with {key} 0.5, which evens out the classes already"
        assert refusal(Predictor, one, even=0.5) == told
        assert evened(one, summary) is None
    shutil.rmtree(folder)  # the student knows without its teacher, too
    fit("x", small_run(teacher=folder.name, epochs=1), CPU, bars, tmp_path)
    assert json.loads((student / "config.json").read_text())["balanced"] == {key: 0.5}
