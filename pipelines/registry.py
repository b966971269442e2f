"""The model registry of MLflow: a version for each run, and the alias `champion`."""

import random
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.models.model import ModelInfo
from mlflow.types import ColSpec, DataType, Schema

import fer
from fer.formats import read_run
from fer.models import packages
from fer.run_folder import BEST, CONFIG, read_config
from pipelines.report import note

RUN_ID = "fer.run_id"  # tag of MLflow's runs and versions: our run id
ACCURACY = "val_accuracy"  # tag of a version
TRIES = 5


class Registry:
    """The registered models `fer-<dataset>` of a server; its methods may be called from several threads."""

    def __init__(self, client: MlflowClient):
        self.client, self._lock = client, threading.Lock()

    def champions(self) -> dict[str, dict[str, str]]:
        """Registered model -> tags of its champion version, and `version`, its number."""
        found = {}
        for model in self.client.search_registered_models():
            if "champion" in model.aliases:
                champion = self.client.get_model_version_by_alias(model.name, "champion")
                found[model.name] = {**champion.tags, "version": str(champion.version)}
        return found

    def register(self, run_id: str, folder: Path, summary: dict[str, Any]) -> None:
        """One version of `fer-<dataset>` per run; the alias moves to it if its val accuracy is the best so far."""
        name, accuracy = f"fer-{summary['data']['dataset']}", f"{summary['val']['accuracy']:.6f}"
        with self._lock:
            if not self.client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
                tags = {ACCURACY: accuracy, RUN_ID: summary["run_id"], "data_hash": summary["data_hash"]}
                self.add(name, run_id, _log_model(run_id, folder, summary), tags, note(summary))
            self.crown(name)

    def add(self, name: str, run_id: str, model: ModelInfo, tags: dict[str, str], text: str) -> None:
        """A new version of the registered model `name`, which is made if there is none."""
        _until_done(lambda: self._add(name, run_id, model, tags, text))

    def crown(self, name: str) -> None:
        """Give the alias to the version with the best val accuracy, the first of several.

        Of processes that do so at the same time, on any machines, whoever moves the alias last looks again, and then
        sees the versions of all others: each adds its own before it looks.
        """
        while (best := self._best(name)) != str(self.client.get_registered_model(name).aliases.get("champion")):
            _until_done(partial(self.client.set_registered_model_alias, name, "champion", best))

    def _best(self, name: str) -> str:
        found, token = [], None
        while token != "":
            page = self.client.search_model_versions(f"name = '{name}'", page_token=token)
            found += [version for version in page if ACCURACY in version.tags]
            token = page.token or ""
        return str(max(found, key=lambda version: (float(version.tags[ACCURACY]), -int(version.version))).version)

    def _add(self, name: str, run_id: str, model: ModelInfo, tags: dict[str, str], text: str) -> None:
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        self.client.create_model_version(
            name, model.model_uri, run_id, tags=tags, description=text, model_id=model.model_id
        )


def _until_done(change: Callable[[], object]) -> None:
    """Try again if it fails: MLflow refuses one of two changes that meet in its store."""
    for left in reversed(range(TRIES)):
        try:
            change()
            return
        except MlflowException:
            if not left:
                raise
            time.sleep(random.random() / 2)


def _log_model(run_id: str, folder: Path, summary: dict[str, Any]) -> ModelInfo:
    """The best checkpoint as a pyfunc model: safetensors, JSON and the code of `fer`, no pickle."""
    run = read_run(read_config(folder), folder / CONFIG)
    signature = ModelSignature(
        outputs=Schema([ColSpec(DataType.float, name) for name in summary["classes"]])
    )  # no inputs: `fer.predict` takes arrays of any size and paths, and refuses in one line where MLflow prints pixels
    needs = ("torch", "transformers", "numpy", "pandas", "pillow", "safetensors", "pydantic", *packages(run.model))
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
