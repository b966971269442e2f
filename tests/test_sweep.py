"""`fer sweep` on a local Ray: searched, confirmed, applied; killed anywhere and gone on with; fed to MLflow by one."""

import json
import signal
import sqlite3
import subprocess
from collections import Counter
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from test_flow import BIN, env, server, wait_for  # noqa: F401

from fer.data.dataset import open_data
from fer.errors import UserError
from fer.files import write_json
from fer.losses import LOSSES
from fer.run import FORMAT
from pipelines import experiments, launch, trials
from pipelines import sweep as search
from pipelines.halving import Halving
from pipelines.params import load, machine
from pipelines.trials import DONE, FAILED, PRUNED, RUNNING, Plan, Trial

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]

EPOCHS = 9
SMALL = [
    "changes.input.image_size=16",
    "changes.model={width: 0.0625, batch_norm: true, conv_dropout: 0.1, dense_dropout: 0.1}",
    f"changes.epochs={EPOCHS}",
    "changes.batch_size=16",
    "scheduler=asha",
    "grace_epochs=3",  # the only rung
    "reduction=3",
    "trials=6",
    "confirm_seeds=0",
]


def plan(*changes: str) -> Plan:
    return trials.plan(["sample", *SMALL, *changes], machine(load()), open_data("data").hash)


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


def check_books(project: Path, folder: Path, count: int) -> list[Trial]:
    """No trial lost or counted twice, each epoch once on disk and in MLflow, nothing left RUNNING."""
    found = trials.read_trials(folder)
    assert [trial.number for trial in found] == list(range(1, count + 1))
    assert len({json.dumps(trial.point) for trial in found}) == count
    for trial in found:
        assert trial.state in (DONE, PRUNED), trial.error
        assert [row["epoch"] for row in trial.rows] == list(range(1, trial.epoch + 1))
        assert (trial.epoch == EPOCHS) == (trial.state == DONE)
    assert statuses(project) == dict.fromkeys(
        [folder.name, *(f"{folder.name}/{trial.number:03d}" for trial in found)], "FINISHED"
    )
    steps = ask(
        project,
        "select t.value, m.step from metrics m join tags t using (run_uuid) "
        "where t.key = 'fer.run_id' and m.key = 'val_accuracy'",
    )
    assert Counter(steps) == Counter(
        (f"{folder.name}/{trial.number:03d}", row["epoch"]) for trial in found for row in trial.rows
    )
    return found


@pytest.mark.timeout(600)
def test_a_sweep_from_search_to_model(project: Path, server: str):  # noqa: F811
    own = ["changes.optimizer.lr=5e-4", "confirm_seeds=2"]
    own += ["scheduler=none"]  # so that the best does not hang on which trial was faster
    done = sweep(project, server, *own)
    assert done.returncode == 0, done.stderr
    (folder,) = trials.folders("sample")
    found = trials.read_trials(folder)
    assert found[0].point == {"optimizer.lr": 5e-4, "loss": "cross_entropy", "optimizer.weight_decay": 0.01}  # the base
    assert len(found) == 6
    assert not list((folder / "trials").glob("*/*/predictions*")), "a trial never opens test"
    assert not list((folder / "trials").rglob("*.safetensors")), "nor does an ended one keep its weights"
    result = trials.result(folder)
    assert result is not None
    best = trials.best_of(found)
    assert best is not None
    assert result["best"] == {"number": best.number, "val_accuracy": best.best, "epoch": EPOCHS, "point": best.point}
    assert best.number != 1  # so that it is confirmed
    assert result["seeds"] == [1112, 1113]
    summaries = [json.loads((project / "data/runs" / run / "summary.json").read_text()) for run in result["runs"]]
    assert [summary["name"] for summary in summaries] == ["sample_best", "vgg13_small"] * 2
    values = [summary["val"]["accuracy"] for summary in summaries]
    assert result["confirmed"] == trials.compared(values[::2], values[1::2])
    assert set(statuses(project).values()) == {"FINISHED"}
    assert len(statuses(project)) == 1 + 6 + 4
    parents = ask(project, "select value from tags where key = 'mlflow.parentRunId'")
    ((parent,),) = ask(project, f"select run_uuid from tags where key = 'fer.run_id' and value = '{folder.name}'")
    assert parents == [(parent,)] * 6
    artifacts = {path.name for path in next((project / "mlruns").glob(f"*/{parent}/artifacts")).iterdir()}
    assert artifacts == {"sweep.json", "trials.csv", "parallel.png", "effects.png"}
    assert "models:/" not in done.stderr

    again = sweep(project, server, *own)
    assert "Nothing to do: " in again.stdout, again.stderr
    changed = sweep(project, server, *own, "seed=1")
    assert (changed.returncode, changed.stderr) == (
        2,
        f"error: sweep sample: seed differs from the sweep in data/sweeps/{folder.name}; "
        "change it back to go on with that one, or give --new to start another\n",
    )
    shown = subprocess.run([BIN / "fer", "sweep", "status"], cwd=project, env=env(), capture_output=True, text=True)
    assert all(f" {trial.number} " in shown.stdout for trial in found)
    assert "With 2 other seeds: best " in shown.stdout
    subprocess.run([BIN / "fer", "sweep", "apply", "sample", "--as", "better"], cwd=project, env=env(), check=True)
    keys = {"lr": best.point["optimizer.lr"], "weight_decay": best.point["optimizer.weight_decay"]}
    base = plan(*own).base.run
    changes = {"optimizer": base.optimizer.model_copy(update=keys), "loss": LOSSES[best.point["loss"]]()}
    assert experiments.load(["better"], {})["better"].run == base.model_copy(update=changes)


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
    assert {trial.state for trial in trials.read_trials(folder)} == {RUNNING}


