"""Metrics against a table counted by hand and against torchmetrics."""

import math

import pytest
import torch
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_f1_score,
)

from fer.metrics import Counts

# row = label, column = prediction: 4 images of class 0, 3 of class 1, 3 of class 2
TABLE = [[3, 1, 0], [0, 2, 1], [1, 1, 1]]


def counts_of(logits: torch.Tensor, labels: torch.Tensor, batch: int | None = None) -> Counts:
    counts = Counts(logits.shape[1])
    for first in range(0, len(labels), batch or len(labels)):
        part = slice(first, first + (batch or len(labels)))
        counts.update(logits[part], labels[part], torch.nn.functional.cross_entropy(logits[part], labels[part]))
    return counts


def images_of(table: list[list[int]], logit: float = 4.0) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [(i, j) for i, line in enumerate(table) for j, count in enumerate(line) for _ in range(count)]
    labels, predictions = (torch.tensor(part) for part in zip(*pairs))
    return logit * torch.eye(len(table))[predictions], labels


def test_hand_counted_table() -> None:
    counts = counts_of(*images_of(TABLE))
    result = counts.result()
    assert counts.confusion.tolist() == TABLE
    assert result["accuracy"] == pytest.approx(6 / 10)  # 3 + 2 + 1 of 10
    assert counts.recall() == pytest.approx([3 / 4, 2 / 3, 1 / 3])
    assert result["balanced_accuracy"] == pytest.approx((3 / 4 + 2 / 3 + 1 / 3) / 3)
    # F1 = 2 right / (images + predictions): 6/(4+4), 4/(3+4), 2/(3+2)
    assert result["macro_f1"] == pytest.approx((6 / 8 + 4 / 7 + 2 / 5) / 3)
    # logits 4, 0, 0: every image has the confidence e^4 / (e^4 + 2), in one bin: |confidence - .6|
    assert result["ece"] == pytest.approx(math.exp(4) / (math.exp(4) + 2) - 0.6)
    # cross-entropy: log(e^4 + 2) - 4 of the 6 right ones, log(e^4 + 2) of the others
    assert result["loss"] == pytest.approx(math.log(math.exp(4) + 2) - 4 * 0.6)


def test_agrees_with_torchmetrics() -> None:
    torch.manual_seed(0)
    labels = torch.randint(8, (500,))
    logits = 2 * torch.randn(500, 8) + 2 * torch.eye(8)[labels]
    counts = counts_of(logits, labels, batch=64)
    theirs = {
        "accuracy": multiclass_accuracy(logits, labels, 8, average="micro"),
        "balanced_accuracy": multiclass_accuracy(logits, labels, 8, average="macro"),
        "macro_f1": multiclass_f1_score(logits, labels, 8, average="macro"),
        "ece": multiclass_calibration_error(logits.softmax(1), labels, 8, n_bins=15, norm="l1"),
        "loss": torch.nn.functional.cross_entropy(logits, labels),
    }
    assert counts.result() == pytest.approx({name: float(value) for name, value in theirs.items()}, abs=1e-6)


def test_classes_without_images_are_left_out_of_recall() -> None:
    # class 2 has no image but one prediction, class 3 has neither
    counts = counts_of(*images_of([[2, 0, 0, 0], [1, 2, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]))
    assert counts.recall() == [1.0, 0.5, None, None]
    assert counts.result()["balanced_accuracy"] == pytest.approx(0.75)
    # F1 of classes 0, 1, 2: 4/(2+3), 4/(4+2), 0/(0+1)
    assert counts.result()["macro_f1"] == pytest.approx((4 / 5 + 4 / 6 + 0) / 3)


def test_a_confidence_on_the_edge_of_a_bin_is_counted_once() -> None:
    for probability in (1.0, 14 / 15, 1 / 3):
        rest = max(1 - probability, 1e-30) / 2
        counts = counts_of(torch.log(torch.tensor([[probability, rest, rest]])), torch.tensor([0]))
        assert counts.bins[0].sum() == 1
        assert counts.result()["ece"] == pytest.approx(1 - probability, abs=1e-6)
