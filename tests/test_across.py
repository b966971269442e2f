"""A run on the test split of another data set: by hand, on class folders with other names, recorded once."""

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
from conftest import CLASSES, CPU, PEOPLE, ROOT, doe, experiment, make_data, small_run
from PIL import Image

from fer.across import evaluate_across, scores
from fer.data.aliases import match
from fer.data.dataset import open_data
from fer.errors import UserError
from fer.evaluate import evaluate
from fer.files import sha256
from fer.train import fit
from pipelines.experiments import Job
from pipelines.params import load
from pipelines.stages.download import download
from pipelines.stages.split import split
from pipelines.stages.upscale import upscale
from pipelines.tracking import Tracker

NAMES = {"0_Neutral": 0, "1_happy": 1, "surprised": 2, "Sad": 3, "angry": 4, "bored": 5}  # -> whose bar they have


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four epochs on the bars, evaluated."""
    data = make_data(tmp_path_factory.mktemp("bars") / "data")
    folder = fit("x", small_run(epochs=4), CPU, data, data / "runs")
    evaluate(folder, data, CPU)
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "runs" / trained.name)


@pytest.fixture
def moods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another project's data: class folders of bars in colour, of twice the size, made by its stages."""
    root, rng = tmp_path / "moods", np.random.default_rng(1)
    for usage, count in (("train", 4), ("val", 2), ("test", 5)):
        for name, bar in NAMES.items():
            for number in range(count + bar % 2):
                image = rng.integers(0, 120, (16, 16, 1), np.uint8).repeat(3, 2)
                image[2 * bar] = 255
                path = root / "faces" / usage / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.repeat(2, 0).repeat(2, 1)).save(path)
    monkeypatch.chdir(root)
    whole = load(ROOT / "params.yaml")
    data = whole.data.model_copy(update={"dataset": "folders", "path": "faces"})
    for stage in (download, upscale, split):
        stage(whole.model_copy(update={"data": data}))
    return root / "data"


def change(data: Path, to: Path, **changes: Any) -> Path:
    """A copy of `data` with other keys in splits/summary.json."""
    shutil.copytree(data, to)
    path = to / "splits" / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return to


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
    assert every["recall"] == [None, 0, pytest.approx(1 / 3)]
    assert shared["classes"] == ["happiness", "sadness"]
    assert shared["confusion"] == [[2, 0], [1, 2]]
    assert (shared["accuracy"], shared["balanced_accuracy"]) == (4 / 5, pytest.approx((1 + 2 / 3) / 2))
    # confidences .8, .75, .7, 2/3 and 0 in bins of 1/15; right: the first, the second, the fourth and the last
    assert shared["ece"] == pytest.approx((0.2 + 0.25 + 0.7 + 1 / 3 + 1) / 5)
    assert table["prediction"].tolist() == ["calm or natural", "sadness", "happiness", *["calm or natural"] * 2]
    assert table["prediction_shared"].tolist() == ["happiness", "sadness", "happiness", "sadness", "happiness"]
    np.testing.assert_allclose(table["calm or natural"], [0.5, 0.2, 0, 0.7, 1])


def test_class_folders_with_other_names_size_and_colour(folder: Path, moods: Path, tmp_path: Path) -> None:
    """Train and val are not read; the same command reads its result, whatever becomes of the checkpoint."""
    for name in ("train", "val"):
        (moods / "splits" / f"{name}.csv").write_text("no table")
    found = evaluate_across(folder, moods, "cpu")
    assert (found["dataset"], found["run_id"]) == ("folders", folder.name)
    assert found["matched"] == {
        "0_Neutral": "neutral", "1_happy": "happiness", "Sad": "sadness", "angry": "anger", "surprised": "surprise"
    }  # fmt: skip
    assert (found["left_out"], found["unused"]) == ({"bored": 6}, ["disgust", "fear", "contempt"])
    assert (found["images"], found["test_images"], found["coverage"]) == (27, 33, 27 / 33)
    every, shared = found["all_classes"], found["shared_classes"]
    assert (len(every["classes"]), shared["classes"]) == (8, CLASSES[:5])
    assert [sum(line) for line in shared["confusion"]] == [5, 6, 5, 6, 5]
    path = folder / "on" / f"folders-{found['hash']}.json"
    table = pd.read_csv(path.with_suffix(".csv"))
    assert every["accuracy"] == pytest.approx((table["class"] == table["prediction"]).mean())
    assert shared["accuracy"] == pytest.approx((table["class"] == table["prediction_shared"]).mean())
    assert shared["accuracy"] > 0.3  # it has learned something that holds there
    assert json.loads(path.read_text()) == found
    shutil.rmtree(folder / "best")
    assert evaluate_across(folder, moods, "cpu") == found
    assert len(list((folder / "on").iterdir())) == 2


def test_on_its_own_data_the_numbers_are_those_of_the_evaluation(folder: Path, trained: Path) -> None:
    found, summary = evaluate_across(folder, trained.parents[1]), json.loads((folder / "summary.json").read_text())
    for part, key in itertools.product(("all_classes", "shared_classes"), ("confusion", "accuracy", "recall")):
        assert found[part][key] == summary["test"][key]
    assert (found["coverage"], found["test_hash"]) == (1, summary["test_hash"])


