"""`fer sweep` on a local Ray: searched, confirmed, applied; killed anywhere and gone on with; fed to MLflow by one."""

import json
import re
import signal
import sqlite3
import subprocess
from collections import Counter
from contextlib import closing
from pathlib import Path

import optuna
import psutil
import pytest
from test_flow import BIN, env, here, ray_here, server, wait_for  # noqa: F401

from fer.data.dataset import open_data
from fer.errors import UserError
from fer.losses import LOSSES
from fer.train import fit
from pipelines import experiments
from pipelines.params import load, machine
from pipelines.sweeps import folder as sweeps
from pipelines.sweeps import search
from pipelines.sweeps.folder import DONE, FAILED, PRUNED, Plan, Trial
from pipelines.work import is_held

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]

EPOCHS = 9
SMALL = [
    "changes.input.image_size=16",
    "changes.model={width: 0.0625, batch_norm: true, conv_dropout: 0.1, dense_dropout: 0.1}",
    f"changes.epochs={EPOCHS}",
    "changes.batch_size=16",
    "grace_epochs=3",  # a rung, the only one
    "reduction=4",
    "trials=6",
    "confirm_seeds=0",
]


def plan(*changes: str) -> Plan:
    return sweeps.plan(["sample", *SMALL, *changes], machine(load()), open_data("data").hash)


def command(*words: str) -> list[str]:
    return [str(BIN / "fer"), "sweep", *words, *SMALL]


def sweep(project: Path, url: str, *own: str) -> subprocess.CompletedProcess:
    words, surroundings = [*command("sample"), *own], env(PREFECT_API_URL=url)
    return subprocess.run(words, cwd=project, env=surroundings, capture_output=True, text=True, timeout=500)


def start(project: Path, url: str, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*command("sample"), *words], cwd=project, env=env(PREFECT_API_URL=url), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def ask(project: Path, query: str) -> list[tuple]:
    with closing(sqlite3.connect(project / "mlflow.db")) as store:
        return store.execute(query).fetchall()


def statuses(project: Path) -> dict[str, str]:
    """our id -> status of each MLflow run."""
    rows = ask(project, "select t.value, r.status from runs r join tags t using (run_uuid) where t.key = 'fer.run_id'")
    assert len(dict(rows)) == len(rows), "one MLflow run for each trial"
    return dict(rows)


def check_books(project: Path, folder: Path) -> list[Trial]:
    """No trial lost, each epoch trained once, on disk and in MLflow once, nothing left RUNNING."""
    found = sweeps.read_trials(folder)
    for trial in found:
        assert trial.state in (DONE, PRUNED), trial.error
        assert [row["epoch"] for row in trial.rows] == list(range(1, trial.epoch + 1))
        trained = re.findall(r" epoch (\d+): ", (trial.folder / "log.txt").read_text())
        assert len(set(trained)) == len(trained)  # a process that is killed may lose its last line
        assert set(trained) <= {str(epoch) for epoch in range(1, trial.epoch + 1)}
    names = [f"{folder.name}/{trial.folder.name}" for trial in found]
    assert statuses(project) == dict.fromkeys([folder.name, *names], "FINISHED")
    steps = ask(
        project,
        "select t.value, m.step from metrics m join tags t using (run_uuid) "
        "where t.key = 'fer.run_id' and m.key = 'val_accuracy'",
    )
    assert Counter(steps) == Counter((name, row["epoch"]) for name, trial in zip(names, found) for row in trial.rows)
    return found


def epochs_of(folder: Path) -> int:
    return sum(trial.epoch for trial in sweeps.read_trials(folder)) if (folder / "sweep.json").exists() else 0


