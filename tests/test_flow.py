"""The flow on a local Ray: runs beside each other, failures and retries, dead workers, and the command line."""

import gc
import inspect
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from conftest import ROOT, copy_settings, doe, emotion_encoder, small_run
from safetensors.torch import load_file

from fer.batches import batches
from fer.data.dataset import open_data
from fer.errors import UserError
from fer.formats import read_run
from fer.resources import Resources
from fer.run import Run, run_id
from fer.train import fit
from pipelines import cli
from pipelines.params import read_yaml, yaml_of
from pipelines.work import held

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
# of random weights, which the command tells; well under a second an epoch, as small_run
VIT: dict[str, Any] = {
    "model": {
        "name": "vit_se",
        "backbone": {
            "name": "vit_base_patch16_224_in21k", "weights": None, "patch_size": 4, "hidden_size": 16, "depth": 1,
            "num_heads": 4, "mlp_ratio": 2, "pool": "pooler",
        },
    },
    "optimizer": {"name": "adamw", "lr": 5e-4},
}  # fmt: skip


def experiment(project: Path, name: str, resources: dict[str, Any] | None = None, **changes: Any) -> Run:
    """Write experiments/`name`.yaml: a small run with these changes."""
    run = small_run(**changes)
    text = yaml_of({**run.model_dump(), "resources": resources or {}})
    (project / "experiments" / f"{name}.yaml").write_text(text)
    return run


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


def fer(project: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*words), cwd=project, env=env(**environment), capture_output=True, text=True, timeout=280
    )


def command(*words: str) -> list[str]:
    return [str(BIN / "fer"), *words]


def env(**changes: str) -> dict[str, str]:
    without = ("PREFECT_", "MLFLOW_", "RAY_", "OMP_", "FER_")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(without)}
    return {**clean, "OMP_NUM_THREADS": "1", **changes}


@pytest.fixture
def here(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., subprocess.CompletedProcess]:
    """here("train", "x"): the command `fer train x`, in this process."""

    def run(*words: str) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", ["fer", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        gc.unfreeze()  # which the command froze, as its process would end now
        shown = capsys.readouterr()
        return subprocess.CompletedProcess(words, int(end.value.code or 0), shown.out, shown.err)

    return run


