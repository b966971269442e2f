"""A run on the test split of another data set: by hand, on classes with other names, recorded once."""

import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CLASSES, CPU, DATA, PEOPLE, change, doe, experiment, make_data, refusal, small_run, swap

from fer.across import evaluate_across, scores
from fer.data.aliases import match
from fer.data.dataset import open_data
from fer.evaluate import evaluate
from fer.export import write_folder
from fer.files import sha256
from fer.predict import Predictor
from fer.train import fit
from pipelines.experiments import Job
from pipelines.tracking import Tracker, described

THEIRS = ["0_Neutral", "1_happy", "surprised", "Sad", "angry", "bored", "6", "7"]  # their names of CLASSES


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight epochs on the bars, evaluated."""
    data = make_data(tmp_path_factory.mktemp("bars") / "data")
    folder = fit("x", small_run(epochs=8), CPU, data, data / "runs")
    evaluate(folder, data, CPU)
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "runs" / trained.name)


def made(folder: Path, images: Callable[[np.ndarray], np.ndarray] = np.copy, **changes: Any) -> Path:
    """Bars with other images, and other keys in splits/summary.json; their classes if it has other ones."""
    data = make_data(folder, {"train": 8, "val": 8, "test": 33}, seed=2)
    changed = images(np.load(path := data / "upscaled/images.npy"))
    np.save(path, changed)
    changes |= {"image_shape": changed.shape[1:], "images_sha256": sha256(path)}
    change(data, "splits/summary.json", lambda text: json.dumps({**json.loads(text), **changes}))
    change(data, "splits/*.csv", swap(",".join(CLASSES), ",".join(changes.get("classes", CLASSES))))
    return data


def test_numbers_by_hand() -> None:
    """Theirs are sad, happy and bored; ours calm, neutral, happiness, sadness, of which the first two count as one."""
    found = match(["calm", "happiness", "natural", "sadness"], ["sad", "happy", "bored"])
    probabilities = torch.tensor(
        [
            [0.3, 0.4, 0.2, 0.1],  # happy: neutral .5, happiness .4, sadness .1
            [0.1, 0.2, 0.1, 0.6],  # sad
            [0.0, 0.7, 0.0, 0.3],  # sad
            [0.4, 0.1, 0.3, 0.2],  # sad: neutral .7, happiness .1, sadness .2
            [1.0, 0.0, 0.0, 0.0],  # happy: no probability is left
        ]
    )
    every, shared, table = scores(probabilities, torch.tensor([1, 0, 0, 0, 1]), found)
    assert every["classes"] == ["calm or natural", "happiness", "sadness"]
    assert every["confusion"] == [[0, 0, 0], [2, 0, 0], [1, 1, 1]]
    assert (every["accuracy"], every["balanced_accuracy"]) == (1 / 5, pytest.approx((0 + 1 / 3) / 2))
    assert (shared["classes"], shared["confusion"]) == (["happiness", "sadness"], [[2, 0], [1, 2]])
    assert (shared["accuracy"], shared["balanced_accuracy"]) == (4 / 5, pytest.approx((1 + 2 / 3) / 2))
    # confidences .8, .75, .7, 2/3 and 0 in bins of 1/15; right: the first, the second, the fourth and the last
    assert shared["ece"] == pytest.approx((0.2 + 0.25 + 0.7 + 1 / 3 + 1) / 5)
    assert table["prediction"].tolist() == ["calm or natural", "sadness", "happiness", *["calm or natural"] * 2]
    assert table["prediction_shared"].tolist() == ["happiness", "sadness", "happiness", "sadness", "happiness"]
    np.testing.assert_allclose(table["calm or natural"], [0.5, 0.2, 0, 0.7, 1])


def test_other_names_size_and_colour(folder: Path, tmp_path: Path) -> None:
    """Train and val are not read; the same command reads its result, whatever becomes of the checkpoint."""

    def twice(images: np.ndarray) -> np.ndarray:
        return images.repeat(2, 1).repeat(2, 2)[..., None].repeat(3, 3)

    moods = made(tmp_path / "moods", twice, classes=THEIRS)
    for name in ("train", "val"):
        (moods / "splits" / f"{name}.csv").write_text("no table")
    found = evaluate_across(folder, moods, "cpu")
    assert (found["dataset"], found["run_id"]) == ("moods", folder.name)
    assert found["matched"] == dict(zip(THEIRS[:5], CLASSES))
    assert (found["left_out"], found["unused"]) == ({"bored": 4, "6": 4, "7": 4}, ["disgust", "fear", "contempt"])
    assert (found["images"], found["test_images"], found["coverage"]) == (21, 33, 21 / 33)
    every, shared = found["all_classes"], found["shared_classes"]
    assert (len(every["classes"]), shared["classes"]) == (8, CLASSES[:5])
    assert [sum(line) for line in shared["confusion"]] == [5, 4, 4, 4, 4]
    path = folder / "on" / f"moods-{found['hash']}.json"
    table = pd.read_csv(path.with_suffix(".csv"))
    assert every["accuracy"] == pytest.approx((table["class"] == table["prediction"]).mean())
    assert shared["accuracy"] == pytest.approx((table["class"] == table["prediction_shared"]).mean())
    assert shared["accuracy"] > 0.3  # it has learned something that holds there
    assert json.loads(path.read_text()) == found
    shutil.rmtree(folder / "best")
    assert evaluate_across(folder, moods, "cpu") == found


def test_images_that_are_as_large_as_enlarged_ones_are_made_like_them(tmp_path: Path) -> None:
    """A run on 8 px enlarged to 16, and other faces of 16 px that nobody enlarged."""
    making = {"method": "bicubic", "scale": 2, "raw_shape": [8, 8]}
    data = made(tmp_path / "data", super_resolution=making)
    folder = fit("x", small_run(epochs=1, batch_size=4), CPU, data, tmp_path / "runs")
    evaluate(folder, data, CPU)
    other = made(tmp_path / "other", super_resolution={"method": "none"})
    found = evaluate_across(folder, other, "cpu")
    predictor, images = Predictor(folder, "cpu"), open_data(other).split("test").pixels(np.arange(33)).numpy()
    predictor.temperature = 1.0
    shown = pd.read_csv(folder / "on" / f"other-{found['hash']}.csv")[CLASSES].to_numpy()
    np.testing.assert_allclose(shown, predictor.probabilities(images, photographed=True), atol=1e-6)
    assert abs(shown - predictor.probabilities(images)).max() > 1e-4


def test_its_own_data_and_equal_labels_of_other_images(folder: Path, trained: Path, tmp_path: Path) -> None:
    found, summary = evaluate_across(folder, trained.parents[1]), json.loads((folder / "summary.json").read_text())
    for part, key in itertools.product(("all_classes", "shared_classes"), ("confusion", "accuracy", "recall")):
        assert found[part][key] == summary["test"][key]
        assert found[part]["ece"] == pytest.approx(summary["test"]["ece"], rel=1e-6)  # before the temperature
    assert (found["coverage"], found["test_hash"]) == (1, summary["test_hash"])
    other = evaluate_across(folder, make_data(tmp_path / "other", seed=1))
    assert (other["test_hash"] == found["test_hash"], other["hash"] == found["hash"]) == (True, False)


def test_a_checkpoint_alone_answers_as_its_run(folder: Path, tmp_path: Path) -> None:
    moods, exported = made(tmp_path / "moods", classes=THEIRS), tmp_path / "exported"
    write_folder(folder, exported)
    found, own = evaluate_across(exported, moods, "cpu"), evaluate_across(folder, moods, "cpu")
    assert {**found, "finished": 0} == {**own, "finished": 0}
    assert (exported / "on" / f"moods-{found['hash']}.csv").exists()


def damaged(folder: Path, to: Path) -> Path:
    evaluate_across(folder, made(to))
    change(folder, "on/*.json", lambda text: "{}")
    return to


def unfinished(folder: Path, to: Path) -> Path:
    (folder / "summary.json").unlink()
    return made(to)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda _, to: made(to, super_resolution={"method": "lanczos", "scale": 2}),
         "DATA: its images were upscaled by lanczos x2 to 16x16 pixels, those of the run otherwise: make them again"),
        (lambda _, to: made(to, classes=list("12345678")),
         "DATA: holds no test image of a class of the run: classes 1, 2, 3, 4, 5, 6, 7, 8; of the run: neutral,"),
        (lambda _, to: made(to, lambda images: images[:, :, :7]),
         "DATA: images: 7x16 pixels, but the model was trained on faces of 16x16 pixels: crop them to that shape"),
        (unfinished, "RUN: is not finished; run `fer evaluate x-"),
        (damaged, "RUN/on/other-HASH.json: run_id: missing; delete it and run the command again"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_leaves_nothing(spoil: Callable, message: str, folder: Path, tmp_path: Path) -> None:
    data = spoil(folder, tmp_path / "other")
    before = sorted(folder.rglob("*"))
    shown = refusal(evaluate_across, folder, data).replace(str(data), "DATA").replace(str(folder), "RUN")
    assert re.sub("-[0-9a-f]{16}", "-HASH", shown).startswith(message)
    assert sorted(folder.rglob("*")) == before


def test_a_model_that_compares_people_is_refused(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", subjects=PEOPLE)
    folder = fit("x", small_run(**doe("same_subject", epochs=1)), CPU, data, tmp_path)
    evaluate(folder, data, CPU)
    told = f"{folder}: needs a neutral face of the same person beside each face, and {data} has none"
    assert refusal(evaluate_across, folder, data) == told


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_command_prints_a_table_and_records_a_child_once(
    project: Path, empty_store: Path, here: Callable[..., subprocess.CompletedProcess]
) -> None:
    shutil.copy(empty_store, project / "mlflow.db")
    run = experiment(project, "one", {"device": "cpu"}, epochs=1)
    folder, other = fit("one", run, CPU, DATA, "data/runs"), str(made(project / "other"))
    evaluate(folder, DATA, CPU)
    done = here("evaluate", "one", "--on", other)
    told = "MLflow's experiment 'fer' does not have this run, so its result is not recorded: run `fer train one`, then"
    assert (done.returncode, done.stderr) == (2, f"error: {folder.name}: {told} this command again\n")
    tracker, data = Tracker(f"sqlite:///{project}/mlflow.db", "fer"), open_data(DATA)
    with tracker.record(Job("one", run, CPU, DATA, folder), described(data)):
        pass
    path = next((folder / "on").glob("other-*.json"))
    result = json.loads(path.read_text())
    parent = tracker.client.search_runs([tracker.experiment])[0].info.run_id
    left = {"fer.run_id": f"{folder.name}/on/{path.stem}"}  # by a command that was killed
    tracker.client.create_run(tracker.experiment, tags=left)
    for _ in range(2):
        done = here("evaluate", "one", "--on", other)
        assert (done.returncode, done.stderr) == (0, "")
    shown = [re.split(r"\s{2,}", line.strip()) for line in done.stdout.splitlines()]
    assert ["accuracy", "33", *[f"{100 * result['all_classes']['accuracy']:.2f}"] * 2] in shown
    assert ["recall neutral", "neutral", "5", *[f"{100 * result['all_classes']['recall'][0]:.2f}"] * 2] in shown
    assert "33 of 33 test images of other (100.00 %) are of a class that the run knows." in done.stdout
    (child,) = tracker.client.search_runs([tracker.experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert (child.info.status, child.data.tags["fer.on"]) == ("FINISHED", "other")
    assert child.data.metrics["on/accuracy"] == result["all_classes"]["accuracy"]
    assert child.data.metrics["on_shared/recall_fear"] == result["shared_classes"]["recall"][6]
    assert [each.dataset.digest for each in child.inputs.dataset_inputs] == [f"{result['hash']}-test"]
    files = {file.path for file in tracker.client.list_artifacts(child.info.run_id)}
    assert files == {path.name, path.with_suffix(".csv").name}
    assert mlflow.artifacts.load_dict(f"{child.info.artifact_uri}/{path.name}") == result
    assert tracker.recorded(folder)
    (project / "sample").mkdir()  # beside the data set of that name, which is meant
    assert here("evaluate", "one", "--on", "sample").returncode == 0
    write_folder(folder, project / "given")
    done = here("evaluate", "given", "--on", other)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Not recorded in MLflow: given is no run of this project" in done.stdout
    assert len(tracker.client.search_runs([tracker.experiment])) == 3
