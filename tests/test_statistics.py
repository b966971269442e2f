"""Intervals and tests against exact values, published tables, other implementations and simulation."""

from itertools import product

import numpy as np
import pytest
from scipy import stats
from scipy.special import softmax
from sklearn.metrics import brier_score_loss, log_loss

from fer.statistics import (
    Interval,
    between_seeds,
    brier,
    detectable,
    difference,
    even,
    mcnemar,
    mean,
    negative_log_likelihood,
    share,
    temperature,
)  # fmt: skip

RNG = np.random.default_rng(0)


def test_wilson_intervals_of_newcombe_1998() -> None:
    """Statistics in Medicine 17, table I, method 3."""
    for hits, trials, low, high in ((81, 263, 0.2553, 0.3662), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)):
        found = share(hits, trials)
        assert (found.value, found.low, found.high) == pytest.approx((hits / trials, low, high), abs=5e-5)


def test_a_mean_has_the_interval_of_the_t_test() -> None:
    values = RNG.normal(size=9)
    wanted = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mean(values).low, mean(values).high) == pytest.approx((wanted.low, wanted.high))
    assert mean(values[:1]) == Interval(values[0], -np.inf, np.inf)


def test_mcnemar_counts_all_outcomes() -> None:
    """By enumeration: of n images on which one alone is right, how often is the split as uneven as seen?"""
    for first, second in [(0, 0), (3, 3), (1, 5), (0, 8), (9, 2)]:
        right = np.array([True] * first + [False] * second + [True, False])
        other = np.array([False] * first + [True] * second + [True, False])
        uneven = [abs(2 * sum(coins) - first - second) for coins in product((0, 1), repeat=first + second)]
        wanted = np.mean(np.array(uneven) >= abs(first - second))
        assert mcnemar(right, other) == pytest.approx(wanted)


def test_two_runs_that_differ_on_8_percent_of_3137_images_need_a_point() -> None:
    assert detectable(3137, 0.08) == pytest.approx(0.0099, abs=5e-5)


def test_difference_of_accuracy_agrees_with_the_normal_approximation() -> None:
    right, other = RNG.random(2000) < 0.9, RNG.random(2000) < 0.86
    found = difference(right, other, np.zeros(2000, int), np.arange(2000), balanced=False)
    gain = right.astype(float) - other
    error = gain.std() / 2000**0.5
    assert found.value == pytest.approx(gain.mean())
    wanted = gain.mean() + np.array([-1.96, 1.96]) * error
    assert (found.low, found.high) == pytest.approx(tuple(wanted), abs=0.1 * error)


def test_difference_of_mean_recall_weighs_classes_alike() -> None:
    labels = np.array([0] * 90 + [1] * 10)
    right, other = np.ones(100, bool), np.ones(100, bool)
    other[[0, 90, 91]] = False
    found = difference(right, other, labels, np.arange(100), balanced=True)
    assert found.value == pytest.approx((1 / 90 + 2 / 10) / 2)
    assert found.low < found.value < found.high
    assert difference(right, right, labels, np.arange(100), balanced=True) == Interval(0, 0, 0)


@pytest.mark.parametrize("balanced", [False, True])
def test_the_interval_is_that_of_scipy(balanced: bool) -> None:
    """Its limits over seeds of the resampling, against SciPy's BCa with 20,000 resamples of a statistic as written."""
    rng, n = np.random.default_rng(7), 300
    labels = rng.choice(4, n, p=[0.6, 0.2, 0.15, 0.05])
    right, other = rng.random((2, n))  # no multiples of 1 / n, between which limits would jump
    gains = right.astype(float) - other

    def gain(rows: np.ndarray) -> float:
        if not balanced:
            return float(gains[rows].mean())
        return float(np.mean([gains[rows][labels[rows] == label].mean() for label in np.unique(labels[rows])]))

    wanted = stats.bootstrap((np.arange(n),), gain, n_resamples=20_000, vectorized=False, method="BCa", rng=rng)
    found = [difference(right, other, labels, np.arange(n), balanced, seed) for seed in range(5)]
    for limit in ("low", "high"):
        mean_limit = np.mean([getattr(one, limit) for one in found])
        assert mean_limit == pytest.approx(
            getattr(wanted.confidence_interval, limit), abs=0.02 * wanted.standard_error * 3
        )
    assert found[0].value == pytest.approx(gain(np.arange(n)))


def test_the_same_gain_everywhere_has_no_width() -> None:
    ones, zeros, nobody = np.ones(40, bool), np.zeros(40, bool), np.zeros(40, int)
    assert difference(ones, zeros, nobody, np.arange(40), balanced=True) == Interval(1, 1, 1)
    assert between_seeds([0.9, 0.9], [0.9, 0.9]) == (Interval(0, 0, 0), 1.0)
    assert between_seeds([0.7] * 3, [0.7] * 2) == (Interval(0, 0, 0), 1.0)  # their means differ by rounding
    assert between_seeds([1.0, 1.0], [0.5, 0.5]) == (Interval(0.5, -np.inf, np.inf), None)  # by chance, perhaps


