"""Which classes of two data sets mean the same expression, whatever the data sets call them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import combinations

from fer.data.labels import emotion

SLIP = 0.85  # likeness of two names from which one may be a slip of the other: hapiness, happiness have .94
CALM = {"calm": "neutral", "natural": "neutral"}  # some data sets have calm beside neutral: then it is no alias


@dataclass(frozen=True)
class Match:
    """Classes `names`, each made of one class of ours or of several with the same meaning, and what falls on them."""

    names: list[str]
    ours: list[int]  # for each of our classes its place in `names`
    theirs: list[int]  # for each of their classes its place in `names`; -1: it has no partner

    @property
    def shared(self) -> list[int]:
        """The places in `names` that have a partner, in order."""
        return sorted(set(self.theirs) - {-1})


def match(ours: Sequence[str], theirs: Sequence[str]) -> Match:
    """Match the classes of two data sets by their meaning.

    Case, blanks, and a number before the name (0_neutral) do not count. A name that both sides have means itself, any
    other what `labels.emotion` and CALM make of it. A number alone is no name and has no partner, since data sets
    number their classes in different orders.
    """
    both = {_plain(name) for name in ours} & {_plain(name) for name in theirs}

    def meaning(name: str) -> str:
        plain = _plain(name)
        return plain if plain in both else emotion(plain) or CALM.get(plain, plain)

    parts: dict[str, list[str]] = {}
    for name in ours:
        parts.setdefault(meaning(name) or name, []).append(name)
    place = {key: number for number, key in enumerate(parts)}
    return Match(
        [" or ".join(names) for names in parts.values()],
        [place[meaning(name) or name] for name in ours],
        [place.get(meaning(name), -1) for name in theirs],
    )


def doubles(classes: Sequence[str]) -> list[tuple[str, str]]:
    """Classes of one data set that may be the same: happy and happiness, or a misspelt label beside the right one."""

    def alike(one: str, other: str) -> bool:
        if emotion(one) and emotion(other):
            return emotion(one) == emotion(other)
        numbered = re.search(r"\d", one + other)  # class 1 and class 2
        return not numbered and SequenceMatcher(None, one.lower(), other.lower()).ratio() >= SLIP

    return [pair for pair in combinations(classes, 2) if alike(*pair)]


def _plain(name: str) -> str:
    return re.sub(r"^[\d\s_.:()-]+", "", name).strip().lower()
