"""The model registry of MLflow: a version for each run, its aliases, and the history of what moved them.

MLflow keeps no history of aliases. Ours is a run of MLflow for each registered model, with a param for each decision,
numbered from 00001. A param can be written once, in every store: of two processes that write the next one, the second
is refused, looks again and decides anew. The aliases follow from the history.
"""

import getpass
import json
import math
import random
import socket
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import mlflow
import pandas as pd
import scipy.stats  # noqa: F401  which fer.statistics imports at its first use, here in several threads at once
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.models.model import ModelInfo
from mlflow.types import ColSpec, DataType, Schema

import fer
from fer.errors import UserError
from fer.export import requirements, write_folder
from fer.formats import read_run
from fer.made_by import repository
from fer.run_folder import CONFIG, PREDICTIONS, data_name, read_config
from pipelines import promotion
from pipelines.params import Promotion
from pipelines.promotion import Candidate, Record, Verdict
from pipelines.report import note

RUN_ID = "fer.run_id"  # tag of MLflow's runs and versions: our run id
ACCURACY, TEST = "val_accuracy", "test_accuracy"  # tags of a version
HISTORY = "fer.history"  # tag of a registered model: the run with the history
EXPERIMENT = "fer registry"  # of those runs
ALIASES = ("champion", "challenger", "previous")
TRIES = 5
LONGEST = 500  # letters of a reason; MLflow cuts params of more than 6,000
Result = TypeVar("Result")


