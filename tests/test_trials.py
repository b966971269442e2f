"""A sweep on disk: what continues it, what makes it another one, and what is the best of it."""

import json
from pathlib import Path

import pytest

from fer.errors import UserError
from pipelines import report, trials
from pipelines.params import load
from pipelines.trials import DONE, FAILED, PRUNED, RUNNING, Plan, Trial

SHIPPED = Path(__file__).resolve().parents[1] / "params.yaml"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def plan(*overrides: str, data: str = "d" * 16) -> Plan:
    return trials.plan(load(SHIPPED, overrides), "tiny", data)


def trial(number: int, state: str, *accuracies: float) -> Trial:
    rows = [{"epoch": i + 1, "val_accuracy": value, "seconds": 6.0, "time": 0.0} for i, value in enumerate(accuracies)]
    return Trial(number, {"lr": number / 10}, state, None, Path(), tuple(rows))


@pytest.mark.parametrize(
    "same",
    [
        "trials=99",
        "hours=9",
        "at_once=1",
        "cpus_per_trial=2",
        "gpus_per_trial=0.5",
        "max_failures=0",
        "confirm_seeds=0",
    ],
)
def test_a_larger_budget_or_another_machine_is_the_same_sweep(same: str) -> None:
    assert plan(f"sweeps.tiny.{same}").folder == plan().folder


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("sweeps.tiny.space.loss_alpha={float: [0.6, 1.0]}", "sweeps.tiny.space.loss_alpha differs"),
        ("sweeps.tiny.seed=1", "sweeps.tiny.seed differs"),
        ("models.swin_nr_fpdls_tiny.lr=1e-3", "models.swin_nr_fpdls_tiny.lr differs"),
        ("train.weight_decay=0.1", "models.swin_nr_fpdls_tiny.weight_decay differs"),
    ],
)
def test_a_changed_sweep_is_refused_with_what_changed_unless_a_new_one_is_wished(change: str, named: str) -> None:
    before = plan()
    trials.begin(before)
    after = plan(change)
    with pytest.raises(UserError) as caught:
        trials.check_same(after, new=False)
    assert str(caught.value) == (
        f"sweeps.tiny: {named} from the sweep in {before.folder}; "
        "change it back to go on with that one, or give --new to start another"
    )
    trials.check_same(after, new=True)
    trials.begin(after)
    trials.check_same(before, new=False)  # both go on from now on
    trials.check_same(after, new=False)


def test_other_data_make_another_sweep() -> None:
    trials.begin(plan())
    with pytest.raises(UserError, match="sweeps.tiny: the data differs from the sweep in "):
        trials.check_same(plan(data="e" * 16), new=False)


def test_a_trial_is_an_ordinary_run_on_the_resources_of_a_trial() -> None:
    found = plan("sweeps.tiny.cpus_per_trial=2", "models.swin_nr_fpdls_tiny.resources.workers=4")
    changed = {"device": "cpu", "workers": 1, "cpus_per_worker": 2}
    own = plan().sweep.base
    assert found.base.resources.model_dump() == load(SHIPPED).models[own].resources.model_dump() | changed
    assert plan("sweeps.tiny.gpus_per_trial=1").base.resources.device == "auto"
    assert found.id_of(found.published) == plan().id_of(found.published)
    assert found.run({**found.published, "loss_alpha": 0.5}).loss_alpha == 0.5


