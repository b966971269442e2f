"""The learning rate against its formula."""

import math

import pytest
from conftest import small_run

from fer.schedule import lr_at

COSINE = {"schedule": "cosine", "epochs": 10, "lr": 0.1, "warmup_epochs": 2, "min_lr_ratio": 0.01}
STEP = {"schedule": "step", "epochs": 30, "lr": 0.1, "step_epochs": [10, 20], "step_factors": [0.5, 0.1]}


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
    assert lr_at(small_run(**COSINE), epoch) == pytest.approx(rate, abs=1e-15)


@pytest.mark.parametrize(("epoch", "rate"), [(0, 0.1), (9.99, 0.1), (10, 0.05), (19.99, 0.05), (20, 0.01), (30, 0.01)])
def test_factors_of_the_steps_are_of_the_base_rate(epoch: float, rate: float) -> None:
    assert lr_at(small_run(**STEP), epoch) == pytest.approx(rate)


def test_steps_and_constant_warm_up_too() -> None:
    for schedule in ("step", "constant"):
        run = small_run(**STEP | {"schedule": schedule, "warmup_epochs": 4})
        assert lr_at(run, 1) == pytest.approx(0.025)
        assert lr_at(run, 4) == 0.1
    assert lr_at(run, 29) == 0.1


def test_no_steps_is_constant() -> None:
    assert lr_at(small_run(**STEP | {"step_epochs": [], "step_factors": []}), 29) == 0.1


@pytest.mark.parametrize("settings", [COSINE, STEP | {"warmup_epochs": 3}])
def test_rate_rises_in_warm_up_and_never_after(settings: dict) -> None:
    run = small_run(**settings)
    rates = [lr_at(run, step / 7) for step in range(7 * run.epochs + 1)]
    top = math.ceil(run.warmup_epochs * 7)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert len(set(rates[: top + 1])) == top + 1
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) == run.lr
