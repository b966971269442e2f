"""Classes of two data sets are partners by what they mean."""

import pytest

from fer.data.aliases import doubles, match

OURS = ["neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt"]
SAME = {
    "happy": 1, "joy": 1, "surprised": 2, "sad": 3, "angry": 4, "disgusted": 5, "fearful": 6, "afraid": 6, "calm": 0,
    "natural": 0, "contemptuous": 7, "Contempt": 7, " 0_Neutral ": 0, "07 - HAPPY": 1, "3.sad": 3, "(4) angry": 4,
}  # fmt: skip


@pytest.mark.parametrize("theirs", SAME)
def test_a_name_and_its_partner_in_both_directions(theirs: str) -> None:
    found, back = match(OURS, ["bored", theirs]), match(["bored", theirs], OURS)
    assert (found.names, found.ours, found.theirs) == (OURS, list(range(8)), [-1, SAME[theirs]])
    assert (back.names, back.shared) == (["bored", theirs], [1])
    assert back.theirs == [1 if place == SAME[theirs] else -1 for place in range(8)]


def test_what_is_no_alias() -> None:
    """A number alone is none: 3 is another expression in RAF-DB than in AffectNet."""
    for name in ("3", " 03_", "", "unhappy", "neutral face"):
        assert match(OURS, [name, "sad"]).theirs == [-1, 3]
    found = match(["0", "1", "2"], ["0", "1", "2"])
    assert (found.names, found.theirs, found.shared) == (["0", "1", "2"], [-1, -1, -1], [])


def test_two_classes_that_may_be_one() -> None:
    """As where two people have labelled, or one has mistyped."""
    for one, other in (("happy", "happiness"), ("Angry", "anger"), ("happiness", "hapiness"), ("Smiling", "smilling")):
        assert doubles(["fear", one, other, "bored"]) == [(one, other)]
    assert doubles(OURS) == []
    for one, other in (("class 1", "class 2"), ("sad", "bad"), ("positive", "negative"), ("contempt", "content")):
        assert doubles(["fear", one, other]) == []


def test_a_name_that_both_have_means_itself() -> None:
    """Acted sets have calm beside neutral; one that has only one of them cannot tell them apart."""
    both = ["Calm", "neutral", "Bored"]
    assert match(both, ["01_neutral", "02_calm", "bored"]).theirs == [1, 0, 2]
    assert match(["neutral"], ["neutral", "calm"]).theirs == [0, 0]
    one = match(both, ["natural", "happy"])
    assert (one.names, one.ours, one.theirs) == (["Calm or neutral", "Bored"], [0, 0, 1], [0, -1])