@pytest.mark.timeout(600)  # a driver waits a minute for a head that is gone
@pytest.mark.parametrize(
    ("victim", "moments"),
    [(driver, (1, 14)), (head, (8,)), (interrupted, (8,))],
    ids=["driver", "head", "interrupted"],
)
@pytest.mark.soak
def test_killed_at_any_moment_it_goes_on_and_no_trial_is_lost(project: Path, server: str, victim, moments):  # noqa: F811
    """`moments`: epochs of all trials that are done when it is cut."""
    folder = plan().folder
    for epochs in moments:
        process = start(project, server)
        wait_for(lambda done=epochs: sum(trial.epoch for trial in trials.read_trials(folder)) >= done)
        victim(process, project, folder)
        process.wait(timeout=120)
        wait_for(lambda: "RUNNING" not in statuses(project).values(), 60)
    before = {trial.number: trial for trial in trials.read_trials(folder) if trial.state != RUNNING}
    done = sweep(project, server)
    assert done.returncode == 0, done.stderr
    found = check_books(project, folder, 6)
    for number, trial in before.items():
        assert found[number - 1] == trial  # not run again


@pytest.mark.soak
def test_a_trial_that_is_killed_goes_on_from_its_checkpoint(project: Path, server: str):  # noqa: F811
    folder = plan().folder
    process = start(project, server)
    for epochs in (2, 12):
        wait_for(lambda done=epochs: sum(trial.epoch for trial in trials.read_trials(folder)) >= done)
        workers = [child for child in psutil.Process(process.pid).children(recursive=True) if _trains(child, project)]
        for worker in workers:
            worker.kill()
    assert process.wait(timeout=200) == 0
    check_books(project, folder, 6)


def _trains(process: psutil.Process, project: Path) -> bool:
    try:
        return f"{project}/data/upscaled/images.npy" in Path(f"/proc/{process.pid}/maps").read_text()
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        return False


