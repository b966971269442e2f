"""Records runs in MLflow from their files, and registers their models.

Training only writes files. A thread here sends new lines of metrics.jsonl to MLflow, so that a slow or dead server
costs neither training time nor a point: what is missing is sent at the end, or by the next command.
"""

import getpass
import json
import logging
import math
import os
import re
import socket
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit
from urllib.request import url2pathname

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.data.schema import TensorDatasetSchema
from mlflow.entities import Dataset, DatasetInput, Experiment, InputTag, Metric, Param, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.types import Schema, TensorSpec

from fer.data.dataset import DataSet
from fer.errors import UserError, first_line, one_line, without_password
from fer.made_by import UNKNOWN, repository
from fer.models import origin
from fer.run import Run
from fer.run_folder import CONFIG, CONFUSION, LOG, PREDICTIONS, SUMMARY, data_name, read_rows, read_summary
from fer.signals import Stopped
from pipelines.experiments import Job
from pipelines.params import Promotion
from pipelines.processes import alive, ended, process_id
from pipelines.recorded import BEST_VAL, FINAL, across_metrics, data_params, epoch_metrics, final_metrics, run_params
from pipelines.registry import RUN_ID, Registry, until_done
from pipelines.report import across_note, confusion_picture, note
from pipelines.store import REMEDY, SQLITE, alone, check_answers, tracking_uri
from pipelines.sweeps.folder import DONE, FAILED, Plan, Trial, best_of, read_trials

FINISHED = "fer.finished"  # tag: time of the evaluation whose results are recorded
ERROR = "fer.error"  # tag: why the run is not finished
FOLD = "fer.fold"  # tag of a run on a fold: which; of the sum of the folds: of how many
SWEEP = "fer.sweep"  # tag: the sweep that a run belongs to
ON = "fer.on"  # tag: the other data set that a run was evaluated on, of a child of that run
HOST, PROCESS = "fer.host", "fer.process"  # tags: where it is being trained
STATE = "fer.state"  # tag of a trial: how it ended
PARENT = "mlflow.parentRunId"  # tag: the MLflow run of the sweep of a trial, or of the run that was evaluated
NOTE = "mlflow.note.content"  # tag: what MLflow shows as the description
UI = "http://127.0.0.1:5000"  # where `fer ui` serves MLflow, unless told otherwise
COLUMNS = [  # of MLflow's table of runs, as `fer ui` opens it
    f"metrics.`{BEST_VAL}`", "metrics.`final/test_accuracy`", "params.`super_resolution.method`",
    "metrics.`final/test_unleaked_accuracy`", "metrics.`final/test_balanced_accuracy`", "params.`epochs`",
    "params.`seed`", "attributes.`Dataset`",
]  # fmt: skip
STOPPED = "stopped; the same command resumes it"
MOST = 50_000  # runs that one call of MLflow finds; without, 1,000
AT_ONCE = 50  # rows of metrics.jsonl in one call of MLflow, which takes up to 1,000 metrics
DRAWING = ThreadPoolExecutor(1)  # runs end in many threads; matplotlib is not thread-safe, and opens fonts in each anew
OnRows = Callable[[Sequence[dict[str, Any]]], None]


