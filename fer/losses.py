"""Losses on logits [B, C], labels int64 [B] and targets [B, C] (vote shares of each image).

A row of LOSSES builds the loss per image, [B]; `build_loss` gives the weighted mean over the batch.
Notation: p = softmax(logits), y = one-hot label, a = alpha, g = gamma, D = class prior [C, C] (row = label).
Losses are computed in fp32 at least, under autocast too.
"""

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fer.errors import UserError
from fer.settings import Fraction, NonNegative, Section, by_name

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class LossKind(Section):
    """A row of LOSSES."""

    name: str
    needs_prior: ClassVar[bool] = False  # without it `prior` is the identity where the data have none
    of_votes: ClassVar[bool] = False  # whether it is of `targets`, and meant for shares of votes

    def build(self, prior: Tensor, counts: Tensor) -> Loss:
        """The loss per image, [B], of logits, labels and targets.

        `prior`: D, [C, C]; `counts`: training images of each class, int64 [C]; both on the device of the logits.
        """
        raise NotImplementedError

    def build_expected(self, prior: Tensor, counts: Tensor) -> Loss:
        """The loss that evaluation reports: the expectation, for a loss that draws at random."""
        return self.build(prior, counts)


class CrossEntropy(LossKind):
    """-log p[label]."""

    name: Literal["cross_entropy"] = "cross_entropy"

    def build(self, prior: Tensor, counts: Tensor) -> Loss:
        return lambda logits, labels, targets: F.cross_entropy(_precise(logits), labels, reduction="none")


class LabelSmoothing(LossKind):
    """-sum_j (a y_j + (1 - a) / C) log p_j (Szegedy et al. 2016, arXiv 1512.00567, section 7)."""

    name: Literal["label_smoothing"] = "label_smoothing"
    alpha: Fraction = 0.9
    """Weight of the true label; the rest is spread over all classes."""

    def build(self, prior: Tensor, counts: Tensor) -> Loss:
        return _mixed(self.alpha, torch.full_like(prior, 1 / len(prior)), 0.0)


class Focal(LossKind):
    """-(1 - p[label])^g log p[label] (Lin et al. 2017, arXiv 1708.02002, equation 4)."""

    name: Literal["focal"] = "focal"
    gamma: NonNegative = 2.0
    """Focusing exponent; 0 is cross-entropy."""

    def build(self, prior: Tensor, counts: Tensor) -> Loss:
        return _mixed(1.0, prior, self.gamma)


class Pdls(LossKind):
    """Prior-distribution label smoothing: -sum_j (a y_j + (1 - a) D[label, j]) log p_j."""

    needs_prior = True
    name: Literal["pdls"] = "pdls"
    alpha: Fraction = 0.8
    """Weight of the true label; the rest goes to the class prior."""

    def build(self, prior: Tensor, counts: Tensor) -> Loss:
        return _mixed(self.alpha, prior, 0.0)


class FocalPdls(LossKind):
    """F-PDLS (arXiv 2204.02181): PDLS with the factor (1 - p_j)^g on every class j, not only the true one."""

    needs_prior = True
    name: Literal["focal_pdls"] = "focal_pdls"
    alpha: Fraction = 0.8
    """Weight of the true label; the rest goes to the class prior."""
    gamma: NonNegative = 2.0
    """Focusing exponent; 0 is PDLS."""

    def build(self, prior: Tensor, counts: Tensor) -> Loss:
        return _mixed(self.alpha, prior, self.gamma)


class CompensatedFocalPdls(LossKind):
    """Compensated F-PDLS (arXiv 2204.02181, there a = .5): PDLS with the factor (1 - p_j) C / (C - 1) on every class j.

    The factor is 1 where p_j = 1 / C.
    """

    needs_prior = True
    name: Literal["compensated_focal_pdls"] = "compensated_focal_pdls"
    alpha: Fraction = 0.5
    """Weight of the true label; the rest goes to the class prior."""

    def build(self, prior: Tensor, counts: Tensor) -> Loss:
        loss, classes = _mixed(self.alpha, prior, 1.0), len(prior)
        return lambda logits, labels, targets: loss(logits, labels, targets) * classes / (classes - 1)


class VoteCrossEntropy(LossKind):
    """-sum_j t_j log p_j against the votes t of each image (Barsoum et al. 2016, section 3.4, cross-entropy loss)."""

    of_votes = True
    name: Literal["vote_cross_entropy"] = "vote_cross_entropy"

    def build(self, prior: Tensor, counts: Tensor) -> Loss:
        return lambda logits, labels, targets: soft_cross_entropy(logits, targets)


