"""A sweep on disk: what continues it, what makes it another one, and what is the best of it."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import change, refusal, swap

from fer.errors import UserError
from fer.files import held, write_json
from fer.losses import FocalPdls
from fer.resources import Resources
from fer.train import NonFiniteLoss
from pipelines import experiments, report
from pipelines.experiments import Job
from pipelines.flow import without_diverged
from pipelines.sweeps import folder as sweeps
from pipelines.sweeps.files import read_about, read_result
from pipelines.sweeps.folder import DONE, FAILED, PRUNED, RUNNING, Plan, Trial

pytestmark = pytest.mark.usefixtures("recipes")


def plan(*changes: str, data: str = "d" * 16) -> Plan:
    return sweeps.plan(["tiny", *changes], {}, lambda base: SimpleNamespace(folder=Path("data"), hash=data))


def trial(number: int, state: str, *accuracies: float, point: dict[str, Any] | None = None) -> Trial:
    rows = [{"epoch": i + 1, "val_accuracy": value, "seconds": 1.0, "time": 0.0} for i, value in enumerate(accuracies)]
    return Trial(number, point or {"optimizer.lr": number / 10}, state, None, Path(), tuple(rows))


def concluded(words: list[str], point: dict[str, Any]) -> tuple[Plan, dict[str, Any]]:
    """A sweep whose base was pruned and whose best is this point, and its result, as they lie on disk."""
    plan = sweeps.plan(words, {}, lambda base: SimpleNamespace(folder=Path("data"), hash="d" * 16))
    sweeps.begin(plan)
    best = trial(2, DONE, *[0.5] * plan.base.run.epochs, point={**plan.published, **point})
    result = sweeps.conclude(plan, [trial(1, PRUNED, 0.5, point=plan.published), best], [])
    write_json(plan.folder / "result.json", result)
    return plan, result


def test_a_larger_budget_or_another_machine_is_the_same_sweep() -> None:
    budget = ("trials=99", "hours=9", "at_once=1", "confirm_seeds=0")
    machine = ("cpus_per_trial=2", "gpus_per_trial=0.5", "restarts=0", "changes.resources.workers=2")
    assert {plan(same).folder for same in (*budget, *machine, "changes.optimizer.lr=5e-4")} == {plan().folder}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"words": "space.optimizer.lr={log: [1e-4, 1e-2]}"}, "space.optimizer.lr differs"),
        ({"words": "grace_epochs=5"}, "grace_epochs differs"),
        ({"words": "space.loss.alpha={float: [0.5, 1]}"}, "space.loss.alpha differs"),  # 1.0 before
        ({"words": "changes={optimizer: {weight_decay: 0.1}, model: {backbone: {depths: [2, 2, 1]}}}"},
         "swin_nr_fpdls_tiny.model.backbone.depths, swin_nr_fpdls_tiny.optimizer.weight_decay differ"),
        ({"data": "e" * 16}, "the data differs"),
        ({"base": "loss: {name: focal_pdls, gamma: 3.0}"}, "swin_nr_fpdls_tiny.loss.gamma differs"),
    ],
)  # fmt: skip
def test_a_changed_sweep_is_refused_with_what_changed_unless_a_new_one_is_wished(
    changes: dict[str, str], named: str
) -> None:
    sweeps.begin(before := plan())
    change(
        Path(), "experiments/swin_nr_fpdls_tiny.yaml", swap("loss: focal_pdls", changes.get("base", "loss: focal_pdls"))
    )
    after = plan(*([changes["words"]] if "words" in changes else []), data=changes.get("data", "d" * 16))
    assert refusal(sweeps.check_same, after, new=False) == (
        f"sweep tiny: {named} from the sweep in {before.folder}; "
        "change it back to resume that one, or use --new to start another"
    )
    sweeps.check_same(after, new=True)
    sweeps.begin(after)
    for either in (before, after):
        sweeps.check_same(either, new=False)  # both go on from now on


@pytest.mark.parametrize(
    ("own", "other_version"), [('"layout"', '"else"'), ('"format"', '"else"'), ('"run": {', '"run": {"new_key": 3, ')]
)
def test_a_sweep_of_another_version_is_not_gone_on_with(own: str, other_version: str) -> None:
    sweeps.begin(sweep := plan())
    other = sweep.folder.rename(sweep.folder.with_name("tiny-00000000"))
    change(other, "sweep.json", swap(own, other_version))
    told = f"sweep tiny: {other} was begun by another version of this program; use --new to start another"
    assert refusal(sweeps.check_same, sweep, new=False) == told


def test_a_trial_is_an_ordinary_run_on_the_resources_of_a_trial() -> None:
    found = plan("cpus_per_trial=2", "changes.resources={workers: 4, eval_batch_size: 50}")
    own = {"device": "cpu", "workers": 1, "cpus_per_worker": 2, "gpus_per_worker": 1.0, "eval_batch_size": 50}
    assert found.base.resources.workers == 4  # of the confirming runs
    assert found.resources.model_dump() == found.base.resources.model_dump() | own
    assert plan("gpus_per_trial=1").resources.device == "auto"
    assert found.id_of(found.published) == plan().id_of(found.published)


def test_the_state_of_a_trial_is_that_of_its_folder() -> None:
    sweeps.begin(sweep := plan("changes.epochs=5"))
    other = {**sweep.published, "loss.alpha": 0.5}
    first, second = (sweep.job(point).folder for point in (sweep.published, other))
    sweeps.begin_trial(second, other)
    sweeps.begin_trial(first, sweep.published)
    beside = dict.fromkeys(("lr", "train_loss", "train_accuracy", "val_loss", "time"), 0.5)

    def found(epochs: int) -> tuple[str, int, float | None, float, str | None]:
        rows = [{"epoch": i + 1, **beside, "val_accuracy": 0.5 - 0.1 * (i % 2), "seconds": 2.0} for i in range(epochs)]
        (second / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        base, trial = sweeps.read_trials(sweep.folder)
        assert [(one.number, one.point) for one in (base, trial)] == [(1, sweep.published), (2, other)]
        return trial.state, trial.epoch, trial.best, trial.seconds, trial.error

    with held(second):
        assert found(0)[0] == RUNNING
    assert found(2) == (PRUNED, 2, 0.5, 4.0, None)
    sweeps.end_trial(second)
    assert found(5)[0] == DONE
    sweeps.end_trial(second, "no luck")
    sweeps.begin_trial(second, other)  # again: it is known
    assert found(5) == (FAILED, 5, 0.5, 10.0, "no luck")


def test_the_best_is_of_the_trials_that_ended_whole() -> None:
    short, whole, failed = trial(1, PRUNED, 0.9), trial(2, DONE, 0.5, 0.8, 0.7), trial(3, FAILED, 0.99, 0.99, 0.99)
    for found, best in (
        ([short, whole, failed], 2),
        ([trial(4, DONE, 0.8, 0.1, 0.1), whole], 2),  # a tie: the earlier one
        ([short, trial(5, RUNNING, 0.3, 0.3)], 5),  # that came further
        ([failed, trial(6, RUNNING)], None),
    ):
        assert getattr(sweeps.best_of(found), "number", None) == best


def test_without_the_base_no_trial_is_taken_for_it() -> None:
    """As after its damaged folder was deleted, when the time was up."""
    sweeps.begin(sweep := plan("changes.epochs=4"))
    points = [sweep.published, {**sweep.published, "loss.alpha": 0.5}]
    beside = dict.fromkeys(("lr", "train_loss", "train_accuracy", "val_loss", "time"), 0.5)
    for point in points:
        sweeps.begin_trial(folder := sweep.job(point).folder, point)
        row = {"epoch": 1, **beside, "val_accuracy": 0.75, "seconds": 2.0}
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        sweeps.end_trial(folder)
    shutil.rmtree(sweep.job(sweep.published).folder)
    (left,) = found = sweeps.read_trials(sweep.folder)
    assert (left.number, left.point, sweeps.seeds(sweep, left)) == (2, points[1], [1112, 1113, 1114])
    write_json(sweep.folder / "result.json", sweeps.conclude(sweep, found, []))
    note = report.sweep_note(read_result(sweep.folder) or {})
    assert "Best: trial 2, **75.00 %** on val; swin_nr_fpdls_tiny unchanged: no whole epoch of it." in note
    assert "Nothing is better" not in note


def test_a_search_that_is_over_stays_so_until_the_budget_grows() -> None:
    sweeps.begin(sweep := plan("trials=5"))
    assert not sweeps.is_searched(sweep)
    sweeps.searched(sweep, 3)  # two points were drawn twice
    for same in (sweep, plan("trials=5", "confirm_seeds=0")):
        sweeps.begin(same)
        assert (sweeps.is_searched(same), read_about(same.folder)["wanted"]) == (True, 3)
    for more in (plan("trials=6"), plan("trials=5", "hours=9")):
        assert not sweeps.is_searched(more)
    sweeps.begin(more := plan("trials=6"))
    assert (sweeps.is_searched(more), read_about(more.folder)["wanted"]) == (False, 6)


def test_a_trial_that_patience_ended_early_may_be_the_best_by_rank() -> None:
    short, long, cut = trial(1, DONE, 0.5, 0.9), trial(2, DONE, *[0.6] * 9), trial(3, PRUNED, *[0.95] * 4)
    assert sorted([short, long, cut], key=lambda one: one.rank) == [cut, long, short]
    assert sweeps.best_of([short, long, cut]) == short


def test_best_and_base_are_compared_on_seeds_that_the_search_did_not_use() -> None:
    found = sweeps.compared([0.80, 0.84, 0.85], [0.78, 0.80, 0.82])
    # sqrt((.03^2 + .01^2 + .02^2) / 2)
    assert (found["best"]["mean"], found["best"]["sd"]) == pytest.approx((0.83, 0.0264575))
    assert (found["difference"]["mean"], found["difference"]["sd"]) == pytest.approx((0.03, 0.01))
    assert sweeps.compared([0.5], [0.4])["difference"]["sd"] is None
    assert plan().base.run.seed == 1111
    assert sweeps.seeds(plan(), trial(2, DONE)) == [1112, 1113, 1114]
    assert sweeps.seeds(plan(), trial(1, DONE)) == []  # the base itself is the best


def test_one_other_seed_has_no_standard_deviation() -> None:
    plan, result = concluded(["tiny"], {"loss.alpha": 0.5})
    write_json(plan.folder / "result.json", {**result, "seeds": [1112], "confirmed": sweeps.compared([0.5], [0.4])})
    result = read_result(plan.folder)
    assert result is not None
    assert report.sweep_line(result).endswith("Own score: val 50.00 %, swin_nr_fpdls_tiny 40.00 % (1 seed)")
    shown = "With 1 other seed: best 50.00 %, swin_nr_fpdls_tiny 40.00 %, paired difference **10.00** points (val)."
    assert shown in report.sweep_note(result)
    assert {key for key in sweeps.numbers(result) if key.endswith("_sd")} == set()


def test_seeds_with_which_a_run_diverged_are_left_out_of_the_confirmation_and_named() -> None:
    sweep, _ = concluded(["tiny"], {"loss.alpha": 0.5})
    jobs = [
        Job(name, sweep.base.run.model_copy(update={"seed": seed}), Resources(), Path(), Path(f"{name}-s{seed}"))
        for seed in (1112, 1113)
        for name in ("best", "base")
    ]
    nan = NonFiniteLoss("best-s1112: loss is nan")
    left, diverged = without_diverged(jobs, {"best-s1112": nan, "base-s1112": RuntimeError("died")})
    assert (left, diverged) == (jobs[2:], {1112: "best-s1112: loss is nan"})
    assert without_diverged(jobs, {}) == (jobs, {})
    assert refusal(without_diverged, jobs, {"base-s1113": UserError("disk is full")}) == "base-s1113: disk is full"
    with pytest.raises(RuntimeError, match="base-s1113: died"):
        without_diverged(jobs, {"base-s1113": RuntimeError("died")})
    trials = [trial(1, DONE, 0.5, point=sweep.published), trial(2, DONE, 0.6, point={**sweep.published})]
    result = sweeps.conclude(sweep, trials, [], diverged)
    assert (result["confirmed"], result["diverged"]) == (None, ["seed 1112: best-s1112: loss is nan"])
    assert "came to no number there: seed 1112: best-s1112: loss is nan." in report.sweep_note(result)


def test_trials_are_listed_with_the_best_first_and_how_far_they_are() -> None:
    found = [trial(1, DONE, 0.5, 0.6), trial(2, PRUNED, 0.9), trial(3, DONE, 0.7, 0.1), trial(4, RUNNING)]
    best, *others = report.trial_rows(found, 2)
    shown = {"trial": "3", "state": "done", "epoch": "2/2", "val": "70.00", "min": "0.0", "optimizer.lr": "0.3"}
    assert (best, [row["trial"] for row in others]) == (shown, ["1", "2", "4"])
    assert report.progress(found, {"name": "tiny", "budget": {"trials": 6}}, running=False) == (
        "3 of 6 trials finished; best so far 70.00 % (trial 3); 5 epochs, 0.1 min of training; "
        "not running; `fer sweep tiny` resumes it"
    )


def test_trials_are_counted_against_those_of_the_grid_or_those_that_a_search_came_to() -> None:
    grid = plan("search=grid", "space={loss.alpha: {choice: [0.5, 0.6, 0.8]}}", "trials=99")
    sweeps.begin(grid)
    assert read_about(grid.folder)["wanted"] == 3
    drawn = plan("trials=16")
    sweeps.begin(drawn)
    found = [trial(1, DONE, 0.5), trial(2, DONE, 0.6)]
    assert report.progress(found, read_about(drawn.folder), running=True).startswith("2 of 16 trials finished; best")
    sweeps.searched(drawn, 2)  # points drawn twice are one trial
    shown = report.progress(found, read_about(drawn.folder), running=True)
    assert shown.startswith("2 of 2 trials finished, confirming the best; best so far 60.00 % (trial 2)")
    assert sweeps.complete(drawn) is False


def test_the_note_says_what_was_found_and_where_the_base_was_stopped() -> None:
    sweep, result = concluded(["tiny"], {"loss.alpha": 0.5})
    note = report.sweep_note({**result, "importance": {"loss.alpha": 0.75}})
    assert "2 trials (1 done, 1 pruned), 0.3 min of training, 21 of 40 epochs (52 %)." in note
    assert "swin_nr_fpdls_tiny unchanged: 50.00 % when stopped after epoch 1." in note
    assert "Importance for the rank of a trial: loss.alpha 75 %." in note
    failed = report.sweep_note({**result, "first": {**result["first"], "failed": True}})
    assert "swin_nr_fpdls_tiny unchanged: 50.00 % before it failed." in failed
    base = experiments.load(["swin_nr_fpdls_tiny"], {})["swin_nr_fpdls_tiny"].run
    assert sweeps.best_run(sweep.folder, result) == base.model_copy(update={"loss": FocalPdls(alpha=0.5, gamma=2.0)})
    assert (result["base"], result["best_name"]) == ("swin_nr_fpdls_tiny", "tiny_best")