@pytest.mark.timeout(600)
def test_a_sweep_from_search_to_model(project: Path, server: str, here, ray_here):
    own = ["changes.optimizer.lr=5e-4", "confirm_seeds=2"]
    own += ["scheduler=none"]  # so that the best does not hang on which trial was faster
    done = sweep(project, server, *own)
    assert done.returncode == 0, done.stderr
    (folder,) = sweeps.folders("sample")
    found = sweeps.read_trials(folder)
    assert found[0].point == {"optimizer.lr": 5e-4, "loss": "cross_entropy", "optimizer.weight_decay": 0.01}  # the base
    assert 4 <= len(found) <= 6  # a point that was drawn twice was run once
    assert not list((folder / "runs").glob("*/predictions*")), "a trial never opens test"
    assert not list((folder / "runs").rglob("*.safetensors")), "nor does an ended one keep its weights"
    result = sweeps.result(folder)
    assert result is not None
    best = sweeps.best_of(found)
    assert best is not None
    assert result["best"] == {"number": best.number, "val_accuracy": best.best, "epoch": EPOCHS, "point": best.point}
    assert best.number != 1  # so that it is confirmed
    assert result["seeds"] == [1112, 1113]
    summaries = [json.loads((project / "data/runs" / run / "summary.json").read_text()) for run in result["runs"]]
    assert [summary["name"] for summary in summaries] == ["sample_best", "vgg13_small"] * 2
    values = [summary["val"]["accuracy"] for summary in summaries]
    assert result["confirmed"] == sweeps.compared(values[::2], values[1::2])
    assert set(statuses(project).values()) == {"FINISHED"}
    assert len(statuses(project)) == 1 + len(found) + 4
    parents = ask(project, "select value from tags where key = 'mlflow.parentRunId'")
    ((parent,),) = ask(project, f"select run_uuid from tags where key = 'fer.run_id' and value = '{folder.name}'")
    assert parents == [(parent,)] * len(found)
    artifacts = {path.name for path in next((project / "mlruns").glob(f"*/{parent}/artifacts")).iterdir()}
    assert artifacts == {"sweep.json", "trials.csv", "parallel.png", "slices.png"}
    assert len(list((project / "mlruns").glob("*/*/artifacts/log.txt"))) == 4, "of the confirming runs"

    again = here("sweep", "sample", *SMALL, *own)
    assert "Nothing to do: " in again.stdout, again.stderr
    changed = here("sweep", "sample", *SMALL, *own, "seed=1")
    assert (changed.returncode, changed.stderr) == (
        2,
        f"error: sweep sample: seed differs from the sweep in data/sweeps/{folder.name}; "
        "change it back to go on with that one, or give --new to start another\n",
    )
    shown = here("sweep", "status")
    assert all(f" {trial.number} " in shown.stdout for trial in found)
    assert "With 2 other seeds: best " in shown.stdout
    assert here("sweep", "apply", "sample", "--as", "better").returncode == 0
    keys = {"lr": best.point["optimizer.lr"], "weight_decay": best.point["optimizer.weight_decay"]}
    base = plan(*own).base.run
    changes = {"optimizer": base.optimizer.model_copy(update=keys), "loss": LOSSES[best.point["loss"]]()}
    assert experiments.load(["better"], {})["better"].run == base.model_copy(update=changes)

    more = here("sweep", "sample", *SMALL, *own, "trials=9")  # a larger budget: the same sweep goes on
    assert more.returncode == 0, more.stderr
    assert sweeps.folders("sample") == [folder]
    after = sweeps.read_trials(folder)
    assert len(after) > len(found)
    rows = {trial.folder: trial.rows for trial in after}
    assert all(rows[trial.folder] == trial.rows for trial in found)  # none was trained again


def driver(process: subprocess.Popen, project: Path, folder: Path) -> None:
    process.send_signal(signal.SIGKILL)


def head(process: subprocess.Popen, project: Path, folder: Path) -> None:
    """Ray's own processes, so that the driver loses its cluster."""
    for child in psutil.Process(process.pid).children():
        if child.name() in ("raylet", "gcs_server"):
            child.kill()


def interrupted(process: subprocess.Popen, project: Path, folder: Path) -> None:
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130


def trials_of(process: subprocess.Popen, project: Path, folder: Path) -> None:
    """The processes of trials alone: they are tried again from their last epoch."""
    for child in psutil.Process(process.pid).children(recursive=True):
        if _trains(child, project):
            child.kill()


def _trains(process: psutil.Process, project: Path) -> bool:
    try:
        return f"{project}/data/upscaled/images.npy" in Path(f"/proc/{process.pid}/maps").read_text()
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        return False


@pytest.mark.timeout(600)  # a driver waits a minute for a head that is gone
@pytest.mark.parametrize(
    ("victim", "moments"),
    [(driver, (1, 14)), (head, (8,)), (interrupted, (8,)), (trials_of, (2, 12))],
    ids=["driver", "head", "interrupted", "trials"],
)
@pytest.mark.soak
def test_killed_at_any_moment_it_goes_on_and_no_epoch_is_trained_twice(project: Path, server: str, victim, moments):
    """`moments`: epochs of all trials that are done when it is cut."""
    folder = plan().folder
    for epochs in moments:
        process = start(project, server)
        wait_for(lambda done=epochs: epochs_of(folder) >= done)
        victim(process, project, folder)
        process.wait(timeout=200)
        wait_for(lambda: "RUNNING" not in statuses(project).values(), 60)
    done = sweep(project, server)
    assert done.returncode == 0, done.stderr
    check_books(project, folder)


