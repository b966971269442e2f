"""`fer sweep` on a local Ray: searched, confirmed, applied; killed anywhere and gone on with; fed to MLflow by one."""

import json
import re
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from conftest import DATA, refusal, spoil_optimizer, start_fer, wait_for, workers

from fer.data.dataset import open_data
from fer.errors import UserError
from fer.files import held
from fer.signals import Stopped
from fer.train import fit
from pipelines import experiments
from pipelines.flow import prepare_sweep
from pipelines.params import load, machine
from pipelines.sweeps import folder as sweeps
from pipelines.sweeps import search
from pipelines.sweeps.files import read_result
from pipelines.sweeps.folder import DONE, FAILED, PRUNED, Plan, Trial
from pipelines.tracking import Tracker, described

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]

EPOCHS = 6
SMALL = [
    "changes.input.image_size=16",
    "changes.model={width: 0.0625, batch_norm: true, conv_dropout: 0.1, dense_dropout: 0.1}",
    f"changes.epochs={EPOCHS}", "changes.batch_size=16", "trials=5", "confirm_seeds=0",
    "grace_epochs=2", "reduction=4",  # one rung
]  # fmt: skip


def machines(*found: dict[str, float]) -> list[dict]:
    """As `ray.nodes` tells them."""
    return [{"Alive": True, "Resources": one} for one in found] + [{"Alive": False, "Resources": {"CPU": 99.0}}]


def plan(*changes: str) -> Plan:
    return sweeps.plan(["sample", *SMALL, *changes], machine(load()), lambda base: open_data(DATA))


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
    own = {name: status for name, status in statuses(project).items() if name.startswith(folder.name)}
    assert own == dict.fromkeys([folder.name, *names], "FINISHED")
    marks = "select t.value, m.step from metrics m join tags t using (run_uuid) where m.key = 'val_accuracy'"
    steps = ask(project, f"{marks} and t.key = 'fer.run_id' and t.value like '{folder.name}/%'")
    assert Counter(steps) == Counter((name, row["epoch"]) for name, trial in zip(names, found) for row in trial.rows)
    return found


def epochs_of(folder: Path) -> int:
    return sum(trial.epoch for trial in sweeps.read_trials(folder)) if (folder / "sweep.json").exists() else 0


def interrupt(row: dict) -> None:
    raise KeyboardInterrupt


