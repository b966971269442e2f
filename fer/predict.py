"""A checkpoint as a self-contained classifier: class order and preprocessing come from its checkpoint.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from fer import checkpoint
from fer.device import autocast, pick_device
from fer.errors import UserError
from fer.formats import read_run
from fer.input import model_input
from fer.models import build_model
from fer.resources import Resources


class Predictor:
    """Loads a checkpoint folder (`data/runs/<run id>/best`). Raises UserError if it is missing or damaged."""

    def __init__(self, folder: str | Path, device: str = "auto"):
        meta = checkpoint.load_meta(Path(folder))
        self.run = read_run(meta, Path(folder) / checkpoint.META)
        self.classes: list[str] = meta["classes"]
        self.device = pick_device(device)
        self.batch_size = Resources().eval_batch_size
        network = build_model(self.run.model, self.run.input, len(self.classes), pretrained=False)
        self.model: Any = network.to(self.device).eval()
        checkpoint.load_weights(Path(folder), self.model)

    @torch.inference_mode()
    def probabilities(self, images: np.ndarray, **beside: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W] or [B, H, W, 3], as in data/upscaled/images.npy -> float32 [B, C], in the order of `classes`.

        `beside`: further images of the same shape that the model takes. A model that compares faces takes `neutral`, a
        neutral face of the person in each image. It is required if the model was trained with pairing same_subject, and
        otherwise replaces the fixed references. Raises UserError if an image is missing or of no use to the
        model.
        """
        self._check(len(images), beside)
        found = []
        for first in range(0, len(images), self.batch_size):
            part = slice(first, first + self.batch_size)
            with autocast(self.run.precision, self.device):
                inputs = {"pixel_values": self._pixels(images[part])}
                inputs |= {name: self.model.embed(self._pixels(given[part])).float() for name, given in beside.items()}
                logits = self.model(**inputs).float()
            found.append(torch.softmax(logits, 1).cpu().numpy())
        return np.concatenate(found) if found else np.empty((0, len(self.classes)), np.float32)

    def _check(self, count: int, beside: Mapping[str, np.ndarray]) -> None:
        known = self.run.model.images_beside()
        for name, given in beside.items():
            if name not in known or len(given) != count:
                raise UserError(f"{name}: give one such face per image, and only to a model that compares two faces")
        missing = [name for name, needed in known.items() if needed and name not in beside]
        if missing:
            raise UserError(f"{missing[0]}: this model needs such a face of the same person with every image")

    def _pixels(self, images: np.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self.device)
        return model_input(pixels, self.run.input)


class _Served:
    """A predictor with the interface of an MLflow pyfunc model."""

    def __init__(self, predictor: Predictor):
        self.predictor = predictor

    def predict(self, model_input: dict[str, np.ndarray]) -> pd.DataFrame:
        """{"images": uint8 [B, H, W] or [B, H, W, 3], perhaps "neutral" of that shape} -> a column for each class."""
        beside = {name: given for name, given in model_input.items() if name != "images"}
        found = self.predictor.probabilities(model_input["images"], **beside)
        return pd.DataFrame(found, columns=self.predictor.classes)


def _load_pyfunc(path: str) -> _Served:
    """The entry point by which MLflow loads the logged checkpoint folder."""
    return _Served(Predictor(path))
