"""Parts of the training engine and whole epochs against `benchmarks.reference`, on the same faces."""

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import reference
from benchmarks.faces import write_faces
from benchmarks.measure import ROOT, Effort, Row, Work, beside
from fer.batches import Feed, TrainBatches
from fer.data.augment import Augmenter
from fer.data.dataset import DataSet, open_data
from fer.device import computes_bf16
from fer.evaluate import predict_split
from fer.input import Change, model_input
from fer.losses import Loss, build_loss
from fer.models import build_model
from fer.models.depthwise import DepthwiseConv2d
from fer.models.network import Network
from fer.resources import Resources
from fer.run import Run
from fer.step import Part, Stepper
from fer.train import fit
from pipelines import experiments, params

# dense bf16 FLOP/s from the vendors' data sheets, by the first key that is in the device's name
PEAKS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12, "H200": 989e12, "GH200": 989e12,
    "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12,
}  # fmt: skip
CHANNELS, SIDE = 96, 12  # of the convolution that stands for what a processor can do
PNG = "PNG files, PIL, fp32"


def settings(name: str, device: torch.device, **changes: Any) -> tuple[Run, Resources]:
    """An experiment of the project with random weights, no warm-up, and the threads of this process."""
    own = {
        "resources.device": device.type,
        "resources.cpus_per_worker": torch.get_num_threads(),
        "schedule.warmup_epochs": 0,
    }
    words = [name, *(f"{key}={value}" for key, value in (own | changes).items())]
    with chdir(ROOT):
        found = experiments.load(words, params.machine(params.load()))[name]
    bare = {key: backbone.model_copy(update={"weights": None}) for key, backbone in found.run.model.backbones().items()}
    return found.run.model_copy(update={"model": found.run.model.model_copy(update=bare)}), found.resources


@contextmanager
def faces(run: Run, **counts: int) -> Iterator[tuple[DataSet, Path]]:
    """Drawn faces of the run's image size in a temporary folder: the data of the engine, and a folder of PNG files."""
    with tempfile.TemporaryDirectory() as folder:
        write_faces(Path(folder), run.input.image_size, **{"train": 1, "val": 1, "test": 1} | counts)
        yield open_data(folder), Path(folder) / "png"


def batches(
    run: Run, resources: Resources, data: DataSet, device: torch.device, augmented: bool
) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
    """Inputs, labels and targets of one epoch, as the engine prepares them."""
    split = data.split("train")
    feed = Feed(Network(), run, resources, split, data.classes, device)
    change = changes(run, device) if augmented else None
    order = np.random.default_rng(run.seed).permutation(len(split))
    whole = order[: len(order) // run.batch_size * run.batch_size].reshape(-1, run.batch_size)
    for index, pixels in feed.batches(list(whole)):
        yield feed(index, pixels, change() if change else None), *feed.truth(index)


def changes(run: Run, device: torch.device) -> Callable[[], Change]:
    """A function that returns the random augmentation of the next batch."""
    augmenter, seeds = Augmenter(run.augment, device), count()
    return lambda: augmenter.changes(augmenter.draw(run.batch_size, next(seeds)), run.input.image_size)


def loss_of(run: Run, data: DataSet, device: torch.device) -> Loss:
    """The loss of the run on these data."""
    counts = torch.bincount(data.split("train").labels, minlength=len(data.classes))
    return build_loss(
        run.loss, run.class_weights, data.prior().to(device), counts.to(device), adjustment=run.logit_adjustment
    )


def plain_loss(loss: Loss) -> Callable[[Tensor, Tensor], Tensor]:
    """The same loss as a function of logits and labels only."""
    return lambda logits, labels: loss(logits, labels, nn.functional.one_hot(labels, logits.shape[1]).float())


def ways(way: Callable[[int], Work]) -> list[Work]:
    """The reference with no loader process, and with as many as the engine has threads; the faster one counts."""
    return [way(0), way(torch.get_num_threads())]


def inputs_alone(run: Run, resources: Resources, data: DataSet, device: torch.device, augmented: bool) -> Work:
    """Preparing the engine's inputs of an epoch, without using them."""
    return lambda: sum(len(labels) for _, labels, _ in batches(run, resources, data, device, augmented))


def input_path(run: Run, resources: Resources, device: torch.device, effort: Effort, images: int) -> Iterator[Row]:
    """From files to normalised batches on the device, without and with augmentation."""
    kinds = (
        ("input", None, "PNG files"),
        ("input, augmented", reference.same_work(run), "PNG files, PIL, same work"),
        ("input, augmented", reference.as_published(run), "PNG files, PIL, as published"),
    )
    with faces(run, train=images) as (data, pngs):
        for what, transform, name in kinds:

            def way(workers: int, transform: reference.Transform | None = transform) -> Work:
                files = reference.loader(pngs / "train", run, resources, transform, workers, train=True)
                return lambda: sum(len(labels) for _, labels in reference.on_device(files, device))

            ours = inputs_alone(run, resources, data, device, augmented=transform is not None)
            yield Row(f"{what}, {run.input.image_size} px", *_named(name, beside(effort, ours, *ways(way))))


def _named(name: str, rates: tuple[float, float]) -> tuple[float, str, float]:
    return rates[0], name, rates[1]


def augmentation(run: Run, device: torch.device, effort: Effort, images: int) -> Iterator[Row]:
    """Decoded images to normalised ones: batches on the device against one image at a time in PIL, in one thread."""
    with faces(run, train=images) as (data, pngs):
        pixels = data.split("train").pixels(np.arange(images)).to(device)
        change = changes(run, device)
        plain = reference.PngFolder(pngs / "train", run.input, None)
        decoded = [plain.open(index) for index in range(images)]
        transform = reference.same_work(run)

        def ours() -> int:
            for part in pixels.split(run.batch_size):
                model_input(part, run.input, change())
            return images

        def theirs() -> int:
            return len([plain.normalized(transform(image)) for image in decoded])

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        rates = beside(effort, ours, theirs)
        torch.set_num_threads(threads)
    yield Row(f"augmentation, {run.input.image_size} px, one thread", *_named("PIL, same work", rates))


class Steps:
    """A network with its loss and optimizer, and a step of the engine or of the reference (fp32)."""

    def __init__(self, run: Run, data: DataSet, device: torch.device, graphs: bool = False):
        torch.manual_seed(run.seed)
        self.run = run
        self.model = build_model(run.model, run.input, len(data.classes)).to(device).train()
        self.loss = loss_of(run, data, device)
        self.stepper = Stepper(run, self.model, device, graphs=graphs)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)

    def step(self, inputs: dict[str, Tensor], labels: Tensor, targets: Tensor) -> None:
        """A step of the engine, in the precision of the run."""
        self.stepper([Part(inputs, labels, targets, 1.0)], self.loss, None, 1e-4, self.run.seed)

    def plain_step(self, images: Tensor, labels: Tensor) -> None:
        """A step of the reference."""
        reference.train_step(self.model, images, labels, plain_loss(self.loss), self.optimizer)


