"""One step: parts add up to the batch, mixed losses, sharpness-aware steps by hand, known losses."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_run
from torch import Tensor, nn

from fer.data.augment import Mixture
from fer.device import autocast
from fer.losses import VoteCrossEntropy, build_loss
from fer.models import build_model
from fer.run import Run
from fer.step import Part, Stepper

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parent / "golden" / "losses.json"
SGD = {"name": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0}
LINEAR: dict[str, Any] = {"optimizer": SGD, "clip_grad_norm": None}


class Square(nn.Module):
    """Two weights; the loss of an image is half the square of their product with it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return (pixel_values * self.weight).sum(1, keepdim=True)


def half_square(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    return (logits[:, 0] ** 2).mean() / 2


def part(images: list[list[float]], weight: float = 1.0) -> Part:
    count = len(images)
    return Part(
        {"pixel_values": torch.tensor(images)}, torch.zeros(count, dtype=torch.int64), torch.ones(count, 1), weight
    )


def stepped(parts: list[Part], **keys: Any) -> tuple[Square, Tensor]:
    """The network after one step of rate .1, and the loss."""
    model = Square()
    _, value = Stepper(small_run(**LINEAR | keys), model, CPU)(parts, half_square, None, 0.1, 0)
    return model, value


def test_steps_by_hand() -> None:
    # of (3, 1) and (1, 0): 5 and 1, losses 12.5 and .5, gradients (15, 5) and (1, 0); of (0, 2): 4, 8 and (0, 8)
    uneven = [part([[3.0, 1.0], [1.0, 0.0]], 2 / 3), part([[0.0, 2.0]], 1 / 3)]
    for parts, keys, loss, moved in (
        (uneven, {}, (12.5 + 0.5 + 8) / 3, (16 / 3, 13 / 3)),
        # the gradient at (1, 2) is (15, 5); with rho = sqrt(10), uphill by (3, 1) to (4, 3), where it is (45, 15)
        ([part([[3.0, 1.0]])], {"sam_rho": 10**0.5}, 12.5, (45, 15)),
        # 1*3 + 2*4 = 11: a gradient of 11 * (3, 4), norm 55, becomes (.3, .4)
        ([part([[3.0, 4.0]])], {"clip_grad_norm": 0.5}, 60.5, (0.3, 0.4)),
    ):
        model, value = stepped(parts, **keys)
        assert float(value) == pytest.approx(loss)  # of the weights as they were
        torch.testing.assert_close(model.weight.detach(), torch.tensor([1.0, 2.0]) - 0.1 * torch.tensor(moved))


def test_averaged_weights_follow_with_a_decay_that_grows() -> None:
    """The first average is the weight itself; then min(decay, (1 + t) / (10 + t)) of it is kept, t = 1, 2, ..."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 10.0)
    stepper = Stepper(small_run(**LINEAR, ema_decay=0.8), model, CPU)
    average = 9.0
    for t in range(40):  # of the weights 9, 8, 7, ...; .8 is reached with t = 35
        model.weight.grad = torch.ones(1, 1)
        stepper.update()
        kept = min(0.8, (1 + t) / (10 + t)) if t else 0.0
        average = kept * average + (1 - kept) * (9 - t)
        assert float(stepper.evaluated.get_parameter("weight").detach()) == pytest.approx(average, abs=1e-4), t


class Normed(Square):
    """With batch norm; the second keeps no statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.Sequential(nn.BatchNorm1d(1), nn.BatchNorm1d(1, track_running_stats=False))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.norms(super().forward(pixel_values))


def test_the_second_look_of_a_sharpness_aware_step_leaves_batch_norm_alone() -> None:
    """It normalises by the batch, though: (5, 1) has the mean 3."""
    model = Normed()
    stepper = Stepper(small_run(**LINEAR, sam_rho=0.5), model, CPU)
    looks: list[Tensor] = []
    model.norms[0].register_forward_hook(lambda module, given, found: looks.append(found.detach()))
    stepper([part([[3.0, 1.0], [1.0, 0.0]])], half_square, None, 0.1, 0)
    assert len(looks) == 2
    torch.testing.assert_close(looks[1], torch.tensor([[1.0], [-1.0]]), atol=1e-3, rtol=0)
    norm: Any = model.norms[0]
    assert (int(norm.num_batches_tracked), norm.running_mean.item()) == (1, pytest.approx(0.3))


class Linear(nn.Linear):
    def forward(self, pixel_values: Tensor) -> Tensor:
        return super().forward(pixel_values)


def test_the_loss_of_mixed_images_is_mixed_alike() -> None:
    torch.manual_seed(0)
    images, labels, targets = torch.rand(4, 3), torch.tensor([0, 1, 2, 0]), torch.softmax(torch.randn(4, 3), 1)
    model = Linear(3, 3)
    log_p = torch.log_softmax(model(images), 1).detach()
    wanted = -((0.7 * targets + 0.3 * targets[[1, 0, 3, 2]]) * log_p).sum(1).mean()
    loss = build_loss(VoteCrossEntropy(), 0.0, torch.eye(3), torch.ones(3, dtype=torch.int64))
    pieces = [Part({"pixel_values": images[i : i + 2]}, labels[i : i + 2], targets[i : i + 2], 0.5) for i in (0, 2)]
    logits, value = Stepper(small_run(**LINEAR), model, CPU)(pieces, loss, Mixture(0.7, None), 0.1, 0)
    assert logits.shape == (4, 3)
    torch.testing.assert_close(value, wanted)


def batch_of(run: Run, step: int, parts: int, kind: torch.dtype) -> list[Part]:
    """The bars of conftest, drawn without a file."""
    random = np.random.default_rng(step)
    labels = random.integers(0, 8, run.batch_size)
    pixels = random.normal(0, 0.3, (run.batch_size, 1, 16, 16)).astype(np.float32)
    pixels[np.arange(run.batch_size), 0, 2 * labels] += 2
    images, classes = torch.from_numpy(pixels).to(kind), torch.from_numpy(labels)
    targets = torch.from_numpy(0.8 * np.eye(8, dtype=np.float32)[labels] + 0.025)
    return [
        Part({"pixel_values": images[rows]}, classes[rows], targets[rows], 1 / parts)
        for rows in torch.arange(run.batch_size).chunk(parts)
    ]


def curve(steps: int, parts: int = 1, kind: torch.dtype = torch.float64, **keys: Any) -> list[float]:
    """The losses of the first steps from the same beginning.

    In fp64, as training blows up what rounding does, and processors round differently.
    """
    run = small_run(**keys)
    torch.manual_seed(0)
    torch.set_default_dtype(kind)
    try:
        stepper = Stepper(run, build_model(run.model, run.input, 8), CPU)
        prior = 0.7 * torch.eye(8) + 0.3 / 8
    finally:
        torch.set_default_dtype(torch.float32)
    loss, rate = build_loss(run.loss, run.class_weights, prior, torch.full((8,), 12)), run.optimizer.lr
    return [float(stepper(batch_of(run, step, parts, kind), loss, None, rate, step)[1]) for step in range(steps)]


KNOWN: dict[str, dict[str, Any]] = {
    "adamw": {"loss": {"name": "focal_pdls"}},
    "sgd": {
        "optimizer": {"name": "sgd", "lr": 0.1, "weight_decay": 0.01}, "ema_decay": 0.9,
        "loss": {"name": "compensated_focal_pdls", "alpha": 0.8},
    },
    "sam": {"sam_rho": 0.05},
}  # fmt: skip


@pytest.mark.parametrize("kind", KNOWN)
def test_the_first_twenty_losses_are_the_known_ones(kind: str) -> None:
    """Written by this very function; they change only with a change of what a step means."""
    known = json.loads(GOLDEN.read_text())[kind]
    assert curve(20, **KNOWN[kind]) == pytest.approx(known, rel=1e-5)
    assert sum(known[-3:]) < 0.8 * sum(known[:3])


def test_half_precision_begins_like_fp32_and_learns() -> None:
    half, whole = (curve(20, kind=torch.float32, precision=precision) for precision in ("bf16", "fp32"))
    assert half[:3] == pytest.approx(whole[:3], rel=2e-2)  # bf16 has 8 bits; later steps blow up what they leave out
    emulated = isinstance(autocast("bf16", torch.device("cpu")), nullcontext)  # by this machine's CPU
    assert (half == whole) == emulated
    assert sum(half[-3:]) < 0.8 * sum(half[:3])
