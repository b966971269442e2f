"""Training as in typical research code: PNG files, PIL transforms per image, fp32, `.item()` in each step."""

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fer.input import Input
from fer.resources import Resources
from fer.run import Run

Transform = Callable[[Image.Image], Image.Image]


def same_work(run: Run) -> Transform:
    """The run's own augmentation of grey images: flip, one bilinear warp, brightness, contrast."""
    s = run.augment

    def transform(image: Image.Image) -> Image.Image:
        if random.random() < s.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        shift = [random.uniform(-s.translation, s.translation) * run.input.image_size for _ in range(2)]
        angle, zoom = random.uniform(-s.rotation, s.rotation), random.uniform(1 - s.scale, 1 + s.scale)
        image = _affine(image, angle, zoom, shift, Image.Resampling.BILINEAR)
        image = ImageEnhance.Brightness(image).enhance(random.uniform(1 - s.brightness, 1 + s.brightness))
        return ImageEnhance.Contrast(image).enhance(random.uniform(1 - s.contrast, 1 + s.contrast))

    return transform


def as_published(run: Run) -> Transform:
    """Augmentation of arXiv 2204.02181: flip, rotation, second warp, three jitters, by nearest neighbour."""

    def transform(image: Image.Image) -> Image.Image:
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = image.rotate(random.uniform(-45, 45))
        image = _affine(image, random.uniform(-15, 15), random.uniform(1, 1.2), [0, 0], Image.Resampling.NEAREST)
        for jitter in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = jitter(image).enhance(random.uniform(0.6, 1.4))
        return image

    return transform


def _affine(image: Image.Image, angle: float, zoom: float, shift: list[float], kernel: Image.Resampling) -> Image.Image:
    """Rotate clockwise by `angle` degrees and enlarge by `zoom` about the centre, then translate by `shift` px."""
    cos, sin = math.cos(math.radians(angle)) / zoom, math.sin(math.radians(angle)) / zoom
    x, y = image.width / 2, image.height / 2
    dx, dy = x + shift[0], y + shift[1]
    matrix = (cos, sin, x - cos * dx - sin * dy, -sin, cos, y + sin * dx - cos * dy)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, kernel)


class PngFolder(Dataset[tuple[Tensor, int]]):
    """`root`/<number>_<class>/*.png -> float32 [channels, image_size, image_size], normalised, and its label."""

    def __init__(self, root: Path, settings: Input, transform: Transform | None):
        self.files = sorted((path for path in root.glob("*/*.png")), key=lambda path: path.name)
        self.transform = transform
        self.mode = "RGB" if settings.channels == 3 else "L"
        self.mean = torch.tensor(settings.mean).view(-1, 1, 1)
        self.std = torch.tensor(settings.std).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.open(index)
        if self.transform is not None:
            image = self.transform(image)
        return self.normalized(image), int(self.files[index].parent.name.split("_")[0])

    def open(self, index: int) -> Image.Image:
        """The decoded image."""
        return Image.open(self.files[index]).convert(self.mode)

    def normalized(self, image: Image.Image) -> Tensor:
        """float32 [channels, H, W]."""
        pixels = torch.from_numpy(np.array(image)).view(image.height, image.width, -1)
        return (pixels.permute(2, 0, 1).contiguous().float().div(255)).sub_(self.mean).div_(self.std)


def loader(
    root: Path, run: Run, resources: Resources, transform: Transform | None, workers: int, train: bool
) -> DataLoader:
    """Batches of images and labels; in training shuffled, without an incomplete last one."""
    return DataLoader(
        PngFolder(root, run.input, transform),
        batch_size=run.batch_size if train else resources.eval_batch_size,
        shuffle=train,
        drop_last=train,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def on_device(batches: DataLoader, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, copied to the device one by one."""
    for images, labels in batches:
        yield images.to(device), labels.to(device)


def train_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
) -> tuple[float, float]:
    """Take a step; returns the loss and the number of correct images, read back from the device."""
    optimizer.zero_grad()
    logits = model(images)
    value = loss(logits, labels)
    value.backward()
    optimizer.step()
    return value.item(), (logits.argmax(1) == labels).sum().item()


def train_epoch(
    model: nn.Module,
    batches: DataLoader,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> int:
    """One pass over the batches; returns the number of images."""
    model.train()
    images_seen = 0
    for images, labels in on_device(batches, device):
        train_step(model, images, labels, loss, optimizer)
        images_seen += len(images)
    return images_seen


def accuracy(model: nn.Module, batches: DataLoader, device: torch.device) -> float:
    """Share of correctly classified images."""
    model.eval()
    right = total = 0
    with torch.no_grad():
        for images, labels in on_device(batches, device):
            right += (model(images).argmax(1) == labels).sum().item()
            total += len(labels)
    return right / total
