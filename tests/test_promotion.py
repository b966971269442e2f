"""Who becomes champion, from results on val alone, and what a history of decisions leads to."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipelines.params import Promotion
from pipelines.promotion import Candidate, Record, best_left, decide, state

CHAMPION = Candidate("version 3", "d", 400, "majority", "calm, glad", 0.8, 0.7, 0.05)


def predicted(wrong: range, images: int = 400) -> pd.DataFrame:
    """Of images all of class 0, those in `wrong` wrong."""
    rows = np.arange(images)
    return pd.DataFrame({"row": rows, "label": "calm", "prediction": np.where(np.isin(rows, wrong), "glad", "calm")})


def beside(wrong: range, champion: range = range(80), images: int = 400, **changes: Any) -> tuple[Candidate, Candidate]:
    """A run and the champion, with the predictions of both on the same images."""
    sides = (predicted(wrong, images), predicted(champion, images))
    new, old = (
        replace(CHAMPION, accuracy=float((one["prediction"] == "calm").mean()), val_images=images, predictions=one)
        for one in sides
    )
    return replace(new, name="version 4", **changes), old


def like(**changes: Any) -> tuple[Candidate, Candidate]:
    return replace(CHAMPION, **{"name": "version 4", "accuracy": 0.81, **changes}), CHAMPION


SAME, OTHER = "version 3 on the same 400 val images", "version 3 was made with other"
WITHOUT = {"margin": "significant"}
NO_TEST = "without the val predictions of both there is no test"
STRANGE = "label rule (majority, not probability), so their val accuracies do not compare"
CASES: dict[str, tuple[tuple[Candidate, Candidate | None], dict[str, Any], str, str]] = {
    "the first one": ((CHAMPION, None), {}, "promote", "there is no champion yet"),
    "a tie": (like(accuracy=0.8), {}, "keep", f"equal to {SAME}"),
    "worse": (like(accuracy=0.79), {}, "keep", f"1.00 points below {SAME}"),
    "other label rule": (like(label_rule="probability", accuracy=0.99), {}, "refuse", f"{OTHER} {STRANGE}"),
    "other val": (like(val_images=500, data_hash="e"), {}, "refuse", f"{OTHER} val images (400, not 500)"),
    "other data": (like(label_rule=None, data_hash="e"), {}, "refuse", f"{OTHER} data (d, not e)"),
    "of an earlier version": (like(label_rule=None, classes=None, uar=None, ece=None), {}, "promote", "1.00 points"),
    "a champion that states nothing": (
        (CHAMPION, Candidate("version 1")), {}, "refuse", "nothing to compare: version 1 has no val accuracy",
    ),
    "states nothing": ((Candidate("version 4"), CHAMPION), {}, "refuse", "nothing to compare: version 4 has"),
    "margin reached": (like(accuracy=0.805), {"margin": 0.5}, "promote", f"0.50 points above {SAME}"),
    "margin missed": (like(accuracy=0.805), {"margin": 0.51}, "challenge", "but that is not enough (margin: 0.51)"),
    "UAR at the guard": (like(uar=0.65), {}, "promote", "1.00 points above"),
    "worse UAR": (like(uar=0.6499), {}, "challenge", f"above {SAME}, but UAR is 5.01 points below (uar_drop: 5)"),
    "worse UAR, no guard": (like(uar=0.1), {"uar_drop": None}, "promote", "1.00 points above"),
    "worse ECE": (like(ece=0.2), {"ece_rise": 10}, "challenge", "but ECE is 15.00 points above (ece_rise: 10)"),
    "significant": (beside(range(40, 80)), WITHOUT, "promote", f"10.00 points above {SAME}, McNemar p 1.8e-12"),
    "5 of 5 images": (  # two-sided: 2 / 2**5
        beside(range(5, 80)), WITHOUT, "challenge", "McNemar p 0.062, but that is not told apart from chance",
    ),
    "6 of 6 images": (beside(range(6, 80)), WITHOUT, "promote", "McNemar p 0.031"),
    "no predictions": (like(), WITHOUT, "challenge", NO_TEST),
    "predictions of other images": (like(predictions=predicted(range(9), 300)), WITHOUT, "challenge", NO_TEST),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_rule(case: str) -> None:
    (new, champion), rules, outcome, reason = CASES[case]
    verdict = decide(new, champion, Promotion(**rules))
    assert (verdict.outcome, reason in verdict.reason) == (outcome, True), verdict


def record(version: int, champion: int, outcome: str = "promote", what: str = "run", accuracy: float = 0.5) -> dict:
    """A decision after which `champion` is champion."""
    evidence = {"val_accuracy": accuracy}
    return {"version": f"{version}", "champion": f"{champion}", "outcome": outcome, "what": what, "evidence": evidence}


RISE = [record(1, 1), record(2, 2), record(3, 3)]
CHALLENGED = [record(1, 1), record(2, 1, "challenge", accuracy=0.6), record(3, 1, "challenge", accuracy=0.55)]
HISTORIES: dict[str, tuple[list[dict[str, Any]], str, str]] = {  # existing versions; champion, challenger, previous
    "nothing": ([], "1", "---"),
    "better and better": (RISE, "123", "3-2"),
    "worse and refused": ([RISE[0], record(2, 1, "keep"), record(3, 1, "refuse")], "123", "1--"),
    "rolled back": ([*RISE, record(2, 2, what="rollback")], "123", "2-1"),
    "rolled back over a deleted one": ([*RISE, record(1, 1, what="rollback")], "13", "1--"),
    "an old one by hand": ([*RISE, record(1, 1, what="by hand")], "123", "1-3"),
    "by hand, then a worse run": ([*RISE, record(1, 1, what="by hand"), record(4, 1, "keep")], "1234", "1-3"),
    "the champion deleted": (RISE, "12", "--2"),
    "the champion deleted, the best left": ([*RISE, record(1, 1, what="deleted")], "12", "1-2"),
    "the better challenger": (CHALLENGED, "123", "12-"),
    "a challenger deleted": (CHALLENGED, "13", "13-"),
    "a challenger by hand": ([*CHALLENGED, record(2, 2, what="by hand")], "123", "2-1"),
}


@pytest.mark.parametrize("case", HISTORIES)
def test_where_a_history_leads(case: str) -> None:
    changes, existing, expected = HISTORIES[case]
    records, before = [], None
    for number, change in enumerate(changes):
        about = {"run": "", "reason": "", "who": "", "when": 0.0, "commit": "", "before": before}
        records.append(Record(id=str(number), **about, **change))
        before = change["champion"]
    aliases = state(records).aliases(existing)
    assert "".join(aliases.get(alias, "-") for alias in ("champion", "challenger", "previous")) == expected


def test_the_best_of_those_left_is_on_the_same_data_and_the_first_of_equals() -> None:
    left = [("10", like()[0]), ("2", like()[0]), ("4", CHAMPION), ("5", like(data_hash="e", accuracy=0.9)[0])]
    assert best_left("d", [*left, ("6", Candidate("x", "d"))]) == "2"
    assert best_left("f", left) is None
