"""Heat maps of networks whose answer is known to rest on one part, and what checks them; the command `fer explain`."""

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, CPU, DATA, doe, experiment, make_data, refusal, small_run
from PIL import Image
from torch import Tensor

from fer.ensemble import combine
from fer.evaluate import evaluate
from fer.explain import (
    CELLS,
    STEPS,
    Explained,
    Map,
    deletion,
    explain,
    grad_cam,
    highest_first,
    no_grad_cam,
    occlusion,
    verdicts,
    with_random_weights,
)  # fmt: skip
from fer.models.network import Network
from fer.models.stn import SpatialTransformer
from fer.predict import Predictor
from fer.train import fit

SIDE = 24  # two pixels a cell


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("large") / "data", side=SIDE)


@pytest.fixture(scope="module")
def run(large: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Predicts the height of a bright bar, nearly always right."""
    keys: dict[str, Any] = {"model": {"name": "small_resnet", "width": 16, "blocks": [1, 1]}, "epochs": 6}
    return fit("x", small_run(**keys, input={"image_size": SIDE}), CPU, large, tmp_path_factory.mktemp("runs"))


class Looks(Network):
    """Class 1, as sure as pixels brighter than half are in view; `stn` may turn the image first."""

    def __init__(self, stn: SpatialTransformer | None = None):
        super().__init__()
        self.stn, self.features = stn, torch.nn.ReLU()

    def forward(self, pixel_values: Tensor) -> Tensor:
        images = pixel_values if self.stn is None else self.stn(pixel_values)
        bright = self.features(images)  # they are normalised: half is 0
        return F.pad(300 * bright.mean((1, 2, 3))[:, None] - 2, (1, len(CLASSES) - 2))


@pytest.fixture
def looking(run: Path) -> Predictor:
    predictor = Predictor(run, "cpu")
    predictor.model = Looks().eval()
    return predictor


def with_a_patch(row: int, column: int) -> np.ndarray:
    """Noise below half, and a bright cell."""
    face = np.random.default_rng(0).integers(0, 120, (SIDE, SIDE), np.uint8)
    face[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = 255
    return face


@pytest.mark.parametrize("place", [(3, 8), (11, 0)])
def test_the_part_that_decides_is_found_and_its_loss_decides(place: tuple[int, int], looking: Predictor) -> None:
    face = with_a_patch(*place)
    for method in (occlusion, grad_cam):
        found = method(looking, face, 1)
        assert np.unravel_index(found.argmax(), found.shape) == place
    (one,) = explain(looking, face[None])
    assert (one.label, list(one.maps)) == (1, ["occlusion", "Grad-CAM"])
    for seen in one.maps.values():
        assert seen.curve[0] == pytest.approx(one.probability) == pytest.approx(seen.chance[0])
        assert seen.curve[1] == pytest.approx(seen.curve[-1])  # falls at once, and no further
        assert seen.curve[0] - seen.curve[1] > 0.2
        assert (seen.area > 0.05, seen.area > seen.control_area) == (True, True)
        assert abs(seen.similarity) < 0.5


def test_occlusion_is_the_mean_loss_of_the_windows_over_a_cell(looking: Predictor) -> None:
    face = with_a_patch(0, 5)
    values = occlusion(looking, face, 1)
    without = face.copy()
    without[0:2, 10:12] = round(face.mean())
    before, after = looking.probabilities(np.stack([face, without]))[:, 1]
    assert values[0, 5] == pytest.approx(before - after, abs=1e-6)  # each of its 3 windows takes the whole patch
    assert values[1, 5] == pytest.approx((before - after) / 2, abs=1e-6)  # 3 of 6 do
    assert values[0, 4] == pytest.approx((before - after) * 2 / 3, abs=1e-6)
    assert abs(values[3:]).max() < 1e-6


def test_grad_cam_of_a_mean_pooled_network_is_its_class_activation_map(run: Path, large: Path) -> None:
    """Zhou et al. 2016 (arXiv 1512.04150): with pooling by the mean, the weights are those of the last layer."""
    predictor, face = Predictor(run, "cpu"), np.load(large / "upscaled" / "images.npy")[3]
    with torch.no_grad():
        pixels = torch.from_numpy(face)[None, None] / 255
        features = predictor.model.features((pixels - 0.5) / 0.25)[0]  # [C, h, w]
    weights = predictor.model.classifier.weight[5] / features[0].numel()
    wanted = torch.einsum("c,chw->hw", weights, features)[None, None].detach()
    wanted = F.adaptive_avg_pool2d(F.interpolate(wanted, size=(SIDE, SIDE), mode="bilinear"), CELLS)[0, 0]
    np.testing.assert_allclose(grad_cam(predictor, face, 5), wanted, atol=1e-5)


def test_behind_a_spatial_transformer_the_map_lies_over_the_face_as_it_came(looking: Predictor) -> None:
    stn = SpatialTransformer(SIDE, 1)
    torch.nn.init.zeros_(stn.fc_loc[-1].weight)
    with torch.no_grad():
        stn.fc_loc[-1].bias.copy_(torch.tensor([0.8, 0, 0.2, 0, 0.8, -0.2]))  # a part of the upper right
    looking.model = Looks(stn).eval()
    found = grad_cam(looking, with_a_patch(3, 8), 1)
    assert np.unravel_index(found.argmax(), found.shape) == (3, 8)


def test_cells_go_in_the_order_that_is_given(looking: Predictor) -> None:
    face, order = with_a_patch(3, 8), np.arange(CELLS**2)
    gone = 3 * CELLS + 8  # the patch is the 45th of 144
    curve = deletion(looking, face, 1, order)
    step = gone * STEPS // CELLS**2 + 1
    assert curve[step - 1] - curve[step] > 0.2
    assert np.ptp(np.delete(curve, step)[:step]) < 1e-6
    values = np.zeros((CELLS, CELLS))
    values[3, 8] = 1
    first, second = (highest_first(values, np.random.default_rng(seed)) for seed in (0, 1))
    assert (first[0], second[0]) == (gone, gone)
    assert (first[1:] != second[1:]).any()
    assert sorted(first) == list(order)


def test_random_weights_are_as_before_training_and_the_same_for_a_seed(run: Path, large: Path) -> None:
    predictor, faces = Predictor(run, "cpu"), np.load(large / "upscaled" / "images.npy")[-3:]
    before = torch.get_rng_state()
    found = [with_random_weights(predictor, seed).probabilities(faces) for seed in (0, 0, 1)]
    torch.testing.assert_close(torch.get_rng_state(), before)
    np.testing.assert_array_equal(found[0], found[1])
    assert abs(found[0] - found[2]).max() > 1e-4
    once, again = ([(one.label, *one.maps.values()) for one in explain(predictor, faces, 7)] for _ in range(2))
    for (label, *maps), (other, *others) in zip(once, again):
        assert label == other
        for seen, same in zip(maps, others, strict=True):
            np.testing.assert_array_equal(seen.control_curve, same.control_curve)
            assert (seen.area, seen.similarity) == (same.area, same.similarity)


def test_models_without_a_map_of_their_own(run: Path, large: Path, bars: Path, tmp_path: Path) -> None:
    """They have occlusion, unless another face has to come with each."""
    vit = {"name": "vit_tiny_patch16_224", "weights": None, "patch_size": 8, "hidden_size": 24, "depth": 1}
    models: dict[str, dict[str, Any]] = {
        "its backbone is no": {"model": {"name": "classifier", "backbone": {**vit, "num_heads": 2, "mlp_ratio": 1}}},
        "its head sees frozen embeddings": doe(),
        "its head sees": doe("none"),
    }
    for why, keys in models.items():
        predictor = Predictor(fit("y", small_run(**keys, epochs=1), CPU, bars, tmp_path), "cpu")
        assert no_grad_cam(predictor).startswith(why)
        assert list(next(explain(predictor, np.load(bars / "upscaled" / "images.npy")[:1])).maps) == ["occlusion"]
    evaluate(run, large, CPU)
    assert no_grad_cam(Predictor(combine([run, run], large, CPU), "cpu")).startswith("an ensemble has no map")
    needs = Predictor(fit("z", small_run(**doe("same_subject"), epochs=1), CPU, bars, tmp_path), "cpu")
    assert refusal(next, explain(needs, np.zeros((1, 16, 16), np.uint8))).startswith("explain: this model needs")


# In words


def made(area: float, control_area: float, similar: bool = False) -> Explained:
    """A face whose map has these areas."""
    values, chance = np.arange(CELLS**2, dtype=float).reshape(CELLS, CELLS), np.full(STEPS + 1, 0.5)
    other = values if similar else values.T
    seen = Map(values, other, chance - area, chance - control_area, chance)
    return Explained(0, 0.9, {"occlusion": seen})


@pytest.mark.parametrize(
    ("areas", "control_areas", "words"),
    [
        ((0.2,), (0.0,), "one face says nothing"),
        ((0.2, -0.1, 0.05), (0.0, 0.0, 0.0), "no better than chance"),
        ((0.2, 0.22, 0.21), (0.2, 0.25, 0.18), "better than chance, but no better than with random"),
        ((0.2, 0.22, 0.21), (0.01, 0.03, 0.0), "better than chance and than with random weights"),
    ],
)
def test_the_checks_in_words(areas: tuple[float, ...], control_areas: tuple[float, ...], words: str) -> None:
    (found,) = verdicts([made(*pair) for pair in zip(areas, control_areas)])
    assert found.words.startswith(words)
    assert (found.area.value, found.faces) == (pytest.approx(np.mean(areas)), len(areas))
    assert found.gain.value == pytest.approx(np.mean(areas) - np.mean(control_areas))
    assert verdicts([made(0.1, 0.1, similar=True)])[0].similarity.value == pytest.approx(1)


# The command


Here = Callable[..., CompletedProcess]


def test_the_command_writes_maps_tables_and_what_they_mean(project: Path, here: Here, bars: Path) -> None:
    folder = fit("one", experiment(project, "one", epochs=1), CPU, DATA, "data/runs")
    done = here("explain", "one", "--out", "maps", "--faces", "3")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "random weights" in done.stdout
    rows = pd.read_csv("maps/faces.csv").to_dict("records")
    written = sorted(path.name for path in Path("maps").iterdir())
    assert written == [*(row["picture"] for row in rows), "faces.csv", "methods.csv"]
    with Image.open(Path("maps") / rows[0]["picture"]) as image:
        assert min(image.size) > 300
    assert pd.read_csv("maps/methods.csv")["method"].tolist() == ["occlusion", "Grad-CAM"]
    names = [row["name"] for row in rows[:2]]
    Image.fromarray(np.zeros((20, 90), np.uint8)).save("wide.png")
    Image.fromarray(np.full((32, 32), 99, np.uint8)).save("own.png")
    assert here("explain", "one", "own.png", "--out", "own").returncode == 0
    assert here("explain", "one", "--names", ",".join(names), "--out", "named").returncode == 0
    assert pd.read_csv("named/faces.csv")["name"].tolist() == names
    for words, told in (
        (["one", "--out", "maps"], "--out maps: exists already"),
        (["one", "--out", "x", "--names", "0.png"], "--names 0.png: not a test image of data/sets/sample"),
        (["one", "own.png", "--out", "x", "--names", "0.png"], "--names: is for test images"),
        (["one", "own.png", "--out", "x", "--faces", "3"], "--faces: draws test images; leave it out, or name none"),
        (["one", "wide.png", "--out", "x"], "wide.png: 90x20 pixels, but the model was trained on faces of"),
        (["one", "none.png", "--out", "x"], "none.png: not a file"),
        ([str(folder / "best"), "--out", "x"], f"{folder / 'best'}: is no run's folder"),
        (["two", "--out", "x"], "two: no such run in data/runs"),
    ):
        done = here("explain", *words)
        assert (done.returncode, done.stderr.count("\n"), done.stderr.startswith(f"error: {told}")) == (2, 1, True), (
            done.stderr
        )
        assert not Path("x").exists()
