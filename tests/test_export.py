"""A run given away: what it holds, that it is checked, and that it answers as the run does."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CLASSES, CPU, doe, make_data, small_run
from huggingface_hub import ModelCard

from fer.data.dataset import open_data
from fer.ensemble import combine
from fer.errors import UserError
from fer.evaluate import evaluate, read_predictions
from fer.export import write_folder, write_onnx
from fer.predict import Predictor
from fer.statistics import softened, temperature
from fer.train import fit


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("export") / "data")


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    return finished(data, epochs=12)


def finished(data: Path, **changes: Any) -> Path:
    folder = fit("x", small_run(**{"epochs": 2, **changes}), CPU, data, data.parent / "runs")
    evaluate(folder, data, CPU)
    return folder


def test_prediction_is_as_sure_as_the_run_is_right_on_val(run: Path, data: Path) -> None:
    predictor = Predictor(run)
    assert 0.06 < predictor.temperature < 19  # not at an end of its range
    wanted = {name: read_predictions(run / f"predictions_{name}.csv", open_data(data).split(name), CLASSES)
              for name in ("val", "test")}  # fmt: skip
    images = np.load(data / "upscaled" / "images.npy")[-40:]  # test
    softer = softened(np.log(wanted["test"]), predictor.temperature)
    np.testing.assert_allclose(predictor.probabilities(images), softer, atol=1e-6)
    labels = np.arange(96, 136) % 8

    found = {name: round(temperature(table, np.arange(first, first + 40) % 8), 4)
             for (name, table), first in zip(wanted.items(), (96, 136))}  # fmt: skip
    assert predictor.temperature == found["val"] != found["test"]

    def loss(heat: float) -> float:
        return float(-np.log(softened(np.log(wanted["val"]), heat)[np.arange(40), labels]).mean())

    assert loss(predictor.temperature) < min(loss(predictor.temperature * step) for step in (0.9, 1.1))


def test_the_folder_is_whole_and_checked(run: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "given"
    write_folder(run, folder)
    names = ["README.md", "SHA256SUMS", "checkpoint.json", "model.safetensors", "requirements.txt"]
    assert sorted(path.name for path in folder.iterdir()) == names
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True, capture_output=True)
    images = np.load(data / "upscaled" / "images.npy")[:5]
    np.testing.assert_array_equal(Predictor(folder).probabilities(images), Predictor(run).probabilities(images))
    with pytest.raises(UserError, match="exists already"):
        write_folder(run, folder)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"model\.safetensors: is not the file that SHA256SUMS lists"):
        Predictor(folder)


def test_the_card_states_the_runs_own_numbers(run: Path, tmp_path: Path) -> None:
    write_folder(run, tmp_path / "given")
    summary = json.loads((run / "summary.json").read_text())
    card = ModelCard.load(tmp_path / "given" / "README.md")
    found = {result.metric_type: result.metric_value for result in card.data.eval_results or []}
    assert found == {name: summary["test"][name] for name in ("accuracy", "balanced_accuracy")}
    assert f"| test | 40 | {100 * summary['test']['accuracy']:.2f} (" in card.text
    assert f"temperature of {Predictor(run).temperature:g}," in card.text
    assert "| contempt | 5 |" in card.text


def test_an_unfinished_run_is_not_given_away(data: Path, tmp_path: Path) -> None:
    folder = fit("x", small_run(epochs=1), CPU, data, tmp_path)
    for write in (write_folder, write_onnx):
        with pytest.raises(UserError, match="is not finished"):
            write(folder, tmp_path / "given")
    assert not (tmp_path / "given").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["resized, colour", "two networks"])
def test_the_onnx_file_gives_the_runs_probabilities(kind: str, data: Path, run: Path, tmp_path: Path) -> None:
    import onnxruntime

    if kind == "two networks":
        folder = combine([run, finished(data, seed=2, precision="bf16")], data, CPU, mirror=True)
    else:
        folder = finished(data, epochs=12, input={"channels": 3, "mean": [0.5, 0.4, 0.3], "image_size": 24})
    path = tmp_path / "model.onnx"
    assert write_onnx(folder, path) < 1e-5
    session = onnxruntime.InferenceSession(str(path))
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == Predictor(folder).classes
    assert (json.loads(about["face_shape"]), about["run_id"]) == ([16, 16], folder.name)
    faces = np.load(data / "upscaled" / "images.npy")[:9]
    found = session.run(["probabilities"], {"faces": faces})[0]
    rounding = 5e-3 if kind == "two networks" else 1e-5  # bf16 there, fp32 here
    np.testing.assert_allclose(found, Predictor(folder, "cpu").probabilities(faces), atol=rounding)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(UserError, match="exists already"):
        write_onnx(folder, path)
    assert [hashlib.sha256(one.read_bytes()).hexdigest() for one in tmp_path.iterdir()] == [digest]


def test_what_cannot_be_one_onnx_file_is_said(
    data: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    people = make_data(tmp_path / "data", subjects=["ab"[row // 8 % 2] for row in range(176)])
    with pytest.raises(UserError, match="needs a neutral face with every image"):
        write_onnx(finished(people, **doe("same_subject")), tmp_path / "model.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"onnxruntime is not installed: pip install 'fer-pipeline\[onnx\]'"):
        write_onnx(run, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()
