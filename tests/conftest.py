"""What tests share: one torch thread, small data as the DVC stages write it, small runs, servers, the real FER+."""

import gc
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import pipelines  # noqa: F401  sets what the frameworks read when they are imported, as here by some test
from fer.data.augment import Augment
from fer.errors import UserError
from fer.resources import Resources
from fer.run import Run
from fer.run_folder import read_rows

ROOT = Path(__file__).resolve().parents[1]
DATA = Path("data/sets/sample")  # of the data set that the project's params.yaml names
CLASSES = ["neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt"]

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in what a script starts with &; commands would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that the processes end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """mlflow writes its tracking URI into the environment; the next test must not inherit it."""
    before = dict(os.environ)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    yield
    os.environ.clear()
    os.environ.update(before)


def unpacked(target: Path, *options: str) -> Path:
    """The official FER+ folder layout in `target`, from FERPLUS_DIR."""
    source = os.environ.get("FERPLUS_DIR")
    if not source:
        pytest.skip("FERPLUS_DIR is not set: it names a folder with fer2013new.csv and unpack.py (CONTRIBUTING.md)")
    subprocess.run([sys.executable, Path(source) / "unpack.py", target, *options], check=True, capture_output=True)
    return target


@pytest.fixture(scope="session")
def ferplus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of it, unpacked once a session."""
    return unpacked(tmp_path_factory.mktemp("ferplus"))


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
    from fer.files import sha256

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
        table["duplicate_kind"] = np.where(copies, "exact", "")
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
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: settings, experiments and sweeps of the project."""
    copy_settings(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def project(recipes: Path) -> Path:
    """The same with small data, nothing trained."""
    make_data(recipes / DATA)
    return recipes


def copy_settings(folder: Path) -> None:
    """params.yaml, datasets/, experiments/ and sweeps/ of the project."""
    shutil.copy(ROOT / "params.yaml", folder)
    for name in ("datasets", "experiments", "sweeps"):
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


def filled(model: Any) -> Any:
    """A network with every tensor from a formula, in float64; batch norm's variances between .8 and 1.2."""
    state = {}
    for place, (name, tensor) in enumerate(model.state_dict().items()):
        steps = torch.arange(tensor.numel(), dtype=torch.float64) % 997
        wave = torch.sin(0.37 * steps**2 + place).reshape(tensor.shape)
        if tensor.ndim > 1:
            state[name] = wave * 2 / tensor[0].numel() ** 0.5
        elif name.endswith("num_batches_tracked"):
            state[name] = tensor
        else:
            state[name] = 0.2 * wave + float(name.endswith(("weight", "running_var")))
    model.load_state_dict(state)
    return model.double().eval()


def spoil_optimizer(training: Path) -> bytes:
    """Take Adam's averages out of a training.pt, which it misses at the next step: an error of the code."""
    whole = training.read_bytes()
    content = torch.load(training, weights_only=True)
    for state in content["stepper"]["optimizer"]["state"].values():
        del state["exp_avg"]
    torch.save(content, training)
    return whole


# The command `fer`, Prefect's server, and Ray

BIN = Path(sys.executable).parent


def wait_for(condition: Callable[[], Any], seconds: float = 250) -> Any:
    """The first true value of `condition()`; the limit is only there to end a test that has failed."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except OSError:
        return False
    return True


def environment(**changes: str) -> dict[str, str]:
    """That of a new process, without what this one has set for the frameworks."""
    without = ("PREFECT_", "MLFLOW_", "RAY_", "OMP_", "FER_")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(without)}
    return {**clean, "OMP_NUM_THREADS": "1", **changes}


def start_fer(project: Path, *words: str, **changes: str) -> subprocess.Popen:
    """`fer WORDS` in a process and a session of its own; only its stderr is kept."""
    return subprocess.Popen(
        [BIN / "fer", *words], cwd=project, env=environment(**changes), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture
def here(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., subprocess.CompletedProcess]:
    """here("train", "x"): the command `fer train x`, in this process."""
    from pipelines import cli

    def run(*words: str) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", ["fer", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        gc.unfreeze()  # which the command froze, as its process would end now
        shown = capsys.readouterr()
        return subprocess.CompletedProcess(words, int(end.value.code or 0), shown.out, shown.err)

    return run


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """PREFECT_API_URL of a real server, also for the flows of this process."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    port = free_port()
    process = subprocess.Popen(
        [BIN / "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
        env=environment(PREFECT_HOME=str(tmp_path_factory.mktemp("prefect"))), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}/api"
    try:
        wait_for(lambda: answers(f"{url}/health"))
        with temporary_settings({PREFECT_API_URL: url}):
            yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def ray_here(prefect_server: str) -> Iterator[None]:
    """The Ray that a command starts, kept for all commands of a module."""
    from pipelines import launch

    launch.start_ray()
    yield
    launch.ray.shutdown()


def experiment(project: Path, name: str, resources: dict[str, Any] | None = None, **changes: Any) -> Run:
    """Write experiments/`name`.yaml: a small run with these changes."""
    from pipelines.params import yaml_of

    run = small_run(**changes)
    text = yaml_of({**run.model_dump(), "resources": resources or {}})
    (project / "experiments" / f"{name}.yaml").write_text(text)
    return run


def workers(project: Path) -> list[int]:
    """Ray's processes that train on the project's images: they have them mapped."""
    import psutil

    found = []
    for process in psutil.process_iter(["name"]):
        try:
            maps = Path(f"/proc/{process.pid}/maps").read_text() if process.info["name"].startswith("ray::") else ""
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue
        if f"{project / DATA}/upscaled/images.npy" in maps:
            found.append(process.pid)
    return found


def epochs_done(project: Path) -> dict[str, list[dict[str, Any]]]:
    """name -> rows of metrics.jsonl, of each run of the project that has any."""
    found = {}
    for path in (project / "data/runs").glob("*/metrics.jsonl"):
        rows = read_rows(path.parent)
        assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1)), path
        found[path.parent.name.split("-")[0]] = rows
    return found