def test_a_killed_search_goes_on_from_its_epochs(project: Path, server: str):
    folder = plan().folder
    process = start(project, server)
    wait_for(lambda: epochs_of(folder) >= 8)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=120)
    wait_for(lambda: not any(is_held(path) for path in folder.glob("runs/*")))
    before = {trial.folder.name: trial.rows for trial in sweeps.read_trials(folder)}
    done = sweep(project, server)
    assert done.returncode == 0, done.stderr
    found = {trial.folder.name: trial.rows for trial in check_books(project, folder)}
    for name, rows in before.items():
        assert found[name][: len(rows)] == rows


def test_importance_names_the_key_that_decides(project: Path):
    sweep = plan()
    sweeps.begin(sweep)
    found = []
    for number, point in enumerate(search.grid(sweep.space), 1):
        value = 0.9 if point["loss"] == "focal_pdls" else 0.1
        rows = ({"epoch": 1, "val_accuracy": value, "seconds": 1.0},)
        found.append(Trial(number, point, PRUNED, None, Path(), rows))
    shares = search.importance(sweep, found)
    assert next(iter(shares)) == "loss"
    assert shares["loss"] > 0.8
    assert sum(shares.values()) == pytest.approx(1)
    assert search.importance(sweep, found[:4]) == {}
    assert [path.name for path in search.draw(sweep, found)] == ["parallel.png", "slices.png"]
    assert all(path.stat().st_size > 5000 for path in search.draw(sweep, found))


@pytest.mark.parametrize("kind", ["tpe", "random"])
def test_the_sampler_draws_no_key_that_a_choice_leaves_out(project: Path, kind: str):
    space = "space={loss: {choice: [{name: focal_pdls, gamma: {float: [0, 4]}}, label_smoothing]}}"
    sweep = plan("changes.loss=focal_pdls", space, f"search={kind}")
    study = optuna.create_study(sampler=search._sampler(sweep, 1), direction="maximize")
    seen = set()
    for number in range(20):
        drawn = study.ask()
        search._Draw(sweep)(drawn)
        seen.add((drawn.params["loss"], "loss.focal_pdls.gamma" in drawn.params))
        study.tell(drawn, number / 20)
    assert seen == {("focal_pdls", True), ("label_smoothing", False)}


def test_points_that_cannot_work_are_named_before_anything_starts(project: Path, monkeypatch: pytest.MonkeyPatch):
    """Each value may be well: fp16 does not go with SAM."""
    monkeypatch.setattr(search.ray, "cluster_resources", lambda: {"CPU": 2.0})
    search.check(plan("space={sam_rho: {choice: [null, 0.05]}, precision: {choice: [fp32, bf16]}}"))
    with pytest.raises(UserError) as caught:
        search.check(plan("space={sam_rho: {choice: [null, 0.05]}, precision: {choice: [fp32, fp16]}}"))
    line = str(caught.value)
    assert re.match(
        r"sweep sample: space: \d+ of 50 points drawn from it cannot work, as sam_rho: needs precision", line
    )


def test_points_that_the_workers_of_the_confirming_runs_cannot_share(project: Path, monkeypatch: pytest.MonkeyPatch):
    """A trial has one process, so any batch would do for the search."""
    monkeypatch.setattr(search.ray, "cluster_resources", lambda: {"CPU": 2.0})
    space = "space={batch_size: {choice: [16, 17]}}"
    search.check(plan(space))
    with pytest.raises(UserError, match=r"points drawn from it cannot work, as batch_size: 17 does not divide by res"):
        search.check(plan(space, "changes.resources.workers=2"))
    with pytest.raises(UserError, match=r"as batch_size: .* resources.workers 1 times resources.accumulate 2"):
        search.check(plan(space, "changes.resources.accumulate=2"))


@pytest.mark.parametrize(
    ("key", "have", "message"),
    [
        ("gpus_per_trial=1", {"CPU": 2.0}, "gpus_per_trial: 1 GPUs, there are 0; set it to 0 to use CPUs"),
        ("cpus_per_trial=4", {"CPU": 2.0}, "cpus_per_trial: 4 CPUs, there are 2; lower it"),
    ],
)
def test_more_than_the_machine_has(project: Path, monkeypatch: pytest.MonkeyPatch, key: str, have: dict, message: str):
    monkeypatch.setattr(search.ray, "cluster_resources", lambda: have)
    with pytest.raises(UserError) as caught:
        search.check(plan(key))
    assert str(caught.value) == f"sweep sample: {message}"


