"""Intervals, paired tests and calibration, as pure functions of predictions.

Images of a group, such as copies of one photograph, are not independent: resampling draws groups, not images.
"""

import math
from dataclasses import dataclass

import numpy as np
import scipy  # its parts are imported at their first use, which prediction has none of
from scipy.special import softmax

LEVEL = 0.95
RESAMPLES = 9_999


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval."""

    value: float
    low: float
    high: float

    def __contains__(self, number: float) -> bool:
        return self.low <= number <= self.high


def share(hits: int, trials: int) -> Interval:
    """A share with its Wilson interval (Wilson 1927); (0, 1) around NaN without trials."""
    if not trials:
        return Interval(float("nan"), 0.0, 1.0)
    found = scipy.stats.binomtest(hits, trials).proportion_ci(LEVEL, "wilson")
    return Interval(hits / trials, float(found.low), float(found.high))


def mean(values: np.ndarray) -> Interval:
    """A mean with Student's interval, of float [n]; of one value all numbers are in it."""
    value = float(values.mean())
    if len(values) < 2:
        return Interval(value, -np.inf, np.inf)
    half = float(scipy.stats.t.ppf(0.5 + LEVEL / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return Interval(value, value - half, value + half)


def mcnemar(right: np.ndarray, other: np.ndarray) -> float:
    """Two-sided p of the exact McNemar test: bool [n] each, whether two models are right on the same n images."""
    first, second = int((right & ~other).sum()), int((other & ~right).sum())
    return float(scipy.stats.binomtest(first, first + second).pvalue) if first + second else 1.0


def detectable(images: int, square: float) -> float:
    """The smallest difference in accuracy that stands out from chance.

    `square`: the mean of the squared difference in hits on an image; of two runs the share on which one alone is right.
    The normal approximation of McNemar's test: z * sqrt(square / images).
    """
    return float(scipy.stats.norm.ppf(0.5 + LEVEL / 2) * np.sqrt(square / images))


def difference(
    right: np.ndarray, other: np.ndarray, labels: np.ndarray, groups: np.ndarray, balanced: bool, seed: int = 0
) -> Interval:
    """Accuracy of one model minus that of another on the same images, with its BCa interval (Efron 1987).

    bool [n] each, labels [n] and groups [n] as integers. `balanced`: the mean recall of the classes (UAR) instead,
    of those in the sample.
    """
    gains = right.astype(float) - other.astype(float)
    classes = labels if balanced else np.zeros_like(labels)
    members = np.unique(groups, return_inverse=True)[1]
    n, width = int(members.max()) + 1, int(classes.max()) + 1
    sums, counts = np.zeros((n, width)), np.zeros((n, width))
    np.add.at(sums, (members, classes), gains)
    np.add.at(counts, (members, classes), 1)
    # groups that are alike are interchangeable, so only how often each kind is drawn matters
    kinds, times = np.unique(np.hstack([sums.round(9), counts]), axis=0, return_counts=True)

    def mean_gain(drawn: np.ndarray) -> np.ndarray:
        """Of how often each kind is there, [..., kinds]."""
        gained, images = drawn @ kinds[:, :width], drawn @ kinds[:, width:]
        there = images > 0
        return np.where(there, gained / np.where(there, images, 1), 0).sum(-1) / there.sum(-1)

    value = float(mean_gain(times))
    if n < 2:  # which says nothing of others
        return Interval(value, -1.0, 1.0)
    without = mean_gain(times - np.eye(len(times)))  # one group of each kind
    off = times @ without / n - without
    if np.allclose(off, 0):  # all gain alike
        return Interval(value, value, value)
    resampled = mean_gain(np.random.default_rng(seed).multinomial(n, times / n, RESAMPLES))
    below = ((resampled < value).mean() + (resampled <= value).mean()) / 2
    bias = scipy.stats.norm.ppf(np.clip(below, 0.5 / RESAMPLES, 1 - 0.5 / RESAMPLES))
    acceleration = (times @ off**3) / (6 * (times @ off**2) ** 1.5)
    z = bias + scipy.stats.norm.ppf([0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    low, high = np.quantile(resampled, scipy.stats.norm.cdf(bias + z / (1 - acceleration * z)))
    return Interval(value, float(low), float(high))


def even(probabilities: np.ndarray, images: np.ndarray, power: float = 1.0) -> np.ndarray:
    """Probabilities [n, C] as if all classes were equally frequent: divided by their shares of the training images.

    `images`: of each class, [C]; a class without any counts as one with a single image (Saerens et al. 2002, Neural
    Computation 14). They must be calibrated, and of a network whose training did not even out the classes. With a
    `power` of the shares, 0 to 1, part of the way.
    """
    found = probabilities / np.maximum(images, 1.0) ** power
    return (found / found.sum(1, keepdims=True)).astype(probabilities.dtype)


def negative_log_likelihood(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean of -log p[label], natural logarithm; float [n, C], integers [n]."""
    chosen = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(chosen, np.finfo(np.float32).tiny)).mean())


def brier(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared distance between the probabilities and the one-hot label, 0 to 2 (Brier 1950)."""
    hot = np.eye(probabilities.shape[1])[labels]
    return float(np.square(probabilities - hot).sum(1).mean())


def temperature(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The T that minimises the log loss of softmax(log p / T) (Guo et al. 2017, 1706.04599); float [n, C], int [n].

    A prior around T = 1 weighs as much as one image: without it T goes to 0 where a few images are all right.
    """
    logits = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))

    def loss(log_t: float) -> float:
        return negative_log_likelihood(softmax(logits / np.exp(log_t), 1), labels) + log_t**2 / len(labels)

    found = scipy.optimize.minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded")
    return float(np.exp(found.x))


def between_seeds(values: list[float], others: list[float]) -> tuple[Interval, float | None]:
    """Difference of the means of two sets of runs, and p: Welch's t test, as equal seeds do not pair two recipes.

    Without a variance on either side a difference has neither p nor an interval: two runs may agree by chance.
    Raises ValueError for fewer than two runs on a side.
    """
    if min(len(values), len(others)) < 2:
        raise ValueError("two runs or more on each side")
    if len(set(values)) == len(set(others)) == 1:  # nothing varies
        gap = values[0] - others[0]
        return (Interval(gap, -math.inf, math.inf), None) if gap else (Interval(0, 0, 0), 1.0)
    gap = float(np.mean(values) - np.mean(others))
    found = scipy.stats.ttest_ind(values, others, equal_var=False)
    bounds = found.confidence_interval(LEVEL)
    return Interval(gap, float(bounds.low), float(bounds.high)), float(found.pvalue)
