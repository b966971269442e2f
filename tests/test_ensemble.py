"""An ensemble is the mean of its members: as one network, in files like any other run, with shares fitted on val."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CPU, PEOPLE, doe, make_data, small_run

from fer.data.dataset import open_data
from fer.data.images import sha256
from fer.ensemble import combine, fitted
from fer.errors import UserError
from fer.evaluate import evaluate, read_predictions
from fer.models import packages
from fer.models.cost import cost
from fer.models.ensemble import Ensemble
from fer.predict import Predictor
from fer.run_folder import read_rows, read_summary
from fer.statistics import softened
from fer.train import fit

OTHER: dict[str, Any] = {
    "model": {"name": "small_resnet", "width": 16, "blocks": [1, 1]}, "precision": "bf16",
    "input": {"image_size": 24, "channels": 3, "mean": [0.4], "std": [0.2]},
}  # fmt: skip


def raw(folder: Path) -> Predictor:
    """Without the temperature of the whole."""
    predictor = Predictor(folder)
    predictor.temperature = 1.0
    return predictor


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("bars") / "data", subjects=PEOPLE)


@pytest.fixture(scope="module")
def members(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs of two forms, input sizes, numbers of channels and precisions."""
    runs = tmp_path_factory.mktemp("runs")
    folders = [fit("x", small_run(**keys), CPU, data, runs) for keys in ({}, {"seed": 2}, OTHER)]
    for folder in folders:
        evaluate(folder, data, CPU)
    return folders


def test_it_predicts_the_mean_of_what_its_members_predict(members: list[Path], data: Path) -> None:
    folder = combine(members, data, CPU)
    run, faces = Predictor(folder).run, open_data(data).split("test").pixels(np.arange(40)).numpy()
    assert isinstance(run.model, Ensemble)
    alone = [raw(member).probabilities(faces) for member in members]
    mean = sum(
        share * softened(np.log(one), member.temperature)
        for share, one, member in zip(run.model.weights, alone, run.model.members)
    )
    np.testing.assert_allclose(raw(folder).probabilities(faces), mean, atol=2e-6)
    stored = read_predictions(folder / "predictions_test.csv", open_data(data).classes)
    np.testing.assert_allclose(stored, mean, atol=2e-6)
    summary, row = read_summary(folder), read_rows(folder)[0]
    assert summary is not None
    assert summary["val"]["accuracy"] == row["val_accuracy"]
    parts = [read_summary(member) for member in members]
    assert summary["parameters"] == sum(part["parameters"] for part in parts if part)
    assert summary["train_seconds"] == pytest.approx(sum(part["train_seconds"] for part in parts if part))
    assert cost(run.model, run.input, 8).parameters == summary["parameters"]
    assert packages(run.model) == []


def test_mirrored_faces_count_as_much_as_the_faces(members: list[Path], data: Path) -> None:
    folder = combine(members[:1], data, CPU, mirror=True)
    faces = open_data(data).split("test").pixels(np.arange(40)).numpy()
    one, heat = raw(members[0]), Predictor(folder).run.model.members[0].temperature
    views = [one.probabilities(view) for view in (faces, np.ascontiguousarray(faces[:, :, ::-1]))]
    mean = sum(softened(np.log(view), heat) for view in views) / 2
    np.testing.assert_allclose(raw(folder).probabilities(faces), mean, atol=2e-6)


def test_made_again_it_is_the_same_run_and_others_are_other_runs(members: list[Path], data: Path) -> None:
    first = combine(members[:2], data, CPU)
    before = (first / "summary.json").read_bytes()
    assert combine(members[:2], data, CPU) == first
    assert (first / "summary.json").read_bytes() == before
    assert len({first, combine(members[::2], data, CPU), combine(members[:2], data, CPU, mirror=True)}) == 3


def test_shares_minimise_the_cross_entropy_of_val() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 400)
    good, noise = np.eye(3)[labels] * 0.6 + 0.4 / 3, rng.dirichlet([1, 1, 1], 400)
    shares = fitted(np.stack([good, noise, good]), labels)
    assert sum(shares) == pytest.approx(1)
    assert shares[1] < 0.02  # noise only takes away

    def loss(share: float) -> float:
        mean = share * noise + (1 - share) * rng_free
        return float(-np.log(mean[np.arange(400), labels]).mean())

    rng_free = np.where(rng.random((400, 1)) < 0.7, good, noise[::-1])
    by_grid = min(np.linspace(0, 1, 1001), key=loss)
    assert fitted(np.stack([noise, rng_free]), labels)[0] == pytest.approx(by_grid, abs=0.002)
    assert fitted(np.stack([good]), labels) == [1.0]


def test_what_cannot_be_a_member(members: list[Path], data: Path, tmp_path: Path) -> None:
    whole = combine(members[:2], data, CPU)
    with pytest.raises(UserError, match="is an ensemble itself; name its members"):
        combine([members[0], whole], data, CPU)
    unfinished = fit("x", small_run(seed=3), CPU, data, tmp_path)
    with pytest.raises(UserError, match="the run is not finished; finish it with `fer train`"):
        combine([unfinished], data, CPU)
    other = make_data(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="was trained on other data than"):
        combine(members, other, CPU)
    compares = fit("x", small_run(**doe(epochs=1)), CPU, data, tmp_path)
    evaluate(compares, data, CPU)
    with pytest.raises(UserError, match="compare a face with others cannot be members"):
        combine([compares], data, CPU)


def test_it_is_not_trained(members: list[Path], data: Path, tmp_path: Path) -> None:
    run = Predictor(combine(members[:2], data, CPU)).run
    with pytest.raises(UserError, match="an ensemble is not trained; make one of finished runs with `fer ensemble`"):
        fit("x", run, CPU, data, tmp_path)


@pytest.mark.parametrize("weights", [[0.5, 0.4], [1.0], [0.5, 0.5, 0.0]])
def test_shares_that_are_none(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="should be 2 shares that sum to 1"):
        Ensemble(members=[{"model": {"name": "vgg13"}}] * 2, weights=weights)


def test_colour_images_stay_colour(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    images = np.load(data / "upscaled" / "images.npy")
    np.save(data / "upscaled" / "images.npy", np.stack([images, images // 2, 255 - images], -1))
    _rehash(data)
    keys = {**OTHER, "epochs": 1, "input": {"image_size": 16, "channels": 3}}
    folder = fit("x", small_run(**keys), CPU, data, tmp_path / "runs")
    evaluate(folder, data, CPU)
    made, faces = combine([folder], data, CPU), open_data(data).split("test").pixels(np.arange(8)).numpy()
    predictor = raw(made)
    alone = softened(np.log(raw(folder).probabilities(faces)), predictor.run.model.members[0].temperature)
    np.testing.assert_allclose(predictor.probabilities(faces), alone, atol=2e-6)


def _rehash(data: Path) -> None:
    path = data / "splits" / "summary.json"
    made = json.loads(path.read_text()) | {"images_sha256": sha256(data / "upscaled" / "images.npy")}
    path.write_text(json.dumps(made | {"image_shape": [16, 16, 3]}))
