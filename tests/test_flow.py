"""The flow on a local Ray: runs beside each other, failures and retries, dead workers, and the command line."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, make_data
from safetensors.torch import load_file

from fer.config import run_id
from fer.data.dataset import open_data
from fer.train import fit
from pipelines.launch import held
from pipelines.params import load

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
# two runs of well under a second an epoch on the 16x16 data of conftest
SMALL = [
    "models.vgg13_small.image_size=16",
    "models.vgg13_small.options={width: 0.0625, batch_norm: true, conv_dropout: 0.1, dense_dropout: 0.1}",
    "models.vgg13_small.epochs=3",
    "models.vgg13_small.batch_size=16",
    "models.vit_se_tiny.image_size=16",
    "models.vit_se_tiny.options.backbone.settings.patch_size=4",
    "models.vit_se_tiny.options.backbone.settings.hidden_size=16",
    "models.vit_se_tiny.options.backbone.settings.depth=1",
    "models.vit_se_tiny.epochs=3",
    "models.vit_se_tiny.batch_size=16",
    "models.vit_se_tiny.warmup_epochs=0",
]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    make_data(tmp_path / "data")
    return tmp_path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """PREFECT_API_URL of a real server on 127.0.0.1; tests without it run as on a laptop, with Prefect's own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [BIN / "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    home = str(tmp_path_factory.mktemp("prefect"))
    process = subprocess.Popen(
        words, env=env(PREFECT_HOME=home), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}/api"
    wait_for(lambda: _answers(f"{url}/health"))
    yield url
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except OSError:
        return False
    return True


def fer(project: Path, *words: str, small: bool = True, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*words, small=small), cwd=project, env=env(**environment), capture_output=True, text=True, timeout=280
    )


def command(*words: str, small: bool = True) -> list[str]:
    settings = [word for setting in SMALL for word in ("--set", setting)] if small else []
    return [str(BIN / "fer"), words[0], *settings, *words[1:]]


def env(**changes: str) -> dict[str, str]:
    without = ("PREFECT_", "MLFLOW_", "RAY_", "OMP_", "FER_")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(without)}
    return {**clean, "OMP_NUM_THREADS": "1", **changes}


def summaries(project: Path) -> dict[str, dict]:
    found = (json.loads(path.read_text()) for path in (project / "data/runs").glob("*/summary.json"))
    return {summary["name"]: summary for summary in found}


def mlflow_runs(project: Path, epochs: int = 3) -> dict[str, str]:
    """run id -> status, read from the store itself; a finished run has a point for each epoch, once."""
    code = """
import json, mlflow
runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
steps = lambda run: [p.step for p in mlflow.MlflowClient().get_metric_history(run.info.run_id, "val_accuracy")]
print(json.dumps([[run.info.run_name, run.info.status, steps(run)] for run in runs]))
"""
    uri = f"sqlite:///{project}/mlflow.db"
    out = subprocess.run(
        [sys.executable, "-c", code], env=env(MLFLOW_TRACKING_URI=uri), capture_output=True, text=True, check=True
    )
    rows = json.loads(out.stdout.splitlines()[-1])
    assert len({name for name, _, _ in rows}) == len(rows), "one MLflow run per run id"
    for name, status, steps in rows:
        assert len(set(steps)) == len(steps), f"{name} has doubled steps {steps}"
        assert status != "FINISHED" or steps == list(range(1, epochs + 1))
    return {name: status for name, status, _ in rows}


def test_two_models_train_together_and_the_second_call_has_nothing_to_do(project: Path):
    first = fer(project, "train", "vgg13_small", "vit_se_tiny")
    assert first.returncode == 0, first.stderr
    assert sorted(summaries(project)) == ["vgg13_small", "vit_se_tiny"]
    assert set(mlflow_runs(project).values()) == {"FINISHED"}
    best = max(summary["val"]["accuracy"] for summary in summaries(project).values())
    assert "models:/fer-bars@champion: version" in first.stdout
    assert f"val {100 * best:.2f} %" in first.stdout.split("@champion")[1]
    before = {path: path.stat().st_mtime_ns for path in (project / "data/runs").rglob("*")}

    second = fer(project, "train", "vgg13_small", "vit_se_tiny")
    assert second.returncode == 0
    assert "Nothing to do: 2 run(s)" in second.stdout
    assert {path: path.stat().st_mtime_ns for path in (project / "data/runs").rglob("*")} == before

    shown = fer(project, "evaluate", "vit_se_tiny", small=False)
    assert "Test, class by class" in shown.stdout
    compared = fer(project, "compare", small=False)
    assert all(summary["run_id"] in compared.stdout for summary in summaries(project).values())


