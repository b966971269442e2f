"""Which of the recorded runs is champion: the rule, and what follows from the history of decisions. Pure functions."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import pandas as pd

from fer import statistics
from pipelines.params import Promotion

PROMOTE, CHALLENGE, KEEP, REFUSE = "promote", "challenge", "keep", "refuse"
RUN, HAND, ROLLBACK, FOUND, DELETED = "run", "by hand", "rollback", "found", "deleted"  # what made a record


@dataclass(frozen=True)
class Candidate:
    """What is known of a version on val; None where it is not."""

    name: str
    data_hash: str | None = None
    val_images: int | None = None
    label_rule: str | None = None
    classes: str | None = None
    accuracy: float | None = None
    uar: float | None = None
    ece: float | None = None
    predictions: pd.DataFrame | None = None  # row, label and prediction of each val image


@dataclass(frozen=True)
class Verdict:
    """`outcome` is challenge for a run that is better on val, but not so that it becomes champion."""

    outcome: str
    reason: str
    p: float | None = None  # exact McNemar, where the predictions of both are known


def decide(new: Candidate, champion: Candidate | None, rules: Promotion) -> Verdict:
    """Whether `new` takes the place of the champion, from their results on val alone."""
    if champion is None:
        return Verdict(PROMOTE, "there is no champion yet")
    for one in (champion, new):
        if one.accuracy is None or one.data_hash is None:
            return Verdict(REFUSE, f"nothing to compare: {one.name} has no val accuracy or no data hash")
    if other := _other_data(new, champion):
        return Verdict(REFUSE, f"{champion.name} was made with {other}, so their val accuracies do not compare")
    gap, p = _points(new.accuracy, champion.accuracy), _mcnemar(new, champion)
    on = f"{'' if new.val_images is None else f'{new.val_images:,} '}val images"
    tested = "" if p is None else f", McNemar p {p:.2g}"
    if gap <= 0:
        said = f"{-gap:.2f} points below" if gap else "equal to"
        return Verdict(KEEP, f"{said} {champion.name} on the same {on}{tested}", p)
    better = f"{gap:.2f} points above {champion.name} on the same {on}{tested}"
    if short := _short(new, champion, gap, p, rules):
        return Verdict(CHALLENGE, f"{better}, but {short}", p)
    return Verdict(PROMOTE, better, p)


def _short(new: Candidate, champion: Candidate, gap: float, p: float | None, rules: Promotion) -> str:
    """What a run with a better val accuracy lacks; empty if nothing."""
    lost, gained = _points(champion.uar, new.uar), _points(new.ece, champion.ece)
    if rules.uar_drop is not None and lost > rules.uar_drop:
        return f"UAR is {lost:.2f} points below (uar_drop: {rules.uar_drop:g})"
    if rules.ece_rise is not None and gained > rules.ece_rise:
        return f"ECE is {gained:.2f} points above (ece_rise: {rules.ece_rise:g})"
    if rules.margin == "significant":
        if p is None:
            return "without the val predictions of both there is no test (margin: significant)"
        return "" if p < 1 - statistics.LEVEL else "that is not told apart from chance (margin: significant)"
    return "" if gap >= rules.margin else f"that is not enough (margin: {rules.margin:g})"


def _points(one: float | None, other: float | None) -> float:
    """`one` minus `other` in points, without noise of floats; 0 where one is not known."""
    return 0.0 if one is None or other is None else round(100 * (one - other), 4)


def _other_data(new: Candidate, champion: Candidate) -> str:
    """In which respect the data of two versions differ; empty if in none."""
    kinds = {"label rule": "label_rule", "classes": "classes", "val images": "val_images"}
    for shown, key in kinds.items():
        ours, theirs = getattr(new, key), getattr(champion, key)
        if None not in (ours, theirs) and ours != theirs:
            return f"other {shown} ({theirs}, not {ours})"
    return "" if new.data_hash == champion.data_hash else f"other data ({champion.data_hash}, not {new.data_hash})"


def _mcnemar(new: Candidate, champion: Candidate) -> float | None:
    ours, theirs = new.predictions, champion.predictions
    if ours is None or theirs is None or not ours[["row", "label"]].equals(theirs[["row", "label"]]):
        return None
    first, second = ((one["prediction"] == one["label"]).to_numpy() for one in (ours, theirs))
    return statistics.mcnemar(first, second)


@dataclass(frozen=True)
class Record:
    """One decision on a registered model. Versions are their numbers."""

    id: str
    what: str
    version: str
    run: str
    before: str | None  # the champion
    champion: str | None  # after it
    outcome: str
    reason: str
    who: str
    when: float
    commit: str
    data_hash: str = ""  # of `version`
    evidence: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """The champions until now, the present one last, and those that challenged it, the best first."""

    champions: tuple[str, ...] = ()
    challengers: tuple[str, ...] = ()

    @property
    def champion(self) -> str | None:
        """Version of the present champion; None before the first."""
        return self.champions[-1] if self.champions else None

    def previous(self, existing: Collection[str]) -> str | None:
        """To which champion a rollback leads, of the versions that exist."""
        return next((one for one in self.champions[-2::-1] if one in existing and one != self.champion), None)

    def aliases(self, existing: Collection[str]) -> dict[str, str]:
        """Alias -> version, of the versions that exist."""
        challenger = next((one for one in self.challengers if one in existing), None)
        found = {"champion": self.champion, "challenger": challenger, "previous": self.previous(existing)}
        return {alias: version for alias, version in found.items() if version is not None and version in existing}


def state(records: Iterable[Record]) -> State:
    """What the decisions lead to. A rollback takes back champions, everything else adds one."""
    champions, challenges = list[str](), list[Record]()
    for record in records:
        if record.what == ROLLBACK:
            while champions[-1:] not in ([], [record.champion]):
                champions.pop()
        elif record.champion is not None and champions[-1:] != [record.champion]:
            champions.append(record.champion)
        if record.champion != record.before:
            challenges = []
        elif record.outcome == CHALLENGE:
            challenges.append(record)
    challenges.sort(key=lambda record: -record.evidence.get("val_accuracy", 0.0))  # of equal ones the first stays first
    return State(tuple(champions), tuple(record.version for record in challenges))


def best_left(deleted: str | None, left: Sequence[tuple[str, Candidate]]) -> str | None:
    """Of the versions on the data `deleted`, a hash, the one with the best val accuracy, the first of several."""
    same = [(version, one) for version, one in left if one.data_hash == deleted and one.accuracy is not None]
    fit = [(one.accuracy, -int(version)) for version, one in same]
    return str(-max(fit)[1]) if fit else None