def test_the_state_of_a_trial_and_what_it_wrote_are_read_back() -> None:
    sweep = plan()
    trials.begin(sweep)
    made = trials.add_trial(sweep.folder, 1, sweep.published)
    assert trials.read_trials(sweep.folder) == [made]
    assert (made.state, made.epoch, made.best) == (RUNNING, 0, None)
    run = made.folder / sweep.id_of(made.point)
    run.mkdir()
    (run / "point.json").write_text(json.dumps({"point": sweep.published, "from": None}))
    rows = [{"epoch": 1, "val_accuracy": 0.5, "seconds": 1.5}, {"epoch": 2, "val_accuracy": 0.4, "seconds": 2.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = trials.read_trials(sweep.folder)
    assert (found.epoch, found.best, found.seconds) == (2, 0.5, 4.0)
    trials.set_state(found, FAILED, "no luck")
    (found,) = trials.read_trials(sweep.folder)
    assert (found.state, found.error, found.point, found.epoch) == (FAILED, "no luck", sweep.published, 2)


def test_the_best_is_of_the_trials_that_ended_whole() -> None:
    short, whole, failed = trial(1, PRUNED, 0.9), trial(2, DONE, 0.5, 0.8, 0.7), trial(3, FAILED, 0.99, 0.99, 0.99)
    assert trials.best_of([short, whole, failed]) is whole
    assert trials.best_of([trial(4, DONE, 0.8, 0.1, 0.1), whole]).number == 2  # a tie: the earlier one
    assert trials.best_of([short, trial(5, RUNNING, 0.3, 0.3)]).number == 5  # that came further
    assert trials.best_of([failed, trial(6, RUNNING)]) is None


def test_pairs_of_seeds_are_compared() -> None:
    found = trials.compared([0.80, 0.84, 0.85], [0.78, 0.80, 0.82])
    assert found["best"]["mean"] == pytest.approx(0.83)
    assert found["best"]["sd"] == pytest.approx(0.0264575)  # sqrt((.03^2 + .01^2 + .02^2) / 2)
    assert found["base"]["mean"] == pytest.approx(0.80)
    assert found["difference"]["values"] == pytest.approx([0.02, 0.04, 0.03])
    assert found["difference"]["mean"] == pytest.approx(0.03)
    assert found["difference"]["sd"] == pytest.approx(0.01)
    assert trials.compared([0.5], [0.4])["difference"]["sd"] == 0.0


def test_seeds_of_the_confirmation_are_not_that_of_the_search_and_the_base_is_not_confirmed() -> None:
    sweep = plan()
    first = Trial(1, sweep.published, DONE, None, Path())
    other = Trial(2, {**sweep.published, "loss_alpha": 0.5}, DONE, None, Path())
    assert sweep.base.seed == 1111
    assert trials.seeds(sweep, other) == [1112, 1113, 1114]
    assert trials.seeds(sweep, first) == []


def test_progress_tells_what_is_left() -> None:
    """6 trials, of which 2 go on after epoch 1: 6 * 1 + 2 * 4 epochs, and 4 took 2 minutes."""
    about = {"name": "tiny", "budget": {"trials": 6, "hours": 1.0, "confirm_seeds": 3}, "run": {"epochs": 5}}
    about |= {"scheduler": "asha", "grace_epochs": 1, "reduction": 3}
    found = [trial(1, DONE, 0.5, 0.6), trial(2, PRUNED, 0.4), trial(3, RUNNING, 0.9)]
    line = report.progress(found, about, 120.0, running=True)
    assert line == (
        "2 of 6 trials ended; best so far 60.00 % (trial 1); 4 epochs, 2.0 min; about 5 min left, 58 at most"
    )
    whole = report.progress(found, about | {"scheduler": "none"}, 120.0, running=True)
    assert "about 13 min left" in whole  # 30 epochs
    assert report.progress(found, about, 120.0, running=False).endswith(
        "no process works on it; `fer sweep tiny` goes on"
    )
    ended = [trial(number, DONE, 0.5) for number in range(1, 7)]
    assert report.progress(ended, about, 120.0, running=True).endswith("best and base are trained with other seeds")


def test_trials_are_listed_with_the_best_first() -> None:
    found = [trial(1, DONE, 0.5, 0.6), trial(2, PRUNED, 0.9), trial(3, DONE, 0.7, 0.1), trial(4, RUNNING)]
    assert [row["trial"] for row in report.trial_rows(found, 2)] == ["3", "1", "2", "4"]
    assert report.trial_rows(found, 2)[0] == {
        "trial": "3", "state": "done", "epoch": "2/2", "val": "70.00", "min": "0.2", "lr": "0.3"
    }  # fmt: skip


def test_the_note_says_what_was_found_and_where_the_base_was_stopped() -> None:
    sweep = plan()
    point = {**sweep.published, "loss_alpha": 0.5}
    rows = tuple({"epoch": i + 1, "val_accuracy": 0.5, "seconds": 6.0} for i in range(sweep.base.epochs))
    first = Trial(1, sweep.published, PRUNED, None, Path(), rows[:2])
    result = trials.conclude(sweep, load(SHIPPED), [first, Trial(2, point, DONE, None, Path(), rows)], [])
    note = report.sweep_note({**result, "importance": {"loss_alpha": 0.75}})
    assert "2 trials (1 done, 1 pruned) in 0.0 min, 22 of 40 epochs (55 %)." in note
    assert "trial 1: 50.00 % when it was stopped after epoch 2." in note
    assert "Importance for a trial's rank: loss_alpha 75 %." in note
    assert report.sweep_line(result) == f"sweep {sweep.folder.name}, trial 2: val 50.00 %, not confirmed"
    assert (
        load(SHIPPED).models["swin_nr_fpdls_tiny"].model_copy(update={"loss_alpha": 0.5}).model_dump() == result["run"]
    )