class VoteSampling(LossKind):
    """-log p[k] with k redrawn in each step from the votes of each image (Barsoum et al. 2016, section 3.3)."""

    of_votes = True
    name: Literal["vote_sampling"] = "vote_sampling"

    def build(self, prior: Tensor, counts: Tensor) -> Loss:
        def loss(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
            # as torch.multinomial, number for number, which waits for the GPU to check its arguments
            drawn = (targets / torch.empty_like(targets).exponential_()).argmax(1)
            return F.cross_entropy(_precise(logits), drawn, reduction="none")

        return loss

    def build_expected(self, prior: Tensor, counts: Tensor) -> Loss:
        """The expectation over all draws is vote_cross_entropy."""
        return VoteCrossEntropy().build(prior, counts)


class MultiTarget(LossKind):
    """-log max_j t_j p_j, t = .999 where an emotion has votes, else 0, plus .001 (Barsoum et al. 2016, section 3.2)."""

    of_votes = True
    name: Literal["multi_target"] = "multi_target"

    def build(self, prior: Tensor, counts: Tensor) -> Loss:
        def loss(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
            weight = torch.log(0.999 * (targets > 0).float() + 0.001)
            return -(weight + F.log_softmax(_precise(logits), dim=1)).amax(1)

        return loss


def _precise(logits: Tensor) -> Tensor:
    """Half precision becomes fp32; fp64 stays."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def soft_cross_entropy(logits: Tensor, target: Tensor, gamma: float = 0.0) -> Tensor:
    """-sum_j target_j (1 - p_j)^gamma log p_j, [B], of logits and targets [B, C]."""
    log_p = F.log_softmax(_precise(logits), dim=1)
    if gamma:
        # log(1 - p) through expm1 keeps the gradient finite at p = 1
        log_p_others = torch.log((-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).tiny))
        return -(target * torch.exp(gamma * log_p_others) * log_p).sum(1)
    return -(target * log_p).sum(1)


def _mixed(alpha: float, prior: Tensor, gamma: float) -> Loss:
    """Loss against a y + (1 - a) D[label]."""
    mixture = alpha * torch.eye(len(prior), dtype=prior.dtype, device=prior.device) + (1 - alpha) * prior
    return lambda logits, labels, targets: soft_cross_entropy(logits, mixture[labels], gamma)


LOSSES = by_name(
    CrossEntropy,
    LabelSmoothing,
    Focal,
    Pdls,
    FocalPdls,
    CompensatedFocalPdls,
    VoteCrossEntropy,
    VoteSampling,
    MultiTarget,
)


def class_weights(counts: Tensor, power: float) -> Tensor:
    """Loss weight of each class, fp64 [C], from `counts`, its number of training images, int64 [C].

    w_c = n_c^-power / s, where s makes the mean over the training images 1. Power 0 gives ones, 1 gives n / (C n_c). A
    class without images is weighted like a class with one.
    """
    weights = counts.clamp_min(1).double() ** -power
    return weights * counts.sum() / (weights * counts).sum()


def build_loss(
    kind: LossKind, class_weight: float, prior: Tensor, counts: Tensor, expected: bool = False, adjustment: float = 0.0
) -> Loss:
    """The loss of a run, a scalar: the mean over the batch of each image's loss times the weight of its label.

    It is divided by the batch size, not by the sum of the weights, so that the losses of equal parts of a batch average
    to that of the whole. `class_weight`: the power in `class_weights`. `prior`: class prior D of the data, [C, C], on
    the device of the logits. `counts`: training images per class, int64 [C]. `expected`: draw nothing at random.
    `adjustment` times the logarithm of each class's share of the counts is added to the logits first (Menon et al.
    2021, arXiv 2007.07314: logit adjusted loss).
    The loss raises UserError if the logits, or the losses of `kind`, are of another shape.
    """
    each = (kind.build_expected if expected else kind.build)(prior, counts)
    weights = class_weights(counts, class_weight).to(prior)
    shift = (adjustment * torch.log(counts.clamp_min(1).double() / counts.sum())).to(prior)

    def loss(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        if not isinstance(logits, Tensor) or logits.shape != targets.shape:
            raise UserError(
                f"the model's forward returns {_shown(logits)}: must be {_shown(targets)}, a logit for each image and "
                "class (num_labels of `build`)"
            )
        found = each(logits + shift if adjustment else logits, labels, targets)
        if not isinstance(found, Tensor) or found.shape != labels.shape:  # or weights would go astray
            raise UserError(
                f"loss '{kind.name}' returns {_shown(found)}: must be {_shown(labels)}, a loss for each image"
            )
        return (weights[labels] * found).mean()

    return loss


def _shown(found: object) -> str:
    return str(list(found.shape)) if isinstance(found, Tensor) else f"a {type(found).__name__}"