def recorded(project: Path) -> dict[str, tuple[str, list[int]]]:
    """name -> status and steps of its MLflow run, of which there is one, read from the store itself."""
    with closing(sqlite3.connect(project / "mlflow.db")) as store:
        trained = "experiment_id is not (select experiment_id from experiments where name = 'fer registry')"
        known = f"select run_uuid, name, status from runs where lifecycle_stage = 'active' and {trained}"
        runs = store.execute(known).fetchall()
        steps = "select step from metrics where run_uuid = ? and key = 'val_accuracy' order by timestamp, step"
        found = {name.split("-")[0]: (status, [s for (s,) in store.execute(steps, [i])]) for i, name, status in runs}
    assert len(found) == len(runs)
    return found


def last_flow_run() -> tuple[str, set[str]]:
    """State and tags of the flow run that was started last; it has the state of its tasks."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.sorting import FlowRunSort

    with get_client(sync_client=True) as client:
        (run,) = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)
    assert run.state is not None
    return run.state.type.value, set(run.tags)


# Data and mistakes


@pytest.fixture(scope="session")
def bars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data that no test changes."""
    return make_data(tmp_path_factory.mktemp("bars") / "data", subjects=PEOPLE)


def refusal(call: Callable[..., Any], *words: Any, **named: Any) -> str:
    """The line of the UserError that the call ends with."""
    with pytest.raises(UserError) as caught:
        call(*words, **named)
    message = str(caught.value)
    assert "\n" not in message
    return message


def prepared(name: str = "sample", path: str = "faces", data: Any = None, super_resolution: Any = None,
             split: Any = None, machine: Any = None) -> Any:  # fmt: skip
    """The data set datasets/`name`.yaml as a stage gets it, with changes of its sections; its files at `path`."""
    from pipelines import data_sets
    from pipelines.params import load, read_yaml

    tree = read_yaml(ROOT / "datasets" / f"{name}.yaml", "")
    for key, changes in {"data": data, "super_resolution": super_resolution, "split": split}.items():
        tree[key] = tree[key] | (changes or {})
    recipe = data_sets.Recipe.model_validate(tree)
    place = load(ROOT / "params.yaml").super_resolution.model_copy(update={"device": "cpu", **(machine or {})})
    return data_sets.Prepared(name, Path(path), recipe, place)


@pytest.fixture(scope="session")
def real_ferplus(ferplus_folder: Path) -> Any:
    """The Source of the real FER+, read once: folders of pictures with label.csv."""
    from fer.data.found import look
    from fer.data.readers import ferplus
    from fer.data.source import Wanted

    with look(ferplus_folder) as found:
        return ferplus.read(found, Wanted())


def leave_of_test(data: Path, kept: np.ndarray) -> pd.DataFrame:
    """Leave these of the test images, bool [n], as another split would; returns their table."""
    path, summary = data / "splits" / "test.csv", data / "splits" / "summary.json"
    table = pd.read_csv(path, keep_default_na=False)[kept]
    table.to_csv(path, index=False)
    content = json.loads(summary.read_text())
    content["totals"]["test"] = len(table)
    summary.write_text(json.dumps(content))
    return table


# Files that people have changed


def change(root: Path, pattern: str, edit: Callable[[str], str] | None) -> None:
    """Edit the files of this pattern, byte for letter, or make the one of this name; None removes them."""
    for path in sorted(root.glob(pattern)) if set(pattern) & set("*[") else [root / pattern]:
        if edit is None:
            path.unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            old = path.read_bytes().decode("latin-1") if path.exists() else ""
            path.write_bytes(edit(old).encode("latin-1"))


def swap(old: str, new: str) -> Callable[[str], str]:
    """The edit that replaces the first `old`."""
    return lambda text: text.replace(old, new, 1)


def lines(first: int | None, last: int | None = None) -> Callable[[str], str]:
    """The edit that keeps these lines alone."""
    return lambda text: "".join(text.splitlines(keepends=True)[first:last])


def tells(root: Path, expected: str, call: Callable[..., Any], *words: Any, **named: Any) -> None:
    """The call is refused in one line that, without `root`, begins as expected, up to and after its ` ... `."""
    message = refusal(call, *words, **named).replace(str(root), "")
    start, _, end = expected.partition(" ... ")
    assert (message[: len(start)], message[len(message) - len(end) :]) == (start, end)