@pytest.fixture(scope="module")
def ray_here(server: str) -> Iterator[None]:
    """The Ray that a command starts, kept for those of this process; their flows are known to the real server."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from pipelines import launch

    with temporary_settings({PREFECT_API_URL: server}):
        launch.start_ray()
        yield
        launch.ray.shutdown()


def errors(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def summaries(project: Path) -> dict[str, dict]:
    found = (json.loads(path.read_text()) for path in (project / "data/runs").glob("*/summary.json"))
    return {summary["name"]: summary for summary in found}


def mlflow_runs(project: Path, epochs: int = 3, **own: int) -> dict[str, str]:
    """run id -> status, read from the store itself; a finished run has a point for each epoch, once.

    `own`: epochs of those of that name, where they are not `epochs`.
    """
    with closing(sqlite3.connect(project / "mlflow.db")) as store:
        rows = store.execute("select run_uuid, name, status from runs where lifecycle_stage = 'active'").fetchall()
        query = "select step from metrics where run_uuid = ? and key = 'val_accuracy' order by timestamp"
        points = {name: [step for (step,) in store.execute(query, [uuid])] for uuid, name, _ in rows}
    assert len(points) == len(rows), "one MLflow run per run id"
    for _, name, status in rows:
        steps, last = points[name], own.get(name.split("-")[0], epochs)
        assert len(set(steps)) == len(steps), f"{name} has doubled steps {steps}"
        assert status != "FINISHED" or steps == list(range(1, last + 1))
    return {name: status for _, name, status in rows}


def final(project: Path) -> dict[str, float]:
    """The `final/` metrics of the one MLflow run, as its page shows them; it is one version of the registered model."""
    with closing(sqlite3.connect(project / "mlflow.db")) as store:
        assert store.execute("select count(*) from runs").fetchone() == (1,)
        assert store.execute("select count(*) from model_versions").fetchone() == (1,)
        return dict(store.execute("select key, value from latest_metrics where key like 'final/%'").fetchall())


def test_two_models_train_together_and_the_second_call_has_nothing_to_do(project: Path, here: Callable):
    """The first call as on a laptop: nothing runs yet, and Prefect starts a server of its own."""
    experiment(project, "small")
    experiment(project, "vit", **VIT)
    first = fer(project, "train", "small", "vit")
    assert first.returncode == 0, first.stderr
    assert sorted(summaries(project)) == ["small", "vit"]
    assert set(mlflow_runs(project).values()) == {"FINISHED"}
    best = max(summary["val"]["accuracy"] for summary in summaries(project).values())
    assert "models:/fer-bars@champion: version" in first.stdout
    assert f"val {100 * best:.2f} %" in first.stdout.split("@champion")[1]
    before = {path: path.stat().st_mtime_ns for path in (project / "data/runs").rglob("*")}

    second = here("train", "small", "vit")
    assert second.returncode == 0
    assert "Nothing to do: 2 run(s)" in second.stdout
    assert {path: path.stat().st_mtime_ns for path in (project / "data/runs").rglob("*")} == before

    shown = here("evaluate", "vit")
    assert "Test, class by class" in shown.stdout
    compared = here("compare")
    assert all(summary["run_id"] in compared.stdout for summary in summaries(project).values())


def wait_for(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def epochs_done(project: Path) -> int:
    return len(rows(project))


def rows(project: Path) -> list[dict[str, Any]]:
    """metrics.jsonl of the one run, as far as it is."""
    files = list((project / "data/runs").glob("*/metrics.jsonl"))
    return [json.loads(line) for line in files[0].read_text().splitlines()] if files else []


def test_a_run_that_is_killed_is_failed_and_the_same_command_ends_it_as_if_never_cut(
    project: Path, tmp_path: Path, server: str
):
    run = experiment(project, "small", epochs=60)
    killed = subprocess.Popen(
        command("train", "small"),
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

    resumed = fer(project, "train", "small", PREFECT_API_URL=server)
    assert resumed.returncode == 0, resumed.stderr
    assert list((project / "data/runs").iterdir()) == [folder]
    assert [row["epoch"] for row in rows(project)] == list(range(1, 61))
    assert _status(project) == "FINISHED"

    uncut = fit("small", run, Resources(), project / "data", tmp_path / "uncut")
    for name in ("best/model.safetensors", "last/model.safetensors"):
        assert (folder / name).read_bytes() == (uncut / name).read_bytes()


def _status(project: Path) -> str:
    with closing(sqlite3.connect(project / "mlflow.db")) as store:
        ((status,),) = store.execute("select status from runs").fetchall()
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


@pytest.fixture
def starts(project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """starts() -> pid of each process that Ray has given a run of this process, in order."""
    from pipelines import launch

    noted = project / "starts.txt"
    task, rank = launch._task, launch._rank

    def note() -> None:
        with open(noted, "a") as file:
            file.write(f"{os.getpid()}\n")

    monkeypatch.setattr(launch, "_task", lambda *given: (note(), task(*given))[1])
    monkeypatch.setattr(launch, "_rank", lambda config: (note(), rank(config))[1])
    return lambda: noted.read_text().splitlines() if noted.exists() else []


@pytest.mark.usefixtures("ray_here")
def test_a_worker_that_is_killed_is_started_again_as_often_as_restarts_says(
    project: Path, here: Callable, starts: Callable
):
    restarts = 1
    experiment(project, "small", epochs=1000, resources={"restarts": restarts})
    seen: list[dict[str, Any]] = []

    def kill_each() -> None:
        for number in range(restarts + 1):
            wait_for(lambda: len(starts()) == number + 1 and epochs_done(project) >= len(seen) + 2)  # noqa: B023
            seen.extend(rows(project)[len(seen) :])
            worker = psutil.Process(int(starts()[-1]))
            assert worker.environ()["MALLOC_ARENA_MAX"] == "1"  # where it starts: glibc does not look again
            worker.kill()

    killer = threading.Thread(target=kill_each, daemon=True)
    killer.start()
    done = here("train", "small")
    killer.join(5)
    assert done.returncode == 1, done.stderr
    (line,) = errors(done)
    assert line.startswith("error: small: WorkerCrashedError: ")
    assert len(starts()) == restarts + 1
    assert rows(project)[: len(seen)] == seen  # times and all: none was trained again
    assert len(seen) >= 2 * (restarts + 1)
    assert list(mlflow_runs(project).values()) == ["FAILED"]


@pytest.mark.usefixtures("ray_here")
@pytest.mark.soak
def test_a_run_whose_second_worker_is_killed_is_started_again(project: Path, here: Callable, starts: Callable):
    """What the other one meets then, an error of Gloo, is not taken for one of the program."""
    experiment(project, "small", epochs=30, resources={"workers": 2, "restarts": 1})

    def kill_one() -> None:
        wait_for(lambda: epochs_done(project) >= 3)
        os.kill(int(starts()[1]), signal.SIGKILL)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    done = here("train", "small")
    killer.join(5)
    assert done.returncode == 0, done.stderr
    assert len(starts()) == 4
    assert [row["epoch"] for row in rows(project)] == list(range(1, 31))
    assert "Traceback" not in next(project.glob("data/runs/*/log.txt")).read_text()


def break_training(
    monkeypatch: pytest.MonkeyPatch, name: str, kind: type[Exception], message: str, tries: Path
) -> None:
    """From now on experiment `name` fails when its second epoch asks for an order of the images."""
    from pipelines import launch

    task = launch._task

    def broken(job: Any, *others: Any) -> Any:
        real = np.random.default_rng

        def default_rng(seed: Any = None) -> np.random.Generator:
            if seed == [1111, 1]:
                raise kind(message)
            return real(seed)

        if job.name == name:
            with open(tries, "a") as file:
                file.write("1")
            np.random.default_rng = default_rng  # type: ignore[assignment]
        return task(job, *others)

    monkeypatch.setattr(launch, "_task", broken)


@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize(
    ("kind", "message", "told"),
    [
        (ValueError, "the third wheel\nand a page of words", "ValueError: the third wheel"),
        (
            torch.OutOfMemoryError,
            "CUDA out of memory. Tried to allocate 2 GiB.",
            "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.; lower batch_size or "
            "resources.eval_batch_size, or raise resources.accumulate",
        ),
    ],
    ids=["plain", "memory of the GPU"],
)
def test_an_error_of_the_program_is_final_and_one_line_and_hides_no_other_run(
    kind: type[Exception], message: str, told: str, project: Path, here: Callable, monkeypatch: pytest.MonkeyPatch
):
    experiment(project, "broken")
    experiment(project, "fine", epochs=1)
    tries = project / "tries.txt"
    with monkeypatch.context() as patch:
        break_training(patch, "broken", kind, message, tries)
        done = here("train", "broken", "fine")
    assert done.returncode == 1, done.stderr
    assert tries.read_text() == "1"
    (folder,) = (project / "data/runs").glob("broken-*")
    source, first = inspect.getsourcelines(batches)
    line = first + next(number for number, text in enumerate(source) if "default_rng(" in text)
    where = f"fer/batches.py:{line}, in batches; all of it: {folder.relative_to(project) / 'log.txt'}"
    assert errors(done) == [f"error: broken: {told} ({where})"]
    text = (folder / "log.txt").read_text()
    assert "Traceback (most recent call last):\n" in text
    assert f'fer/batches.py", line {line}, in batches' in text
    stamped = re.findall(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.*)$", text, re.MULTILINE)
    assert len(stamped) == len(text.splitlines())
    assert [line.partition(":")[0] for line in stamped if line.startswith("epoch ")] == ["epoch 1"]
    told_in_full = "".join(traceback.format_exception_only(kind(message))).splitlines()
    assert stamped[-len(told_in_full) :] == told_in_full

    assert summaries(project)["fine"]["run_id"] in done.stdout
    assert "broken-s1111" not in done.stdout.split("unleaked", 1)[1]  # below the head of the table
    statuses = {name.split("-")[0]: status for name, status in mlflow_runs(project, fine=1).items()}
    assert statuses == {"broken": "FAILED", "fine": "FINISHED"}

    again = here("train", "broken", "fine")  # mended, it goes on
    assert again.returncode == 0, again.stderr
    assert set(mlflow_runs(project, fine=1).values()) == {"FINISHED"}


@pytest.mark.parametrize(("number", "everywhere"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_asked_to_stop_it_saves_and_leaves_nothing_running(
    project: Path, server: str, number: signal.Signals, everywhere: bool
):
    """Ctrl-C or SIGTERM: the state is that of the last step, not of the last epoch.

    Slurm and systemd send SIGTERM to all: to Ray's processes, Prefect's server, the guard.
    """
    experiment(project, "small", epochs=2000)
    own = {} if everywhere else {"PREFECT_API_URL": server}
    running = subprocess.Popen(
        command("train", "small"),
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


@pytest.mark.usefixtures("ray_here")
def test_the_failure_of_one_run_leaves_the_others_alone_and_is_not_retried_when_it_is_the_users(
    project: Path, here: Callable
):
    """The one that ends well has two workers, so that each run takes what the machine has and the other waits."""
    experiment(project, "small", resources={"workers": 2})
    experiment(project, "vit", **{**VIT, "optimizer": {"lr": 1e30}})
    done = here("train", "small", "vit")
    assert done.returncode == 2
    (line,) = errors(done)
    assert line.startswith("error: vit: vit-s1111-")
    assert "loss is nan in epoch" in line or "loss is inf in epoch" in line
    assert "e+29" in line  # the learning rate, a little way down its cosine
    assert "Traceback" not in done.stderr
    assert list(summaries(project)) == ["small"]
    assert summaries(project)["small"]["epochs"] == 3
    statuses = {name.split("-")[0]: status for name, status in mlflow_runs(project).items()}
    assert statuses == {"small": "FINISHED", "vit": "FAILED"}
    table = done.stdout.split("unleaked", 1)[1]  # below its head
    assert summaries(project)["small"]["run_id"] in table
    assert "vit-s1111-" not in table
    assert "models:/fer-bars@champion: version 1, small-s1111-" in table


def chain(project: Path, **identity: Any) -> None:
    """Experiments `first` and, from its backbone, `second`: the disentangled difference of embeddings."""
    experiment(project, "first", **emotion_encoder())
    if identity:
        model = emotion_encoder()["model"]
        experiment(project, "first", **emotion_encoder(model={**model, "identity": {**model["identity"], **identity}}))
    experiment(project, "second", **doe(init_from="first"))


@pytest.mark.usefixtures("ray_here")
def test_a_run_waits_for_the_one_it_starts_from_and_takes_its_backbone(project: Path, here: Callable):
    """Both steps by the name of the second, which is not the only one; of the changes the first gets the seed alone."""
    chain(project)
    experiment(project, "other")
    words = "train", "second", "other", "seed=2", "epochs=1"
    done = here(*words)
    assert done.returncode == 0, done.stderr
    found = summaries(project)
    assert {name: summary["epochs"] for name, summary in found.items()} == {"first": 3, "second": 1, "other": 1}
    assert all(summary["run_id"].startswith(f"{name}-s2-") for name, summary in found.items())
    first, second = found["first"], found["second"]
    assert first["finished"] <= second["finished"]
    assert second["starts_from"] == ["first"]
    folders = [project / "data/runs" / summary["run_id"] for summary in (first, second)]
    assert json.loads((folders[1] / "config.json").read_text())["start"] == first["run_id"]
    ours, theirs = (load_file(folder / "best" / "model.safetensors") for folder in folders)
    shared = [name for name in theirs if name.startswith("backbone.")]
    assert len(shared) > 10
    assert all(torch.equal(ours[name], theirs[name]) for name in shared)
    assert set(mlflow_runs(project, 1, first=3).values()) == {"FINISHED"}

    shutil.rmtree(folders[0])  # step one is not needed any more, nor made again
    again = here(*words)
    assert "Nothing to do: 2 run(s)" in again.stdout, again.stderr
    assert not folders[0].exists()


@pytest.mark.usefixtures("ray_here")
def test_a_run_does_not_start_where_the_one_it_starts_from_failed(project: Path, here: Callable):
    chain(project, weights="./none")
    done = here("train", "second", "first")
    assert done.returncode == 2, done.stderr
    lines = errors(done)
    assert len(lines) == 2
    assert lines[0].startswith("error: first: model.identity.weights: ./none: not found; ")
    assert lines[1] == "error: second: not started, as first, from which it starts, failed"
    assert summaries(project) == {}
    assert list(mlflow_runs(project).values()) == ["FAILED"]


def test_models_are_listed_with_their_cost(project: Path, here: Callable):
    shown = here("models", "vit_se", "disentangled_doe")
    assert shown.returncode == 0, shown.stderr
    line = next(line for line in shown.stdout.splitlines() if line.split()[:1] == ["vit_se"])
    assert line.split()[:5] == ["vit_se", "86.69M", "86.69M", "35.1", "224x224x3"]
    assert "google/vit-base-patch16-224-in21k" in shown.stdout
    assert "mobilenet_v3_large: emotion_encoder" in shown.stdout


@pytest.mark.usefixtures("ray_here")
def test_a_deployment_trains_the_runs_of_the_command(project: Path, here: Callable):
    """As Prefect's worker calls the flow: loaded from the entrypoint of prefect.yaml, its parameters from JSON."""
    from prefect.client.orchestration import get_client
    from prefect.flows import load_flow_from_entrypoint

    (deployment,) = read_yaml(ROOT / "prefect.yaml", "")["deployments"]
    assert list(deployment["parameters"]) == ["words"]
    train = load_flow_from_entrypoint(f"{ROOT}/{deployment['entrypoint']}")
    experiment(project, "small")
    parameters = json.loads('{"words": ["small", "epochs=2", "optimizer.lr=3e-3"]}')
    state = train(**parameters, return_state=True)
    assert state.is_completed(), state.message
    with get_client(sync_client=True) as client:
        artifacts = client.read_artifacts()
    (table,) = [found for found in artifacts if found.flow_run_id == state.state_details.flow_run_id]
    assert table.key == "results"
    assert json.loads(table.data)[0]["run"].rstrip("*") == summaries(project)["small"]["run_id"]

    done = here("train", "small", "epochs=2", "optimizer.lr=3e-3")
    assert "Nothing to do: 1 run(s)" in done.stdout, done.stderr

    with pytest.raises(UserError, match="^words: name an experiment, of .*small"):
        train(**deployment["parameters"])


