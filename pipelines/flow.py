"""The only importer of prefect: the flow `train` runs one task per model, as many at a time as Ray has room for."""

import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import copy_context
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.futures import wait
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Failed, State
from prefect.task_runners import ThreadPoolTaskRunner

from fer.config import RunConfig, run_id
from fer.data.dataset import open_data
from fer.errors import UserError, disk_error
from fer.stop import ask_to_stop
from pipelines import launch, report, trials
from pipelines.guard import guarded, mark_children
from pipelines.params import Params, load
from pipelines.tracking import Tracker
from pipelines.trials import Plan, Trial

DATA, RUNS = Path("data"), Path("data/runs")
PATIENCE = 20  # seconds for the runs to save when they are asked to stop; Slurm kills after 30


Runs = dict[str, tuple[RunConfig, Path]]  # name -> run and its folder; a run stands after the one it starts from


def prepare(params: Params, names: list[str]) -> tuple[Runs, Tracker]:
    """The runs of the named models (all without a name), checked against data, tracking server and machine.

    A run that is not finished brings with it the one that its `init_from` names.
    Raises UserError for whatever stands in the way, before any run starts. May be called again at no cost.
    """
    names = params.named(names)
    data = open_data(DATA)
    runs: Runs = {}
    for name in names:
        _add(runs, name, params, data.hash, asked=True)
    unfinished = any(not (folder / "summary.json").exists() for _, folder in runs.values())
    with _server_wakes(unfinished):
        tracker = Tracker(params.tracking.uri, params.tracking.experiment)
        if unfinished:
            launch.start_ray()
            launch.check_resources({name: run for name, (run, _) in runs.items()})
    return runs, tracker


@contextmanager
def _server_wakes(wanted: bool) -> Iterator[None]:
    """Where none is running, Prefect starts a server for each command, which takes seconds: so beside the block."""
    if not wanted:
        yield
        return
    mark_children()
    # here, as what two threads import at a time one of them may see half made
    importlib.import_module("prefect.server.api.server")

    def call() -> None:
        with get_client(sync_client=True) as client:
            client.api_healthcheck()

    with ThreadPoolExecutor(1) as beside:
        beside.submit(copy_context().run, call)  # what is wrong with it, the flow tells
        yield


def _folder(name: str, params: Params, data_hash: str) -> Path:
    """data/runs/<run id>; the id of the run that `init_from` names is part of it."""
    run = params.models[name]
    start = _folder(run.init_from, params, data_hash).name if run.init_from else None
    return RUNS / run_id(name, run, data_hash, start)


def _add(runs: Runs, name: str, params: Params, data_hash: str, asked: bool) -> None:
    run, folder = params.models[name], _folder(name, params, data_hash)
    done = (folder / "summary.json").exists()
    if run.init_from and not done:
        _add(runs, run.init_from, params, data_hash, asked=False)
    if asked or not done:
        runs.setdefault(name, (run, folder))


@task(task_run_name="train-{name}", cache_policy=NO_CACHE, persist_result=False)
def train_model(
    name: str, run: RunConfig, folder: Path, tracker: Tracker, max_failures: int, start: str | None
) -> None:
    """Bring one run to its end: trained, evaluated, in MLflow. What is done already is not done again."""
    if tracker.recorded(folder):
        return
    data = open_data(DATA)
    try:
        with launch.held(folder, name), tracker.record(folder, name, run, {**data.summary, "hash": data.hash}):
            if not (folder / "summary.json").exists():
                launch.launch(name, run, folder, DATA, max_failures, start)
    except OSError as error:
        raise disk_error(error, folder) or error from error


def _run_name() -> str:
    return ", ".join(flow_run.parameters.get("models") or ["all models"])


@flow(name="train", flow_run_name=_run_name, validate_parameters=False)
def train(models: list[str] | None = None, overrides: list[str] | None = None) -> State:
    """Train the named models of params.yaml (all without a name) with `--set` overrides, compare and register them."""
    mark_children()
    params = load(overrides=overrides or [])
    runs, tracker = prepare(params, models or [])
    tracker.close_abandoned()
    with guarded(tracker.uri, tracker.name), _stops_at_a_signal(lambda: list(launch.running)):
        failed = _train_all(runs, tracker, params)
    done = report.finished([folder for name, (_, folder) in runs.items() if name not in failed])
    create_table_artifact(
        [report.row(summary) for summary in done],
        key="results",
        description=report.LEGEND,
    )
    if failed:
        return Failed(message="; ".join(f"{name}: {error}" for name, error in failed.items()), data=failed)
    return Completed(message=f"{len(done)} runs finished", data=failed)


