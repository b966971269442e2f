"""Stage split: splits/{train,val,test}.csv, which index upscaled/images.npy, and a summary; metrics.json and plots/."""

import json
from pathlib import Path

import pandas as pd

from fer.data.charts import contact_sheet
from fer.data.images import Images, open_images
from fer.data.split import Kind, SplitRules, Splits, count_classes, duplicates, make_splits, read_labels, write_table
from fer.errors import UserError
from fer.files import new_folder, sha256
from pipelines.data_sets import Prepared
from pipelines.stages import run


def split(one: Prepared) -> None:
    """Label the images, mark duplicates, and write splits/ with summary.json, then metrics.json and plots/.

    Raises UserError if a stage before left no valid data, or a split or class would be empty.
    """
    config, in_raw, upscaled = one.recipe.split, one.folder / "raw", one.folder / "upscaled"
    path = upscaled / "images.npy"
    needed = "dataset", "label_source", "classes", "vote_columns", "labels", "confusion"
    source = _facts(in_raw / "source.json", "download", *needed)
    kind = Kind(source["classes"], source["vote_columns"], source["labels"] == "hard", source["confusion"])
    images = open_images(path, "upscale")
    raw = open_images(in_raw / "images.npy", "download")
    rows = read_labels(in_raw / "labels.csv", len(raw), kind.vote_columns)
    if len(raw) != len(images):
        raise UserError(f"{path}: holds {len(images)} images, {in_raw / 'images.npy'} {len(raw)}; run `dvc repro`")
    splits = make_splits(rows, raw, kind, SplitRules(**config.model_dump()))
    with new_folder(one.folder / "splits") as folder:
        for name, table in splits.tables.items():
            write_table(table, folder / f"{name}.csv")
        summary = _summary(splits, kind, source, images, sha256(path)) | {
            "label_mode": config.label_mode,
            "prior_min_votes": config.prior_min_votes,
            "train_share": config.train_share,
            "seed": config.seed,
            "near_duplicates": config.near_duplicates,
            **({"label_noise": config.label_noise, "wrong_labels": splits.wrong} if config.label_noise else {}),
            "super_resolution": _facts(upscaled / "upscale.json", "upscale", "method", "scale"),
        }
        _write(folder / "summary.json", summary)
    with new_folder(one.folder / "plots") as folder:
        _plots(folder, splits, kind, images, source["dataset"])
    _write(one.folder / "metrics.json", _metrics(summary))


def _metrics(summary: dict) -> dict:
    """What `dvc metrics` and `dvc exp show` compare: counts, images in two splits, how well upscaling restores."""
    restored = summary["super_resolution"].get("restored")
    return {
        **summary["totals"],
        "leaked": {key: count for key, count in summary["duplicates"].items() if key != "within_train"},
        **({"restored": restored} if restored else {}),
    }


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _facts(path: Path, stage: str, *keys: str) -> dict:
    """The JSON file that `stage` wrote. Raises UserError if it is missing, invalid or lacks one of `keys`."""
    remedy = f"run `dvc repro --force --single-item {stage}` to make it again"
    try:
        facts = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run `dvc repro {stage}` to make it or `dvc pull` to fetch it") from None
    except ValueError:
        raise UserError(f"{path}: not valid JSON; {remedy}") from None
    if not isinstance(facts, dict) or not set(keys) <= facts.keys():
        raise UserError(f"{path}: {' or '.join(keys)} is missing; {remedy}")
    return facts


def _summary(splits: Splits, kind: Kind, source: dict, images: Images, digest: str) -> dict:
    counts = {name: count_classes(table, kind.classes) for name, table in splits.tables.items()}
    return {
        "dataset": source["dataset"],
        "label_source": source["label_source"],
        "labels": source["labels"],
        **({"faces": source["faces"]} if "faces" in source else {}),
        "classes": list(kind.classes),
        "counts": counts,
        "totals": {name: sum(classes.values()) for name, classes in counts.items()},
        "raw_rows": splits.raw_rows,
        "held_out": splits.held_out,
        "class_prior": None if splits.class_prior is None else splits.class_prior.tolist(),
        "duplicates": duplicates(splits.tables),
        "dropped_leaked_train": splits.dropped,
        "images": len(images),
        "image_shape": list(images.shape[1:]),
        "images_sha256": digest,
    }


def _plots(folder: Path, splits: Splits, kind: Kind, images: Images, dataset: str) -> None:
    """The class balance, which DVC draws; a contact sheet for the drawn faces only, as real ones are private."""
    counts = {name: count_classes(table, kind.classes) for name, table in splits.tables.items()}
    lines = [(name, label, count) for name, classes in counts.items() for label, count in classes.items()]
    table = pd.DataFrame(lines, columns=["split", "class", "images"])
    table.to_csv(folder / "class_balance.csv", index=False, lineterminator="\n")
    if dataset == "sample":
        train = splits.tables["train"]
        first = {name: train.loc[train["label"] == label, "row"].head(12) for label, name in enumerate(kind.classes)}
        contact_sheet({name: images[rows.to_numpy()] for name, rows in first.items()}).save(
            folder / "contact_sheet.png"
        )


if __name__ == "__main__":
    run(split)
