"""Classes of two data sets are partners by what they mean."""

import pytest

from fer.data.aliases import match

OURS = ["neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt"]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("happy", "happiness"), ("joy", "happiness"), ("surprised", "surprise"), ("sad", "sadness"),
        ("angry", "anger"), ("disgusted", "disgust"), ("fearful", "fear"), ("afraid", "fear"), ("calm", "neutral"),
        ("natural", "neutral"), ("contemptuous", "contempt"), ("Contempt", "contempt"), (" 0_Neutral ", "neutral"),
        ("07 - HAPPY", "happiness"), ("3.sad", "sadness"), ("(4) angry", "anger"),
    ],
)  # fmt: skip
def test_a_name_and_its_partner_in_both_directions(theirs: str, ours: str) -> None:
    found = match(OURS, ["bored", theirs])
    assert (found.names, found.ours, found.theirs) == (OURS, list(range(8)), [-1, OURS.index(ours)])
    back = match(["bored", theirs], OURS)
    assert (back.names, back.shared) == (["bored", theirs], [1])
    assert back.theirs == [1 if name == ours else -1 for name in OURS]


@pytest.mark.parametrize("name", ["3", " 03_", "", "unhappy", "neutral face"])
def test_what_is_no_alias(name: str) -> None:
    assert match(OURS, [name, "sad"]).theirs == [-1, 3]
    assert match([name, "other"], OURS).shared == []


def test_numbers_are_no_names() -> None:
    """3 is another expression in RAF-DB than in AffectNet."""
    found = match(["0", "1", "2"], ["0", "1", "2"])
    assert (found.names, found.theirs, found.shared) == (["0", "1", "2"], [-1, -1, -1], [])


def test_a_name_that_both_have_means_itself() -> None:
    """Acted sets have calm beside neutral; one that has only one of them cannot tell them apart."""
    both = ["Calm", "neutral", "Bored"]
    assert match(both, ["01_neutral", "02_calm", "bored"]).theirs == [1, 0, 2]
    assert match(["neutral"], ["neutral", "calm"]).theirs == [0, 0]
    one = match(both, ["natural", "happy"])
    assert (one.names, one.ours, one.theirs) == (["Calm or neutral", "Bored"], [0, 0, 1], [0, -1])
