"""On a GPU: the numbers of the CPU, no waiting within a step, runs of every kind, and two ranks on one card."""

import multiprocessing
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PEOPLE, make_data, small_run
from test_dic import small
from test_ranks import Job, on_two_ranks
from test_train import KINDS, STEPS, Cut, Looks, assert_equal_runs, cut_after, rows_of, untimed
from torch import Tensor, nn

from benchmarks.training import ready, settings
from fer.data.augment import Augmenter
from fer.data.dataset import open_data
from fer.errors import UserError
from fer.evaluate import evaluate
from fer.losses import LOSSES, build_loss
from fer.predict import Predictor
from fer.resources import Resources
from fer.run import Run
from fer.signals import Stopped
from fer.step import Part, Stepper
from fer.super_resolution.networks import NetworkUpscaler
from fer.teacher import teacher_of
from fer.train import fit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")

ON_CPU = Resources(device="cpu")
ON_GPU = Resources(device="cuda")
GPU = torch.device("cuda", 0)
PLAIN: dict[str, Any] = {
    "model": {"conv_dropout": 0, "dense_dropout": 0},
    "augment": {"rotation": 0, "scale": 0, "flip": 0, "translation": 0, "brightness": 0, "contrast": 0},
}
RUNS = KINDS | {"fp16": {"precision": "fp16"}, "bf16": {"precision": "bf16"}, "ema": {"ema_decay": 0.9}}
RECIPES = [
    "vgg13_small", "vgg13_ferplus", "small_resnet", "efficientnet_lite0", "swin_nr_fpdls_tiny", "vit_se_tiny",
    "doe_tiny", "emotion_encoder_tiny", "disentangled_doe_tiny",
]  # fmt: skip


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With as many neutral faces as the recipes of DoE compare with."""
    counts = {"train": 160, "val": 8, "test": 8}
    return make_data(tmp_path_factory.mktemp("many") / "data", counts, subjects=PEOPLE)


@pytest.fixture
def exact() -> Iterator[None]:
    """Convolutions in true fp32, as matrix products are by default."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def resources_of(kind: str) -> Resources:
    return Resources(device="cuda", accumulate=4 if kind == "parts" else 1)