def wait_for(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def epochs_done(project: Path) -> int:
    files = list((project / "data/runs").glob("*/metrics.jsonl"))
    return len(files[0].read_text().splitlines()) if files else 0


def test_a_run_that_is_killed_is_failed_and_the_same_command_ends_it_as_if_never_cut(
    project: Path, tmp_path: Path, server: str
):
    long = ["--set", "models.vgg13_small.epochs=60"]
    killed = subprocess.Popen(
        command("train", "vgg13_small", *long),
        cwd=project, env=env(PREFECT_API_URL=server), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for(lambda: epochs_done(project) >= 5)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    (folder,) = (project / "data/runs").iterdir()
    wait_for(lambda: not _workers(project))
    cut = epochs_done(project)
    assert 5 <= cut < 60
    assert not (folder / "summary.json").exists()
    wait_for(lambda: _status(project) == "FAILED", 60)

    resumed = fer(project, "train", "vgg13_small", *long, PREFECT_API_URL=server)
    assert resumed.returncode == 0, resumed.stderr
    assert list((project / "data/runs").iterdir()) == [folder]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, 61))
    assert _status(project) == "FINISHED"

    run = load(project / "params.yaml", [*SMALL, long[1]]).models["vgg13_small"]
    uncut = fit("vgg13_small", run, project / "data", tmp_path / "uncut")
    for name in ("best/model.safetensors", "last/model.safetensors"):
        assert (folder / name).read_bytes() == (uncut / name).read_bytes()


def _status(project: Path) -> str:
    import sqlite3

    with sqlite3.connect(project / "mlflow.db") as store:
        ((status,),) = store.execute("select status from runs").fetchall()
    store.close()
    return status


def _workers(project: Path) -> list[int]:
    """Ray's workers that train on the project's images: they have them mapped, as the driver has for a moment."""
    found = []
    for process in psutil.process_iter(["name"]):
        try:
            maps = Path(f"/proc/{process.pid}/maps").read_text() if process.info["name"].startswith("ray::") else ""
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue
        if f"{project}/data/upscaled/images.npy" in maps:
            found.append(process.pid)
    return found


def test_a_worker_that_is_killed_is_restarted_from_its_checkpoint(project: Path, server: str):
    long = ["--set", "models.vgg13_small.epochs=60"]
    running = subprocess.Popen(
        command("train", "vgg13_small", *long),
        cwd=project, env=env(PREFECT_API_URL=server), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for(lambda: epochs_done(project) >= 5)
    for pid in _workers(project):
        assert psutil.Process(pid).environ()["MALLOC_ARENA_MAX"] == "1"  # where it starts: glibc does not look again
        os.kill(pid, signal.SIGKILL)
    output, _ = running.communicate(timeout=200)
    assert running.returncode == 0, output
    (folder,) = (project / "data/runs").iterdir()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, 61))
    assert list(mlflow_runs(project, epochs=60).values()) == ["FINISHED"]