def train_step(run: Run, resources: Resources, device: torch.device, effort: Effort, name: str) -> Iterator[Row]:
    """Forward, backward and update on one prepared batch."""
    with faces(run, train=run.batch_size) as (data, _):
        inputs, labels, targets = next(batches(run, resources, data, device, augmented=False))
        sides = Steps(run, data, device, resources.cuda_graphs), Steps(run, data, device)

    def ours() -> int:
        sides[0].step(inputs, labels, targets)
        return len(labels)

    def theirs() -> int:
        sides[1].plain_step(inputs["pixel_values"], labels)
        return len(labels)

    yield Row(f"train step, {name}, {run.precision}", *_named("fp32, .item()", beside(effort, ours, theirs)))


def operations(run: Run, resources: Resources, device: torch.device, effort: Effort, name: str) -> Iterator[Row]:
    """A step, its input included, beside a convolution that repeats as many operations as it has, on as many images."""
    with faces(run, train=run.batch_size) as (data, _):
        steps = Steps(run, data, device)

        def ours() -> int:
            steps.step(*next(batches(run, resources, data, device, augmented=True)))
            return run.batch_size

        with FlopCounterMode(display=False) as counter:
            ours()
        flops = counter.get_total_flops() / run.batch_size
        kind = torch.bfloat16 if run.precision == "bf16" else torch.float32
        images, weights = (
            torch.rand(*sides, device=device, dtype=kind).contiguous(memory_format=torch.channels_last)
            for sides in ([run.batch_size, CHANNELS, SIDE, SIDE], [CHANNELS, CHANNELS, 3, 3])
        )
        once = 2 * 9 * CHANNELS**2 * SIDE**2 * run.batch_size

        def convolution() -> float:
            nn.functional.conv2d(images, weights, padding=1)
            return once / flops

        rate, plain = beside(effort, ours, convolution)
    of = f"3x3 convolution, {CHANNELS} channels, {SIDE} px"
    yield Row(f"training, {name}, {run.precision}", rate, of, plain, f"{flops * rate / 1e9:.3g} GFLOP/s")


