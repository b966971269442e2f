"""A checkpoint alone gives the answers that the evaluation gave."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CLASSES, make_data, small_run

from fer.errors import UserError
from fer.evaluate import evaluate
from fer.predict import Predictor, _load_pyfunc
from fer.train import fit

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "averaged": {"ema_decay": 0.8},
    "bf16": {"precision": "bf16"},
    "colour, resized": {"channels": 3, "pixel_mean": [0.5, 0.4, 0.3], "pixel_std": [0.2, 0.25, 0.3], "image_size": 24},
}


@pytest.fixture(scope="module", params=KINDS)
def run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, np.ndarray, np.ndarray]:
    """A checkpoint moved away from its run and data, images, and what the evaluation said of them."""
    place = tmp_path_factory.mktemp("place")
    data = make_data(place / "data")
    folder = fit("x", small_run(epochs=2, **KINDS[request.param]), data, place / "runs")
    evaluate(folder, data)
    table = pd.read_csv(folder / "predictions_test.csv", keep_default_na=False)
    images = np.load(data / "upscaled" / "images.npy")[table["row"]]
    moved = tmp_path_factory.mktemp("moved") / "model"
    shutil.copytree(folder / "best", moved)
    shutil.rmtree(place)
    return moved, images, table[CLASSES].to_numpy()


def test_probabilities_are_those_of_the_evaluation(run: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder, images, wanted = run
    predictor = Predictor(folder)
    assert predictor.classes == CLASSES
    found = predictor.probabilities(images)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-6)  # written with six digits
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)
    assert found.std(0).max() > 1e-4  # they do depend on the image


def test_a_server_gets_the_same(run: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder, images, wanted = run
    served = _load_pyfunc(str(folder))
    np.testing.assert_allclose(served.predict({"images": images}), wanted, atol=1e-6)


def test_any_number_and_layout_of_images() -> None:
    predictor = Predictor.__new__(Predictor)
    predictor.run, predictor.classes = small_run(eval_batch_size=3), CLASSES
    predictor.device = torch.device("cpu")
    torch.manual_seed(0)
    predictor.model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 8))
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16), dtype=np.uint8)
    whole = predictor.probabilities(images)
    assert whole.shape == (8, 8)
    assert predictor.probabilities(images[:0]).shape == (0, 8)
    np.testing.assert_allclose(predictor.probabilities(images[:1]), whole[:1], atol=1e-6)
    np.testing.assert_allclose(predictor.probabilities(images[::-1]), whole[::-1], atol=1e-6)
    grey_as_colour = np.repeat(images[..., None], 3, axis=3)
    np.testing.assert_allclose(predictor.probabilities(grey_as_colour), whole, atol=1e-6)


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{tmp_path}: no checkpoint there"):
        Predictor(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(run: tuple[Path, np.ndarray, np.ndarray]) -> None:
    with pytest.raises(UserError, match="this machine has no usable GPU"):
        Predictor(run[0], device="cuda")


def test_a_checkpoint_of_pretrained_weights_needs_their_file_no_more(data: Path, tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"image_size": 16, "patch_size": 4, "num_channels": 1, "hidden_size": 24, "num_hidden_layers": 1}
    pretrained = ViTForImageClassification(ViTConfig(**sizes, num_attention_heads=2, intermediate_size=24))
    pretrained.save_pretrained(tmp_path / "pretrained")
    options = small_vit_options() | {"weights": str(tmp_path / "pretrained")}
    run = small_run(model="vit", options=options, epochs=2)

    def cut(row: dict) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit("vit", run, data, tmp_path / "runs", on_epoch=cut)
    shutil.rmtree(tmp_path / "pretrained")
    folder = fit("vit", run, data, tmp_path / "runs")  # goes on without it
    evaluate(folder, data)
    predictor = Predictor(folder / "best")
    assert predictor.model.network.config.hidden_size == 24
    assert predictor.probabilities(np.zeros((2, 16, 16), np.uint8)).shape == (2, 8)


def small_vit_options() -> dict[str, object]:
    """Sizes other than those of the pretrained file, which must win."""
    return {"patch_size": 8, "hidden_size": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "dropout": 0.0}
