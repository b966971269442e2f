"""Cross-validation: each image is test once, in one of k folds or in the fold of its subject.

The pool is every image of the data set but those of a published test split, which stays untouched. What belongs
together is on one side: the images of a subject where subjects are known, copies and near copies of a photograph where
they are not, and images with the same pixels in any case. A fold is the data set with another choice of rows.
"""

import hashlib

import numpy as np
import pandas as pd
import torch

from fer.data.dataset import DataSet, Split
from fer.data.holdout import connected, firsts, hold_out, named
from fer.data.images import Images
from fer.data.near import SAME, pairs, parts, thumbnails
from fer.errors import UserError

SUBJECTS = "subjects"  # leave one subject out
VAL_SHARE = 0.1  # of the images that a fold does not test
ONE = 2**52  # weight of a class of one image: whole numbers add to the same sums on every machine

_known: dict[tuple, list[np.ndarray]] = {}  # by what they follow from: the folds that this process has made


def parsed(folds: str) -> int | None:
    """The number of folds that `folds` asks for; None for SUBJECTS. Raises UserError for anything else."""
    if folds == SUBJECTS:
        return None
    if not (folds.isascii() and folds.isdigit() and len(folds) < 7 and int(folds) > 1):
        raise UserError(f"folds {folds}: should be 2 or more, or `{SUBJECTS}` to leave one subject out at a time")
    return int(folds)


def titled(name: str, fold: str | None) -> str:
    """The name of a run with its fold: `vgg13.fold3of10` for 3/10, `vgg13.subject3` for 3/subjects."""
    number, _, folds = (fold or "").partition("/")
    if not folds:
        return name
    return f"{name}.subject{number}" if folds == SUBJECTS else f"{name}.fold{number}of{folds}"


def folds_of(data: DataSet, folds: str) -> list[str]:
    """The folds of a data set by name, 1/10 to 10/10. Raises UserError as `make_folds` does."""
    return [f"{number}/{folds}" for number in range(1, len(_usages(data, folds)) + 1)]


def fold_of(data: DataSet, fold: str | None) -> DataSet:
    """The data set with the train, val and test of a fold such as 3/10, which its summary names; None: as it is.

    Of votes, the class prior is the mean distribution on the fold's training images of each class. Raises UserError if
    there is no such fold.
    """
    if fold is None or data.summary.get("fold") == fold:
        return data
    number, _, folds = fold.partition("/")
    usages = _usages(data, folds)
    if not (number.isdigit() and 1 <= int(number) <= len(usages)):
        raise UserError(f"fold {fold}: there are {len(usages)} folds, counted from 1")
    pool = _pool(data)
    splits = {name: _taken(pool, name, usages[int(number) - 1] == name) for name in ("train", "val", "test")}
    labels = {name: torch.bincount(split.labels, minlength=len(data.classes)) for name, split in splits.items()}
    summary = data.summary | {
        "fold": fold,
        "totals": {name: len(split) for name, split in splits.items()},
        "counts": {name: dict(zip(data.classes, found.tolist())) for name, found in labels.items()},
        "duplicates": dict.fromkeys(data.summary["duplicates"], 0),
    }
    if data.summary["class_prior"] is not None and data.summary.get("labels") != "hard":
        train = splits["train"]
        targets, own = train.targets.numpy().astype(np.float64), train.labels.numpy()
        summary["class_prior"] = [targets[own == label].mean(0).tolist() for label in range(len(data.classes))]
    return DataSet(data.folder, data.images, summary, splits)


def make_folds(
    labels: np.ndarray, subjects: np.ndarray, copies: np.ndarray, folds: str, seed: int, classes: list[str]
) -> list[np.ndarray]:
    """The usage of each image, `train`, `val` or `test`, in each fold: an array of text [N] for each.

    `labels` int64 [N]; `subjects` text [N], "" where unknown; `copies` int64 [N], the same for images that must not be
    parted. With a number of folds whole groups of images are divided, the classes in proportion as far as they allow;
    with SUBJECTS each subject is a fold, in the order of their names. Every image is test in one fold. Val is VAL_SHARE
    of the rest, by the same groups. Drawn with `seed`. Raises UserError if a fold cannot be made, or would train
    without a class.
    """
    count, group = parsed(folds), connected([firsts(named(subjects)), firsts(copies)])
    if count is None:
        place = _by_subject(subjects, group, folds)
    else:
        found = int(group.max(initial=-1)) + 1
        if found < count:
            what = "subjects" if (subjects != "").all() else "subjects or different photographs"
            raise UserError(f"folds {folds}: there are {found} {what}; choose {found} or fewer")
        rare = [f"{name} has {n}" for name, n in zip(classes, np.bincount(labels, minlength=len(classes))) if n < count]
        if rare:
            raise UserError(f"folds {folds}: too few images of a class: {', '.join(rare)}; choose fewer folds")
        place = _divided(labels, group, count, seed)
    usages = []
    for number in range(1, int(place.max()) + 2):
        test = place == number - 1
        lost = [name for label, name in enumerate(classes) if not (labels[~test] == label).any()]
        if lost:
            raise UserError(
                f"folds {folds}: fold {number} would train without {', '.join(lost)}, as one subject has all images of "
                "it; leave the class out (data.classes)"
            )
        rows = pd.DataFrame({"usage": np.where(test, "test", "train"), "subject": group.astype(str), "sha1": ""})
        try:
            usage = hold_out(rows, labels, VAL_SHARE, 0.0, seed + number)["usage"]
        except UserError:
            raise UserError(
                f"folds {folds}: fold {number} has too few subjects or images to take val out of its train; add some"
            ) from None
        usages.append(usage.to_numpy(str))
    return usages


