"""Every loss against arithmetic done by hand on three classes, its gradient, and its behaviour at the extremes."""

import math

import pytest
import torch
from conftest import refusal
from torch import Tensor

from fer.losses import LOSSES, Loss, LossKind, build_loss, class_weights

A, G = 0.8, 2.0
# softmax(log q) = q for shares q that sum to 1: logits whose probabilities are known without a computer
P = [[0.5, 0.3, 0.2], [0.1, 0.7, 0.2]]
LOGITS = torch.log(torch.tensor(P, dtype=torch.float64)) + torch.tensor([[3.0], [-5.0]])  # a shift changes nothing
LABELS = torch.tensor([0, 2])
VOTES = torch.tensor([[0.6, 0.4, 0.0], [0.0, 0.1, 0.9]], dtype=torch.float64)
COUNTS = torch.tensor([9, 4, 1])  # training images per class
PRIOR = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.1, 0.6]], dtype=torch.float64)

# -log p of the labels: p = .5 of class 0, p = .2 of class 2
BY_HAND = {
    "cross_entropy": (-math.log(0.5) - math.log(0.2)) / 2,
    # target of label 0: .8 + .2/3 there, .2/3 on the others
    "label_smoothing": (
        -((0.8 + 0.2 / 3) * math.log(0.5) + 0.2 / 3 * math.log(0.3) + 0.2 / 3 * math.log(0.2))
        - (0.2 / 3 * math.log(0.1) + 0.2 / 3 * math.log(0.7) + (0.8 + 0.2 / 3) * math.log(0.2))
    )
    / 2,
    "focal": (-((1 - 0.5) ** 2) * math.log(0.5) - (1 - 0.2) ** 2 * math.log(0.2)) / 2,
    # target of label 0: .8 (1, 0, 0) + .2 (.7, .2, .1); of label 2: .8 (0, 0, 1) + .2 (.3, .1, .6)
    "pdls": (
        -(0.94 * math.log(0.5) + 0.04 * math.log(0.3) + 0.02 * math.log(0.2))
        - (0.06 * math.log(0.1) + 0.02 * math.log(0.7) + 0.92 * math.log(0.2))
    )
    / 2,
    # the same, each class with its own factor (1 - p_j)^2
    "focal_pdls": (
        -(0.94 * 0.5**2 * math.log(0.5) + 0.04 * 0.7**2 * math.log(0.3) + 0.02 * 0.8**2 * math.log(0.2))
        - (0.06 * 0.9**2 * math.log(0.1) + 0.02 * 0.3**2 * math.log(0.7) + 0.92 * 0.8**2 * math.log(0.2))
    )
    / 2,
    # the same with the factor (1 - p_j) 3 / 2
    "compensated_focal_pdls": (
        -(0.94 * 0.75 * math.log(0.5) + 0.04 * 1.05 * math.log(0.3) + 0.02 * 1.2 * math.log(0.2))
        - (0.06 * 1.35 * math.log(0.1) + 0.02 * 0.45 * math.log(0.7) + 0.92 * 1.2 * math.log(0.2))
    )
    / 2,
    "vote_cross_entropy": (-(0.6 * math.log(0.5) + 0.4 * math.log(0.3)) - (0.1 * math.log(0.7) + 0.9 * math.log(0.2)))
    / 2,
    # image 1: votes on classes 0, 1: max(.5, .3, .001 * .2) = .5; image 2: on 1, 2: max(.001 * .1, .7, .2) = .7
    "multi_target": (-math.log(0.5) - math.log(0.7)) / 2,
}

# 9, 4 and 1 images: 14 / (3 n) for power 1; 1/3, 1/2 and 1, which sum up to 3 + 2 + 1 = 6 over the images, for .5
WEIGHTS = {0.0: [1.0, 1.0, 1.0], 1.0: [14 / 27, 14 / 12, 14 / 3], 0.5: [14 / 18, 14 / 12, 14 / 6]}

WITH_GAMMA = [(name, gamma) for name in LOSSES for gamma in ((0.5, 2.0) if name.startswith("focal") else (2.0,))]


def kind(name: str, alpha: float = A, gamma: float = G) -> LossKind:
    """A loss with those of the two settings that it has."""
    own = {"alpha": alpha, "gamma": gamma}
    return LOSSES[name].model_validate({key: own[key] for key in own if key in LOSSES[name].model_fields})


def value(
    name: str, logits: Tensor = LOGITS, labels: Tensor = LABELS, votes: Tensor = VOTES, prior: Tensor = PRIOR,
    alpha: float = A, gamma: float = G, power: float = 0.0, expected: bool = False,
) -> Tensor:  # fmt: skip
    return build_loss(kind(name, alpha, gamma), power, prior, COUNTS, expected)(logits, labels, votes)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "vote_sampling"])
def test_value_by_hand(name: str) -> None:
    assert float(value(name)) == pytest.approx(BY_HAND[name], rel=1e-12)
    for precision in (torch.float32, torch.bfloat16, torch.float16):  # what is lost is the rounding of the logits alone
        logits = LOGITS.to(precision)
        found = value(name, logits, LABELS, VOTES.float(), PRIOR.float())
        assert found.dtype == torch.float32
        assert float(found) == pytest.approx(float(value(name, logits.double())), rel=1e-5)


def test_a_prediction_on_an_emotion_without_votes_costs_a_thousandth() -> None:
    logits = torch.log(torch.tensor([[0.0004, 0.0006, 0.999]], dtype=torch.float64))
    found = value("multi_target", logits, torch.tensor([0]), torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64))
    # max(1 * .0004, .001 * .0006, .001 * .999) = .000999
    assert float(found) == pytest.approx(-math.log(0.000999), rel=1e-7)  # its weights are fp32