@pytest.mark.timeout(600)  # four searches
def test_a_sweep_from_search_to_model(
    project: Path, here, ray_here, empty_store: Path, monkeypatch: pytest.MonkeyPatch
):
    """Cut in its first trial, it goes on from there. One choice brings a range of its own."""
    words = [*SMALL, "confirm_seeds=1", "changes.optimizer.lr=1e-7"]  # so that the base, which needs no seeds, loses
    words += ["scheduler=none"]  # so that the best does not hang on which trial was faster
    words += ["space.optimizer.lr={choice: [1e-7, 4e-3, 6e-3, 8e-3]}"]
    words += ["space.loss={choice: [cross_entropy, {name: focal_pdls, gamma: {float: [0, 4]}}]}"]
    folder = plan(*words).folder

    def sweep(*more: str) -> str:
        done = here("sweep", "sample", *words, *more)
        assert (done.returncode, sweeps.folders("sample")) == (0, [folder]), done.stderr
        return done.stdout

    begun = plan(*words)
    sweeps.begin(begun)
    job = begun.job(begun.published)
    sweeps.begin_trial(job.folder, begun.published)
    with pytest.raises(KeyboardInterrupt):
        fit(job.name, job.run, job.resources, DATA, job.folder.parent, on_epoch=interrupt)
    before = {trial.folder.name: trial.rows for trial in sweeps.read_trials(folder)}
    assert [len(rows) for rows in before.values()] == [1]
    assert re.search(r"\d of \d trials finished", sweep())

    found = check_books(project, folder)
    for trial in found:
        assert trial.rows[: len(before.get(trial.folder.name, ()))] == before.get(trial.folder.name, ())
        assert ("loss.focal_pdls.gamma" in trial.point) == (trial.point["loss"] == "focal_pdls")
    assert found[0].point == {"optimizer.lr": 1e-7, "loss": "cross_entropy", "optimizer.weight_decay": 0.01}  # the base
    assert 3 <= len(found) <= 5  # a point that was drawn twice was run once
    kept = [*folder.glob("runs/*/predictions*"), *folder.rglob("runs/**/*.safetensors")]
    assert kept == []  # a trial never opens test, nor does an ended one keep its weights
    result, best = read_result(folder), sweeps.best_of(found)
    assert result is not None
    assert best is not None
    assert best.number != 1
    assert result["best"] == {"number": best.number, "val_accuracy": best.best, "epoch": EPOCHS, "point": best.point}
    summaries = [json.loads((project / "data/runs" / run / "summary.json").read_text()) for run in result["runs"]]
    assert [summary["name"] for summary in summaries] == ["sample_best", "vgg13_small"]
    ours, base = (summary["val"]["accuracy"] for summary in summaries)
    assert (result["seeds"], result["confirmed"]) == ([1112], sweeps.compared([ours], [base]))
    assert list(statuses(project).values()) == ["FINISHED"] * (1 + len(found) + 2)
    parents = ask(project, "select value from tags where key = 'mlflow.parentRunId'")
    ((parent,),) = ask(project, f"select run_uuid from tags where key = 'fer.run_id' and value = '{folder.name}'")
    assert parents == [(parent,)] * len(found)
    artifacts = {path.name for path in next((project / "mlruns").glob(f"*/{parent}/artifacts")).iterdir()}
    assert artifacts == {"sweep.json", "trials.csv", "parallel.png", "slices.png"}

    assert "Nothing to do: " in sweep()
    (project / "empty").mkdir()
    shutil.copy(empty_store, project / "empty/mlflow.db")
    with monkeypatch.context() as patch:  # as if the store were lost
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/empty/mlflow.db")
        assert f"{folder.name}: complete, but not in MLflow's store; recording it" in sweep()
        assert (statuses(project / "empty"), sweeps.read_trials(folder)) == (statuses(project), found)
    changed = here("sweep", "sample", *words, "seed=1")
    assert (changed.returncode, len(changed.stderr.splitlines())) == (2, 1)
    assert changed.stderr.startswith(f"error: sweep sample: seed differs from the sweep in data/sweeps/{folder.name}; ")
    shown = here("sweep", "status").stdout
    assert all(text in shown for text in ["With 1 other seed: best ", *(f" {trial.number} " for trial in found)])
    assert here("sweep", "apply", "sample", "--as", "better").returncode == 0
    assert experiments.load(["better"], {})["better"].run == plan(*words).run(best.point)

    sweep("trials=8")  # a larger budget: the same sweep goes on
    rows = {trial.folder: trial.rows for trial in check_books(project, folder)}
    assert len(rows) > len(found)
    assert all(rows[trial.folder] == trial.rows for trial in found)  # none was trained again


def kill(pids: list[int]) -> None:
    for pid in pids:
        psutil.Process(pid).kill()


def head_of(process: subprocess.Popen) -> list[int]:
    """Ray's own processes, without which the driver has no cluster."""
    children = psutil.Process(process.pid).children()
    return [child.pid for child in children if child.name() in ("raylet", "gcs_server")]


@pytest.mark.timeout(600)  # a driver waits a minute for a head that is gone
@pytest.mark.parametrize(
    ("cut", "moments"),  # epochs of all trials that are done when it is cut
    [
        (lambda process, project: process.kill(), (1, 12)),
        (lambda process, project: kill(head_of(process)), (6,)),
        (lambda process, project: process.send_signal(signal.SIGINT), (6,)),
        (lambda process, project: kill(workers(project)), (2, 10)),  # tried again from their last epoch
    ],
    ids=["driver", "head", "interrupted", "trials"],
)
@pytest.mark.soak
def test_killed_at_any_moment_it_goes_on_and_no_epoch_is_trained_twice(
    project: Path, prefect_server: str, cut: Callable, moments: tuple[int, ...]
):
    folder = plan().folder
    for epochs in (*moments, None):
        process = start_fer(project, "sweep", "sample", *SMALL, PREFECT_API_URL=prefect_server)
        if epochs is not None:
            wait_for(lambda done=epochs: epochs_of(folder) >= done)
            cut(process, project)
        _, errors = process.communicate(timeout=280)
        wait_for(lambda: "RUNNING" not in statuses(project).values())
    assert process.returncode == 0, errors
    check_books(project, folder)


# Without a flow


