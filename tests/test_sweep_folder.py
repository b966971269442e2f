"""A sweep on disk: what continues it, what makes it another one, and what is the best of it."""

import json
from pathlib import Path

import pytest

from fer.errors import UserError
from fer.files import held
from fer.losses import FocalPdls
from pipelines import experiments, report
from pipelines.sweeps import folder as sweeps
from pipelines.sweeps.folder import DONE, FAILED, PRUNED, RUNNING, Plan, Trial

pytestmark = pytest.mark.usefixtures("recipes")


def plan(*changes: str, data: str = "d" * 16) -> Plan:
    return sweeps.plan(["tiny", *changes], {}, data)


def trial(number: int, state: str, *accuracies: float) -> Trial:
    rows = [{"epoch": i + 1, "val_accuracy": value, "seconds": 6.0, "time": 0.0} for i, value in enumerate(accuracies)]
    return Trial(number, {"optimizer.lr": number / 10}, state, None, Path(), tuple(rows))


def test_a_larger_budget_or_another_machine_is_the_same_sweep() -> None:
    budget = ("trials=99", "hours=9", "at_once=1", "confirm_seeds=0")
    machine = ("cpus_per_trial=2", "gpus_per_trial=0.5", "restarts=0", "changes.resources.workers=2")
    assert {plan(same).folder for same in (*budget, *machine, "changes.optimizer.lr=5e-4")} == {plan().folder}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("space.optimizer.lr={log: [1e-4, 1e-2]}", "space.optimizer.lr differs"),
        ("grace_epochs=5", "grace_epochs differs"),
        ("changes={optimizer: {weight_decay: 0.1}, model: {backbone: {depths: [2, 2, 1]}}}",
         "swin_nr_fpdls_tiny.model.backbone.depths, swin_nr_fpdls_tiny.optimizer.weight_decay differ"),
        ("data", "the data differs"),
        ("base", "swin_nr_fpdls_tiny.loss.gamma differs"),
    ],
)  # fmt: skip
def test_a_changed_sweep_is_refused_with_what_changed_unless_a_new_one_is_wished(change: str, named: str) -> None:
    before = plan()
    sweeps.begin(before)
    if change == "base":
        path = experiments.path_of("swin_nr_fpdls_tiny")
        path.write_text(path.read_text().replace("loss: focal_pdls", "loss: {name: focal_pdls, gamma: 3.0}"))
    after = plan(*([change] if "=" in change else []), data=("e" if change == "data" else "d") * 16)
    with pytest.raises(UserError) as caught:
        sweeps.check_same(after, new=False)
    assert str(caught.value) == (
        f"sweep tiny: {named} from the sweep in {before.folder}; "
        "change it back to resume that one, or use --new to start another"
    )
    sweeps.check_same(after, new=True)
    sweeps.begin(after)
    sweeps.check_same(before, new=False)  # both go on from now on
    sweeps.check_same(after, new=False)


@pytest.mark.parametrize("missing", ["layout", "format"])
def test_a_sweep_of_another_version_is_not_gone_on_with(missing: str) -> None:
    sweep = plan()
    sweeps.begin(sweep)
    about = json.loads((sweep.folder / "sweep.json").read_text())
    other = sweep.folder.rename(sweep.folder.with_name("tiny-00000000"))
    del about[missing]
    (other / "sweep.json").write_text(json.dumps(about))
    with pytest.raises(UserError) as caught:
        sweeps.check_same(sweep, new=False)
    assert str(caught.value) == (
        f"sweep tiny: {other} was begun by another version of this program; use --new to start another"
    )


def test_a_trial_is_an_ordinary_run_on_the_resources_of_a_trial() -> None:
    found = plan("cpus_per_trial=2", "changes.resources={workers: 4, eval_batch_size: 50}")
    own = {"device": "cpu", "workers": 1, "cpus_per_worker": 2, "gpus_per_worker": 1.0}
    assert found.base.resources.workers == 4  # of the confirming runs
    assert found.resources.model_dump() == found.base.resources.model_dump() | own
    assert found.resources.eval_batch_size == 50
    assert plan("gpus_per_trial=1").resources.device == "auto"
    assert found.id_of(found.published) == plan().id_of(found.published)


