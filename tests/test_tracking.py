"""MLflow: one run per run id, states that are true, a champion that only improves, no point lost to a dead server."""

import json
import math
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from conftest import BIN, CLASSES, CPU, answers, free_port, leave_of_test, make_data, refusal, small_run, wait_for
from mlflow.exceptions import MlflowException

from fer.data.dataset import DataSet, open_data
from fer.errors import UserError
from fer.evaluate import evaluate
from fer.predict import Predictor
from fer.signals import Stopped
from fer.train import NonFiniteLoss, fit
from pipelines import tracking
from pipelines.experiments import Job
from pipelines.processes import process_id
from pipelines.recorded import final_metrics
from pipelines.store import tracking_uri
from pipelines.tracking import Tracker, described

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and beside them a run of two epochs, evaluated."""
    data = make_data(tmp_path_factory.mktemp("bars") / "data")
    folder = fit("small", small_run(epochs=2), CPU, data, data / "runs")
    evaluate(folder, data, CPU)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The finished run, with data of its own, in the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished.parents[1], tmp_path / "data")
    return tmp_path / "data/runs" / finished.name


@pytest.fixture
def tracker(folder: Path, tmp_path: Path, empty_store: Path) -> Tracker:
    return Tracker(f"sqlite:///{shutil.copy(empty_store, tmp_path / 'mlflow.db')}", "test")


def record(tracker: Tracker, folder: Path, inside: Callable[[], object] = lambda: None) -> None:
    """What the flow does around a run, which is in `folder` or written there `inside`."""
    opened = open_data(folder.parents[1])
    with tracker.record(Job("small", small_run(epochs=2), CPU, opened.folder, folder), described(opened)):
        inside()


def copy(folder: Path, number: int, accuracy: float = 0.5) -> Path:
    """Another finished run like this one, with that val accuracy."""
    other = folder.with_name(f"small-s{number}-00000000")
    shutil.copytree(folder, other)
    summary = json.loads((other / "summary.json").read_text()) | {"run_id": other.name}
    summary["val"]["accuracy"] = accuracy
    (other / "summary.json").write_text(json.dumps(summary))
    return other


def only_run(tracker: Tracker) -> mlflow.entities.Run:
    (run,) = tracker.client.search_runs([tracker.experiment])
    return run


def statuses(tracker: Tracker) -> dict[str, str]:
    runs = tracker.client.search_runs([tracker.experiment])
    assert len({run.data.tags["fer.run_id"] for run in runs}) == len(runs)
    return {run.data.tags["fer.run_id"]: run.info.status for run in runs}


def points(tracker: Tracker) -> list[tuple[int, float]]:
    history = tracker.client.get_metric_history(only_run(tracker).info.run_id, "val_accuracy")
    return [(point.step, point.value) for point in history]


def test_a_project_that_was_moved(folder: Path, tmp_path: Path, empty_store: Path) -> None:
    """MLflow would go on writing where it was; with a link there, it writes to where it is now."""
    here, there = tmp_path / "moved", tmp_path / "project"
    files = here / "mlruns/a%20b"
    files.mkdir(parents=True)
    uri = f"sqlite:///{shutil.copy(empty_store, here / 'mlflow.db')}"
    mlflow.MlflowClient(uri).create_experiment("a b", (there / "mlruns/a%20b").as_uri())  # as it was made there
    told = f"'a b' in {there}/mlruns/a%20b, which is gone; if the project was moved, `ln -s {here} {there}`, else name"
    assert told in refusal(Tracker, uri, "a b")
    there.symlink_to(here)
    record(Tracker(uri, "a b"), folder)
    assert [*files.glob("*/artifacts")]


def test_a_finished_run_has_its_parameters_metrics_artifacts_and_a_model_that_predicts(folder: Path, tracker: Tracker):
    """Recorded or evaluated again, it gets no second run, version or point."""
    data, summary = folder.parents[1], json.loads((folder / "summary.json").read_text())
    method = {"method": "lanczos", "scale": 2, "raw_shape": [8, 8], "restored": {"lanczos": {"psnr": 26.9}}}
    for content, path in ((open_data(data).summary, data / "splits/summary.json"), (summary, folder / "summary.json")):
        content.get("data", content)["super_resolution"] = method
        path.write_text(json.dumps(content))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for _ in range(2):
        record(tracker, folder)
        assert statuses(tracker) == {folder.name: "FINISHED"}
        assert points(tracker) == [(row["epoch"], row["val_accuracy"]) for row in rows]
        (version,) = tracker.client.search_model_versions("name = 'fer-data'")
        assert tracker.recorded(folder)
    run, params = only_run(tracker), only_run(tracker).data.params
    expected = {
        "experiment": "small", "model.name": "vgg13", "optimizer.lr": "0.01", "data.dataset": "bars",
        "split.label_mode": "majority", "super_resolution.method": "lanczos", "super_resolution.scale": "2",
    }  # fmt: skip
    assert expected.items() <= params.items()
    # no part of it, defaults, measurements
    assert not [key for key in params if key.startswith(("resources", "augment", "super_resolution.r"))]
    tags = {"experiment": "small", "data_hash": summary["data_hash"], "mlflow.note.content": version.description}
    assert tags.items() <= run.data.tags.items()
    assert (run.info.run_name, "upscaled by lanczos x2" in version.description) == (folder.name, True)
    metrics = {f"final/{part}_accuracy": summary[part]["accuracy"] for part in ("val", "test", "test_unleaked")}
    assert (metrics | {"best_val_accuracy": summary["val"]["accuracy"]}).items() <= run.data.metrics.items()
    assert {"train/lr", "train/seconds"} <= run.data.metrics.keys()
    final = tracker.client.get_metric_history(run.info.run_id, "final/test_accuracy")
    assert {point.step for point in final} == {0}  # drawn as a bar
    files = {file.path for file in tracker.client.list_artifacts(run.info.run_id)}
    assert {"confusion_matrix.png", "predictions_test.csv", "predictions_val.csv", "summary.json"} <= files
    inputs = {each.tags[0].value: each.dataset.digest for each in run.inputs.dataset_inputs}
    hashes = {"train": summary["data_hash"], "val": summary["data_hash"], "test": summary["test_hash"]}
    assert inputs == {split: f"{digest}-{split}" for split, digest in hashes.items()}

    images = np.load(data / "upscaled" / "images.npy")[:5]
    served = mlflow.pyfunc.load_model("models:/fer-data@champion").predict(images)
    assert list(served.columns) == CLASSES
    np.testing.assert_allclose(served, Predictor(folder / "best").probabilities(images), atol=1e-6)
    stored = Path(mlflow.artifacts.download_artifacts("models:/fer-data@champion"))
    assert not [path for path in stored.rglob("*") if path.suffix in (".pkl", ".pickle")]

    predicted = pd.read_csv(folder / "predictions_test.csv")
    wrong = (predicted["label"] != predicted["prediction"]).to_numpy()
    leave_of_test(data, wrong)
    evaluate(folder, data, CPU)
    assert not tracker.recorded(folder)
    record(tracker, folder)
    assert tracker.recorded(folder)
    after = only_run(tracker)
    assert after.data.metrics["final/test_accuracy"] == 0
    assert f"of {wrong.sum()} test images" in after.data.tags["mlflow.note.content"]
    (version,) = tracker.client.search_model_versions("name = 'fer-data'")
    kept = mlflow.artifacts.load_dict(f"{after.info.artifact_uri}/summary.json")
    assert (version.run_id, kept) == (run.info.run_id, json.loads((folder / "summary.json").read_text()))


def test_a_run_that_the_server_has_lost_is_recorded_again(folder: Path, tracker: Tracker):
    tracker.client.create_run(tracker.experiment, tags={"fer.run_id": folder.name})  # killed before it had parameters
    for lost in (True, False):
        assert not tracker.recorded(folder)
        record(tracker, folder)
        assert tracker.recorded(folder)
        assert only_run(tracker).data.params["optimizer.lr"] == "0.01"
        if lost:
            tracker.client.delete_run(only_run(tracker).info.run_id)
    assert not Tracker(tracker.uri, "other").recorded(folder)
    tracker.client.delete_experiment(tracker.experiment)
    assert refusal(Tracker, tracker.uri, "test") == (
        f"tracking.experiment: 'test' was deleted; bring it back with `mlflow experiments restore --experiment-id "
        f"{tracker.experiment}` or name another one"
    )


def test_a_run_that_ends_early_has_its_reason_and_commit_and_the_next_try_continues_it(
    folder: Path, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
):
    rows = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(rows.splitlines(keepends=True)[0])

    def too_late() -> None:  # a signal handler closes the runs; their threads end at about the same time
        tracker.leave()
        raise RuntimeError("too late to be told")

    def raising(error: BaseException) -> Callable[[], object]:
        return lambda: (_ for _ in ()).throw(error)

    stopped, left = "stopped in epoch 2; run the same command to resume", "stopped; the same command resumes it"
    for found, commit, inside, end in (
        (("unknown", "unknown"), None, raising(Stopped(stopped)), ("KILLED", stopped)),
        (("ab" * 20, True), "ab" * 20 + " (with changes)", raising(RuntimeError("cut\nat night")), ("FAILED", "cut")),
        (("ab" * 20, False), "ab" * 20, too_late, ("KILLED", left)),
    ):
        monkeypatch.setattr(tracking, "repository", lambda found=found: found)
        with pytest.raises((Stopped, RuntimeError)):
            record(tracker, folder, inside)
        run = only_run(tracker)
        assert (run.info.status, run.data.tags["fer.error"], len(points(tracker))) == (*end, 1)
        assert run.data.tags.get("mlflow.source.git.commit") == commit
        assert not tracker.recorded(folder)
    again = Tracker(tracker.uri, "test")  # by the next command, as no run begins in a process that leaves
    sent, send = list[str](), again.client.log_batch

    def log_batch(run_id: str, metrics: Sequence[mlflow.entities.Metric] = (), **more: Any) -> None:
        sent.extend(metric.key for metric in metrics)
        send(run_id, metrics=metrics, **more)

    monkeypatch.setattr(again.client, "log_batch", log_batch)
    record(again, folder, lambda: (folder / "metrics.jsonl").write_text(rows))
    order = [key for key in sent if key in ("val_accuracy", "final/test_accuracy")]
    assert order == ["val_accuracy", "val_accuracy", "final/test_accuracy"]
    assert statuses(tracker) == {folder.name: "FINISHED"}
    assert "fer.error" not in only_run(tracker).data.tags
    assert [step for step, _ in points(tracker)] == [1, 2]


def test_runs_may_be_recorded_at_the_same_time_and_the_best_is_champion(folder: Path, tracker: Tracker):
    folders = [copy(folder, number, accuracy) for number, accuracy in enumerate((0.5, 0.6, 0.55, 0.4))]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda one: record(tracker, one), folders))
    assert statuses(tracker) == dict.fromkeys([one.name for one in folders], "FINISHED")
    champion = tracker.registry.champions()["fer-data"]
    assert (champion["fer.run_id"], champion["val_accuracy"]) == (folders[1].name, "0.600000")


def test_runs_of_dead_processes_are_closed_and_those_of_live_ones_left(folder: Path, tracker: Tracker):
    live, dead = copy(folder, 1), copy(folder, 2)

    def inside() -> None:
        (run,) = tracker.client.search_runs([tracker.experiment], f"tags.`fer.run_id` = '{dead.name}'")
        tracker.client.set_tag(run.info.run_id, "fer.process", "999999999:1")
        tracker.close_abandoned()
        assert statuses(tracker) == {live.name: "RUNNING", dead.name: "FAILED"}

    with ThreadPoolExecutor(1) as other:  # as a flow's tasks
        record(tracker, live, lambda: other.submit(record, tracker, dead, inside).result())


def test_a_run_that_waits_in_another_command_is_not_taken_over(folder: Path, tracker: Tracker):
    """It has no lock yet; the process that runs this one stands for the other command."""
    other = process_id(os.getppid())

    def inside() -> None:
        tracker.client.set_tag(only_run(tracker).info.run_id, "fer.process", other)
        told = f"{folder.name}: another process ({os.getppid()}) is training it; wait for it or stop it"
        assert refusal(record, tracker, folder) == told
        assert statuses(tracker) == {folder.name: "RUNNING"}
        assert "fer.error" not in only_run(tracker).data.tags

    record(tracker, folder, inside)
    assert statuses(tracker) == {folder.name: "FINISHED"}


def test_a_run_of_a_container_that_was_killed_is_resumed(folder: Path, tracker: Tracker):
    """Of another pid namespace, whose processes are not seen from here, with the same host name."""
    record(tracker, folder)
    run_id = only_run(tracker).info.run_id
    pid, start, boot, _, machine = process_id(os.getpid()).split(":")
    tracker.client.set_tag(run_id, "fer.process", f"{pid}:{start}:{boot}:4026500000:{machine}")
    tracker.client.update_run(run_id, status="RUNNING")
    record(tracker, folder)
    assert statuses(tracker) == {folder.name: "FINISHED"}


def test_an_evaluation_anew_reaches_the_version(folder: Path, tracker: Tracker):
    record(tracker, folder)
    summary = json.loads((folder / "summary.json").read_text())
    summary["test"]["accuracy"] = 0.125
    summary["test"]["recall"][3] = None  # no image of that class is left
    del summary["test_unleaked"]["accuracy"]
    summary["finished"] += 1
    (folder / "summary.json").write_text(json.dumps(summary))
    record(tracker, folder)
    metrics = only_run(tracker).data.metrics
    gone = {key for key, value in metrics.items() if math.isnan(value)}
    assert gone == {f"final/test_recall_{summary['classes'][3]}", "final/test_unleaked_accuracy"}
    assert metrics["final/test_accuracy"] == 0.125
    (version,) = tracker.client.search_model_versions("name = 'fer-data'")
    assert version.tags["test_accuracy"] == "0.125000"
    assert "**12.50 %**" in version.description


def test_a_point_that_mlflow_did_not_take_is_no_finished_run(
    folder: Path, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
):
    send, locked = tracker.client.log_batch, MlflowException("database is locked")

    def log_batch(run_id: str, metrics: Sequence[mlflow.entities.Metric] = (), **more: Any) -> None:
        if any(metric.key == "val_accuracy" for metric in metrics):
            raise locked
        send(run_id, metrics=metrics, **more)

    monkeypatch.setattr(tracker.client, "log_batch", log_batch)
    told = "no longer answers, or refuses .database is locked.; the runs are safe on disk"
    with pytest.raises(UserError, match=told):
        record(tracker, folder)
    assert statuses(tracker) == {folder.name: "FAILED"}
    assert not tracker.recorded(folder)
    monkeypatch.setattr(tracker.client, "log_batch", send)
    record(tracker, folder)
    assert [step for step, _ in points(tracker)] == [1, 2]


def test_what_a_run_says_counts_more_than_what_mlflow_says_then(
    folder: Path, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
):
    def diverges() -> None:
        monkeypatch.setattr(tracker.client, "set_tag", refuses)
        raise NonFiniteLoss("loss is nan")

    def refuses(*_: object) -> None:
        raise MlflowException("disk is full")

    with pytest.raises(NonFiniteLoss, match="^loss is nan$"):
        record(tracker, folder, diverges)


def test_the_test_split_of_a_run_has_counts_of_its_own(folder: Path, tracker: Tracker):
    """Those who correct test alone have the same training data."""
    data = open_data(folder.parents[1])
    before = [one.dataset for one in tracking._data_inputs(described(data))]
    splits = dict(data.splits | {"test": replace(data.split("test"), rows=data.split("test").rows[::-1])})
    after = [
        one.dataset for one in tracking._data_inputs(described(DataSet(data.folder, data.images, data.summary, splits)))
    ]
    assert [one.digest == other.digest for one, other in zip(before, after)] == [True, True, False]


def test_a_server_killed_in_the_middle_costs_no_run_and_no_point(
    folder: Path, tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    shutil.copy(empty_store, tmp_path / "server.db")
    port, processes = free_port(), list[subprocess.Popen]()
    command = [BIN / "mlflow", "server", "--port", str(port), "--workers", "1"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

    def start() -> Tracker:
        of = [*command, "--backend-store-uri", f"sqlite:///{tmp_path}/server.db"]
        processes.append(subprocess.Popen(of, start_new_session=True, **quiet))
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/health"))
        return Tracker(f"http://127.0.0.1:{port}", "test")

    def kill() -> None:
        os.killpg(processes[-1].pid, signal.SIGKILL)
        processes[-1].wait()

    with pytest.raises(UserError, match="no longer answers, or refuses .*; the runs are safe on disk"):
        record(start(), folder, kill)
    again = start()
    try:
        assert statuses(again) == {folder.name: "RUNNING"}
        record(again, folder)
        assert statuses(again) == {folder.name: "FINISHED"}
        assert [step for step, _ in points(again)] == [1, 2]
    finally:
        kill()


def test_environment_wins_over_params_and_sqlite_paths_become_absolute(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tracking_uri("sqlite:///mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking_uri("sqlite:///mlflow.db") == "http://127.0.0.1:5000"


def test_final_metrics():
    part: dict[str, Any] = {"accuracy": 0.5, "recall": [0.5, None]}
    summary = {
        "best_epoch": 3, "parameters": 10, "classes": ["x", "y"], "val": part, "test": part,
        "test_unleaked": {"accuracy": 0.25}, "test_without_train": {"images": 0, "recall": [None, None]},
    }  # fmt: skip
    accuracies = {"final/val_accuracy": 0.5, "final/test_accuracy": 0.5, "final/test_unleaked_accuracy": 0.25}
    own = {"best_val_accuracy": 0.5, "final/best_epoch": 3, "final/parameters": 10, "final/test_recall_x": 0.5}
    assert final_metrics(summary) == accuracies | own
    named = final_metrics(summary | {"classes": ["don't know: 1\u20442", "y"]})
    assert "final/test_recall_don_t know_ 1_2" in named  # a name that MLflow takes
    both = final_metrics(summary | {"classes": ["a/b", "a?b"], "test": part | {"recall": [0.25, 0.75]}})
    assert (both["final/test_recall_a_b 0"], both["final/test_recall_a_b 1"]) == (0.25, 0.75)


def test_once_the_process_leaves_no_run_begins_and_one_that_was_just_beginning_is_told(
    folder: Path, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
):
    create, told = tracker.client.create_run, []

    def leaving(*words: Any, **named: Any) -> Any:
        told.append(tracker.leave())
        return create(*words, **named)

    monkeypatch.setattr(tracker.client, "create_run", leaving)
    record(tracker, folder)
    assert (told[0], tracker.leave()) == (False, True)
    with pytest.raises(Stopped, match="the same command resumes it"):
        record(tracker, copy(folder, 2))
    assert only_run(tracker).data.tags["fer.run_id"] == folder.name


def test_what_is_seen_first_of_a_finished_run(folder: Path, tracker: Tracker):
    """MLflow draws metrics without a slash before the groups of the others; the view has the table's columns."""
    record(tracker, folder)
    run, summary = only_run(tracker), json.loads((folder / "summary.json").read_text())
    val, test = summary["val"]["accuracy"], summary["test"]["accuracy"]
    view = json.loads(tracker.client.get_experiment(tracker.experiment).tags["mlflow.sharedViewState.fer"])
    shown = [key.strip("`") for kind, _, key in (column.partition(".") for column in view["selectedColumns"])]
    assert [run.data.metrics[key] for key in shown[:2]] == [val, test]
    assert set(shown) - run.data.metrics.keys() - run.data.params.keys() == {"Dataset", "super_resolution.method"}
    first = {key for key in run.data.metrics if "/" not in key}
    assert first - {"best_val_accuracy"} == {
        "train_accuracy", "train_loss", "val_accuracy", "val_balanced_accuracy", "val_ece", "val_loss", "val_macro_f1",
    }  # fmt: skip
    for key in run.data.metrics:
        steps = [point.step for point in tracker.client.get_metric_history(run.info.run_id, key)]
        assert steps == ([0] if key.startswith("final/") or key == "best_val_accuracy" else [1, 2]), key
    (version,) = tracker.client.search_model_versions("name = 'fer-data'")
    assert f"{100 * test:.2f} %" in version.description
