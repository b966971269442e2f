"""An ensemble is the mean of its members: as one network, in files like any other run, with shares fitted on val."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CPU, doe, make_data, refusal, small_run

from fer.data.dataset import open_data
from fer.ensemble import combine, fitted
from fer.evaluate import evaluate, read_predictions
from fer.files import sha256
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
def members(bars: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs of two forms, input sizes, numbers of channels and precisions."""
    runs = tmp_path_factory.mktemp("runs")
    folders = [fit("x", small_run(**keys), CPU, bars, runs) for keys in ({}, {"seed": 2, "epochs": 2}, OTHER)]
    for folder in folders:
        evaluate(folder, bars, CPU)
    return folders


def test_it_predicts_the_mean_of_what_its_members_predict(members: list[Path], bars: Path) -> None:
    folder = combine(members, bars, CPU)
    run, faces = Predictor(folder).run, open_data(bars).split("test").pixels(np.arange(40)).numpy()
    assert isinstance(run.model, Ensemble)
    alone = [raw(member).probabilities(faces) for member in members]
    mean = sum(
        share * softened(np.log(one), member.temperature)
        for share, one, member in zip(run.model.weights, alone, run.model.members)
    )
    np.testing.assert_allclose(raw(folder).probabilities(faces), mean, atol=2e-6)
    stored = read_predictions(folder / "predictions_test.csv", open_data(bars).split("test"), open_data(bars).classes)
    np.testing.assert_allclose(stored, mean, atol=2e-6)
    summary = read_summary(folder)
    assert summary is not None
    assert summary["val"]["accuracy"] == read_rows(folder)[0]["val_accuracy"]
    parts = [read_summary(member) for member in members]
    for key in ("parameters", "train_seconds"):
        assert summary[key] == pytest.approx(sum(part[key] for part in parts if part))
    assert cost(run.model, run.input, 8).parameters == summary["parameters"]
    assert packages(run.model) == []


def test_mirrored_faces_count_as_much_as_the_faces(members: list[Path], bars: Path) -> None:
    folder = combine(members[:1], bars, CPU, mirror=True)
    faces = open_data(bars).split("test").pixels(np.arange(40)).numpy()
    one, heat = raw(members[0]), Predictor(folder).run.model.members[0].temperature
    views = [one.probabilities(view) for view in (faces, np.ascontiguousarray(faces[:, :, ::-1]))]
    mean = sum(softened(np.log(view), heat) for view in views) / 2
    np.testing.assert_allclose(raw(folder).probabilities(faces), mean, atol=2e-6)


def test_made_again_it_is_the_same_run_and_others_are_other_runs(members: list[Path], bars: Path) -> None:
    first = combine(members[:2], bars, CPU)
    before = (first / "summary.json").read_bytes()
    assert combine(members[:2], bars, CPU) == first
    assert (first / "summary.json").read_bytes() == before
    assert len({first, combine(members[::2], bars, CPU), combine(members[:2], bars, CPU, mirror=True)}) == 3


def test_shares_minimise_the_cross_entropy_of_val() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 400)
    good, noise = np.eye(3)[labels] * 0.6 + 0.4 / 3, rng.dirichlet([1, 1, 1], 400)
    shares = fitted(np.stack([good, noise, good]), labels)
    assert sum(shares) == pytest.approx(1)
    assert shares[1] < 0.02  # noise only takes away

    mixed = np.where(rng.random((400, 1)) < 0.7, good, noise[::-1])

    def loss(share: float) -> float:
        mean = share * noise + (1 - share) * mixed
        return float(-np.log(mean[np.arange(400), labels]).mean())

    by_grid = min(np.linspace(0, 1, 1001), key=loss)
    assert fitted(np.stack([noise, mixed]), labels)[0] == pytest.approx(by_grid, abs=0.002)
    assert fitted(np.stack([good]), labels) == [1.0]


def test_what_cannot_be_a_member_or_be_trained(members: list[Path], bars: Path, tmp_path: Path) -> None:
    whole = combine(members[:2], bars, CPU)
    assert "is an ensemble itself; name its members" in refusal(combine, [members[0], whole], bars, CPU)
    message = refusal(fit, "x", Predictor(whole).run, CPU, bars, tmp_path)
    assert "an ensemble is not trained; make one of finished runs with `fer ensemble`" in message
    unfinished = fit("x", small_run(seed=3, epochs=1), CPU, bars, tmp_path)
    assert "the run is not finished; finish it with `fer train`" in refusal(combine, [unfinished], bars, CPU)
    other = make_data(tmp_path / "other", seed=1)
    assert "was trained on other data than" in refusal(combine, members, other, CPU)
    compares = fit("x", small_run(**doe(epochs=1)), CPU, bars, tmp_path)
    evaluate(compares, bars, CPU)
    assert "compare a face with others cannot be members" in refusal(combine, [compares], bars, CPU)
    for weights in ([0.5, 0.4], [1.0]):
        with pytest.raises(ValueError, match="should be 2 shares that sum to 1"):
            Ensemble(members=[{"model": {"name": "vgg13"}}] * 2, weights=weights)


def test_predictions_of_other_images_than_val_are_refused(members: list[Path], bars: Path, tmp_path: Path) -> None:
    member = shutil.copytree(members[0], tmp_path / "x-s1-00000000")
    path = member / "predictions_val.csv"
    head, *lines = path.read_text().splitlines()
    for kept, reason in ((lines[:-1], "39 of 40 images"), (lines[::-1], "of other images than val holds")):
        path.write_text("\n".join([head, *kept]))
        again = f"delete {member}/summary.json and run `fer evaluate {member.name}`"
        message = refusal(combine, [member, members[1]], bars, CPU)
        assert message == f"{path}: no predictions there ({reason}); {again}"


def test_colour_images_stay_colour(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    path, described = data / "upscaled" / "images.npy", data / "splits" / "summary.json"
    images = np.load(path)
    np.save(path, np.stack([images, images // 2, 255 - images], -1))
    made = json.loads(described.read_text()) | {"images_sha256": sha256(path), "image_shape": [16, 16, 3]}
    described.write_text(json.dumps(made))
    keys = {**OTHER, "epochs": 1, "input": {"image_size": 16, "channels": 3}}
    folder = fit("x", small_run(**keys), CPU, data, tmp_path / "runs")
    evaluate(folder, data, CPU)
    whole, faces = combine([folder], data, CPU), open_data(data).split("test").pixels(np.arange(8)).numpy()
    predictor = Predictor(whole)
    alone = softened(np.log(raw(folder).probabilities(faces)), predictor.run.model.members[0].temperature)
    np.testing.assert_allclose(predictor.probabilities(faces), alone, atol=2e-6)