def test_equal_labels_of_other_images_are_another_data_set(folder: Path, tmp_path: Path) -> None:
    found = {evaluate_across(folder, make_data(tmp_path / str(seed), seed=seed))["hash"] for seed in (1, 2)}
    assert len(found) == 2
    strange = change(tmp_path / "1", tmp_path / "strange", dataset="../../x")
    evaluate_across(folder, strange)
    assert len(list((folder / "on").glob("______x-*.json"))) == 1


def upscaled(folder: Path, to: Path) -> Path:
    return change(make_data(to / "plain"), to / "data", super_resolution={"method": "lanczos", "scale": 2})


def numbered(folder: Path, to: Path) -> Path:
    data, names = make_data(to / "plain"), list("12345678")
    path = data / "splits" / "test.csv"
    path.write_text(path.read_text().replace(",".join(CLASSES), ",".join(names)))
    return change(data, to / "data", classes=names)


def oblong(folder: Path, to: Path) -> Path:
    data = make_data(to / "plain")
    path = data / "upscaled" / "images.npy"
    np.save(path, np.load(path)[:, :, :12])
    return change(data, to / "data", image_shape=[16, 12], images_sha256=sha256(path))


def unfinished(folder: Path, to: Path) -> Path:
    (folder / "summary.json").unlink()
    return make_data(to / "data")


def damaged(folder: Path, to: Path) -> Path:
    data = make_data(to / "data")
    evaluate_across(folder, data)
    next((folder / "on").glob("*.json")).write_text("{}")
    return data


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (upscaled, "DATA: its images were upscaled by lanczos x2 to 16x16 pixels, those of the run otherwise: make "),
        (numbered, "DATA: holds no test image of a class of the run: classes 1, 2, 3, 4, 5, 6, 7, 8; of the run: "),
        (oblong, "DATA: images: 12x16 pixels, but the model was trained on faces of 16x16 pixels: crop them to that"),
        (unfinished, "RUN: is not finished; run `fer evaluate x-"),
        (damaged, "RUN/on/bars-HASH.json: run_id: missing; delete it and run the command again"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_leaves_nothing(spoil: Callable, message: str, folder: Path, tmp_path: Path) -> None:
    data = spoil(folder, tmp_path / "other")
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError) as caught:
        evaluate_across(folder, data)
    shown = str(caught.value).replace(str(data), "DATA").replace(str(folder), "RUN")
    assert re.sub("-[0-9a-f]{16}", "-HASH", shown).startswith(message)
    assert "\n" not in shown
    assert sorted(folder.rglob("*")) == before


def test_a_model_that_compares_people_is_refused(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", subjects=PEOPLE)
    folder = fit("x", small_run(**doe("same_subject", epochs=1)), CPU, data, tmp_path)
    evaluate(folder, data, CPU)
    with pytest.raises(UserError, match="needs a neutral face of the same person beside each face, and .* has none"):
        evaluate_across(folder, data)


# The command


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_command_prints_a_table_and_records_a_child_once(
    project: Path, empty_store: Path, here: Callable[..., subprocess.CompletedProcess]
) -> None:
    shutil.copy(empty_store, project / "mlflow.db")
    run = experiment(project, "one", {"device": "cpu"}, epochs=1)
    folder = fit("one", run, CPU, "data", "data/runs")
    evaluate(folder, "data", CPU)
    other = str(make_data(project / "other", {"train": 8, "val": 8, "test": 33}, seed=2))
    done = here("evaluate", "one", "--on", other)
    assert (done.returncode, done.stderr) == (
        2, f"error: {folder.name}: MLflow's experiment 'fer' does not have this run, so its result is not recorded: "
        "run `fer train one`, then this command again\n",
    )  # fmt: skip
    tracker, data = Tracker(f"sqlite:///{project}/mlflow.db", "fer"), open_data("data")
    with tracker.record(Job("one", run, CPU, folder), {**data.summary, "hash": data.hash}):
        pass
    path = next((folder / "on").glob("bars-*.json"))
    result = json.loads(path.read_text())
    parent = tracker.client.search_runs([tracker.experiment])[0].info.run_id
    left = {"fer.run_id": f"{folder.name}/on/{path.stem}"}  # by a command that was killed
    tracker.client.create_run(tracker.experiment, tags=left)
    for _ in range(2):
        done = here("evaluate", "one", "--on", other)
        assert (done.returncode, done.stderr) == (0, "")
    lines = [re.split(r"\s{2,}", line.strip()) for line in done.stdout.splitlines()]
    accuracy = f"{100 * result['all_classes']['accuracy']:.2f}"
    assert ["accuracy", "33", accuracy, accuracy] in lines
    assert ["recall neutral", "neutral", "5", *[f"{100 * result['all_classes']['recall'][0]:.2f}"] * 2] in lines
    assert "33 of 33 test images of bars (100.00 %) are of a class that the run knows." in done.stdout
    (child,) = tracker.client.search_runs([tracker.experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert (child.info.status, child.data.tags["fer.on"]) == ("FINISHED", "bars")
    assert child.data.metrics["on/accuracy"] == result["all_classes"]["accuracy"]
    assert child.data.metrics["on_shared/recall_fear"] == result["shared_classes"]["recall"][6]
    assert [each.dataset.digest for each in child.inputs.dataset_inputs] == [f"{result['hash']}-test"]
    files = {file.path for file in tracker.client.list_artifacts(child.info.run_id)}
    assert files == {path.name, path.with_suffix(".csv").name}
    kept = mlflow.artifacts.load_dict(f"{child.info.artifact_uri}/{path.name}")
    assert kept == result
    assert tracker.recorded(folder)