@pytest.mark.usefixtures("ray_here")
def test_what_changed_of_test_since_a_run_was_finished_is_evaluated_anew_and_said(project: Path, here: Callable):
    experiment(project, "small")
    assert here("train", "small").returncode == 0
    before = summaries(project)["small"]
    folder = project / "data/runs" / before["run_id"]
    trained = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".pt")]
    assert len(trained) == 3
    curves = (folder / "metrics.jsonl").read_text()
    times = {path: path.stat().st_mtime_ns for path in trained}
    assert final(project)["final/test_accuracy"] == before["test"]["accuracy"]

    # ten images fewer, all of them right or all of them wrong
    predicted = pd.read_csv(folder / "predictions_test.csv")
    right = (predicted["label"] == predicted["prediction"]).to_numpy()
    dropped = np.flatnonzero(right if right.sum() >= 10 else ~right)[:10]
    kept = np.delete(right, dropped)
    test = project / "data/splits/test.csv"
    pd.read_csv(test, keep_default_na=False).drop(index=dropped).to_csv(test, index=False)
    done = here("train", "small")
    assert done.returncode == 0, done.stderr
    news = f"{folder.name}: the test split has changed since: evaluated again, from its best checkpoint"
    assert done.stderr.splitlines().count(news) == 1
    after = summaries(project)["small"]
    assert after["test"]["images"] == 30
    assert after["test"]["accuracy"] == pytest.approx(kept.mean())
    assert after["test"]["accuracy"] != before["test"]["accuracy"]
    assert after["val"] == before["val"]
    assert final(project)["final/test_accuracy"] == after["test"]["accuracy"]

    # one wrong image that was not leaked now is; no other is any more
    table = pd.read_csv(test, keep_default_na=False)
    wrong = int(np.flatnonzero(~kept & (table["duplicate_in"] == "").to_numpy())[0])
    table["duplicate_in"] = ""
    table.loc[wrong, "duplicate_in"] = "val"
    table.to_csv(test, index=False)
    done = here("train", "small")
    assert done.returncode == 0, done.stderr
    news = f"{folder.name}: other test images count as leaked since: those columns are computed again, from its "
    assert done.stderr.splitlines().count(f"{news}predictions") == 1
    last = summaries(project)["small"]
    assert last["test"] == after["test"]
    assert last["test_without_train"]["images"] == 30
    assert last["test_without_train"]["accuracy"] == after["test"]["accuracy"]
    assert last["test_unleaked"]["images"] == 29
    assert last["test_unleaked"]["accuracy"] == pytest.approx(kept.sum() / 29)
    assert final(project)["final/test_unleaked_accuracy"] == last["test_unleaked"]["accuracy"]
    assert final(project)["final/test_unleaked_accuracy"] != after["test_unleaked"]["accuracy"]

    assert list(mlflow_runs(project).values()) == ["FINISHED"]
    assert {path: path.stat().st_mtime_ns for path in trained} == times
    assert (folder / "metrics.jsonl").read_text() == curves
    assert "Nothing to do: 1 run(s)" in here("train", "small").stdout