@pytest.mark.parametrize(
    ("gpus", "at_once", "trials_at_once"),
    [(0, "null", 8), (0.5, "null", 4), (0.1, "null", 8), (1, "null", 2), (0.5, 3, 3)],
)
def test_trials_at_the_same_time(project: Path, monkeypatch: pytest.MonkeyPatch, gpus, at_once, trials_at_once):
    """On 8 CPUs and 2 GPUs: 0.1 GPU a trial would give 20, but each needs a CPU too."""
    monkeypatch.setattr(search.ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0})
    assert search._at_once(plan(f"gpus_per_trial={gpus}", f"at_once={at_once}")) == trials_at_once


@pytest.mark.parametrize("scheduler", ["none", "asha", "hyperband"])
def test_a_trial_that_diverges_fails_alone_and_is_the_worst(project: Path, ray_here, scheduler: str):
    diverging = ["space={optimizer.lr: {choice: [2e-3, 1e30]}, loss: {choice: [cross_entropy, focal_pdls]}}"]
    diverging += [f"scheduler={scheduler}", "search=grid", "reduction=2"]
    sweep = plan(*diverging)
    sweeps.begin(sweep)
    found = search.search(sweep)
    assert len(found) == 4  # each point once, whatever `trials` says
    for trial in found:
        assert (trial.state == FAILED) == (trial.point["optimizer.lr"] == 1e30)
        assert trial.error is None or "loss is " in trial.error
    best = sweeps.best_of(found)
    assert best is not None
    assert best.state == DONE
    assert search.search(sweep) == found  # nothing is left to do


def test_a_mistake_that_stops_every_trial_stops_the_sweep(project: Path, ray_here):
    sweep = plan()
    sweeps.begin(sweep)
    (project / "data/upscaled/images.npy").unlink()
    with pytest.raises(UserError, match="images.npy: not found"):
        search.search(sweep)


def test_an_error_of_the_code_fails_a_trial_and_is_not_tried_again(project: Path, ray_here):
    """The base's checkpoint, after its first epoch, is of no use; the other trial goes on."""
    sweep = plan("trials=2", "scheduler=none", "search=grid", "space={loss: {choice: [cross_entropy, focal_pdls]}}")
    sweeps.begin(sweep)
    job = sweep.job(sweep.published)
    with pytest.raises(KeyboardInterrupt):
        fit(job.name, job.run, job.resources, "data", job.folder.parent, on_epoch=interrupt)
    path = job.folder / "last/checkpoint.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "epoch"}))
    base, other = search.search(sweep)
    assert (base.state, base.epoch, other.state) == (FAILED, 1, DONE)
    assert base.error is not None
    assert re.match(r"KeyError: 'epoch' \(fer/train.py:\d+, in _resume; all of it: ", base.error)
    assert (base.folder / "log.txt").read_text().count("Traceback") == 1


def interrupt(row: dict) -> None:
    raise KeyboardInterrupt


def test_time_that_is_over_cuts_trials(project: Path, ray_here):
    sweep = plan("changes.epochs=9000", "grace_epochs=9000", "trials=2", "hours=0.005")
    sweeps.begin(sweep)
    found = search.search(sweep)
    assert {trial.state for trial in found} == {PRUNED}
    assert sweeps.spent(found, 1) > 4
    assert all(trial.epoch < 9000 for trial in found)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nope"], "sweeps/nope.yaml: no such sweep; known: fpdls, sample, tiny"),
        (["sampel"], "sweeps/sampel.yaml: no such sweep, did you mean 'sample'?"),
        (["sample", "trials=0"], "command line: trials: should be greater than 0, got 0"),
        (["sample", "base=x"], "command line: base: experiments/x.yaml: no such experiment; known: "),
        (["sample", "space.optimizer.lr={int: [1, 2]}"],
         "sweeps/sample.yaml: space.optimizer.lr: an int range, but the base has 0.002; use float or log"),
        (["sample", "gpus_per_trial=1"], "sweep sample: gpus_per_trial: 1 GPUs, there are 0; set it to 0 to use CPUs"),
        (["status"], "data/sweeps: no sweep yet; start one with `fer sweep NAME`"),
        (["status", "sample"], "data/sweeps: no sweep sample yet; start one with `fer sweep NAME`"),
        (["apply", "sample"], "sweep sample: no finished sweep of that name; run `fer sweep sample`"),
    ],
)  # fmt: skip
def test_a_users_mistake_is_one_line_and_status_2_and_starts_nothing(
    project: Path, here, ray_here, words: list[str], message: str
):
    done = here("sweep", *words)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert done.stderr.startswith(f"error: {message}")
    assert not (project / "data/sweeps").exists()