@pytest.mark.parametrize(
    ("number", "everywhere"), [(signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGTERM, True)]
)
def test_asked_to_stop_it_saves_and_leaves_nothing_running(
    project: Path, server: str, number: signal.Signals, everywhere: bool
):
    """Ctrl-C or SIGTERM: the state is that of the last step, not of the last epoch.

    Slurm and systemd send SIGTERM to all: to Ray's processes, Prefect's server, the guard.
    """
    own = {} if everywhere else {"PREFECT_API_URL": server}
    running = subprocess.Popen(
        command("train", "vgg13_small", "--set", "models.vgg13_small.epochs=2000"),
        cwd=project, env=env(**own), start_new_session=True, stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for(lambda: epochs_done(project) >= 2)
    for child in psutil.Process(running.pid).children(recursive=True) if everywhere else ():
        child.send_signal(number)
    running.send_signal(number)
    _, errors = running.communicate(timeout=60)
    assert (running.returncode, errors.strip()) == (
        128 + number,
        "stopping: every run saves what it has; Ctrl-C again ends at once\n"
        "stopped: the same command goes on from there",
    )
    (folder,) = (project / "data/runs").iterdir()
    progress = json.loads((folder / "progress.json").read_text())
    training = torch.load(folder / "last" / "training.pt", weights_only=True)
    meta = json.loads((folder / "last" / "checkpoint.json").read_text())
    # progress.json is written once a second, so it may be a little behind
    assert (meta["epoch"], training["step"]) >= (progress["epoch"], progress["step"])
    wait_for(lambda: not _workers(project) and _status(project) == "FAILED")
    assert not {"stop", "training"} & {path.name for path in folder.iterdir()}


def test_the_failure_of_one_run_leaves_the_others_alone_and_is_not_retried_when_it_is_the_users(
    project: Path, server: str
):
    """The one that ends well has two workers, so that each run takes what the machine has and the other waits."""
    changes = ["--set", "models.vit_se_tiny.lr=1e30", "--set", "models.vgg13_small.resources.workers=2"]
    done = fer(project, "train", "vgg13_small", "vit_se_tiny", *changes, PREFECT_API_URL=server)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: vit_se_tiny-s1111-")
    assert "loss is nan in epoch" in line or "loss is inf in epoch" in line
    assert "e+29" in line  # the learning rate, a little way down its cosine
    assert "Traceback" not in done.stderr
    assert list(summaries(project)) == ["vgg13_small"]
    assert summaries(project)["vgg13_small"]["epochs"] == 3
    statuses = {name.split("-")[0]: status for name, status in mlflow_runs(project).items()}
    assert statuses == {"vgg13_small": "FINISHED", "vit_se_tiny": "FAILED"}


TINY_VIT = (
    "{name: vit_tiny_patch16_224, weights: null, settings: {patch_size: 8, hidden_size: 16, depth: 1, num_heads: 2}}"
)
STEPS = [
    *(f"models.{step}.{key}" for step in ("emotion_encoder_tiny", "disentangled_doe_tiny") for key in (
        "image_size=16", "batch_size=16", "epochs=3", f"options.backbone={TINY_VIT}")),
    f"models.emotion_encoder_tiny.options.identity={TINY_VIT}",
    "models.disentangled_doe_tiny.options.references=4",
]  # fmt: skip


def test_a_run_waits_for_the_one_it_starts_from_and_takes_its_backbone(project: Path, server: str):
    """The disentangled difference of embeddings, both steps by the name of the second."""
    steps = [word for setting in STEPS for word in ("--set", setting)]
    done = fer(project, "train", "disentangled_doe_tiny", *steps, small=False, PREFECT_API_URL=server)
    assert done.returncode == 0, done.stderr
    first, second = (summaries(project)[name] for name in ("emotion_encoder_tiny", "disentangled_doe_tiny"))
    assert first["finished"] <= second["finished"]
    assert second["starts_from"] == ["emotion_encoder_tiny"]
    folders = [project / "data/runs" / summary["run_id"] for summary in (first, second)]
    assert json.loads((folders[1] / "config.json").read_text())["start"] == first["run_id"]
    ours, theirs = (load_file(folder / "best" / "model.safetensors") for folder in folders)
    shared = [name for name in theirs if name.startswith("backbone.")]
    assert len(shared) > 10
    assert all(torch.equal(ours[name], theirs[name]) for name in shared)
    assert set(mlflow_runs(project).values()) == {"FINISHED"}

    shutil.rmtree(folders[0])  # step one is not needed any more, nor made again
    again = fer(project, "train", "disentangled_doe_tiny", *steps, small=False, PREFECT_API_URL=server)
    assert "Nothing to do: 1 run(s)" in again.stdout, again.stderr
    assert not folders[0].exists()


def test_a_run_does_not_start_where_the_one_it_starts_from_failed(project: Path, server: str):
    settings = [*STEPS, "models.emotion_encoder_tiny.options.identity.weights=./none"]
    words = [word for setting in settings for word in ("--set", setting)]
    names = "disentangled_doe_tiny", "emotion_encoder_tiny"
    done = fer(project, "train", *names, *words, small=False, PREFECT_API_URL=server)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("error: models.emotion_encoder_tiny.options.identity.weights: cannot load './none': ")
    assert lines[1] == (
        "error: disentangled_doe_tiny: not started, as emotion_encoder_tiny, from which it starts, failed"
    )
    assert summaries(project) == {}
    assert list(mlflow_runs(project).values()) == ["FAILED"]


def test_models_are_listed_with_their_cost(project: Path):
    shown = fer(project, "models", "vit_se", "disentangled_doe", small=False)
    assert shown.returncode == 0, shown.stderr
    line = next(line for line in shown.stdout.splitlines() if line.startswith(" vit_se"))
    assert line.split()[:5] == ["vit_se", "86.69M", "86.69M", "35.1", "224x224x3"]
    assert "google/vit-base-patch16-224-in21k" in shown.stdout
    assert "mobilenet_v3_large: emotion_encoder" in shown.stdout


def test_an_error_of_the_machine_is_retried(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from prefect.testing.utilities import prefect_test_harness

    monkeypatch.chdir(project)
    from pipelines import flow, launch

    tries = []

    def fail_once(name: str, *rest: object) -> None:
        tries.append(name)
        if len(tries) == 1:
            raise RuntimeError("the GPU fell off the bus")
        real(name, *rest)

    real = launch.launch
    monkeypatch.setattr(launch, "launch", fail_once)
    with prefect_test_harness(server_startup_timeout=120):
        state = flow.train(["vgg13_small"], SMALL, return_state=True)
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as client:
            artifacts = client.read_artifacts()
    assert state.is_completed(), state.message
    assert tries == ["vgg13_small", "vgg13_small"]
    (table,) = [artifact for artifact in artifacts if artifact.key == "results"]
    assert json.loads(table.data)[0]["run"] == summaries(project)["vgg13_small"]["run_id"]
    launch.ray.shutdown()


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        (["train", "nope"], {}, "models.nope: no such model in params.yaml; known: "),
        (["train", "vit_se_tny"], {}, "models.vit_se_tny: no such model in params.yaml, did you mean 'vit_se_tiny'?"),
        (["train", "--set", "train.lrr=1"], {}, "params.yaml: train.lrr: unknown key, did you mean 'lr'?"),
        (["train", "--set", "train.lr=fast"], {}, "params.yaml: train.lr: should be a valid number, got 'fast'"),
        (["train", "--set", "train.loss=fokal"], {}, "train.loss: unknown loss 'fokal', did you mean 'focal'?"),
        (["train", "--set", "models.vit_se_tiny.model=vitt"], {}, "vit_se_tiny.model: unknown model 'vitt', did you"),
        (["train", "--set", "models.vgg13_small.init_from=x"], {}, "models.vgg13_small.init_from: no model 'x'"),
        (["models", "vit_sa"], {}, "models.vit_sa: no such model in params.yaml, did you mean 'vit_se'?"),
        (["train", "vgg13_small", "--set", "models.vgg13_small.resources.workers=64"], {},
         "models.vgg13_small.resources: 64 worker(s) need 64 CPUs, there are "),
        (["train", "vgg13_small", "--set", "train.resources.device=cuda"], {}, "cuda, but no GPU is there; set it to"),
        (["train"], {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, "tracking.uri: no server answers at http://127.0.0.1:9"),
        (["train", "vgg13_small"], {"RAY_ADDRESS": "127.0.0.1:9"}, "RAY_ADDRESS: no cluster answers at 127.0.0.1:9 ("),
        (["evaluate", "nope"], {}, "nope: no such run in data/runs; runs: none yet"),
        (["compare"], {}, "data/runs: no finished run; train one with `fer train`"),
    ],
)  # fmt: skip
def test_a_users_mistake_is_one_line_and_status_2_and_leaves_nothing(project, words, environment, message):
    done = fer(project, *words, small=False, **environment)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert not (project / "data/runs").exists()


def test_a_run_that_another_process_trains_is_left_to_it(project: Path, server: str):
    run = load(project / "params.yaml", SMALL).models["vgg13_small"]
    folder = project / "data/runs" / run_id("vgg13_small", run, open_data(project / "data").hash)
    with held(folder, "vgg13_small"):
        done = fer(project, "train", "vgg13_small", PREFECT_API_URL=server)
    assert done.returncode == 2
    assert done.stderr == (f"error: vgg13_small: another process is training {folder.name}; wait for it or stop it\n")
    assert not mlflow_runs(project)


def test_missing_data_and_params_name_the_remedy(tmp_path: Path):
    done = fer(tmp_path, "train", small=False)
    assert (done.returncode, done.stderr) == (
        2, "error: params.yaml: not found; run the command in the project's root folder\n"
    )  # fmt: skip
    shutil.copy(ROOT / "params.yaml", tmp_path)
    done = fer(tmp_path, "train", small=False)
    assert (done.returncode, done.stderr) == (
        2, "error: data/splits/summary.json: not found; make the data with `dvc repro`\n"
    )  # fmt: skip
