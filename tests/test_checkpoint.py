"""Checkpoints come back bit by bit, survive a kill, name what does not fit, and never run code."""

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refusal
from test_weights import Evil, equal
from test_weights import network as model
from torch import nn

from fer import checkpoint
from fer.checkpoint import CHANGED, META, TRAINING, WEIGHTS

ABOUT = {
    "name": "x", "run_id": "x-s1", "classes": ["a", "b"], "class_prior": [[1.0, 0.0], [0.0, 1.0]],
    "data": {"image_shape": [3, 3]}, "data_hash": "0", "config": {}, "epoch": 0, "history": [],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "last"
    checkpoint.save(target, model().state_dict(), ABOUT, {"step": torch.ones(2)})
    return target


def refused(load: Callable, folder: Path, network: nn.Module) -> str:
    before = {key: value.clone() for key, value in network.state_dict().items()}
    message = refusal(load, folder, network)
    assert equal(before, network.state_dict())  # not half-loaded
    return message


def test_parts_that_share_weights_come_back(tmp_path: Path) -> None:
    layer = nn.Linear(3, 3)
    tied, other = nn.Sequential(layer, nn.ReLU(), layer), nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    checkpoint.save(tmp_path / "best", tied.state_dict(), ABOUT, None)
    checkpoint.load_weights(tmp_path / "best", other)
    assert equal(other.state_dict(), tied.state_dict())


def test_round_trip_of_weights_training_state_and_meta(tmp_path: Path) -> None:
    network, meta = model(), ABOUT | {"beside": "kept"}
    network.register_buffer("view", torch.arange(12.0).reshape(3, 4).t())
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    network(torch.ones(2, 1, 3, 3)).sum().backward()
    optimizer.step()
    training = {"optimizer": optimizer.state_dict(), "ema": None}
    for name, state, files in (("last", training, {WEIGHTS, TRAINING, META}), ("best", None, {WEIGHTS, META})):
        checkpoint.save(tmp_path / name, network.state_dict(), meta, state)
        assert {path.name for path in (tmp_path / name).iterdir()} == files
    other = model(seed=1)
    other.register_buffer("view", torch.zeros(4, 3))
    checkpoint.load_weights(tmp_path / "last", other)
    assert equal(other.state_dict(), network.state_dict())  # batch-norm statistics and counter included
    assert checkpoint.load_meta(tmp_path / "last") == meta
    torch.testing.assert_close(checkpoint.load_training(tmp_path / "last"), training, rtol=0, atol=0)
    with pytest.raises(ValueError, match="JSON"):  # a failed save keeps the old checkpoint
        checkpoint.save(tmp_path / "last", model(seed=1).state_dict(), {"loss": float("nan")}, None)
    checkpoint.load_weights(tmp_path / "last", other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "last"]


class Parts(nn.Module):
    """A backbone with batch norm, and a head."""

    def __init__(self, width: int = 3, labels: int = 2, seed: int = 0):
        super().__init__()
        self.backbone = model(width, seed)
        self.backbone[1].running_mean.uniform_()
        self.backbonehead = nn.Linear(2, labels)  # not of the backbone, though its name begins so


def test_the_backbone_of_another_run_alone_is_loaded(tmp_path: Path) -> None:
    other, network = Parts(seed=1), Parts(labels=5, seed=2)
    checkpoint.save(tmp_path / "best", other.state_dict() | {"identity.weight": torch.ones(2)}, {}, None)
    head = {name: tensor.clone() for name, tensor in network.backbonehead.state_dict().items()}
    checkpoint.load_backbone(tmp_path / "best", network)
    assert equal(network.backbone.state_dict(), other.backbone.state_dict())  # batch-norm statistics too
    assert equal(network.backbonehead.state_dict(), head)
    message = f"tensor backbone.0.bias has shape [3], the model needs [4]; {CHANGED}"
    assert refused(checkpoint.load_backbone, tmp_path / "best", Parts(4)) == f"{tmp_path}/best/{WEIGHTS}: {message}"


def test_weights_that_are_cut_or_of_another_model(folder: Path) -> None:
    path = folder / WEIGHTS
    assert refused(checkpoint.load_weights, folder, nn.Sequential(*model(), nn.Linear(2, 2))) == (
        f"{path}: tensor 4.bias is missing; {CHANGED}"
    )
    os.truncate(path, path.stat().st_size - 10)
    message = refused(checkpoint.load_weights, folder, model())
    assert message.startswith(f"{path}: not a whole safetensors file (")
    assert message.endswith(f"; delete {folder} and train again")


@pytest.mark.parametrize("new", [True, False])
def test_a_training_state_that_is_damaged_or_code_is_not_run(folder: Path, tmp_path: Path, new: bool) -> None:
    path, trace = folder / TRAINING, tmp_path / "was run"
    message = f"{path}: damaged, or not written by this project; delete {folder} and train again"
    torch.save({"optimizer": Evil(os.mkdir, str(trace))}, path, _use_new_zipfile_serialization=new)
    for content in (path.read_bytes(), path.read_bytes()[:-30], b"<html>"):
        path.write_bytes(content)
        assert refusal(checkpoint.load_training, folder) == message
    assert not trace.exists()


def test_a_training_state_of_a_gpu_is_read_on_a_cpu(folder: Path) -> None:
    """As a pickle writes it, the place of each tensor is a name."""
    with zipfile.ZipFile(folder / TRAINING) as file:
        content = {name: file.read(name) for name in file.namelist()}
    (pickled,) = (name for name in content if name.endswith("/data.pkl"))
    content[pickled] = content[pickled].replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:3")
    with zipfile.ZipFile(folder / TRAINING, "w") as file:
        for name, data in content.items():
            file.writestr(name, data)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(folder / TRAINING, weights_only=True)
    assert checkpoint.load_training(folder)["step"].tolist() == [1, 1]


def test_files_that_are_not_there(folder: Path) -> None:
    none, runs = folder.parent / "elsewhere" / "best", folder.parent
    train, there = f"not found; delete {none} and train again", f"no checkpoint there ({META} is missing)"
    assert refusal(checkpoint.load_meta, none) == f"{none}: {there}; train the run first"
    for load in (checkpoint.load_weights, checkpoint.load_backbone):
        assert refusal(load, none, model()) == f"{none}/{WEIGHTS}: {train}"
    assert refusal(checkpoint.load_training, none) == f"{none}/{TRAINING}: {train}"
    exported = runs / "exported"  # whoever was given it cannot train it
    exported.mkdir()
    assert refusal(checkpoint.load_meta, exported) == f"{exported}: {there}; fetch or export it again"
    assert refusal(checkpoint.load_weights, exported, model()).endswith("; fetch or export it again")
    # the last epoch is there, so the same command would train nothing and then miss the best one again
    (runs / "config.json").touch()
    assert refusal(checkpoint.load_meta, runs / "best") == f"{runs}/best: {there}; delete {runs} and train again"


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"epoch": 99}, "history: does not have a row for each of 99 epochs"),
        ({"data": {}}, "data.image_shape: missing"),
        ({"data": {"image_shape": [16, 16, 4]}}, "data.image_shape: has 4 colours, not 3"),
        ({"data": {"image_shape": [3, 3], "faces": "haar"}}, "data.faces: should be a table of keys, got 'haar'"),
        ({"data": {"image_shape": [3, 3], "faces": {"detector": "haar"}}}, "data.faces.margin: missing"),
        (
            {"data": {"image_shape": [3, 3], "super_resolution": None}},
            "data.super_resolution: should be a table of keys, got None",
        ),
        (
            {"data": {"image_shape": [3, 3], "super_resolution": {"method": "bicubic", "scale": "x"}}},
            "data.super_resolution.scale: should be a valid integer, got 'x'",
        ),
        ({"classes": ["happy", "happy"]}, "classes: two have the same name"),
        ({"history": [3], "epoch": 1}, "history.0: should be a table of keys, got 3"),
    ],
)
def test_meta_that_cannot_be_used(folder: Path, changes: dict[str, Any], fault: str) -> None:
    (folder / META).write_text(json.dumps(ABOUT | changes))
    assert refusal(checkpoint.load_meta, folder) == f"{folder}/{META}: {fault}; delete {folder} and train again"
