"""The model registry of MLflow: a version for each run, and the alias `champion`."""

import json
import threading
import warnings
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
from fer.run_folder import BEST, CONFIG
from pipelines.report import note

RUN_ID = "fer.run_id"  # tag of MLflow's runs and versions: our run id


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
        """One version of `fer-<dataset>` per run; moves the alias if its val accuracy is the best so far."""
        name, accuracy = f"fer-{summary['data']['dataset']}", summary["val"]["accuracy"]
        with self._lock:
            found = self.client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
            if found:
                number = found[0].version
            else:
                tags = {"val_accuracy": f"{accuracy:.6f}", RUN_ID: summary["run_id"], "data_hash": summary["data_hash"]}
                model = _log_model(run_id, folder, summary)
                number = self._new_version(name, run_id, model, tags, note(summary))
            champion = self.client.get_registered_model(name).aliases.get("champion")
            if champion is None or accuracy > float(self.client.get_model_version(name, champion).tags["val_accuracy"]):
                self.client.set_registered_model_alias(name, "champion", str(number))

    def _new_version(self, name: str, run_id: str, model: ModelInfo, tags: dict[str, str], text: str) -> str:
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        made = self.client.create_model_version(
            name, model.model_uri, run_id, tags=tags, description=text, model_id=model.model_id
        )
        return str(made.version)


def _log_model(run_id: str, folder: Path, summary: dict[str, Any]) -> ModelInfo:
    """The best checkpoint as a pyfunc model: safetensors, JSON and the code of `fer`, no pickle."""
    path = folder / CONFIG
    run = read_run(json.loads(path.read_text()), path)
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
