"""ASHA's rule on paper: who is promoted when, worked out by hand, and found again from what is on disk."""

import random
from pathlib import Path

import pytest

from pipelines.halving import Halving, expected_epochs, rungs_of
from pipelines.trials import DONE, FAILED, PRUNED, RUNNING, Trial

Curves = dict[int, dict[int, float]]  # number of a trial -> epoch -> best val accuracy so far


def trial(number: int, state: str, *accuracies: float) -> Trial:
    rows = tuple({"epoch": i + 1, "val_accuracy": value} for i, value in enumerate(accuracies))
    return Trial(number, {}, state, None, Path(), rows)


@pytest.mark.parametrize(
    ("grace", "reduction", "epochs", "rungs"),
    [
        (2, 4, 10, [2]),  # 8 would be right before the end
        (1, 3, 9, [1, 3]),
        (1, 2, 16, [1, 2, 4, 8]),  # half of them is not yet the second half
        (5, 3, 40, [5, 15]),
        (4, 3, 20, [4]),
        (3, 2, 5, []),
    ],
)
def test_no_rung_is_in_the_second_half(grace: int, reduction: int, epochs: int, rungs: list[int]) -> None:
    assert rungs_of(grace, reduction, epochs) == rungs


def run(halving: Halving, curves: Curves, new: list[int], epochs: int) -> list[tuple[int, int]]:
    """One worker: (trial, epoch at which it stops) in order. A trial that was promoted starts from its first row."""
    stops, waiting = [], list(new)
    while (number := halving.next(more=bool(waiting))) is not None or waiting:
        if number is None:
            number = waiting.pop(0)
        else:
            halving.promote(number)
        stops.append((number, _advance(halving, number, curves[number], epochs)))
    return stops


def _advance(halving: Halving, number: int, curve: dict[int, float], epochs: int) -> int:
    for epoch, best in curve.items():
        if halving.pauses(number, epoch, best):
            return epoch
    return epochs


def test_promotions_with_reduction_2() -> None:
    """Rungs 1 and 2. Two trials: the better goes on, 2. Three: 3, and of {2, 3} again 3. Four: 3 and 2 went on."""
    curves = {1: {1: 0.5}, 2: {1: 0.6, 2: 0.65}, 3: {1: 0.7, 2: 0.72}, 4: {1: 0.4}}
    stops = run(Halving(rungs_of(1, 2, 5), 2, []), curves, list(curves), 5)
    assert stops == [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 5), (4, 1)]


def test_promotions_with_reduction_3() -> None:
    """One rung. Best of three: 2. Best of four: 4. Best two of six: 4 and 2. Best two of seven: 7 and 4."""
    accuracies = (0.3, 0.5, 0.4, 0.6, 0.2, 0.1, 0.7)
    curves = {number: {2: value} for number, value in enumerate(accuracies, 1)}
    stops = run(Halving(rungs_of(2, 3, 10), 3, []), curves, list(curves), 10)
    assert stops == [(1, 2), (2, 2), (3, 2), (2, 10), (4, 2), (4, 10), (5, 2), (6, 2), (7, 2), (7, 10)]


def test_by_level_all_come_to_a_rung_before_any_goes_on() -> None:
    """As with reduction 2 above, but of four at rung 1 the best two are 3 and 2, and of these 3."""
    curves = {1: {1: 0.5}, 2: {1: 0.6, 2: 0.65}, 3: {1: 0.7, 2: 0.72}, 4: {1: 0.4}}
    halving = Halving(rungs_of(1, 2, 5), 2, [], by_level=True)
    assert run(halving, curves, list(curves), 5) == [(1, 1), (2, 1), (3, 1), (4, 1), (3, 2), (2, 2), (3, 5)]


@pytest.mark.parametrize("seed", range(5))
def test_by_level_the_epochs_are_those_of_the_rule(seed: int) -> None:
    random.seed(seed)
    rungs = rungs_of(1, 3, 20)
    curves = {n: {rung: random.random() for rung in rungs} for n in range(1, 30)}
    stops = run(Halving(rungs, 3, [], by_level=True), curves, list(curves), 20)
    assert [epoch for _, epoch in stops] == [1] * 29 + [3] * 9 + [9] * 3 + [20]
    assert sum(dict(stops).values()) == expected_epochs(rungs, 3, 29, 20) == 29 * 1 + 9 * 2 + 3 * 6 + 1 * 11


