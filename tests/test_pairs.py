"""Neutral partners are neutral, of the same person where that is asked, never the image itself, and all alike drawn."""

import numpy as np
import torch
from conftest import refusal
from hypothesis import given, settings
from hypothesis import strategies as st

from fer.data.dataset import Split
from fer.data.pairs import Pairs

CLASSES = ["anger", "neutral", "fear"]  # neutral is not class 0
ANGER, NEUTRAL, FEAR = range(3)
LABELS = [NEUTRAL, ANGER, NEUTRAL, FEAR, NEUTRAL, NEUTRAL, ANGER, NEUTRAL]
SUBJECTS = ["b", "b", "a", "a", "b", "a", "a", "b"]


def split_of(labels: list[int], subjects: list[str] | None = None, name: str = "train") -> Split:
    images = len(labels)
    return Split(
        name=name,
        images=np.zeros((100 + images, 1, 1), np.uint8),
        rows=np.arange(images)[::-1] + 100,  # positions are not rows
        names=[""] * images,
        subjects=subjects or [""] * images,
        labels=torch.tensor(labels),
        targets=torch.zeros(images, 3),
        in_train=torch.zeros(images, dtype=torch.bool),
        in_val=torch.zeros(images, dtype=torch.bool),
        near=torch.zeros(images, dtype=torch.bool),
    )


def test_random_partners_are_uniform_over_the_other_neutral_faces() -> None:
    pairs, epochs, counts = Pairs(split_of(LABELS, SUBJECTS), CLASSES, False), 2000, np.zeros((8, 8))
    for epoch in range(epochs):
        counts[np.arange(8), pairs.drawn(3, epoch)] += 1
    neutral = np.array(LABELS) == NEUTRAL
    allowed = neutral & ~np.eye(8, dtype=bool)
    share = allowed / allowed.sum(1, keepdims=True)
    # of 35 shares none is farther off than five standard errors, which chance does once in 50,000 times
    assert (abs(counts / epochs - share) <= 5 * np.sqrt(share * (1 - share) / epochs)).all()


def test_partners_come_from_seed_and_epoch() -> None:
    split = split_of(LABELS * 5, SUBJECTS * 5)
    one, other = (Pairs(split, CLASSES, True) for _ in range(2))
    other.drawn(9, 9)  # earlier draws do not matter
    assert one.drawn(1, 2).tolist() == other.drawn(1, 2).tolist()
    assert len({tuple(one.drawn(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_references_are_different_neutral_faces_each_as_likely() -> None:
    pairs, counts = Pairs(split_of([NEUTRAL] * 10 + [FEAR] * 5), CLASSES, False), np.zeros(15)
    for seed in range(2000):
        counts[pairs.references(3, seed)] += 1  # a face that came twice would count once
    wanted = np.array([0.3] * 10 + [0] * 5)
    np.testing.assert_array_less(abs(counts / 2000 - wanted), 5 * np.sqrt(0.3 * 0.7 / 2000))
    assert counts[10:].sum() == 0
    assert pairs.references(3, 5).tolist() == pairs.references(3, 5).tolist()
    assert sorted(pairs.references(10, seed=5)) == list(range(10))


# What the data do not hold

ELSE = "choose random_neutral or prototype"
NO_SUBJECTS = f"same_subject needs data that name subjects; {ELSE}"
ALONE = f"subject c has no neutral face besides the image itself; leave the subject out or {ELSE}"


def test_data_that_do_not_hold_the_pairs() -> None:
    for labels, subjects, message in (
        ([ANGER, FEAR, NEUTRAL], ["a"] * 3, "train has 1 neutral faces, at least two are needed"),
        (LABELS, ["", *SUBJECTS[1:]], NO_SUBJECTS),
        ([*LABELS, ANGER], [*SUBJECTS, "c"], ALONE),  # no neutral face at all
        ([*LABELS, NEUTRAL], [*SUBJECTS, "c"], ALONE),  # one, which is itself to be told
    ):
        assert refusal(Pairs, split_of(labels, subjects), CLASSES, True) == f"model.pairing: {message}"
    assert refusal(Pairs, split_of(LABELS), ["anger", "Neutral", "fear"], False) == (
        "model.pairing: the data have no class 'neutral', which this model compares with"
    )


# Any data


@settings(max_examples=50, deadline=None)  # a busy machine is no fault
@given(
    st.lists(st.tuples(st.sampled_from([NEUTRAL, NEUTRAL, ANGER]), st.sampled_from("abc")), min_size=1, max_size=30),
    st.booleans(),
    st.integers(0, 2**40),
)
def test_any_labels_and_subjects(images: list[tuple[int, str]], same_subject: bool, seed: int) -> None:
    """Every image gets a partner from those that a plain search finds, or the data are refused."""
    labels, subjects = map(list, zip(*images))
    choices = [
        [
            other
            for other, (label, person) in enumerate(images)
            if label == NEUTRAL and other != mine and (not same_subject or person == subjects[mine])
        ]
        for mine in range(len(images))
    ]
    if labels.count(NEUTRAL) < 2 or not all(choices):
        assert refusal(Pairs, split_of(labels, subjects), CLASSES, same_subject).startswith("model.pairing: ")
        return
    pairs = Pairs(split_of(labels, subjects), CLASSES, same_subject)
    assert pairs.fixed().tolist() == [found[0] for found in choices]
    for epoch in range(5):
        drawn = pairs.drawn(seed, epoch).tolist()
        assert all(partner in found for partner, found in zip(drawn, choices, strict=True))
