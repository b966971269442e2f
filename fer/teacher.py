"""Distillation: a finished run shows a network that is trained how it sees each image."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fer import checkpoint
from fer.data.dataset import DataSet
from fer.ensemble import finished, member_of
from fer.errors import UserError
from fer.formats import read_run
from fer.input import Input
from fer.models import build_model
from fer.models.ensemble import Ensemble
from fer.run import Run
from fer.run_folder import BEST
from fer.step import recording


class Teacher:
    """The probabilities [B, C] that a finished run gives to images as its student gets them, mixed and augmented.

    Beyer et al. 2022 (arXiv 2106.05237, section 3): the two see the same view. `graphs`: on a GPU, replay the pass over
    the first batch for later ones of its size.
    """

    def __init__(self, network: nn.Module, student: Input, device: torch.device, graphs: bool = False):
        self.network = network.to(device).eval().requires_grad_(False)
        mean, std = torch.tensor(student.normalisation(), device=device).T.reshape(2, 1, -1, 1, 1)
        self.mean, self.std = mean, std
        self.graphs = graphs and device.type == "cuda"
        self.recorded: Callable[[Tensor], Tensor] | None = None
        self.shape: torch.Size | None = None  # of what was recorded

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor) -> Tensor:
        """Its probabilities for the student's normalised input [B, channels, S, S]; valid until the next call."""
        if self.graphs and self.recorded is None:
            self.recorded, self.shape = _recorded(self._predict, pixel_values), pixel_values.shape
        if self.recorded is not None and pixel_values.shape == self.shape:
            return self.recorded(pixel_values)
        return self._predict(pixel_values)

    def _predict(self, pixel_values: Tensor) -> Tensor:
        return self.network(pixel_values=pixel_values * self.std + self.mean).exp()


def teacher_of(run: Run, data: DataSet, runs: Path, device: torch.device, graphs: bool) -> Teacher | None:
    """The teacher that `run` names, a folder in `runs`; None if it names none.

    Raises UserError if it is missing, unfinished, of other data, or takes embeddings.
    """
    found = check_teacher(run, data, runs)
    if found is None:
        return None
    whole = found.model if isinstance(found.model, Ensemble) else None
    model = whole or Ensemble(members=[member_of(found)], weights=[1.0])
    network: Any = build_model(model, found.input, len(data.classes), pretrained=False)
    checkpoint.load_weights(runs / str(run.teacher) / BEST, network if whole else network.members[0])
    return Teacher(network, run.input, device, graphs)


def check_teacher(run: Run, data: DataSet, runs: Path) -> Run | None:
    """The teacher's own settings; None if `run` names none. Raises UserError if it is unfinished, or of other data."""
    if run.teacher is None:
        return None
    folder = runs / run.teacher
    try:
        return read_run(finished(folder, data), folder / BEST / checkpoint.META)
    except UserError as error:
        raise UserError(*(f"teacher: {line}" for line in error.lines)) from None


def _recorded(predict: Callable[[Tensor], Tensor], sample: Tensor) -> Callable[[Tensor], Tensor]:
    """`predict` as a CUDA graph for inputs like `sample`; each result lives where the one before did."""
    given, graph, beside = sample.clone(), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with recording("the teacher"):
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(3):  # cuDNN and cuBLAS set themselves up in the first passes
                predict(given)
        torch.cuda.current_stream().wait_stream(beside)
        with torch.cuda.graph(graph):
            found = predict(given)

    def replay(pixel_values: Tensor) -> Tensor:
        given.copy_(pixel_values)
        graph.replay()
        return found

    return replay
