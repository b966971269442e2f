"""The only module that imports mlflow: records runs from their files, registers models, moves the alias `champion`.

Training only writes files. A thread here sends new lines of metrics.jsonl to MLflow, so that a slow or dead server
costs neither training time nor a point: what is missing is sent at the end, or by the next command.
"""

import getpass
import json
import logging
import os
import socket
import sqlite3
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.models.model import ModelInfo
from mlflow.types import Schema, TensorSpec

import fer
from fer.errors import UserError
from fer.files import write_json
from fer.formats import read_run
from fer.made_by import UNKNOWN, repository
from fer.models import origin, packages
from fer.run import Run
from fer.run_folder import BEST, CONFIG, CONFUSION, LOG, METRICS, PREDICTIONS, SUMMARY, TRACKED, read_summary
from pipelines.experiments import Job
from pipelines.processes import alive, process_id
from pipelines.report import confusion_picture, note
from pipelines.sweeps.folder import DONE, FAILED, Plan, Trial, best_of, read_trials

RUN_ID = "fer.run_id"  # tag: our run id; there is one MLflow run for each
HOST, PROCESS = "fer.host", "fer.process"  # tags: where it is being trained
STATE, PARENT = "fer.state", "mlflow.parentRunId"  # tags of a trial: how it ended, and the MLflow run of its sweep
NOT_METRICS = ("epoch", "time")
PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


