"""The only user of Ray Tune and Optuna: runs the trials of a sweep, several at once, and tells what they teach.

What is known stands in the sweep's folder (pipelines/trials.py). A restart reads it: Optuna and the scheduler are told
of all trials, those that did not end are given again and go on from their own checkpoints, or wait at their rung.
"""

import fcntl
import json
import os
import shutil
import time
import uuid
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import ray
from optuna.trial import TrialState, create_trial
from ray import tune
from ray.tune.schedulers import FIFOScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import Searcher

from fer.checkpoint import load_meta
from fer.errors import UserError, disk_error
from fer.files import write_json
from fer.run import resource_faults
from fer.train import NonFiniteLoss, fit
from pipelines import trials as disk
from pipelines.halving import Halving, rungs_of
from pipelines.space import Dimension, Point, Space, changed, grid
from pipelines.sweep_settings import PROMOTING
from pipelines.trials import DONE, FAILED, PRUNED, RUNNING, Plan, Trial, read_trials

TRIES = 200  # points in a row that are known or cannot work, before the search is over ...
OWN_TRIES = 20  # ... of which so many are the sampler's; TPE asks again and again for the best it knows
METRIC, TIME = "best", "epoch"


def check(plan: Plan) -> None:
    """Raises UserError where the started Ray has no room for a trial, or the space no points that work."""
    have, sweep, prefix = ray.cluster_resources(), plan.sweep, f"sweep {plan.name}"
    for kind, need in (("cpu", sweep.cpus_per_trial), ("gpu", sweep.gpus_per_trial)):
        if need > have.get(kind.upper(), 0):
            remedy = "set it to 0 to use CPUs" if kind == "gpu" else "lower it"
            there = f"there are {have.get(kind.upper(), 0):g}"
            raise UserError(f"{prefix}: {kind}s_per_trial: {need:g} {kind.upper()}s, {there}; {remedy}")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=sweep.seed))
    drawn = [_fault(plan, _point(plan, study.ask(_distributions(plan.space)))) for _ in range(50)]
    found = [fault for fault in drawn if fault]
    if found:
        raise UserError(f"{prefix}: space: {len(found)} of 50 points drawn from it cannot work, as {found[0]}")


