"""Prefect's flows: they train runs, one task each, and carry out a sweep. Only flow_page.py imports prefect as well."""

import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.futures import wait
from prefect.runtime import flow_run
from prefect.settings import get_current_settings
from prefect.states import Completed, Failed, State
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import Field

from fer.data.dataset import DataSet, open_data
from fer.data.folds import fold_of
from fer.errors import UserError, disk_error
from fer.evaluate import outdated
from fer.files import held, is_held, write_json
from fer.models import build_model, named_weights, weights_files
from fer.run import Run, run_id
from fer.run_folder import LAST, SUMMARY, read_config, read_summary
from fer.teacher import check_teacher
from fer.train import NonFiniteLoss
from pipelines import experiments, flow_page, launch, report
from pipelines.data_sets import folder_of
from pipelines.experiments import Experiment, Job
from pipelines.folds import TABLE, added, jobs_of, read_sum, sum_folder
from pipelines.guard import close_runs, guarded, runs_closed
from pipelines.launch import Launcher
from pipelines.params import Params, load, machine
from pipelines.sweeps import folder as sweeps
from pipelines.sweeps import settings as sweep_settings
from pipelines.sweeps.files import ABOUT, RESULT
from pipelines.sweeps.folder import Plan, Trial
from pipelines.tracking import FOLD, SWEEP, Tracker, described

RUNS = Path("data/runs")
FLOW_RUN = "fer.prefect_flow_run"  # tag of an MLflow run
START_PATIENCE = 300.0  # seconds to wait for another command that starts
PATIENCE = 20  # seconds that runs get to save when asked to stop; Slurm kills after 30
Jobs = dict[str, Job]  # by name; a run comes after the one it starts from


def prepare(words: list[str], folds: str | None = None) -> tuple[Jobs, Tracker]:
    """The runs of the experiments and changes in `words`, checked against data, tracking server and machine.

    `folds`: a number of folds, or `subjects`; each experiment is then a run for each fold. Includes the runs that
    unfinished ones start from (`init_from`). Raises UserError for whatever would keep a run from starting. Calling it
    again costs nothing.
    """
    params = load()
    found = {name: experiments.taught(one, RUNS) for name, one in experiments.load(words, machine(params)).items()}
    data = _opened(found, params)
    jobs = _jobs(found, data) if folds is None else jobs_of(found, data, folds, RUNS)
    for name, job in jobs.items():
        check_same_weights(name, job.run, job.folder)
    asked = {experiments.path_of(name).stem for name in experiments.split(words)[0]} if folds is None else set(jobs)
    open_jobs = {name for name, job in jobs.items() if not done(job.folder, data[job.name])}
    for name in reversed(jobs):
        first = jobs[name].run.init_from
        if name in asked and name in open_jobs and first is not None:
            asked.add(first)
    jobs = {name: job for name, job in jobs.items() if name in asked}
    left = [job for name, job in jobs.items() if name in open_jobs]
    for job in left:
        if read_summary(job.folder) is None:
            check_teacher(job.run, data[job.name], RUNS)
    for job in jobs.values():
        data[job.name].prior(job.run.loss.needs_prior)
    flow_page.check_server()
    with _starting(), _prefect_starting(bool(left)):
        tracker = Tracker(params.tracking.uri, params.tracking.experiment, params.tracking.promotion)
        for job in {job.name: job for job in left}.values():
            _check_weights(job, len(data[job.name].classes))
        if left:
            launch.start_ray()
            launch.check_resources({job.name: job for job in jobs.values()}.values())
    return jobs, tracker


def _opened(found: dict[str, Experiment], params: Params) -> dict[str, DataSet]:
    """The data set of each experiment; test is checked before anything starts, as train and val are by the hash."""
    # those that start from others first, as theirs is the mistake in a data set that both have
    wanted = {name: _folder_of(found[name], params) for name in reversed(found)}
    known = {folder: open_data(folder) for folder in set(wanted.values())}
    for data in known.values():
        data.split("test")
    return {name: known[folder] for name, folder in wanted.items()}


