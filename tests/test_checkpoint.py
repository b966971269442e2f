"""Checkpoints come back bit by bit, survive a kill, name what does not fit, and never run code."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fer import checkpoint
from fer.checkpoint import META, TRAINING, WEIGHTS
from fer.errors import UserError


def model(width: int = 3, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width, 2))


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "last"
    checkpoint.save(target, model().state_dict(), {"epoch": 1}, {"optimizer": {}})
    return target


def refused(folder: Path, network: nn.Module) -> str:
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(UserError) as caught:
        checkpoint.load_weights(folder, network)
    assert equal(before, network.state_dict())  # not half-loaded
    return str(caught.value)


def test_round_trip_of_weights_training_state_and_meta(tmp_path: Path) -> None:
    network = model()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    network(torch.ones(2, 1, 3, 3)).sum().backward()
    optimizer.step()
    meta = {"epoch": 2, "history": [{"val_loss": 0.1}], "classes": ["a", "b"]}
    training = {"optimizer": optimizer.state_dict(), "ema": None}
    checkpoint.save(tmp_path / "last", network.state_dict(), meta, training)

    other = model(seed=1)
    checkpoint.load_weights(tmp_path / "last", other)
    assert equal(other.state_dict(), network.state_dict())  # batch-norm statistics and counter included
    assert checkpoint.load_meta(tmp_path / "last") == meta
    loaded = checkpoint.load_training(tmp_path / "last")
    assert loaded["ema"] is None
    assert loaded["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]
    states = optimizer.state_dict()["state"]
    assert all(equal(loaded["optimizer"]["state"][index], states[index]) for index in states)
    assert sorted(path.name for path in (tmp_path / "last").iterdir()) == sorted([WEIGHTS, TRAINING, META])


def test_without_training_state_there_is_no_file_of_it(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "best", model().state_dict(), {}, None)
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == sorted([WEIGHTS, META])


def test_weights_that_are_views_are_saved(tmp_path: Path) -> None:
    table = torch.arange(12.0).reshape(3, 4)
    checkpoint.save(tmp_path / "x", {"turned": table.t(), "part": table[:, 1]}, {}, None)
    network = nn.Module()
    network.register_buffer("turned", torch.zeros(4, 3))
    network.register_buffer("part", torch.zeros(3))
    checkpoint.load_weights(tmp_path / "x", network)
    assert network.state_dict()["turned"].tolist() == table.t().tolist()
    assert network.state_dict()["part"].tolist() == [1.0, 5.0, 9.0]


def test_a_failed_save_keeps_the_old_checkpoint(folder: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        checkpoint.save(folder, model(seed=1).state_dict(), {"loss": float("nan")}, None)
    network = model(seed=2)
    checkpoint.load_weights(folder, network)
    assert equal(network.state_dict(), model().state_dict())
    assert [path.name for path in folder.parent.iterdir()] == ["last"]


def test_missing_tensor_is_named(folder: Path) -> None:
    assert refused(folder, nn.Sequential(*model(), nn.Linear(2, 2))) == (
        f"{folder}/{WEIGHTS}: tensor 4.bias is missing; the file belongs to another model"
    )


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("shape", "tensor backbone.0.bias has shape [4], the model needs [3]"),
        ("missing", "tensor backbone.1.running_var is missing; the file belongs to another model"),
        ("extra", "tensor backbone.9.bias is not in this model; the file belongs to another one"),
        ("none", "tensor backbone.0.bias is missing; the file belongs to another model"),
    ],
)
def test_a_backbone_that_does_not_fit_is_named(tmp_path: Path, change: str, message: str) -> None:
    tensors = dict(Parts(width=4 if change == "shape" else 3).state_dict())
    if change == "missing":
        del tensors["backbone.1.running_var"]
    elif change == "extra":
        tensors["backbone.9.bias"] = torch.ones(1)
    elif change == "none":
        tensors = dict(model().state_dict())
    checkpoint.save(tmp_path / "best", tensors, {}, None)
    network = Parts(seed=1)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(UserError) as caught:
        checkpoint.load_backbone(tmp_path / "best", network)
    assert str(caught.value) == f"{tmp_path}/best/{WEIGHTS}: {message}"
    assert equal(before, network.state_dict())  # not half-loaded


@pytest.mark.parametrize("content", [b"<!DOCTYPE html>", b"", "cut"])
def test_weights_that_are_no_safetensors_file(folder: Path, content: bytes | str) -> None:
    path = folder / WEIGHTS
    path.write_bytes(content if isinstance(content, bytes) else path.read_bytes()[:-10])
    message = refused(folder, model())
    assert message.startswith(f"{path}: not a whole safetensors file (")
    assert message.endswith(f"; delete {folder} and train again")
    assert "\n" not in message


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", "cut", "list of ints"])
def test_training_state_that_is_damaged(folder: Path, content: bytes | str) -> None:
    path = folder / TRAINING
    if content == "cut":
        content = path.read_bytes()[: path.stat().st_size // 2]
    elif content == "list of ints":
        content = pickle.dumps([1, 2], protocol=2)
    assert isinstance(content, bytes)
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        checkpoint.load_training(folder)
    assert str(caught.value) == (f"{path}: damaged, or not written by this project; delete {folder} and train again")


class Evil:
    """Pickled, it runs a command where it is loaded without care."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("form", ["pickle", "torch", "old torch"])
def test_code_in_a_training_state_is_not_run(folder: Path, tmp_path: Path, form: str) -> None:
    path, trace = folder / TRAINING, tmp_path / "was run"
    if form == "pickle":
        path.write_bytes(pickle.dumps({"optimizer": Evil(trace)}, protocol=2))
    else:
        torch.save({"optimizer": Evil(trace)}, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(UserError, match="damaged, or not written by this project"):
        checkpoint.load_training(folder)
    assert not trace.exists()
    if form == "pickle":  # the trap itself works
        pickle.loads(path.read_bytes())
        assert trace.exists()


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        checkpoint.load_meta(tmp_path / "last")
    assert str(caught.value) == f"{tmp_path}/last: no checkpoint there ({META} is missing); train the run first"
    with pytest.raises(UserError) as caught:
        checkpoint.load_weights(tmp_path / "last", model())
    assert str(caught.value) == f"{tmp_path}/last/{WEIGHTS}: not found; train the run first"
    with pytest.raises(UserError) as caught:
        checkpoint.load_backbone(tmp_path / "last", Parts())
    assert str(caught.value) == f"{tmp_path}/last/{WEIGHTS}: not found; train the run first"
    with pytest.raises(UserError) as caught:
        checkpoint.load_training(tmp_path / "last")
    assert str(caught.value) == f"{tmp_path}/last/{TRAINING}: not found; delete {tmp_path}/last and train again"


def test_meta_that_is_no_json(folder: Path) -> None:
    (folder / META).write_text(json.dumps({"epoch": 1})[:-1])
    with pytest.raises(UserError) as caught:
        checkpoint.load_meta(folder)
    assert str(caught.value) == f"{folder}/{META}: not valid JSON; delete {folder} and train again"