@pytest.mark.usefixtures("ray_here")
def test_a_run_that_is_finished_but_not_recorded_needs_no_ray(
    project: Path, here: Callable, monkeypatch: pytest.MonkeyPatch
):
    from pipelines import launch

    experiment(project, "small")
    assert here("train", "small").returncode == 0
    (note,) = (project / "data/runs").glob("*/tracked.json")
    noted = note.read_text()
    note.unlink()

    def no_ray(*_: object) -> None:
        raise AssertionError("nothing is to be trained")

    for name in ("start_ray", "_start", "check_resources"):
        monkeypatch.setattr(launch, name, no_ray)
    done = here("train", "small")
    assert done.returncode == 0, done.stderr
    assert "Nothing to do" not in done.stdout
    assert note.read_text() == noted
    assert list(mlflow_runs(project).values()) == ["FINISHED"]
    assert final(project)


@pytest.mark.usefixtures("ray_here")
def test_a_run_that_was_begun_in_format_1_is_refused_and_nothing_else_is(project: Path, here: Callable):
    from pipelines.flow import prepare

    golden = json.loads((ROOT / "tests/golden/format1/runs/bars-s1111-28b44a7d/best/checkpoint.json").read_text())
    assert "format" not in golden
    keys = read_run(golden, "checkpoint.json").model_dump()
    (project / "experiments/bars.yaml").write_text(yaml_of(keys))
    folder = project / "data/runs/bars-s1111-28b44a7d"
    (folder / "last").mkdir(parents=True)

    def begun(**changes: Any) -> None:
        meta = {**golden, "config": {**golden["config"], **changes}}
        (folder / "last/checkpoint.json").write_text(json.dumps(meta))

    begun()
    done = here("train", "bars")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: data/runs/bars-s1111-28b44a7d: was begun in format 1 and cannot go on in format 2; "
        "delete that folder to train anew\n"
    )
    assert [path.name for path in (project / "data/runs").iterdir()] == [folder.name]
    assert not (project / "mlflow.db").exists()

    # with other settings, with some that no version of today knows, and where it was finished
    for changes in ({"lr": 0.02}, {"options": {"width": 0.0625, "stochastic_depth": 0.1}}):
        begun(**changes)
        prepare(["bars"])
    begun()
    shutil.copy(ROOT / "tests/golden/format1/runs" / folder.name / "summary.json", folder)
    prepare(["bars"])


