"""Drawn faces in two forms: the arrays of the pipeline, and PNG files in class folders."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from fer.data.encoded import Shards
from fer.data.labels import CLASSES
from fer.data.sample import draw_face
from fer.files import sha256


def write_faces(folder: Path, side: int, **counts: int) -> None:
    """Write `folder`/upscaled and `folder`/splits as the stages do, and `folder`/png/<split>/<number>_<class>/*.png.

    `counts`: images of train, val and test, at least one each; grey, enlarged by bicubic from 48 to `side` pixels. PNGs
    of enlarged images are in colour, as published super-resolution code writes them.
    """
    rng, total = np.random.default_rng(0), sum(counts.values())
    labels = np.arange(total) % len(CLASSES)
    faces = (Image.fromarray(draw_face(rng, CLASSES[label])) for label in labels)
    images = np.stack([np.asarray(face.resize((side, side), Image.Resampling.BICUBIC)) for face in faces])
    (folder / "upscaled").mkdir(parents=True)
    np.save(folder / "upscaled" / "images.npy", images)
    _write_splits(folder, labels, list(images.shape[1:]), counts)
    first = 0
    for split, count in counts.items():
        _write_pngs(folder / "png" / split, np.arange(first, first + count), images, labels)
        first += count


def write_encoded(folder: Path, side: int, **counts: int) -> None:
    """The same in colour, as JPEG files of about 15 KB at 224 px, kept as encoded images; without PNG files."""
    rng, total = np.random.default_rng(0), sum(counts.values())
    labels, shape = np.arange(total) % len(CLASSES), (total, side, side, 3)
    (folder / "raw").mkdir(parents=True)
    (folder / "upscaled").mkdir()
    with Shards(folder / "raw", shape, [None] * total) as shards:
        for label in labels:
            face = Image.fromarray(draw_face(rng, CLASSES[label])).resize((side, side), Image.Resampling.BICUBIC)
            grain = Image.fromarray(rng.integers(0, 256, (side // 3, side // 3, 3), np.uint8)).resize((side, side))
            content = io.BytesIO()
            Image.blend(face.convert("RGB"), grain, 0.15).save(content, "JPEG", quality=90)
            shards.add(content.getvalue())
    shutil.copy(folder / "raw" / "images.npy", folder / "upscaled")
    _write_splits(folder, labels, list(shape[1:]), counts)


def _write_splits(folder: Path, labels: np.ndarray, shape: list[int], counts: dict[str, int]) -> None:
    (folder / "splits").mkdir()
    first = 0
    for split, count in counts.items():
        rows = np.arange(first, first + count)
        table = pd.DataFrame({"row": rows, "name": [f"{row:06}.png" for row in rows], "label": labels[rows]})
        table[list(CLASSES)] = np.eye(len(CLASSES))[labels[rows]]
        table[["subject", "duplicate_of", "duplicate_in", "duplicate_kind"]] = ""
        table.to_csv(folder / "splits" / f"{split}.csv", index=False)
        first += count
    prior = 0.7 * np.eye(len(CLASSES)) + 0.3 / len(CLASSES)
    summary = {
        "classes": list(CLASSES),
        "class_prior": prior.tolist(),
        "dataset": "sample",
        "label_mode": "majority",
        "totals": counts,
        "counts": {split: {} for split in counts},
        "duplicates": {},
        "images": len(labels),
        "image_shape": shape,
        "images_sha256": sha256(folder / "upscaled" / "images.npy"),
    }
    (folder / "splits" / "summary.json").write_text(json.dumps(summary))


def _write_pngs(folder: Path, rows: np.ndarray, images: np.ndarray, labels: np.ndarray) -> None:
    for number, name in enumerate(CLASSES):
        (folder / f"{number}_{name}").mkdir(parents=True)
    mode = "L" if images.shape[1] == 48 else "RGB"
    for row in rows:
        label = labels[row]
        Image.fromarray(images[row]).convert(mode).save(folder / f"{label}_{CLASSES[label]}" / f"{row:06}.png")