def test_a_trial_that_has_ended_stays_so_when_a_person_stops_the_sweep(project: Path, empty_store: Path):
    tracker, sweep = Tracker(f"sqlite:///{shutil.copy(empty_store, project / 'mlflow.db')}", "fer"), plan()
    sweeps.begin(sweep)
    job = sweep.job(sweep.published)
    sweeps.begin_trial(job.folder, sweep.published)
    fit(job.name, job.run, job.resources, DATA, job.folder.parent)
    data = open_data(DATA)
    with pytest.raises(Stopped), tracker.sweep(sweep, described(data)):
        wait_for(lambda: len(statuses(project)) == 2)
        sweeps.end_trial(job.folder)
        wait_for(lambda: "FINISHED" in statuses(project).values())
        tracker.leave()
        raise Stopped("by a person")
    assert sorted(statuses(project).values()) == ["FINISHED", "KILLED"]


def test_a_trial_that_fails_is_the_worst_and_fails_alone_and_once(project: Path, ray_here):
    """Two diverge; the base's checkpoint, after its first epoch, is of no use, which is an error of the code."""
    space = "space={optimizer.lr: {choice: [2e-3, 1e30]}, loss: {choice: [cross_entropy, focal_pdls]}}"
    sweep = plan(space, "scheduler=hyperband", "search=grid", "reduction=2")
    sweeps.begin(sweep)
    job = sweep.job(sweep.published)
    with pytest.raises(KeyboardInterrupt):
        fit(job.name, job.run, job.resources, DATA, job.folder.parent, on_epoch=interrupt)
    spoil_optimizer(job.folder / "last/training.pt")
    base, *others = found = search.search(sweep)
    assert len(found) == 4  # each point once, whatever `trials` says
    assert (base.state, base.epoch) == (FAILED, 1)
    assert re.match(r"KeyError: 'exp_avg' \(fer/\w+.py:\d+, in \w+; full log: ", base.error or "")
    assert (base.folder / "log.txt").read_text().count("Traceback") == 1
    for trial in others:
        assert (trial.state == FAILED) == (trial.point["optimizer.lr"] == 1e30) == ("loss is " in (trial.error or ""))
    assert getattr(sweeps.best_of(found), "state", None) == DONE
    assert search.search(sweep) == found  # nothing is left to do


def test_time_that_is_over_cuts_trials_and_a_mistake_stops_them_all(project: Path, ray_here):
    sweep = plan("changes.epochs=9000", "grace_epochs=9000", "trials=2", "hours=0.002")
    sweeps.begin(sweep)
    assert {(trial.state, trial.epoch < 9000) for trial in search.search(sweep)} <= {(PRUNED, True)}
    sweeps.begin(sweep := plan())
    (project / DATA / "upscaled/images.npy").unlink()
    with pytest.raises(UserError, match="images.npy: not found"):
        search.search(sweep)


def test_importance_names_the_key_that_decides(project: Path):
    sweeps.begin(sweep := plan())
    found = []
    for number, point in enumerate(search.grid(sweep.space), 1):
        value = 0.9 if point["loss"] == "focal_pdls" else 0.1
        rows = ({"epoch": 1, "val_accuracy": value, "seconds": 1.0},)
        found.append(Trial(number, point, PRUNED, None, Path(), rows))
    first, *others = search.importance(sweep, found).items()
    assert (first[0], first[1] > 0.8) == ("loss", True)
    assert first[1] + sum(share for _, share in others) == pytest.approx(1)
    assert search.importance(sweep, found[:4]) == {}
    assert [path.name for path in search.draw(sweep, found)] == ["parallel.png", "slices.png"]


BATCHES, WORKERS = "space={batch_size: {choice: [16, 17]}}", "changes.resources.workers=2"
PRECISIONS = "space={{sam_rho: {{choice: [null, 0.05]}}, precision: {{choice: [fp32, {}]}}}}"
POINTS = "sweep sample: space: N of 50 points drawn from it cannot work, as "