@contextmanager
def _stops_at_a_signal(folders: Callable[[], list[Path]]) -> Iterator[None]:
    """Ctrl-C and SIGTERM: the runs in `folders` save what they have, the flow run is cancelled, and the process ends.

    The guard then ends the workers and closes the runs. Without it Prefect waits for the tasks, and these for Ray,
    which does not hear of the signal. A second Ctrl-C does not wait for the runs.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    run_id = flow_run.id

    def stop(signum: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
        with suppress(KeyboardInterrupt):
            _tell(f"{show_cursor}\nstopping: every run saves what it has; Ctrl-C again ends at once")
            ask_to_stop(folders(), PATIENCE)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _tell("stopped: the same command goes on from there")
        threading.Timer(5, os._exit, [128 + signum]).start()  # Prefect's server may have got the signal, too
        try:
            with get_client(sync_client=True) as client:
                client.set_flow_run_state(run_id, Cancelled(message=signal.Signals(signum).name), force=True)
        finally:
            os._exit(128 + signum)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _train_all(runs: Runs, tracker: Tracker, params: Params) -> dict[str, BaseException]:
    """Submit every run and wait, a run that starts from another after that one; name -> error of the failed."""
    runner: Any = ThreadPoolTaskRunner(max_workers=max(1, len(runs)))
    with runner as pool:
        futures = _submit(runs, pool, tracker, params)
        wait(list(futures.values()))
    failed: dict[str, BaseException] = {}
    for name in runs:
        first = runs[name][0].init_from
        if first in failed:
            kind = UserError if isinstance(failed[first], UserError) else RuntimeError
            failed[name] = kind(f"{name}: not started, as {first}, from which it starts, failed")
        elif not futures[name].state.is_completed():
            failed[name] = futures[name].state.result(raise_on_failure=False)
        if name in failed:
            get_run_logger().error("%s: %s", name, failed[name])
    return failed


def _submit(runs: Runs, pool: Any, tracker: Tracker, params: Params) -> dict[str, Any]:
    """A future per run. Where they do not all fit at once, each stands in Ray's line before the next is submitted.

    The widest go first: Ray gives what is free to any run that fits, so a wide one behind narrow ones would be last.
    """
    step = train_model.with_options(retries=params.experiment.retries, retry_condition_fn=_worth_a_retry)
    in_order = not launch.all_fit([run for run, _ in runs.values()])
    futures: dict[str, Any] = {}
    for name in sorted(runs, key=lambda name: (_steps_before(name, runs), *launch.narrowness(runs[name][0]))):
        run, folder = runs[name]
        first = run.init_from if run.init_from in runs else None
        line = launch.in_line() if in_order else set()
        futures[name] = pool.submit(
            step,
            parameters=_parameters(name, run, folder, tracker, params, runs[first][1].name if first else None),
            wait_for=[futures[first]] if first else None,
        )
        while in_order and not first and launch.in_line() <= line and not futures[name].wrapped_future.done():
            time.sleep(0.1)
    return futures


def _steps_before(name: str, runs: Runs) -> int:
    """How many of `runs` end before this one begins."""
    first = runs[name][0].init_from
    return 1 + _steps_before(first, runs) if first in runs else 0


def _parameters(
    name: str, run: RunConfig, folder: Path, tracker: Tracker, params: Params, start: str | None
) -> dict[str, Any]:
    failures = params.experiment.max_worker_failures
    return {
        "name": name, "run": run, "folder": folder, "tracker": tracker, "max_failures": failures, "start": start
    }  # fmt: skip


def _worth_a_retry(task: Any, task_run: Any, state: State) -> bool:
    return not isinstance(state.result(raise_on_failure=False), UserError)


def prepare_sweep(params: Params, name: str, new: bool) -> tuple[Plan, Tracker]:
    """The named sweep, begun or found again, checked against data, tracking server and machine.

    Raises UserError for whatever stands in the way, before any trial starts. May be called again at no cost.
    """
    plan = trials.plan(params, name, open_data(DATA).hash)
    trials.check_same(plan, new)
    tracker = Tracker(params.tracking.uri, params.tracking.experiment)
    if not trials.complete(plan):
        from pipelines import sweep as search

        mark_children()
        launch.start_ray()
        search.check(plan)
        if plan.sweep.confirm_seeds:
            launch.check_resources({plan.sweep.base: params.models[plan.sweep.base]})
    trials.begin(plan)
    return plan, tracker


@flow(name="sweep", flow_run_name="{name}", validate_parameters=False)
def sweep(name: str, overrides: list[str] | None = None, new: bool = False) -> State:
    """Search for better settings of one model, confirm them with other seeds beside the model's own, register."""
    mark_children()
    params = load(overrides=overrides or [])
    plan, tracker = prepare_sweep(params, name, new)
    data = open_data(DATA)
    tracker.close_abandoned()
    with (
        guarded(tracker.uri, tracker.name),
        _stops_at_a_signal(lambda: [*launch.running, *plan.folder.glob("trials/*/*/")]),
        launch.held(plan.folder, plan.name),
        tracker.sweep(plan, {**data.summary, "hash": data.hash}) as run_id,
    ):
        found = search_trials(plan)
        runs = _confirming(plan, params, found)
        failed = _train_listed(runs, tracker, params)
        if failed:
            raise next(iter(failed.values()))
        result = trials.conclude(plan, params, found, [folder for _, _, folder in runs])
        register_result(plan, found, result, tracker, run_id)
    create_table_artifact(
        report.trial_rows(found, plan.base.epochs), key="trials", description=report.sweep_note(result)
    )
    return Completed(message=f"{len(found)} trials, best {result['best']['number']}", data={})


