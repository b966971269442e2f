"""One training step: forward and backward over the parts of a batch, then the update of weights and averages."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fer.data.augment import Mixture
from fer.device import autocast, seed_all
from fer.errors import UserError, first_line
from fer.losses import Loss, soft_cross_entropy
from fer.optimizer import build_optimizer
from fer.run import Run


@dataclass
class Part:
    """One forward and backward pass of a step, on the network's device."""

    inputs: dict[str, Tensor]  # arguments of the network
    labels: Tensor  # int64 [b]
    targets: Tensor  # float32 [b, C]
    weight: float  # its share of the worker's images of this step


class Stepper:
    """The network in training, its optimizer, and its averaged weights if the run has `ema_decay`.

    `graphs`: on a GPU, replay the passes of the first step in later ones; every step is then one part of one size.
    `teacher` gives the probabilities [B, C] that another network sees in `pixel_values`.
    """

    def __init__(
        self, run: Run, model: nn.Module, device: torch.device, world: int = 1, graphs: bool = False,
        teacher: Callable[[Tensor], Tensor] | None = None,
    ):  # fmt: skip
        self.run, self.model, self.device, self.teacher = run, model, device, teacher
        self.graphs = graphs and device.type == "cuda" and world == 1 and not run.sam_rho
        self.recorded: Callable[..., Tensor] | None = None
        self.optimizer = build_optimizer(run.optimizer, model, fused=run.precision != "fp16")
        self.scaler = torch.amp.GradScaler(device.type, enabled=run.precision == "fp16")
        self.ema = Average(model, run.ema_decay) if run.ema_decay else None
        self.network: Any = model
        if world > 1:
            self.network = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated and kept: the averaged one if the run has `ema_decay`."""
        return self.ema.module if self.ema is not None else self.model

    def __call__(
        self, parts: list[Part], loss: Loss, mixture: Mixture | None, rate: float, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Take one step; returns this worker's logits [B, C] and mean loss, both before the update.

        `rate`: learning rate. `seed`: of dropout and drop path. The parts' weights sum to 1.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        taught = [self.teacher(part.inputs["pixel_values"]) if self.teacher is not None else None for part in parts]
        found = self._gradients(parts, taught, loss, mixture, seed)
        if self.run.sam_rho:
            with self._uphill(self.run.sam_rho), frozen_statistics(self.model):
                self._gradients(parts, taught, loss, mixture, seed)
        self.update()
        return found

    def update(self) -> None:
        """Clip the gradients, take the optimizer's step, and update the averaged weights."""
        if self.run.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.run.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update()

    def _gradients(
        self, parts: list[Part], taught: list[Tensor | None], loss: Loss, mixture: Mixture | None, seed: int
    ) -> tuple[Tensor, Tensor]:
        if self.graphs and self.recorded is None:
            with autocast(self.run.precision, self.device):
                self.recorded = record(self.model, parts[0].inputs)  # before the seed, as it draws numbers
        seed_all(seed, self.device)  # dropout, drop path
        self.optimizer.zero_grad(set_to_none=True)
        logits, total = [], torch.zeros((), device=self.device)
        for number, (part, answers) in enumerate(zip(parts, taught, strict=True), 1):
            with self._without_exchange(number < len(parts)):
                with autocast(self.run.precision, self.device):
                    found = self._forward(part.inputs)
                value = _mixed_loss(loss, found, part, mixture)
                if answers is not None:
                    share = self.run.teacher_share
                    value = (1 - share) * value + share * soft_cross_entropy(found, answers).mean()
                value = value * part.weight
                self.scaler.scale(value).backward()
            logits.append(found.detach())
            total += value.detach()
        return torch.cat(logits), total

    def _forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.network(**inputs) if self.recorded is None else self.recorded(*inputs.values())

    def _without_exchange(self, more: bool) -> AbstractContextManager:
        """With gradient accumulation, workers exchange gradients once per step, in the last part."""
        if more and isinstance(self.network, DistributedDataParallel):
            return self.network.no_sync()
        return nullcontext()

    @contextmanager
    def _uphill(self, rho: float) -> Iterator[None]:
        """Weights moved by rho along the gradient, then restored (Foret et al. 2021, arXiv 2010.01412, equation 2)."""
        moved = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([p.grad for p in moved])))  # type: ignore[misc]
        with torch.no_grad():
            before = [p.clone() for p in moved]
            for p in moved:
                assert p.grad is not None
                p.add_(p.grad * (rho / (norm + 1e-12)))
        try:
            yield
        finally:
            with torch.no_grad():
                for p, kept in zip(moved, before, strict=True):
                    p.copy_(kept)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds besides the weights: tensors and plain values."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.state() if self.ema is not None else None,
        }

    def load_state(self, saved: dict[str, Any]) -> None:
        """Restore what `state` returned, on any device."""
        self.optimizer.load_state_dict(saved["optimizer"])
        for parameter, values in self.optimizer.state.items():
            for key, value in values.items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    # in its memory layout, which fused optimizers need
                    values[key] = torch.empty_like(parameter).copy_(value)
        self.scaler.load_state_dict(saved["scaler"])
        if self.ema is not None:
            self.ema.load_state(saved["ema"])


