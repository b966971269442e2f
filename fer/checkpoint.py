"""A checkpoint is a folder: model.safetensors, training.pt (optimizer state) and a descriptive checkpoint.json."""

import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from fer.errors import UserError
from fer.files import new_folder, write_json
from fer.weights import check_fit

WEIGHTS, TRAINING, META = "model.safetensors", "training.pt", "checkpoint.json"
BACKBONE = "backbone."  # the prefix of its tensors in every model that has one


def save(folder: Path, weights: dict[str, Tensor], meta: dict[str, Any], training: dict[str, Any] | None) -> None:
    """Write a checkpoint atomically: a process killed at any point leaves either the old or the new one, whole.

    `training` must hold only tensors and plain values, so that it loads with `weights_only=True`.
    """
    with new_folder(folder) as partial:
        # plain writes: on a full disk the libraries' own raise errors that look like a damaged file
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        (partial / WEIGHTS).write_bytes(save_tensors(plain))
        if training is not None:
            buffer = io.BytesIO()
            torch.save(training, buffer)
            (partial / TRAINING).write_bytes(buffer.getbuffer())
        write_json(partial / META, meta)


def load_meta(folder: Path) -> dict[str, Any]:
    """The content of checkpoint.json. Raises UserError if it is missing or not valid JSON."""
    try:
        return json.loads((folder / META).read_text())
    except FileNotFoundError:
        raise UserError(f"{folder}: no checkpoint there ({META} is missing); train the run first") from None
    except ValueError:
        raise UserError(f"{folder / META}: not valid JSON; delete {folder} and train again") from None


def load_weights(folder: Path, model: nn.Module) -> None:
    """Load model.safetensors into `model`. Raises UserError if it is missing, damaged or does not fit."""
    found = _read(folder)
    check_fit(model.state_dict(), found, str(folder / WEIGHTS))
    model.load_state_dict(found)


def load_backbone(folder: Path, model: nn.Module) -> None:
    """Load the tensors `backbone.*` of another run's checkpoint into `model`. Raises UserError if they do not fit."""
    found = {name: tensor for name, tensor in _read(folder).items() if name.startswith(BACKBONE)}
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(BACKBONE)}
    check_fit(wanted, found, str(folder / WEIGHTS))
    model.load_state_dict(found, strict=False)


def _read(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; train the run first") from None
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); delete {folder} and train again") from None


def load_training(folder: Path) -> dict[str, Any]:
    """The content of training.pt, with all tensors on the CPU. Raises UserError if it is missing or damaged."""
    path = folder / TRAINING
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; delete {folder} and train again") from None
    except (RuntimeError, EOFError, pickle.UnpicklingError):
        raise UserError(f"{path}: damaged, or not written by this project; delete {folder} and train again") from None
