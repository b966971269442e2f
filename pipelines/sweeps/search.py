"""The only module that uses Ray Tune and Optuna: runs the trials of a sweep, several in parallel.

The state is in the folders of the trials. Each start is a new search that first replays all of them: a trial reports
its rows, and then is done or resumes from its last epoch. So a larger budget, another machine or another version of Ray
is the same case as a killed process. Tune's own state, in tune/, is never read; it is left for Ray's own tools.
"""

import logging
import math
import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import ray
from optuna.trial import FixedTrial, create_trial
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, HyperBandScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from fer.errors import UserError
from fer.files import held
from fer.run import resource_faults
from fer.run_folder import LAST, read_rows
from pipelines.sweeps import folder as disk
from pipelines.sweeps.files import read_note
from pipelines.sweeps.folder import FAILED, Plan, Trial, read_trials
from pipelines.sweeps.space import Point, changed, grid
from pipelines.work import enter, work

METRIC, TIME = "best", "epoch"
TUNE = "tune"  # folder of Tune's state in that of the sweep
WORST = 0.0  # reported for a trial that fails
logging.getLogger("ray.tune").setLevel(logging.ERROR)
optuna.logging.set_verbosity(optuna.logging.WARNING)


def check(plan: Plan) -> None:
    """Raises UserError if the cluster has no room for a trial, or if points drawn from the space cannot work."""
    sweep, prefix, machines = plan.sweep, f"sweep {plan.name}", _machines()
    on = " on one machine" if len(machines) > 1 else ""
    for kind, need in (("cpu", sweep.cpus_per_trial), ("gpu", sweep.gpus_per_trial)):
        most = max(machine.get(kind.upper(), 0) for machine in machines)
        if need > most:
            remedy = "set it to 0 to use CPUs" if kind == "gpu" else "lower it"
            raise UserError(f"{prefix}: {kind}s_per_trial: {need:g} {kind.upper()}s, there are {most:g}{on}; {remedy}")
    if not trials_at_once(plan):
        raise UserError(f"{prefix}: cpus_per_trial: no machine has that many CPUs beside a GPU; lower it")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=sweep.seed))
    found = [fault for _ in range(50) if (fault := _fault(plan, study.ask()))]
    if found:
        raise UserError(f"{prefix}: space: {len(found)} of 50 points drawn from it cannot work, as {found[0]}")


def _fault(plan: Plan, drawn: optuna.Trial) -> str | None:
    """Why a point cannot work, though each of its values may. The confirming runs have the base's resources."""
    run, found = changed(plan.base.run, plan.space, drawn)
    if run is not None:
        found = resource_faults(run, plan.resources) or resource_faults(run, plan.base.resources)
    return f"{found[0]} ({drawn.params})" if found else None


def search(plan: Plan) -> list[Trial]:
    """Run trials until the budget is used up, including what was done before; returns all trials.

    Raises UserError for a mistake that would stop every trial, RuntimeError if all of them failed.
    """
    before = sorted(read_trials(plan.folder), key=lambda trial: trial.rank, reverse=True)
    points = [plan.published] + (list(grid(plan.space)) if plan.sweep.search == "grid" else [])
    # the best first, as the scheduler compares the others with them
    known = {trial.folder.name: trial.point for trial in before}
    for params in points:
        known.setdefault(plan.id_of(params), params)
    wanted = len(known) if plan.sweep.search == "grid" else max(plan.sweep.trials, len(known))
    seconds = _seconds_left(plan, before)
    whole = len(before) == wanted and not list(plan.folder.glob(f"runs/*/{LAST}"))
    if seconds > 0 and not whole and not disk.is_searched(plan):
        _run(plan, list(known.values()), wanted, None if seconds == math.inf else seconds)
        disk.drop_weights(plan.folder)
    after = read_trials(plan.folder)
    if after and all(trial.state == FAILED for trial in after):
        raise RuntimeError(f"sweep {plan.name}: all {len(after)} trials failed; the first: {after[0].error}")
    disk.searched(plan, len(after))
    return after


def _seconds_left(plan: Plan, before: list[Trial]) -> float:
    """Of the search, which takes the training time of all trials divided by how many run in parallel."""
    hours, spent = plan.sweep.hours, sum(trial.seconds for trial in before)
    return math.inf if hours is None else max(0.0, 3600 * hours - spent / trials_at_once(plan))


def _run(plan: Plan, known: list[Point], wanted: int, seconds: float | None) -> None:
    """Search with Tune until there are `wanted` trials, of which the `known` points come first."""
    sweep, storage = plan.sweep, plan.folder.resolve()
    shutil.rmtree(storage / TUNE, ignore_errors=True)  # of the last start; Tune would silently continue it
    mistake, space = _Mistake(), partial(_draw_point, plan)  # which Tune pickles, as it cannot an inner function
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(_trial, plan=plan), {"CPU": sweep.cpus_per_trial, "GPU": sweep.gpus_per_trial}
        ),
        tune_config=tune.TuneConfig(
            search_alg=OptunaSearch(
                space, metric=METRIC, mode="max", points_to_evaluate=known, sampler=_sampler(plan, len(known))
            ),
            scheduler=_scheduler(plan),
            metric=METRIC,
            mode="max",
            num_samples=wanted,
            max_concurrent_trials=trials_at_once(plan),
            reuse_actors=True,
            time_budget_s=seconds,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=TUNE,
            storage_path=str(storage),
            failure_config=tune.FailureConfig(max_failures=sweep.restarts),
            stop=mistake,
            verbose=0,
        ),
    )
    found = tuner.fit()
    if mistake.message:
        raise UserError(*mistake.message.splitlines())
    for index in range(len(found)):
        result = found[index]
        if result.error is not None and result.config is not None:
            folder = plan.job(result.config).folder
            disk.begin_trial(folder, result.config)  # if it died before it did so
            disk.end_trial(folder, "its process died more often than `restarts` allows")