class Registry:
    """The registered models `fer-<dataset>` of a server; its methods may be called from several threads."""

    def __init__(self, client: MlflowClient, rules: Promotion | None = None):
        self.client, self.rules, self._lock = client, rules or Promotion(), threading.Lock()

    def champions(self) -> dict[str, dict[str, str]]:
        """Registered model -> tags of its champion version, and `version`, its number."""
        found, token = {}, None
        while token != "":
            models = self.client.search_registered_models("name LIKE 'fer-%'", page_token=token)
            for model in models:
                if "champion" in model.aliases:
                    champion = self.client.get_model_version_by_alias(model.name, "champion")
                    found[model.name] = {**champion.tags, "version": str(champion.version)}
            token = models.token or ""
        return found

    def register(self, run_id: str, folder: Path, summary: dict[str, Any]) -> None:
        """One version of `fer-<dataset>` per run, of which it is decided once whether it becomes champion."""
        name = f"fer-{data_name(summary['data'])}"
        with self._lock:
            found = self.client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
            if found:
                number = str(found[0].version)
                self.client.update_model_version(name, number, note(summary))  # it may have been evaluated again
                for key, value in _tags(summary).items():
                    self.client.set_model_version_tag(name, number, key, value)
            else:
                number = self.add(name, run_id, _log_model(run_id, folder, summary), _tags(summary), note(summary))
            self.decide(name, number)

    def add(self, name: str, run_id: str, model: ModelInfo, tags: dict[str, str], text: str) -> str:
        """The number of a new version of the registered model `name`, which is made if there is none."""
        return str(until_done(lambda: self._add(name, run_id, model, tags, text)).version)

    def decide(self, name: str, number: str) -> None:
        """Decide by the rule whether a version becomes champion, unless that was decided already; move the aliases."""

        def judge(records: list[Record]) -> Record | None:
            if any(record.what == promotion.RUN and record.version == number for record in records):
                return None
            versions, before = self._versions(name), promotion.state(records).champion
            new, old = versions[number], versions.get(before or "")
            verdict = self._verdict(new, old)
            after = number if verdict.outcome == promotion.PROMOTE else before
            evidence = _evidence(new, old) | ({} if verdict.p is None else {"p": verdict.p})
            return _record(promotion.RUN, new, before, after, verdict.outcome, verdict.reason, evidence)

        self._append(name, judge)
        self._settle(name)

    def promote(self, name: str, word: str, reason: str = "") -> Record:
        """Make a version champion by hand: its number, its alias, or the start of its run id.

        Raises UserError if there is no such version.
        """
        new = self._named(name, word)

        def move(records: list[Record]) -> Record:
            versions, before = self._versions(name), promotion.state(records).champion
            old, number = versions.get(before or ""), str(new.version)
            if number == before:
                raise UserError(f"models:/{name}/{number}: is champion already")
            rule = self._verdict(new, old)
            said = reason or f"the rule says {rule.outcome}: {rule.reason}"
            return _record(promotion.HAND, new, before, number, promotion.PROMOTE, said, _evidence(new, old))

        return self._by_hand(name, move)

    def rollback(self, name: str, reason: str = "") -> Record:
        """Make the champion before this one champion again. Raises UserError if there is none."""

        def move(records: list[Record]) -> Record:
            versions, now = self._versions(name), promotion.state(records)
            target = now.previous(versions)
            if target is None:
                raise UserError(f"models:/{name}: no earlier champion is left; name a version: `fer promote VERSION`")
            new, old = versions[target], versions.get(now.champion or "")
            said = reason or "back to the champion before"
            return _record(promotion.ROLLBACK, new, now.champion, target, promotion.PROMOTE, said, _evidence(new, old))

        return self._by_hand(name, move)

    def aliases(self, name: str) -> dict[str, str]:
        """Alias -> version of a registered model."""
        return {alias: str(number) for alias, number in self.client.get_registered_model(name).aliases.items()}

    def history(self, name: str) -> list[Record]:
        """The decisions on a registered model, the first one first. Raises UserError if there is no such model."""
        try:
            run_id = self.client.get_registered_model(name).tags.get(HISTORY)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            known = ", ".join(sorted(model.name for model in self.client.search_registered_models())) or "none yet"
            raise UserError(f"models:/{name}: no such model; known: {known}; `fer train` records one") from None
        return self._records(run_id) if run_id and self._stage(run_id) else []

    def _records(self, run_id: str) -> list[Record]:
        params = self.client.get_run(run_id).data.params
        try:
            return [Record(**json.loads(params[key])) for key in sorted(params)]
        except (ValueError, TypeError):
            raise UserError(
                f"the history of the champion, run {run_id} in MLflow's experiment '{EXPERIMENT}': holds a param that "
                "this version of fer cannot read; use the version that wrote it"
            ) from None

    def _by_hand(self, name: str, move: Callable[[list[Record]], Record]) -> Record:
        done, found = uuid.uuid4().hex, list[Record]()

        def once(records: list[Record]) -> Record | None:
            found[:] = [record for record in records if record.id == done]
            return None if found else Record(**{**asdict(move(records)), "id": done})

        with self._lock:
            self.history(name)  # tells if there is no such model
            self._append(name, once)
            self._settle(name)
        return found[0]

    def _append(self, name: str, following: Callable[[list[Record]], Record | None]) -> None:
        """Add what `following` makes of the history so far, until it makes nothing of it."""
        run_id = self._history_run(name)
        while True:
            records = self._records(run_id)
            record = self._unrecorded(name, records) or following(records)
            if record is None:
                return
            self._put(run_id, f"{len(records) + 1:05}", json.dumps(asdict(record), ensure_ascii=False))

    def _unrecorded(self, name: str, records: list[Record]) -> Record | None:
        """What happened in MLflow alone: an alias set to what was never champion, or a champion that was deleted.

        The versions are read after `records`, so those of which they tell are among them.
        """
        versions, before = self._versions(name), promotion.state(records).champion
        alias = self.aliases(name).get("champion", "")
        if alias in versions and alias not in {record.champion for record in records}:
            said = "the alias was set in MLflow, or by an earlier version of fer"
            return _record(promotion.FOUND, versions[alias], before, alias, promotion.PROMOTE, said, {})
        if before is None or before in versions:
            return None
        data = next((record.data_hash for record in reversed(records) if record.version == before), "")
        left = promotion.best_left(data, [(number, _facts(one)) for number, one in versions.items()])
        if left is None:
            return None
        said = f"version {before} was deleted; of those left on the same data it is the best on val"
        return _record(promotion.DELETED, versions[left], before, left, promotion.PROMOTE, said, {})

    def _settle(self, name: str) -> None:
        """Move the aliases to where the history says.

        Of processes that do so at the same time, on any machines, whoever moves one last looks again, and then sees
        what all others have decided: each writes that down before it moves any.
        """
        while True:
            records = self.history(name)
            wanted = promotion.state(records).aliases(self._versions(name))
            there = {alias: number for alias, number in self.aliases(name).items() if alias in ALIASES}
            if wanted == there:
                return
            for alias in ALIASES:
                if alias not in wanted and alias in there:
                    until_done(partial(self.client.delete_registered_model_alias, name, alias))
                elif wanted.get(alias) != there.get(alias):
                    until_done(partial(self.client.set_registered_model_alias, name, alias, wanted[alias]))

    def _history_run(self, name: str) -> str:
        """The run with the history; it is made here for a model that somebody registered by hand."""
        known = self.client.get_registered_model(name).tags.get(HISTORY)
        if known is None:
            known = self._new_history(name)
            until_done(partial(self.client.set_registered_model_tag, name, HISTORY, known))
        stage = self._stage(known)
        if stage == "":
            known = self._new_history(name)
            until_done(partial(self.client.set_registered_model_tag, name, HISTORY, known))
        elif stage != "active":  # it or its experiment was deleted in MLflow
            self._experiment()
            self.client.restore_run(known)
        return known

    def _stage(self, run_id: str) -> str:
        """The state of a run in MLflow's life cycle; empty if it was deleted for good, as by `mlflow gc`."""
        try:
            return self.client.get_run(run_id).info.lifecycle_stage
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return ""

    def _new_history(self, name: str) -> str:
        made = self.client.create_run(self._experiment(), run_name=name).info.run_id
        self.client.set_terminated(made)
        return made

    def _experiment(self) -> str:
        found = self.client.get_experiment_by_name(EXPERIMENT)
        if found is None:
            try:
                return self.client.create_experiment(EXPERIMENT)
            except MlflowException:  # another process was making it
                found = self.client.get_experiment_by_name(EXPERIMENT)
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            self.client.restore_experiment(found.experiment_id)
        return found.experiment_id

    def _put(self, run_id: str, key: str, value: str) -> None:
        """Write a param unless there is one."""

        def put() -> None:
            try:
                self.client.log_param(run_id, key, value)
            except MlflowException:
                if key not in self.client.get_run(run_id).data.params:
                    raise

        until_done(put)

    def _versions(self, name: str) -> dict[str, ModelVersion]:
        """Number -> version, of all that exist, the first one first."""
        found, token = list[ModelVersion](), None
        while token != "":
            page = self.client.search_model_versions(f"name = '{name}'", page_token=token)
            found += page
            token = page.token or ""
        return {str(one.version): one for one in sorted(found, key=lambda one: int(one.version))}

    def _named(self, name: str, word: str) -> ModelVersion:
        self.history(name)  # tells if there is no such model
        versions = self._versions(name)
        number = self.aliases(name).get(word, word)
        if number in versions:
            return versions[number]
        found = [one for one in versions.values() if one.tags.get(RUN_ID, "").startswith(word)] if word else []
        whole = [one for one in found if one.tags[RUN_ID] == word]  # several if it was recorded again: the last
        if whole or len(found) == 1:
            return (whole or found)[-1]
        shown = ", ".join(f"{number} ({one.tags.get(RUN_ID, '?')})" for number, one in versions.items())
        many = "names several versions, give more of the run id" if found else "no such version or run"
        raise UserError(f"{word}: {many}; versions of models:/{name}: {shown or 'none'}")

    def _verdict(self, new: ModelVersion, old: ModelVersion | None) -> Verdict:
        if old is not None and old.version == new.version:
            return Verdict(promotion.KEEP, "is champion already")
        return promotion.decide(self._candidate(new), None if old is None else self._candidate(old), self.rules)

    def _candidate(self, one: ModelVersion) -> Candidate:
        """A version with its val predictions, where they can be had."""
        columns = ["row", "label", "prediction"]
        path = PREDICTIONS.format(split="val")
        table = None
        with tempfile.TemporaryDirectory() as folder, suppress(MlflowException, OSError, ValueError):
            # without, as they were deleted or are on another machine, there is no test, which the verdict tells
            file = self.client.download_artifacts(one.run_id or "", path, folder)
            table = pd.read_csv(file, usecols=columns, keep_default_na=False)  # a class may be called None
        return _facts(one, table)

    def _add(self, name: str, run_id: str, model: ModelInfo, tags: dict[str, str], text: str) -> ModelVersion:
        self._make(name)
        return self.client.create_model_version(
            name, model.model_uri, run_id, tags=tags, description=text, model_id=model.model_id
        )

    def _make(self, name: str) -> None:
        """Make the registered model with the run of its history, unless there is one."""
        try:
            self.client.get_registered_model(name)
            return
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        made = self._new_history(name)
        try:
            self.client.create_registered_model(name, tags={HISTORY: made})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            if self.client.get_registered_model(name).tags.get(HISTORY) != made:  # another process was making it
                self.client.delete_run(made)