def _folder_of(experiment: Experiment, params: Params) -> Path:
    return folder_of(params, experiment.data, f"{experiment.origins.get('data')}: data")


def _jobs(found: dict[str, Experiment], data: Mapping[str, DataSet]) -> Jobs:
    jobs: Jobs = {}
    for name, experiment in found.items():
        run = experiment.run
        start = jobs[run.init_from].folder.name if run.init_from else None
        folder = RUNS / run_id(name, run, data[name].hash, start)
        jobs[name] = Job(name, run, experiment.resources, data[name].folder, folder, start)
    return jobs


def done(folder: Path, data: DataSet) -> bool:
    """Whether a run has been evaluated on the current test split, with the current marks of leaked images."""
    summary = read_summary(folder)
    return summary is not None and outdated(summary, data) is None


def _check_weights(job: Job, classes: int) -> None:
    """Raises UserError if a new run's pretrained weights cannot be had, before its worker finds out.

    The workers of a cluster fetch their own.
    """
    wanted = named_weights(job.run.model)
    if wanted and not os.environ.get("RAY_ADDRESS") and not (job.folder / LAST).exists():
        sys.stdout.write(f"{job.name}: loads its weights: {', '.join(wanted)}\n")
        build_model(job.run.model, job.run.input, classes)


def check_same_weights(name: str, run: Run, folder: Path) -> None:
    """Raises UserError if a file of pretrained weights has changed since `folder` was trained: its id has the name."""
    if not any((folder / file).exists() for file in (LAST, SUMMARY)):
        return
    noted = read_config(folder).get("weights", {})
    for file, digest in weights_files(run.model).items():
        if noted.get(file, digest) != digest:
            raise UserError(
                f"{name}: {file} has changed since {folder} was trained with it: give the file another name, "
                "or delete that folder to train again"
            )


def recorded(job: Job, tracker: Tracker) -> bool:
    """Whether a run is done and in MLflow, so that nothing is left to do."""
    return done(job.folder, open_data(job.data)) and tracker.recorded(job.folder)


def _starting() -> AbstractContextManager[None]:
    """A lock for whoever may create the databases of MLflow and Prefect, which two at a time would break."""
    home = Path(os.environ["PREFECT_HOME"])
    if is_held(home):
        sys.stdout.write("Waiting for another command that is starting\n")
    return held(home, START_PATIENCE)


@contextmanager
def _prefect_starting(wanted: bool) -> Iterator[None]:
    """Let Prefect start its temporary server, which takes seconds, in parallel with the block; not if one is named."""
    if not wanted or get_current_settings().api.url:
        yield
        return
    # in this thread: of two that import at the same time, one may see a half-initialized module
    importlib.import_module("prefect.server.api.server")

    def call() -> None:
        with get_client(sync_client=True) as client:
            client.api_healthcheck()

    with ThreadPoolExecutor(1) as beside:
        beside.submit(copy_context().run, call)  # if it fails, so will the flow, with a message
        yield


@task(task_run_name="train-{job.title}", cache_policy=NO_CACHE, persist_result=False)
def train_model(job: Job, tracker: Tracker, launcher: Launcher, tags: Mapping[str, str]) -> None:
    """Train, evaluate and record one run, as far as that is not done already.

    Raises UserError for what a user can fix, RuntimeError for other failures of the run.
    """
    data = fold_of(open_data(job.data), job.fold)
    tags = {**tags, FOLD: job.fold} if job.fold else tags
    ready, summary = done(job.folder, data), read_summary(job.folder)
    if ready:
        if tracker.recorded(job.folder):
            return
        _say(f"{job.folder.name}: finished before, but not in MLflow's store; recording it")
    if summary is not None and (again := outdated(summary, data)):
        _say(f"{job.folder.name}: {again}")
    if is_held(job.folder):
        raise UserError(f"another process is training {job.folder.name}; wait for it or stop it")
    page = partial(flow_page.Progress, job.folder.name, job.run.epochs)
    try:
        with tracker.record(job, described(data), {FLOW_RUN: str(flow_run.id), **tags}, page):
            if not ready:
                launcher.launch(job)
    except OSError as error:
        raise disk_error(error, job.folder) or error from error