def depthwise(run: Run, resources: Resources, device: torch.device, effort: Effort, name: str) -> Iterator[Row]:
    """The engine's step in bf16 against the same with all depthwise convolutions in bf16, and against fp32."""
    with faces(run, train=run.batch_size) as (data, _):
        batch = next(batches(run, resources, data, device, augmented=False))
        ours, slow = (Steps(run.model_copy(update={"precision": "bf16"}), data, device) for _ in range(2))
        fp32 = Steps(run.model_copy(update={"precision": "fp32"}), data, device)
    for module in slow.model.modules():
        if isinstance(module, DepthwiseConv2d):
            module.slow = False

    def way(steps: Steps) -> Work:
        def work() -> int:
            steps.step(*batch)
            return run.batch_size

        return work

    for other, steps in (("depthwise in bf16", slow), ("fp32", fp32)):
        yield Row(f"train step, {name}, bf16", *_named(other, beside(effort, way(ours), way(steps))))


def recorded(
    run: Run, resources: Resources, device: torch.device, effort: Effort, name: str, images: int
) -> Iterator[Row]:
    """Epochs without evaluation: the network's passes replayed, against launched one operation at a time."""
    with faces(run, train=images) as (data, _):

        def way(graphs: bool) -> Work:
            return epochs(run, resources.model_copy(update={"cuda_graphs": graphs}), data, device)

        _forget_peak(device)
        rates = beside(effort, way(True), way(False))
        memory = _peak_memory(device)
    yield Row(f"steps, {name}, {run.precision}", *_named("not recorded", rates), f"{memory:.1f} GiB" if memory else "")


def epochs(run: Run, resources: Resources, data: DataSet, device: torch.device) -> Work:
    """An epoch without evaluation, whenever it is called; returns its images."""
    stepper, whole, loss = ready(run, resources, data, device)

    def work() -> int:
        for step, (parts, mixture) in enumerate(whole.epoch(0)):
            stepper.network.train()
            stepper(parts, loss, mixture, 1e-4, step)
        return whole.images

    return work


def ready(run: Run, resources: Resources, data: DataSet, device: torch.device) -> tuple[Stepper, TrainBatches, Loss]:
    """What a run has before its first step."""
    torch.manual_seed(run.seed)
    model = build_model(run.model, run.input, len(data.classes)).to(device).train()
    feed = Feed(model, run, resources, data.split("train"), data.classes, device)
    feed.begin()
    stepper = Stepper(run, model, device, graphs=resources.cuda_graphs)
    return stepper, TrainBatches(feed, run, 1, 0, 1), loss_of(run, data, device)


def evaluation(
    run: Run, resources: Resources, device: torch.device, effort: Effort, name: str, images: int
) -> Iterator[Row]:
    """The accuracy on a split, starting from its files."""
    with faces(run, val=images) as (data, pngs):
        model = build_model(run.model, run.input, len(data.classes)).to(device)
        split = data.split("val")
        feed = Feed(model, run, resources, split, data.classes, device)

        def ours() -> int:
            predict_split(model, feed)
            return images

        def way(workers: int) -> Work:
            files = reference.loader(pngs / "val", run, resources, None, workers, train=False)
            return lambda: images if reference.accuracy(model, files, device) >= 0 else 0

        rates = beside(effort, ours, *ways(way))
    yield Row(f"evaluation, {name}, {run.precision}", *_named(PNG, rates))