def test_copies_of_a_photograph_count_as_one() -> None:
    values = RNG.random(300) < 0.8, RNG.random(300) < 0.7, np.zeros(300, int), np.arange(300)
    fourfold = [np.tile(one, 4) for one in values]
    once, grouped = (difference(*given, balanced=False) for given in (values, fourfold))
    apart = difference(*fourfold[:3], np.arange(1200), balanced=False)
    assert (grouped.low, grouped.high) == pytest.approx((once.low, once.high))
    assert apart.high - apart.low == pytest.approx((once.high - once.low) / 2, rel=0.1)


@pytest.mark.soak
@pytest.mark.parametrize("balanced", [False, True])
def test_95_percent_intervals_hold_the_truth_95_times_in_100(balanced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two classes, 400 images, 600 draws: the share of hits has a standard error of .9 points."""
    monkeypatch.setattr("fer.statistics.RESAMPLES", 999)
    labels = np.repeat([0, 1], [300, 100])
    chances = np.array([[0.9, 0.6], [0.86, 0.5]])[:, labels]
    truth = 0.5 * (0.04 + 0.1) if balanced else 0.75 * 0.04 + 0.25 * 0.1
    hits = 0
    for seed in range(600):
        right, other = np.random.default_rng(seed).random((2, 400)) < chances
        hits += truth in difference(right, other, labels, np.arange(400), balanced, seed)
    assert 0.93 <= hits / 600 <= 0.97


def test_scores_agree_with_scikit_learn() -> None:
    probabilities = RNG.dirichlet([1] * 4, 200)
    labels = RNG.integers(0, 4, 200)
    assert negative_log_likelihood(probabilities, labels) == pytest.approx(log_loss(labels, probabilities))
    assert brier(probabilities, labels) == pytest.approx(brier_score_loss(labels, probabilities, labels=range(4)))
    assert negative_log_likelihood(np.array([[0.0, 1.0]]), np.array([0])) > 80  # finite


@pytest.mark.parametrize("true", [0.5, 2.5])
def test_temperature_is_found_again(true: float) -> None:
    logits = RNG.normal(size=(20_000, 4)) * 2
    calibrated = softmax(logits / true, 1)
    labels = (calibrated.cumsum(1) > RNG.random((20_000, 1))).argmax(1)
    assert temperature(softmax(logits, 1), labels) == pytest.approx(true, rel=0.05)


@pytest.mark.parametrize("images", [8, 40])
def test_the_temperature_of_a_few_images_that_are_all_right_is_moderate(images: int) -> None:
    """The log loss alone falls for ever as T goes to 0."""
    labels = np.arange(images) % 4
    found = temperature(np.where(np.eye(4)[labels] > 0, 0.64, 0.12), labels)
    assert 0.2 < found < 1


def test_welch_between_seeds_by_the_formula() -> None:
    ours, theirs = [0.87, 0.88, 0.875], [0.86, 0.862, 0.864]
    found, p = between_seeds(ours, theirs)
    parts = [np.var(values, ddof=1) / 3 for values in (ours, theirs)]
    freedom = sum(parts) ** 2 / sum(part**2 / 2 for part in parts)
    t = (np.mean(ours) - np.mean(theirs)) / sum(parts) ** 0.5
    assert p == pytest.approx(2 * stats.t.sf(abs(t), freedom))
    half = stats.t.ppf(0.975, freedom) * sum(parts) ** 0.5
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half))
    with pytest.raises(ValueError, match="two runs or more"):
        between_seeds(ours, theirs[:1])


def test_even_classes_by_hand() -> None:
    """.8 / 6, .1 / 2 and .1 / 1 are 8, 3 and 6 of 17; a class without images counts as one with a single image."""
    for images in ([6, 2, 1], [6, 2, 0]):
        found = even(np.array([[0.8, 0.1, 0.1], [0.0, 0.0, 1.0]], np.float32), np.array(images))
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, [[8 / 17, 3 / 17, 6 / 17], [0, 0, 1]], rtol=1e-6)
    half = even(np.array([[0.8, 0.1, 0.1]]), np.array([16, 4, 1]), 0.5)  # .8 / 4, .1 / 2 and .1 / 1
    np.testing.assert_allclose(half, [[0.2 / 0.35, 0.05 / 0.35, 0.1 / 0.35]])
    np.testing.assert_allclose(even(half, np.array([16, 4, 1]), 0.0), half, rtol=1e-12)


def test_even_classes_undo_how_often_each_was_seen() -> None:
    """Bayes: the calibrated probabilities of faces drawn unevenly become those of faces drawn evenly."""
    of_class = RNG.dirichlet(np.ones(4), 3)  # p(x | class) for three classes and four kinds of face
    images = np.array([90, 9, 1])
    seen, wanted = (of_class * images[:, None]).T, of_class.T
    found = even(seen / seen.sum(1, keepdims=True), images)
    np.testing.assert_allclose(found, wanted / wanted.sum(1, keepdims=True), rtol=1e-12)