class Tracker:
    """An experiment on a tracking server. Raises UserError if the server does not answer."""

    def __init__(self, uri: str, experiment: str, rules: Promotion | None = None):
        self.uri, self.name = tracking_uri(uri), experiment
        check_answers(self.uri)
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        mlflow.set_tracking_uri(self.uri)
        shown = f"tracking.uri: {without_password(self.uri)}"
        with one_line(shown, f"{REMEDY}; drivers are installed separately"), alone(self.uri):
            self.client = MlflowClient(self.uri)
            self.experiment = self._choose(experiment)
        self._runs: dict[str, str] = {}  # our run id -> MLflow's, while this process is at work on it
        self._opening: set[str] = set()  # our run ids
        self._left = False
        self._closing = threading.RLock()  # a run is closed once: by its thread, or by `leave` in a signal handler
        self.registry = Registry(self.client, rules)

    def _choose(self, experiment: str) -> str:
        """The id of the experiment, made where there is none."""
        found = self.client.get_experiment_by_name(experiment)
        if found is not None and found.lifecycle_stage == "deleted":
            raise UserError(
                f"tracking.experiment: '{experiment}' was deleted; bring it back with "
                f"`mlflow experiments restore --experiment-id {found.experiment_id}` or name another one"
            )
        if self.uri.startswith(SQLITE):  # MLflow's own choice is a folder of the working directory
            artifacts = Path(self.uri.removeprefix(SQLITE)).parent / "mlruns" / quote(experiment, safe="")
            if found is None:
                self.client.create_experiment(experiment, artifacts.as_uri())
            else:
                _refuse_moved(found, artifacts)
        # once, before there are threads: concurrent first use breaks the store
        chosen = mlflow.set_experiment(experiment).experiment_id
        view = {"selectedColumns": COLUMNS, "columnOrder": COLUMNS, "orderByKey": COLUMNS[0], "orderByAsc": False}
        tags = {
            "mlflow.experimentKind": "custom_model_development",  # else the UI opens with tools for language models
            "mlflow.sharedViewState.fer": json.dumps(view),  # a view to share
        }
        for key, value in tags.items():
            until_done(partial(self.client.set_experiment_tag, chosen, key, value))
        return chosen

    @property
    def page(self) -> str:
        """The experiment's page on MLflow's server, with the columns to compare first."""
        return f"/#/experiments/{self.experiment}/runs?viewStateShareKey=fer&workflowType=machine_learning"

    @contextmanager
    def in_one_line(self) -> Iterator[None]:
        """Turn an MlflowException raised inside into a UserError of one line."""
        try:
            yield
        except MlflowException as error:
            shown = without_password(self.uri)
            raise UserError(f"tracking.uri: {shown}: {first_line(error).replace(self.uri, shown)}") from error

    @contextmanager
    def record(
        self,
        job: Job,
        data: dict[str, Any],
        tags: Mapping[str, str] | None = None,
        page: Callable[[str], OnRows] | None = None,
    ) -> Iterator[None]:
        """Record a run: its MLflow run is RUNNING inside the block, then FINISHED.

        If the block raises, it is KILLED where a person stopped the run, else FAILED. `page` gets the address of the
        run in MLflow, and returns what to call with the new rows of metrics.jsonl. Raises UserError if the server no
        longer answers at the end.
        """
        with self.in_one_line():
            run_id = self._open(job.folder.name, job.name, job.run, data, tags)
        on_rows: OnRows = page(self._address(run_id)) if page else lambda rows: None
        follower = _Follower(self.client, lambda: [(run_id, job.folder)], on_rows)
        try:
            with self._system_metrics(run_id):
                yield
            if not follower.close():
                raise UserError(self._silent("runs", follower.failure))
            with self.in_one_line():
                self._finish(run_id, job.folder)
        except BaseException as error:
            with suppress(UserError):  # told already
                follower.close()
            self._fail(job.folder.name, error, job.folder / LOG)
            raise
        finally:
            self._runs.pop(job.folder.name, None)

    @contextmanager
    def _system_metrics(self, run_id: str) -> Iterator[None]:
        """Log load and memory of this machine during the block; the runs of a cluster compute elsewhere."""
        if os.environ.get("RAY_ADDRESS"):
            yield
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"mlflow\.system_metrics.*")  # no GPU here, for instance
            mlflow.start_run(run_id=run_id, log_system_metrics=True)
        try:
            yield
        finally:
            with self._closing:
                mlflow.end_run("RUNNING" if run_id in self._runs.values() else "KILLED")  # as `leave` has set it

    def _address(self, run_id: str) -> str:
        """The page of a run; on the server that `fer ui` starts where the store is a database."""
        server = without_password(self.uri) if self.uri.startswith("http") else UI
        return f"{server.rstrip('/')}/#/experiments/{self.experiment}/runs/{run_id}"

    def leave(self) -> bool:
        """Mark the runs of this process as KILLED, as a person stopped it and it is about to exit.

        None can be opened from now on. Returns False if one was just about to be, and so may be left open.
        """
        self._left = True
        closed = not self._opening
        with self._closing:
            for ours in list(self._runs):
                self._fail(ours, Stopped(STOPPED))
        return closed

    def forget(self, ours: str) -> None:
        """Nothing works on a run any more: `leave` does not close it."""
        with self._closing:
            self._runs.pop(ours, None)

    @contextmanager
    def sweep(self, plan: Plan, data: dict[str, Any]) -> Iterator[str]:
        """Record a sweep: yields the id of its MLflow run; below that each trial gets one, fed from its folder.

        Raises UserError if the server no longer answers at the end.
        """
        about = {SWEEP: plan.name, "mlflow.source.name": f"fer sweep {plan.name}"}
        run_id = self._open(plan.folder.name, plan.base.name, plan.base.run, data, about)
        trials = _Trials(self, run_id, plan, data)
        follower = _Follower(self.client, trials.followed)
        try:
            yield run_id
            trials.over = True
            if not follower.close():
                raise UserError(self._silent("trials", follower.failure))
            self.client.set_terminated(run_id, "FINISHED")
        except BaseException as error:
            with suppress(UserError):
                follower.close()
            trials.leave()
            self._fail(plan.folder.name, error)
            raise
        finally:
            self._runs.pop(plan.folder.name, None)

    def describe_sweep(self, run_id: str, text: str, numbers: dict[str, float], files: list[Path]) -> None:
        """Log the result of a sweep: a note in Markdown, metrics and artifacts."""
        self._log(run_id, numbers, time.time(), {NOTE: text}, files)

    def recorded(self, folder: Path) -> bool:
        """Whether this experiment of this server already has the finished run in `folder`, as last evaluated."""
        summary = read_summary(folder)
        with self.in_one_line():
            found = self._find(folder.name)
        return summary is not None and found is not None and found.data.tags.get(FINISHED) == str(summary["finished"])

    def recorded_sweep(self, plan: Plan) -> bool:
        """Whether this experiment of this server already has the whole sweep."""
        with self.in_one_line():
            found = self._find(plan.folder.name)
        return found is not None and found.info.status == "FINISHED"

    def record_across(self, folder: Path, result: dict[str, Any], files: Sequence[Path]) -> None:
        """Record the result of the run in `folder` on another data set, once, as a child of the run.

        Raises UserError if this experiment does not have the run, or the server does not answer.
        """
        other = re.sub(r"[^\w.-]", "_", result["dataset"])  # MLflow's filters know no apostrophe
        ours = f"{folder.name}/on/{other}-{result['hash']}"
        with self.in_one_line():
            parent, found = self._find(folder.name), self._find(ours)
            if parent is None:
                raise UserError(
                    f"{folder.name}: MLflow's experiment '{self.name}' does not have this run, so its result is not "
                    f"recorded: run `fer train {result['name']}`, then this command again"
                )
            finished = {PARENT: parent.info.run_id, FINISHED: str(result["finished"])}
            if found is not None and finished.items() <= found.data.tags.items() and found.info.status == "FINISHED":
                return
            tags = {RUN_ID: ours, ON: result["dataset"], "experiment": result["name"], "dataset": result["dataset"]}
            tags |= {**_here(), **_source(f"fer evaluate {folder.name} --on {result['dataset']}")}
            if found is None:
                found = self.client.create_run(self.experiment, run_name=ours, tags=tags)
            run_id = found.info.run_id
            self.client.log_inputs(run_id, [_across_input(result)])
            tags |= {PARENT: parent.info.run_id, NOTE: across_note(result)}
            self._log(run_id, across_metrics(result), result["finished"], tags, files)
            self._done(run_id, result["finished"])

    def attach(self, page: Path, folders: Sequence[Path]) -> int:
        """Log a file to those of the runs in `folders` that this experiment has, and return how many these are."""
        with self.in_one_line():
            found = [run for folder in folders if (run := self._find(folder.name)) is not None]
            for run in found:
                self.client.log_artifact(run.info.run_id, str(page), "compare")
        return len(found)

    def recorded_folds(self, result: dict[str, Any]) -> bool:
        """Whether this experiment of this server has the sum of folds, as last made, above the runs of the folds."""
        with self.in_one_line():
            found = self._find(result["id"])
            if found is None or found.data.tags.get(FINISHED) != str(result["finished"]):
                return False
            children = (self._find(run_id) for run_id in result["runs"])
            return all(child is not None and child.data.tags.get(PARENT) == found.info.run_id for child in children)

    def record_folds(self, result: dict[str, Any], text: str, files: Sequence[Path]) -> None:
        """Record the sum of folds as one run, and the recorded runs of the folds as its children."""
        if self.recorded_folds(result):
            return
        tags = {RUN_ID: result["id"], FOLD: result["folds"], "experiment": result["name"]}
        tags |= {"dataset": data_name(result["data"]), NOTE: text}
        tags |= _source(f"fer train {result['name']} --folds {result['folds']}")
        values = {f"final/test_{key}": result["test"][key] for key in ("accuracy", "balanced_accuracy", "macro_f1")}
        spreads = {f"folds/{key}": spread for key, spread in result["over_folds"].items()}
        spreads |= {"subjects/accuracy": result["over_subjects"]} if result["over_subjects"] else {}
        for key, spread in spreads.items():
            values |= {f"{key}_mean": spread["mean"], f"{key}_sd": spread["sd"]}
        with self.in_one_line():
            found = self._find(result["id"]) or self.client.create_run(
                self.experiment, run_name=result["id"], tags=tags
            )
            run_id = found.info.run_id
            for ours in result["runs"]:
                self.client.set_tag(self._find(ours).info.run_id, PARENT, run_id)
            self._log(run_id, values, result["finished"], tags, files)
            self._done(run_id, result["finished"])

    def _find(self, ours: str) -> Any:
        """MLflow's run of our run id; None where there is none."""
        query = f"tags.`{RUN_ID}` = '{ours}'"
        return next(iter(self.client.search_runs([self.experiment], query, ViewType.ACTIVE_ONLY, 1)), None)

    def close_abandoned(self) -> None:
        """Mark runs of dead processes of this host (killed, or before a reboot) as FAILED."""
        query = f"attributes.status = 'RUNNING' and tags.`{HOST}` = '{socket.gethostname()}'"
        for found in self.client.search_runs([self.experiment], query):
            if ended(found.data.tags.get(PROCESS, "")):
                self.client.set_tag(found.info.run_id, ERROR, "the process was killed; run the command again")
                self.client.set_terminated(found.info.run_id, "FAILED")

    def _open(
        self, ours: str, name: str, run: Run, data: dict[str, Any], about: Mapping[str, str] | None = None
    ) -> str:
        """The MLflow run of our run id, set to RUNNING and tagged with `about`; created if there is none yet."""
        self._opening.add(ours)
        try:
            if self._left:
                raise Stopped(STOPPED)
            return self._opened(ours, name, run, data, about or {})
        finally:
            self._opening.discard(ours)

    def _opened(self, ours: str, name: str, run: Run, data: dict[str, Any], about: Mapping[str, str]) -> str:
        found = self._find(ours)
        if found and found.info.status == "RUNNING":
            _refuse_other(ours, found.data.tags)
        if found:
            run_id = self._runs[ours] = found.info.run_id
            for key, value in {**_here(), **_git_commit(), **about}.items():
                self.client.set_tag(run_id, key, value)
            self.client.update_run(run_id, status="RUNNING")
            for key in (ERROR, FINISHED):
                if key in found.data.tags:
                    self.client.delete_tag(run_id, key)
            if not found.data.params:  # it was killed before they were written
                self._describe(run_id, name, run, data)
            return run_id
        tags = {RUN_ID: ours, "experiment": name, "dataset": data_name(data), "data_hash": data["hash"]}
        tags |= {"starts_from": ", ".join(origin(run.model, run.init_from))}
        tags |= {**_here(), **_source(f"fer train {name}"), **about}
        run_id = self._runs[ours] = self.client.create_run(self.experiment, run_name=ours, tags=tags).info.run_id
        self._describe(run_id, name, run, data)
        return run_id

    def _describe(self, run_id: str, name: str, run: Run, data: dict[str, Any]) -> None:
        until_done(partial(self.client.log_inputs, run_id, _data_inputs(data)))
        values = {"experiment": name, **data_params(data), **run_params(run)}
        self.client.log_batch(run_id, params=[Param(key, str(value)) for key, value in values.items()])

    def _finish(self, run_id: str, folder: Path) -> None:
        summary = read_summary(folder)
        assert summary is not None, f"{folder} is not finished"
        picture = DRAWING.submit(confusion_picture, summary, folder / CONFUSION).result()
        predictions, logs = sorted(folder.glob(PREDICTIONS.format(split="*"))), folder.glob("log*.txt")
        files = [picture, *predictions, folder / SUMMARY, folder / CONFIG, *logs]
        before = (key for key in self.client.get_run(run_id).data.metrics if key.startswith(FINAL))
        values = dict.fromkeys(before, math.nan) | final_metrics(summary)  # of an evaluation before labels changed
        self._log(run_id, values, summary["finished"], {NOTE: note(summary)}, files)
        if "fold" not in summary["data"]:
            self.registry.register(run_id, folder, summary)
        self._done(run_id, summary["finished"])

    def _log(
        self, run_id: str, values: dict[str, float], finished: float, tags: Mapping[str, str], files: Iterable[Path]
    ) -> None:
        """Log the results of a run that was evaluated at the time `finished`."""
        # all at step 0: MLflow draws those as bars, one for each run
        points = [Metric(key, value, int(finished * 1000), 0) for key, value in values.items()]
        self.client.log_batch(run_id, metrics=points, tags=[RunTag(*tag) for tag in tags.items()])
        for path in files:
            self.client.log_artifact(run_id, str(path))

    def _done(self, run_id: str, finished: float) -> None:
        """Mark a run whose results are all there."""
        self.client.set_tag(run_id, FINISHED, str(finished))
        self.client.set_terminated(run_id, "FINISHED")

    def _fail(self, ours: str, error: BaseException, log: Path | None = None) -> None:
        """Close a run of this process, unless that is done."""
        with self._closing:
            run_id = self._runs.pop(ours, None)
            if run_id is None:
                return
            try:
                if log is not None and log.exists():
                    self.client.log_artifact(run_id, str(log))
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                self.client.set_tag(run_id, ERROR, reason[:500])
                self.client.set_terminated(run_id, "KILLED" if isinstance(error, Stopped) else "FAILED")
            except MlflowException as failure:
                if isinstance(error, MlflowException):  # else what `error` says matters more
                    raise UserError(self._silent("runs", failure)) from error

    def _silent(self, what: str, failure: MlflowException | None) -> str:
        shown = without_password(self.uri)
        reason = f" ({first_line(failure).replace(self.uri, shown)})" if failure else ""
        return (
            f"tracking.uri: {shown} no longer answers, or refuses{reason}; the {what} are safe on disk: "
            "mend that and run the same command again"
        )


