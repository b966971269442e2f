"""An ensemble is the mean of its members: as one network, in files like any other run, with shares fitted on val."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CPU, change, doe, lines, make_data, refusal, small_run
from scipy.special import softmax

from fer.card import card
from fer.checkpoint import load_meta
from fer.data.dataset import open_data
from fer.ensemble import combine, fitted
from fer.evaluate import evaluate, read_predictions
from fer.files import held, sha256
from fer.models import packages
from fer.models.cost import cost
from fer.models.ensemble import Ensemble
from fer.predict import Predictor
from fer.run_folder import read_rows, read_summary
from fer.train import fit
from pipelines.report import note

OTHER: dict[str, Any] = {
    "model": {"name": "small_resnet", "width": 16, "blocks": [1, 1]}, "precision": "bf16", "epochs": 1,
    "input": {"image_size": 24, "channels": 3, "mean": [0.4], "std": [0.2]},
}  # fmt: skip


def finished(data: Path, runs: Path, **keys: Any) -> Path:
    folder = fit("x", small_run(**keys), CPU, data, runs)
    evaluate(folder, data, CPU)
    return folder


def raw(folder: Path, faces: np.ndarray, heat: float = 1.0) -> np.ndarray:
    """Its probabilities without its own temperature, with another one."""
    predictor = Predictor(folder)
    predictor.temperature = 1.0
    return softmax(np.log(predictor.probabilities(faces)) / heat, 1)


def summary_of(folder: Path) -> dict[str, Any]:
    found = read_summary(folder)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def faces(bars: Path) -> np.ndarray:
    return open_data(bars).split("test").pixels(np.arange(40)).numpy()


@pytest.fixture(scope="module")
def members(bars: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs of two forms, input sizes, numbers of channels and precisions."""
    runs = tmp_path_factory.mktemp("runs")
    return [finished(bars, runs, **keys) for keys in ({"epochs": 2}, {"seed": 2, "epochs": 1}, OTHER)]


def test_it_predicts_the_mean_of_what_its_members_predict(members: list[Path], bars: Path, faces: np.ndarray) -> None:
    folder = combine(members, bars, CPU)
    run, test, summary = Predictor(folder).run, open_data(bars).split("test"), summary_of(folder)
    own = zip(run.model.weights, members, run.model.members)
    mean = sum(share * raw(path, faces, member.temperature) for share, path, member in own)
    np.testing.assert_allclose(raw(folder, faces), mean, atol=2e-6)
    stored = read_predictions(folder / "predictions_test.csv", test, open_data(bars).classes)
    np.testing.assert_allclose(stored, mean, atol=2e-6)
    assert summary["val"]["accuracy"] == read_rows(folder)[0]["val_accuracy"]
    for key in ("parameters", "train_seconds"):
        assert summary[key] == pytest.approx(sum(summary_of(member)[key] for member in members))
    assert (cost(run.model, run.input, 8).parameters, packages(run.model)) == (summary["parameters"], [])


def test_its_card_and_its_note_say_what_it_is_made_of_and_what_val_was_for(members: list[Path], bars: Path) -> None:
    folder = combine(members[:2], bars, CPU)
    text = " ".join(card(summary_of(folder), load_meta(folder / "best")).split())
    assert f"The weighted mean of 2 networks: {members[0].name}, {members[1].name}." in text
    assert "Val chose the epoch of each network, and their temperatures and shares were fitted to it; test" in text
    assert "val images, to which temperatures and shares of the 2 networks were fitted." in note(summary_of(folder))
    meta = load_meta(members[0] / "best")
    text = " ".join(card(summary_of(members[0]), meta).split())
    assert f", {meta['data']['totals']['train']} images. Initial weights: random weights." in text
    meta["data"] |= {"train_share": 0.25, "wrong_labels": 3}
    assert " images (0.25 of each class; 3 of them with a wrong label, on purpose). " in card(summary_of(folder), meta)
    assert "## Results Val chose the epoch; test was read once. |" in text
    assert "val images, which chose epoch" in note(summary_of(members[0]))


def test_mirrored_faces_count_as_much_as_the_faces(members: list[Path], bars: Path, faces: np.ndarray) -> None:
    folder = combine(members[:1], bars, CPU, mirror=True)
    heat = Predictor(folder).run.model.members[0].temperature
    views = [raw(members[0], view, heat) for view in (faces, np.ascontiguousarray(faces[:, :, ::-1]))]
    np.testing.assert_allclose(raw(folder, faces), sum(views) / 2, atol=2e-6)


def test_made_again_it_is_the_same_run_and_others_are_other_runs(members: list[Path], bars: Path) -> None:
    first = combine(members[:2], bars, CPU)
    before = (first / "summary.json").read_bytes()
    assert combine(members[:2], bars, CPU) == first
    assert (first / "summary.json").read_bytes() == before
    with held(first):
        assert f"another process ({os.getpid()} on" in refusal(combine, members[:2], bars, CPU)
    assert len({first, combine(members[::2], bars, CPU), combine(members[:2], bars, CPU, mirror=True)}) == 3


