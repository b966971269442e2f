"""Intervals, paired tests and calibration, as pure functions of predictions.

Images of a group, such as copies of one photograph, are not independent: resampling draws groups, not images.
"""

from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

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
    found = stats.binomtest(hits, trials).proportion_ci(LEVEL, "wilson")
    return Interval(hits / trials, float(found.low), float(found.high))


def mean(values: np.ndarray) -> Interval:
    """A mean with Student's interval, of float [n]; of one value all numbers are in it."""
    value = float(values.mean())
    if len(values) < 2:
        return Interval(value, -np.inf, np.inf)
    half = float(stats.t.ppf(0.5 + LEVEL / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return Interval(value, value - half, value + half)


def mcnemar(right: np.ndarray, other: np.ndarray) -> float:
    """Two-sided p of the exact McNemar test: bool [n] each, whether two models are right on the same n images."""
    first, second = int((right & ~other).sum()), int((other & ~right).sum())
    return float(stats.binomtest(first, first + second).pvalue) if first + second else 1.0


def detectable(images: int, differing: float) -> float:
    """The smallest difference in accuracy that stands out from chance between models that differ on a share of images.

    The normal approximation of McNemar's test: z * sqrt(differing / images).
    """
    return float(stats.norm.ppf(0.5 + LEVEL / 2) * np.sqrt(differing / images))


def difference(
    right: np.ndarray, other: np.ndarray, labels: np.ndarray, groups: np.ndarray, balanced: bool, seed: int = 0
) -> Interval:
    """Accuracy of one model minus that of another on the same images, with its BCa interval (Efron 1987).

    bool [n] each, labels [n] and groups [n] as integers. `balanced`: the mean recall of the classes (UAR) instead,
    of those in the sample.
    """
    gains = right.astype(float) - other.astype(float)
    classes = labels if balanced else np.zeros_like(labels)
    shape = (len(np.unique(groups)), int(classes.max()) + 1)
    members = np.unique(groups, return_inverse=True)[1]
    sums, counts = np.zeros(shape), np.zeros(shape)
    np.add.at(sums, (members, classes), gains)
    np.add.at(counts, (members, classes), 1)

    def mean_gain(rows: np.ndarray, axis: int = -1) -> np.ndarray:
        """Of groups int [..., G], as SciPy draws them; `axis` is always the last one."""
        gained, images = sums[rows].sum(-2), counts[rows].sum(-2)  # [..., classes]
        there = images > 0
        return np.where(there, gained / np.where(there, images, 1), 0).sum(-1) / there.sum(-1)

    every = np.arange(shape[0])
    value = float(mean_gain(every))
    if not sums.any() or shape[0] < 2:
        return Interval(value, value, value)
    found = stats.bootstrap(
        (every,), mean_gain, n_resamples=RESAMPLES, batch=200, vectorized=True, confidence_level=LEVEL, method="BCa",
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    return Interval(value, float(found.confidence_interval.low), float(found.confidence_interval.high))


def negative_log_likelihood(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean of -log p[label], natural logarithm; float [n, C], integers [n]."""
    chosen = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(chosen, np.finfo(np.float32).tiny)).mean())


def brier(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared distance between the probabilities and the one-hot label, 0 to 2 (Brier 1950)."""
    hot = np.eye(probabilities.shape[1])[labels]
    return float(np.square(probabilities - hot).sum(1).mean())


def divergence(targets: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of the probabilities from the voters' shares, both float [n, C], in nats."""
    floor = np.finfo(np.float32).tiny
    logs = np.log(np.maximum(targets, floor)) - np.log(np.maximum(probabilities, floor))
    return float((targets * logs).sum(1).mean())


def temperature(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The T that minimises the log loss of softmax(log p / T) (Guo et al. 2017, 1706.04599); float [n, C], int [n]."""
    logits = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))

    def loss(log_t: float) -> float:
        return negative_log_likelihood(softened(logits, np.exp(log_t)), labels)

    found = optimize.minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded")
    return float(np.exp(found.x))


def softened(logits: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(logits / T), float [n, C]."""
    scaled = logits / temperature
    scaled = np.exp(scaled - scaled.max(1, keepdims=True))
    return scaled / scaled.sum(1, keepdims=True)


def between_seeds(values: list[float], others: list[float]) -> tuple[Interval, float]:
    """Difference of the means of two sets of runs, and p: Welch's t test, as equal seeds do not pair two recipes.

    Raises ValueError for fewer than two runs on a side.
    """
    if min(len(values), len(others)) < 2:
        raise ValueError("two runs or more on each side")
    found = stats.ttest_ind(values, others, equal_var=False)
    bounds = found.confidence_interval(LEVEL)
    return Interval(float(np.mean(values) - np.mean(others)), float(bounds.low), float(bounds.high)), float(
        found.pvalue
    )