def _by_subject(subjects: np.ndarray, group: np.ndarray, folds: str) -> np.ndarray:
    unknown = int((subjects == "").sum())
    if unknown:
        raise UserError(
            f"folds {folds}: {unknown} of {len(subjects)} images name no subject; set data.subject_pattern in "
            "the data set's file in datasets/, or choose a number of folds"
        )
    names, place = np.unique(subjects, return_inverse=True)
    if len(names) < 3:
        raise UserError(f"folds {folds}: there are {len(names)} subjects; train, val and test need one each")
    for other in range(int(group.max()) + 1):
        several = np.unique(place[group == other])
        if len(several) > 1:
            raise UserError(
                f"folds {folds}: subjects {names[several[0]]} and {names[several[1]]} share an image with the same "
                "pixels; correct its subject, or leave one of the two out"
            )
    return place


def _divided(labels: np.ndarray, group: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The fold of each image, from 0: int64 [N].

    Groups go one by one, those with the largest shares of a class first, to the fold where the sum over classes of
    (share of the class in the fold)^2 then grows least; of equals to the one with fewest images.
    """
    counts = np.zeros((int(group.max()) + 1, int(labels.max()) + 1), np.int64)  # images of each group and class
    np.add.at(counts, (group, labels), 1)
    weight = ONE // np.maximum(counts.sum(0), 1) ** 2
    order = np.random.default_rng([seed, 4]).permutation(len(counts))
    order = order[np.argsort(-(counts[order] ** 2 @ weight), kind="stable")]
    held, place = np.zeros((count, counts.shape[1]), np.int64), np.zeros(len(counts), np.int64)
    for one in order:
        cost = (held * counts[one]) @ weight
        place[one] = np.lexsort((held.sum(1), cost))[0]
        held[place[one]] += counts[one]
    return place[group]


def copies_of(images: Images, rows: np.ndarray, subjects: np.ndarray, threshold: float | None) -> np.ndarray:
    """int64 [N]: the same for images with the same pixels, and for near or mirrored copies (`near`).

    `images`: those of the whole data set. Near copies of two known subjects are left apart: people in a laboratory
    look alike, and who they are is known.
    """
    alike, pixels, seen = threshold is not None and (subjects == "").any(), [], []
    for part in parts(images, rows):
        some = images[part]
        pixels += [hashlib.sha256(image.tobytes()).hexdigest() for image in some]
        if alike:
            seen.append(thumbnails(some))
    links = [firsts(np.array(pixels, str))]
    if threshold is not None and seen:
        found = np.concatenate(seen)
        for mirrored in (False, True):
            near = pairs(found, threshold, mirrored)
            links.append(near[:, (subjects[near] == "").any(0)])
    return connected(links)


def _usages(data: DataSet, folds: str) -> list[np.ndarray]:
    """`make_folds` of the pool, in the order of its rows."""
    seed, threshold = data.summary.get("seed", 0), data.summary.get("near_duplicates", SAME)
    if data.summary["label_mode"] != "majority":
        raise UserError(
            f"split.label_mode: is {data.summary['label_mode']}, but in folds training images are test images as "
            "well, whose label is that of the majority; set it to majority and run `dvc repro`"
        )
    key = (data.hash, data.test_hash, folds, seed, threshold, str(data.summary.get("held_out")))
    if key not in _known:
        pool = _pool(data)
        subjects = np.array(pool.subjects, str)
        copies = copies_of(data.images, pool.rows, subjects, threshold)
        _known[key] = make_folds(pool.labels.numpy(), subjects, copies, folds, seed, data.classes)
    return _known[key]


def _pool(data: DataSet) -> Split:
    """All images that are divided, in the order of their rows."""
    names = ["train", "val", *(["test"] if "test" in data.summary.get("held_out", {}) else [])]
    parts = [data.split(name) for name in names]
    rows = np.concatenate([part.rows for part in parts])
    nothing = torch.zeros(len(rows), dtype=torch.bool)
    whole = Split(
        name="pool",
        images=data.images,
        rows=rows,
        names=[name for part in parts for name in part.names],
        subjects=[name for part in parts for name in part.subjects],
        labels=torch.cat([part.labels for part in parts]),
        targets=torch.cat([part.targets for part in parts]),
        in_train=nothing,
        in_val=nothing,
        near=nothing,
    )
    return _taken(whole, "pool", np.argsort(rows))


def _taken(split: Split, name: str, chosen: np.ndarray) -> Split:
    """Some images of a split: bool [N], or positions."""
    index = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
    where = torch.from_numpy(index)
    return Split(
        name=name,
        images=split.images,
        rows=split.rows[index],
        names=[split.names[i] for i in index],
        subjects=[split.subjects[i] for i in index],
        labels=split.labels[where],
        targets=split.targets[where],
        in_train=split.in_train[where],
        in_val=split.in_val[where],
        near=split.near[where],
    )
