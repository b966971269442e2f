"""Which image is in train, val or test, with which label, and which images are duplicates."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from fer.data.labels import CLASSES, VOTE_COLUMNS, class_prior, label_distribution
from fer.errors import UserError

SPLITS = ("train", "val", "test")
COLUMNS = ("row", "name", "label", *CLASSES, "subject", "duplicate_of", "duplicate_in")
SEARCHED = {"train": ("train",), "val": ("train",), "test": ("train", "val")}  # for duplicates, in this order


@dataclass(frozen=True)
class Splits:
    """The result of `make_splits`."""

    tables: dict[str, pd.DataFrame]  # by split, with COLUMNS
    class_prior: np.ndarray  # float64 [8, 8], row = label
    dropped: int  # training images left out because val or test hold the same pixels


def read_labels(path: str | Path, images: int) -> pd.DataFrame:
    """The table of all images: row, name, usage, subject, VOTE_COLUMNS, sha1; row i describes image i.

    Raises UserError if it is missing, malformed or does not have exactly `images` rows.
    """
    remedy = "run `dvc repro --force --single-item download` to make it again"
    text = {"name": str, "usage": str, "subject": str, "sha1": str}
    try:
        rows = pd.read_csv(path, dtype=text | dict.fromkeys(["row", *VOTE_COLUMNS], np.int64), keep_default_na=False)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run `dvc repro download` to make it or `dvc pull` to fetch it") from None
    except ValueError as error:
        raise UserError(f"{path}: not a table of votes ({str(error).splitlines()[0]}); {remedy}") from None
    missing = [name for name in ("row", *text, *VOTE_COLUMNS) if name not in rows]
    if missing:
        raise UserError(f"{path}: column {', '.join(missing)} is missing; {remedy}")
    if len(rows) != images or not (rows["row"] == np.arange(len(rows))).all():
        raise UserError(f"{path}: its {len(rows)} rows do not match the {images} images, one row each; {remedy}")
    unknown = sorted(set(rows["usage"]) - set(SPLITS))
    if unknown:
        raise UserError(f"{path}: usage '{unknown[0]}' is none of {', '.join(SPLITS)}; {remedy}")
    if (rows[list(VOTE_COLUMNS)] < 0).any(axis=None):
        raise UserError(f"{path}: holds negative votes; {remedy}")
    return rows


def make_splits(
    rows: pd.DataFrame, label_mode: str, drop_leaked_train: bool, prior_min_votes: int, train_share: float, seed: int
) -> Splits:
    """Label the images, mark duplicates and compute the class prior; `rows` as `read_labels` returns them.

    `label_mode` applies to train; val and test always use the majority, as in the official trainer.
    `duplicate_of` names an image with the same pixels: for test one in train, otherwise one in val; for val one in
    train; for train the first copy. It is the image's name, or its row if it has none; the first if there are several.
    `duplicate_in` is the split of that image. Both are empty if there is none.
    `drop_leaked_train` removes from train every image that val or test hold.
    Of the rest, train keeps the fraction `train_share` (in (0, 1]) of each class: round(share n) images, at least one,
    drawn with `seed`; a smaller share is a subset of a larger one. Images left out do not count as duplicates.
    The prior comes from all raw rows of train but the leaked ones, by the published recipe (`labels.class_prior`). It
    describes the voters, so `train_share` does not change it.
    Raises UserError for an empty split or a class without a training image.
    """
    tables = {
        split: _labelled(rows[rows["usage"] == split], label_mode if split == "train" else "majority")
        for split in SPLITS
    }
    raw = rows[rows["usage"] == "train"]
    dropped = 0
    if drop_leaked_train:
        held_out = pd.concat([tables["val"]["sha1"], tables["test"]["sha1"]])
        leaked = tables["train"]["sha1"].isin(held_out)
        dropped = int(leaked.sum())
        tables["train"] = tables["train"][~leaked]
        raw = raw[~raw["sha1"].isin(held_out)]
    _refuse_gaps(tables, label_mode)
    tables["train"] = _share(tables["train"], train_share, seed)
    prior = class_prior(raw[list(VOTE_COLUMNS)].to_numpy(), raw["name"].to_numpy(), prior_min_votes)
    return Splits(_mark_duplicates(tables), prior, dropped)


def count_classes(table: pd.DataFrame) -> dict[str, int]:
    """Images per class of one split, including classes without any."""
    counts = np.bincount(table["label"], minlength=len(CLASSES))
    return dict(zip(CLASSES, counts.tolist(), strict=True))


def _labelled(rows: pd.DataFrame, mode: str) -> pd.DataFrame:
    keep, label, target = label_distribution(rows[list(VOTE_COLUMNS)].to_numpy(), mode)
    kept = rows.loc[keep, ["row", "name"]].assign(label=label[keep])
    kept[list(CLASSES)] = target[keep]
    return kept.assign(subject=rows.loc[keep, "subject"], sha1=rows.loc[keep, "sha1"]).reset_index(drop=True)


def _refuse_gaps(tables: dict[str, pd.DataFrame], label_mode: str) -> None:
    for split, table in tables.items():
        if table.empty:
            raise UserError(
                f"split {split} is empty: no image of it in data/raw/labels.csv has a usable label;"
                f" add images to the {split} part of data.path"
            )
    absent = [name for name, count in count_classes(tables["train"]).items() if count == 0]
    if absent:
        raise UserError(
            f"no training image of class {', '.join(absent)} (split.label_mode {label_mode}):"
            " add images of it to the train part of data.path or choose another split.label_mode"
        )


def _share(train: pd.DataFrame, share: float, seed: int) -> pd.DataFrame:
    """A random subset of each class, in the order of the rows."""
    rng = np.random.default_rng(seed)
    kept = []
    for label in range(len(CLASSES)):
        order = rng.permutation(np.flatnonzero(train["label"] == label))
        kept.append(order[: max(1, round(share * len(order)))])
    return train.iloc[np.sort(np.concatenate(kept))]


def _mark_duplicates(tables: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    firsts = {split: _first_copies(tables[split]) for split in ("train", "val")}
    marked = {}
    for split, table in tables.items():
        original = pd.Series("", index=table.index, dtype=object)
        place = original.copy()
        for other in SEARCHED[split]:
            found = table["sha1"].map(firsts[other])
            here = found.notna() & (place == "")
            if split == other:
                here &= table["sha1"].duplicated()  # the first copy is the original
            original[here], place[here] = found[here], other
        marked[split] = table.assign(duplicate_of=original, duplicate_in=place)[list(COLUMNS)]
    return marked


def _first_copies(table: pd.DataFrame) -> pd.Series:
    """By sha1, the name of its first image, or the row if it has no name."""
    first = table[~table["sha1"].duplicated()]
    called = first["name"].where(first["name"] != "", first["row"].astype(str))
    return pd.Series(called.to_numpy(), index=first["sha1"])


def duplicates(tables: dict[str, pd.DataFrame]) -> dict[str, int]:
    """How many images have a duplicate, from `duplicate_in`; `test_in_val` counts those that are not in train."""

    def count(split: str, place: str) -> int:
        return int((tables[split]["duplicate_in"] == place).sum())

    return {
        "val_in_train": count("val", "train"),
        "test_in_train": count("test", "train"),
        "test_in_val": count("test", "val"),
        "within_train": count("train", "train"),
    }


def write_table(table: pd.DataFrame, path: Path, columns: Sequence[str] = COLUMNS) -> None:
    """Write one split as CSV with `\\n` line ends and shortest exact numbers, so that equal tables give equal bytes."""
    table.to_csv(path, columns=list(columns), index=False, lineterminator="\n")
