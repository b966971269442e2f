"""dlib's network for face recognition (King 2017, dlib_face_recognition_resnet_model_v1), of the extra `dlib`.

Its weights, in the public domain (CC0), are in the package face_recognition_models; dlib itself is not needed.
"""

from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fer.errors import UserError
from fer.models.network import Backbone, too_small
from fer.settings import Channels, Fault
from fer.weights import load_strictly, read_tensors

PACKAGE = "face_recognition_models"
FILE = "models/dlib_face_recognition_resnet_model_v1.dat"
STAGES = (1, False, 3), (2, True, 4), (4, True, 3), (8, True, 3), (8, True, 1)  # width, whether it halves, blocks
PARTS = "weight", "bias"
LEAST = 103  # px; below it the last stage has nothing to convolve


class DlibResnet(Backbone):
    """dlib's ResNet with 29 convolutions, trained to tell three million faces of 7,485 people apart at 150 px."""

    name: Literal["dlib_resnet"] = "dlib_resnet"
    width: Channels = 32
    """Channels of the first stage."""

    def build(self, size: int, channels: int) -> "DlibResnetNetwork":
        return DlibResnetNetwork(self.width, channels)

    def faults(self, size: int) -> list[Fault]:
        return too_small(size, LEAST)


class DlibResnetNetwork(nn.Module):
    """[B, channels, S, S] -> embeddings [B, num_features]: what dlib projects to its 128 numbers.

    The scales and shifts that dlib has in place of batch norm are folded into the convolutions. With 112 px: 5.57
    million parameters, 0.30 GFLOP per image; with dlib's 150 px 0.54.
    """

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 7, 2)
        blocks, before = [], width
        for factor, halves, count in STAGES:
            for number in range(count):
                blocks.append(_Block(before, factor * width, halves and not number))
                before = factor * width
        self.blocks = nn.Sequential(*blocks)
        self.num_features = before

    def load_pretrained(self, source: str, key: str) -> None:
        """Load dlib's file, or one with this network's own names. Raises UserError naming `key` if it does not fit."""
        tensors, where = read_tensors(source, key), f"{key}: {source}"
        load_strictly(self, self._folded(tensors, where) if "con0.weight" in tensors else tensors, where)

    def _folded(self, layers: dict[str, Tensor], source: str) -> dict[str, Tensor]:
        """The layers of dlib's file, which has them in their order, by this network's names."""
        names = [name for name, module in self.named_modules() if isinstance(module, nn.Conv2d)]
        parts = [[f"{kind}{i}.{part}" for kind in ("con", "affine") for part in PARTS] for i in range(len(names))]
        known = sorted(layers) == sorted(["fc0.weight", *chain(*parts)])
        if not known or any(len({len(layers[part]) for part in own}) > 1 for own in parts):
            raise UserError(f"{source}: holds other layers than dlib's network for face recognition; name its file")
        folded = {}
        for i, name in enumerate(names):
            scale = layers[f"affine{i}.weight"]
            folded[f"{name}.weight"] = layers[f"con{i}.weight"] * scale[:, None, None, None]
            folded[f"{name}.bias"] = layers[f"con{i}.bias"] * scale + layers[f"affine{i}.bias"]
        return folded

    def forward(self, images: Tensor) -> Tensor:
        """[B, channels, S, S] -> [B, num_features]."""
        return self.blocks(F.max_pool2d(F.relu(self.stem(images)), 3, 2)).mean((2, 3))


class _Block(nn.Module):
    """Two 3x3 convolutions and a skip connection; where it halves, that is average pooling.

    The sum is as large as the larger of the two and has as many channels; what the other lacks is 0.
    """

    def __init__(self, channels: int, out: int, halves: bool):
        super().__init__()
        self.halves = halves
        self.first = nn.Conv2d(channels, out, 3, 2 if halves else 1, padding=0 if halves else 1)
        self.second = nn.Conv2d(out, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        found = self.second(F.relu(self.first(x)))
        skip = F.avg_pool2d(x, 2) if self.halves else x
        if skip.shape != found.shape:  # it has fewer channels, or is 1 larger
            more, down, across = (abs(skip.shape[i] - found.shape[i]) for i in (1, 2, 3))
            found, skip = F.pad(found, (0, across, 0, down)), F.pad(skip, (0, 0, 0, 0, 0, more))
        return F.relu(found + skip)


def packaged_weights(key: str) -> str:
    """dlib's file in its package, whose code is not run. Raises UserError if it is not installed."""
    spec = find_spec(PACKAGE)
    file = Path(spec.origin).parent / FILE if spec and spec.origin else None
    if file is None or not file.is_file():
        remedy = "install the extra `dlib`: pip install -c constraints.txt -e '.[dlib]'"
        raise UserError(f"{key}: the package {PACKAGE} is missing; {remedy}")
    return str(file)
