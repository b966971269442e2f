"""What tests share: one torch thread, small data as the DVC stages write it, small runs, the real FER+ if at hand."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import pipelines  # noqa: F401  sets what the frameworks read when they are imported, as here by some test
from fer.data.augment import Augment
from fer.resources import Resources
from fer.run import Run

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ["neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt"]

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """mlflow writes its tracking URI into the environment; the next test must not inherit it."""
    before = dict(os.environ)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def ferplus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official FER+ folder layout, unpacked from FERPLUS_DIR once a session."""
    source = os.environ.get("FERPLUS_DIR")
    if not source:
        pytest.skip("FERPLUS_DIR is not set: it names the folder with the real FER+ parquet files and unpack.py")
    target = tmp_path_factory.mktemp("ferplus")
    subprocess.run([sys.executable, Path(source) / "unpack.py", target], check=True, capture_output=True)
    return target


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty SQLite store of MLflow: to make one takes seconds, to copy it none."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


def make_data(
    folder: Path,
    counts: dict[str, int] | None = None,
    side: int = 16,
    seed: int = 0,
    subjects: Sequence[str] | None = None,
) -> Path:
    """Write `folder`/upscaled and `folder`/splits: each class is a bright bar at its own height, plus noise.

    `subjects`: a name per image; none are known without.
    """
    from fer.data.images import sha256

    counts = counts or {"train": 96, "val": 40, "test": 40}
    rng = np.random.default_rng(seed)
    total = sum(counts.values())
    labels = np.arange(total) % len(CLASSES)
    images = rng.integers(0, 120, (total, side, side), dtype=np.uint8)
    for image, label in zip(images, labels):
        image[label * side // len(CLASSES)] = 255
    (folder / "upscaled").mkdir(parents=True)
    (folder / "splits").mkdir()
    np.save(folder / "upscaled" / "images.npy", images)
    first = leaked = 0
    in_class: dict[str, dict[str, int]] = {}
    for split, count in counts.items():
        rows = np.arange(first, first + count)
        table = pd.DataFrame({"row": rows, "name": [f"{row}.png" for row in rows], "label": labels[rows]})
        table[CLASSES] = 0.8 * np.eye(len(CLASSES))[labels[rows]] + 0.2 / len(CLASSES)
        table["subject"] = "" if subjects is None else [subjects[row] for row in rows]
        in_class[split] = {name: int((labels[rows] == label).sum()) for label, name in enumerate(CLASSES)}
        copies = (split == "test") & (rows % 10 == 0)
        table["duplicate_of"] = np.where(copies, "0.png", "")
        table["duplicate_in"] = np.where(copies, "train", "")
        table.to_csv(folder / "splits" / f"{split}.csv", index=False)
        first += count
        leaked += int(copies.sum())
    prior = 0.7 * np.eye(len(CLASSES)) + 0.3 / len(CLASSES)
    summary = {
        "classes": CLASSES,
        "class_prior": prior.tolist(),
        "dataset": "bars",
        "label_mode": "majority",
        "counts": in_class,
        "totals": counts,
        "images": total,
        "image_shape": [side, side],
        "images_sha256": sha256(folder / "upscaled" / "images.npy"),
        "duplicates": {"val_in_train": 0, "test_in_train": leaked, "test_in_val": 0, "within_train": 0},
    }
    (folder / "splits" / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_data(tmp_path / "data")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: settings, experiments, sweeps and small data, nothing trained."""
    copy_settings(tmp_path)
    make_data(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def copy_settings(folder: Path) -> None:
    """params.yaml, experiments/ and sweeps/ of the project."""
    shutil.copy(ROOT / "params.yaml", folder)
    for name in ("experiments", "sweeps"):
        shutil.copytree(ROOT / name, folder / name)


CPU = Resources(device="cpu")
VGG: dict[str, Any] = {"name": "vgg13", "width": 0.0625, "batch_norm": True, "conv_dropout": 0.1, "dense_dropout": 0.1}
SMALL: dict[str, Any] = {
    "model": VGG,
    "epochs": 3,
    "batch_size": 16,
    "input": {"image_size": 16, "channels": 1},
    "optimizer": {"name": "adamw", "lr": 0.01, "weight_decay": 0.01},
    "schedule": {"name": "cosine", "warmup_epochs": 0},
}


def small_run(**changes: Any) -> Run:
    """A VGG13 of 1/16 width on 16x16 images: an epoch takes well under a second.

    A table among the changes is laid over the one here, unless it has another `name`.
    """
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in SMALL.items()}
    for key, value in changes.items():
        old = tree.get(key, {})
        same = isinstance(value, dict) and isinstance(old, dict) and value.get("name") in (None, old.get("name"))
        tree[key] = {**old, **value} if same else value
    return Run.model_validate(tree)


PEOPLE = ["ab"[row // 8 % 2] for row in range(176)]  # subjects for `make_data`: one image of each class, then the other
NO_AUGMENT = dict.fromkeys(Augment.model_fields, 0)
# with batch norm; sees 32 pixels at least
RESNET: dict[str, Any] = {"name": "resnet50", "weights": None, "layers": [1, 1, 1, 1], "width": 4}


def doe(pairing: str = "random_neutral", **changes: Any) -> dict[str, Any]:
    """Keys of a small run of DoE; nothing augments, so its encoder is asked once."""
    own = {"references": 3} if pairing == "random_neutral" else {}
    model = {"name": "difference_of_embeddings", "backbone": RESNET, "hidden": [16]}
    model["pairing"] = {"name": pairing, **own}
    return {"model": model, "input": {"image_size": 32, "channels": 1}, "augment": NO_AUGMENT, **changes}


def emotion_encoder(**changes: Any) -> dict[str, Any]:
    """Keys of a small run of an emotion encoder, with augmentation."""
    model = {"name": "emotion_encoder", "backbone": RESNET, "identity": RESNET, "hidden": [16]}
    return {"model": model, "input": {"image_size": 32, "channels": 1}, **changes}