def epoch(
    run: Run, resources: Resources, device: torch.device, effort: Effort, name: str, images: int
) -> Iterator[Row]:
    """A whole epoch of `fit` with evaluation and checkpoints, and the share of it that the input alone would take."""
    with faces(run, train=images, val=images // 8) as (data, pngs):
        rows: list[dict[str, Any]] = []
        fit("bench", run, resources, data.folder, data.folder / "runs", rows.append)
        # the first epoch is a warm-up
        rate = images / min(row["seconds"] for row in rows[1:])

        steps = Steps(run, data, device)

        def way(workers: int) -> Work:
            train = reference.loader(pngs / "train", run, resources, reference.same_work(run), workers, train=True)
            val = reference.loader(pngs / "val", run, resources, None, workers, train=False)

            def work() -> int:
                seen = reference.train_epoch(steps.model, train, plain_loss(steps.loss), steps.optimizer, device)
                reference.accuracy(steps.model, val, device)
                torch.save(steps.model.state_dict(), data.folder / "last.pth")
                return seen

            return work

        inputs, plain = beside(effort, inputs_alone(run, resources, data, device, augmented=True), *ways(way))
    yield Row(f"epoch, {name}, {run.precision}", rate, PNG, plain, f"input {100 * rate / inputs:.2g} % of it")


def published(
    run: Run, resources: Resources, device: torch.device, effort: Effort, name: str, images: int
) -> Iterator[Row]:
    """Training of a published system on images of its size: share of peak FLOP/s, share of the input, and memory.

    `fit` evaluates one small batch, so its images/s are those of training.
    """
    with faces(run, train=images, val=8) as (data, pngs):
        rows: list[dict[str, Any]] = []
        _forget_peak(device)
        fit("bench", run, resources, data.folder, data.folder / "runs", rows.append)
        rate, memory = max(row["images_per_second"] for row in rows[1:]), _peak_memory(device)
        steps = Steps(run, data, device)
        with FlopCounterMode(display=False) as counter:
            steps.step(*next(batches(run, resources, data, device, augmented=False)))
        flops = counter.get_total_flops() / run.batch_size

        def way(workers: int) -> Work:
            files = reference.loader(pngs / "train", run, resources, reference.same_work(run), workers, train=True)
            loss, optimizer = plain_loss(steps.loss), steps.optimizer
            return lambda: reference.train_epoch(steps.model, files, loss, optimizer, device)

        _forget_peak(device)
        inputs, plain = beside(effort, inputs_alone(run, resources, data, device, augmented=True), *ways(way))
        note = f"{_share_of_peak(flops * rate, device)}, input {100 * rate / inputs:.2g} % of it"
        if memory:
            note += f", {memory:.1f} GiB against {_peak_memory(device):.1f}"
    yield Row(f"training, {name}, {run.precision}", rate, PNG, plain, note)


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory(device: torch.device) -> float:
    """Peak GiB of tensors; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0


def _share_of_peak(flops: float, device: torch.device) -> str:
    """Model FLOP/s (convolutions, matrix products, attention; forward and backward), and its share of the bf16 peak."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = next((value for known, value in PEAKS.items() if re.search(rf"\b{known}\b", name)), None)
    return f"{flops / 1e12:.3g} TFLOP/s" + (f", MFU {100 * flops / peak:.1f} %" if peak else "")


def _input(device: torch.device, effort: Effort) -> Iterator[Row]:
    yield from input_path(*settings("swin_nr_fpdls", device), device, effort, effort.large)
    yield from input_path(*settings("vgg13_small", device), device, effort, effort.small)


def _augmentation(device: torch.device, effort: Effort) -> Iterator[Row]:
    run, _ = settings("swin_nr_fpdls", device)
    yield from augmentation(run, device, effort, effort.large // 4)


def _train_step(device: torch.device, effort: Effort) -> Iterator[Row]:
    for name in SMALL:
        yield from train_step(*settings(name, device), device, effort, name)


def _operations(device: torch.device, effort: Effort) -> Iterator[Row]:
    for precision in ("fp32", "bf16") if computes_bf16(device) else ("fp32",):
        for name in ("vgg13_small", "small_resnet"):
            yield from operations(*settings(name, device, precision=precision), device, effort, name)


def _depthwise(device: torch.device, effort: Effort) -> Iterator[Row]:
    """On a CPU only: a GPU computes them all in bf16."""
    if device.type == "cpu":
        yield from depthwise(*settings("efficientnet_lite0", device), device, effort, "efficientnet_lite0")


def _evaluation(device: torch.device, effort: Effort) -> Iterator[Row]:
    for name in SMALL:
        yield from evaluation(*settings(name, device), device, effort, name, effort.small)


def _epoch(device: torch.device, effort: Effort) -> Iterator[Row]:
    for name in SMALL:
        yield from epoch(*settings(name, device, epochs=1 + effort.rounds), device, effort, name, effort.small)


def _recorded(device: torch.device, effort: Effort) -> Iterator[Row]:
    """On a GPU only: on a CPU nothing is recorded."""
    for name in RECIPES if device.type == "cuda" else ():
        asked = settings(name, device)
        small = asked[0].input.image_size <= 64
        yield from recorded(*asked, device, effort, name, 2 * effort.small if small else effort.large)


def _published(device: torch.device, effort: Effort) -> Iterator[Row]:
    """On a GPU only: on a CPU an epoch takes hours."""
    for name in ("swin_nr_fpdls", "vit_se") if device.type == "cuda" else ():
        asked = settings(name, device, epochs=1 + effort.rounds)
        yield from published(*asked, device, effort, name, 8 * effort.large)


SMALL = ("vgg13_small", "swin_nr_fpdls_tiny")
RECIPES = ("vgg13_small", "vgg13_ferplus", "small_resnet", "small_resnet_wide", "swin_nr_fpdls", "vit_se")
CASES: dict[str, Callable[[torch.device, Effort], Iterator[Row]]] = {
    "input": _input,
    "augmentation": _augmentation,
    "step": _train_step,
    "operations": _operations,
    "depthwise": _depthwise,
    "recorded": _recorded,
    "evaluation": _evaluation,
    "epoch": _epoch,
    "published": _published,
}