def _run_name() -> str:
    folds = flow_run.parameters.get("folds")
    return ", ".join([*flow_run.parameters["words"], *([f"--folds {folds}"] if folds else [])])


def _check_words(words: list[str]) -> None:
    if isinstance(words, str):
        raise UserError(f'words: should be a list, as ["vgg13_small", "epochs=20"], got {words!r}')


def _form(**known: list[str]) -> Callable[[Callable], Callable]:
    """Fill the names that exist into a flow's docstring, from which Prefect takes the help of its run form."""

    def filled(function: Callable) -> Callable:
        names = {key: ", ".join(values) for key, values in known.items()}
        function.__doc__ = (function.__doc__ or "").format(**names)
        return function

    return filled


@flow(name="train", flow_run_name=_run_name, validate_parameters=False)
@_form(experiments=experiments.known())
def train(
    words: Annotated[list[str], Field(examples=[["vgg13_small", "epochs=20"]])], folds: str | None = None
) -> State:
    """Train experiments, evaluate and compare them, record them in MLflow and register the best.

    The state's data is name -> error of each run that failed. Raises UserError if nothing can start.

    Args:
        words: Experiments to train, and KEY=VALUE for settings to change, each an item of the list: vgg13_small,
            epochs=20. Experiments: {experiments}.
        folds: Cross-validation: a number of folds, or subjects to leave one subject out at a time.
    """
    _check_words(words)
    folds = None if folds is None else str(folds)  # a number, where it comes from a form or a file
    if not experiments.split(words)[0]:
        raise UserError(f"words: name an experiment, of {', '.join(experiments.known())}")
    flow_page.introduce()
    with guarded():
        jobs, tracker = prepare(words, folds)
        flow_page.introduce({*(job.name for job in jobs.values()), *experiments.split(words)[1]})
        close_runs(tracker.uri, tracker.name)
        tracker.close_abandoned()
        flow_page.close_abandoned()
        launcher = Launcher()
        with _stops_at_a_signal(lambda: launcher.stop(PATIENCE), tracker):
            failed = _train_all(jobs, tracker, launcher, {})
            sums = record_sums(jobs, failed, tracker) if folds is not None else []
    finished = report.summaries([job.folder for name, job in jobs.items() if name not in failed])
    create_table_artifact(
        [report.row(summary) for summary in finished] if folds is None else [report.folds_row(one) for one in sums],
        key="results",
        description=report.LEGEND if folds is None else report.FOLDS_LEGEND,
    )
    if failed:
        return Failed(message="; ".join(f"{name}: {error}" for name, error in failed.items()), data=failed)
    return Completed(message=f"{len(finished)} runs finished", data=failed)


def of_one(jobs: Jobs, failed: Collection[str] = ()) -> list[list[Job]]:
    """The folds of each experiment, where none failed."""
    by_name: dict[str, list[Job]] = {}
    for job in jobs.values():
        by_name.setdefault(job.name, []).append(job)
    broken = {jobs[name].name for name in failed}
    return [made for name, made in by_name.items() if name not in broken]


def record_sums(jobs: Jobs, failed: Collection[str], tracker: Tracker) -> list[dict[str, Any]]:
    """Add up the folds of each experiment and record the sums, as far as that is not done already."""
    sums = []
    for made in of_one(jobs, failed):
        result, folder = added(made), sum_folder(made)
        tracker.record_folds(result, report.folds_note(result), [folder / TABLE, folder / SUMMARY])
        sums.append(result)
    return sums


def sums_recorded(jobs: Jobs, tracker: Tracker) -> bool:
    """Whether the folds of each experiment are added up, and that is in MLflow."""
    found = [read_sum(sum_folder(made)) for made in of_one(jobs)]
    return all(one is not None and tracker.recorded_folds(one) for one in found)