class _Follower:
    """A thread that sends new lines of metrics.jsonl to MLflow; sending a line twice does no harm."""

    def __init__(
        self,
        client: MlflowClient,
        followed: Callable[[], Iterable[tuple[str, Path]]],
        on_rows: OnRows = lambda rows: None,
    ):
        """`followed`: MLflow run id and folder of each run to follow, asked every second; `on_rows`: see `record`."""
        self.client, self.followed, self.on_rows = client, followed, on_rows
        self.sent = Counter[str]()  # MLflow run id -> number of lines sent
        self.failure: MlflowException | None = None  # the last one
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def close(self) -> bool:
        """Send what is left; False if the server does not answer. Raises UserError if a file is damaged."""
        self._stop.set()
        self._thread.join()
        return self._send()

    def _follow(self) -> None:
        pause = 1.0
        with suppress(UserError):  # a damaged file: `close` tells
            while not self._stop.wait(pause):
                pause = 1.0 if self._send() else min(2 * pause, 30.0)

    def _send(self) -> bool:
        try:
            for run_id, folder in self.followed():
                rows = read_rows(folder)
                while part := rows[self.sent[run_id] :][:AT_ONCE]:
                    self.client.log_batch(run_id, metrics=[point for row in part for point in _points(row)])
                    self.sent[run_id] += len(part)
                    self.on_rows(part)
        except MlflowException as failure:
            self.failure = failure
            return False
        return True


