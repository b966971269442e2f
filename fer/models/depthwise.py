"""Depthwise convolutions for training on a CPU."""

import torch
from torch import Tensor, nn


class DepthwiseConv2d(nn.Conv2d):
    """A convolution of each map by itself, without bias: [B, channels, H, W] -> [B, channels, H', W'].

    While gradients are recorded under CPU autocast, kernels larger than 3x3 and strides above 1 run in fp32. oneDNN
    has no fast gradients for them in bf16: those of the weights of a 5x5 kernel take 4 to 5 times as long as in fp32,
    those of the input at stride 2 take 10 to 200 times as long (benchmarks/RESULTS.md).
    """

    def __init__(self, channels: int, kernel: int, stride: int, padding: int):
        super().__init__(channels, channels, kernel, stride, padding, groups=channels, bias=False)
        self.slow = kernel > 3 or stride > 1

    def forward(self, maps: Tensor) -> Tensor:
        autocast = maps.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        if not (self.slow and autocast and torch.is_grad_enabled()):
            return super().forward(maps)
        with torch.autocast("cpu", enabled=False):
            return super().forward(maps.float()).to(torch.get_autocast_dtype("cpu"))