def _tags(summary: dict[str, Any]) -> dict[str, str]:
    """What the rule needs of a run, as tags of its version; the test accuracy is shown beside."""
    val = summary["val"]
    return {
        RUN_ID: summary["run_id"],
        "data_hash": summary["data_hash"],
        "label_rule": str(summary["data"].get("label_mode", "")),
        "classes": ", ".join(summary["classes"]),
        "val_images": str(val["images"]),
        ACCURACY: f"{val['accuracy']:.6f}",
        "val_uar": f"{val['balanced_accuracy']:.6f}",
        "val_ece": f"{val['ece']:.6f}",
        TEST: f"{summary['test']['accuracy']:.6f}",
    }


def _facts(one: ModelVersion, predictions: pd.DataFrame | None = None) -> Candidate:
    """What the tags of a version tell; versions of earlier versions of fer have but few of them."""
    tags = one.tags
    images = tags.get("val_images", "")
    return Candidate(
        name=f"version {one.version}",
        data_hash=tags.get("data_hash"),
        val_images=int(images) if images.isdigit() else None,
        label_rule=tags.get("label_rule"),
        classes=tags.get("classes"),
        accuracy=_number(tags.get(ACCURACY, "")),
        uar=_number(tags.get("val_uar", "")),
        ece=_number(tags.get("val_ece", "")),
        predictions=predictions,
    )


