"""Which image is in train, val or test, with which label, and which images are duplicates."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from fer.data.holdout import hold_out
from fer.data.images import Images
from fer.data.labels import DROPPED, class_prior, label_distribution
from fer.data.near import SAME, SIDE, centred, nearest, parts, shrunk
from fer.errors import UserError

SPLITS = ("train", "val", "test")
SEARCHED = {"train": ("train",), "val": ("train",), "test": ("train", "val")}  # for duplicates, in this order


@dataclass(frozen=True)
class Kind:
    """What the columns of votes mean."""

    classes: Sequence[str]
    vote_columns: Sequence[str]  # the classes, and perhaps unknown and NF
    hard: bool  # one vote an image: its label
    confusion: Sequence[Sequence[float]] | None = None  # [C, C], row = label: the class prior of hard labels

    @property
    def columns(self) -> list[str]:
        """Of the table of a split."""
        return ["row", "name", "label", *self.classes, "subject", "duplicate_of", "duplicate_in", "duplicate_kind"]


@dataclass(frozen=True)
class SplitRules:
    """The settings of `make_splits`, as under `split` in datasets/NAME.yaml."""

    label_mode: str = "majority"
    drop_leaked_train: Literal["none", "exact", "near"] = "none"
    near_duplicates: float | None = SAME
    prior_min_votes: int = 5
    train_share: float = 1.0
    label_noise: float = 0.0
    seed: int = 0
    val_share: float = 0.1
    test_share: float = 0.2


@dataclass(frozen=True)
class Splits:
    """The result of `make_splits`."""

    tables: dict[str, pd.DataFrame]  # by split, with `Kind.columns`
    class_prior: np.ndarray | None  # float64 [C, C], row = label; None for hard labels without a confusion
    dropped: int  # training images left out because val or test hold them as well
    wrong: int  # training images to which `label_noise` gave another label
    raw_rows: dict[str, int]  # images of each split before the vote rule
    held_out: dict[str, str]  # split that the data set lacks -> what it was taken from


def read_labels(path: str | Path, images: int, vote_columns: Sequence[str]) -> pd.DataFrame:
    """The table of all images: row, name, usage, subject, `vote_columns`, sha1; row i describes image i.

    `usage` is empty in a data set without splits. Raises UserError if the table is missing, malformed or does not have
    exactly `images` rows.
    """
    remedy = "run `dvc repro --force --single-item download` to make it again"
    text = {"name": str, "usage": str, "subject": str, "sha1": str}
    try:
        rows = pd.read_csv(path, dtype=text | dict.fromkeys(["row", *vote_columns], np.int64), keep_default_na=False)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run `dvc repro download` to make it or `dvc pull` to fetch it") from None
    except ValueError as error:
        raise UserError(f"{path}: not a table of votes ({str(error).splitlines()[0]}); {remedy}") from None
    missing = [name for name in ("row", *text, *vote_columns) if name not in rows]
    if missing:
        raise UserError(f"{path}: column {', '.join(missing)} is missing; {remedy}")
    if len(rows) != images or not (rows["row"] == np.arange(len(rows))).all():
        raise UserError(f"{path}: its {len(rows)} rows do not match the {images} images, one row each; {remedy}")
    unknown = sorted(set(rows["usage"]) - set(SPLITS))
    if (unknown and unknown != list(set(rows["usage"]))) or unknown not in ([], [""]):
        raise UserError(f"{path}: usage '{unknown[-1]}' is none of {', '.join(SPLITS)}; {remedy}")
    if (rows[list(vote_columns)] < 0).any(axis=None):
        raise UserError(f"{path}: holds negative votes; {remedy}")
    return rows


def make_splits(rows: pd.DataFrame, images: Images, kind: Kind, settings: SplitRules) -> Splits:
    """Label the images, mark duplicates and compute the class prior.

    `rows`: as `read_labels` returns them; `images`: those that they describe, uint8 [N, H, W] or [N, H, W, 3].
    Where the data set has no val or test, they are held out (`holdout.hold_out`).
    `label_mode` applies to the votes of train; val and test always use the majority, as in the official trainer.
    `duplicate_of` names an image with the same pixels: for test one in train, otherwise one in val; for val one in
    train; for train the first copy. It is the image's name, or its row if it has none; the first if there are several.
    `duplicate_in` is the split of that image, `duplicate_kind` exact. All three are empty if there is none. Of the
    images of val and test without such a copy, those whose thumbnail has a cosine of `near_duplicates` or more with an
    image of these splits name that, of kind near, or mirrored if they are more alike that way (`near`).
    `drop_leaked_train` removes from train every image of which val or test hold an exact copy, or a near one.
    Of the rest, train keeps the fraction `train_share` (in (0, 1]) of each class: round(share n) images, at least one,
    drawn with `seed`; a smaller share is a subset of a larger one. Images left out do not count as duplicates.
    Of these `label_noise` gives a fraction of each class, also drawn with `seed`, one of the other labels, each as
    likely: symmetric noise as in Wang et al. 2020 (SCN, arXiv 2002.10392). The images of a smaller noise
    are wrong in the same way under a larger one. Targets are then the labels, so that no loss sees the true one.
    The prior comes from all raw rows of train but the leaked ones, by the published recipe (`labels.class_prior`). It
    describes the voters, so `train_share` does not change it. Hard labels have that of `kind.confusion`, or none.
    Raises UserError for an empty split or a class without a training image, with the numbers and what took them.
    """
    held_out = _missing(rows)
    if held_out:
        labels = _labels(rows, kind, "majority")[1]
        rows = hold_out(rows, labels, settings.val_share, settings.test_share, settings.seed)
    modes = {"train": settings.label_mode, "val": "majority", "test": "majority"}
    raw = {split: rows[rows["usage"] == split] for split in SPLITS}
    tables = {split: _labelled(raw[split], kind, modes[split]) for split in SPLITS}
    looks = _Looks(images, settings.near_duplicates)
    leaked = _leaked(tables["train"], tables, settings.drop_leaked_train, looks)
    train = raw["train"]
    train = train[~_leaked(train, tables, settings.drop_leaked_train, looks)]
    _refuse_gaps(tables, raw, leaked, kind, settings)
    clean = _share(tables["train"][~leaked], len(kind.classes), settings)
    tables["train"] = _noisy(clean, kind.classes, settings) if settings.label_noise else clean
    if kind.hard:
        prior = None if kind.confusion is None else np.array(kind.confusion, np.float64)
    else:
        votes = train[list(kind.vote_columns)].to_numpy()
        prior = class_prior(votes, train["name"].to_numpy(), settings.prior_min_votes, kind.classes)
    counts = {split: len(part) for split, part in raw.items()}
    marked = {split: table[kind.columns] for split, table in _mark_near(_mark_copies(tables), looks).items()}
    wrong = int((tables["train"]["label"] != clean["label"]).sum())
    return Splits(marked, prior, int(leaked.sum()), wrong, counts, held_out)


def count_classes(table: pd.DataFrame, classes: Sequence[str]) -> dict[str, int]:
    """Images per class of one split, including classes without any."""
    counts = np.bincount(table["label"], minlength=len(classes))
    return dict(zip(classes, counts.tolist(), strict=True))


def _missing(rows: pd.DataFrame) -> dict[str, str]:
    """The splits that the data set lacks, and what they are taken from."""
    usages = set(rows["usage"])
    lacking = {"test": "all", "val": "all"} if usages == {""} else {} if "val" in usages else {"val": "train"}
    by = ", by subject" if (rows["subject"] != "").any() else ""
    return {split: source + by for split, source in lacking.items()}


def _labels(rows: pd.DataFrame, kind: Kind, mode: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `label_distribution`; hard labels are their own."""
    votes = rows[list(kind.vote_columns)].to_numpy()
    if not kind.hard:
        return label_distribution(votes, mode, len(kind.classes))
    keep = votes.sum(axis=1) > 0
    return keep, np.where(keep, votes.argmax(axis=1) if len(votes) else 0, DROPPED), votes.astype(np.float64)


