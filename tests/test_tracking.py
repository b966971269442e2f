"""MLflow: one run per run id, states that are true, a champion that only improves, no point lost to a dead server."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from conftest import CPU, small_run

from fer.data.dataset import open_data
from fer.errors import UserError
from fer.evaluate import evaluate
from fer.predict import Predictor
from fer.run import Run, run_id
from fer.train import fit
from pipelines import tracking
from pipelines.experiments import Job
from pipelines.processes import process_id
from pipelines.tracking import Tracker, _Follower, final_metrics, flatten, tracking_uri

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]


@pytest.fixture
def tracker(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return Tracker(f"sqlite:///{tmp_path}/mlflow.db", "test")


def facts(data: Path) -> dict:
    opened = open_data(data)
    return {**opened.summary, "hash": opened.hash}


def train(data: Path, tracker: Tracker, name: str = "small", **changes: object) -> Path:
    made = job(data, name, small_run(**{"epochs": 2, **changes}))
    with tracker.record(made, facts(data)):
        fit(name, made.run, CPU, data, data / "runs")
        evaluate(made.folder, data, CPU)
    return made.folder


def job(data: Path, name: str, run: Run) -> Job:
    return Job(name, run, CPU, data / "runs" / run_id(name, run, open_data(data).hash))


def only_run(tracker: Tracker) -> mlflow.entities.Run:
    runs = tracker.client.search_runs([tracker.experiment])
    assert len(runs) == 1
    return runs[0]


def test_a_finished_run_has_its_parameters_metrics_artifacts_and_a_model_that_predicts(data: Path, tracker: Tracker):
    folder = train(data, tracker)
    run, summary = only_run(tracker), json.loads((folder / "summary.json").read_text())
    assert run.info.status == "FINISHED"
    assert run.info.run_name == run.data.tags["fer.run_id"] == folder.name
    assert run.data.params["name"] == "small"
    assert run.data.params["model.name"] == "vgg13"
    assert run.data.params["optimizer.lr"] == "0.01"
    assert run.data.params["augment.flip"] == "0.5"
    assert not [key for key in run.data.params if key.startswith("resources")]  # no part of what the run is
    assert run.data.tags["data_hash"] == summary["data_hash"]
    assert run.data.metrics["final/test_accuracy"] == summary["test"]["accuracy"]
    for part in ("test_unleaked", "test_without_train"):
        assert run.data.metrics[f"final/{part}_accuracy"] == summary[part]["accuracy"]
    assert run.data.metrics["final/val_accuracy"] == summary["val"]["accuracy"]
    history = tracker.client.get_metric_history(run.info.run_id, "val_accuracy")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(point.step, point.value) for point in history] == [(row["epoch"], row["val_accuracy"]) for row in rows]
    files = {file.path for file in tracker.client.list_artifacts(run.info.run_id)}
    assert {"confusion_matrix.png", "predictions_test.csv", "predictions_val.csv", "summary.json"} <= files
    assert run.inputs.dataset_inputs[0].dataset.digest == summary["data_hash"]

    model = mlflow.pyfunc.load_model("models:/fer-bars@champion")
    images = np.load(data / "upscaled" / "images.npy")[:5]
    np.testing.assert_allclose(model.predict(images), Predictor(folder / "best").probabilities(images), atol=1e-6)
    assert "python_function" in model.metadata.flavors
    stored = Path(mlflow.artifacts.download_artifacts("models:/fer-bars@champion"))
    assert not [path for path in stored.rglob("*") if path.suffix in (".pkl", ".pickle")]


def test_recording_a_run_again_makes_no_second_run_version_or_point(data: Path, tracker: Tracker):
    folder = train(data, tracker)
    assert tracker.recorded(folder)
    before = only_run(tracker)
    train(data, tracker)
    after = only_run(tracker)
    assert after.info.status == "FINISHED"
    assert len(tracker.client.get_metric_history(after.info.run_id, "val_accuracy")) == 2
    assert after.data.metrics == before.data.metrics
    assert len(tracker.client.search_model_versions("name = 'fer-bars'")) == 1


def test_a_run_evaluated_anew_gets_its_new_numbers_and_stays_one_run_and_version(data: Path, tracker: Tracker):
    folder = train(data, tracker)
    before, predicted = only_run(tracker), pd.read_csv(folder / "predictions_test.csv")
    wrong = (predicted["label"] != predicted["prediction"]).to_numpy()
    assert 0 < wrong.sum() < len(wrong)
    test = data / "splits" / "test.csv"
    pd.read_csv(test, keep_default_na=False)[wrong].to_csv(test, index=False)
    assert tracker.recorded(folder)
    evaluate(folder, data, CPU)
    assert not tracker.recorded(folder)

    train(data, tracker)
    assert tracker.recorded(folder)
    after = only_run(tracker)
    assert after.info.status == "FINISHED"
    assert before.data.metrics["final/test_accuracy"] > after.data.metrics["final/test_accuracy"] == 0
    assert f"of {wrong.sum()} test images" in after.data.tags["mlflow.note.content"]
    (version,) = tracker.client.search_model_versions("name = 'fer-bars'")
    assert version.run_id == after.info.run_id
    kept = mlflow.artifacts.load_dict(f"{after.info.artifact_uri}/summary.json")
    assert kept == json.loads((folder / "summary.json").read_text())


def test_another_experiment_has_the_run_only_once_it_is_recorded_there(data: Path, tracker: Tracker):
    folder = train(data, tracker)
    other = Tracker(tracker.uri, "other")
    assert tracker.recorded(folder)
    assert not other.recorded(folder)
    train(data, other)
    assert other.recorded(folder)
    assert only_run(other).info.status == "FINISHED"
    assert only_run(other).info.run_id != only_run(tracker).info.run_id


def test_a_note_of_recording_counts_for_its_server_and_experiment_alone(tmp_path: Path, tracker: Tracker):
    note = {"uri": tracker.uri, "experiment": "test", "mlflow_run": "1", "registered": "fer-bars", "version": 1}
    note["finished"] = 12.5
    (tmp_path / "summary.json").write_text(json.dumps({"finished": 12.5}))

    def recorded(text: str) -> bool:
        (tmp_path / "tracked.json").write_text(text)
        return tracker.recorded(tmp_path)

    assert not tracker.recorded(tmp_path)
    assert recorded(json.dumps(note))
    assert not recorded(json.dumps(note | {"uri": "sqlite:////elsewhere/mlflow.db"}))
    assert not recorded(json.dumps(note | {"experiment": "other"}))
    assert not recorded(json.dumps(note | {"finished": 12.0}))  # it was evaluated again since
    for key in ("uri", "experiment", "finished"):
        assert not recorded(json.dumps({name: value for name, value in note.items() if name != key}))
    (tmp_path / "summary.json").unlink()
    assert not recorded(json.dumps(note))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"uri"', '{"uri": ', "\x00", "{}"])
def test_a_broken_note_of_recording_is_none(text: str, tmp_path: Path, tracker: Tracker):
    (tmp_path / "summary.json").write_text(json.dumps({"finished": 12.5}))
    (tmp_path / "tracked.json").write_text(text)
    assert not tracker.recorded(tmp_path)


@pytest.mark.parametrize(
    ("found", "tags"),
    [
        (("ab" * 20, False), {"mlflow.source.git.commit": "ab" * 20}),
        (("ab" * 20, True), {"mlflow.source.git.commit": "ab" * 20 + " (with changes)"}),
        (("ab" * 20, "unknown"), {"mlflow.source.git.commit": "ab" * 20}),
        (("unknown", "unknown"), {}),
    ],
)
def test_a_run_is_tagged_with_the_commit_where_it_is_known(found: tuple, tags: dict[str, str], monkeypatch):
    monkeypatch.setattr(tracking, "repository", lambda: found)
    assert tracking._git_commit() == tags


def test_an_error_ends_the_run_failed_with_its_reason_and_the_next_try_continues_it(data: Path, tracker: Tracker):
    made = job(data, "small", small_run(epochs=2))

    def stop(row: dict) -> None:
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"), tracker.record(made, facts(data)):
        fit("small", made.run, CPU, data, data / "runs", on_epoch=stop)
    assert only_run(tracker).info.status == "FAILED"
    assert only_run(tracker).data.tags["fer.error"] == "power cut"
    assert not tracker.recorded(made.folder)
    train(data, tracker)
    assert only_run(tracker).info.status == "FINISHED"
    assert "fer.error" not in only_run(tracker).data.tags
    assert [p.step for p in tracker.client.get_metric_history(only_run(tracker).info.run_id, "val_loss")] == [1, 2]


def test_a_run_killed_before_its_parameters_were_written_gets_them_on_the_next_try(data: Path, tracker: Tracker):
    ours = job(data, "small", small_run(epochs=2)).folder.name
    tracker.client.create_run(tracker.experiment, run_name=ours, tags={"fer.run_id": ours})
    train(data, tracker)
    assert only_run(tracker).data.params["optimizer.lr"] == "0.01"
    assert only_run(tracker).inputs.dataset_inputs


def test_champion_moves_only_when_val_accuracy_improves(data: Path, tracker: Tracker):
    def version() -> str:
        return tracker.client.get_model_version_by_alias("fer-bars", "champion").tags["fer.run_id"]

    accuracies = {}
    for seed, lr in ((1, 1e-5), (2, 2e-2), (3, 1e-5)):
        folder = train(data, tracker, seed=seed, optimizer={"lr": lr}, epochs=6)
        accuracies[folder.name] = json.loads((folder / "summary.json").read_text())["val"]["accuracy"]
        # on a tie the earlier one stays: max() takes the first
        assert version() == max(accuracies, key=lambda name: accuracies[name])
    values = list(accuracies.values())
    assert values[1] > max(values[0], values[2])  # so the alias moved once, and stayed when the third came
    assert tracker.champions()["fer-bars"]["version"] == "2"


def test_runs_of_dead_processes_are_closed_and_those_of_live_ones_left(data: Path, tracker: Tracker):
    run = small_run()
    live = tracker._open("live-s1-00000000", "live", run, facts(data))
    dead = tracker._open("dead-s1-00000000", "dead", run, facts(data))
    tracker.client.set_tag(dead, "fer.process", "999999999:1")
    assert tracker.close_abandoned() == ["dead-s1-00000000"]
    assert tracker.client.get_run(dead).info.status == "FAILED"
    assert tracker.client.get_run(live).info.status == "RUNNING"


def test_guard_closes_the_runs_of_a_process_that_is_killed(data: Path, tracker: Tracker):
    program = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from conftest import CPU, small_run
from pipelines.experiments import Job
from pipelines.guard import guarded
from pipelines.processes import mark_children
from test_tracking import Tracker, facts
tracker = Tracker({tracker.uri!r}, "test")
data = Path({str(data)!r})
mark_children()
import subprocess
left = subprocess.Popen(["bash", "-c", "env -i sleep 60 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
unmarked = left.stdout.readline().strip()
job = Job("doomed", small_run(), CPU, data / "runs" / "doomed-s1-00000000")
with guarded(tracker.uri, "test"), tracker.record(job, facts(data)):
    print(left.pid, unmarked, flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    left = [int(pid) for pid in process.stdout.readline().split()]
    assert only_run(tracker).info.status == "RUNNING"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 60
    while only_run(tracker).info.status == "RUNNING" and time.monotonic() < deadline:
        time.sleep(0.5)
    assert only_run(tracker).info.status == "FAILED"
    assert [process_id(pid) for pid in left] == [str(pid) for pid in left]  # gone, also one without the mark


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def server(tmp_path: Path):
    """start() -> a real tracking server on 127.0.0.1, always on the same store and port."""
    port, processes = free_port(), []
    command = [Path(sys.executable).parent / "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--workers", "1"]

    def start() -> subprocess.Popen:
        process = subprocess.Popen(
            command, cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        processes.append(process)
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return process
            time.sleep(0.1)
        raise AssertionError("the server did not start")

    start.uri = f"http://127.0.0.1:{port}"  # type: ignore[attr-defined]
    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_server_killed_in_the_middle_costs_no_run_and_no_point(data: Path, tmp_path: Path, server, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.chdir(tmp_path)
    process = server()
    tracker = Tracker(server.uri, "test")
    made = job(data, "small", small_run(epochs=3))

    def kill_in_first(row: dict) -> None:
        if row["epoch"] == 1:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    with (
        pytest.raises(UserError, match="does not answer any more.*safe on disk"),
        tracker.record(made, facts(data)),
    ):
        fit("small", made.run, CPU, data, data / "runs", on_epoch=kill_in_first)
        evaluate(made.folder, data, CPU)
    assert (made.folder / "summary.json").exists()

    server()
    again = Tracker(server.uri, "test")
    with again.record(made, facts(data)):
        pass  # nothing is left to train
    found = only_run(again)
    assert found.info.status == "FINISHED"
    assert [point.step for point in again.client.get_metric_history(found.info.run_id, "val_loss")] == [1, 2, 3]


def test_sending_rows_twice_changes_nothing(data: Path, tracker: Tracker):
    folder = train(data, tracker)
    run_id = only_run(tracker).info.run_id
    assert _Follower(tracker.client, lambda: [(run_id, folder / "metrics.jsonl")]).close()
    assert len(tracker.client.get_metric_history(run_id, "val_accuracy")) == 2


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://127.0.0.1:PORT", "no server answers at"),
        ("./mlruns", "'./mlruns' is no tracking store; give sqlite:///FILE"),
        ("ftp://x", "is no tracking store"),
        ("postgresql://me:secret@127.0.0.1:PORT/x", "no server answers at postgresql://me:***@127.0.0.1:"),
        ("sqlite:////nowhere/mlflow.db", "cannot write /nowhere/mlflow.db (unable to open database file); free some"),
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


def test_flatten_and_final_metrics():
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a.b": 1, "a.c.d": 2, "e": 3}
    part = {"accuracy": 0.5, "balanced_accuracy": 0.4, "macro_f1": 0.3, "ece": 0.1, "recall": [0.5, None]}
    summary = {
        "best_epoch": 3,
        "parameters": 10,
        "classes": ["x", "y"],
        "val": part,
        "test": part,
        "test_unleaked": {**part, "accuracy": 0.25},
        "test_without_train": {"images": 0, "recall": [None, None]},
    }
    values = final_metrics(summary)
    assert values["final/val_accuracy"] == values["final/test_accuracy"] == 0.5
    assert values["final/test_recall_x"] == 0.5
    assert "final/test_recall_y" not in values
    assert values["final/test_unleaked_accuracy"] == 0.25
    assert "final/test_without_train_accuracy" not in values


def test_the_store_is_safe_for_runs_recorded_at_the_same_time(data: Path, tracker: Tracker):
    from concurrent.futures import ThreadPoolExecutor

    finished = [train(data, tracker, seed=seed) for seed in (1, 2, 3, 4)]
    fresh = Tracker(tracker.uri, "again")

    def record(folder: Path) -> None:
        with fresh.record(Job("small", small_run(), CPU, folder), facts(data)):
            pass

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(record, finished))
    runs = fresh.client.search_runs([fresh.experiment])
    assert sorted(run.data.tags["fer.run_id"] for run in runs) == sorted(folder.name for folder in finished)
    assert {run.info.status for run in runs} == {"FINISHED"}