class _Trials:
    """The trials of a sweep as child runs of its MLflow run, read from their folders."""

    def __init__(self, tracker: Tracker, parent: str, plan: Plan, data: dict[str, Any]):
        self.tracker, self.client, self.parent, self.plan, self.data = tracker, tracker.client, parent, plan, data
        self.runs: dict[str, str] = {}  # our name of a trial -> MLflow run id, while it is open
        self.over = False  # of the search: unfinished trials are stopped ones
        query = f"tags.`{PARENT}` = '{parent}' and attributes.status != 'RUNNING'"
        found = self.client.search_runs([tracker.experiment], query, max_results=MOST)
        self.ended = {run.data.tags[RUN_ID] for run in found if STATE in run.data.tags}

    def followed(self) -> Iterator[tuple[str, Path]]:
        """MLflow run id and folder of each open trial; a finished one is closed after its rows have been sent."""
        trials = read_trials(self.plan.folder)
        for trial in trials:
            if self._name(trial) not in self.ended:
                yield self._open(trial), trial.folder
                if trial.state in (DONE, FAILED) or self.over:
                    self._end(trial, trials)

    def leave(self) -> None:
        """Mark open trials as KILLED, as the search was interrupted."""
        for run_id in self.runs.values():
            with suppress(MlflowException):
                self.client.set_terminated(run_id, "KILLED")

    def _name(self, trial: Trial) -> str:
        return f"{self.plan.folder.name}/{trial.folder.name}"

    def _open(self, trial: Trial) -> str:
        name = self._name(trial)
        if name not in self.runs:
            run, about = self.plan.run(trial.point), {PARENT: self.parent}
            run_id = self.tracker._open(name, self.plan.base.name, run, self.data, {**about, SWEEP: self.plan.name})
            given = [Param(f"sweep/{key}"[:250], str(value)) for key, value in trial.point.items()]
            self.client.log_batch(run_id, params=given)
            self.runs[name] = run_id
        return self.runs[name]

    def _end(self, trial: Trial, trials: list[Trial]) -> None:
        name = self._name(trial)
        run_id = self.runs.pop(name)
        self.tracker.forget(name)
        self.client.set_tag(run_id, STATE, trial.state)
        if trial.error:
            self.client.set_tag(run_id, ERROR, trial.error[:500])
        if trial.best is not None:
            self.client.log_metric(run_id, BEST_VAL, trial.best)
        self.client.set_terminated(run_id, "FAILED" if trial.state == FAILED else "FINISHED")
        self.ended.add(name)
        best = best_of([other for other in trials if self._name(other) in self.ended])
        if best is not None and best.best is not None:
            self.client.log_metric(self.parent, BEST_VAL, best.best, step=len(self.ended))
        self.client.log_metric(self.parent, "epochs", sum(other.epoch for other in trials), step=len(self.ended))


