"""Val and test for data sets that have none: parts of train, or of everything, with all classes in proportion."""

import numpy as np
import pandas as pd
import scipy  # its parts are imported at their first use, which prediction has none of

from fer.errors import UserError


def hold_out(rows: pd.DataFrame, labels: np.ndarray, val_share: float, test_share: float, seed: int) -> pd.DataFrame:
    """`rows` with a usage for each, as `read_labels` returns them; `labels` int64 [N], -1 for an image without one.

    Without val, `val_share` of train becomes val; without any split, `test_share` and `val_share` of all images become
    test and val. Images of one subject stay together, as do labelled images with the same pixels; each class keeps an
    image in train. Drawn with `seed`. Raises UserError where there are too few to do so.
    """
    usage = rows["usage"].to_numpy(object).copy()
    together = connected([firsts(named(rows["subject"])), firsts(named(np.where(labels < 0, "", rows["sha1"])))])
    groups = np.where(rows["subject"] != "", "subject " + rows["subject"], "pixels " + rows["sha1"])
    groups = groups[np.unique(together, return_index=True)[1]][together]  # the name of its first image
    rng = np.random.default_rng([seed, 3])
    if (usage == "").any():
        usage[usage == ""] = "train"
        usage[_drawn(usage == "train", labels, groups, test_share, rng, "test")] = "test"
        # a share of all images, as for test
        val_share /= 1 - test_share
    if not (usage == "val").any():
        usage[_drawn(usage == "train", labels, groups, val_share, rng, "val")] = "val"
    return rows.assign(usage=usage)


def _drawn(
    pool: np.ndarray, labels: np.ndarray, groups: np.ndarray, share: float, rng: np.random.Generator, name: str
) -> np.ndarray:
    """Which images of `pool`, bool [N], are taken: whole groups, near `share` of each class.

    Groups are visited in random order and taken if that brings the classes' counts nearer to their share. If none does,
    the one that comes nearest is taken.
    """
    names, group = np.unique(groups[pool], return_inverse=True)
    own = labels[pool]
    counts = np.zeros((len(names), own.max(initial=0) + 1))  # images of each group and class
    np.add.at(counts, (group[own >= 0], own[own >= 0]), 1)
    wanted, left, taken = share * counts.sum(axis=0), counts.sum(axis=0), np.zeros(counts.shape[1])
    present = left > 0
    chosen = np.zeros(len(names), bool)

    def gain(place: int) -> float:
        """How much nearer the group brings the counts; below 0 where it would take the last image of a class."""
        if (left - counts[place] <= 0)[present].any():
            return -np.inf
        before, after = wanted - taken, wanted - taken - counts[place]
        return float((before**2).sum() - (after**2).sum())

    for place in rng.permutation(len(names)):
        if gain(place) > 0:
            chosen[place] = True
            taken, left = taken + counts[place], left - counts[place]
    if not chosen.any():
        gains = np.array([gain(place) if counts[place].any() else -np.inf for place in range(len(names))])
        if not len(gains) or gains.max() == -np.inf:
            raise UserError(
                f"split {name}: none in the data set, and train has too few images or subjects to take one out of it "
                f"({int(pool.sum())} images in {len(names)} groups, each of a subject or of subjects that share a "
                f"picture): add images, or a split {name}"
            )
        chosen[gains.argmax()] = True
    result = np.zeros(len(pool), bool)
    result[np.flatnonzero(pool)] = chosen[group]
    return result


def named(keys: pd.Series | np.ndarray) -> np.ndarray:
    """Text [N], in which an image without a key has one of its own."""
    return np.where(np.asarray(keys) == "", [f"{row}" for row in range(len(keys))], "=" + np.asarray(keys, object))


def firsts(keys: np.ndarray) -> np.ndarray:
    """int64 [2, N]: each position, and the first with the same key."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return np.stack([np.arange(len(keys)), first[inverse]])


def connected(links: list[np.ndarray]) -> np.ndarray:
    """int64 [N], from 0: the number of the group of each image, in the order of their first image.

    `links`: int64 [2, L] pairs of images that belong together; those of `firsts` name every image.
    """
    pairs = np.concatenate(links, 1)
    side = pairs.max(initial=-1) + 1
    graph = scipy.sparse.coo_array((np.ones(pairs.shape[1], bool), tuple(pairs)), shape=(side, side))
    return scipy.sparse.csgraph.connected_components(graph, directed=False)[1].astype(np.int64)
