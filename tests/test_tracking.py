"""MLflow: one run per run id, states that are true, a champion that only improves, no point lost to a dead server."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from conftest import BIN, CLASSES, CPU, answers, free_port, leave_of_test, make_data, small_run, wait_for

from fer.data.dataset import open_data
from fer.errors import UserError
from fer.evaluate import evaluate
from fer.predict import Predictor
from fer.signals import Stopped
from fer.train import fit
from pipelines import tracking
from pipelines.experiments import Job
from pipelines.processes import process_id
from pipelines.store import tracking_uri
from pipelines.tracking import Tracker, final_metrics

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and beside them a run of two epochs, evaluated."""
    data = make_data(tmp_path_factory.mktemp("bars") / "data")
    folder = fit("small", small_run(epochs=2), CPU, data, data / "runs")
    evaluate(folder, data, CPU)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """The finished run, with data of its own."""
    shutil.copytree(finished.parents[1], tmp_path / "data")
    return tmp_path / "data/runs" / finished.name


@pytest.fixture
def tracker(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return Tracker(f"sqlite:///{tmp_path}/mlflow.db", "test")


def facts(data: Path) -> dict[str, Any]:
    opened = open_data(data)
    return {**opened.summary, "hash": opened.hash}


def job(folder: Path) -> Job:
    return Job("small", small_run(epochs=2), CPU, folder)


def record(tracker: Tracker, folder: Path, inside: Callable[[], object] = lambda: None) -> None:
    """What the flow does around a run, which is in `folder` or written there `inside`."""
    with tracker.record(job(folder), facts(folder.parents[1])):
        inside()


def copy(folder: Path, number: int, accuracy: float | None = None) -> Path:
    """Another finished run like this one, with that val accuracy."""
    other = folder.with_name(f"small-s{number}-00000000")
    shutil.copytree(folder, other)
    summary = json.loads((other / "summary.json").read_text()) | {"run_id": other.name}
    summary["val"]["accuracy"] = accuracy or summary["val"]["accuracy"]
    (other / "summary.json").write_text(json.dumps(summary))
    return other


def only_run(tracker: Tracker) -> mlflow.entities.Run:
    (run,) = tracker.client.search_runs([tracker.experiment])
    return run


def points(tracker: Tracker, key: str = "val_accuracy") -> list[tuple[int, float]]:
    return [(p.step, p.value) for p in tracker.client.get_metric_history(only_run(tracker).info.run_id, key)]


def raising(error: BaseException) -> Callable[[], None]:
    def inside() -> None:
        raise error

    return inside


def test_a_finished_run_has_its_parameters_metrics_artifacts_and_a_model_that_predicts(folder: Path, tracker: Tracker):
    """Recorded again, it gets no second run, version or point; another experiment has it once it is recorded there."""
    data, summary = folder.parents[1], json.loads((folder / "summary.json").read_text())
    for content, path in ((open_data(data).summary, data / "splits/summary.json"), (summary, folder / "summary.json")):
        content.get("data", content)["super_resolution"] = {
            "method": "lanczos", "scale": 2, "raw_shape": [8, 8], "restored": {"lanczos": {"psnr": 26.9}},
        }  # fmt: skip
        path.write_text(json.dumps(content))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert not tracker.recorded(folder)
    for _ in range(2):
        record(tracker, folder)
        run = only_run(tracker)
        assert run.info.status == "FINISHED"
        assert points(tracker) == [(row["epoch"], row["val_accuracy"]) for row in rows]
        (version,) = tracker.client.search_model_versions("name = 'fer-bars'")
        assert tracker.recorded(folder)
    assert run.info.run_name == run.data.tags["fer.run_id"] == folder.name
    params = {
        "experiment": "small", "model.name": "vgg13", "optimizer.lr": "0.01", "data.dataset": "bars",
        "split.label_mode": "majority", "super_resolution.method": "lanczos", "super_resolution.scale": "2",
    }  # fmt: skip
    assert params.items() <= run.data.params.items()
    left_out = ("resources", "augment", "super_resolution.r")  # no part of it, defaults, measurements
    assert not [key for key in run.data.params if key.startswith(left_out)]
    tags = {"experiment": "small", "data_hash": summary["data_hash"], "mlflow.note.content": version.description}
    assert tags.items() <= run.data.tags.items()
    assert "upscaled by lanczos x2" in version.description
    metrics = {f"final/{part}_accuracy": summary[part]["accuracy"] for part in ("val", "test", "test_unleaked")}
    assert (metrics | {"best_val_accuracy": summary["val"]["accuracy"]}).items() <= run.data.metrics.items()
    assert {"train/lr", "train/seconds"} <= run.data.metrics.keys()
    final = tracker.client.get_metric_history(run.info.run_id, "final/test_accuracy")
    assert {point.step for point in final} == {0}  # drawn as a bar
    files = {file.path for file in tracker.client.list_artifacts(run.info.run_id)}
    assert {"confusion_matrix.png", "predictions_test.csv", "predictions_val.csv", "summary.json"} <= files
    inputs = {each.tags[0].value: each.dataset.digest for each in run.inputs.dataset_inputs}
    assert inputs == {key: f"{summary['data_hash']}-{key}" for key in ("train", "val", "test")}

    model = mlflow.pyfunc.load_model("models:/fer-bars@champion")
    images = np.load(data / "upscaled" / "images.npy")[:5]
    served = model.predict(images)
    assert list(served.columns) == CLASSES
    np.testing.assert_allclose(served, Predictor(folder / "best").probabilities(images), atol=1e-6)
    stored = Path(mlflow.artifacts.download_artifacts("models:/fer-bars@champion"))
    assert not [path for path in stored.rglob("*") if path.suffix in (".pkl", ".pickle")]

    other = Tracker(tracker.uri, "other")
    other.client.create_run(other.experiment, tags={"fer.run_id": folder.name})  # killed before it had parameters
    assert not other.recorded(folder)
    record(other, folder)
    assert other.recorded(folder)
    assert only_run(other).data.params["optimizer.lr"] == "0.01"
    assert only_run(other).info.run_id != only_run(tracker).info.run_id
    other.client.delete_run(only_run(other).info.run_id)  # what the server has lost is recorded again
    assert not other.recorded(folder)
    record(other, folder)
    assert other.recorded(folder)


def test_a_run_evaluated_anew_gets_its_new_numbers_and_stays_one_run_and_version(folder: Path, tracker: Tracker):
    record(tracker, folder)
    predicted = pd.read_csv(folder / "predictions_test.csv")
    wrong = (predicted["label"] != predicted["prediction"]).to_numpy()
    leave_of_test(folder.parents[1], wrong)
    evaluate(folder, folder.parents[1], CPU)
    assert not tracker.recorded(folder)
    record(tracker, folder)
    assert tracker.recorded(folder)
    after = only_run(tracker)
    assert after.data.metrics["final/test_accuracy"] == 0
    assert f"of {wrong.sum()} test images" in after.data.tags["mlflow.note.content"]
    (version,) = tracker.client.search_model_versions("name = 'fer-bars'")
    assert version.run_id == after.info.run_id
    kept = mlflow.artifacts.load_dict(f"{after.info.artifact_uri}/summary.json")
    assert kept == json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize(
    ("found", "commit"), [(("ab" * 20, True), "ab" * 20 + " (with changes)"), (("unknown", "unknown"), None)]
)
def test_a_run_is_tagged_with_the_commit_where_it_is_known(
    found: tuple, commit: str | None, folder: Path, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tracking, "repository", lambda: found)
    with pytest.raises(Stopped):
        record(tracker, folder, raising(Stopped("stopped in epoch 2; run the same command to resume")))
    run = only_run(tracker)
    assert run.data.tags.get("mlflow.source.git.commit") == commit
    assert run.info.status == "KILLED"  # as a person stopped it
    assert run.data.tags["fer.error"] == "stopped in epoch 2; run the same command to resume"


def test_an_error_ends_the_run_failed_with_its_reason_and_the_next_try_continues_it(folder: Path, tracker: Tracker):
    rows = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(rows.splitlines(keepends=True)[0])
    with pytest.raises(RuntimeError, match="power cut"):
        record(tracker, folder, raising(RuntimeError("power cut\nat night")))
    run = only_run(tracker)
    assert (run.info.status, run.data.tags["fer.error"], len(points(tracker))) == ("FAILED", "power cut", 1)
    assert not tracker.recorded(folder)
    record(tracker, folder, lambda: (folder / "metrics.jsonl").write_text(rows))
    assert only_run(tracker).info.status == "FINISHED"
    assert "fer.error" not in only_run(tracker).data.tags
    assert [step for step, _ in points(tracker)] == [1, 2]


def test_after_leave_a_thread_that_still_runs_writes_nothing_more(folder: Path, tracker: Tracker):
    """The signal handler closes the runs; their threads end at about the same time, each in its own way."""

    def stopped() -> None:
        tracker.leave()
        raise RuntimeError("too late to be told")

    with pytest.raises(RuntimeError):
        record(tracker, folder, stopped)
    run = only_run(tracker)
    assert (run.info.status, run.data.tags["fer.error"]) == ("KILLED", "stopped; the same command resumes it")


def test_a_deleted_experiment_is_one_line(tracker: Tracker):
    tracker.client.delete_experiment(tracker.experiment)
    with pytest.raises(UserError) as caught:
        Tracker(tracker.uri, "test")
    assert str(caught.value) == (
        f"tracking.experiment: 'test' was deleted; bring it back with `mlflow experiments restore --experiment-id "
        f"{tracker.experiment}` or name another one"
    )


def test_champion_moves_only_when_val_accuracy_improves(folder: Path, tracker: Tracker):
    champions = []
    for number, accuracy in enumerate((0.5, 0.6, 0.6, 0.4), 1):
        record(tracker, copy(folder, number, accuracy))
        champions.append(tracker.registry.champions()["fer-bars"])
    assert [found["fer.run_id"].split("-")[1] for found in champions] == ["s1", "s2", "s2", "s2"]
    assert (champions[-1]["version"], champions[-1]["val_accuracy"]) == ("2", "0.600000")


def test_the_store_is_safe_for_runs_recorded_at_the_same_time(folder: Path, tracker: Tracker):
    folders = [copy(folder, number) for number in (1, 2, 3, 4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda one: record(tracker, one), folders))
    runs = tracker.client.search_runs([tracker.experiment])
    found = [(run.data.tags["fer.run_id"], run.info.status) for run in runs]
    assert sorted(found) == [(one.name, "FINISHED") for one in folders]


def test_runs_of_dead_processes_are_closed_and_those_of_live_ones_left(folder: Path, tracker: Tracker):
    live, dead = copy(folder, 1), copy(folder, 2)

    def status(name: str) -> str:
        (run,) = tracker.client.search_runs([tracker.experiment], f"tags.`fer.run_id` = '{name}'")
        return run.info.status

    def inside() -> None:
        (run,) = tracker.client.search_runs([tracker.experiment], f"tags.`fer.run_id` = '{dead.name}'")
        tracker.client.set_tag(run.info.run_id, "fer.process", "999999999:1")
        assert tracker.close_abandoned() == [dead.name]
        assert (status(live.name), status(dead.name)) == ("RUNNING", "FAILED")

    with ThreadPoolExecutor(1) as other:  # as a flow's tasks
        record(tracker, live, lambda: other.submit(record, tracker, dead, inside).result())


def test_guard_closes_the_runs_of_a_process_that_is_killed(folder: Path, tracker: Tracker):
    program = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from pipelines.guard import close_runs, guarded
from test_tracking import Tracker, record
tracker = Tracker({tracker.uri!r}, "test")
import subprocess
with guarded():
    left = subprocess.Popen(["bash", "-c", "env -i sleep 600 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
    unmarked = left.stdout.readline().strip()
    close_runs(tracker.uri, "test")
    record(tracker, Path({str(folder)!r}), lambda: (print(left.pid, unmarked, flush=True), time.sleep(600)))
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    left = [int(pid) for pid in process.stdout.readline().split()]
    assert only_run(tracker).info.status == "RUNNING"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_for(lambda: only_run(tracker).info.status == "FAILED")
    wait_for(lambda: [process_id(pid) for pid in left] == [str(pid) for pid in left])  # also one without the mark


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Callable]:
    """start() -> address and process of a real tracking server on 127.0.0.1, always on the same store and port."""
    port, processes = free_port(), []
    command = [BIN / "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db"]

    def start() -> tuple[str, subprocess.Popen]:
        process = subprocess.Popen(
            command, cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        processes.append(process)
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/health"))
        return f"http://127.0.0.1:{port}", process

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_server_killed_in_the_middle_costs_no_run_and_no_point(
    folder: Path, tmp_path: Path, server: Callable, empty_store: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, tmp_path / "server.db")
    uri, process = server()

    def kill() -> None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    with pytest.raises(UserError, match="no longer answers; .*safe on disk"):
        record(Tracker(uri, "test"), folder, kill)
    server()
    again = Tracker(uri, "test")
    assert only_run(again).info.status == "RUNNING"
    record(again, folder)
    assert only_run(again).info.status == "FINISHED"
    assert [step for step, _ in points(again)] == [1, 2]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://127.0.0.1:PORT", "no server answers at"),
        ("./mlruns", "'./mlruns' is no tracking store; use sqlite:///FILE"),
        ("sqlite:////nowhere/mlflow.db", "cannot write /nowhere/mlflow.db (unable to open database file); set MLF"),
    ],
)
def test_a_tracking_uri_that_cannot_work_is_one_line(uri: str, message: str):
    with pytest.raises(UserError, match="tracking.uri") as caught:
        Tracker(uri.replace("PORT", str(free_port())), "test")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_environment_wins_over_params_and_sqlite_paths_become_absolute(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tracking_uri("sqlite:///mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking_uri("sqlite:///mlflow.db") == "http://127.0.0.1:5000"


def test_final_metrics():
    part = {"accuracy": 0.5, "balanced_accuracy": 0.4, "macro_f1": 0.3, "ece": 0.1, "recall": [0.5, None]}
    summary = {
        "best_epoch": 3, "parameters": 10, "classes": ["x", "y"], "val": part, "test": part,
        "test_unleaked": {**part, "accuracy": 0.25}, "test_without_train": {"images": 0, "recall": [None, None]},
    }  # fmt: skip
    values = final_metrics(summary)
    assert values["final/val_accuracy"] == values["final/test_accuracy"] == values["final/test_recall_x"] == 0.5
    assert values["final/test_unleaked_accuracy"] == 0.25
    assert not {"final/test_recall_y", "final/test_without_train_accuracy"} & values.keys()