def _refuse_moved(experiment: Experiment, here: Path) -> None:
    """Raise UserError if the experiment's files were in a project that is gone, as MLflow would write there again."""
    place = urlsplit(experiment.artifact_location)
    there = Path(url2pathname(place.path))
    ours = place.scheme == "file" and there.parts[-2:] == here.parts[-2:]
    if ours and there != here and not there.exists():
        raise UserError(
            f"tracking.experiment: MLflow keeps the files of '{experiment.name}' in {there}, which is gone; if the "
            f"project was moved, `ln -s {here.parents[1]} {there.parents[1]}`, else name another experiment"
        )


def _points(row: dict[str, Any]) -> list[Metric]:
    when = int(row["time"] * 1000)
    return [Metric(key, value, when, row["epoch"]) for key, value in epoch_metrics(row).items()]


def described(data: DataSet) -> dict[str, Any]:
    """What `Tracker` is told of the data of a run."""
    return {**data.summary, "hash": data.hash, "test_hash": data.test_hash}


def _data_inputs(data: dict[str, Any]) -> list[DatasetInput]:
    """A data set for each split, with schema and counts, for MLflow's dataset tab."""
    shape = (-1, *data["image_shape"])
    schema = TensorDatasetSchema(
        Schema([TensorSpec(np.dtype("uint8"), shape, "images")]),
        Schema([TensorSpec(np.dtype("int64"), (-1,), "labels")]),
    )
    found = []
    for split in ("train", "val", "test"):
        profile = {"images": data["totals"][split], **data["counts"][split], "duplicates": data["duplicates"]}
        dataset = Dataset(
            name=data_name(data),
            digest=f"{data['test_hash' if split == 'test' else 'hash']}-{split}",  # whose profile MLflow keeps
            source_type="dvc",
            source=json.dumps(data_params(data)),
            schema=json.dumps(schema.to_dict()),
            profile=json.dumps(profile),
        )
        found.append(DatasetInput(dataset, [InputTag("mlflow.data.context", split)]))
    return found