def test_shares_minimise_the_cross_entropy_of_val() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 400)
    good, noise = np.eye(3)[labels] * 0.6 + 0.4 / 3, rng.dirichlet([1, 1, 1], 400)
    shares = fitted(np.stack([good, noise, good]), labels)
    assert (sum(shares), shares[1] < 0.02) == (pytest.approx(1), True)  # noise only takes away
    mixed = np.where(rng.random((400, 1)) < 0.7, good, noise[::-1])

    def loss(share: float) -> float:
        mean = share * noise + (1 - share) * mixed
        return float(-np.log(mean[np.arange(400), labels]).mean())

    by_grid = min(np.linspace(0, 1, 1001), key=loss)
    assert fitted(np.stack([noise, mixed]), labels)[0] == pytest.approx(by_grid, abs=0.002)
    many = np.stack([np.where(rng.random((400, 1)) < share, good, noise) for share in np.linspace(0.1, 0.9, 9)])
    shares = fitted(many, labels)  # whatever their order
    assert fitted(many[::-1], labels)[::-1] == pytest.approx(shares, abs=2e-4)


def test_what_cannot_be_a_member_or_be_trained(members: list[Path], bars: Path, tmp_path: Path) -> None:
    whole = combine(members[:2], bars, CPU)
    unfinished = fit("x", small_run(seed=3, epochs=1), CPU, bars, tmp_path)
    compares = finished(bars, tmp_path, **doe(epochs=1))
    other = make_data(tmp_path / "other", seed=1)
    for folders, data, told in (
        ([members[0], whole], bars, "is an ensemble itself; name its members"),
        ([unfinished], bars, "the run is not finished; finish it with `fer train`"),
        (members, other, "was trained on other data than"),
        (
            [compares],
            bars,
            "networks with a frozen encoder, which take embeddings, cannot be averaged or teach",
        ),
    ):
        before = set(folders[0].parent.iterdir())
        assert told in refusal(combine, folders, data, CPU)
        assert set(folders[0].parent.iterdir()) == before  # no folder of a run that will never be
    told = "an ensemble is not trained; make one of finished runs with `fer ensemble`"
    assert told in refusal(fit, "x", Predictor(whole).run, CPU, bars, tmp_path)
    for weights in ([0.5, 0.4], [1.0]):
        with pytest.raises(ValueError, match="should be 2 shares that sum to 1"):
            Ensemble(members=[{"model": {"name": "vgg13"}}] * 2, weights=weights)


def test_predictions_of_other_images_than_val_are_refused(members: list[Path], bars: Path, tmp_path: Path) -> None:
    member = shutil.copytree(members[0], tmp_path / "x-s1-00000000")
    for edit, reason in (
        (lines(0, -1), "39 of 40 images"),
        (lambda text: "\n".join([*text.splitlines()[:1], *text.splitlines()[:0:-1]]), "of other images than val holds"),
    ):
        shutil.copy(members[0] / "predictions_val.csv", member)
        change(member, "predictions_val.csv", edit)
        again = f"delete {member}/summary.json and run `fer evaluate {member.name}`"
        told = f"{member}/predictions_val.csv: no predictions there ({reason}); {again}"
        assert refusal(combine, [member, members[1]], bars, CPU) == told


def test_oblong_images_are_resized_once_as_for_a_member_alone(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    images = np.load(path := data / "upscaled" / "images.npy")
    np.save(path, np.concatenate([images, 255 - images, images[:, :, :8]], 2))  # 16x40
    made = {"images_sha256": sha256(path), "image_shape": [16, 40]}
    change(data, "splits/summary.json", lambda text: json.dumps({**json.loads(text), **made}))
    folder = finished(data, tmp_path / "runs", input={"image_size": 24}, seed=2)
    whole, faces = combine([folder], data, CPU), open_data(data).split("test").pixels(np.arange(8)).numpy()
    alone = raw(folder, faces, Predictor(whole).run.model.members[0].temperature)
    np.testing.assert_allclose(raw(whole, faces), alone, atol=2e-6)
    other = finished(data, tmp_path / "runs", input={"image_size": 16}, seed=2)
    told = "ensemble: images of 40x16 pixels need runs of one input.image_size, not 16 and 24; set data.size, which"
    assert refusal(combine, [folder, other], data, CPU).startswith(told)


def test_colour_images_stay_colour(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    images = np.load(path := data / "upscaled" / "images.npy")
    np.save(path, np.stack([images, images // 2, 255 - images], -1))
    made = {"images_sha256": sha256(path), "image_shape": [16, 16, 3]}
    change(data, "splits/summary.json", lambda text: json.dumps({**json.loads(text), **made}))
    keys = {**OTHER, "input": {"image_size": 16, "channels": 3}, "precision": "fp32"}
    folder = finished(data, tmp_path / "runs", **keys)
    whole, faces = combine([folder], data, CPU), open_data(data).split("test").pixels(np.arange(8)).numpy()
    alone = raw(folder, faces, Predictor(whole).run.model.members[0].temperature)
    np.testing.assert_allclose(raw(whole, faces), alone, atol=2e-6)
