"""ResNet-50 of He et al. 2015 (arXiv 1512.03385, table 1), with the tensor names of torchvision's file."""

import torch
from torch import Tensor, nn

FACES = (131.0912, 103.8827, 91.4953)  # mean red, green, blue of VGGFace2's faces in 0..255


class ResNet50(nn.Module):
    """A 7x7 convolution and a max-pool, four stages of bottlenecks, global average pooling, then one dense layer.

    Published: `layers` [3, 4, 6, 3] and `width` 64; with 3 channels and 1000 labels 25,557,032 parameters. Without
    `num_labels` there is no dense layer. `max_pool` false omits the pool, as the published code of the disentangled
    difference of embeddings does. `caffe` is the layout of the first release, which VGGFace2's public weights need
    together with `CaffeInput`: a stage halves the map in its first 1x1 convolution, and the pool pads only at the far
    edges. Otherwise the 3x3 convolution halves the map, as in torchvision.
    """

    def __init__(
        self, *, channels: int, num_labels: int | None, layers: list[int], width: int, max_pool: bool, caffe: bool
    ):
        super().__init__()
        first, second, third, fourth = layers
        self.num_features = 32 * width
        self.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        pool = nn.MaxPool2d(3, 2, ceil_mode=True) if caffe else nn.MaxPool2d(3, 2, padding=1)
        self.maxpool = pool if max_pool else nn.Identity()
        self.layer1 = _stage(width, width, first, 1, caffe)
        self.layer2 = _stage(4 * width, 2 * width, second, 2, caffe)
        self.layer3 = _stage(8 * width, 4 * width, third, 2, caffe)
        self.layer4 = _stage(16 * width, 8 * width, fourth, 2, caffe)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Identity() if num_labels is None else nn.Linear(self.num_features, num_labels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """[B, channels, H, W] -> logits [B, num_labels], or features [B, num_features] without labels."""
        maps = self.maxpool(self.bn1(self.conv1(images)).relu())
        maps = self.layer4(self.layer3(self.layer2(self.layer1(maps))))
        return self.fc(self.avgpool(maps).flatten(1))


class CaffeInput(nn.Module):
    """RGB normalised by `normalisation`, [B, 3, H, W] -> BGR in 0..255 minus the mean of VGGFace2's faces.

    `normalisation`: mean and standard deviation of each channel of images in [0, 1], or of all.
    """

    mean: Tensor
    std: Tensor
    faces: Tensor

    def __init__(self, normalisation: list[tuple[float, float]]):
        super().__init__()
        mean, std = torch.tensor(normalisation).T.reshape(2, -1, 1, 1)
        for name, values in (("mean", mean), ("std", std), ("faces", torch.tensor(FACES).view(3, 1, 1))):
            self.register_buffer(name, values, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (255 * (images * self.std + self.mean) - self.faces).flip(1)


def _stage(before: int, width: int, blocks: int, stride: int, caffe: bool) -> nn.Sequential:
    rest = [_Bottleneck(4 * width, width, 1, caffe) for _ in range(blocks - 1)]
    return nn.Sequential(_Bottleneck(before, width, stride, caffe), *rest)


class _Bottleneck(nn.Module):
    """1x1 to `width`, 3x3, 1x1 to four times `width` (figure 5, right); added to its input."""

    def __init__(self, before: int, width: int, stride: int, caffe: bool):
        super().__init__()
        after = 4 * width
        self.conv1 = nn.Conv2d(before, width, 1, stride=stride if caffe else 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=1 if caffe else stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, after, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(after)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            shortcut = nn.Conv2d(before, after, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(after))

    def forward(self, maps: Tensor) -> Tensor:
        inner = self.bn1(self.conv1(maps)).relu()
        inner = self.bn2(self.conv2(inner)).relu()
        return (self.bn3(self.conv3(inner)) + self.downsample(maps)).relu()
