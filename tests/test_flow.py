"""The flow on a local Ray: runs beside each other, failures and retries, dead workers, and the command line."""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import ray
import torch
from conftest import (
    BIN,
    CPU,
    ROOT,
    copy_settings,
    doe,
    emotion_encoder,
    environment,
    epochs_done,
    experiment,
    leave_of_test,
    recorded,
    spoil_optimizer,
    start_fer,
    wait_for,
    workers,
)

from fer.data.dataset import open_data
from fer.errors import UserError
from fer.formats import read_run
from fer.resources import Resources
from fer.run import Run, run_id
from fer.run_folder import read_progress
from fer.train import fit
from pipelines.params import read_yaml, yaml_of
from pipelines.work import held

pytestmark = pytest.mark.slow

Here = Callable[..., subprocess.CompletedProcess]
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


def errors(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def summaries(project: Path) -> dict[str, dict]:
    found = (json.loads(path.read_text()) for path in (project / "data/runs").glob("*/summary.json"))
    return {summary["name"]: summary for summary in found}


def finished(epochs: int) -> tuple[str, list[int]]:
    """What is recorded of a run: each epoch once."""
    return "FINISHED", list(range(1, epochs + 1))


def folder_of(project: Path, name: str) -> Path:
    (folder,) = (project / "data/runs").glob(f"{name}-*")
    return folder


# In processes of their own


def test_two_models_train_together_and_the_second_call_has_nothing_to_do(project: Path, here: Here):
    """The first call as on a laptop, where Prefect starts a server of its own.

    `head -1` is gone after the line on random weights, long before the table is drawn: the command goes on silently.
    """
    experiment(project, "small")
    experiment(project, "vit", **VIT)
    first = subprocess.run(
        f"{BIN / 'fer'} train small vit | head -2",
        shell=True, cwd=project, env=environment(), capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    waits, told = first.stdout.splitlines()
    assert waits == "Starting Prefect, Ray and MLflow ..."
    assert told.startswith("vit: vit_base_patch16_224_in21k starts from random weights; ")
    assert first.stderr == ""
    assert recorded(project) == {"small": finished(3), "vit": finished(3)}
    wait_for(lambda: not workers(project))
    before = {path: path.stat().st_mtime_ns for path in (project / "data/runs").rglob("*")}

    second = here("train", "small", "vit")
    assert second.returncode == 0
    assert "Nothing to do: 2 run(s)" in second.stdout
    best = max(summary["val"]["accuracy"] for summary in summaries(project).values())
    assert f"val {100 * best:.2f} %" in second.stdout.split("models:/fer-bars@champion: version")[1]
    assert {path: path.stat().st_mtime_ns for path in (project / "data/runs").rglob("*")} == before
    assert "Test, class by class" in here("evaluate", "vit").stdout
    compared = here("compare")
    assert all(summary["run_id"] in compared.stdout for summary in summaries(project).values())
    for _ in range(2):  # made and recorded once
        averaged = here("ensemble", "small", "vit", "--mirror")
        assert averaged.returncode == 0
        assert summaries(project)["ensemble"]["run_id"] in averaged.stdout
    assert recorded(project)["ensemble"] == finished(1)
    assert here("ensemble", "ensemble").stderr.endswith("is an ensemble itself; name its members\n")


# $1 is the project, $2 an empty folder, the rest the command
CONTAINER = """
mount --bind "$1" "$1" && mount --bind "$1/data" "$1/data" && mount -o remount,bind,ro "$1" || exit 99
cd "$1" && shift && ln -s "$(command -v bash)" "$1/bash" && export PATH="$1" && shift
exec "$@"
"""


def test_in_a_container_without_git_and_home_and_with_a_project_that_is_read_only_but_for_data(
    project: Path, tmp_path_factory: pytest.TempPathFactory
):
    """And with a proxy for everything, that does not answer."""
    experiment(project, "small", epochs=2)
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY"), "http://127.0.0.1:9")
    known = environment(**proxies)
    for name in ("HOME", "no_proxy", "NO_PROXY", "USER", "LOGNAME"):
        known.pop(name, None)

    known["MLFLOW_TRACKING_URI"] = "sqlite:///data/mlflow.db"
    inside = ["sh", "-c", CONTAINER, "sh", project, tmp_path_factory.mktemp("bin"), BIN / "fer", "train", "small"]
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", *inside],
        env=known, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    if done.returncode == 99 or done.stderr.startswith("unshare:"):
        pytest.skip(f"cannot make a read-only mount here: {done.stderr.strip()}")
    assert (done.returncode, done.stderr) == (0, "")
    assert recorded(project / "data") == {"small": finished(2)}
    assert not {"mlflow.db", "mlruns", ".prefect"} & {path.name for path in project.iterdir()}


def saved(folder: Path) -> tuple[int, int]:
    """Epoch and step of the last checkpoint; of a command that has ended."""
    training = torch.load(folder / "last/training.pt", weights_only=True)
    return json.loads((folder / "last/checkpoint.json").read_text())["epoch"], training["step"]


def reached(folder: Path) -> tuple[int, int]:
    """Epoch and step of progress.json, which is written once a second."""
    progress = read_progress(folder)
    return (progress["epoch"], progress["step"]) if progress else (0, 0)


@pytest.mark.timeout(900)  # four commands
def test_stopped_and_killed_the_same_command_ends_it_as_if_never_cut(
    project: Path, tmp_path: Path, prefect_server: str, ray_here: None, here: Here
):
    """Ctrl-C and SIGTERM save the last step, kill -9 costs the epoch; none of them leaves a process or a run behind.

    SIGTERM goes to all, as from Slurm and systemd: to Ray's processes, the guard, and Prefect's server of the command.
    """
    last = 40
    run = experiment(project, "small", epochs=last, batch_size=2)  # many short steps
    at = (0, 0)
    for number, everywhere in ((signal.SIGINT, False), (signal.SIGTERM, True)):
        running = start_fer(project, "train", "small", **({} if everywhere else {"PREFECT_API_URL": prefect_server}))
        folder = wait_for(lambda: next((project / "data/runs").glob("small-*"), None))
        wait_for(lambda at=at: reached(folder) > at)  # noqa: B023
        for child in psutil.Process(running.pid).children(recursive=True) if everywhere else ():
            child.send_signal(number)
        running.send_signal(number)
        _, said = running.communicate(timeout=250)
        assert (running.returncode, said.strip()) == (
            128 + number,
            "stopping: every run saves its state; Ctrl-C again exits at once\nstopped: the same command resumes",
        )
        before, at = at, saved(folder)
        # with SIGTERM for all, Ray's own processes may take the worker along before it has saved
        assert at >= (before if everywhere else reached(folder))
        assert at > (0, 0)
        wait_for(lambda: not workers(project) and recorded(project)["small"][0] == "KILLED")
        if not everywhere:
            wait_for(lambda: last_flow_run() == ("CANCELLED", {"small"}))
            assert not {"stop", "training"} & {path.name for path in folder.iterdir()}

    killed = start_fer(project, "train", "small", PREFECT_API_URL=prefect_server)
    wait_for(lambda: len(epochs_done(project).get("small", [])) > at[0])
    killed.kill()
    killed.communicate()
    wait_for(lambda: not workers(project) and recorded(project)["small"][0] == "FAILED")
    wait_for(lambda: last_flow_run() == ("CRASHED", {"small"}))
    assert at[0] < len(epochs_done(project)["small"]) < last
    assert not (folder / "summary.json").exists()

    resumed = here("train", "small")
    assert resumed.returncode == 0, resumed.stderr
    assert folder_of(project, "small") == folder
    assert recorded(project) == {"small": finished(last)}
    uncut = fit("small", run, Resources(), project / "data", tmp_path / "uncut")
    for name in ("best/model.safetensors", "last/model.safetensors"):
        assert (folder / name).read_bytes() == (uncut / name).read_bytes()


def last_flow_run() -> tuple[str, set[str]]:
    """State and tags of the flow run that was started last; it has the state of its tasks."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.sorting import FlowRunSort

    with get_client(sync_client=True) as client:
        (run,) = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)
    assert run.state is not None
    return run.state.type.value, set(run.tags)


# Dead workers and errors


@pytest.mark.usefixtures("ray_here")
def test_a_worker_that_is_killed_is_started_again_as_often_as_restarts_says(project: Path, here: Here):
    experiment(project, "small", epochs=400, resources={"restarts": 1})
    seen: list[dict[str, Any]] = []
    killed: list[int] = []

    def rows() -> list[dict[str, Any]]:
        return epochs_done(project).get("small", [])

    def kill_each() -> None:
        while not over.wait(0.05) and len(killed) < 3:  # it should be two
            for worker in set(workers(project)) - {*killed} if len(rows()) >= len(seen) + 2 else ():
                seen.extend(rows()[len(seen) :])
                # where it starts: glibc does not look again
                assert psutil.Process(worker).environ()["MALLOC_ARENA_MAX"] == "1"
                killed.append(worker)
                os.kill(worker, signal.SIGKILL)

    over, killer = threading.Event(), threading.Thread(target=kill_each)
    killer.start()
    done = here("train", "small")
    over.set()
    killer.join()
    assert done.returncode == 1, done.stderr
    (line,) = errors(done)
    assert line.startswith("error: small: WorkerCrashedError: ")
    assert len(killed) == 2
    assert rows()[: len(seen)] == seen  # times and all: none was trained again
    assert recorded(project)["small"][0] == "FAILED"


@pytest.mark.usefixtures("ray_here")
@pytest.mark.soak
def test_a_command_ends_when_prefects_server_is_killed(project: Path, here: Here):
    """In one line, with the run recorded, whatever the server was about to be told."""
    experiment(project, "small", epochs=30)
    running = start_fer(project, "train", "small")
    folder = wait_for(lambda: next((project / "data/runs").glob("small-*"), None))
    wait_for(lambda: reached(folder) > (0, 0))
    children = psutil.Process(running.pid).children(recursive=True)
    (server,) = (child for child in children if any("prefect.server" in word for word in child.cmdline()))
    server.kill()
    _, said = running.communicate(timeout=250)
    assert running.returncode == 2
    assert "Traceback" not in said
    assert "error: Prefect's server no longer answers ([Errno 111] Connection refused); the runs are safe" in said
    assert here("train", "small").returncode == 0
    assert recorded(project) == {"small": finished(30)}


@pytest.mark.soak
def test_a_run_whose_second_worker_is_killed_is_started_again(project: Path, here: Here):
    """What the other one meets then, an error of Gloo, is not taken for one of the program."""
    experiment(project, "small", epochs=30, resources={"workers": 2, "restarts": 1})

    def kill_second() -> None:
        wait_for(lambda: len(epochs_done(project).get("small", [])) >= 3)
        log = str(folder_of(project, "small").resolve() / "log-1.txt")
        (second,) = [pid for pid in workers(project) if log in [f.path for f in psutil.Process(pid).open_files()]]
        os.kill(second, signal.SIGKILL)

    killer = threading.Thread(target=kill_second, daemon=True)
    killer.start()
    done = here("train", "small")
    killer.join(5)
    assert done.returncode == 0, done.stderr
    assert recorded(project) == {"small": finished(30)}


def interrupt(row: dict) -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("ray_here")
def test_a_failure_is_final_and_one_line_and_leaves_the_other_runs_alone(project: Path, here: Here):
    """One run meets an error of the code, one diverges; the third has two workers, so it waits for the machine."""
    broken = experiment(project, "broken")
    experiment(project, "vit", **{**VIT, "optimizer": {"lr": 1e30}})
    experiment(project, "small", resources={"workers": 2})
    with pytest.raises(KeyboardInterrupt):
        fit("broken", broken, CPU, project / "data", project / "data/runs", on_epoch=interrupt)
    folder = folder_of(project, "broken")
    training = folder / "last/training.pt"
    whole = spoil_optimizer(training)

    done = here("train", "broken", "vit", "small")
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    fault, diverged = errors(done)
    where = rf"fer/\w+.py:\d+, in \w+; full log: {folder.relative_to(project) / 'log.txt'}"
    assert re.fullmatch(rf"error: broken: KeyError: 'exp_avg' \({where}\)", fault), fault
    assert (folder / "log.txt").read_text().count("Traceback (most recent call last):\n") == 1
    assert re.match(r"error: vit: vit-s1111-\w+: loss is (nan|inf) in epoch", diverged), diverged
    assert {name: status for name, (status, _) in recorded(project).items()} == {
        "broken": "FAILED", "vit": "FAILED", "small": "FINISHED"
    }  # fmt: skip
    table = done.stdout.split("unleaked", 1)[1]  # below its head
    assert {*re.findall(r"\w+-s1111-\w{8}", table)} == {summaries(project)["small"]["run_id"]}

    training.write_bytes(whole)
    again = here("train", "broken", "vit", "small")  # mended, it goes on; what is left is a mistake of the user
    assert (again.returncode, len(errors(again))) == (2, 1), again.stderr
    assert recorded(project)["broken"] == recorded(project)["small"] == finished(3)


def chain(project: Path, **changes: Any) -> None:
    """Experiments `first` and, from its backbone, `second`: the disentangled difference of embeddings."""
    experiment(project, "first", **emotion_encoder(epochs=2, **changes))
    experiment(project, "second", **doe(init_from="first"))


@pytest.mark.usefixtures("ray_here")
def test_a_run_waits_for_the_one_it_starts_from(project: Path, here: Here):
    """Both by the name of the second, which is not the only one; of the changes the first gets the seed alone."""
    chain(project)
    experiment(project, "other")
    words = "train", "second", "other", "seed=2", "epochs=1"
    done = here(*words)
    assert done.returncode == 0, done.stderr
    assert recorded(project) == {"first": finished(2), "second": finished(1), "other": finished(1)}
    first, second = (summaries(project)[name] for name in ("first", "second"))
    assert first["run_id"].startswith("first-s2-")
    assert first["finished"] <= second["finished"]
    config = json.loads((project / "data/runs" / second["run_id"] / "config.json").read_text())
    assert config["start"] == first["run_id"]
    shutil.rmtree(project / "data/runs" / first["run_id"])  # not needed any more, nor made again
    assert "Nothing to do: 2 run(s)" in here(*words).stdout
    assert not (project / "data/runs" / first["run_id"]).exists()


@pytest.mark.usefixtures("ray_here")
def test_a_run_does_not_start_where_the_one_it_starts_from_failed(project: Path, here: Here):
    chain(project, optimizer={"lr": 1e30})
    done = here("train", "second", "first")
    assert done.returncode == 2, done.stderr
    lines = errors(done)
    assert len(lines) == 2
    assert re.match(r"error: first: first-s1111-\w+: loss is ", lines[0])
    assert lines[1] == "error: second: not started, because first, which it starts from, failed"
    assert {name: status for name, (status, _) in recorded(project).items()} == {"first": "FAILED"}


# Runs that are finished or begun


@pytest.mark.usefixtures("ray_here")
def test_a_deployment_trains_the_runs_of_the_command(project: Path, here: Here, monkeypatch: pytest.MonkeyPatch):
    """As Prefect's worker calls the flow: loaded from the entrypoint of prefect.yaml, its parameters from JSON.

    The command then has nothing to do, or needs no Ray where the run is only to be recorded.
    """
    from mlflow import MlflowClient
    from prefect.client.orchestration import get_client
    from prefect.flows import load_flow_from_entrypoint

    deployments = {found["name"]: found for found in read_yaml(ROOT / "prefect.yaml", "")["deployments"]}
    flows = {name: load_flow_from_entrypoint(f"{ROOT}/{d['entrypoint']}") for name, d in deployments.items()}
    assert {found.name: deployments[name]["parameters"] for name, found in flows.items()} == {
        "train": {"words": []}, "sweep": {"words": []}
    }  # fmt: skip
    train, tracked = flows["train"], MlflowClient(f"sqlite:///{project}/mlflow.db")
    experiment(project, "small")
    words = ["small", "epochs=2", "optimizer.lr=3e-3"]
    state = train(**json.loads(json.dumps({"words": words})), return_state=True)
    assert state.is_completed(), state.message
    with get_client(sync_client=True) as client:
        artifacts = client.read_artifacts()
    shown = {found.type: found.data for found in artifacts if found.flow_run_id == state.state_details.flow_run_id}
    assert float(shown["progress"]) == 100
    assert "#/experiments/" in shown["markdown"]  # a link to MLflow
    assert json.loads(shown["table"])[0]["run"].rstrip("*") == summaries(project)["small"]["run_id"]
    with pytest.raises(UserError, match="^words: name an experiment, of .*small"):
        train(words=[])

    assert "Nothing to do: 1 run(s)" in here("train", *words).stdout
    (run,) = tracked.search_runs(["1"])
    tracked.delete_run(run.info.run_id)  # the server has lost it
    for name in ("start_ray", "check_resources", "Launcher.launch"):
        monkeypatch.setattr(f"pipelines.launch.{name}", None)
    done = here("train", *words)
    assert done.returncode == 0, done.stderr
    assert "finished before, but not in MLflow's store; recording it" in done.stderr
    assert recorded(project) == {"small": finished(2)}


@pytest.mark.usefixtures("ray_here")
def test_what_changed_of_test_since_a_run_was_finished_is_evaluated_anew_and_said(project: Path, here: Here):
    """What the numbers are then is in test_evaluate.py."""
    experiment(project, "small", epochs=2)
    assert here("train", "small").returncode == 0
    folder, test = folder_of(project, "small"), project / "data/splits/test.csv"
    predicted = pd.read_csv(folder / "predictions_test.csv")
    wrong = predicted["label"] != predicted["prediction"]
    table = leave_of_test(project / "data", wrong.to_numpy())
    unleaked = table["duplicate_in"] == ""
    for number, news, key in (
        (0.0, "the test split has changed since: evaluated again, from its best checkpoint", "test_accuracy"),
        (len(table) - 1, "other test images count as leaked since: those columns are computed again, from its "
         "predictions", "test_unleaked_images"),
    ):  # fmt: skip
        table.to_csv(test, index=False)
        done = here("train", "small")
        assert done.returncode == 0, done.stderr
        assert done.stderr.splitlines().count(f"{folder.name}: {news}") == 1
        part, _, what = key.rpartition("_")
        assert summaries(project)["small"][part][what] == number
        table["duplicate_in"] = ["val" if place == unleaked.idxmax() else "" for place in table.index]
    # as its page shows them; it is one version of the registered model
    with closing(sqlite3.connect(project / "mlflow.db")) as store:
        assert store.execute("select count(*) from tags where key = 'fer.run_id'").fetchone() == (1,)
        assert store.execute("select count(*) from model_versions").fetchone() == (1,)
        found = store.execute("select value from latest_metrics where key like 'final/test%accuracy'").fetchall()
    assert {value for (value,) in found if value is not None} == {0.0}


@pytest.mark.usefixtures("ray_here")
def test_a_run_that_was_begun_in_format_1_is_refused_and_nothing_else_is(project: Path, here: Here):
    from pipelines.flow import prepare

    golden = json.loads((ROOT / "tests/golden/format1/runs/bars-s1111-28b44a7d/best/checkpoint.json").read_text())
    (project / "experiments/bars.yaml").write_text(yaml_of(read_run(golden, "checkpoint.json").model_dump()))
    folder = project / "data/runs/bars-s1111-28b44a7d"
    (folder / "last").mkdir(parents=True)

    def begun(**changes: Any) -> None:
        meta = {**golden, "config": {**golden["config"], **changes}}
        (folder / "last/checkpoint.json").write_text(json.dumps(meta))

    # with other settings, with some that no version of today knows, and where it was finished
    for changes in ({"lr": 0.02}, {"options": {"width": 0.0625, "stochastic_depth": 0.1}}):
        begun(**changes)
        prepare(["bars"])
    begun()
    summary = folder / "summary.json"
    shutil.copy(ROOT / "tests/golden/format1/runs" / folder.name / "summary.json", summary)
    prepare(["bars"])
    summary.unlink()
    done = here("train", "bars")
    assert done.returncode == 2
    assert done.stderr == (
        "error: data/runs/bars-s1111-28b44a7d: was begun in format 1 and cannot be resumed in format 2; "
        "delete that folder to train from scratch\n"
    )
    assert [path.name for path in (project / "data/runs").iterdir()] == [folder.name]


@pytest.mark.usefixtures("ray_here")
def test_a_run_that_another_process_trains_is_left_to_it(project: Path, here: Here):
    run: Run = experiment(project, "small")
    folder = project / "data/runs" / run_id("small", run, open_data(project / "data").hash)
    with held(folder):
        done = here("train", "small")
    assert done.returncode == 2
    assert errors(done) == [f"error: small: another process is training {folder.name}; wait for it or stop it"]
    assert recorded(project) == {}


# The command line


def test_models_are_listed_with_their_cost(project: Path, here: Here):
    shown = here("models", "vit_se", "disentangled_doe").stdout
    line = next(line for line in shown.splitlines() if line.split()[:1] == ["vit_se"])
    assert line.split()[:5] == ["vit_se", "86.69M", "86.69M", "35.1", "224x224x3"]
    assert "mobilenet_v3_large: emotion_encoder" in shown


def test_without_a_name_the_experiments_are_listed_and_none_is_started(project: Path, here: Here):
    done = here("train")
    assert (done.returncode, done.stderr) == (0, "")
    listed = {line.split()[0] for line in done.stdout.splitlines() if line.strip()}
    assert listed > {path.stem for path in (project / "experiments").iterdir()}
    assert "VGG13 of Barsoum et al. 2016" in done.stdout  # what it is
    assert not (project / "data/runs").exists()


LARGE = ["vgg13_small", "resources.workers=64"]


@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        (["train", "vit_se_tny"], {}, "experiments/vit_se_tny.yaml: no such experiment, did you mean 'vit_se_tiny'?"),
        (["train", "epochs=2"], {}, "epochs=2: name the experiment it is for, one of disentangled_doe, "),
        (["train", "doe", "loss=fokal"], {}, "command line: loss.name: unknown loss 'fokal', did you mean 'focal'?"),
        (["models", "vit_sa"], {}, "experiments/vit_sa.yaml: no such experiment, did you mean 'vit_se'?"),
        (["evaluate", "nope"], {}, "nope: no such run in data/runs; runs: none yet"),
        (["compare"], {}, "data/runs: no finished run; train one with `fer train`"),
        # what is not there, told before anything starts
        (["train", *LARGE], {}, "vgg13_small: resources: 64 worker(s) need 64 CPUs, there are "),
        (
            ["train", "vgg13_small", "resources.device=cuda"],
            {},
            "vgg13_small: resources.device: cuda, but there is no GPU",
        ),
        (["train", "doe"], {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, "tracking.uri: no server answers at http:"),
        (["train", "doe"], {"RAY_ADDRESS": "127.0.0.1:9"}, "RAY_ADDRESS: no cluster answers at 127.0.0.1:9 ("),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2_and_leaves_nothing(
    words: list[str], variables: dict, message: str, project: Path, here: Here, monkeypatch: pytest.MonkeyPatch
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if "RAY_ADDRESS" in variables:
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
    done = here(*words)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {message}")
    assert not (project / "data/runs").exists()


@pytest.mark.usefixtures("ray_here")
def test_weights_that_are_missing_are_told_before_ray_starts(
    project: Path, here: Here, monkeypatch: pytest.MonkeyPatch
):
    backbone = {**VIT["model"]["backbone"], "weights": "nowhere.safetensors"}
    experiment(project, "vit", **{**VIT, "model": {**VIT["model"], "backbone": backbone}})
    monkeypatch.setattr("pipelines.launch.start_ray", None)
    done = here("train", "vit")
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(r"error: model\.backbone\.weights: .*nowhere\.safetensors.*\n", done.stderr), done.stderr
    assert recorded(project) == {}


def test_missing_data_and_params_name_the_remedy(tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for words in (["train", "doe"], ["train"], ["train", "--all"], ["config"], ["models"]):
        done = here(*words)
        assert (done.returncode, done.stdout) == (2, ""), words
        assert done.stderr.endswith("run the command in the project's root folder\n")
    copy_settings(tmp_path)
    done = here("train", "vgg13_small")
    assert (done.returncode, done.stderr) == (
        2, "error: data/splits/summary.json: not found; make the data with `dvc repro`\n"
    )  # fmt: skip
