"""The learning rate against its formula, and the settings of each schedule."""

import math
from typing import Any

import pytest
from conftest import small_run

from fer.run import Run
from fer.schedule import SCHEDULES, lr_at
from fer.settings import check

LR = 0.1
COSINE = {"name": "cosine", "warmup_epochs": 2, "min_lr_ratio": 0.01}
STEP = {"name": "step", "warmup_epochs": 0, "step_epochs": [10, 20], "step_factors": [0.5, 0.1]}
LINEAR = {"name": "linear", "warmup_epochs": 2, "min_lr_ratio": 0.1}
CONSTANT = {"name": "constant", "warmup_epochs": 0}


@pytest.mark.parametrize(
    ("settings", "changes", "rates"),
    [
        # a quarter of the warm-up; cos(pi / 4); half-way: cos(pi / 2) = 0; it never rises again
        (COSINE, {}, {0: 0, 0.5: 0.025, 1: 0.05, 2: 0.1, 4: 0.1 * (0.01 + 0.99 * (1 + math.sqrt(0.5)) / 2),
                      6: 0.1 * (0.01 + 0.99 / 2), 10: 0.001, 12: 0.001}),
        (COSINE, {"warmup_epochs": 0}, {0: 0.1, 5: 0.1 * (0.01 + 0.99 / 2)}),
        (LINEAR, {}, {1: 0.05, 2: 0.1, 4: 0.0775, 6: 0.055, 10: 0.01, 12: 0.01}),
        (STEP, {}, {0: 0.1, 9.99: 0.1, 10: 0.05, 19.99: 0.05, 20: 0.01, 30: 0.01}),  # factors of the base rate
        (STEP, {"warmup_epochs": 12}, {11: 0.1 * 11 / 12, 12: 0.05}),  # a step during the warm-up counts behind it
        (CONSTANT, {}, {0: 0.1, 10: 0.1}),
        (CONSTANT, {"warmup_epochs": 10}, {5: 0.05, 10: 0.1}),
    ],
)  # fmt: skip
def test_the_rate_by_hand(settings: dict[str, Any], changes: dict[str, Any], rates: dict[float, float]) -> None:
    schedule = SCHEDULES[settings["name"]].model_validate(settings | changes)
    for epoch, rate in rates.items():
        assert lr_at(schedule, LR, epoch, 10) == pytest.approx(rate, rel=1e-12, abs=1e-15)
    assert {each["name"] for each in (COSINE, LINEAR, STEP, CONSTANT)} == set(SCHEDULES)


FAULTS = [
    ({"name": "step", "step_epochs": [3]}, "schedule.step_factors: missing"),
    (STEP | {"step_epochs": [10, 10]}, "schedule.step_epochs: must rise, got [10, 10]"),
    (STEP | {"step_factors": [0.5]}, "schedule.step_factors: has 1 numbers, step_epochs 2"),
    (STEP | {"step_epochs": [0, 10]}, "schedule.step_epochs.0: should be greater than 0, got 0"),
    (STEP | {"step_factors": [1.5, 0.1]}, "schedule.step_factors.0: should be less than or equal to 1, got 1.5"),
]


@pytest.mark.parametrize(("settings", "message"), FAULTS)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    (fault,) = check(Run, small_run(epochs=3).model_dump() | {"schedule": settings})[1]
    assert str(fault).startswith(message)