def search(plan: Plan) -> list[Trial]:
    """Run trials until the budget is used up; what was done before counts. Returns all trials.

    Raises UserError for what stops every trial, RuntimeError when each of them failed.
    """
    sweep, before = plan.sweep, read_trials(plan.folder)
    left = sweep.trials - sum(trial.state != RUNNING for trial in before)
    seconds = None if sweep.hours is None else sweep.hours * 3600 - disk.spent(plan.folder)
    if left <= 0 or (seconds is not None and seconds <= 0):
        return before
    clock = _Clock(plan.folder, seconds)
    searcher = _Search(plan, before, clock, _at_once(plan))
    storage = plan.folder / ".tune"
    shutil.rmtree(storage, ignore_errors=True)  # of a start that was killed; nothing in it is read
    work = tune.with_parameters(_trial, plan=plan)
    members = _members(searcher, left) if sweep.scheduler == "pbt" else []  # all alive; without room they take turns
    tuner = tune.Tuner(
        tune.with_resources(work, {"CPU": sweep.cpus_per_trial, "GPU": sweep.gpus_per_trial}),
        param_space={"member": tune.grid_search(members)} if members else {},
        tune_config=tune.TuneConfig(
            search_alg=None if members else searcher,
            scheduler=_scheduler(plan, searcher),
            num_samples=1 if members else left,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=uuid.uuid4().hex,
            storage_path=str(storage.resolve()),
            failure_config=tune.FailureConfig(max_failures=sweep.restarts),
            stop=clock,
            callbacks=[_Followed(searcher)] if members else None,
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    finally:
        clock.save()
        shutil.rmtree(storage, ignore_errors=True)
    if clock.fatal:
        raise UserError(clock.fatal)
    after = read_trials(plan.folder)
    if after and all(trial.state == FAILED for trial in after):
        raise RuntimeError(f"sweep {plan.name}: all {len(after)} trials failed; the first: {after[0].error}")
    return after


def _at_once(plan: Plan) -> int:
    """As many trials as are wished, or as there is room for."""
    have, sweep = ray.cluster_resources(), plan.sweep
    room = have["CPU"] // sweep.cpus_per_trial
    if sweep.gpus_per_trial:
        room = min(room, int(have["GPU"]) * int(1 / sweep.gpus_per_trial + 1e-9))
    return int(min(room, sweep.at_once or room))


class _Clock(tune.Stopper):
    """Ends everything when time is up, or when a trial met what would stop every other. Keeps clock.json."""

    def __init__(self, folder: Path, seconds: float | None):
        self.folder, self.before, self.started = folder, disk.spent(folder), time.monotonic()
        self.seconds, self.saved = seconds, 0.0
        self.fatal: str | None = None

    @property
    def over(self) -> bool:
        return self.fatal is not None or (self.seconds is not None and self.passed() >= self.seconds)

    def passed(self) -> float:
        return time.monotonic() - self.started

    def save(self) -> None:
        write_json(self.folder / "clock.json", {"seconds": round(self.before + self.passed(), 1)})
        self.saved = self.passed()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if self.passed() - self.saved >= 1:
            self.save()
        return self.over


class _Search(Searcher):
    """Optuna for Tune. Ray's own tells it nothing of trials that were stopped early, and repeats configurations."""

    def __init__(self, plan: Plan, before: list[Trial], clock: _Clock, at_once: int):
        super().__init__(metric=METRIC, mode="max")
        self.plan, self.clock, self.at_once = plan, clock, at_once
        self.halving = Halving(_rungs(plan), plan.sweep.reduction, before, plan.sweep.scheduler == "halving")
        self.known = {plan.id_of(trial.point) for trial in before}
        self.again = [trial for trial in before if trial.state == RUNNING]
        self.exhausted = False  # the search finds no other point
        self.live: dict[str, Trial] = {}  # Tune's id -> the trial, paused or not
        self.queue = [] if before else [plan.published]
        if plan.sweep.search == "grid":
            self.queue += [point for point in grid(plan.space) if plan.id_of(point) not in self.known]

    @property
    def room(self) -> bool:
        """For one more trial beside those that run. Tune's own limit would count the paused ones."""
        return len(self.live) - len(self.halving.paused) < self.at_once

    @property
    def promotes(self) -> int | None:
        """The paused trial that goes on next, before a new one starts."""
        more = bool(self.again) or (not self.exhausted and len(self.known) < self.plan.sweep.trials)
        return self.halving.next(more)

    def suggest(self, trial_id: str) -> Any:
        """A trial to start; None while there is no room, or while one that is to be promoted comes first."""
        waits = not self.again and self.promotes is not None
        return self.give(trial_id) if self.room and not waits else None

    def give(self, trial_id: str) -> Any:
        trial = self.again.pop(0) if self.again else self._next()
        if trial is None:
            self.exhausted = True
            return Searcher.FINISHED
        self.live[trial_id] = trial
        return {"point": trial.point, "folder": str(trial.folder.resolve())}

    def _next(self) -> Trial | None:
        """A trial that is not known yet, on disk before it starts; None when the search finds no other."""
        before = read_trials(self.plan.folder)
        study = _study(self.plan, before)
        own, chance = study.sampler, optuna.samplers.RandomSampler(seed=self.plan.sweep.seed + len(before))
        for attempt in range(TRIES):
            study.sampler = own if attempt < OWN_TRIES else chance
            point = self.queue.pop(0) if self.queue else _asked(self.plan, study)
            if not _fault(self.plan, point) and (ours := self.plan.id_of(point)) not in self.known:
                self.known.add(ours)
                return disk.add_trial(self.plan.folder, len(before) + 1, point)
        return None

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self.clock.fatal = self.clock.fatal or result.get("fatal")

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Without a result it is a paused one that nobody promoted."""
        trial = self.live.pop(trial_id)
        self.halving.leave(trial.number)
        result = result or {}
        state, reason = DONE, None
        if error or result.get("error"):
            state, reason = FAILED, result.get("error") or _reason(trial.folder)
        elif result.get(TIME, 0) < self.plan.base.run.epochs:
            state = RUNNING if self.clock.over else PRUNED
        ended = disk.set_state(trial, state, reason)
        if state != RUNNING:
            disk.drop_weights(ended)

    def save(self, checkpoint_path: str) -> None:
        """Tune wishes a file; everything is in the sweep's folder already."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError


def _members(searcher: _Search, count: int) -> list[dict[str, Any]]:
    """The population of pbt, which takes no search algorithm: drawn at once."""
    given = [(f"member {i}", searcher.give(f"member {i}")) for i in range(count)]
    return [{"key": key, **config} for key, config in given if config != Searcher.FINISHED]


class _Followed(tune.Callback):
    """Tells the searcher of the members of pbt what Tune itself tells it of other trials."""

    def __init__(self, searcher: _Search):
        self.searcher = searcher
        self.keys: dict[str, str] = {}  # Tune's id -> member: later on a trial may have the config of another

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self.keys.setdefault(trial.trial_id, trial.config["member"]["key"])

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict, **info: Any) -> None:
        self.searcher.on_trial_result(self.keys[trial.trial_id], result)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self.searcher.on_trial_complete(self.keys[trial.trial_id], trial.last_result)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self.searcher.on_trial_complete(self.keys[trial.trial_id], error=True)


def _distributions(space: Space) -> dict[str, Any]:
    def one(dimension: Dimension) -> Any:
        if dimension.kind == "choice":
            return optuna.distributions.CategoricalDistribution(dimension.labels)
        low, high = dimension.values
        if dimension.kind == "int":
            return optuna.distributions.IntDistribution(low, high)
        return optuna.distributions.FloatDistribution(low, high, log=dimension.kind == "log")

    return {key: one(dimension) for key, dimension in space.items()}


def _point(plan: Plan, asked: optuna.Trial) -> Point:
    """The values asked for, in a few digits, but for the base's own."""
    own = plan.published
    return {
        key: value if value == own[key] else plan.space[key].round(value)
        for key, value in ((key, asked.params[key]) for key in plan.space)
    }


def _asked(plan: Plan, study: optuna.Study) -> Point:
    """A point of the sampler. That it was asked for is no news to it: a trial is known by its folder."""
    asked = study.ask(_distributions(plan.space))
    study.tell(asked, state=TrialState.FAIL)
    return _point(plan, asked)


def _fault(plan: Plan, point: Point) -> str | None:
    """Why a run cannot have this point, whose values may each be well; confirmed, it has the base's resources."""
    run, found = changed(plan.base.run, plan.space, point)
    if run is not None:
        found = resource_faults(run, plan.resources) or resource_faults(run, plan.base.resources)
    return f"{found[0]} ({point})" if found else None


def _study(plan: Plan, before: list[Trial]) -> optuna.Study:
    """Optuna's study of the trials on disk: made anew for each question, so that a restart is told the same."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seed = plan.sweep.seed + len(before)  # else it would ask for its first points again
    sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed=seed)
    if plan.sweep.search == "tpe":
        start = min(10, max(4, plan.sweep.trials // 4))
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=start)
    study = optuna.create_study(sampler=sampler, direction="maximize")
    distributions, rungs = _distributions(plan.space), _rungs(plan)
    for trial in before:
        study.add_trial(create_trial(params=trial.point, distributions=distributions, **_outcome(trial, rungs)))
    return study


def _outcome(trial: Trial, rungs: list[int]) -> dict[str, Any]:
    """What Optuna is told: for it those that came less far rank below, one that failed comes last.

    Most trials wait at a rung until the search ends, so one that did not end counts as stopped at its last rung.
    """
    best = np.maximum.accumulate([row["val_accuracy"] for row in trial.rows]).tolist()
    seen = dict(zip((row["epoch"] for row in trial.rows), best))
    if trial.state == DONE:
        return {"state": TrialState.COMPLETE, "value": best[-1], "intermediate_values": seen}
    if trial.state == RUNNING:
        last = max((rung for rung in rungs if rung <= trial.epoch), default=0)
        seen = {epoch: value for epoch, value in seen.items() if epoch <= last}
        return {"state": TrialState.PRUNED if seen else TrialState.RUNNING, "intermediate_values": seen}
    lost = trial.state == FAILED or not seen
    return {"state": TrialState.PRUNED, "intermediate_values": {1: 0.0} if lost else seen}


def _rungs(plan: Plan) -> list[int]:
    sweep = plan.sweep
    if sweep.scheduler not in PROMOTING:
        return []
    return rungs_of(sweep.grace_epochs, sweep.reduction, plan.base.run.epochs)


def _scheduler(plan: Plan, searcher: _Search) -> TrialScheduler:
    sweep = plan.sweep
    if sweep.scheduler in PROMOTING:
        return _Promoting(searcher)
    if sweep.scheduler == "pbt":
        return PopulationBasedTraining(
            time_attr=TIME,
            metric=METRIC,
            mode="max",
            perturbation_interval=sweep.grace_epochs,
            hyperparam_mutations={"member": {"point": {key: _mutation(one) for key, one in plan.space.items()}}},
            custom_explore_fn=partial(_within, plan.space),
        )
    return FIFOScheduler()


class _Promoting(FIFOScheduler):
    """Pauses trials at their rungs and promotes them (pipelines/halving.py). Ray's own never lets one come back."""

    def __init__(self, searcher: _Search):
        super().__init__()
        self.searcher, self.halving = searcher, searcher.halving

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        number = self.searcher.live[trial.trial_id].number
        pauses = self.halving.pauses(number, result[TIME], result[METRIC])
        return TrialScheduler.PAUSE if pauses else TrialScheduler.CONTINUE

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self.halving.leave(self.searcher.live[trial.trial_id].number)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """A new trial or a promoted one, the same until it runs. When nothing is left to do, the paused ones end."""
        best = self.searcher.promotes
        if best is not None and self.searcher.room:
            self.halving.promote(best)
        alive = [trial for trial in tune_controller.get_trials() if not trial.is_finished()]
        for trial in alive:
            waits = self.searcher.live[trial.trial_id].number in self.halving.paused
            if trial.status in ("PENDING", "PAUSED") and not waits:
                return trial
        if tune_controller.search_alg.is_finished() and all(trial.status == "PAUSED" for trial in alive):
            for trial in alive:
                tune_controller.stop_trial(trial)
        return None


def _mutation(dimension: Dimension) -> Any:
    if dimension.kind == "choice":
        return dimension.labels
    low, high = dimension.values
    if dimension.kind == "int":
        return tune.randint(low, high + 1)
    return tune.loguniform(low, high) if dimension.kind == "log" else tune.uniform(low, high)


def _within(space: Space, config: dict[str, Any]) -> dict[str, Any]:
    """pbt multiplies by 0.8 or 1.2: back into the range."""
    point = config["member"]["point"]
    for key, value in point.items():
        if space[key].kind != "choice":
            low, high = space[key].values
            point[key] = space[key].round(type(low)(min(max(value, low), high)))
    return config


def _reason(folder: Path) -> str:
    try:
        return (folder / "failure.txt").read_text()
    except FileNotFoundError:
        return "its process was killed"


def _trial(config: dict[str, Any], plan: Plan) -> None:
    """On a worker: train the point, or go on with it, and report every epoch."""
    with suppress(FileNotFoundError):  # on another machine of a cluster
        os.chdir(plan.root)  # paths in settings are relative to the project, Ray starts workers elsewhere
    config = config.get("member", config)
    folder, run = _own_folder(config, plan), plan.run(config["point"])
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the process of a killed driver is gone
        report = _Report(folder / plan.id_of(config["point"]), config["point"], plan)
        try:
            for row in disk.read_rows(report.folder):
                report(row)
            fit(plan.base.name, run, plan.resources, plan.root / "data", folder, on_epoch=report)
        except NonFiniteLoss as error:
            report.end(error=str(error))
        except UserError as error:
            report.end(fatal=str(error))
        except OSError as error:
            known = disk_error(error, folder)
            if known is None:
                raise
            report.end(fatal=str(known))
        except Exception as error:
            (folder / "failure.txt").write_text(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            raise


def _own_folder(config: dict[str, Any], plan: Plan) -> Path:
    """The trial's folder. What pbt takes over from another is its whole config, so the first one is remembered."""
    if plan.sweep.scheduler != "pbt":
        return Path(config["folder"])
    note = plan.root / plan.folder / ".tune" / f"{tune.get_context().get_trial_id()}.json"
    if not note.exists():
        write_json(note, config["folder"])
    return Path(json.loads(note.read_text()))


class _Report:
    """Tells Tune of an epoch; with pbt, gives the checkpoint that others may take over."""

    def __init__(self, folder: Path, point: Point, plan: Plan):
        self.folder, self.plan, self.best, self.epoch = folder, plan, 0.0, 0
        given = tune.get_checkpoint() if plan.sweep.scheduler == "pbt" else None
        taken = self._take(given) if given else None
        folder.mkdir(exist_ok=True)
        write_json(folder / "point.json", {"point": point, "from": taken})

    def _take(self, given: tune.Checkpoint) -> str | None:
        """Go on from another trial's checkpoint, unless that was done already or it is this trial's own."""
        with given.as_directory() as other:
            meta = load_meta(Path(other))
            origin = f"{meta['run_id']} epoch {meta['epoch']}"
            before = (disk.read_point(self.folder) or {}).get("from")
            if meta["run_id"] == self.folder.name:
                return before
            if before != origin:
                shutil.rmtree(self.folder, ignore_errors=True)
                shutil.copytree(other, self.folder / "last")
        return origin

    def __call__(self, row: dict[str, Any]) -> None:
        self.best, self.epoch = max(self.best, row["val_accuracy"]), row["epoch"]
        every = self.plan.sweep.grace_epochs
        shares = self.plan.sweep.scheduler == "pbt" and self.epoch % every == 0 and (self.folder / "last").exists()
        checkpoint = tune.Checkpoint.from_directory(str(self.folder / "last")) if shares else None
        tune.report({TIME: self.epoch, METRIC: self.best}, checkpoint=checkpoint)

    def end(self, **why: str) -> None:
        tune.report({TIME: self.epoch, METRIC: self.best, **why})


def importance(plan: Plan, trials: list[Trial]) -> dict[str, float]:
    """Share of each key in what decides a trial's rank (fANOVA), the largest first; {} where trials are too few.

    By rank, since the accuracies of trials that ended at different epochs do not compare.
    """
    ended = [trial for trial in trials if trial.state != RUNNING]
    if len(ended) < 5:
        return {}
    places = sorted({trial.rank for trial in ended})
    if len(places) == 1:
        return {}
    study = optuna.create_study(direction="maximize")
    distributions = _distributions(plan.space)
    for trial in ended:
        place = float(places.index(trial.rank))
        study.add_trial(create_trial(params=trial.point, distributions=distributions, value=place))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=plan.sweep.seed)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)