def test_a_trial_runs_on_one_machine_of_a_cluster(project: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(search.ray, "nodes", lambda: machines({"CPU": 3.0}, {"CPU": 3.0}))
    assert search.trials_at_once(plan("cpus_per_trial=2")) == 2
    told = "sweep sample: cpus_per_trial: 4 CPUs, there are 3 on one machine; lower it"
    assert refusal(search.check, plan("cpus_per_trial=4")) == told
    monkeypatch.setattr(search.ray, "nodes", lambda: machines({"CPU": 8.0}, {"CPU": 1.0, "GPU": 1.0}))
    told = "sweep sample: cpus_per_trial: no machine has that many CPUs beside a GPU; lower it"
    assert refusal(search.check, plan("cpus_per_trial=2", "gpus_per_trial=1")) == told


def test_a_trial_drawn_twice_at_a_time_is_the_same_trial(project: Path, monkeypatch: pytest.MonkeyPatch):
    """The second one waits until the first is stopped after an epoch; it then reports that epoch, too, and ends."""
    made, told, begun = plan(), list[dict](), threading.Event()
    sweeps.begin(made)
    job = made.job(made.published)
    monkeypatch.setattr(search.tune, "report", told.append)

    def first() -> None:
        with held(job.folder):
            begun.set()
            time.sleep(1)  # in which the second one looks at the folder, if it does not wait
            with suppress(KeyboardInterrupt):
                fit(job.name, job.run, job.resources, DATA, job.folder.parent, on_epoch=interrupt)

    thread = threading.Thread(target=first)
    thread.start()
    begun.wait()
    search._trial(made.published, made)
    thread.join()
    assert [row["epoch"] for row in told] == list(range(1, EPOCHS + 1))
    (trial,) = sweeps.read_trials(made.folder)
    assert (trial.state, trial.epoch) == (DONE, EPOCHS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["gpus_per_trial=1"], "sweep sample: gpus_per_trial: 1 GPUs, there are 0; set it to 0 to use CPUs"),
        (["cpus_per_trial=4"], "sweep sample: cpus_per_trial: 4 CPUs, there are 2; lower it"),
        ([PRECISIONS.format("fp16")], POINTS + "sam_rho: needs precision"),  # each value may be well
        ([BATCHES, WORKERS], POINTS + "batch_size: 17 does not divide by resources.workers 2"),  # of confirming runs
    ],
)
def test_what_cannot_work_is_named_before_anything_starts(
    project: Path, monkeypatch: pytest.MonkeyPatch, changes: list[str], message: str
):
    monkeypatch.setattr(search.ray, "nodes", lambda: machines({"CPU": 2.0}))
    assert re.sub(r"\d+ of", "N of", refusal(search.check, plan(*changes))).startswith(message)
    for well in (PRECISIONS.format("bf16"), BATCHES):
        search.check(plan(well))


def test_trials_at_the_same_time(project: Path, monkeypatch: pytest.MonkeyPatch):
    """On 8 CPUs and 2 GPUs: 0.1 GPU a trial would give 20, but each needs a CPU too."""
    monkeypatch.setattr(search.ray, "nodes", lambda: machines({"CPU": 8.0, "GPU": 2.0}))
    for gpus, at_once, count in ((0, "null", 8), (0.5, "null", 4), (0.1, "null", 8), (0.5, 3, 3)):
        assert search.trials_at_once(plan(f"gpus_per_trial={gpus}", f"at_once={at_once}")) == count


def test_a_search_that_is_over_is_not_begun_again(project: Path, monkeypatch: pytest.MonkeyPatch):
    """Its five points may be fewer trials; a process that dies before it writes anything is a failed one."""
    monkeypatch.setattr(search.ray, "nodes", lambda: machines({"CPU": 2.0}))
    died = SimpleNamespace(error=RuntimeError("killed"), config={**plan().published, "optimizer.lr": 4e-3})
    starts: list[int] = []
    monkeypatch.setattr(search.tune, "Tuner", lambda *_, **__: SimpleNamespace(fit=lambda: starts.append(1) or [died]))
    sweeps.begin(begun := plan())
    sweeps.begin_trial(folder := begun.job(begun.published).folder, begun.published)
    sweeps.end_trial(folder)
    for _ in range(2):
        assert [trial.state for trial in search.search(begun)] == [DONE, FAILED]
        sweeps.begin(begun)
    assert len(starts) == 1
    search.search(plan("trials=6"))
    assert len(starts) == 2


def test_a_second_command_leaves_the_budget_of_a_sweep_that_runs(project: Path, ray_here, empty_store: Path):
    first, _ = prepare_sweep(["sample", *SMALL], new=False)
    before = (first.folder / "sweep.json").read_bytes()
    with held(first.folder):
        told = f"{first.folder}: another process is working on it; wait for it or stop it"
        assert refusal(prepare_sweep, ["sample", *SMALL, "trials=9"], False) == told
    assert (first.folder / "sweep.json").read_bytes() == before


def test_what_needs_a_sweep_says_so(project: Path, here):
    for command, message in (
        ("status", "data/sweeps: no sweep sample yet; start one with `fer sweep NAME`"),
        ("apply", "sweep sample: no finished sweep of that name; run `fer sweep sample`"),
    ):
        done = here("sweep", command, "sample")
        assert (done.returncode, done.stderr) == (2, f"error: {message}\n")