def _labelled(rows: pd.DataFrame, kind: Kind, mode: str) -> pd.DataFrame:
    keep, label, target = _labels(rows, kind, mode)
    kept = rows.loc[keep, ["row", "name"]].assign(label=label[keep])
    kept[list(kind.classes)] = target[keep]
    return kept.assign(subject=rows.loc[keep, "subject"], sha1=rows.loc[keep, "sha1"]).reset_index(drop=True)


def _refuse_gaps(
    tables: dict[str, pd.DataFrame], raw: dict[str, pd.DataFrame], leaked: pd.Series, kind: Kind, settings: SplitRules
) -> None:
    """Raise UserError for a split or a class of train without images, with the numbers and the setting that did it."""
    mode = {"train": settings.label_mode}
    for split, table in tables.items():
        rows = raw[split]
        if rows.empty:
            raise UserError(f"split {split} is empty: the data set holds no image of it: add the {split} part")
        if not table.empty:
            continue
        rule = f"the vote rule (split.label_mode {mode.get(split, 'majority')})"
        if rows[list(kind.vote_columns)].to_numpy().max() <= 1:
            raise UserError(
                f"split {split} is empty: none of its {len(rows)} images has more than a single vote for any class, "
                f"and {rule} takes single votes for noise: if they are labels, write 10 votes instead of 1"
            )
        raise UserError(
            f"split {split} is empty: it has {len(rows)} images, and {rule} drops all of them as unclear: "
            f"add images with a clear majority to the {split} part of the data set"
        )
    if leaked.all():
        raise UserError(
            f"split train is empty: split.drop_leaked_train takes all of its {len(leaked)} images, "
            "as val or test hold the same: set it to none, or correct the splits of the data set"
        )
    counts = count_classes(tables["train"], kind.classes)
    left = count_classes(tables["train"][~leaked], kind.classes)
    absent = [name for name, count in left.items() if count == 0]
    taken = [f"{name} ({counts[name]})" for name in absent if counts[name]]
    if taken:
        raise UserError(
            f"no training image of class {', '.join(taken)} is left: split.drop_leaked_train takes them all, "
            "as val or test hold the same: set it to none, or add images of the class to train"
        )
    if absent:
        votes = raw["train"][list(kind.vote_columns)].to_numpy()
        winner = np.where(votes.any(axis=1), votes.argmax(axis=1), -1)
        found = [
            f"{name} (most votes on {(winner == kind.classes.index(name)).sum()} of {len(votes)})" for name in absent
        ]
        add = "add images of it to the train part of the data set"
        if kind.hard:
            raise UserError(f"no training image of class {', '.join(absent)}: {add}")
        raise UserError(
            f"no training image of class {', '.join(found)} passes split.label_mode {settings.label_mode}: "
            f"{add} or choose another split.label_mode"
        )


