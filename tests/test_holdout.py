"""Val and test for data sets without: whole subjects, all classes in proportion, the same for the same seed."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fer.data.holdout import hold_out
from fer.errors import UserError


def table(usages: list[str], subjects: list[str], pictures: list[str] | None = None) -> pd.DataFrame:
    return pd.DataFrame(
        {"usage": usages, "subject": subjects, "sha1": pictures or [str(i) for i in range(len(usages))]}
    )


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=60),
    st.sampled_from(["", "train"]),
    st.integers(0, 99),
)
def test_no_subject_is_on_two_sides_and_no_class_leaves_train(
    images: list[tuple[int, int]], usage: str, seed: int
) -> None:
    labels = np.array([label for _, label in images])
    rows = table([usage] * len(images), [f"s{subject}" for subject, _ in images])
    try:
        found = hold_out(rows, labels, 0.1, 0.2, seed)
    except UserError:
        assert len({subject for subject, _ in images}) < 9  # with so many there is always one to take
        return
    assert set(found["usage"]) == ({"train", "val", "test"} if usage == "" else {"train", "val"})
    assert found.groupby("subject")["usage"].nunique().max() == 1
    assert set(labels[found["usage"] == "train"]) == set(labels)


def test_shares_are_those_of_each_class() -> None:
    labels = np.repeat([0, 1, 2, -1], [600, 300, 100, 50])  # the last have no label
    rows = table([""] * 1050, [""] * 1050)
    found = hold_out(rows, labels, 0.1, 0.2, 1)
    counts = {
        usage: np.bincount(labels[(found["usage"] == usage) & (labels >= 0)]).tolist() for usage in set(found["usage"])
    }
    assert counts == {"train": [420, 210, 70], "val": [60, 30, 10], "test": [120, 60, 20]}
    assert (found["usage"][labels == -1] == "train").all()
    assert hold_out(rows, labels, 0.1, 0.2, 1).equals(found)
    assert not hold_out(rows, labels, 0.1, 0.2, 2).equals(found)


def test_subjects_stay_near_the_shares() -> None:
    rng = np.random.default_rng(0)
    labels, people = rng.integers(0, 7, 981), rng.integers(0, 118, 981)
    found = hold_out(table([""] * 981, [f"S{person}" for person in people]), labels, 0.1, 0.2, 3)["usage"]
    for usage, share in (("val", 0.1), ("test", 0.2)):
        part = np.bincount(labels[found == usage], minlength=7) / np.bincount(labels)
        assert abs(part - share).max() < 0.05


def test_identical_pictures_stay_together_and_test_is_never_touched() -> None:
    pictures = [str(i // 4) for i in range(200)]  # each four times
    found = hold_out(table(["train"] * 160 + ["test"] * 40, [""] * 200, pictures), np.zeros(200, int), 0.1, 0.2, 0)
    assert found["usage"].tolist()[160:] == ["test"] * 40
    assert (found["usage"] == "val").sum() == 16
    assert found.groupby("sha1")["usage"].nunique().max() == 1


def test_too_few_are_named() -> None:
    with pytest.raises(UserError) as caught:
        hold_out(table(["train"] * 2, ["a"] * 2), np.zeros(2, int), 0.1, 0.2, 0)
    assert str(caught.value) == (
        "split val: none in the data set, and train has too few images or subjects to take one out of it "
        "(2 images, 1 subjects or different images): add images, or a split val"
    )
