"""A checkpoint is a folder: model.safetensors, training.pt (optimizer state) and a descriptive checkpoint.json."""

import io
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from fer.errors import UserError
from fer.files import new_folder, sha256, write_json
from fer.run_folder import BEST, CONFIG, LAST, Cropped, Enlarged, Row
from fer.settings import Fault, Natural, Positive, Unfit
from fer.stored import Stored, read
from fer.weights import DAMAGE, check_fit

WEIGHTS, TRAINING, META = "model.safetensors", "training.pt", "checkpoint.json"
SUMS = "SHA256SUMS"  # of the files of an exported checkpoint, as sha256sum writes them
CHANGED = (
    "the network's code has changed since, or the file is another's: go back to the commit in its checkpoint.json, "
    "or train again"
)
BACKBONE = "backbone."  # the prefix of its tensors in every model that has one


class Trained(Stored):
    """What prediction needs to know of the data."""

    image_shape: Annotated[list[Positive], Field(min_length=2, max_length=3)]
    super_resolution: Enlarged = Enlarged(method="none", scale=1)
    faces: Cropped | None = None

    @model_validator(mode="after")
    def _fits(self) -> "Trained":
        if self.image_shape[2:] not in ([], [3]):
            raise Unfit([Fault("image_shape", f"has {self.image_shape[2]} colours, not 3")])
        return self


class Meta(Stored):
    """checkpoint.json, of any format."""

    format: Positive = 1
    name: str
    run_id: str
    classes: Annotated[list[str], Field(min_length=2)]
    class_prior: list[list[float]] | None  # None: of hard labels
    data: Trained
    data_hash: str
    config: dict[str, Any]
    made_by: dict[str, Any] = {}
    epoch: Natural
    history: list[Row]
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits in prediction, so that the network is as sure as it is right; fitted on val at the end."""

    @model_validator(mode="after")
    def _fits(self) -> "Meta":
        if [row.epoch for row in self.history] != list(range(1, self.epoch + 1)):
            raise Unfit([Fault("history", f"does not have a row for each of {self.epoch} epochs")])
        if len(set(self.classes)) < len(self.classes):
            raise Unfit([Fault("classes", "two have the same name")])
        return self


def save(folder: Path, weights: dict[str, Tensor], meta: dict[str, Any], training: dict[str, Any] | None) -> None:
    """Write a checkpoint atomically: a process killed at any point leaves either the old or the new one, whole.

    `training` must hold only tensors and plain values, so that it loads with `weights_only=True`.
    """
    with new_folder(folder) as partial:
        # plain writes: on a full disk the libraries' own raise errors that look like a damaged file
        copied = {"memory_format": torch.contiguous_format}  # each, as parts of a network may share their weights
        plain = {name: tensor.detach().cpu().clone(**copied) for name, tensor in weights.items()}
        (partial / WEIGHTS).write_bytes(save_tensors(plain))
        if training is not None:
            buffer = io.BytesIO()
            torch.save(training, buffer)
            (partial / TRAINING).write_bytes(buffer.getbuffer())
        write_json(partial / META, meta)


def load_meta(folder: Path) -> dict[str, Any]:
    """The content of checkpoint.json. Raises UserError if it is missing or damaged."""
    try:
        return read(Meta, folder / META, _again(folder))
    except FileNotFoundError:
        lost = folder.exists() or (folder.name == BEST and (folder.parent / LAST).exists())  # best/ is written first
        remedy = _again(folder) if lost else "train the run first"
        raise UserError(f"{folder}: no checkpoint there ({META} is missing); {remedy}") from None


def _again(folder: Path) -> str:
    """The remedy for a damaged checkpoint. Without best/ a trained run cannot be evaluated, so all of it has to go."""
    if folder.name not in (BEST, LAST):  # not of a run here
        return "fetch or export it again"
    whole = folder.name == BEST and (folder.parent / CONFIG).exists()
    return f"delete {folder.parent if whole else folder} and train again"


def load_weights(folder: Path, model: nn.Module) -> None:
    """Load model.safetensors into `model`. Raises UserError if it is missing, damaged or does not fit."""
    found = read_weights(folder)
    check_fit(model.state_dict(), found, str(folder / WEIGHTS), CHANGED)
    model.load_state_dict(found)


def load_backbone(folder: Path, model: nn.Module) -> None:
    """Load the tensors `backbone.*` of another run's checkpoint into `model`. Raises UserError if they do not fit."""
    found = {name: tensor for name, tensor in read_weights(folder).items() if name.startswith(BACKBONE)}
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(BACKBONE)}
    check_fit(wanted, found, str(folder / WEIGHTS), CHANGED)
    model.load_state_dict(found, strict=False)


def check_sums(folder: Path) -> None:
    """Raises UserError if the folder lists checksums of its files, and one differs."""
    path = folder / SUMS
    if not path.is_file():
        return
    for line in path.read_text(errors="replace").splitlines():
        wanted, _, name = line.partition("  ")
        file = folder / Path(name).name  # in this folder alone
        if not file.is_file() or sha256(file) != wanted:
            raise UserError(f"{file}: is not the file that {SUMS} lists; fetch the folder again")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors by their names. Raises UserError if it is missing or damaged."""
    path = folder / WEIGHTS
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; {_again(folder)}") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); {_again(folder)}") from None


def load_training(folder: Path) -> dict[str, Any]:
    """The content of training.pt, with all tensors on the CPU. Raises UserError if it is missing or damaged."""
    path = folder / TRAINING
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; {_again(folder)}") from None
    except (OSError, *DAMAGE):
        raise foreign(folder) from None


def foreign(folder: Path) -> UserError:
    """What to say where training.pt holds something else than it should."""
    return UserError(f"{folder / TRAINING}: damaged, or not written by this project; {_again(folder)}")