def _share(train: pd.DataFrame, classes: int, settings: SplitRules) -> pd.DataFrame:
    """A random subset of each class, in the order of the rows."""
    rng = np.random.default_rng(settings.seed)
    kept = []
    for label in range(classes):
        order = rng.permutation(np.flatnonzero(train["label"] == label))
        kept.append(order[: max(1, round(settings.train_share * len(order)))])
    return train.iloc[np.sort(np.concatenate(kept))]


def _noisy(train: pd.DataFrame, classes: Sequence[str], settings: SplitRules) -> pd.DataFrame:
    """`train` with wrong labels, one image of each class at least keeping its own, and the labels as targets."""
    rng, labels = np.random.default_rng([settings.seed, 1]), train["label"].to_numpy()
    others = (labels + rng.integers(1, len(classes), len(labels))) % len(classes)
    found = labels.copy()
    for label in range(len(classes)):
        order = rng.permutation(np.flatnonzero(labels == label))
        wrong = order[: min(round(settings.label_noise * len(order)), len(order) - 1)]
        found[wrong] = others[wrong]
    noisy = train.assign(label=found)
    noisy[list(classes)] = np.eye(len(classes))[found]
    return noisy


class _Looks:
    """Finds near duplicates; shrinks an image when it is first asked for."""

    def __init__(self, images: Images, threshold: float | None):
        self.images, self.threshold = images, threshold
        self.small, self.known = np.zeros((len(images), SIDE, SIDE), np.uint8), np.zeros(len(images), bool)

    def near(self, rows: pd.Series, others: pd.Series) -> tuple[np.ndarray, np.ndarray]:
        """For images `rows` the position of the most similar of `others`, -1 below the threshold; and the kind."""
        position, kind = np.full(len(rows), -1), np.full(len(rows), "", dtype=object)
        if self.threshold is None or not len(rows) or not len(others):
            return position, kind
        among = self._thumbnails(others, False)
        plain, cosine = nearest(self._thumbnails(rows, False), among)
        mirrored, other = nearest(self._thumbnails(rows, True), among)
        found = np.maximum(cosine, other) >= self.threshold
        position[found] = np.where(other > cosine, mirrored, plain)[found]
        kind[found] = np.where(other > cosine, "mirrored", "near")[found]
        return position, kind

    def _thumbnails(self, rows: pd.Series, mirrored: bool) -> np.ndarray:
        chosen = rows.to_numpy()
        for part in parts(self.images, chosen[~self.known[chosen]]):
            self.small[part], self.known[part] = shrunk(self.images[part]), True
        return centred(self.small[chosen], mirrored)