class Tracker:
    """An experiment on a tracking server. Raises UserError if the server does not answer."""

    def __init__(self, uri: str, experiment: str):
        self.uri, self.name = tracking_uri(uri), experiment
        _check_answers(self.uri)
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        mlflow.set_tracking_uri(self.uri)
        self.client = MlflowClient(self.uri)
        # once, before there are threads: concurrent first use breaks the store
        self.experiment = mlflow.set_experiment(experiment).experiment_id
        # otherwise the UI opens with tools for language models
        self.client.set_experiment_tag(self.experiment, "mlflow.experimentKind", "custom_model_development")
        self._registry = threading.Lock()
        self._drawing = threading.Lock()  # runs end in several threads, and matplotlib is not thread-safe

    @contextmanager
    def record(self, job: Job, data: dict[str, Any]) -> Iterator[None]:
        """Record a run: its MLflow run is RUNNING inside the block, then FINISHED, or FAILED if the block raises.

        Raises UserError if the server no longer answers at the end.
        """
        run_id = self._open(job.folder.name, job.name, job.run, data)
        follower = _Follower(self.client, lambda: [(run_id, job.folder / METRICS)])
        try:
            yield
            follower.close()
            self._finish(run_id, job.folder)
        except BaseException as error:
            follower.close()
            self._fail(run_id, error, job.folder / LOG)
            raise

    @contextmanager
    def sweep(self, plan: Plan, data: dict[str, Any]) -> Iterator[str]:
        """Record a sweep: yields the id of its MLflow run; below that each trial gets one, fed from its folder.

        Raises UserError if the server no longer answers at the end.
        """
        about = {"fer.sweep": plan.name, "mlflow.source.name": f"fer sweep {plan.name}"}
        run_id = self._open(plan.folder.name, plan.base.name, plan.base.run, data, about)
        trials = _Trials(self, run_id, plan, data)
        follower = _Follower(self.client, trials.followed)
        try:
            yield run_id
            trials.over = True
            if not follower.close():
                raise UserError(self._silent("trials"))
            self.client.set_terminated(run_id, "FINISHED")
        except BaseException as error:
            follower.close()
            trials.leave()
            self._fail(run_id, error)
            raise

    def describe_sweep(self, run_id: str, text: str, numbers: dict[str, float], files: list[Path]) -> None:
        """Log the result of a sweep: a note in Markdown, metrics and artifacts."""
        self.client.set_tag(run_id, "mlflow.note.content", text)
        for key, value in numbers.items():
            self.client.log_metric(run_id, key, value)
        for path in files:
            self.client.log_artifact(run_id, str(path))

    def recorded(self, folder: Path) -> bool:
        """Whether this experiment of this server already has the finished run in `folder`, as last evaluated."""
        try:
            found, summary = (json.loads((folder / name).read_text()) for name in (TRACKED, SUMMARY))
            place = {key: found[key] for key in ("uri", "experiment")}
            return place == self._place() and found["finished"] == summary["finished"]
        except (
            FileNotFoundError,
            ValueError,
            KeyError,
            TypeError,
        ):  # no note, or a broken one: recording again does no harm
            return False

    def _place(self) -> dict[str, str]:
        return {"uri": without_password(self.uri), "experiment": self.name}

    def close_abandoned(self) -> list[str]:
        """Mark runs of dead processes of this host (killed, or before a reboot) as FAILED; returns their run ids."""
        closed = []
        query = f"attributes.status = 'RUNNING' and tags.`{HOST}` = '{socket.gethostname()}'"
        for found in self.client.search_runs([self.experiment], query):
            if not alive(found.data.tags.get(PROCESS, "")):
                self.client.set_tag(found.info.run_id, "fer.error", "the process was killed; run the command again")
                self.client.set_terminated(found.info.run_id, "FAILED")
                closed.append(found.data.tags[RUN_ID])
        return closed

    def champions(self) -> dict[str, dict[str, str]]:
        """Registered model -> tags of its champion version, and `version`, its number."""
        found = {}
        for model in self.client.search_registered_models():
            if "champion" in model.aliases:
                champion = self.client.get_model_version_by_alias(model.name, "champion")
                found[model.name] = {**champion.tags, "version": str(champion.version)}
        return found

    def _open(self, ours: str, name: str, run: Run, data: dict[str, Any], about: dict[str, str] | None = None) -> str:
        """The MLflow run of our run id, set to RUNNING; created with the tags `about` if there is none yet."""
        found = self.client.search_runs([self.experiment], f"tags.`{RUN_ID}` = '{ours}'", max_results=1)
        tags = {HOST: socket.gethostname(), PROCESS: process_id(os.getpid()), **_git_commit()}
        if found:
            run_id = found[0].info.run_id
            for key, value in tags.items():
                self.client.set_tag(run_id, key, value)
            self.client.update_run(run_id, status="RUNNING")
            if "fer.error" in found[0].data.tags:
                self.client.delete_tag(run_id, "fer.error")
            if not found[0].data.params:  # it was killed before they were written
                self._describe(run_id, name, run, data)
            return run_id
        tags |= {RUN_ID: ours, "model": name, "dataset": data["dataset"], "data_hash": data["hash"]}
        tags |= {"starts_from": ", ".join(origin(run.model, run.init_from))}
        tags |= {"mlflow.user": getpass.getuser(), "mlflow.source.name": f"fer train {name}"}
        tags |= {"mlflow.source.type": "JOB", **(about or {})}
        run_id = self.client.create_run(self.experiment, run_name=ours, tags=tags).info.run_id
        self._describe(run_id, name, run, data)
        return run_id

    def _describe(self, run_id: str, name: str, run: Run, data: dict[str, Any]) -> None:
        params = [Param(key, str(value)) for key, value in flatten(run.model_dump()).items()]
        source = json.dumps({key: data[key] for key in ("dataset", "label_source", "label_mode") if key in data})
        dataset = Dataset(data["dataset"], data["hash"], source_type="dvc", source=source)
        try:
            self.client.log_inputs(run_id, [DatasetInput(dataset)])
        except MlflowException:  # another run was creating the same entry; now it exists
            self.client.log_inputs(run_id, [DatasetInput(dataset)])
        self.client.log_batch(run_id, params=[Param("name", name), *params])

    def _finish(self, run_id: str, folder: Path) -> None:
        summary = read_summary(folder)
        assert summary is not None, f"{folder} is not finished"
        registered, number = self._log_results(run_id, folder, summary)
        self.client.set_terminated(run_id, "FINISHED")
        write_json(
            folder / TRACKED,
            {
                **self._place(),
                "mlflow_run": run_id,
                "registered": registered,
                "version": number,
                "finished": summary["finished"],
            },
        )

    def _log_results(self, run_id: str, folder: Path, summary: dict[str, Any]) -> tuple[str, int]:
        when = int(summary["finished"] * 1000)
        values = final_metrics(summary)
        points = [Metric(key, value, when, summary["epochs"]) for key, value in values.items()]
        self.client.log_batch(run_id, metrics=points)
        self.client.set_tag(run_id, "mlflow.note.content", note(summary))
        with self._drawing, ThreadPoolExecutor(1) as drawing:  # matplotlib keeps fonts open as long as the thread lives
            picture = drawing.submit(confusion_picture, summary, folder / CONFUSION).result()
        for path in (
            picture,
            *sorted(folder.glob(PREDICTIONS.format(split="*"))),
            folder / SUMMARY,
            folder / CONFIG,
            *folder.glob("log*.txt"),
        ):
            self.client.log_artifact(run_id, str(path))
        return self._register(run_id, folder, summary)

    def _register(self, run_id: str, folder: Path, summary: dict[str, Any]) -> tuple[str, int]:
        """One version of `fer-<dataset>` per run; moves the alias if its val accuracy is the best so far."""
        name, accuracy = f"fer-{summary['data']['dataset']}", summary["val"]["accuracy"]
        with self._registry:
            found = self.client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
            if found:
                number = found[0].version
            else:
                tags = {"val_accuracy": f"{accuracy:.6f}", RUN_ID: summary["run_id"], "data_hash": summary["data_hash"]}
                number = self._new_version(name, run_id, _log_model(run_id, folder, summary), tags)
            champion = self.client.get_registered_model(name).aliases.get("champion")
            if champion is None or accuracy > float(self.client.get_model_version(name, champion).tags["val_accuracy"]):
                self.client.set_registered_model_alias(name, "champion", str(number))
        return name, int(number)

    def _new_version(self, name: str, run_id: str, model: ModelInfo, tags: dict[str, str]) -> str:
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        made = self.client.create_model_version(name, model.model_uri, run_id, tags=tags, model_id=model.model_id)
        return str(made.version)

    def _fail(self, run_id: str, error: BaseException, log: Path | None = None) -> None:
        try:
            if log is not None and log.exists():
                self.client.log_artifact(run_id, str(log))
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.client.set_tag(run_id, "fer.error", reason[:500])
            self.client.set_terminated(run_id, "FAILED")
        except MlflowException:
            raise UserError(self._silent("runs")) from error

    def _silent(self, what: str) -> str:
        return (
            f"tracking.uri: {without_password(self.uri)} no longer answers; {what} are safe on disk, "
            "start the server and run the command again"
        )