# Runs


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_cut_and_resumed_or_recorded_equals_the_uncut_one(kind: str, bars: Path, tmp_path: Path) -> None:
    run, resources = small_run(**RUNS[kind]), resources_of(kind)
    whole = fit("x", run, resources, bars, tmp_path / "whole")
    with pytest.raises(Cut):
        fit("x", run, resources, bars, tmp_path / "cut", cut_after(1))
    with pytest.raises(Stopped):
        fit("x", run, resources, bars, tmp_path / "cut", leaves=Looks(STEPS // 2))
    assert_equal_runs(fit("x", run, resources, bars, tmp_path / "cut"), whole)
    other = resources.model_copy(update={"cuda_graphs": not resources.cuda_graphs})
    assert_equal_runs(fit("x", run, other, bars, tmp_path / "other"), whole)


def test_a_recorded_teacher_answers_as_one_that_is_launched_and_on_the_cpu(bars: Path, tmp_path: Path) -> None:
    teacher = fit("x", small_run(precision="bf16", epochs=1), ON_GPU, bars, tmp_path / "whole")
    evaluate(teacher, bars, ON_GPU)
    run = small_run(teacher=teacher.name, augment={"mixup": 0.3})
    shutil.copytree(teacher.parent, tmp_path / "other")
    launched = ON_GPU.model_copy(update={"cuda_graphs": False})
    whole = fit("x", run, ON_GPU, bars, tmp_path / "whole")
    assert_equal_runs(whole, fit("x", run, launched, bars, tmp_path / "other"))
    data, seen = open_data(bars), torch.rand(16, 1, 16, 16)
    answers = []
    for device, graphs in ((GPU, True), (torch.device("cpu"), False)):
        asked = teacher_of(run, data, teacher.parent, device, graphs)
        assert asked is not None
        answers.append([asked(pixels.to(device)).cpu().clone() for pixels in (seen, 1 - seen, seen[:3])])
    for here, there in zip(*answers, strict=True):
        torch.testing.assert_close(here, there, atol=2e-2, rtol=0)  # bf16


class Waits(nn.Module):
    """It looks at a number on the GPU in each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, pixel_values: Tensor) -> Tensor:
        scale = pixel_values.mean().item()
        return pixel_values.flatten(1)[:, :8] * self.weight * scale


def record_what_waits() -> None:
    stepper = Stepper(small_run(), Waits().to(GPU), GPU, graphs=True)
    pixels = torch.rand(4, 1, 16, 16, device=GPU)
    part = Part({"pixel_values": pixels}, torch.zeros(4, dtype=torch.int64), torch.zeros(4, 8), 1.0)
    with pytest.raises(UserError, match=r"^resources.cuda_graphs: this network cannot be recorded .+; set it to false"):
        stepper([part], lambda logits, labels, targets: logits.sum(), None, 1e-3, 0)


def test_a_network_that_cannot_be_recorded_is_named() -> None:
    """In a process of its own, in which nothing can be drawn at random afterwards."""
    process = multiprocessing.get_context("spawn").Process(target=record_what_waits)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_streamed_images_are_the_resident_ones(bars: Path, tmp_path: Path) -> None:
    streamed = Resources(device="cuda", data_share=0.0, readers=2)
    folders = [fit("x", small_run(), asked, bars, tmp_path / str(n)) for n, asked in enumerate((ON_GPU, streamed))]
    assert_equal_runs(*folders)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_losses_of_a_run_are_those_on_the_cpu(optimizer: str, bars: Path, tmp_path: Path) -> None:
    run = small_run(**PLAIN, optimizer={"name": optimizer, "lr": 0.003, "weight_decay": 0.01})
    rows = [untimed(rows_of(fit("x", run, asked, bars, tmp_path / asked.device))) for asked in (ON_CPU, ON_GPU)]
    for here, there in zip(*rows, strict=True):
        assert there["train_loss"] == pytest.approx(here["train_loss"], rel=2e-3)
        assert there["val_loss"] == pytest.approx(here["val_loss"], rel=2e-3)


@pytest.mark.usefixtures("exact")
def test_a_run_of_one_device_is_resumed_and_evaluated_on_the_other(bars: Path, tmp_path: Path) -> None:
    run = small_run()
    with pytest.raises(Cut):
        fit("x", run, ON_CPU, bars, tmp_path, cut_after(1))
    with pytest.raises(Cut):
        fit("x", run, ON_GPU, bars, tmp_path, cut_after(2))
    folder = fit("x", run, ON_CPU, bars, tmp_path)
    assert [row["epoch"] for row in rows_of(folder)] == [1, 2, 3]
    data = open_data(bars)
    found = evaluate(folder, bars, ON_GPU)
    faces = data.split("test").pixels(np.arange(40)).numpy()
    ours = [Predictor(folder, device=device).probabilities(faces) for device in ("cpu", "cuda")]
    np.testing.assert_allclose(ours[0], ours[1], atol=1e-5)
    assert found["test"]["accuracy"] == (ours[1].argmax(1) == data.split("test").labels.numpy()).mean()


def test_two_ranks_on_one_card_share_their_batch_statistics(bars: Path, tmp_path: Path) -> None:
    """Gloo, since NCCL wants a card for each rank; as exact as the order of the sums."""
    run = small_run(model={"conv_dropout": 0, "dense_dropout": 0}, optimizer={"name": "sgd", "lr": 0.01}, epochs=2)
    job = Job(run, tmp_path / "two", sync=True, device="cuda")
    ((folder, error),) = on_two_ranks(bars, tmp_path, job)
    assert error == ""
    alone = fit("x", run, ON_GPU, bars, tmp_path / "one")
    for one, two in zip(untimed(rows_of(alone)), untimed(rows_of(folder)), strict=True):
        assert one["train_loss"] == pytest.approx(two["train_loss"], rel=5e-3)


def test_memory_that_does_not_suffice_is_one_line(bars: Path, tmp_path: Path) -> None:
    from pipelines.experiments import Job as Asked
    from pipelines.work import work

    run = small_run(input={"image_size": 256, "channels": 1}, model={"width": 1.0}, batch_size=96)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.01)
    try:
        ended = work(Asked("x", run, ON_GPU, tmp_path / "runs" / "x", None), bars)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert ended.kind == "fault"
    assert "lower batch_size or resources.eval_batch_size, or raise resources.accumulate" in ended.message


# Steps


def recipe(name: str, **changes: Any) -> tuple[Run, Resources]:
    if name.startswith("efficientnet_lite"):
        pytest.importorskip("efficientnet_lite_pytorch")
    return settings(name, GPU, batch_size=16, **changes)


@pytest.mark.parametrize("extra", [{}, {"loss": "vote_sampling", "ema_decay": 0.99}], ids=["as it is", "sampled, ema"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_step_never_waits_for_the_gpu(name: str, extra: dict[str, Any], many: Path) -> None:
    stepper, batches, loss = ready(*recipe(name, **extra), open_data(many), GPU)
    try:
        for step, (parts, mixture) in enumerate(batches.epoch(0)):
            stepper(parts, loss, mixture, 1e-4, step)
            if step == 1:  # after what the first steps allocate
                torch.cuda.set_sync_debug_mode("error")
            if step == 4:
                break
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step == 4


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("name", RECIPES)
def test_networks_and_gradients_are_those_of_the_cpu(name: str, many: Path) -> None:
    run, resources = recipe(name, precision="fp32")
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for device in (torch.device("cpu"), GPU):
        stepper, batches, loss = ready(run, resources, open_data(many), device)
        stepper.model.eval()  # no dropout, whose random numbers differ
        parts, _ = next(iter(batches.epoch(0)))
        if device.type == "cpu":
            first = parts
        there = {key: value.to(device) for key, value in first[0].inputs.items()}
        logits = stepper.model(**there)
        loss(logits, first[0].labels.to(device), first[0].targets.to(device)).backward()
        grads = {name: p.grad.cpu() for name, p in stepper.model.named_parameters() if p.grad is not None}
        found.append((logits.detach().cpu(), grads))
    (ours, our_grads), (theirs, their_grads) = found
    torch.testing.assert_close(ours, theirs, atol=5e-4, rtol=5e-4)
    for key, grad in our_grads.items():
        apart = (grad - their_grads[key]).norm() / grad.norm().clamp_min(1e-6)
        assert apart < 5e-3, key


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "vote_sampling"])
def test_losses_are_those_of_the_cpu(name: str) -> None:
    torch.manual_seed(0)
    logits, targets = 5 * torch.randn(64, 8), torch.rand(64, 8)
    targets /= targets.sum(1, keepdim=True)
    labels, prior = targets.argmax(1), 0.7 * torch.eye(8) + 0.3 / 8
    values = []
    for device in (torch.device("cpu"), GPU):
        loss = build_loss(LOSSES[name](), 0.5, prior.to(device), torch.arange(1, 9, device=device))
        values.append(float(loss(logits.to(device), labels.to(device), targets.to(device))))
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_augmentation_is_that_of_the_cpu() -> None:
    run = small_run(
        augment={
            "rotation": 30, "scale": 0.2, "stretch": 0.1, "skew": 0.1, "translation": 0.1, "brightness": 0.4,
            "contrast": 0.4, "saturation": 0.4, "erasing": 0.5,
        }
    )  # fmt: skip
    images = torch.rand(32, 3, 48, 48)
    draws = Augmenter(run.augment, torch.device("cpu")).draw(32, 7)
    here = Augmenter(run.augment, torch.device("cpu"))(images.clone(), draws)
    there = Augmenter(run.augment, GPU)(images.to(GPU), draws.to(GPU)).cpu()
    torch.testing.assert_close(here, there, atol=2e-4, rtol=0)


# Super-resolution


@pytest.mark.usefixtures("exact")
def test_a_network_upscales_as_on_the_cpu() -> None:
    torch.manual_seed(0)
    faces = np.random.default_rng(0).integers(0, 256, (3, 16, 16), dtype=np.uint8)
    network = small()
    found = [NetworkUpscaler(network, device, "fp32")(faces, 2).astype(int) for device in (torch.device("cpu"), GPU)]
    assert np.abs(found[0] - found[1]).max() <= 1
