"""A checkpoint as a self-contained classifier: class order and preprocessing come from its checkpoint.json."""

import base64
from collections.abc import Iterable, Mapping, Sized
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from fer import checkpoint
from fer.device import autocast, pick_device
from fer.errors import UserError, first_line
from fer.formats import read_run
from fer.input import model_input
from fer.models import build_model
from fer.pictures import Faces, Picture, batch_of
from fer.resources import Resources
from fer.run import training_images
from fer.run_folder import BEST
from fer.statistics import even as evened


class Predictor:
    """A checkpoint, given the folder of a run or of the checkpoint itself (`data/runs/<run id>/best`).

    `even`: from 0, its probabilities are those of faces among which classes are as frequent as in training, to 1, all
    are equally frequent. Raises UserError if the checkpoint is missing or damaged, or even already.
    """

    def __init__(self, folder: str | Path, device: str = "auto", even: float = 0.0):
        folder = Path(folder)
        if (folder / BEST).is_dir():
            folder = folder / BEST
        checkpoint.check_sums(folder)
        meta = checkpoint.load_meta(folder)
        self.run, self.run_id = read_run(meta, folder / checkpoint.META), meta["run_id"]
        self.classes: list[str] = meta["classes"]
        self.faces = Faces.of(meta["data"])
        self.cropped: dict[str, Any] = meta["data"].get("faces") or {}
        self.temperature = float(meta.get("temperature", 1.0))
        self.even, self.images = even, np.array(training_images(meta) if even else [])
        self.device = pick_device(device)
        self.batch_size = Resources().eval_batch_size
        network = build_model(self.run.model, self.run.input, len(self.classes), pretrained=False)
        self.model: Any = network.to(self.device).eval()
        checkpoint.load_weights(folder, self.model)

    @torch.inference_mode()
    def probabilities(
        self, images: Picture | Iterable[Picture], photographed: bool = False, **beside: Picture | Iterable[Picture]
    ) -> np.ndarray:
        """Faces -> float32 [B, C], a row for each, in the order of `classes`, softened by the checkpoint's temperature.

        `images`: uint8 [H, W], [B, H, W], [B, H, W, 1] or [B, H, W, 3], the path of a picture, or a list of paths or
        arrays. Faces of another size than the training data are resized, upscaled and made grey as those were. An array
        [3, H, W] is three grey faces.

        `photographed`: the images were cut out of pictures, so that none is upscaled as the training data were.

        `beside`: further images that the model takes. A model that compares faces takes `neutral`, a neutral face of
        the person in each image. It is required if the model was trained with pairing same_subject, and otherwise
        replaces the fixed references.

        Raises UserError for what is no such image, and if one is missing or of no use to the model.
        """
        faces = batch_of(images)
        others = {name: batch_of(given) for name, given in beside.items()}
        self._check(len(faces), others)
        found = []
        for first in range(0, len(faces), self.batch_size):
            part = slice(first, first + self.batch_size)
            inputs = {"pixel_values": self._pixels(faces[part], photographed)}
            seen = {name: self._pixels(given[part]) for name, given in others.items()}
            with autocast(self.run.precision, self.device):
                inputs |= {name: self.model.embed(pixels).float() for name, pixels in seen.items()}
                logits = self.model(**inputs).float()
            found.append(torch.softmax(logits / self.temperature, 1).cpu().numpy())
        whole = np.concatenate(found) if found else np.empty((0, len(self.classes)), np.float32)
        if not np.isfinite(whole).all():
            raise UserError(f"{self.run_id}: its network computes no numbers; train it again, or name another run")
        return evened(whole, self.images, self.even) if self.even else whole

    def _check(self, count: int, beside: Mapping[str, Sized]) -> None:
        known = self.run.model.images_beside()
        for name, given in beside.items():
            if name not in known or len(given) != count:
                raise UserError(f"{name}: give one such face per image, and only to a model that compares two faces")
        missing = [name for name, needed in known.items() if needed and name not in beside]
        if missing:
            raise UserError(f"{missing[0]}: this model needs such a face of the same person with every image")

    def _pixels(self, pictures: np.ndarray | list[Picture], photographed: bool = False) -> torch.Tensor:
        prepared = np.ascontiguousarray(self.faces.prepare(pictures, photographed))
        return model_input(torch.from_numpy(prepared).to(self.device), self.run.input)


class _Served:
    """A predictor with the interface of an MLflow pyfunc model."""

    def __init__(self, predictor: Predictor):
        self.predictor = predictor

    def predict(self, model_input: Any) -> pd.DataFrame:
        """What `Predictor.probabilities` takes, or a table or dict of it under `images` and perhaps `neutral`.

        Nested lists, as JSON has them, are arrays; text that begins with `data:` is a picture in base64, as browsers
        write it (RFC 2397), and other text a path on this machine. Returns a column for each class.
        """
        given = model_input if isinstance(model_input, dict | pd.DataFrame) else {"images": model_input}
        known = ["images", *self.predictor.run.model.images_beside()]
        for name in given:
            if name not in known:
                raise UserError(f"{name}: this model takes no such column; known: {', '.join(known)}")
        if "images" not in given:
            raise UserError("images: missing; give the faces there")
        found = self.predictor.probabilities(**{str(name): _plain(given[name]) for name in given})
        return pd.DataFrame(found, columns=self.predictor.classes)


def _plain(pictures: Any) -> Any:
    """Arrays for nested lists of numbers, bytes for base64, a list for a column."""
    if isinstance(pictures, str | Path | bytes):
        return _one(pictures)
    if not isinstance(pictures, Iterable) or (isinstance(pictures, np.ndarray) and pictures.dtype.kind not in "OU"):
        return pictures
    return [_one(picture) for picture in pictures]


def _one(picture: Any) -> Any:
    if isinstance(picture, list):
        try:
            return np.asarray(picture)
        except ValueError:
            raise UserError("images: a nested list whose rows differ in length") from None
    if not isinstance(picture, str) or not picture.startswith("data:"):
        return picture
    try:
        return base64.b64decode(picture.partition(",")[2], validate=True)
    except ValueError as error:
        raise UserError(f"images: no base64 after `data:image/...;base64,` ({first_line(error)})") from None


def _load_pyfunc(path: str) -> _Served:
    """The entry point by which MLflow loads the logged checkpoint folder."""
    return _Served(Predictor(path))