def test_a_reader_that_leaves_early_ends_the_command_without_a_word(project: Path, server: str):
    """`head -1` is gone after the line on random weights, long before the run is trained and the table is drawn."""
    experiment(project, "vit", **VIT)
    words = f"{BIN / 'fer'} train vit | head -1"
    done = subprocess.run(
        words, shell=True, cwd=project, env=env(PREFECT_API_URL=server), capture_output=True, text=True, timeout=280
    )
    assert done.stdout.startswith("vit: vit_base_patch16_224_in21k starts from random weights; ")
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""
    assert list(mlflow_runs(project).values()) == ["FINISHED"]
    wait_for(lambda: not _workers(project))


def test_without_a_name_the_experiments_are_listed_and_none_is_started(project: Path, here: Callable):
    experiment(project, "small")
    done = here("train")
    assert (done.returncode, done.stderr) == (0, "")
    listed = {line.split()[0] for line in done.stdout.splitlines() if line.strip()}
    names = {path.stem for path in (project / "experiments").iterdir()}
    assert len(names) > 10
    assert names <= listed
    assert "VGG13: Barsoum et al. 2016" in done.stdout  # what it is
    assert not (project / "data/runs").exists()
    assert not (project / "mlflow.db").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "nope"], "experiments/nope.yaml: no such experiment; known: disentangled_doe, "),
        (["train", "vit_se_tny"], "experiments/vit_se_tny.yaml: no such experiment, did you mean 'vit_se_tiny'?"),
        (["train", "epochs=2"], "epochs=2: name the experiment that it is for, of disentangled_doe, "),
        (["train", "doe", "optimizer.lrr=1"], "command line: optimizer.lrr: unknown key of 'adam', did you mean 'lr'?"),
        (["train", "doe", "optimizer.lr=fast"], "command line: optimizer.lr: should be a valid number, got 'fast'"),
        (["train", "doe", "loss=fokal"], "command line: loss.name: unknown loss 'fokal', did you mean 'focal'?"),
        (["train", "doe", "model=vitt"], "command line: model.name: unknown model 'vitt', did you mean 'vit_se'?"),
        (["train", "disentangled_doe", "init_from=x"], "disentangled_doe: init_from: experiments/x.yaml: no such"),
        (["models", "vit_sa"], "experiments/vit_sa.yaml: no such experiment, did you mean 'vit_se'?"),
        (["evaluate", "nope"], "nope: no such run in data/runs; runs: none yet"),
        (["compare"], "data/runs: no finished run; train one with `fer train`"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2_and_leaves_nothing(
    words: list[str], message: str, project: Path, here: Callable
):
    _is_one_line(here(*words), message, project)


@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        (["resources.workers=64"], {}, "vgg13_small: resources: 64 worker(s) need 64 CPUs, there are "),
        (["resources.device=cuda"], {}, "vgg13_small: resources.device: cuda, but no GPU is there; set it to auto or"),
        ([], {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, "tracking.uri: no server answers at http://127.0.0.1:9"),
    ],
)
def test_what_is_not_there_is_told_in_one_line_before_anything_starts(
    words: list[str], environment: dict[str, str], message: str, project: Path, here: Callable, monkeypatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    _is_one_line(here("train", "vgg13_small", *words), message, project)


def test_a_cluster_that_does_not_answer_is_told_in_one_line(project: Path, server: str):
    done = fer(project, "train", "vgg13_small", PREFECT_API_URL=server, RAY_ADDRESS="127.0.0.1:9")
    _is_one_line(done, "RAY_ADDRESS: no cluster answers at 127.0.0.1:9 (", project)


def _is_one_line(done: subprocess.CompletedProcess, message: str, project: Path) -> None:
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(f"error: {message}")
    assert not (project / "data/runs").exists()


@pytest.mark.usefixtures("ray_here")
def test_a_run_that_another_process_trains_is_left_to_it(project: Path, here: Callable):
    run = experiment(project, "small")
    folder = project / "data/runs" / run_id("small", run, open_data(project / "data").hash)
    with held(folder):
        done = here("train", "small")
    assert done.returncode == 2
    assert errors(done) == [f"error: small: another process is training {folder.name}; wait for it or stop it"]
    assert not mlflow_runs(project)


def test_missing_data_and_params_name_the_remedy(tmp_path: Path, here: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    done = here("train", "vgg13_small")
    assert (done.returncode, done.stderr) == (
        2, "error: params.yaml: not found; run the command in the project's root folder\n"
    )  # fmt: skip
    for words in (["train"], ["train", "--all"], ["config"], ["models"]):
        done = here(*words)
        assert (done.returncode, done.stdout) == (2, ""), words
        assert done.stderr.endswith("run the command in the project's root folder\n")
    copy_settings(tmp_path)
    done = here("train", "vgg13_small")
    assert (done.returncode, done.stderr) == (
        2, "error: data/splits/summary.json: not found; make the data with `dvc repro`\n"
    )  # fmt: skip