class _Follower:
    """A thread that sends new lines of metrics.jsonl to MLflow; sending a line twice does no harm."""

    def __init__(self, client: MlflowClient, followed: Callable[[], Iterable[tuple[str, Path]]]):
        """`followed`: MLflow run id and file of each run to follow; called every second or so."""
        self.client, self.followed = client, followed
        self.sent: dict[str, int] = {}  # MLflow run id -> number of lines sent
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def close(self) -> bool:
        """Send what is left; False if the server does not answer."""
        self._stop.set()
        self._thread.join()
        return self._send()

    def _follow(self) -> None:
        pause = 1.0
        while not self._stop.wait(pause):
            pause = 1.0 if self._send() else min(2 * pause, 30.0)

    def _send(self) -> bool:
        try:
            for run_id, path in self.followed():
                lines = path.read_text().splitlines() if path.exists() else []
                for line in lines[self.sent.get(run_id, 0) :]:
                    self.client.log_batch(run_id, metrics=_points(json.loads(line)))
                    self.sent[run_id] = self.sent.get(run_id, 0) + 1
        except MlflowException:
            return False
        return True


class _Trials:
    """The trials of a sweep as child runs of its MLflow run, read from their folders."""

    def __init__(self, tracker: Tracker, parent: str, plan: Plan, data: dict[str, Any]):
        self.tracker, self.client, self.parent, self.plan, self.data = tracker, tracker.client, parent, plan, data
        self.runs: dict[str, str] = {}  # our name of a trial -> MLflow run id, while it is open
        self.over = False  # of the search: unfinished trials are stopped ones
        query = f"tags.`{PARENT}` = '{parent}' and attributes.status != 'RUNNING'"
        found = self.client.search_runs([tracker.experiment], query)
        self.ended = {run.data.tags[RUN_ID] for run in found if STATE in run.data.tags}

    def followed(self) -> Iterator[tuple[str, Path]]:
        """MLflow run id and file of each open trial; a finished one is closed after its file has been sent."""
        trials = read_trials(self.plan.folder)
        for trial in trials:
            if self._name(trial) not in self.ended:
                yield self._open(trial), trial.folder / METRICS
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
            run_id = self.tracker._open(name, self.plan.base.name, run, self.data, about)
            given = [Param(f"sweep/{key}"[:250], str(value)) for key, value in trial.point.items()]
            self.client.log_batch(run_id, params=given)
            self.runs[name] = run_id
        return self.runs[name]

    def _end(self, trial: Trial, trials: list[Trial]) -> None:
        name = self._name(trial)
        run_id = self.runs.pop(name)
        self.client.set_tag(run_id, STATE, trial.state)
        if trial.error:
            self.client.set_tag(run_id, "fer.error", trial.error[:500])
        if trial.best is not None:
            self.client.log_metric(run_id, "best_val_accuracy", trial.best, step=trial.epoch)
        self.client.set_terminated(run_id, "FAILED" if trial.state == FAILED else "FINISHED")
        self.ended.add(name)
        best = best_of([other for other in trials if self._name(other) in self.ended])
        if best is not None and best.best is not None:
            self.client.log_metric(self.parent, "best_val_accuracy", best.best, step=len(self.ended))
        self.client.log_metric(self.parent, "epochs", sum(other.epoch for other in trials), step=len(self.ended))


