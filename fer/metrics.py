"""Metrics as sums over batches and ranks, divided once: exact for any batch size and number of workers."""

import torch
import torch.distributed as dist
from torch import Tensor

BINS = 15  # of the calibration error, equal width in confidence (Guo et al. 2017, arXiv 1706.04599)


class Counts:
    """Confusion matrix, calibration bins and loss of a set of predictions."""

    def __init__(self, num_labels: int, device: torch.device | str = "cpu"):
        self.confusion = torch.zeros(num_labels, num_labels, dtype=torch.int64, device=device)  # row = label
        self.bins = torch.zeros(3, BINS, dtype=torch.float64, device=device)  # images, confidence, correct
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, logits: Tensor, labels: Tensor, loss: Tensor | None = None) -> None:
        """Add a batch: logits [B, C], labels [B], and its mean loss."""
        self.add(torch.softmax(logits.detach().float(), 1), labels, loss)

    def add(self, probabilities: Tensor, labels: Tensor, loss: Tensor | None = None) -> None:
        """Add a batch: probabilities float32 [B, C], labels [B], and its mean loss."""
        confidence, predicted = probabilities.max(1)
        classes = len(self.confusion)
        cells = labels * classes + predicted
        self.confusion.view(-1).index_add_(0, cells, torch.ones_like(labels))  # does not wait for the GPU
        index = bin_of(confidence)
        rows = torch.stack([torch.ones_like(confidence), confidence, (predicted == labels).float()])
        self.bins.index_add_(1, index, rows.double())
        if loss is not None:
            self.loss_sum += loss.detach().double() * len(labels)

    def all_reduce(self) -> None:
        """Sum over the ranks of a distributed run."""
        for tensor in self.state().values():
            dist.all_reduce(tensor)

    def state(self) -> dict[str, Tensor]:
        """The sums themselves, by name; not copies."""
        return {"confusion": self.confusion, "bins": self.bins, "loss_sum": self.loss_sum}

    def load_state(self, saved: dict[str, Tensor]) -> None:
        """Take over the sums of another `state`."""
        for key, value in self.state().items():
            value.copy_(saved[key])

    def result(self) -> dict[str, float]:
        """accuracy (WAR), balanced_accuracy (UAR), macro_f1, ece and loss, all floats."""
        confusion = self.confusion.double()
        images = confusion.sum().clamp_min(1)
        right, labels, predictions = confusion.diag(), confusion.sum(1), confusion.sum(0)
        f1 = 2 * right / (labels + predictions).clamp_min(1)
        _, confidence, correct = self.bins
        return {
            "accuracy": float(right.sum() / images),
            "balanced_accuracy": float((right / labels.clamp_min(1))[labels > 0].mean()),
            "macro_f1": float(f1[labels + predictions > 0].mean()),
            "ece": float((confidence - correct).abs().sum() / images),
            "loss": float(self.loss_sum / images),
        }

    def recall(self) -> list[float | None]:
        """Recall of each class; None for a class without images."""
        found = self.confusion.diag().tolist()
        return [right / total if total else None for right, total in zip(found, self.confusion.sum(1).tolist())]


def bin_of(confidence: Tensor) -> Tensor:
    """The calibration bin of each probability: of its ends a bin holds the upper one."""
    return (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
