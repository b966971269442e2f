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
from fer.run_folder import BEST, CONFIG, read_config
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
    """The teacher that `run` names, a folder in `runs`; None if it names none. Raises UserError as `check_teacher`."""
    found = check_teacher(run, data, runs)
    if found is None:
        return None
    network = _network(found, data)
    whole = isinstance(found.model, Ensemble)
    checkpoint.load_weights(runs / str(run.teacher) / BEST, network if whole else network.members[0])
    return Teacher(network, run.input, device, graphs)


def check_teacher(run: Run, data: DataSet, runs: Path) -> Run | None:
    """The teacher's own settings; None if `run` names none.

    Raises UserError if it is unfinished, of other data, or takes embeddings, or if `run` does.
    """
    if run.teacher is None:
        return None
    folder = runs / run.teacher
    try:
        found = read_run(finished(folder, data), folder / BEST / checkpoint.META)
    except UserError as error:
        raise UserError(*(f"teacher: {line}" for line in error.lines)) from None
    with torch.device("meta"):  # nothing is computed or loaded
        student = build_model(run.model, run.input, len(data.classes), pretrained=False)
        try:
            _network(found, data)
        except UserError as error:
            raise UserError(*(f"teacher: {folder}: {line}; name another run" for line in error.lines)) from None
    if student.embeds and not student.needs_pixels and not run.augment.changes_images:
        raise UserError("teacher: has no images to look at, as the model takes embeddings; set it to null")
    return found


def worse_view(run: Run, runs: Path) -> str | None:
    """What the teacher, a folder in `runs`, sees less of through `run`'s input than alone, if it does."""
    folder = runs / str(run.teacher)
    content = read_config(folder)
    theirs = read_run(content, folder / CONFIG)
    members = theirs.model.members if isinstance(theirs.model, Ensemble) else [member_of(theirs)]
    shape = content["data"]["image_shape"]
    side = min(*shape[:2], max(member.input.image_size for member in members))
    colour = len(shape) == 3 and any(member.input.channels == 3 for member in members)
    lost = []
    if run.input.image_size < side:
        lost.append(f"{run.input.image_size} px as its student does, alone {side} px")
    if run.input.channels == 1 and colour:
        lost.append("grey as its student does, alone colour")
    return f"teacher: sees {' and '.join(lost)}; its answers suffer from it" if lost else None


def _network(teacher: Run, data: DataSet) -> Any:
    """The network of a run, alone or of several, as that of an ensemble."""
    model = teacher.model
    whole = model if isinstance(model, Ensemble) else Ensemble(members=[member_of(teacher)], weights=[1.0])
    return build_model(whole, teacher.input, len(data.classes), pretrained=False)


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
