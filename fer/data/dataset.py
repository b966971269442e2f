"""The splits as arrays: images stay in one memory-mapped file, a split is row numbers, labels and targets."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from fer.data.images import open_images
from fer.data.split import SPLITS
from fer.errors import UserError


@dataclass(frozen=True)
class Split:
    """n images of one split; `images` is the array of the whole data set."""

    name: str
    images: np.ndarray  # uint8 [N, H, W] or [N, H, W, 3], memory-mapped
    rows: np.ndarray  # int64 [n], indexes `images`
    names: list[str]
    subjects: list[str]  # "" where the data name none
    labels: torch.Tensor  # int64 [n]
    targets: torch.Tensor  # float32 [n, C], sums to 1
    leaked: torch.Tensor  # bool [n], a training image has the same pixels

    def __len__(self) -> int:
        return len(self.rows)

    def pixels(self, index: np.ndarray) -> torch.Tensor:
        """uint8 [B, H, W] or [B, H, W, 3] of the images at `index` of this split."""
        return torch.from_numpy(self.images[self.rows[index]])


@dataclass(frozen=True)
class DataSet:
    """What `dvc repro` made of the data, as training needs it."""

    folder: Path
    images: np.ndarray
    summary: dict[str, Any]  # of the split stage
    hash: str  # 16 hex; equal for equal images, labels and splits

    @property
    def classes(self) -> list[str]:
        return self.summary["classes"]

    def prior(self) -> torch.Tensor:
        """Class prior D, float32 [C, C], row = label."""
        return torch.tensor(self.summary["class_prior"], dtype=torch.float32)

    def split(self, name: str) -> Split:
        path = self.folder / "splits" / f"{name}.csv"
        text = {"name": str, "subject": str, "duplicate_of": str}
        columns = ["row", "label", *self.classes, *text]
        try:
            table = pd.read_csv(path, usecols=columns, dtype=text, keep_default_na=False)
        except ValueError as error:
            raise UserError(f"{path}: {error}; make it again with `dvc repro -f split`") from None
        if table.empty:
            raise UserError(f"{path}: holds no image; make it again with `dvc repro -f split`")
        if table["row"].max() >= len(self.images):
            raise UserError(f"{path}: row {table['row'].max()} is not in upscaled/images.npy; run `dvc repro`")
        return Split(
            name=name,
            images=self.images,
            rows=table["row"].to_numpy(np.int64),
            names=table["name"].tolist(),
            subjects=table["subject"].tolist(),
            labels=torch.tensor(table["label"].to_numpy(np.int64)),
            targets=torch.tensor(table[self.classes].to_numpy(np.float32)),
            leaked=torch.tensor((table["duplicate_of"] != "").to_numpy() & (name != "train")),
        )


def open_data(folder: str | Path = "data") -> DataSet:
    """Open `folder`/upscaled and `folder`/splits. Raises UserError when they are not there or not whole."""
    folder = Path(folder)
    files = [folder / "splits" / name for name in ("summary.json", *(f"{split}.csv" for split in SPLITS))]
    digest = hashlib.sha256()
    try:
        for path in files:
            digest.update(path.read_bytes())
        summary = json.loads(files[0].read_text())
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: not found; make the data with `dvc repro`") from None
    except ValueError:
        raise UserError(f"{files[0]}: not valid JSON; make it again with `dvc repro -f split`") from None
    images = open_images(folder / "upscaled" / "images.npy", "upscale")
    return DataSet(folder, images, summary, digest.hexdigest()[:16])
