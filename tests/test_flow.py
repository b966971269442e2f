"""The flow on a local Ray: runs beside each other, failures and retries, dead workers, and the command line."""

import json
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
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
    DATA,
    ROOT,
    copy_settings,
    doe,
    emotion_encoder,
    environment,
    epochs_done,
    experiment,
    last_flow_run,
    leave_of_test,
    recorded,
    refusal,
    spoil_optimizer,
    start_fer,
    wait_for,
    workers,
)  # fmt: skip

from fer.data.dataset import open_data
from fer.errors import UserError
from fer.run import run_id
from fer.run_folder import read_progress
from fer.train import fit
from pipelines import flow
from pipelines.commands.training import start_frameworks
from pipelines.params import read_yaml
from pipelines.work import held

pytestmark = pytest.mark.slow

Here = Callable[..., subprocess.CompletedProcess]
BACKBONE = {"name": "vit_base_patch16_224_in21k", "weights": None, "patch_size": 4, "hidden_size": 16, "depth": 1}
VIT = {"name": "vit_se", "backbone": {**BACKBONE, "num_heads": 4, "mlp_ratio": 2, "pool": "pooler"}}


def errors(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def summaries(project: Path) -> dict[str, dict]:
    found = (json.loads(path.read_text()) for path in (project / "data/runs").glob("*/summary.json"))
    return {summary["name"]: summary for summary in found}


def finished(epochs: int) -> tuple[str, list[int]]:
    """What is recorded of a run: each epoch once."""
    return "FINISHED", list(range(1, epochs + 1))


# In processes of their own

# $1 is the project, $2 an empty folder, the rest the command
CONTAINER = """
mount --bind "$1" "$1" && mount --bind "$1/data" "$1/data" && mount -o remount,bind,ro "$1"
cd "$1" && shift && ln -s "$(command -v bash)" "$1/bash" && export PATH="$1" && shift
exec "$@"
"""
UNSHARE = ["unshare", "--mount", "--map-root-user"]


def test_two_models_train_together_in_a_container_and_the_second_call_has_nothing_to_do(
    project: Path, tmp_path_factory: pytest.TempPathFactory, here: Here, monkeypatch: pytest.MonkeyPatch
):
    """The project is read-only but for data, there are no git and home, and a proxy that does not answer.

    Whoever reads is gone before the table is drawn, as with `head -2`: the command goes on silently.
    """
    experiment(project, "small", epochs=2)
    experiment(project, "vit", epochs=2, model=VIT)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///data/mlflow.db")
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY"), "http://127.0.0.1:9")
    known = environment(MLFLOW_TRACKING_URI="sqlite:///data/mlflow.db", **proxies)
    inside = [*UNSHARE, "sh", "-c", CONTAINER, "sh", project, tmp_path_factory.mktemp("bin")]
    contained = not subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode
    with subprocess.Popen(
        [*(inside if contained else ()), BIN / "fer", "train", "small", "vit"], cwd=project, text=True,
        env={key: known[key] for key in known.keys() - {"HOME", "no_proxy", "NO_PROXY", "USER", "LOGNAME"}},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as first:  # fmt: skip
        assert first.stdout
        said = [first.stdout.readline(), first.stdout.readline()]
        first.stdout.close()
        assert first.stderr
        assert first.stderr.read() == ""
    assert said[0] == "Starting Prefect, Ray and MLflow ...\n"
    assert said[1].startswith("vit: vit_base_patch16_224_in21k starts from random weights; ")
    assert recorded(project / "data") == {"small": finished(2), "vit": finished(2)}
    assert not {"mlflow.db", "mlruns", ".prefect"} & {path.name for path in project.iterdir()} or not contained
    wait_for(lambda: not workers(project))
    before = {path: path.stat().st_mtime_ns for path in (project / "data/runs").rglob("*")}

    second = here("train", "small", "vit")
    assert (second.returncode, "Nothing to do: 2 run(s)" in second.stdout) == (0, True)
    best = max(summary["val"]["accuracy"] for summary in summaries(project).values())
    assert f"val {100 * best:.2f} %" in second.stdout.split("models:/fer-sample@champion: version")[1]
    assert {path: path.stat().st_mtime_ns for path in (project / "data/runs").rglob("*")} == before
    with monkeypatch.context() as patch:  # numbers that differ; test_predict.py has the true ones
        numbers = {0.5: {"accuracy": 0.7, "balanced_accuracy": 0.6}, 1: {"accuracy": 0.5, "balanced_accuracy": 0.8}}
        patch.setattr("fer.evaluate.evened", lambda folder, summary, power: numbers[power])
        told = here("evaluate", "vit").stdout
    assert "Test, class by class" in told
    assert "Test with --even 0.5 of fer predict: accuracy 70.00 %, UAR 60.00 %\n" in told
    assert "Test with --even 1 of fer predict: accuracy 50.00 %, UAR 80.00 %\n" in told
    compared = here("compare").stdout
    assert all(summary["run_id"] in compared for summary in summaries(project).values())
    for _ in range(2):  # made and recorded once
        assert here("ensemble", "small", "vit", "--mirror").returncode == 0
    assert recorded(project / "data")["ensemble"] == finished(1)
    assert here("ensemble", "ensemble").stderr.endswith("is an ensemble itself; name its members\n")


def reached(folder: Path) -> tuple[int, int]:
    """Epoch and step of progress.json, which is written once a second."""
    progress = read_progress(folder)
    return (progress["epoch"], progress["step"]) if progress else (0, 0)


def the_guard(command: subprocess.Popen) -> psutil.Process:
    (found,) = (c for c in psutil.Process(command.pid).children() if "pipelines.guard" in c.cmdline())
    return found


@pytest.mark.timeout(600)  # three commands
def test_stopped_the_same_command_ends_it_as_if_never_cut(
    project: Path, tmp_path: Path, prefect_server: str, ray_here: None, here: Here
):
    """Ctrl-C and SIGTERM save the last step and leave neither a process nor a run behind; test_folds.py has kill -9.

    SIGTERM goes to all, as from Slurm and systemd: to Ray's processes, the guard, and Prefect's server of the command.
    """
    last, at = 12, (0, 0)
    run = experiment(project, "small", epochs=last, batch_size=2)  # many short steps
    for number, everywhere in ((signal.SIGINT, False), (signal.SIGTERM, True)):
        running = start_fer(project, "train", "small", **({} if everywhere else {"PREFECT_API_URL": prefect_server}))
        folder = wait_for(lambda: next((project / "data/runs").glob("small-*"), None))
        wait_for(lambda at=at: reached(folder) > at)  # noqa: B023
        guard = the_guard(running)
        for child in psutil.Process(running.pid).children(recursive=True) if everywhere else ():
            child.send_signal(number)
        running.send_signal(number)
        _, said = running.communicate(timeout=250)
        assert (running.returncode, said.strip()) == (
            128 + number,
            "stopping: every run saves its state; Ctrl-C again exits at once\nstopped: the same command resumes",
        )
        before, epoch = at, json.loads((folder / "last/checkpoint.json").read_text())["epoch"]
        at = epoch, torch.load(folder / "last/training.pt", weights_only=True)["step"]
        # with SIGTERM for all, Ray's own processes may take the worker along before it has saved
        assert at >= (before if everywhere else reached(folder))
        wait_for(lambda: not workers(project) and recorded(project)["small"][0] == "KILLED")
        if not everywhere:
            kept = (project / "mlflow.db").rename(project / "kept.db")  # a guard that looked at the runs would make one
            wait_for(lambda guard=guard: not guard.is_running() or guard.status() == "zombie")
            assert not (project / "mlflow.db").exists()
            kept.rename(project / "mlflow.db")
            wait_for(lambda: last_flow_run() == ("CANCELLED", {"small"}))
            assert not {"stop", "training"} & {path.name for path in folder.iterdir()}

    assert not (folder / "summary.json").exists()
    assert here("train", "small").returncode == 0
    assert recorded(project) == {"small": finished(last)}
    uncut = fit("small", run, CPU, project / DATA, tmp_path / "uncut")
    for name in ("best/model.safetensors", "last/model.safetensors"):
        assert (folder / name).read_bytes() == (uncut / name).read_bytes()


# Failures


@pytest.mark.soak
def test_a_command_whose_prefect_server_is_killed_ends_in_one_line_and_costs_no_run(project: Path, here: Here):
    experiment(project, "small", epochs=30)
    running = start_fer(project, "train", "small")
    wait_for(lambda: len(epochs_done(project).get("small", [])) >= 3)
    children = psutil.Process(running.pid).children(recursive=True)
    (server,) = (child for child in children if any("prefect.server" in word for word in child.cmdline()))
    server.kill()
    _, said = running.communicate(timeout=250)
    assert (running.returncode, said.count("\n")) == (2, 1), said
    assert said.startswith("error: Prefect's server no longer answers ([Errno 111] Connection refused); the runs are ")
    assert here("train", "small").returncode == 0
    assert recorded(project) == {"small": finished(30)}


def chain(project: Path, **changes: Any) -> None:
    """Experiments `first` and, from its backbone, `second`: the disentangled difference of embeddings."""
    experiment(project, "first", **emotion_encoder(epochs=2, **changes))
    experiment(project, "second", **doe(init_from="first"))


def interrupt(row: dict) -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("ray_here")
def test_a_failure_is_final_and_one_line_and_leaves_the_other_runs_alone(project: Path, here: Here):
    """An error of the code, a run that diverges and one that would start from it, and one that another process has."""
    broken = experiment(project, "broken", epochs=2)
    chain(project, optimizer={"lr": 1e30})
    experiment(project, "other", epochs=1)
    taken = run_id("taken", experiment(project, "taken"), open_data(project / DATA).hash)
    with pytest.raises(KeyboardInterrupt):
        fit("broken", broken, CPU, project / DATA, project / "data/runs", on_epoch=interrupt)
    (folder,) = (project / "data/runs").iterdir()
    training = folder / "last/training.pt"
    whole = spoil_optimizer(training)
    words = "train", "broken", "second", "first", "other", "taken"
    with held(project / "data/runs" / taken):
        done = here(*words)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    where = rf"fer/\w+.py:\d+, in \w+; full log: {folder.relative_to(project) / 'log.txt'}"
    assert re.fullmatch(
        rf"error: broken: KeyError: 'exp_avg' \({where}\)\n"
        r"error: first: first-s1111-\w+: loss is (nan|inf) in epoch .*\n"
        "error: second: not started, because first, which it starts from, failed\n"
        f"error: taken: another process is training {taken}; wait for it or stop it",
        "\n".join(errors(done)),
    ), done.stderr
    assert (folder / "log.txt").read_text().count("Traceback (most recent call last):\n") == 1
    assert {name: status for name, (status, _) in recorded(project).items()} == {
        "broken": "FAILED", "first": "FAILED", "other": "FINISHED"
    }  # fmt: skip
    table = done.stdout.split("unleaked", 1)[1]  # below its head
    assert {*re.findall(r"\w+-s1111-\w{8}", table)} == {summaries(project)["other"]["run_id"]}

    training.write_bytes(whole)
    again = here(*words[:-1])  # mended, it goes on; what is left are mistakes of the user
    assert (again.returncode, len(errors(again))) == (2, 2), again.stderr
    assert recorded(project)["broken"] == finished(2)


# Runs that wait, are finished, or begun


@pytest.mark.usefixtures("ray_here")
def test_a_deployment_trains_the_runs_of_the_command_each_after_the_one_it_starts_from(
    project: Path, here: Here, monkeypatch: pytest.MonkeyPatch
):
    """As Prefect's worker calls the flow. The command then does what is left: nothing, or to record or evaluate."""
    start_frameworks()  # as the command does, before Prefect is imported and sets up its log
    from mlflow import MlflowClient
    from prefect.client.orchestration import get_client
    from prefect.flows import load_flow_from_entrypoint

    deployments = {found["name"]: found for found in read_yaml(ROOT / "prefect.yaml", "")["deployments"]}
    flows = {name: load_flow_from_entrypoint(f"{ROOT}/{d['entrypoint']}") for name, d in deployments.items()}
    given = {found.name: deployments[name]["parameters"] for name, found in flows.items()}
    assert given == {"train": {"words": []}, "sweep": {"words": []}}
    with pytest.raises(UserError, match="^words: name an experiment, of .*vgg13_small"):
        flows["train"](words=[])
    with pytest.raises(UserError, match="^words: should be a list, as .*, got 'bars'"):
        flows["train"](words="bars")
    with pytest.raises(UserError, match="^folds 1: should be 2 or more"):  # a number, as a form gives it
        flows["train"](words=["vgg13_small"], folds=1)
    chain(project)
    experiment(project, "other")
    words = ["second", "other", "seed=2", "epochs=1"]  # `first` gets the seed alone
    state = flows["train"](words=words, return_state=True)
    assert state.is_completed(), state.message
    with get_client(sync_client=True) as client:
        artifacts = client.read_artifacts()
    shown = {found.type: found.data for found in artifacts if found.flow_run_id == state.state_details.flow_run_id}
    ran = summaries(project)
    assert {row["run"].rstrip("*") for row in json.loads(shown["table"])} == {one["run_id"] for one in ran.values()}
    assert (float(shown["progress"]), "#/experiments/" in shown["markdown"]) == (100, True)
    assert recorded(project) == {"first": finished(2), "second": finished(1), "other": finished(1)}
    first, second, other = (project / "data/runs" / ran[name]["run_id"] for name in ("first", "second", "other"))
    assert first.name.startswith("first-s2-")
    assert json.loads((second / "config.json").read_text())["start"] == first.name

    shutil.rmtree(first)  # not needed any more, nor made again
    assert "Nothing to do: 2 run(s)" in here("train", *words).stdout
    assert not first.exists()
    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    (run,) = client.search_runs(["1"], f"tags.`fer.run_id` = '{other.name}'")
    client.delete_run(run.info.run_id)  # the server has lost it
    with monkeypatch.context() as patch:
        for name in ("start_ray", "check_resources", "Launcher.launch"):
            patch.setattr(f"pipelines.launch.{name}", None)
        done = here("train", *words)
    assert done.stderr.splitlines() == [f"{other.name}: finished before, but not in MLflow's store; recording it"]
    assert (done.returncode, recorded(project)["other"]) == (0, finished(1))
    predicted = pd.read_csv(other / "predictions_test.csv")
    leave_of_test(project / DATA, (predicted["label"] != predicted["prediction"]).to_numpy())
    done = here("train", *words[1:])
    news = f"{other.name}: the test split has changed since: evaluated again, from its best checkpoint"
    assert (done.returncode, done.stderr.splitlines().count(news)) == (0, 1), done.stderr
    assert summaries(project)["other"]["test"]["accuracy"] == 0


# The command line


def test_models_and_experiments_are_listed_with_what_they_are(project: Path, here: Here):
    shown = here("models", "vit_se", "disentangled_doe").stdout
    (line,) = (line for line in shown.splitlines() if line.split()[:1] == ["vit_se"])
    assert line.split()[:5] == ["vit_se", "86.69M", "86.69M", "35.1", "224x224x3"]
    assert "mobilenet_v3_large: emotion_encoder" in shown
    done = here("train")
    assert (done.returncode, done.stderr) == (0, "")
    listed = {line.split()[0] for line in done.stdout.splitlines() if line.strip()}
    assert listed > {path.stem for path in (project / "experiments").iterdir()}
    assert "VGG13 of Barsoum et al. 2016" in done.stdout
    (project / "experiments/mine.yaml").write_text("# My crops [/data/crops], second try [ours]\nbase: vgg13_small\n")
    assert "My crops [/data/crops], second try [ours]" in here("train").stdout
    done = here("train", "--folds", "5")
    assert (done.returncode, done.stderr) == (2, "error: --folds: name the experiment it is for, or --all\n")
    assert not (project / "data/runs").exists()


@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize(
    ("words", "needs_ray", "variables", "message"),
    [
        ("vit_se_tny", False, {}, "experiments/vit_se_tny.yaml: no such experiment, did you mean 'vit_se_tiny'?"),
        (
            "disentangled_doe_tiny data=moon",
            False,
            {},
            "command line: data: params.yaml has no data set 'moon' under data; known: sample",
        ),
        ("epochs=2", False, {}, "epochs=2: name the experiment it is for, one of disentangled_doe, "),
        (
            "vit_se model.backbone.weights=a/b.safetensors",
            False,
            {},
            "model.backbone.weights: cannot load 'a/b.safetensors': it names a file. Give a hub id ",
        ),
        ("doe", False, {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, "tracking.uri: no server answers at http:"),
        ("doe", True, {"RAY_ADDRESS": "127.0.0.1:9"}, "RAY_ADDRESS: no cluster answers at 127.0.0.1:9 ("),
        ("vgg13_small resources.workers=64", True, {}, "vgg13_small: resources: 64 worker(s) need 64 CPUs, there are "),
        ("vgg13_small resources.device=cuda", True, {}, "vgg13_small: resources.device: cuda, but there is no GPU"),
    ],
)
def test_what_is_not_there_is_one_line_and_leaves_nothing(
    words: str, needs_ray: bool, variables: dict, message: str, project: Path, here: Here, monkeypatch: Any
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if "RAY_ADDRESS" in variables:
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
    elif not needs_ray:
        monkeypatch.setattr("pipelines.launch.start_ray", None)
    done = here("train", *words.split())
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith(f"error: {message}")
    assert not (project / "data/runs").exists()


def test_missing_data_and_params_name_the_remedy(tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for words in ("train doe", "train", "train --all", "config", "models"):
        done = here(*words.split())
        assert (done.returncode, done.stdout) == (2, ""), words
        assert done.stderr.endswith("run the command in the project's root folder\n")
    copy_settings(tmp_path)
    done = here("train", "vgg13_small")
    told = "error: data/sets/sample/splits/summary.json: not found; make the data with `dvc repro`\n"
    assert (done.returncode, done.stderr) == (2, told)


def test_who_waits_for_another_command_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.setattr(flow, "START_PATIENCE", 0.2)
    with flow._starting():
        assert capsys.readouterr().out == ""
        assert "is working on it; wait for it or stop it" in refusal(flow._starting().__enter__)
    assert capsys.readouterr().out == "Waiting for another command that is starting\n"
