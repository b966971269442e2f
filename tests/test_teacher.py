"""Distillation: the teacher sees what its student sees, and its share of the loss is what it should be."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, doe, make_data, refusal, small_run
from scipy.special import log_softmax
from test_ensemble import OTHER, finished, raw
from test_train import Cut, assert_equal_runs, cut_after
from torch import nn

from fer.data.augment import Mixture
from fer.data.dataset import open_data
from fer.ensemble import combine
from fer.export import write_folder
from fer.input import Input, model_input
from fer.predict import Predictor
from fer.step import Part, Stepper
from fer.teacher import check_teacher, teacher_of, worse_view
from fer.train import fit

INPUTS = [Input(image_size=16, channels=1, mean=[0.3], std=[0.5]), Input(image_size=16, mean=[0.1, 0.2, 0.3])]


@pytest.fixture(scope="module")
def teachers(bars: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two finished runs of different forms, and their ensemble."""
    folder = tmp_path_factory.mktemp("runs")
    members = [finished(bars, folder, **keys) for keys in ({"epochs": 1}, OTHER)]
    return [*members, combine(members, bars, CPU)]


def taught(teacher: Path, **keys: Any) -> dict[str, Any]:
    return {"teacher": teacher.name, "epochs": 2, "seed": 7, **keys}


@pytest.mark.parametrize("given", INPUTS)
def test_it_answers_as_it_does_alone_whatever_the_student_makes_of_the_pixels(
    given: Input, teachers: list[Path], bars: Path
) -> None:
    data = open_data(bars)
    faces = data.split("test").pixels(np.arange(40))
    pixels = model_input(faces, given)
    for folder in teachers:
        teacher = teacher_of(
            small_run(**taught(folder, input=dict(given))), data, teachers[0].parent, torch.device("cpu"), False
        )
        assert teacher is not None
        np.testing.assert_allclose(teacher(pixels).numpy(), raw(folder, faces.numpy()), atol=2e-3)  # bf16
    assert teacher_of(small_run(), data, teachers[0].parent, torch.device("cpu"), False) is None


class Flat(nn.Module):
    """Logits are the pixels, twice as large."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return pixel_values.flatten(1) * self.scale


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_its_share_of_the_loss_is_the_cross_entropy_with_its_answers(share: float) -> None:
    run = small_run(teacher="x", teacher_share=share, clip_grad_norm=None, optimizer={"name": "sgd", "lr": 0.1})
    pixels = torch.randn(4, 1, 2, 4, generator=torch.Generator().manual_seed(0))
    answers = torch.softmax(pixels.flatten(1).flip(1), 1)
    labels = torch.arange(4)
    part = Part({"pixel_values": pixels}, labels, torch.eye(8)[labels], 1.0)

    def own(logits: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits, labels)

    stepper = Stepper(run, Flat(), torch.device("cpu"), teacher=lambda seen: torch.softmax(seen.flatten(1).flip(1), 1))
    mixture = Mixture(0.75, None)
    _, value = stepper([part], own, mixture, 0.1, 0)
    logs = log_softmax(2 * pixels.flatten(1).numpy(), 1)
    mixed = 0.75 * -logs[np.arange(4), labels] + 0.25 * -logs[np.arange(4), mixture.partner(labels)]
    agreement = -(answers.numpy() * logs).sum(1)
    assert float(value) == pytest.approx((1 - share) * mixed.mean() + share * agreement.mean(), rel=1e-5)
    changed = Stepper(run, Flat(), torch.device("cpu"), teacher=stepper.teacher)
    changed([Part(part.inputs, 7 - labels, part.targets, 1.0)], own, None, 0.1, 0)
    assert (stepper.model.scale == changed.model.scale) == (share == 1)  # labels count for nothing then


def test_its_answers_are_asked_for_once_a_step() -> None:
    seen = []

    def teacher(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(pixels)
        return torch.softmax(pixels.flatten(1), 1)

    run = small_run(teacher="x", sam_rho=0.05)
    part = Part({"pixel_values": torch.rand(4, 1, 2, 4)}, torch.arange(4), torch.eye(8)[:4], 0.5)
    stepper = Stepper(run, Flat(), torch.device("cpu"), teacher=teacher)
    stepper([part, part], lambda logits, labels, targets: nn.functional.cross_entropy(logits, labels), None, 0.1, 0)
    assert len(seen) == 2  # one of each part


def test_without_a_share_it_changes_nothing_but_the_id(teachers: list[Path], bars: Path, tmp_path: Path) -> None:
    plain = fit("x", small_run(epochs=1), CPU, bars, tmp_path)
    asked = small_run(**taught(teachers[0], epochs=1, seed=small_run().seed, teacher_share=0.0))
    silent = fit("x", asked, CPU, bars, teachers[0].parent)
    assert silent.name != plain.name
    assert (silent / "best/model.safetensors").read_bytes() == (plain / "best/model.safetensors").read_bytes()


@pytest.mark.parametrize("keys", [{}, {"augment": {"mixup": 0.3}, "sam_rho": 0.05}])
def test_a_taught_run_cut_and_resumed_equals_the_uncut_one(
    keys: dict[str, Any], teachers: list[Path], bars: Path, tmp_path: Path
) -> None:
    run = small_run(**taught(teachers[-1], **keys))
    whole, partly = (shutil.copytree(teachers[-1].parent, tmp_path / name) for name in ("whole", "cut"))
    with pytest.raises(Cut):
        fit("x", run, CPU, bars, partly, cut_after(1))
    assert_equal_runs(fit("x", run, CPU, bars, partly), fit("x", run, CPU, bars, whole))
    kept = [folder / run.teacher / "best/model.safetensors" for folder in (partly, teachers[-1].parent)]
    assert kept[0].read_bytes() == kept[1].read_bytes()


def test_a_student_comes_to_agree_with_its_teacher(teachers: list[Path], bars: Path, tmp_path: Path) -> None:
    """Labels are noise to it; what it learns is the teacher's view of the images."""
    data = open_data(bars)
    faces = data.split("test").pixels(np.arange(40)).numpy()
    teacher = shutil.copytree(teachers[0], tmp_path / teachers[0].name)
    apart = []
    for epochs in (1, 6):
        student = finished(bars, tmp_path, **taught(teacher, epochs=epochs, teacher_share=1.0))
        answers, wanted = raw(student, faces), raw(teacher, faces)
        apart.append((wanted * np.log(wanted / answers)).sum(1).mean())
    assert apart[1] < 0.5 * apart[0]


