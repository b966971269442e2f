"""A checkpoint as a classifier that needs nothing else: class order and preprocessing come from its checkpoint.json."""

from pathlib import Path

import numpy as np
import torch

from fer import checkpoint
from fer.config import RunConfig
from fer.data.augment import normalize, to_float
from fer.device import autocast, pick_device
from fer.models import build_model


class Predictor:
    """Loads a checkpoint folder (`data/runs/<run id>/best`). Raises UserError when it is missing or damaged."""

    def __init__(self, folder: str | Path, device: str = "auto"):
        meta = checkpoint.load_meta(Path(folder))
        self.run = RunConfig.model_validate(meta["config"])
        self.classes: list[str] = meta["classes"]
        self.device = pick_device(device)
        self.model = build_model(self.run, len(self.classes), meta["sizes"]).to(self.device).eval()
        checkpoint.load_weights(Path(folder), self.model)

    @torch.inference_mode()
    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W] or [B, H, W, 3], as in data/upscaled/images.npy -> float32 [B, C], order of `classes`."""
        found = []
        for first in range(0, len(images), self.run.eval_batch_size):
            pixels = torch.from_numpy(np.ascontiguousarray(images[first : first + self.run.eval_batch_size]))
            batch = normalize(to_float(pixels.to(self.device), self.run.image_size), self.run)
            with autocast(self.run, self.device):
                logits = self.model(batch).float()
            found.append(torch.softmax(logits, 1).cpu().numpy())
        return np.concatenate(found) if found else np.empty((0, len(self.classes)), np.float32)


class _Served:
    def __init__(self, predictor: Predictor):
        self.predictor = predictor

    def predict(self, model_input: dict[str, np.ndarray]) -> np.ndarray:
        """{"images": uint8 [B, H, W] or [B, H, W, 3]} -> float32 [B, C]."""
        return self.predictor.probabilities(model_input["images"])


def _load_pyfunc(path: str) -> _Served:
    """What a model server calls with the logged checkpoint folder."""
    return _Served(Predictor(path))
