"""A run given away: what it holds, that it is checked, and that it answers as the run does."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLASSES, CPU, change, doe, refusal, small_run
from huggingface_hub import ModelCard
from scipy.special import softmax

from fer.card import card as card_of
from fer.card import commit_of
from fer.data.dataset import open_data
from fer.ensemble import combine
from fer.evaluate import evaluate, read_predictions
from fer.export import _difference, write_folder, write_onnx
from fer.files import sha256
from fer.predict import Predictor
from fer.statistics import temperature
from fer.train import fit


@pytest.fixture(scope="module")
def run(bars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(bars, tmp_path_factory.mktemp("runs"), epochs=12)


def finished(data: Path, runs: Path, **changes: Any) -> Path:
    folder = fit("x", small_run(**{"epochs": 2, **changes}), CPU, data, runs)
    evaluate(folder, data, CPU)
    return folder


def test_prediction_is_as_sure_as_the_run_is_right_on_val(run: Path, bars: Path) -> None:
    predictor, splits = Predictor(run), [open_data(bars).split(name) for name in ("val", "test")]
    val, test = (read_predictions(run / f"predictions_{split.name}.csv", split, CLASSES) for split in splits)
    softer = softmax(np.log(test) / predictor.temperature, 1)
    np.testing.assert_allclose(predictor.probabilities(splits[1].pixels(np.arange(40)).numpy()), softer, atol=1e-6)
    labels, other = (split.labels.numpy() for split in splits)
    assert predictor.temperature == round(temperature(val, labels), 4) != round(temperature(test, other), 4)
    assert 0.06 < predictor.temperature < 19  # not at an end of its range

    def loss(heat: float) -> float:
        return float(-np.log(softmax(np.log(val) / heat, 1)[np.arange(40), labels]).mean() + np.log(heat) ** 2 / 40)

    assert loss(predictor.temperature) < min(loss(predictor.temperature * step) for step in (0.9, 1.1))


def test_the_folder_is_whole_checked_and_states_the_runs_own_numbers(run: Path, bars: Path, tmp_path: Path) -> None:
    write_folder(run, folder := tmp_path / "given")
    names = ["README.md", "SHA256SUMS", "checkpoint.json", "model.safetensors", "requirements.txt"]
    assert sorted(path.name for path in folder.iterdir()) == names
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True, capture_output=True)
    images = np.load(bars / "upscaled" / "images.npy")[:5]
    np.testing.assert_array_equal(Predictor(folder).probabilities(images), Predictor(run).probabilities(images))
    card, test = ModelCard.load(folder / "README.md"), json.loads((run / "summary.json").read_text())["test"]
    found = {result.metric_type: result.metric_value for result in card.data.eval_results or []}
    assert found == {name: test[name] for name in ("accuracy", "balanced_accuracy")}
    for text in (f"| test | 40 | {100 * test['accuracy']:.2f} (", f"temperature of {Predictor(run).temperature:g},"):
        assert text in card.text
    changes = ", and changes that are in no commit: pass on the folder fer/ as well"
    for made, told in (({"commit": "ab", "changed": False}, "ab"), ({"commit": "ab", "changed": True}, f"ab{changes}")):
        assert commit_of(made) == told
    assert commit_of(json.loads((folder / "checkpoint.json").read_text())["made_by"]) in " ".join(card.text.split())
    assert "exists already" in refusal(write_folder, run, folder)
    summary = json.loads((run / "summary.json").read_text()) | {"classes": ["a|b", "<b>\n## x", *CLASSES[2:]]}
    odd = card_of(summary, json.loads((folder / "checkpoint.json").read_text()))
    assert "| a\\|b | " in odd
    assert "| &lt;b&gt; ## x | " in odd
    assert "<b>" not in odd
    for own in ("new.old", "new.partial"):  # a user's, such as what was exported before
        (tmp_path / own).mkdir()
        told = f"{tmp_path / own}: would be replaced while new is written; move it or delete it"
        assert refusal(write_folder, run, tmp_path / "new") == told
        (tmp_path / own).rmdir()
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "model.safetensors: is not the file that SHA256SUMS lists" in refusal(Predictor, folder)


@pytest.mark.slow
def test_the_onnx_file_gives_the_probabilities_of_two_networks_and_the_mirror(
    bars: Path, run: Path, tmp_path: Path
) -> None:
    """One of them resizes, makes colour, and rounds to bf16, but not in ONNX."""
    import onnxruntime

    resized = {"channels": 3, "mean": [0.5, 0.4, 0.3], "image_size": 24}
    other = finished(bars, tmp_path / "runs", seed=2, precision="bf16", input=resized)
    folder, path = combine([run, other], bars, CPU, mirror=True), tmp_path / "model.onnx"
    assert write_onnx(folder, path) < 1e-5
    session = onnxruntime.InferenceSession(str(path))
    about = session.get_modelmeta().custom_metadata_map
    assert [json.loads(about[key]) for key in ("classes", "face_shape")] == [CLASSES, [16, 16]]
    assert about["run_id"] == folder.name
    faces = np.load(bars / "upscaled" / "images.npy")[:9]
    found = session.run(["probabilities"], {"faces": faces})[0]
    np.testing.assert_allclose(found, Predictor(folder, "cpu").probabilities(faces), atol=5e-3)
    digest = sha256(path)
    assert "exists already" in refusal(write_onnx, folder, path)
    assert {one.name: sha256(one) for one in tmp_path.glob("*.*")} == {"model.onnx": digest}


def test_what_cannot_be_given_away_is_said(
    run: Path, bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished = fit("x", small_run(epochs=1), CPU, bars, tmp_path / "runs")
    for write in (write_folder, write_onnx):
        assert "is not finished" in refusal(write, unfinished, tmp_path / "given")
    compares = finished(bars, tmp_path / "runs", **doe("same_subject"))
    assert "needs a neutral face with every image" in refusal(write_onnx, compares, tmp_path / "given")
    broken = shutil.copytree(run, tmp_path / "runs/broken")
    change(broken, "best/model.safetensors", lambda _: "junk" * 500)
    assert "model.safetensors: not a whole safetensors file" in refusal(write_folder, broken, tmp_path / "given")
    (broken / "best/model.safetensors").unlink()
    assert "model.safetensors: not found; delete" in refusal(write_folder, broken, tmp_path / "given")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    told = "onnxruntime is not installed: pip install -c constraints.txt -e '.[onnx]'"
    assert told in refusal(write_onnx, run, tmp_path / "given")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_no_number_is_no_agreement(monkeypatch: pytest.MonkeyPatch) -> None:
    class Session:
        def get_inputs(self) -> list[Any]:
            return [SimpleNamespace(shape=["batch"])]

        def run(self, _: None, given: dict[str, np.ndarray]) -> list[np.ndarray]:
            return [np.full((len(given["faces"]), 3), np.nan if len(given["faces"]) == 3 else 0, np.float32)]

    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *_, **__: Session())
    assert np.isnan(_difference(Path("x.onnx"), lambda faces: torch.zeros(len(faces), 3), (4, 4)))
