"""A checkpoint as a classifier that needs nothing else: class order and preprocessing come from its checkpoint.json."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fer import checkpoint
from fer.config import RunConfig
from fer.data.augment import model_input
from fer.device import autocast, pick_device
from fer.errors import UserError
from fer.models import build_model
from fer.models.embedding_difference import DifferenceOfEmbeddings


class Predictor:
    """Loads a checkpoint folder (`data/runs/<run id>/best`). Raises UserError when it is missing or damaged."""

    def __init__(self, folder: str | Path, device: str = "auto"):
        meta = checkpoint.load_meta(Path(folder))
        self.run = RunConfig.model_validate(meta["config"])
        self.classes: list[str] = meta["classes"]
        self.device = pick_device(device)
        self.model: Any = build_model(self.run, len(self.classes), pretrained=False).to(self.device).eval()
        checkpoint.load_weights(Path(folder), self.model)

    @torch.inference_mode()
    def probabilities(self, images: np.ndarray, neutral: np.ndarray | None = None) -> np.ndarray:
        """uint8 [B, H, W] or [B, H, W, 3], as in data/upscaled/images.npy -> float32 [B, C], order of `classes`.

        `neutral`, of the same shape: for a model that compares faces, a neutral face of the person in each image. It
        must be given to one trained with pairing same_subject, and replaces the fixed references of the others.
        Raises UserError when it is missing, or given to a model that has no use for it.
        """
        compares = isinstance(self.model, DifferenceOfEmbeddings)
        if neutral is not None and (not compares or len(neutral) != len(images)):
            raise UserError("neutral: give one neutral face per image, and only to a model that compares two faces")
        found = []
        for first in range(0, len(images), self.run.eval_batch_size):
            part = slice(first, first + self.run.eval_batch_size)
            with autocast(self.run.precision, self.device):
                inputs = {"pixel_values": self._pixels(images[part])}
                if neutral is not None:
                    inputs["neutral"] = self.model.embed(self._pixels(neutral[part])).float()
                logits = self.model(**inputs).float()
            found.append(torch.softmax(logits, 1).cpu().numpy())
        return np.concatenate(found) if found else np.empty((0, len(self.classes)), np.float32)

    def _pixels(self, images: np.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self.device)
        return model_input(pixels, self.run)


class _Served:
    def __init__(self, predictor: Predictor):
        self.predictor = predictor

    def predict(self, model_input: dict[str, np.ndarray]) -> np.ndarray:
        """{"images": uint8 [B, H, W] or [B, H, W, 3], perhaps "neutral" of that shape} -> float32 [B, C]."""
        return self.predictor.probabilities(model_input["images"], model_input.get("neutral"))


def _load_pyfunc(path: str) -> _Served:
    """What a model server calls with the logged checkpoint folder."""
    return _Served(Predictor(path))