def test_the_highest_rung_comes_first_and_of_equals_the_earlier_trial() -> None:
    halving = Halving([1, 2], 2, [])
    assert all(halving.pauses(number, 1, 0.5) for number in (4, 3, 2, 1))
    assert halving.next() == 1
    halving.promote(1)
    assert halving.next() == 2
    halving.promote(2)
    assert halving.next() is None  # two of four
    assert [halving.pauses(number, epoch, 0.6) for number in (1, 2) for epoch in (1, 2)] == [False, True] * 2
    assert [halving.pauses(number, 1, 0.9) for number in (5, 6)] == [True, True]
    assert halving.next() == 1  # at 2, though 5 and 6 are better at 1
    halving.promote(1)
    assert halving.next() == 5


def test_one_that_runs_or_has_ended_is_not_promoted_but_counts() -> None:
    halving = Halving([1], 2, [trial(1, PRUNED, 0.9), trial(2, FAILED, 0.8, 0.7), trial(3, DONE, 0.7, 0.7)])
    assert halving.pauses(4, 1, 0.95)
    assert halving.pauses(5, 1, 0.85)
    assert halving.next() == 4  # the best two of five are 4 and 1
    halving.leave(4)  # its process died
    assert halving.next() is None
    assert halving.pauses(4, 1, 0.95)
    assert halving.next() == 4
    halving.promote(4)
    assert not halving.pauses(4, 1, 0.95)  # nor does it pause there when it dies again
    assert halving.next() is None


def test_a_trial_given_again_passes_the_rungs_it_passed_before() -> None:
    halving = Halving([1, 3], 2, [trial(1, RUNNING, 0.1, 0.2, 0.15), trial(2, RUNNING, 0.3, 0.1), trial(3, RUNNING, 0)])
    assert [halving.pauses(1, epoch, best) for epoch, best in ((1, 0.1), (2, 0.2), (3, 0.2))] == [False, False, True]
    assert [halving.pauses(2, epoch, 0.3) for epoch in (1, 2, 3)] == [False, False, True]  # cut on its way to the rung
    assert halving.pauses(3, 1, 0.0)
    assert halving.reached == {1: {1: 0.1, 2: 0.3, 3: 0.0}, 3: {1: 0.2, 2: 0.3}}


@pytest.mark.parametrize("seed", range(20))
def test_after_a_restart_the_decisions_are_the_same(seed: int) -> None:
    """Cut after any stop, the books made anew from the rows on disk promote the same trials."""
    random.seed(seed)
    epochs, reduction = 16, 2 + seed % 2
    rungs = rungs_of(1, reduction, epochs)
    curves = {n: dict(zip(rungs, sorted(random.choices([0.1, 0.2, 0.3, 0.4], k=len(rungs))))) for n in range(1, 20)}
    whole = run(Halving(rungs, reduction, []), curves, list(curves), epochs)
    assert 20 < len(whole) < 19 * len(rungs)
    for cut in range(len(whole)):
        came = dict(whole[:cut])
        states = {number: DONE if epoch == epochs else RUNNING for number, epoch in came.items()}
        rows = {number: [curves[number].get(i + 1, 0.0) for i in range(epoch)] for number, epoch in came.items()}
        again = Halving(rungs, reduction, [trial(number, states[number], *rows[number]) for number in came])
        for number, epoch in came.items():
            if epoch < epochs:  # given again: it passes what it passed, and waits where it waited
                assert _advance(again, number, curves[number], epochs) == epoch
        assert run(again, curves, [number for number in curves if number not in came], epochs) == whole[cut:]


def test_epochs_that_a_sweep_will_take() -> None:
    assert expected_epochs([4], 3, 12, 20) == 12 * 4 + 4 * 16
    assert expected_epochs([1, 3], 3, 9, 9) == 9 * 1 + 3 * 2 + 1 * 6
    assert expected_epochs([], 3, 9, 9) == 81