def test_the_state_of_a_trial_is_that_of_its_folder() -> None:
    sweep = plan("changes.epochs=5")
    sweeps.begin(sweep)
    other = {**sweep.published, "loss.alpha": 0.5}
    first, second = (sweep.job(point).folder for point in (sweep.published, other))
    sweeps.begin_trial(second, other)
    sweeps.begin_trial(first, sweep.published)
    beside = dict.fromkeys(("lr", "train_loss", "train_accuracy", "val_loss", "time"), 0.5)

    def found(epochs: int) -> Trial:
        marks = [{"val_accuracy": 0.5 - 0.1 * (i % 2), "seconds": 2.0} for i in range(epochs)]
        rows = [{"epoch": i + 1, **beside, **mark} for i, mark in enumerate(marks)]
        (second / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        base, trial = sweeps.read_trials(sweep.folder)
        assert [(one.number, one.point) for one in (base, trial)] == [(1, sweep.published), (2, other)]
        return trial

    with held(second):
        assert found(0).state == RUNNING
    trial = found(2)
    assert (trial.state, trial.epoch, trial.best, trial.seconds) == (PRUNED, 2, 0.5, 4.0)
    sweeps.end_trial(second)
    assert found(5).state == DONE
    sweeps.end_trial(second, "no luck")
    trial = found(5)
    assert (trial.state, trial.error, trial.epoch) == (FAILED, "no luck", 5)
    sweeps.begin_trial(second, other)  # again: it is known
    assert found(5) == trial


def test_the_best_is_of_the_trials_that_ended_whole() -> None:
    short, whole, failed = trial(1, PRUNED, 0.9), trial(2, DONE, 0.5, 0.8, 0.7), trial(3, FAILED, 0.99, 0.99, 0.99)
    for found, best in (
        ([short, whole, failed], 2),
        ([trial(4, DONE, 0.8, 0.1, 0.1), whole], 2),  # a tie: the earlier one
        ([short, trial(5, RUNNING, 0.3, 0.3)], 5),  # that came further
        ([failed, trial(6, RUNNING)], None),
    ):
        assert getattr(sweeps.best_of(found), "number", None) == best


def test_best_and_base_are_compared_on_seeds_that_the_search_did_not_use() -> None:
    found = sweeps.compared([0.80, 0.84, 0.85], [0.78, 0.80, 0.82])
    assert found["best"]["mean"] == pytest.approx(0.83)
    assert found["best"]["sd"] == pytest.approx(0.0264575)  # sqrt((.03^2 + .01^2 + .02^2) / 2)
    assert (found["difference"]["mean"], found["difference"]["sd"]) == pytest.approx((0.03, 0.01))
    assert sweeps.compared([0.5], [0.4])["difference"]["sd"] == 0.0
    sweep = plan()
    assert sweep.base.run.seed == 1111
    assert sweeps.seeds(sweep, trial(2, DONE)) == [1112, 1113, 1114]
    assert sweeps.seeds(sweep, trial(1, DONE)) == []  # the base itself is the best


def test_trials_are_listed_with_the_best_first_and_how_far_they_are() -> None:
    found = [trial(1, DONE, 0.5, 0.6), trial(2, PRUNED, 0.9), trial(3, DONE, 0.7, 0.1), trial(4, RUNNING)]
    rows = report.trial_rows(found, 2)
    assert [row["trial"] for row in rows] == ["3", "1", "2", "4"]
    assert rows[0] == {
        "trial": "3", "state": "done", "epoch": "2/2", "val": "70.00", "min": "0.2", "optimizer.lr": "0.3"
    }  # fmt: skip
    about = {"name": "tiny", "budget": {"trials": 6}}
    assert report.progress(found, about, running=False) == (
        "3 of 6 trials finished; best so far 70.00 % (trial 3); 5 epochs, 0.5 min of training; "
        "not running; `fer sweep tiny` resumes it"
    )


def test_the_note_says_what_was_found_and_where_the_base_was_stopped() -> None:
    sweep = plan()
    point = {**sweep.published, "loss.alpha": 0.5}
    rows = tuple({"epoch": i + 1, "val_accuracy": 0.5, "seconds": 6.0} for i in range(sweep.base.run.epochs))
    first = Trial(1, sweep.published, PRUNED, None, Path(), rows[:2])
    result = sweeps.conclude(sweep, [first, Trial(2, point, DONE, None, Path(), rows)], [])
    note = report.sweep_note({**result, "importance": {"loss.alpha": 0.75}})
    assert "2 trials (1 done, 1 pruned), 2.2 min of training, 22 of 40 epochs (55 %)." in note
    assert "swin_nr_fpdls_tiny unchanged: 50.00 % when stopped after epoch 2." in note
    assert "Importance for the rank of a trial: loss.alpha 75 %." in note
    assert report.sweep_line(result) == f"sweep {sweep.folder.name}, trial 2: val 50.00 %, not confirmed"
    base = experiments.load(["swin_nr_fpdls_tiny"], {})["swin_nr_fpdls_tiny"].run
    assert sweeps.best_run(sweep.folder, result) == base.model_copy(update={"loss": FocalPdls(alpha=0.5, gamma=2.0)})
    assert (result["base"], result["best_name"]) == ("swin_nr_fpdls_tiny", "tiny_best")
