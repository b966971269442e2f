"""Val and test for data sets without: whole subjects, all classes in proportion, the same for the same seed."""

import numpy as np
import pandas as pd
from conftest import refusal
from hypothesis import given, settings
from hypothesis import strategies as st

from fer.data.holdout import hold_out
from fer.errors import UserError


def table(usages: list[str], subjects: list[str], pictures: list[str] | None = None) -> pd.DataFrame:
    sha1 = pictures or [str(i) for i in range(len(usages))]
    return pd.DataFrame({"usage": usages, "subject": subjects, "sha1": sha1})


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3), st.booleans()), min_size=1, max_size=60),
    st.sampled_from(["", "train"]),
    st.integers(0, 99),
)
def test_no_subject_and_no_picture_is_on_two_sides_and_no_class_leaves_train(
    images: list[tuple[int, int, bool]], usage: str, seed: int
) -> None:
    labels, groups = np.array([label for _, label, _ in images]), [f"{group}" for group, *_ in images]
    known = ["" if unknown else group for group, (*_, unknown) in zip(groups, images)]
    rows = table([usage] * len(images) + ["test"], [*known, "x"], [*groups, "x"])
    try:
        found = hold_out(rows, np.append(labels, 0), 0.1, 0.2, seed)
    except UserError:
        assert len(set(groups)) < 9  # with so many there is always one to take
        return
    assert found["usage"].iloc[-1] == "test"
    found = found[:-1]
    assert set(found["usage"]) == ({"train", "val", "test"} if usage == "" else {"train", "val"})
    for key in ("subject", "sha1"):
        assert found[found[key] != ""].groupby(key)["usage"].nunique().max() in (1, np.nan)
    assert set(labels[found["usage"] == "train"]) == set(labels)


def test_shares_are_those_of_each_class() -> None:
    labels = np.repeat([0, 1, 2, -1], [600, 300, 100, 50])  # the last have no label
    rows = table([""] * 1050, [""] * 1050)
    found = hold_out(rows, labels, 0.1, 0.2, 1)
    counts = found.groupby(["usage", labels]).size().unstack(fill_value=0).T.to_dict("list")
    assert counts == {"train": [50, 420, 210, 70], "val": [0, 60, 30, 10], "test": [0, 120, 60, 20]}
    assert hold_out(rows, labels, 0.1, 0.2, 1).equals(found)
    assert not hold_out(rows, labels, 0.1, 0.2, 2).equals(found)


def test_subjects_stay_near_the_shares() -> None:
    rng = np.random.default_rng(0)
    labels, people = rng.integers(0, 7, 981), rng.integers(0, 118, 981)
    found = hold_out(table([""] * 981, [f"S{person}" for person in people]), labels, 0.1, 0.2, 3)["usage"]
    for usage, share in (("val", 0.1), ("test", 0.2)):
        part = np.bincount(labels[found == usage], minlength=7) / np.bincount(labels)
        assert abs(part - share).max() < 0.05


def test_too_few_are_named() -> None:
    message = refusal(hold_out, table(["train"] * 2, ["a"] * 2), np.zeros(2, int), 0.1, 0.2, 0)
    assert message.startswith("split val: none in the data set, and train has too few images or subjects to take one")