def ended(sweep: Plan, number: int, point: dict, state: str, *accuracies: float) -> Trial:
    """A trial on disk as if it had been run."""
    trial = trials.add_trial(sweep.folder, number, point)
    run = trial.folder / sweep.id_of(point)
    run.mkdir()
    write_json(run / "point.json", {"point": point, "from": None})
    rows = [
        {"epoch": i + 1, "val_accuracy": v, "seconds": 1.0, "time": 100.0 * number + i}
        for i, v in enumerate(accuracies)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return trials.set_state(trial, state)


def points(sweep: Plan) -> list[dict]:
    return list(search.grid(sweep.space))


def test_what_is_known_is_told_to_optuna_again(project: Path):
    sweep = plan()
    one, two, three, four, five, six, *_ = points(sweep)
    before = [
        ended(sweep, 1, one, DONE, *[0.1, 0.4, 0.3] * 3),
        ended(sweep, 2, two, PRUNED, 0.2, 0.1),
        ended(sweep, 3, three, FAILED, 0.9),
        ended(sweep, 4, four, RUNNING, 0.3, 0.4),
        ended(sweep, 5, five, RUNNING, 0.3, 0.2, 0.4),
        ended(sweep, 6, six, RUNNING, 0.3, 0.2, 0.4, 0.5),
    ]
    told = search._study(sweep, before).trials
    assert [trial.state.name for trial in told] == ["COMPLETE", "PRUNED", "PRUNED", "RUNNING", "PRUNED", "PRUNED"]
    assert told[0].value == 0.4
    assert told[0].intermediate_values == {1: 0.1, **dict.fromkeys(range(2, 10), 0.4)}  # the best so far
    assert told[1].intermediate_values == {1: 0.2, 2: 0.2}
    assert told[2].intermediate_values == {1: 0.0}  # a failure is the worst
    assert told[3].intermediate_values == {}  # before its first rung it compares with none
    assert told[4].intermediate_values == {1: 0.3, 2: 0.3, 3: 0.4}  # it waits at the rung, most trials until the end
    assert told[5].intermediate_values == told[4].intermediate_values
    assert [trial.params for trial in told] == [one, two, three, four, five, six]
    unhurried = search._study(plan("scheduler=none"), before).trials
    assert [trial.state.name for trial in unhurried[3:]] == ["RUNNING"] * 3


def test_the_search_begins_with_the_base_goes_on_with_what_was_cut_and_repeats_nothing(project: Path):
    sweep = plan("trials=16")
    clock = search._Clock(sweep.folder, None)
    trials.begin(sweep)
    fresh = search._Search(sweep, [], clock, 99)
    assert fresh.suggest("a")["point"] == sweep.published
    second = fresh.suggest("b")
    assert {trial.number for trial in trials.read_trials(sweep.folder)} == {1, 2}  # on disk before they start

    again = search._Search(sweep, trials.read_trials(sweep.folder), clock, 99)
    given = [again.suggest(str(i)) for i in range(17)]
    assert [config["point"] for config in given[:2]] == [sweep.published, second["point"]]
    assert given[:2] == [{"point": trial.point, "folder": str(trial.folder.resolve())}
                         for trial in trials.read_trials(sweep.folder)[:2]]  # fmt: skip
    assert len({json.dumps(config["point"]) for config in given[:16]}) == 16  # each point of the space, TPE or not
    assert given[16] == search.Searcher.FINISHED
    assert len(trials.read_trials(sweep.folder)) == 16


@pytest.mark.parametrize("kind", ["tpe", "random", "grid"])
def test_points_that_differ_in_a_key_without_meaning_are_tried_once(project: Path, kind: str):
    """label_smoothing has no gamma: six points, four runs."""
    space = "space={loss: {choice: [focal_pdls, label_smoothing]}, loss.gamma: {choice: [2.0, 0.0, 1.0]}}"
    sweep = plan("changes.loss=focal_pdls", space, f"search={kind}", "trials=99")
    trials.begin(sweep)
    given, found = search._Search(sweep, [], search._Clock(sweep.folder, None), 99), []
    while (config := given.suggest(str(len(found)))) != search.Searcher.FINISHED:
        found.append(config["point"])
    assert found[0] == {"loss": "focal_pdls", "loss.gamma": 2.0}
    tried = [(point["loss"], point["loss.gamma"] if point["loss"] == "focal_pdls" else None) for point in found]
    gammas = [("focal_pdls", 2.0), ("focal_pdls", 0.0), ("focal_pdls", 1.0), ("label_smoothing", None)]
    assert sorted(tried, key=str) == sorted(gammas, key=str)


def test_a_grid_is_gone_through_once_the_base_first(project: Path):
    sweep = plan("search=grid", "trials=99")
    trials.begin(sweep)
    given = search._Search(sweep, [], search._Clock(sweep.folder, None), 99)
    found = [given.suggest(str(i)) for i in range(16)]
    assert found[0]["point"] == sweep.published
    assert [config["point"] for config in found[1:]] == [point for point in points(sweep) if point != sweep.published]
    assert given.suggest("16") == search.Searcher.FINISHED


def test_no_more_trials_run_than_at_once_and_a_promotion_comes_before_a_new_trial(project: Path):
    sweep = plan("reduction=2")
    trials.begin(sweep)
    given = search._Search(sweep, [], search._Clock(sweep.folder, None), 2)
    assert [given.suggest(name) is None for name in "abc"] == [False, False, True]
    assert given.halving.pauses(1, 3, 0.5)
    assert [given.suggest(name) is None for name in "de"] == [False, True]  # one that waits takes no room
    assert given.halving.pauses(2, 3, 0.6)
    assert given.room
    assert given.suggest("f") is None  # the second comes first
    given.halving.promote(2)
    assert not given.room
    given.on_trial_complete("b", {"epoch": 4})
    given.on_trial_complete("a")
    assert [trial.state for trial in trials.read_trials(sweep.folder)] == [PRUNED, PRUNED, RUNNING]
    assert given.suggest("g") is not None


class Controller:
    """Of Tune's, what a scheduler asks."""

    def __init__(self) -> None:
        self.trials: list[SimpleNamespace] = []
        self.search_alg = SimpleNamespace(is_finished=lambda: False)

    def get_trials(self) -> list[SimpleNamespace]:
        return self.trials


def test_asha_after_a_restart_knows_all_trials_and_promotes_those_that_wait(project: Path):
    """One rung, at 3, reduction 3: two of six may pass it, which are the failed one and the third."""
    sweep = plan()
    curves = ((0.2, 0.5, 0.6), (0.9, 0.9, 0.9), (0.1, 0.8, 0.7), (0.5, 0.5, 0.5), (0.4, 0.4, 0.4), (0.1, 0.1, 0.1))
    states = (PRUNED, FAILED, RUNNING, RUNNING, RUNNING, RUNNING)
    before = [
        ended(sweep, i, point, state, *curve)
        for i, (point, state, curve) in enumerate(zip(points(sweep), states, curves), 1)
    ]
    again = search._Search(sweep, before, search._Clock(sweep.folder, None), 1)
    asha, tune = search._scheduler(sweep, again), Controller()

    def replays(trial: SimpleNamespace, curve: tuple[float, ...]) -> list[str]:
        best = np.maximum.accumulate(curve).tolist()
        return [asha.on_trial_result(tune, trial, {"epoch": i, "best": value}) for i, value in enumerate(best, 1)]

    for number, goes_on in ((3, True), (4, False)):
        trial = SimpleNamespace(trial_id=f"t{number}", status="RUNNING", is_finished=lambda: False)
        tune.trials = [trial]
        assert again.suggest(trial.trial_id)["folder"] == str(before[number - 1].folder.resolve())
        assert replays(trial, curves[number - 1]) == ["CONTINUE", "CONTINUE", "PAUSE"]
        again.live["another"] = before[-1]
        assert asha.choose_trial_to_run(tune) is None
        assert number in again.halving.paused  # while another has the room
        del again.live["another"]
        assert asha.choose_trial_to_run(tune) is None  # Tune saves it yet
        trial.status = "PAUSED"
        assert [asha.choose_trial_to_run(tune) for _ in range(2)] == [trial if goes_on else None] * 2
        if goes_on:
            assert again.suggest("other") is None  # it takes the room
            assert replays(trial, curves[number - 1]) == ["CONTINUE"] * 3
            again.on_trial_complete(trial.trial_id, {"epoch": EPOCHS})


def test_importance_names_the_key_that_decides(project: Path):
    sweep = plan()
    found = [
        ended(sweep, i + 1, point, PRUNED, 0.9 if point["loss"] == "focal_pdls" else 0.1)
        for i, point in enumerate(points(sweep))
    ]
    shares = search.importance(sweep, found)
    assert next(iter(shares)) == "loss"
    assert shares["loss"] > 0.8
    assert sum(shares.values()) == pytest.approx(1)
    assert search.importance(sweep, found[:4]) == {}


def test_points_that_cannot_work_are_named_before_anything_starts(project: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(search.ray, "cluster_resources", lambda: {"CPU": 2.0})
    space = "space={schedule: {choice: [cosine, constant]}, schedule.warmup_epochs: {choice: [1.0, 8.0]}}"
    together = plan("changes.schedule={name: constant, warmup_epochs: 1}", space)
    search.check(together)  # 8 < 9 epochs
    odd = ["changes.epochs=3", "grace_epochs=1", "changes.schedule={name: constant, warmup_epochs: 1}", space]
    with pytest.raises(UserError) as caught:
        search.check(plan(*odd))
    line = str(caught.value)
    assert line.startswith(
        "sweep sample: space: 15 of 50 points drawn from it cannot work, as schedule.warmup_epochs: 8 "
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


@pytest.fixture(scope="module")
def cluster():
    launch.start_ray()
    yield
    launch.ray.shutdown()


@pytest.mark.parametrize(
    ("scheduler", "states"), [("none", {DONE: 2, FAILED: 2}), ("asha", {DONE: 1, PRUNED: 1, FAILED: 2})]
)
def test_a_trial_that_diverges_fails_alone_and_is_the_worst(project: Path, cluster, scheduler: str, states: dict):
    diverging = ["space={optimizer.lr: {choice: [2e-3, 1e30]}, loss: {choice: [cross_entropy, focal_pdls]}}"]
    diverging += [f"scheduler={scheduler}", "reduction=2"]
    sweep = plan(*diverging, "trials=4")
    trials.begin(sweep)
    found = search.search(sweep)
    assert Counter(trial.state for trial in found) == states
    for trial in found:
        assert (trial.state == FAILED) == (trial.point["optimizer.lr"] == 1e30)
        assert trial.error is None or "loss is " in trial.error
    assert trials.best_of(found).state == DONE


LADDER = ["grace_epochs=1", "reduction=2", "trials=12"]  # rungs 1, 2 and 4


def best_at(trial: Trial, epoch: int) -> float:
    return max(row["val_accuracy"] for row in trial.rows[:epoch])


def one_by_one(found: list[Trial]) -> dict[int, int]:
    """How far each trial comes with one worker, by the accuracies that were measured."""
    came: dict[int, int] = {}
    for trial in found:
        came[trial.number], promoted = 1, True
        while promoted:
            promoted = False
            for rung, after in ((4, EPOCHS), (2, 4), (1, 2)):
                there = sorted((-best_at(found[n - 1], rung), n) for n in came if came[n] >= rung)
                up = [n for _, n in there[: len(there) // 2] if came[n] == rung]
                if up and not promoted:
                    came[up[0]], promoted = after, True
    return came


@pytest.mark.timeout(400)
@pytest.mark.soak
def test_asha_takes_the_epochs_of_its_rule_and_cut_and_gone_on_with_it_ends_the_same(
    project: Path, cluster, monkeypatch: pytest.MonkeyPatch
):
    sweep = plan(*LADDER, "at_once=1")
    trials.begin(sweep)
    found = search.search(sweep)
    came = {trial.number: trial.epoch for trial in found}
    assert came == one_by_one(found)
    assert [trial.state for trial in found] == [DONE if trial.epoch == EPOCHS else PRUNED for trial in found]
    assert sum(came.values()) >= 12 * 1 + 6 * 1 + 3 * 2 + 1 * 5
    assert not list(sweep.folder.rglob("*.safetensors"))
    assert not list(sweep.folder.glob("trials/*/*/training")), "nobody waits for them at a signal"

    sweep.folder.rename("whole")
    trials.begin(sweep)
    for epochs in (3, 11, 17, 23):
        with monkeypatch.context() as patch:
            patch.setattr(search._Clock, "over", property(lambda clock, most=epochs: _epochs(clock.folder) >= most))
            cut = search.search(sweep)
        assert epochs <= sum(trial.epoch for trial in cut) <= epochs + 3
        for trial in cut:  # also one that waits keeps its weights
            assert trial.state == (RUNNING if trial.epoch < EPOCHS else DONE)
            kept = (trial.folder / sweep.id_of(trial.point) / "last").exists()
            assert kept == (trial.state == RUNNING) or not trial.epoch
    assert [told(trial) for trial in search.search(sweep)] == [told(trial) for trial in found]


def _epochs(folder: Path) -> int:
    return sum(trial.epoch for trial in trials.read_trials(folder))


def told(trial: Trial) -> tuple:
    return trial.number, trial.point, trial.state, [row["val_accuracy"] for row in trial.rows]


def test_halving_starts_all_before_it_promotes_the_best(project: Path, cluster):
    sweep = plan(*LADDER, "at_once=1", "scheduler=halving")
    trials.begin(sweep)
    found = search.search(sweep)
    going = {trial.number for trial in found}
    for rung, count in ((1, 6), (2, 3), (4, 1)):
        going = set(sorted(going, key=lambda n, rung=rung: (-best_at(found[n - 1], rung), n))[:count])
        assert {trial.number for trial in found if trial.epoch > rung} == going
    assert sum(trial.epoch for trial in found) == 12 * 1 + 6 * 1 + 3 * 2 + 1 * (EPOCHS - 4)


@pytest.mark.soak
def test_asha_with_two_at_once_keeps_to_them_and_leaves_none_behind(project: Path, cluster):
    sweep = plan(*LADDER, "at_once=2")
    trials.begin(sweep)
    found = search.search(sweep)
    assert len(found) == 12
    assert [trial.state for trial in found] == [DONE if trial.epoch == EPOCHS else PRUNED for trial in found]
    assert {trial.epoch for trial in found} == {1, 2, 4, EPOCHS}
    for rung in (1, 2, 4):
        there = sorted((-best_at(trial, rung), trial.number, trial.epoch) for trial in found if trial.epoch >= rung)
        assert all(epoch > rung for _, _, epoch in there[: len(there) // 2]), "none that is due stays behind"
    times = [(row["time"] - 0.9 * row["seconds"], row["time"]) for trial in found for row in trial.rows]
    assert max(sum(start < moment < end for start, end in times) for moment, _ in times) <= 2


def test_a_promoted_trial_that_cannot_go_on_fails_alone(project: Path, cluster, monkeypatch: pytest.MonkeyPatch):
    """One rung, at 3. The first that is promoted has a checkpoint of which it dies, twice."""
    sweep = plan("reduction=2", "restarts=1")
    trials.begin(sweep)
    promote, promoted = Halving.promote, []

    def spoil(halving: Halving, number: int) -> None:
        if not promoted:
            (folder,) = sweep.folder.glob(f"trials/{number:03d}/*/last")
            write_json(folder / "checkpoint.json", {"format": FORMAT})
        promoted.append(number)
        promote(halving, number)

    monkeypatch.setattr(Halving, "promote", spoil)
    found = search.search(sweep)
    first = found[promoted[0] - 1]
    assert (first.state, first.epoch, first.error) == (FAILED, 3, "KeyError: 'epoch'")
    assert len(promoted) == len(set(promoted)) >= 3
    assert [trial.number for trial in found if trial.state == DONE] == sorted(promoted[1:])
    assert {trial.state for trial in found} == {FAILED, DONE, PRUNED}


def test_a_mistake_that_stops_every_trial_stops_the_sweep(project: Path, cluster):
    sweep = plan()
    trials.begin(sweep)
    (project / "data/upscaled/images.npy").unlink()
    with pytest.raises(UserError, match="images.npy: not found"):
        search.search(sweep)


def test_time_that_is_over_cuts_trials_and_more_of_it_goes_on_with_them(project: Path, cluster):
    long = ["changes.epochs=2000", "grace_epochs=1000", "trials=2"]
    sweep = plan(*long, "hours=0.002")
    trials.begin(sweep)
    search.search(sweep)
    found = trials.read_trials(sweep.folder)
    assert {trial.state for trial in found} == {RUNNING}
    assert trials.spent(sweep.folder) > 7.2
    assert search.search(sweep) == found  # no time is left
    more = plan(*long, "scheduler=asha")
    assert more.folder == sweep.folder


def test_pbt_takes_over_better_weights_and_keeps_within_the_ranges(project: Path, cluster):
    space = "space={optimizer.lr: {log: [1e-3, 1e-2]}, optimizer.weight_decay: {choice: [0.01, 0.1]}}"
    sweep = plan("search=random", "scheduler=pbt", "grace_epochs=3", "trials=4", space)
    trials.begin(sweep)
    found = search.search(sweep)
    assert [trial.state for trial in found] == [DONE] * 4
    runs = {path.parent.name: json.loads(path.read_text()) for path in sweep.folder.glob("trials/*/*/point.json")}
    taken = [about["from"] for about in runs.values() if about["from"]]
    assert taken
    assert all(origin.split(" epoch ")[0] in runs for origin in taken)
    for about in runs.values():
        assert 1e-3 <= about["point"]["optimizer.lr"] <= 1e-2
        assert about["point"]["optimizer.weight_decay"] in (0.01, 0.1)
    for trial in found:
        assert [row["epoch"] for row in trial.rows] == list(range(1, EPOCHS + 1))


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
def test_a_users_mistake_is_one_line_and_status_2_and_starts_nothing(project: Path, words: list[str], message: str):
    done = subprocess.run([BIN / "fer", "sweep", *words], cwd=project, env=env(), capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert done.stderr.startswith(f"error: {message}")
    assert not (project / "data/sweeps").exists()
