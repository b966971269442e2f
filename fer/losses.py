"""Losses on logits [B, C], labels int64 [B] and targets [B, C] (vote shares of each image).

A row of LOSSES gives the loss of each image, [B]; `build_loss` gives their weighted mean over the batch.
With p = softmax(logits), y = one-hot label, a = alpha, g = gamma, D = class prior [C, C] (row = label).
In fp32 at least, under autocast too.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fer.config import RunConfig

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _precise(logits: Tensor) -> Tensor:
    """Half precisions as fp32; fp64 stays."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _soft(logits: Tensor, target: Tensor, gamma: float = 0.0) -> Tensor:
    """-sum_j target_j (1 - p_j)^gamma log p_j, [B]."""
    log_p = F.log_softmax(_precise(logits), dim=1)
    if gamma:
        # log(1 - p) through expm1 keeps the gradient finite at p = 1
        log_p_others = torch.log((-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).tiny))
        return -(target * torch.exp(gamma * log_p_others) * log_p).sum(1)
    return -(target * log_p).sum(1)


def cross_entropy(run: RunConfig, prior: Tensor) -> Loss:
    """-log p[label]."""
    return lambda logits, labels, targets: F.cross_entropy(_precise(logits), labels, reduction="none")


def label_smoothing(run: RunConfig, prior: Tensor) -> Loss:
    """-sum_j (a y_j + (1 - a) / C) log p_j."""
    return _mixed(run.loss_alpha, torch.full_like(prior, 1 / len(prior)), 0.0)


def focal(run: RunConfig, prior: Tensor) -> Loss:
    """-(1 - p[label])^g log p[label] (Lin et al. 2017, arXiv 1708.02002, equation 4)."""
    return _mixed(1.0, prior, run.loss_gamma)


def pdls(run: RunConfig, prior: Tensor) -> Loss:
    """Prior-distribution label smoothing: -sum_j (a y_j + (1 - a) D[label, j]) log p_j."""
    return _mixed(run.loss_alpha, prior, 0.0)


def focal_pdls(run: RunConfig, prior: Tensor) -> Loss:
    """F-PDLS (arXiv 2204.02181): PDLS with the factor (1 - p_j)^g on every class j, not only the true one."""
    return _mixed(run.loss_alpha, prior, run.loss_gamma)


def compensated_focal_pdls(run: RunConfig, prior: Tensor) -> Loss:
    """Compensated F-PDLS (arXiv 2204.02181, there a = .5): PDLS with the factor (1 - p_j) C / (C - 1) on every class j.

    The factor is 1 where p_j = 1 / C.
    """
    loss, classes = _mixed(run.loss_alpha, prior, 1.0), len(prior)
    return lambda logits, labels, targets: loss(logits, labels, targets) * classes / (classes - 1)


def vote_cross_entropy(run: RunConfig, prior: Tensor) -> Loss:
    """-sum_j t_j log p_j against the votes t of each image (Barsoum et al. 2016, section 3.4, cross-entropy loss)."""
    return lambda logits, labels, targets: _soft(logits, targets)


def vote_sampling(run: RunConfig, prior: Tensor) -> Loss:
    """-log p[k] with k drawn anew from the votes of each image (Barsoum et al. 2016, section 3.3)."""

    def loss(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(_precise(logits), torch.multinomial(targets, 1).squeeze(1), reduction="none")

    return loss


def multi_target(run: RunConfig, prior: Tensor) -> Loss:
    """-log max_j t_j p_j, t = .999 where an emotion has votes, else 0, plus .001 (Barsoum et al. 2016, section 3.2)."""

    def loss(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        weight = torch.log(0.999 * (targets > 0).float() + 0.001)
        return -(weight + F.log_softmax(_precise(logits), dim=1)).amax(1)

    return loss


def _mixed(alpha: float, prior: Tensor, gamma: float) -> Loss:
    """Loss against a y + (1 - a) D[label]."""
    mixture = alpha * torch.eye(len(prior), dtype=prior.dtype, device=prior.device) + (1 - alpha) * prior
    return lambda logits, labels, targets: _soft(logits, mixture[labels], gamma)


LOSSES: dict[str, Callable[[RunConfig, Tensor], Loss]] = {
    "cross_entropy": cross_entropy,
    "label_smoothing": label_smoothing,
    "focal": focal,
    "pdls": pdls,
    "focal_pdls": focal_pdls,
    "compensated_focal_pdls": compensated_focal_pdls,
    "vote_cross_entropy": vote_cross_entropy,
    "vote_sampling": vote_sampling,
    "multi_target": multi_target,
}


def class_weights(counts: Tensor, power: float) -> Tensor:
    """Weight of the images of each class, fp64 [C], from its number of training images, int64 [C].

    w_c = n_c^-power / s, where s makes the mean over the training images 1: 0 gives ones, 1 gives n / (C n_c). A class
    without images gets the weight of a class with one.
    """
    weights = counts.clamp_min(1).double() ** -power
    return weights * counts.sum() / (weights * counts).sum()


def build_loss(run: RunConfig, prior: Tensor, counts: Tensor) -> Loss:
    """The loss of a run: the mean over the batch, scalar, of each image's loss times the weight of its label.

    The weights' own sum does not divide it, so that the losses of equal parts of a batch average to that of the whole.
    `prior`: class prior D of the data in use, [C, C], on the device of the logits. `counts`: training images per class,
    int64 [C].
    """
    loss, weights = LOSSES[run.loss](run, prior), class_weights(counts, run.class_weights).to(prior)
    return lambda logits, labels, targets: (weights[labels] * loss(logits, labels, targets)).mean()
