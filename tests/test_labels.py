"""The FER+ vote rules against hand-counted images, a scalar reference and the published counts."""

import itertools
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import refusal

from fer.data.labels import CLASSES, LABEL_MODES, VOTE_COLUMNS, class_prior, emotion, label_distribution


def share(**votes: int) -> list[float]:
    total = sum(votes.values())
    return [votes.get(name, 0) / total for name in CLASSES]


NOT = None  # dropped
MODES = [("majority", 1), ("probability", 2), ("cross_entropy", 2), ("multi_target", 3)]  # position in HAND_COUNTED
HALVES = share(neutral=1, happiness=1)
THIRDS = share(happiness=1, surprise=1, sadness=1)
SEVEN_THREE = share(disgust=7, fear=3)
# votes; then per mode the expected target (its largest share is the label) or NOT
HAND_COUNTED = {
    "no majority": (
        [4, 0, 0, 1, 3, 2, 0, 0, 0, 0],  # 9 after the single vote is gone: 4 <= 4.5; 4 + 3 >= 6.75; 2 < 2.7
        NOT,
        share(neutral=4, anger=3),
        share(neutral=4, anger=3),
    ),
    "majority keeps its single votes in the target": (
        [6, 0, 1, 1, 0, 0, 0, 0, 2, 0],  # 8 left: 6 > 4; 6 >= 6 ends the search; 2 < 2.4
        share(neutral=6, surprise=1, sadness=1),
        share(neutral=1),
        share(neutral=1),
    ),
    "half is no majority": ([5, 5, 0, 0, 0, 0, 0, 0, 0, 0], NOT, HALVES, HALVES),
    "tie with unknown": ([5, 0, 0, 0, 0, 0, 0, 0, 5, 0], NOT, NOT, share(neutral=1)),  # 5 is not more than half of 10
    "unknown ends the search": ([3, 2, 2, 0, 0, 0, 0, 0, 2, 0], NOT, share(neutral=3, happiness=2, surprise=2), NOT),
    "unknown wins": ([0, 3, 0, 0, 0, 0, 0, 0, 7, 0], NOT, NOT, NOT),
    "three emotions": ([0, 3, 3, 3, 0, 0, 0, 0, 0, 0], NOT, THIRDS, THIRDS),
    "four emotions": ([0, 3, 3, 3, 3, 0, 0, 0, 0, 0], NOT, NOT, NOT),
    "exactly 30 %": ([0, 0, 0, 0, 0, 7, 3, 0, 0, 0], SEVEN_THREE, SEVEN_THREE, SEVEN_THREE),
    "single votes only": ([1, 1, 1, 1, 1, 1, 1, 1, 1, 1], NOT, NOT, NOT),
    "no votes": ([0] * 10, NOT, NOT, NOT),
}  # fmt: skip


def test_hand_counted() -> None:
    for (case, row), (mode, position) in itertools.product(HAND_COUNTED.items(), MODES):
        keep, label, target = label_distribution(np.array([row[0]]), mode, 8)
        expected = row[position] or [0] * 8
        found = (keep[0], label[0], target[0].tolist())
        assert found == (any(expected), np.argmax(expected) if any(expected) else -1, pytest.approx(expected)), case