class Average:
    """The exponential moving average of a network: `module` has its weights and statistics.

    torch's AveragedModel does the same, but on a GPU it waits for all pending work at every step.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.module, self.decay, self.updates = copy.deepcopy(model), decay, 0
        pairs = [
            (mine.detach(), theirs.detach())
            for one, other in ((self.module.parameters(), model.parameters()), (self.module.buffers(), model.buffers()))
            for mine, theirs in zip(one, other, strict=True)
        ]
        self.means = [pair for pair in pairs if pair[0].is_floating_point()]
        self.counts = [pair for pair in pairs if not pair[0].is_floating_point()]  # of batches, in batch norm

    @torch.no_grad()
    def update(self) -> None:
        """First the weights themselves; t steps later the average decays by min(decay, (1 + t) / (10 + t)).

        But for the first one as TensorFlow's ExponentialMovingAverage, so as to forget the initial weights: 150 steps
        of .999 would leave 86 % of them.
        """
        t = self.updates
        decay = min(self.decay, (1 + t) / (10 + t)) if t else 0.0
        mine, theirs = map(list, zip(*self.means))
        get_ema_multi_avg_fn(decay)(mine, theirs, t)
        for mean, current in self.counts:
            mean.copy_(current)
        self.updates += 1

    def state(self) -> dict[str, Tensor]:
        """As AveragedModel's, which earlier checkpoints hold."""
        weights = {f"module.{name}": tensor for name, tensor in self.module.state_dict().items()}
        return {"n_averaged": torch.tensor(self.updates), **weights}

    def load_state(self, saved: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self.updates = int(saved["n_averaged"])
        weights = {name.removeprefix("module."): tensor for name, tensor in saved.items() if name != "n_averaged"}
        self.module.load_state_dict(weights)


def _mixed_loss(loss: Loss, logits: Tensor, part: Part, mixture: Mixture | None) -> Tensor:
    value = loss(logits, part.labels, part.targets)
    if mixture is None:
        return value
    others = mixture.partner(logits)
    return mixture.share * value + (1 - mixture.share) * loss(logits, part.labels[others], part.targets[others])


def record(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[..., Tensor]:
    """The network as a function of the values of `inputs`, whose two passes are a CUDA graph each.

    Small networks are bound by the launches of their kernels, of which a graph needs one. The numbers stay the same.
    Raises UserError if the network cannot be recorded, as one whose operations wait for the GPU.
    """
    # the first backward pass after a recording warns that it crosses streams, which it does rightly
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    samples = tuple(value.clone() for value in inputs.values())
    kind = torch.get_autocast_dtype("cuda")
    with (
        recording("this network"),
        torch.autocast("cuda", kind, enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False),
    ):
        found: Any = torch.cuda.make_graphed_callables(
            ByPosition(model, list(inputs)), samples, allow_unused_input=True
        )
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])  # batch norm's statistics, which recording has changed
    return found


@contextmanager
def recording(what: str) -> Iterator[None]:
    """Raises UserError if `what` is recorded within the block and cannot be."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UserError(
            f"resources.cuda_graphs: {what} cannot be recorded ({first_line(error)}); set it to false"
        ) from None


class ByPosition(nn.Module):
    """A network whose arguments have lost their `names`."""

    def __init__(self, network: nn.Module, names: list[str]):
        super().__init__()
        self.network, self.names = network, names

    def forward(self, *values: Tensor) -> Tensor:
        return self.network(**dict(zip(self.names, values, strict=True)))


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Within the block, batch norm normalises by the batch, as in training, but leaves its running statistics alone."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
