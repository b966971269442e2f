"""Class names, and the published rules that turn the crowd votes on an image into a label and a target."""

from collections.abc import Sequence

import numpy as np

from fer.errors import UserError

CLASSES = ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt")
NO_EMOTION = ("unknown", "NF")  # NF: not a face
VOTE_COLUMNS = CLASSES + NO_EMOTION  # of FER+
ALIASES = {  # other names of the classes, in lower case
    "happy": "happiness", "joy": "happiness", "surprised": "surprise", "sad": "sadness", "angry": "anger",
    "disgusted": "disgust", "afraid": "fear", "fearful": "fear", "contemptuous": "contempt",
}  # fmt: skip
USAGES = {  # names of a split, in lower case
    "train": "train", "training": "train", "train_set": "train", "trainset": "train", "train_class": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val", "val_set": "val", "valset": "val",
    "val_class": "val", "publictest": "val", "test": "test", "testing": "test", "test_set": "test", "testset": "test",
    "test_class": "test", "privatetest": "test",
}  # fmt: skip
LABEL_MODES = ("majority", "probability", "cross_entropy", "multi_target")

DROPPED = -1  # label of an image that the rule drops
MOST_EMOTIONS = 3  # in mode probability, an image with more leading emotions is dropped as unclear


def emotion(name: str) -> str | None:
    """The class of CLASSES that `name` means, whatever its case; None for any other name."""
    lower = name.strip().lower()
    return lower if lower in CLASSES else ALIASES.get(lower)


def label_distribution(votes: np.ndarray, mode: str, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Apply a vote rule of FER+ to votes [N, C or more], of which the first C = `classes` columns are the classes.

    Returns keep bool [N], label int64 [N] and target float64 [N, C]. A dropped image has label -1, target 0.

    Single votes are noise and are ignored. Of the rest, `majority` keeps an image whose winner has more than half;
    `probability` and `cross_entropy` (the same rule, for two losses) accept the leading emotions until they hold three
    quarters of the votes; `multi_target` accepts every emotion with at least 30 %. An image won by unknown or NF is
    dropped. These are the rules of the official FER+ trainer (Barsoum et al. 2016, arXiv 1608.01041).

    The target is the distribution of the accepted votes. For `majority` that would only repeat the label, so the target
    is the distribution of the raw votes over the classes, single votes included, for losses that learn from it.
    Raises ValueError for an unknown mode or a wrong shape.
    """
    votes = np.asarray(votes)
    if votes.ndim != 2 or votes.shape[1] < classes:
        raise ValueError(f"votes must be [N, {classes} or more], got {list(votes.shape)}")
    if mode not in LABEL_MODES:
        raise ValueError(f"unknown label mode '{mode}'; known: {', '.join(LABEL_MODES)}")
    counted = np.where(votes > 1, votes, 0).astype(np.int64)
    accepted = _RULES[mode](counted, classes)
    keep = (accepted.sum(axis=1) > 0) & (accepted.argmax(axis=1) < classes)
    emotions = accepted[:, :classes]
    label = np.where(keep, emotions.argmax(axis=1), DROPPED)
    weights = (votes[:, :classes] if mode == "majority" else emotions) * keep[:, None]
    return keep, label, weights / np.maximum(weights.sum(axis=1, keepdims=True), 1)


def _majority(votes: np.ndarray, classes: int) -> np.ndarray:
    """The votes of the winner alone; zeros where it has half of them or less."""
    winner = np.zeros_like(votes)
    rows = np.arange(len(votes))
    column = votes.argmax(axis=1)
    winner[rows, column] = votes[rows, column]
    return winner * (2 * winner > votes.sum(axis=1, keepdims=True))


def _probability(votes: np.ndarray, classes: int) -> np.ndarray:
    """The votes of the leading emotions, from the highest down until they hold three quarters of all votes."""
    left = votes.copy()
    total = votes.sum(axis=1)
    accepted = np.zeros_like(votes)
    count = np.zeros(len(votes), dtype=np.int64)
    for _ in range(MOST_EMOTIONS):  # each round accepts all emotions that tie for the most votes
        searching = (4 * accepted.sum(axis=1) < 3 * total) & (count < MOST_EMOTIONS)
        hit = searching[:, None] & (left == left.max(axis=1, keepdims=True))
        hit[:, classes:] = False  # unknown and NF are never accepted, so the search ends when one leads
        accepted[hit], left[hit] = left[hit], 0
        count += hit.sum(axis=1)
    return accepted * ((2 * accepted.sum(axis=1) > total) & (count <= MOST_EMOTIONS))[:, None]


def _multi_target(votes: np.ndarray, classes: int) -> np.ndarray:
    """The votes of every emotion with 30 % or more; zeros where these hold half of the votes or less."""
    total = votes.sum(axis=1, keepdims=True)
    accepted = votes * (10 * votes >= 3 * total)
    return accepted * (2 * accepted.sum(axis=1, keepdims=True) > total)


_RULES = {
    "majority": _majority,
    "probability": _probability,
    "cross_entropy": _probability,
    "multi_target": _multi_target,
}


def class_prior(votes: np.ndarray, names: np.ndarray, min_votes: int, classes: Sequence[str]) -> np.ndarray:
    """Mean distribution of votes on images of each class: [C, C], row = class, rows sum to 1 (PDLS, arXiv 2004.00180).

    `votes` [N, C or more] and `names` [N] are those of the training images. An image counts if one of the C `classes`
    wins its raw votes (ties go to the lowest column) with at least `min_votes`, and it is the first of its name; images
    without a name do not count. Raises UserError naming every class without such an image.
    """
    names = np.asarray(names).astype(str)
    first = np.zeros(len(names), dtype=bool)
    first[np.unique(names, return_index=True)[1]] = True
    votes = np.asarray(votes)[first & (names != "")].astype(np.int64)
    winner = votes.argmax(axis=1)
    clear = (votes.max(axis=1, initial=0) >= min_votes) & (winner < len(classes))
    emotions, winner = votes[clear, : len(classes)], winner[clear]
    empty = [name for index, name in enumerate(classes) if not (winner == index).any()]
    if empty:
        raise UserError(
            f"class prior: no training image is won by {', '.join(empty)} with {min_votes} votes or more: "
            "lower split.prior_min_votes in the data set's file in datasets/ or use more training data"
        )
    shares = emotions / emotions.sum(axis=1, keepdims=True)
    return np.stack([shares[winner == index].mean(axis=0) for index in range(len(classes))])