@contextmanager
def _stops_at_a_signal(save: Callable[[], None], tracker: Tracker) -> Iterator[None]:
    """On Ctrl-C or SIGTERM, `save` makes the runs save their state, the flow run is cancelled, and the process exits.

    The guard then kills the workers. Without this, Prefect would wait for the tasks, and the tasks for Ray, which does
    not get the signal. A second Ctrl-C does not wait for the runs.
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
            _say(f"{show_cursor}\nstopping: every run saves its state; Ctrl-C again exits at once")
            save()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _say("stopped: the same command resumes")
        threading.Timer(5, os._exit, [128 + signum]).start()  # Prefect's server may have got the signal as well
        try:
            closed = tracker.leave()
            flow_page.cancel(run_id, signal.Signals(signum).name)
            if closed:
                runs_closed()
        finally:
            os._exit(128 + signum)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _train_all(jobs: Jobs, tracker: Tracker, launcher: Launcher, tags: Mapping[str, str]) -> dict[str, BaseException]:
    """Submit all runs and wait, each after the one it starts from; returns name -> error of the failed ones."""
    runner: Any = ThreadPoolTaskRunner(max_workers=launch.at_once([job.resources for job in jobs.values()]))
    with runner as pool:
        futures: dict[str, Any] = {}
        for name, job in jobs.items():
            before = [futures[job.run.init_from]] if job.run.init_from in futures else None
            given = {"job": job, "tracker": tracker, "launcher": launcher, "tags": tags}
            futures[name] = pool.submit(train_model, parameters=given, wait_for=before)
        wait(list(futures.values()))
    failed: dict[str, BaseException] = {}
    for name, job in jobs.items():
        first = job.run.init_from
        if first in failed:
            kind = UserError if isinstance(failed[first], UserError) else RuntimeError
            failed[name] = kind(f"not started, because {first}, which it starts from, failed")
        elif not futures[name].state.is_completed():
            failed[name] = futures[name].state.result(raise_on_failure=False)
        if name in failed:
            get_run_logger().error("%s: %s", name, failed[name])
    return failed


def prepare_sweep(words: list[str], new: bool) -> tuple[Plan, Tracker]:
    """The sweep named in `words`, started or resumed, checked against data, tracking server and machine.

    `new`: start another one if the settings have changed. Raises UserError for whatever would keep a trial from
    starting. Calling it again costs nothing.
    """
    params = load()
    plan = sweeps.plan(words, machine(params), lambda base: open_data(_folder_of(base, params)))
    sweeps.check_same(plan, new)
    for folder in plan.folder.glob("runs/*"):
        check_same_weights(plan.name, plan.base.run, folder)
    flow_page.check_server()
    with _starting(), _prefect_starting(not sweeps.complete(plan)):
        tracker = Tracker(params.tracking.uri, params.tracking.experiment, params.tracking.promotion)
        if not sweep_recorded(plan, tracker):
            from pipelines.sweeps import search

            launch.start_ray()
            search.check(plan)
            if plan.sweep.confirm_seeds:
                launch.check_resources([Job(plan.base.name, plan.base.run, plan.base.resources, plan.data, RUNS)])
    if is_held(plan.folder):
        raise UserError(f"{plan.folder}: another process is working on it; wait for it or stop it")
    sweeps.begin(plan)
    return plan, tracker


def sweep_recorded(plan: Plan, tracker: Tracker) -> bool:
    """Whether a sweep is complete and in MLflow, so that nothing is left to do."""
    return sweeps.complete(plan) and tracker.recorded_sweep(plan)


@flow(name="sweep", flow_run_name=_run_name, validate_parameters=False)
@_form(sweeps=sweep_settings.known())
def sweep(words: Annotated[list[str], Field(examples=[["tiny", "trials=20"]])], new: bool = False) -> State:
    """Search for better settings of an experiment and confirm them with other seeds; record all in MLflow.

    Raises UserError for what a user can fix, RuntimeError for other failures.

    Args:
        words: A sweep to run, and KEY=VALUE for its own settings, each an item of the list: tiny, trials=20. Sweeps:
            {sweeps}.
        new: Begin another sweep if the settings differ from those of the one begun.
    """
    _check_words(words)
    flow_page.introduce()
    with guarded():
        return _sweep(*prepare_sweep(words, new), words)


def _sweep(plan: Plan, tracker: Tracker, words: list[str]) -> State:
    data = open_data(plan.data)
    flow_page.introduce({plan.name, plan.base.name, *experiments.split(words)[1]})
    close_runs(tracker.uri, tracker.name)
    tracker.close_abandoned()
    flow_page.close_abandoned()
    launcher = Launcher()
    with (
        _stops_at_a_signal(lambda: launcher.stop(PATIENCE, plan.folder.glob("runs/*/")), tracker),
        held(plan.folder, patience=1.0),  # `fer sweep status` looks at the lock as well
        tracker.sweep(plan, described(data)) as run_id,
    ):
        found = search_trials(plan)
        jobs = _confirming(plan, found)
        failed = _train_all({job.folder.name: job for job in jobs}, tracker, launcher, {SWEEP: plan.name})
        confirmed, diverged = without_diverged(jobs, failed)
        result = sweeps.conclude(plan, found, [job.folder for job in confirmed], diverged)
        register_result(plan, found, result, tracker, run_id)
    create_table_artifact(
        report.trial_rows(found, plan.base.run.epochs), key="trials", description=report.sweep_note(result)
    )
    return Completed(message=f"{len(found)} trials, best {result['best']['number']}", data={})


@task(task_run_name="search", cache_policy=NO_CACHE, persist_result=False)
def search_trials(plan: Plan) -> list[Trial]:
    """Run the trials that are left. Raises UserError if the time was up before any of them finished an epoch."""
    from pipelines.sweeps import search  # takes seconds to import

    if sweeps.complete(plan):  # and to be recorded again
        return sweeps.read_trials(plan.folder)
    found = search.search(plan)
    if sweeps.best_of(found) is None:
        raise UserError(f"sweep {plan.name}: hours: over before any trial finished an epoch; raise it")
    return found


def _confirming(plan: Plan, found: list[Trial]) -> list[Job]:
    """Runs of the best trial and of the base, with seeds that the search did not use, on the base's resources."""
    best, base = sweeps.best_of(found), plan.base
    assert best is not None
    jobs = []
    for seed in sweeps.seeds(plan, best):
        for name, run in ((sweeps.best_name(plan), plan.run(best.point)), (base.name, base.run)):
            seeded = run.model_copy(update={"seed": seed})
            folder = RUNS / run_id(name, seeded, plan.data_hash)
            jobs.append(Job(name, seeded, base.resources, plan.data, folder))
    return jobs


