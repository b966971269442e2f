"""The learning rate against its formula, and the settings of each schedule."""

import math
from typing import Any

import pytest
from conftest import small_run

from fer.run import Run
from fer.schedule import SCHEDULES, Schedule, lr_at
from fer.settings import check

LR = 0.1
COSINE = {"name": "cosine", "warmup_epochs": 2, "min_lr_ratio": 0.01}
STEP = {"name": "step", "warmup_epochs": 0, "step_epochs": [10, 20], "step_factors": [0.5, 0.1]}
LINEAR = {"name": "linear", "warmup_epochs": 2, "min_lr_ratio": 0.1}
CONSTANT = {"name": "constant", "warmup_epochs": 0}


def schedule(settings: dict[str, Any], **changes: Any) -> Schedule:
    return SCHEDULES[settings["name"]].model_validate(settings | changes)


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [
        (0, 0.0),
        (0.5, 0.025),  # a quarter of the warm-up
        (1, 0.05),
        (2, 0.1),
        (4, 0.1 * (0.01 + 0.99 * (1 + math.sqrt(0.5)) / 2)),  # cos(pi / 4)
        (6, 0.1 * (0.01 + 0.99 / 2)),  # half-way: cos(pi / 2) = 0
        (10, 0.001),
        (12, 0.001),  # it never rises again
    ],
)
def test_warm_up_then_cosine(epoch: float, rate: float) -> None:
    assert lr_at(schedule(COSINE), LR, epoch, 10) == pytest.approx(rate, abs=1e-15)


@pytest.mark.parametrize(("epoch", "rate"), [(1, 0.05), (2, 0.1), (4, 0.0775), (6, 0.055), (10, 0.01), (12, 0.01)])
def test_warm_up_then_a_straight_line(epoch: float, rate: float) -> None:
    assert lr_at(schedule(LINEAR), LR, epoch, 10) == pytest.approx(rate, abs=1e-15)


@pytest.mark.parametrize(("epoch", "rate"), [(0, 0.1), (9.99, 0.1), (10, 0.05), (19.99, 0.05), (20, 0.01), (30, 0.01)])
def test_factors_of_the_steps_are_of_the_base_rate(epoch: float, rate: float) -> None:
    assert lr_at(schedule(STEP), LR, epoch, 30) == pytest.approx(rate)


def test_a_step_during_the_warm_up_counts_behind_it() -> None:
    slow = schedule(STEP, warmup_epochs=12)
    assert lr_at(slow, LR, 11, 30) == pytest.approx(0.1 * 11 / 12)
    assert lr_at(slow, LR, 12, 30) == pytest.approx(0.05)


def test_without_a_warm_up_the_first_step_has_the_full_rate() -> None:
    for settings in (COSINE, STEP, CONSTANT):
        assert lr_at(schedule(settings, warmup_epochs=0), LR, 0, 30) == LR


def by_formula(settings: dict[str, Any], epoch: float, epochs: int) -> float:
    """The rate over LR, written down once more."""
    warmup = settings["warmup_epochs"]
    if epoch < warmup:
        return epoch / warmup
    if settings["name"] == "cosine":
        low, angle = settings["min_lr_ratio"], math.pi * (epoch - warmup) / (epochs - warmup)
        return low + (1 - low) * math.cos(angle / 2) ** 2  # cos^2(x / 2) = (1 + cos x) / 2
    if settings["name"] == "step":
        return {0: 1.0, 1: 0.5, 2: 0.1}[sum(epoch >= start for start in settings["step_epochs"])]
    return 1.0


@pytest.mark.parametrize("warmup", [0, 0.5, 3])
@pytest.mark.parametrize("settings", [COSINE, COSINE | {"min_lr_ratio": 0.3}, STEP, CONSTANT])
def test_the_whole_course_is_the_formula(settings: dict[str, Any], warmup: float) -> None:
    settings = settings | {"warmup_epochs": warmup}
    points = [step / 7 for step in range(7 * 30 + 1)]
    found = [lr_at(schedule(settings), LR, epoch, 30) for epoch in points]
    assert found == pytest.approx([LR * by_formula(settings, epoch, 30) for epoch in points], rel=1e-12, abs=1e-15)


def test_every_schedule_is_checked() -> None:
    assert {settings["name"] for settings in (COSINE, LINEAR, STEP, CONSTANT)} == set(SCHEDULES)


FAULTS = {
    "steps of a cosine": (COSINE | {"step_epochs": [3]}, "schedule.step_epochs: unknown key of 'cosine'"),
    "ratio of steps": (STEP | {"min_lr_ratio": 0.1},
        "schedule.min_lr_ratio: unknown key of 'step'; known: step_epochs, step_factors, warmup_epochs"),
    "ratio of a constant": (CONSTANT | {"min_lr_ratio": 0.1},
        "schedule.min_lr_ratio: unknown key of 'constant'; known: warmup_epochs"),
    "no factors": ({"name": "step", "step_epochs": [3]}, "schedule.step_factors: missing"),
    "falling steps": (STEP | {"step_epochs": [20, 10]}, "schedule.step_epochs: must rise, got [20, 10]"),
    "a step twice": (STEP | {"step_epochs": [10, 10]}, "schedule.step_epochs: must rise, got [10, 10]"),
    "a factor too few": (STEP | {"step_factors": [0.5]}, "schedule.step_factors: has 1 numbers, step_epochs 2"),
    "a step at the start": (STEP | {"step_epochs": [0, 10]}, "schedule.step_epochs.0: should be greater than 0, got 0"),
    "a rising factor": (STEP | {"step_factors": [1.5, 0.1]},
        "schedule.step_factors.0: should be less than or equal to 1, got 1.5"),
    "before the start": (CONSTANT | {"warmup_epochs": -1},
        "schedule.warmup_epochs: should be greater than or equal to 0, got -1"),
    "all warm-up": (COSINE | {"warmup_epochs": 3}, "schedule.warmup_epochs: 3 leaves nothing of epochs 3"),
    "unknown": ({"name": "cosin"}, "schedule.name: unknown schedule 'cosin', did you mean 'cosine'?"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_settings_that_cannot_be(case: str) -> None:
    settings, message = FAULTS[case]
    run, faults = check(Run, small_run(epochs=3).model_dump() | {"schedule": settings})
    assert run is None
    (fault,) = map(str, faults)
    assert fault.startswith(message)


def test_other_schedules_may_warm_up_to_the_end() -> None:
    for settings in (STEP, CONSTANT):
        run = small_run(epochs=3, schedule=settings | {"warmup_epochs": 3})
        assert lr_at(run.schedule, LR, 1.5, 3) == pytest.approx(0.05)
