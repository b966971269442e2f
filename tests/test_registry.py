"""One champion and one record for each decision, whoever decides at the same time and in whichever store."""

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import pytest
from conftest import BIN, answers, free_port, refusal, wait_for
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.models.model import ModelInfo
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

from pipelines.commands.results import print_champions
from pipelines.registry import Registry
from pipelines.tracking import Tracker

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]


@pytest.fixture
def sqlite(tmp_path: Path, empty_store: Path) -> str:
    return f"sqlite:///{shutil.copy(empty_store, tmp_path / 'mlflow.db')}"


@pytest.fixture
def server(sqlite: str, tmp_path: Path) -> Iterator[str]:
    port = free_port()
    command = [BIN / "mlflow", "server", "--port", str(port), "--workers", "2", "--backend-store-uri", sqlite]
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True)
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
    mlflow.set_experiment(experiment_id=experiment)  # a test before may have set another
    with mlflow.start_run(run_id=run_id):
        model = mlflow.pyfunc.log_model(
            name="model", loader_module="json", data_path=str(folder / "weights.txt"), pip_requirements=[]
        )
    return run_id, model


def record(
    registry: Registry, name: str, run_id: str, model: ModelInfo, accuracy: float | None, run: str = "", **tags: str
) -> str:
    """Add a version with that val accuracy, and decide on it."""
    known = {} if accuracy is None else {"val_accuracy": f"{accuracy:.6f}", "data_hash": "d", "fer.run_id": run}
    number = registry.add(name, run_id, model, known | tags, "")
    registry.decide(name, number)
    return number


Shop = tuple[Registry, str, ModelInfo]


@pytest.fixture
def shop(sqlite: str, tmp_path: Path) -> Shop:
    run_id, model = prepare(sqlite, tmp_path)
    return Registry(MlflowClient(sqlite)), run_id, model