def without_diverged(jobs: list[Job], failed: Mapping[str, BaseException]) -> tuple[list[Job], dict[int, str]]:
    """The confirming runs of the seeds with which neither best nor base diverged, and what was said of the others.

    `failed`: run id -> error. Raises UserError or RuntimeError if a run failed in another way, after which the same
    command can go on.
    """
    errors = [(job.run.seed, failed.get(job.folder.name)) for job in jobs]
    diverged = {seed: str(error) for seed, error in errors if isinstance(error, NonFiniteLoss)}
    left = [job for job in jobs if job.run.seed not in diverged]
    for name in (job.folder.name for job in left if job.folder.name in failed):
        error = failed[name]
        if isinstance(error, UserError):
            raise UserError(*(f"{name}: {line}" for line in error.lines)) from error
        raise RuntimeError(f"{name}: {error}") from error
    return left, diverged


@task(task_run_name="register", cache_policy=NO_CACHE, persist_result=False)
def register_result(plan: Plan, found: list[Trial], result: dict[str, Any], tracker: Tracker, run_id: str) -> None:
    """Write result.json, trials.csv and the plots, and log them in MLflow."""
    from pipelines.sweeps import search

    result["importance"] = search.importance(plan, found)
    files = [plan.folder / ABOUT, sweeps.write_table(plan, found), *search.draw(plan, found)]
    tracker.describe_sweep(run_id, report.sweep_note(result), sweeps.numbers(result), files)
    write_json(plan.folder / RESULT, result)  # last, as it marks the sweep as complete