def reference(votes: list[int], mode: str) -> tuple[bool, int, list[float]]:
    """The published procedure for one image, column by column."""
    left = [vote if vote > 1 else 0 for vote in votes]
    total = sum(left)
    accepted = [0] * 10
    if mode == "majority":
        if max(left) > total / 2:
            accepted[left.index(max(left))] = max(left)
    elif mode == "multi_target":
        accepted = [vote if vote >= 0.3 * total else 0 for vote in left]
        if sum(accepted) <= total / 2:
            accepted = [0] * 10
    else:
        integrated, count, going = 0, 0, True
        while going and integrated < 0.75 * total and count < 3:
            highest = max(left)
            for column in range(10):
                if left[column] != highest:
                    continue
                accepted[column], left[column] = highest, 0
                integrated += highest
                count += 1
                if column >= 8:
                    going = False
                    if sum(accepted) > highest:
                        accepted[column] = 0
                        count -= 1
                    break
        if sum(accepted) <= total / 2 or count > 3:
            accepted = [0] * 10
    winner = accepted.index(max(accepted))
    if not any(accepted) or winner >= 8:
        return False, -1, [0.0] * 8
    weights = votes[:8] if mode == "majority" else accepted[:8]
    return True, winner, [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("mode", LABEL_MODES)
def test_equals_the_scalar_reference(mode: str) -> None:
    """On ten voters, and on any numbers of votes."""
    rng = np.random.default_rng(0)
    ten = [rng.multinomial(10, rng.dirichlet([evenness] * 10)) for evenness in np.geomspace(0.05, 3, 1000)]
    votes = np.concatenate([ten, rng.integers(0, 11, (500, 10)), rng.integers(0, 4, (500, 10))])
    keep, label, target = label_distribution(votes, mode, 8)
    expected = [reference(row, mode) for row in votes.tolist()]
    assert keep.tolist() == [row[0] for row in expected]
    assert label.tolist() == [row[1] for row in expected]
    np.testing.assert_allclose(target, [row[2] for row in expected], rtol=1e-12)


def test_votes_are_not_changed_and_may_be_empty_narrow_or_of_other_classes() -> None:
    votes = np.array([[200, 3, 0, 0, 0, 0, 0, 0, 60, 0]], dtype=np.uint8)  # sums above 255
    before = votes.copy()
    for mode in LABEL_MODES:
        keep, label, _ = label_distribution(votes, mode, 8)
        assert (keep[0], label[0], (votes == before).all()) == (True, 0, True)
        assert [part.shape for part in label_distribution(votes[:0], mode, 8)] == [(0,), (0,), (0, 8)]
    others = np.array([[3, 0, 0], [1, 1, 1], [0, 2, 5]])
    keep, label, target = label_distribution(others, "majority", 2)  # the third column is no class
    assert (keep.tolist(), label.tolist(), target[0].tolist()) == ([True, False, False], [0, -1, -1], [1, 0])
    keep, label, target = label_distribution(others, "majority", 3)
    assert (label.tolist(), target[2].tolist()) == ([0, -1, 2], [0, 2 / 7, 5 / 7])
    with pytest.raises(ValueError, match="unknown label mode 'median'; known: majority, probability"):
        label_distribution(votes, "median", 8)
    with pytest.raises(ValueError, match=r"votes must be \[N, 8 or more\], got \[3, 3\]"):
        label_distribution(others, "majority", 8)


def test_class_prior_by_hand() -> None:
    votes, names = np.eye(8, 10, dtype=int) * 8, [f"image{index}" for index in range(8)]
    more = [
        ("second neutral", [6, 2, 0, 0, 0, 0, 0, 0, 2, 0]),  # 6/8 and 2/8: unknown is not counted
        ("second neutral", [0, 1, 8, 0, 0, 0, 0, 0, 0, 0]),  # not the first of its name
        ("", [5, 0, 0, 0, 5, 0, 0, 0, 0, 0]),  # no name
        ("weak", [4, 0, 0, 2, 2, 2, 0, 0, 0, 0]),  # fewer than 5 votes
        ("tie", [5, 5, 0, 0, 0, 0, 0, 0, 0, 0]),  # the lowest column wins: neutral
        ("unknown", [4, 0, 0, 0, 0, 0, 0, 0, 6, 0]),
    ]
    all_votes = np.array([*votes, *(row for _, row in more)])
    prior = class_prior(all_votes, np.array(names + [name for name, _ in more]), 5, CLASSES)
    expected = np.eye(8)
    expected[0, :2] = (1 + 6 / 8 + 5 / 10) / 3, (0 + 2 / 8 + 5 / 10) / 3
    np.testing.assert_allclose(prior, expected, rtol=1e-12)
    votes[[5, 7]] = 1
    assert refusal(class_prior, votes, np.array(names), 5, CLASSES) == (
        "class prior: no training image is won by disgust, contempt with 5 votes or more: "
        "lower split.prior_min_votes in the data set's file in datasets/ or use more training data"
    )


def test_a_class_by_its_other_names() -> None:
    names = {"Happy": "happiness", " angry ": "anger", "FEAR": "fear", "bored": None, "1": None}
    assert {name: emotion(name) for name in names} == names


@pytest.mark.slow
@pytest.mark.skipif("FERPLUS_DIR" not in os.environ, reason="FERPLUS_DIR does not name the folder with the real FER+")
def test_the_published_votes() -> None:
    assert (*CLASSES, "unknown", "NF") == VOTE_COLUMNS
    table = pd.read_csv(Path(os.environ["FERPLUS_DIR"]) / "fer2013new.csv", keep_default_na=False)
    votes = table[list(VOTE_COLUMNS)].to_numpy()
    keep, _, _ = label_distribution(votes, "majority", 8)
    assert table["Usage"][keep].value_counts().to_dict() == {"Training": 25060, "PublicTest": 3199, "PrivateTest": 3153}
    training = (table["Usage"] == "Training").to_numpy()
    prior = class_prior(votes[training], table["Image name"].to_numpy()[training], 5, CLASSES)
    published = [0.777334, 0.03261, 0.017447, 0.114091, 0.026224, 0.007145, 0.004379, 0.020772]
    np.testing.assert_allclose(prior[0], published, atol=5e-7, rtol=0)
    np.testing.assert_allclose(prior.sum(axis=1), 1, rtol=1e-12)