def _draw_point(plan: Plan, drawn: optuna.Trial) -> None:
    """Optuna's define-by-run function: draws a point, without the ranges of choices that are not taken."""
    changed(plan.base.run, plan.space, drawn)


def trials_at_once(plan: Plan) -> int:
    """How many trials run in parallel: `at_once`, or as many as there is room for."""
    sweep = plan.sweep

    def on(machine: dict[str, float]) -> int:
        room = int(machine.get("CPU", 0) // sweep.cpus_per_trial)
        if sweep.gpus_per_trial:
            room = min(room, int(machine.get("GPU", 0)) * int(1 / sweep.gpus_per_trial + 1e-9))
        return room

    room = sum(map(on, _machines()))
    return min(room, sweep.at_once or room)


def _machines() -> list[dict[str, float]]:
    """What each machine of the cluster has: a trial is one process, on one of them."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _sampler(plan: Plan, known: int) -> optuna.samplers.BaseSampler:
    """The seed depends on the number of known trials, as a resumed search would draw its first points again."""
    seed = plan.sweep.seed + known
    if plan.sweep.search != "tpe":
        return optuna.samplers.RandomSampler(seed=seed)
    start = min(10, max(4, plan.sweep.trials // 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # group: for ranges inside choices
        return optuna.samplers.TPESampler(
            seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=start
        )


def _scheduler(plan: Plan) -> TrialScheduler:
    sweep, epochs = plan.sweep, plan.base.run.epochs
    if sweep.scheduler == "asha":
        return ASHAScheduler(TIME, max_t=epochs, grace_period=sweep.grace_epochs, reduction_factor=sweep.reduction)
    if sweep.scheduler == "hyperband":
        return HyperBandScheduler(TIME, max_t=epochs, reduction_factor=sweep.reduction)
    return FIFOScheduler()


class _Mistake(tune.Stopper):
    """Ends the search when a trial meets a mistake that would stop all others."""

    def __init__(self) -> None:
        self.message: str | None = None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        self.message = self.message or result.get("mistake")
        return False

    def stop_all(self) -> bool:
        return self.message is not None


def _trial(config: dict[str, Any], plan: Plan) -> None:
    """On a worker: report the rows that are on disk, then resume training.

    A trial that diverges or meets an error in the code reports the worst value. Only a dead process is tried again.
    """
    enter(plan.root)
    job = plan.job(config)
    disk.begin_trial(job.folder, config)
    with held(job.folder, math.inf):  # by another trial at the same point, whose epochs are on disk then
        rows, error = read_rows(job.folder), read_note(job.folder)["error"]
    reported: list[dict[str, Any]] = []

    def report(row: dict[str, Any]) -> None:
        reported.append(row)
        if error is None and job.run.is_over(reported):
            disk.end_trial(job.folder)  # before the report, as Tune stops a trial after its last epoch
        tune.report({TIME: row["epoch"], METRIC: max(row["val_accuracy"] for row in reported)})

    for row in rows:
        report(row)
    if error is None and (not rows or (job.folder / LAST).exists()):
        ended = work(job, evaluated=False, on_epoch=report, patience=math.inf)
        if ended.kind == "mistake":
            tune.report({TIME: len(rows) + 1, METRIC: WORST, "mistake": ended.message})
        if ended.kind in ("stopped", "terminated", "died"):
            raise RuntimeError(ended.message)
        if ended.kind in ("diverged", "fault"):
            error = ended.message
            disk.end_trial(job.folder, error)
    if error is not None:
        tune.report({TIME: plan.base.run.epochs, METRIC: WORST})


def _study(plan: Plan, values: list[tuple[Trial, float]]) -> optuna.Study:
    """A study of finished trials, each with a value."""
    study = optuna.create_study(direction="maximize")
    for trial, value in values:
        drawn = FixedTrial(trial.point)
        changed(plan.base.run, plan.space, drawn)
        study.add_trial(create_trial(params=drawn.params, distributions=drawn.distributions, value=value))
    return study


def importance(plan: Plan, trials: list[Trial]) -> dict[str, float]:
    """Importance of each key for the rank of a trial (fANOVA), the largest first; {} if there are too few trials.

    By rank, because accuracies of trials that were stopped after different epochs are not comparable.
    """
    places = sorted({trial.rank for trial in trials})
    if len(trials) < 5 or len(places) == 1:
        return {}
    study = _study(plan, [(trial, float(places.index(trial.rank))) for trial in trials])
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=plan.sweep.seed)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


def draw(plan: Plan, trials: list[Trial]) -> list[Path]:
    """Optuna's plots of the best val accuracy: parallel coordinates of all keys, and a slice per key."""
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    study, pictures = _study(plan, [(trial, trial.best) for trial in trials if trial.best is not None]), []
    plots = optuna.visualization.matplotlib
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", "Attempting to set identical", UserWarning)  # all trials have the same value
        for name, plot in (("parallel", plots.plot_parallel_coordinate), ("slices", plots.plot_slice)):
            plot(study)
            pictures.append(plan.folder / f"{name}.png")
            plt.gcf().set_size_inches(3 + 2 * len(plan.space), 5)
            plt.savefig(pictures[-1], dpi=110, bbox_inches="tight")
            plt.close("all")
    return pictures