@task(task_run_name="search", cache_policy=NO_CACHE, persist_result=False)
def search_trials(plan: Plan) -> list[Trial]:
    """Run the trials that are left; Ray and Optuna take seconds to import, so only here."""
    from pipelines import sweep as search

    found = search.search(plan)
    if trials.best_of(found) is None:
        raise UserError(f"sweeps.{plan.name}.hours: over before any trial ended an epoch; raise it")
    return found


Listed = list[tuple[str, RunConfig, Path]]  # name, run and folder


def _confirming(plan: Plan, params: Params, found: list[Trial]) -> Listed:
    """The best of the search and the base, each with seeds that the search did not use."""
    best = trials.best_of(found)
    assert best is not None
    base = params.models[plan.sweep.base]
    runs: Listed = []
    for seed in trials.seeds(plan, best):
        for name, run in ((trials.best_name(plan), trials.best_run(plan, params, best)), (plan.sweep.base, base)):
            seeded = run.model_copy(update={"seed": seed})
            runs.append((name, seeded, RUNS / run_id(name, seeded, plan.data_hash)))
    return runs


def _train_listed(runs: Listed, tracker: Tracker, params: Params) -> dict[str, BaseException]:
    """Train runs that do not depend on each other; run id -> error of the failed."""
    step = train_model.with_options(retries=params.experiment.retries, retry_condition_fn=_worth_a_retry)
    runner: Any = ThreadPoolTaskRunner(max_workers=max(1, len(runs)))
    with runner as pool:
        futures = {
            folder.name: pool.submit(step, parameters=_parameters(name, run, folder, tracker, params, None))
            for name, run, folder in runs
        }
        wait(list(futures.values()))
    return {
        name: future.state.result(raise_on_failure=False)
        for name, future in futures.items()
        if not future.state.is_completed()
    }


@task(task_run_name="register", cache_policy=NO_CACHE, persist_result=False)
def register_result(plan: Plan, found: list[Trial], result: dict[str, Any], tracker: Tracker, run_id: str) -> None:
    """Write result.json, trials.csv and the pictures, and bring them to MLflow."""
    from pipelines import sweep as search
    from pipelines import sweep_charts as charts

    result["importance"] = search.importance(plan, found)
    files = [
        plan.folder / "sweep.json",
        trials.write_table(plan, found),
        charts.parallel(plan.space, found, plan.folder / "parallel.png"),
        charts.effects(plan.space, found, result["importance"], plan.folder / "effects.png"),
    ]
    tracker.describe_sweep(run_id, report.sweep_note(result), trials.numbers(result), files)
    trials.write_result(plan, result)