def test_the_expectation_of_sampling_from_votes_is_the_vote_cross_entropy() -> None:
    state = torch.random.get_rng_state()
    by_hand = value("vote_sampling", expected=True, power=0.5)
    assert torch.equal(by_hand, value("vote_cross_entropy", power=0.5))
    assert torch.equal(torch.random.get_rng_state(), state)  # nothing was drawn
    # one draw is -log .5 or .3, and -log .7 or .2: standard deviations .250 and .376
    torch.manual_seed(1)
    times = 20_000
    many = value("vote_sampling", LOGITS.repeat(times, 1), LABELS.repeat(times), VOTES.repeat(times, 1), power=0.5)
    spread = math.hypot(WEIGHTS[0.5][0] * 0.2503, WEIGHTS[0.5][2] * 0.3758) / 2 / math.sqrt(times)
    assert abs(float(many) - float(by_hand)) < 5 * spread
    one = {round(float(value("vote_sampling", LOGITS[:1], LABELS[:1], VOTES[:1])), 6) for _ in range(60)}
    assert one == {round(-math.log(0.5), 6), round(-math.log(0.3), 6)}  # each, and only what has votes


def test_class_weights_by_hand() -> None:
    for power, weights in WEIGHTS.items():
        assert class_weights(COUNTS, power).tolist() == pytest.approx(weights, rel=1e-12)
    # a class without images weighs as much as one with a single image, and is no part of the mean: 4 / (2 n)
    assert class_weights(torch.tensor([3, 0, 1]), 1.0).tolist() == pytest.approx([2 / 3, 2, 2], rel=1e-12)


def test_logit_adjustment_by_hand() -> None:
    """The shares 9, 4 and 1 of 14, to its power, times the probabilities, divided by their sum."""
    whole = -math.log(0.5 * 9 / (0.5 * 9 + 0.3 * 4 + 0.2)) - math.log(0.2 / (0.1 * 9 + 0.7 * 4 + 0.2))
    half = -math.log(0.5 * 3 / (0.5 * 3 + 0.3 * 2 + 0.2)) - math.log(0.2 / (0.1 * 3 + 0.7 * 2 + 0.2))
    for adjustment, wanted in ((0.0, -math.log(0.5) - math.log(0.2)), (0.5, half), (1.0, whole)):
        loss = build_loss(kind("cross_entropy"), 0.0, PRIOR, COUNTS, adjustment=adjustment)
        assert float(loss(LOGITS, LABELS, VOTES)) == pytest.approx(wanted / 2, rel=1e-12)
    # a class without images counts as one with a single image: 1 of the 13 that there are
    loss = build_loss(kind("cross_entropy"), 0.0, PRIOR, torch.tensor([9, 4, 0]), adjustment=1.0)
    assert float(loss(LOGITS, LABELS, VOTES)) == pytest.approx(whole / 2, rel=1e-12)


def sure(name: str) -> Tensor:
    """Votes without chance: where they are drawn, all are for one emotion, not the label."""
    return torch.eye(3, dtype=torch.float64)[[1, 0]] if name == "vote_sampling" else VOTES


@pytest.mark.parametrize("name", LOSSES)
def test_each_image_has_the_weight_of_its_label(name: str) -> None:
    """The sum of the weights in the batch does not divide, so that halves of a batch average to the whole."""
    alone = [float(value(name, LOGITS[i : i + 1], LABELS[i : i + 1], sure(name)[i : i + 1])) for i in (0, 1)]
    wanted = [WEIGHTS[0.5][label] * one for label, one in zip([0, 2], alone)]
    assert float(value(name, votes=sure(name), power=0.5)) == pytest.approx(sum(wanted) / 2, rel=1e-12)


class Mean(LossKind):
    """What public code often returns: no loss for each image."""

    name: str = "mean"

    def build(self, prior: Tensor, counts: Tensor) -> Loss:
        return lambda logits, labels, targets: logits.mean(dim=[0, 1][: len(labels)])


def test_a_loss_or_a_model_of_another_shape_is_refused() -> None:
    for labels, shape in (([0, 2], "[]"), ([0], "[3]")):
        many = len(labels)
        told = refusal(build_loss(Mean(), 1.0, PRIOR, COUNTS), LOGITS[:many], torch.tensor(labels), VOTES[:many])
        assert told == f"loss 'mean' returns {shape}: must be [{many}], a loss for each image"
    told = refusal(value, "cross_entropy", torch.zeros(2, 8))
    assert told.startswith("the model's forward returns [2, 8]: must be [2, 3], a logit for each image and class")


@pytest.mark.parametrize(("name", "gamma"), WITH_GAMMA)
def test_gradient_is_that_of_finite_differences_and_finite_at_the_extremes(name: str, gamma: float) -> None:
    start = LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: value(name, x, votes=sure(name), gamma=gamma, power=1.0), (start,))
    signs = torch.tensor([[1.0, -1, -1], [-1, 1, 1], [0, 0, -1], [-1, -1, -1]])
    votes = torch.tensor([[1.0, 0, 0], [0.5, 0, 0.5], [0, 0, 1.0], [0.2, 0.3, 0.5]])
    for size in (1e4, 17.0):  # 17: p rounds to 1 in fp32
        logits = (size * signs).requires_grad_()
        found = value(name, logits, torch.tensor([0, 0, 2, 1]), votes, PRIOR.float(), gamma=gamma, power=1.0)
        found.backward()
        assert torch.isfinite(found)
        assert found >= 0
        assert logits.grad is not None
        assert torch.isfinite(logits.grad).all()