def _number(text: str) -> float | None:
    try:
        found = float(text)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def _evidence(new: ModelVersion, old: ModelVersion | None) -> dict[str, float]:
    """Accuracies of a version and of the champion before it; those on test are shown, and decide nothing."""
    sides = {"": new.tags, "champion_": old.tags if old else {}}
    found = {f"{prefix}{key}": _number(tags.get(key, "")) for prefix, tags in sides.items() for key in (ACCURACY, TEST)}
    return {key: value for key, value in found.items() if value is not None}


def _record(
    what: str,
    new: ModelVersion,
    before: str | None,
    after: str | None,
    outcome: str,
    reason: str,
    evidence: dict[str, float],
) -> Record:
    commit, changed = repository()
    return Record(
        id=uuid.uuid4().hex, what=what, version=str(new.version), run=new.tags.get(RUN_ID, ""), before=before,
        champion=after, outcome=outcome, reason=reason[:LONGEST], who=f"{getpass.getuser()}@{socket.gethostname()}",
        when=time.time(), commit=commit[:12] + ("+" if changed is True else ""), evidence=evidence,
        data_hash=new.tags.get("data_hash", ""),
    )  # fmt: skip


def until_done(change: Callable[[], Result]) -> Result:
    """Try again if it fails: when two changes reach its store at once, MLflow refuses one of them."""
    for _ in range(TRIES - 1):
        with suppress(MlflowException):
            return change()
        time.sleep(random.random() / 2)
    return change()


def _log_model(run_id: str, folder: Path, summary: dict[str, Any]) -> ModelInfo:
    """The best checkpoint as it is exported, and the code of `fer`, as a pyfunc model; no pickle."""
    signature = ModelSignature(
        outputs=Schema([ColSpec(DataType.float, name) for name in summary["classes"]])
    )  # no inputs: `fer.predict` takes arrays of any size and paths, and refuses in one line where MLflow prints pixels
    run = read_run(read_config(folder), folder / CONFIG)
    with (
        tempfile.TemporaryDirectory() as place,
        mlflow.start_run(run_id=run_id, log_system_metrics=False),
        warnings.catch_warnings(),
    ):
        exported = Path(place) / "model"
        write_folder(folder, exported)
        warnings.filterwarnings("ignore", ".*input example was not provided")  # the signature is enough
        return mlflow.pyfunc.log_model(
            name=summary["name"],
            loader_module="fer.predict",
            data_path=str(exported),
            code_paths=[str(Path(fer.__file__).parent)],
            signature=signature,
            pip_requirements=requirements(run),
            metadata={"classes": summary["classes"], "run_id": summary["run_id"]},
        )
