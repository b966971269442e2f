"""The champion is the best version, whoever registers at the same time and in whichever store."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from conftest import BIN, answers, free_port, wait_for
from mlflow import MlflowClient
from mlflow.models.model import ModelInfo

from pipelines.registry import Registry

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]


@pytest.fixture
def sqlite(tmp_path: Path, empty_store: Path) -> str:
    return f"sqlite:///{shutil.copy(empty_store, tmp_path / 'mlflow.db')}"


@pytest.fixture
def server(sqlite: str, tmp_path: Path) -> Iterator[str]:
    port = free_port()
    command = [BIN / "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "2"]
    process = subprocess.Popen(
        [*command, "--backend-store-uri", sqlite], cwd=tmp_path, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/health"))
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def postgresql() -> Iterator[str]:
    """A cluster of its own, as Debian's package `postgresql` brings it."""
    pytest.importorskip("psycopg", reason="the extra `postgres` is not installed")
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.skip("PostgreSQL is not installed (Debian: `apt-get install postgresql`)")
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:  # not below pytest's, which is closed to other users
        keys: dict[str, Any] = {"check": True, "stdout": subprocess.DEVNULL, "cwd": folder}
        if os.getuid() == 0:  # as whom it refuses to run
            shutil.chown(folder, "postgres")
            keys["user"] = "postgres"
        subprocess.run([programs[-1] / "initdb", "-D", "data", "-A", "trust", "-U", "me", "-N"], **keys)
        control = [programs[-1] / "pg_ctl", "-D", "data", "-w", "-l", "log"]
        subprocess.run([*control, "-o", f"-p {port} -h 127.0.0.1 -k {folder}", "start"], **keys)
        try:
            yield f"postgresql+psycopg://me@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], **keys)


def prepare(uri: str, folder: Path) -> tuple[str, ModelInfo]:
    """A run of MLflow, and a model logged in it."""
    (folder / "weights.txt").write_text("1")
    mlflow.set_tracking_uri(uri)
    client = MlflowClient(uri)
    experiment = client.create_experiment("race", (folder / "artifacts").as_uri())
    run_id = client.create_run(experiment).info.run_id
    with mlflow.start_run(run_id=run_id):
        model = mlflow.pyfunc.log_model(
            name="model", loader_module="json", data_path=str(folder / "weights.txt"), pip_requirements=[]
        )
    return run_id, model


def compete(uri: str, number: int, rounds: int, run_id: str, model: ModelInfo, met: Any) -> None:
    """Promote a version in each round, at the same time as the others; the best one comes from each in turn."""
    mlflow.set_tracking_uri(uri)
    registry = Registry(MlflowClient(uri))
    for turn in range(rounds):
        met.wait(120)
        accuracy = 0.9 if turn % 2 == number % 2 else 0.5
        registry.add(f"fer-{turn}", run_id, model, {"val_accuracy": f"{accuracy:.6f}", "by": str(number)}, "")
        registry.crown(f"fer-{turn}")


def worse(uri: str, rounds: int, many: int) -> dict[str, str]:
    """Names -> accuracy of the champion, where that is not the best, or where a version is missing."""
    client, found = MlflowClient(uri), {}
    for name in [f"fer-{turn}" for turn in range(rounds)]:
        champion = client.get_model_version_by_alias(name, "champion").tags["val_accuracy"]
        if champion != "0.900000" or len(client.search_model_versions(f"name = '{name}'")) != many:
            found[name] = champion
    return found


def test_the_better_of_two_that_are_promoted_at_once_is_champion(sqlite: str, tmp_path: Path) -> None:
    run_id, model = prepare(sqlite, tmp_path)
    met, failed = threading.Barrier(2), list[BaseException]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", lambda about: failed.append(about.exc_value))
        threads = [
            threading.Thread(target=compete, args=(sqlite, number, 5, run_id, model, met)) for number in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failed == []
    assert worse(sqlite, 5, 2) == {}


def test_whoever_moves_the_alias_last_has_seen_the_others(
    sqlite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The better version is added and promoted between the moment another process looks and that when it moves it."""
    run_id, model = prepare(sqlite, tmp_path)
    client = MlflowClient(sqlite)
    first, second = Registry(client), Registry(MlflowClient(sqlite))
    move = client.set_registered_model_alias

    def late(*where: str) -> None:
        monkeypatch.setattr(client, "set_registered_model_alias", move)
        second.add("fer-x", run_id, model, {"val_accuracy": "0.9"}, "")
        second.crown("fer-x")
        move(*where)

    monkeypatch.setattr(client, "set_registered_model_alias", late)
    first.add("fer-x", run_id, model, {"val_accuracy": "0.5"}, "")
    first.crown("fer-x")
    assert first.champions()["fer-x"]["version"] == "2"


def test_the_first_of_two_equals_is_champion_and_versions_of_others_are_none_of_ours(
    sqlite: str, tmp_path: Path
) -> None:
    run_id, model = prepare(sqlite, tmp_path)
    client = MlflowClient(sqlite)
    registry = Registry(client)
    found = []
    for accuracy in ("0.500000", "0.700000", None, "0.700000", "0.600000"):
        registry.add("fer-x", run_id, model, {"val_accuracy": accuracy} if accuracy else {}, "")
        registry.crown("fer-x")
        found.append(registry.champions()["fer-x"]["version"])
    assert found == ["1", "2", "2", "2", "2"]
    client.delete_model_version("fer-x", "2")
    registry.crown("fer-x")
    assert registry.champions()["fer-x"]["version"] == "4"


@pytest.mark.soak
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("store", ["sqlite", "server", "postgresql"])
def test_the_better_one_of_two_processes_is_champion(
    store: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """In 200 rounds."""
    uri: str = request.getfixturevalue(store)
    run_id, model = prepare(uri, tmp_path)
    processes = multiprocessing.get_context("spawn")
    met = processes.Barrier(2)
    started = [processes.Process(target=compete, args=(uri, number, 200, run_id, model, met)) for number in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0, 0]
    assert worse(uri, 200, 2) == {}


def open_at_once(uri: str, met: Any) -> None:
    from pipelines.tracking import Tracker

    met.wait(120)
    Tracker(uri, "new")


@pytest.mark.soak
def test_three_processes_open_an_empty_postgresql_at_once(postgresql: str) -> None:
    processes = multiprocessing.get_context("spawn")
    met = processes.Barrier(3)
    started = [processes.Process(target=open_at_once, args=(postgresql, met)) for _ in range(3)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0, 0, 0]
    assert MlflowClient(postgresql).get_experiment_by_name("new") is not None