def _across_input(result: dict[str, Any]) -> DatasetInput:
    """The test split of another data set, for MLflow's dataset tab."""
    source, profile = {"data.dataset": result["dataset"]}, {"images": result["test_images"]}
    dataset = Dataset(result["dataset"], f"{result['hash']}-test", "dvc", json.dumps(source), None, json.dumps(profile))
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "test")])


def _here() -> dict[str, str]:
    """Tags: which process works on a run."""
    return {HOST: socket.gethostname(), PROCESS: process_id(os.getpid())}


def _source(command: str) -> dict[str, str]:
    """MLflow's own tags: who ran which command, of which commit."""
    own = {"mlflow.user": getpass.getuser(), "mlflow.source.name": command, "mlflow.source.type": "JOB"}
    return own | _git_commit()


def _git_commit() -> dict[str, str]:
    commit, changed = repository()
    if commit == UNKNOWN:
        return {}
    return {"mlflow.source.git.commit": commit + (" (with changes)" if changed is True else "")}


def _refuse_other(ours: str, tags: Mapping[str, str]) -> None:
    """Raise UserError if another process, which is alive here, has opened the run: it may be waiting for its turn."""
    process = tags.get(PROCESS, "")
    if process != process_id(os.getpid()) and alive(process):
        pid = process.partition(":")[0]
        raise UserError(f"{ours}: another process ({pid}) is training it; wait for it or stop it")