@pytest.mark.parametrize("place", ["log_param", "set_registered_model_alias"])
def test_whoever_decides_last_has_seen_the_others(place: str, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The better version is added and promoted between the moment another process looks and that when it writes."""
    first, *made = shop
    second, write = Registry(MlflowClient(mlflow.get_tracking_uri())), getattr(first.client, place)

    def late(*what: str) -> None:
        monkeypatch.setattr(first.client, place, write)
        record(second, "fer-x", *made, 0.9)
        write(*what)

    monkeypatch.setattr(first.client, place, late)
    record(first, "fer-x", *made, 0.5)
    assert first.champions()["fer-x"]["val_accuracy"] == "0.900000"
    versions = first.client.search_model_versions("name = 'fer-x'")
    decided = sorted((one.version, one.what) for one in first.history("fer-x"))
    assert decided == sorted((str(one.version), "run") for one in versions)


def test_a_model_that_was_registered_by_hand_gets_a_history(shop: Shop) -> None:
    registry, *made = shop
    registry.client.create_registered_model("fer-x")
    for accuracy in (0.5, 0.6):
        record(registry, "fer-x", *made, accuracy)
    assert [(one.what, one.champion) for one in registry.history("fer-x")] == [("run", "1"), ("run", "2")]


def test_by_hand_back_and_forth(shop: Shop) -> None:
    """What a person chose stays until a run is better by the rule."""
    registry, *made = shop
    for number, accuracy in enumerate((0.5, 0.6, 0.7), 1):
        record(registry, "fer-x", *made, accuracy, f"small-s{number}")
    assert registry.aliases("fer-x") == {"champion": "3", "previous": "2"}
    moved = registry.promote("fer-x", "small-s1", "the others have seen test")
    reason = "the others have seen test"
    assert (moved.before, moved.champion, moved.run, moved.reason) == ("3", "1", "small-s1", reason)
    registry.decide("fer-x", "3")  # recorded again
    record(registry, "fer-x", *made, 0.45, "small-s4")
    assert registry.aliases("fer-x") == {"champion": "1", "previous": "3"}
    record(registry, "fer-x", *made, 0.55, "small-s5")
    assert registry.aliases("fer-x") == {"champion": "5", "previous": "1"}
    assert [registry.rollback("fer-x").champion for _ in range(4)] == ["1", "3", "2", "1"]
    assert refusal(registry.rollback, "fer-x").endswith(
        "no earlier champion is left; name a version: `fer promote VERSION`"
    )
    assert registry.client.get_run(made[0]).data.params == {}  # they would fill MLflow's pages that compare runs
    promoted = registry.promote("fer-x", "4")
    assert promoted.reason == "the rule says keep: 5.00 points below version 1 on the same val images"
    assert promoted.evidence == {"val_accuracy": 0.45, "champion_val_accuracy": 0.5}
    what = [one.what for one in registry.history("fer-x")]
    assert what == ["run", "run", "run", "by hand", "run", "run", *["rollback"] * 4, "by hand"]


def test_a_history_that_was_deleted_for_good_begins_anew(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the champion that the alias names."""
    registry, *made = shop
    record(registry, "fer-x", *made, 0.5, "x-s1")
    lost, get = registry.client.get_registered_model("fer-x").tags["fer.history"], registry.client.get_run

    def get_run(run_id: str) -> Run:
        if run_id == lost:
            raise MlflowException("Run not found", RESOURCE_DOES_NOT_EXIST)
        return get(run_id)

    monkeypatch.setattr(registry.client, "get_run", get_run)
    assert registry.history("fer-x") == []
    record(registry, "fer-x", *made, 0.4, "x-s2")
    assert [(one.what, one.run) for one in registry.history("fer-x")] == [("found", "x-s1"), ("run", "x-s2")]
    assert registry.aliases("fer-x")["champion"] == "1"


def test_a_run_that_was_recorded_again_is_its_last_version(shop: Shop) -> None:
    registry, *made = shop
    for run, accuracy in (("x-s1", 0.5), ("x-s2", 0.4), ("x-s2", 0.4), ("x-s20", 0.3)):
        record(registry, "fer-x", *made, accuracy, run)
    assert registry.promote("fer-x", "x-s2").version == "3"


@pytest.mark.parametrize("what", ["run", "experiment"])
def test_a_history_that_was_deleted_in_mlflow_is_brought_back(what: str, shop: Shop) -> None:
    registry, *made = shop
    record(registry, "fer-x", *made, 0.5, "x-s1")
    client = registry.client
    history = client.get_run(client.get_registered_model("fer-x").tags["fer.history"])
    if what == "run":
        client.delete_run(history.info.run_id)
    else:
        client.delete_experiment(history.info.experiment_id)
    record(registry, "fer-x", *made, 0.6, "x-s2")
    assert [one.run for one in registry.history("fer-x")] == ["x-s1", "x-s2"]
    record(registry, "fer-y", *made, 0.6)
    assert registry.aliases("fer-x")["champion"] == "2"


def test_champions_are_found_on_every_page_of_the_registry(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    registry, *made = shop
    for name in ("fer-x", "fer-y", "fer-z"):
        record(registry, name, *made, 0.5)
    page = partial(registry.client.search_registered_models, max_results=1)
    monkeypatch.setattr(registry.client, "search_registered_models", page)
    assert set(registry.champions()) == {"fer-x", "fer-y", "fer-z"}


def test_a_class_called_none_is_one_like_others(shop: Shop, tmp_path: Path) -> None:
    """Both are right on 30 images, the second one alone on 10 more: McNemar's p is 2 / 2^10."""
    registry, first, model = shop
    second = registry.client.create_run(registry.client.get_run(first).info.experiment_id).info.run_id
    for run_id, right in ((first, 30), (second, 40)):
        said = ["None"] * right + ["sad"] * (40 - right)
        rows = "".join(f"{row},None,{label}\n" for row, label in enumerate(said))
        (tmp_path / "predictions_val.csv").write_text(f"row,label,prediction\n{rows}")
        registry.client.log_artifact(run_id, str(tmp_path / "predictions_val.csv"))
        record(registry, "fer-x", run_id, model, right / 40, val_images="40")
    assert registry.history("fer-x")[-1].evidence["p"] == pytest.approx(2 / 2**10)


def test_other_data_displace_no_champion_and_versions_of_others_are_none_of_ours(shop: Shop) -> None:
    registry, *made = shop
    found = []
    for accuracy, data in ((0.5, "d"), (0.7, "d"), (0.9, "e"), (None, ""), (0.7, "d"), (0.8, "e")):
        record(registry, "fer-x", *made, accuracy, data_hash=data)
        found.append(registry.aliases("fer-x")["champion"])
    assert found == ["1", "2", "2", "2", "2", "2"]
    registry.client.delete_model_version("fer-x", "2")
    record(registry, "fer-x", *made, 0.6)
    assert registry.aliases("fer-x") == {"champion": "5", "previous": "1"}
    assert [(one.what, one.champion) for one in registry.history("fer-x")[-2:]] == [("deleted", "5"), ("run", "5")]


def test_a_long_reason_is_cut_before_mlflow_cuts_what_cannot_be_read_then(shop: Shop) -> None:
    registry, *made = shop
    for name in "ab":
        record(registry, "fer-x", *made, 0.5, classes=name * 3500)
    assert registry.history("fer-x")[1].reason.startswith(f"version 1 was made with other classes ({'a' * 400}")
    assert registry.promote("fer-x", "2", "x" * 9999).reason == "x" * 500


def test_a_store_of_an_earlier_version_keeps_its_champion(shop: Shop) -> None:
    registry, *made = shop
    for accuracy in ("0.5", "0.7"):
        registry.add("fer-x", *made, {"val_accuracy": accuracy, "data_hash": "d"}, "")
    registry.client.set_registered_model_alias("fer-x", "champion", "2")
    record(registry, "fer-x", *made, 0.6)
    decided = [(one.what, one.version, one.champion) for one in registry.history("fer-x")]
    assert decided == [("found", "2", "2"), ("run", "3", "2")]
    assert registry.aliases("fer-x") == {"champion": "2"}


@pytest.mark.parametrize("place", ["log_param", "set_registered_model_alias", "get_registered_model"])
def test_a_server_that_goes_in_between_leaves_nothing_to_mend_by_hand(
    place: str, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any call of `place`; the same command decides again, once."""
    registry, *made = shop
    record(registry, "fer-x", *made, 0.5)
    number = registry.add("fer-x", *made, {"val_accuracy": "0.6", "data_hash": "d"}, "")
    whole, left = getattr(registry.client, place), [0]

    def gone(*what: str) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise MlflowException("gone")
        return whole(*what)

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    for calls in range(20):
        left[0] = calls
        with monkeypatch.context() as patch, suppress(MlflowException):
            patch.setattr(registry.client, place, gone)
            registry.decide("fer-x", number)
            break
    assert calls > 0
    assert registry.aliases("fer-x") == {"champion": "2", "previous": "1"}
    assert [one.version for one in registry.history("fer-x")] == ["1", "2"]


def test_mistakes_in_naming_a_version(shop: Shop) -> None:
    registry, *made = shop
    for number in (1, 2):
        record(registry, "fer-x", *made, 0.5, f"small-s{number}")
    shown = "versions of models:/fer-x: 1 (small-s1), 2 (small-s2)"
    for name, word, told in (
        ("fer-x", "7", f"7: no such version or run; {shown}"),
        ("fer-x", "small", f"small: names several versions, give more of the run id; {shown}"),
        ("fer-x", "", f": no such version or run; {shown}"),
        ("fer-x", "1", "models:/fer-x/1: is champion already"),
        ("fer-y", "1", "models:/fer-y: no such model; known: fer-x; `fer train` records one"),
    ):
        assert refusal(registry.promote, name, word) == told
    history = registry.client.get_registered_model("fer-x").tags["fer.history"]
    registry.client.log_param(history, "99999", "{}")  # as a later version of fer might
    assert re.match(f"the history of the champion, run {history} in .* that wrote", refusal(registry.history, "fer-x"))


def test_the_commands(project: Path, empty_store: Path, here: Callable[..., subprocess.CompletedProcess]) -> None:
    shutil.copy(empty_store, project / "mlflow.db")
    made = prepare(f"sqlite:///{project}/mlflow.db", project)
    for number, accuracy in ((1, 0.5), (2, 0.6)):
        record(Registry(MlflowClient()), "fer-sample", *made, accuracy, f"small-s{number}")
    moved = here("promote", "1", "--reason", "smaller").stdout
    assert moved.splitlines()[1:] == ["models:/fer-sample@champion: version 1, small-s1 (before: version 2)", "smaller"]
    assert here("rollback").stdout.startswith(
        "Asking MLflow\nmodels:/fer-sample@champion: version 2, small-s2 (before: version 1)"
    )
    shown = here("registry").stdout
    lines = [line.split()[2:4] for line in shown.splitlines() if line.startswith("  20")]
    assert lines == [["1", "promote"], ["2", "promote"], ["1", "by"], ["2", "rollback"]]
    assert "Aliases of models:/fer-sample: champion 2, previous 1." in shown
    missing = here("rollback", "--dataset", "rafdb")
    told = "error: models:/fer-rafdb: no such model; known: fer-sample; `fer train` records one\n"
    assert (missing.returncode, missing.stderr) == (2, told)


def test_after_training_the_champions_of_that_data_are_shown(
    sqlite: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    made, tracker = prepare(sqlite, tmp_path), Tracker(sqlite, "fer")
    for name, run, accuracy in (("fer-x", "a-s1", 0.6), ("fer-y", "b-s1", 0.7), ("fer-x", "c-s1", 0.5)):
        record(tracker.registry, name, *made, accuracy, run)
    print_champions(tracker, ["c-s1"])
    champion, other = capsys.readouterr().out.splitlines()
    assert champion == "models:/fer-x@champion: version 1, a-s1, val 60.00 %"
    assert other.startswith("c-s1: version 2, 10.00 points below version 1")


@pytest.mark.soak
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("store", ["sqlite", "server", "postgresql"])
def test_the_better_one_of_two_processes_is_champion(
    store: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """In 200 rounds; and three may open a store at once."""
    uri: str = request.getfixturevalue(store)
    together(3, open_store, uri)
    together(2, compete, uri, 200, *prepare(uri, tmp_path))
    client = MlflowClient(uri)
    assert client.get_experiment_by_name("new") is not None
    for turn in range(200):
        assert client.get_model_version_by_alias(f"fer-{turn}", "champion").tags["val_accuracy"] == "0.900000"
        assert sorted(one.version for one in Registry(client).history(f"fer-{turn}")) == ["1", "2"]


def together(many: int, what: Callable[..., None], uri: str, *words: Any) -> None:
    """Call it in so many processes at the same time."""
    processes = multiprocessing.get_context("spawn")
    met = processes.Barrier(many)
    started = [processes.Process(target=what, args=(uri, number, *words, met)) for number in range(many)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * many


def open_store(uri: str, number: int, met: Any) -> None:
    from pipelines.tracking import Tracker

    met.wait(120)
    Tracker(uri, "new")


def compete(uri: str, number: int, rounds: int, run_id: str, model: ModelInfo, met: Any) -> None:
    """Promote a version in each round, at the same time as the others; the best one comes from each in turn."""
    mlflow.set_tracking_uri(uri)
    registry = Registry(MlflowClient(uri))
    for turn in range(rounds):
        met.wait(120)
        record(registry, f"fer-{turn}", run_id, model, 0.9 if turn % 2 == number % 2 else 0.5)