def test_a_student_is_passed_on_without_its_teacher_which_its_card_names(
    teachers: list[Path], bars: Path, tmp_path: Path
) -> None:
    runs = shutil.copytree(teachers[0].parent, tmp_path / "runs")
    student = finished(bars, runs, **taught(teachers[0], epochs=1))
    shutil.rmtree(runs / teachers[0].name)
    assert finished(bars, runs, **taught(teachers[0], epochs=1)) == student  # nothing is left to do
    write_folder(student, folder := tmp_path / "given")
    faces = open_data(bars).split("test").pixels(np.arange(5)).numpy()
    np.testing.assert_array_equal(Predictor(folder).probabilities(faces), Predictor(student).probabilities(faces))
    named = f"It also learned from the answers of the run {teachers[0].name}."
    assert named in (folder / "README.md").read_text()
    write_folder(teachers[0], tmp_path / "other")
    assert "It also learned" not in (tmp_path / "other/README.md").read_text()


@pytest.mark.parametrize(("side", "least"), [(16, [16, 16, 16]), (24, [16, 24, 24])])
def test_who_sees_less_through_its_student_than_alone_is_told(
    side: int, least: list[int], teachers: list[Path], tmp_path: Path
) -> None:
    """The first of the teachers takes 16 px, the second 24, the third is both; `side`: of their images."""
    runs = shutil.copytree(teachers[0].parent, tmp_path / "runs")
    for teacher, wanted in zip(teachers, least):
        config = json.loads((runs / teacher.name / "config.json").read_text())
        config["data"]["image_shape"] = [side, side]
        (runs / teacher.name / "config.json").write_text(json.dumps(config))
        for size in (wanted, wanted - 1):
            run = small_run(**taught(teacher, model=OTHER["model"], input={"image_size": size}))
            told = worse_view(run, runs)
            assert (told is None) == (size == wanted)
            assert told is None or f"sees {size} px as its student does, alone {wanted} px" in told


def test_a_teacher_of_colours_whose_student_sees_none_is_told(teachers: list[Path], tmp_path: Path) -> None:
    """The first of the teachers is grey, the second and the third, of which it is one, see colour where there is."""
    runs = shutil.copytree(teachers[0].parent, tmp_path / "runs")
    for teacher, of_colour in zip(teachers, (False, True, True)):
        for shape in ([16, 16], [16, 16, 3]):
            config = json.loads((runs / teacher.name / "config.json").read_text())
            config["data"]["image_shape"] = shape
            (runs / teacher.name / "config.json").write_text(json.dumps(config))
            for channels in (1, 3):
                input_ = {"channels": channels, "mean": [0.5], "std": [0.5]}
                told = worse_view(small_run(**taught(teacher, model=OTHER["model"], input=input_)), runs)
                blind = of_colour and len(shape) == 3 and channels == 1
                words = "teacher: sees grey as its student does, alone colour; its answers suffer from it"
                assert told == (words if blind else None)


def test_what_cannot_teach_or_be_taught(teachers: list[Path], bars: Path, tmp_path: Path) -> None:
    unfinished = fit("x", small_run(seed=3, epochs=1), CPU, bars, teachers[0].parent)
    compares = finished(bars, teachers[0].parent, **doe(epochs=1))
    other = make_data(tmp_path / "other", seed=1)
    teacher = teachers[0]
    for keys, data, told in (
        (
            {"teacher": "nothing"},
            bars,
            "/nothing: the run is not finished; finish it with `fer train`",
        ),
        (taught(unfinished), bars, f"teacher: {unfinished}: the run is not finished; finish it with `fer train`"),
        (taught(teacher), other, f"teacher: {teacher}: was trained on other data than"),
        (
            taught(compares),
            bars,
            f"teacher: {compares}: networks with a frozen encoder, which take embeddings, cannot be averaged or teach",
        ),
        (doe(teacher=teacher.name), bars, "teacher: has no images to look at, as the model takes embeddings"),
    ):
        run, runs = small_run(**keys), teachers[0].parent
        assert told in refusal(check_teacher, run, open_data(data), runs)  # before anything starts
        assert told in refusal(fit, "x", run, CPU, data, runs)
