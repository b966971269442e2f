"""The learning rate as a function of the epoch. It has no state, so a resumed run needs none."""

import math

from fer.config import RunConfig


def lr_at(run: RunConfig, epoch: float) -> float:
    """Learning rate at a point of the run, in epochs since its start (2.5: half-way through the third).

    Warm-up is linear from 0 over `warmup_epochs`; after it, cosine falls from lr to lr * min_lr_ratio at the end
    (Loshchilov & Hutter 2017, arXiv 1608.03983, equation 5); step is lr times the factor of the last of `step_epochs`.
    """
    if epoch < run.warmup_epochs:
        return run.lr * epoch / run.warmup_epochs
    if run.schedule == "cosine":
        progress = min(1.0, (epoch - run.warmup_epochs) / (run.epochs - run.warmup_epochs))
        return run.lr * (run.min_lr_ratio + (1 - run.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2)
    if run.schedule == "step":
        passed = [factor for start, factor in zip(run.step_epochs, run.step_factors) if epoch >= start]
        return run.lr * (passed[-1] if passed else 1.0)
    return run.lr