def _points(row: dict[str, Any]) -> list[Metric]:
    when = int(row["time"] * 1000)
    return [Metric(key, value, when, row["epoch"]) for key, value in row.items() if key not in NOT_METRICS]


def tracking_uri(configured: str) -> str:
    """MLFLOW_TRACKING_URI, or else `configured`; a relative SQLite path becomes absolute."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or configured
    prefix = "sqlite:///"
    if uri.startswith(prefix) and not uri.startswith(prefix + "/"):
        return prefix + str(Path(uri.removeprefix(prefix)).resolve())
    return uri


def final_metrics(summary: dict[str, Any]) -> dict[str, float]:
    """The metrics of a finished run; the prefix `final/` keeps them apart from the curves in the UI."""
    values: dict[str, float] = {"final/best_epoch": summary["best_epoch"], "final/parameters": summary["parameters"]}
    for split in ("val", "test", "test_unleaked", "test_without_train"):
        for key in ("accuracy", "balanced_accuracy", "macro_f1", "ece"):
            if key in summary.get(split, {}):
                values[f"final/{split}_{key}"] = summary[split][key]
    for name, recall in zip(summary["classes"], summary["test"]["recall"]):
        if recall is not None:
            values[f"final/test_recall_{name}"] = recall
    return values


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"augment": {"flip": .5}} -> {"augment.flip": .5}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _log_model(run_id: str, folder: Path, summary: dict[str, Any]) -> ModelInfo:
    """The best checkpoint as a pyfunc model: safetensors, JSON and the code of `fer`, no pickle."""
    path = folder / CONFIG
    run = read_run(json.loads(path.read_text()), path)
    shape = (-1, *summary["data"]["image_shape"])
    beside = [name for name, needed in run.model.images_beside().items() if needed]
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype("uint8"), shape, name) for name in ["images", *beside]]),
        outputs=Schema([TensorSpec(np.dtype("float32"), (-1, len(summary["classes"])))]),
    )
    needs = ("torch", "transformers", "numpy", "pandas", "safetensors", "pydantic", *packages(run.model))
    with mlflow.start_run(run_id=run_id, log_system_metrics=False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*input example was not provided")  # the signature is enough
        return mlflow.pyfunc.log_model(
            name=summary["name"],
            loader_module="fer.predict",
            data_path=str(folder / BEST),
            code_paths=[str(Path(fer.__file__).parent)],
            signature=signature,
            pip_requirements=[f"{package}=={version(package).split('+')[0]}" for package in needs],
            metadata={"classes": summary["classes"], "run_id": summary["run_id"]},
        )


def _check_answers(uri: str) -> None:
    """Try the server once, as mlflow retries for minutes. Raises UserError, which does not show a password in `uri`."""
    parts = urlsplit(uri)
    remedy = "start it (`fer ui`, `mlflow server`) or correct tracking.uri or MLFLOW_TRACKING_URI"
    kind = parts.scheme.partition("+")[0]
    try:
        if kind in ("http", "https"):
            urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=5).close()
        elif kind == "sqlite":
            _check_writable(Path(parts.path.removeprefix("/")))
        elif kind in PORTS:
            socket.create_connection((parts.hostname or "localhost", parts.port or PORTS[kind]), timeout=5).close()
        else:
            known = "sqlite:///FILE, postgresql://... or http://..."
            raise UserError(f"tracking.uri: '{without_password(uri)}' is no tracking store; use {known}")
    except urllib.error.HTTPError as error:
        if error.code not in (401, 404):  # it answers; mlflow handles credentials
            answer = f"{error.code} {error.reason}"
            raise UserError(f"tracking.uri: {without_password(uri)} answers {answer}; {remedy}") from None
    except (OSError, ValueError) as error:
        where = without_password(uri)
        raise UserError(f"tracking.uri: no server answers at {where} ({_first_line(error)}); {remedy}") from None


def _check_writable(path: Path) -> None:
    try:
        with closing(sqlite3.connect(path)) as store:
            store.execute("begin immediate")
    except sqlite3.OperationalError as error:
        if "locked" not in str(error):  # another process is writing
            raise UserError(
                f"tracking.uri: cannot write {path} ({error}); free some space or choose a writable file"
            ) from None


def without_password(uri: str) -> str:
    """`uri` with *** for its password, to be shown or stored."""
    parts = urlsplit(uri)
    return uri.replace(f":{parts.password}@", ":***@") if parts.password else uri


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _git_commit() -> dict[str, str]:
    commit, changed = repository()
    if commit == UNKNOWN:
        return {}
    return {"mlflow.source.git.commit": commit + (" (with changes)" if changed is True else "")}