def _leaked(train: pd.DataFrame, tables: dict[str, pd.DataFrame], kinds: str, looks: _Looks) -> pd.Series:
    """bool, by the index of `train`: whether val or test hold the image, as `drop_leaked_train` counts it."""
    elsewhere = pd.concat([tables["val"], tables["test"]])
    leaked = train["sha1"].isin(elsewhere["sha1"]) & (kinds != "none")
    if kinds == "near":
        leaked |= looks.near(train["row"], elsewhere["row"])[0] >= 0
    return leaked


def _mark_near(tables: dict[str, pd.DataFrame], looks: _Looks) -> dict[str, pd.DataFrame]:
    """Fill the three columns of images in val and test that have no exact copy but a near one."""
    marked = dict(tables)
    for split in ("val", "test"):
        table = tables[split].copy()
        for place in SEARCHED[split]:
            rest, others = table[table["duplicate_in"] == ""], tables[place]
            position, kind = looks.near(rest["row"], others["row"])
            found = rest.index[position >= 0]
            table.loc[found, "duplicate_of"] = called(others.iloc[position[position >= 0]]).to_numpy()
            table.loc[found, "duplicate_in"] = place
            table.loc[found, "duplicate_kind"] = kind[position >= 0]
        marked[split] = table
    return marked


def _mark_copies(tables: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
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
        kind = place.where(place == "", "exact")
        marked[split] = table.assign(duplicate_of=original, duplicate_in=place, duplicate_kind=kind)
    return marked


def _first_copies(table: pd.DataFrame) -> pd.Series:
    """By sha1, the name of its first image, or the row if it has no name."""
    first = table[~table["sha1"].duplicated()]
    return pd.Series(called(first).to_numpy(), index=first["sha1"])


def called(table: pd.DataFrame) -> pd.Series:
    """The name of each image, or its row if it has none."""
    return table["name"].where(table["name"] != "", table["row"].astype(str))


def duplicates(tables: dict[str, pd.DataFrame]) -> dict[str, int]:
    """How many images have a copy; `test_in_val` counts those that are not in train, `near_...` near duplicates."""

    def count(split: str, place: str, exact: bool) -> int:
        table = tables[split]
        return int(((table["duplicate_in"] == place) & ((table["duplicate_kind"] == "exact") == exact)).sum())

    places = (("val", "train"), ("test", "train"), ("test", "val"))
    return {
        **{f"{split}_in_{place}": count(split, place, exact=True) for split, place in places},
        "within_train": count("train", "train", exact=True),
        **{f"near_{split}_in_{place}": count(split, place, exact=False) for split, place in places},
    }


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write one split as CSV with `\\n` line ends and shortest exact numbers, so that equal tables give equal bytes."""
    table.to_csv(path, index=False, lineterminator="\n")
