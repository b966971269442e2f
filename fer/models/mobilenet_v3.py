"""MobileNetV3-Large of Howard et al. 2019 (arXiv 1905.02244, table 1), with the tensor names of torchvision's file."""

import torch
from torch import nn

from fer.models.depthwise import DepthwiseConv2d

# kernel, expanded and output channels, squeeze-and-excitation, hard-swish (else ReLU), stride
BLOCKS = (
    (3, 16, 16, False, False, 1),
    (3, 64, 24, False, False, 2),
    (3, 72, 24, False, False, 1),
    (5, 72, 40, True, False, 2),
    (5, 120, 40, True, False, 1),
    (5, 120, 40, True, False, 1),
    (3, 240, 80, False, True, 2),
    (3, 200, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 480, 112, True, True, 1),
    (3, 672, 112, True, True, 1),
    (5, 672, 160, True, True, 2),
    (5, 960, 160, True, True, 1),
    (5, 960, 160, True, True, 1),
)
DROPOUT = 0.2  # before the last dense layer


class MobileNetV3(nn.Module):
    """A convolution, fifteen inverted residuals, a convolution, global average pooling, then two dense layers.

    `width` multiplies all channel counts, each rounded to a multiple of 8; 1 is published. Without `num_labels` there
    are no dense layers. At width 1, 3 channels and 1000 labels: 5,483,032 parameters.
    """

    def __init__(self, width: float, channels: int, num_labels: int | None):
        super().__init__()
        before = eights(16 * width)
        layers: list[nn.Module] = [_normalised(nn.Conv2d(channels, before, 3, 2, 1, bias=False), nn.Hardswish)]
        for kernel, expanded, after, squeeze, swish, stride in BLOCKS:
            wide, narrow = eights(expanded * width), eights(after * width)
            layers.append(_InvertedResidual(before, wide, narrow, kernel, stride, squeeze, swish))
            before = narrow
        self.num_features = 6 * before
        layers.append(_normalised(nn.Conv2d(before, self.num_features, 1, bias=False), nn.Hardswish))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier: nn.Module = nn.Identity()
        if num_labels is not None:
            hidden = eights(1280 * width)
            self.classifier = nn.Sequential(
                nn.Linear(self.num_features, hidden), nn.Hardswish(), nn.Dropout(DROPOUT), nn.Linear(hidden, num_labels)
            )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, channels, H, W] -> logits [B, num_labels], or features [B, num_features] without labels."""
        return self.classifier(self.avgpool(self.features(images)).flatten(1))


def eights(channels: float) -> int:
    """The multiple of 8 nearest to `channels`, at least 8; the next one up if rounding would lose more than 10 %."""
    rounded = 8 * int((channels + 4) // 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def _normalised(convolution: nn.Conv2d, activation: type[nn.Module] | None) -> nn.Sequential:
    """Convolution, batch norm, activation."""
    layers: list[nn.Module] = [convolution, nn.BatchNorm2d(convolution.out_channels, eps=1e-3, momentum=0.01)]
    if activation is not None:
        layers.append(activation())
    return nn.Sequential(*layers)


class _InvertedResidual(nn.Module):
    """1x1 to more channels, depthwise, squeeze-and-excitation, 1x1 to fewer (section 5.3); added to its input."""

    def __init__(self, before: int, wide: int, after: int, kernel: int, stride: int, squeeze: bool, swish: bool):
        super().__init__()
        activation = nn.Hardswish if swish else nn.ReLU
        layers: list[nn.Module] = []
        if wide != before:
            layers.append(_normalised(nn.Conv2d(before, wide, 1, bias=False), activation))
        layers.append(_normalised(DepthwiseConv2d(wide, kernel, stride, kernel // 2), activation))
        if squeeze:
            layers.append(_SqueezeExcitation(wide))
        layers.append(_normalised(nn.Conv2d(wide, after, 1, bias=False), None))
        self.block = nn.Sequential(*layers)
        self.shortcut = stride == 1 and before == after

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return maps + self.block(maps) if self.shortcut else self.block(maps)


class _SqueezeExcitation(nn.Module):
    """Scales each map by a gate in [0, 1], computed from the means of all maps."""

    def __init__(self, width: int):
        super().__init__()
        squeezed = eights(width // 4)
        self.fc1 = nn.Conv2d(width, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, width, 1)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        means = maps.mean((2, 3), keepdim=True)
        return maps * nn.functional.hardsigmoid(self.fc2(self.fc1(means).relu()))
