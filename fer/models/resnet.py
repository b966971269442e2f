"""The ResNets of He et al. 2015 (arXiv 1512.03385, table 1), with the tensor names of torchvision's files."""

from functools import partial

import torch
from torch import Tensor, nn

FACES = (131.0912, 103.8827, 91.4953)  # mean red, green, blue of VGGFace2's faces in 0..255


class ResidualNetwork(nn.Module):
    """A 7x7 convolution and a max-pool, four stages of residual blocks, global average pooling, then one dense layer.

    Published, with `width` 64: `layers` [2, 2, 2, 2] and [3, 4, 6, 3] of basic blocks are ResNet-18 and 34 (11,689,512
    and 21,797,672 parameters with 3 channels and 1000 labels), [3, 4, 6, 3] with `bottleneck` is ResNet-50
    (25,557,032). Without `num_labels` there is no dense layer. `max_pool` false omits the pool, as the published code
    of the disentangled difference of embeddings does. `caffe` is the layout of the first release, which VGGFace2's
    public weights of ResNet-50 need together with `CaffeInput`: a stage halves the map in its first 1x1 convolution,
    and the pool pads only at the far edges. Otherwise the 3x3 convolution halves the map, as in torchvision.
    """

    def __init__(
        self,
        *,
        channels: int,
        num_labels: int | None,
        layers: list[int],
        width: int,
        bottleneck: bool,
        max_pool: bool = True,
        caffe: bool = False,
    ):
        super().__init__()
        block = partial(_Bottleneck, caffe=caffe) if bottleneck else _Basic
        growth = 4 if bottleneck else 1  # channels of a block's output for each inside it
        self.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        pool = nn.MaxPool2d(3, 2, ceil_mode=True) if caffe else nn.MaxPool2d(3, 2, padding=1)
        self.maxpool = pool if max_pool else nn.Identity()
        before, stages = width, []
        for stage, count in enumerate(layers):
            inner = width * 2**stage
            first = block(before, inner, growth * inner, 2 if stage else 1)
            before = growth * inner
            rest = [block(before, inner, before, 1) for _ in range(count - 1)]
            stages.append(nn.Sequential(first, *rest))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.num_features = before
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


def _shortcut(before: int, after: int, stride: int) -> nn.Module:
    """The input of a block in the shape of its output (option B of the paper)."""
    if stride == 1 and before == after:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(before, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after))


class _Basic(nn.Module):
    """Two 3x3 convolutions, added to their input (figure 5, left)."""

    def __init__(self, before: int, inner: int, after: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, inner, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.downsample = _shortcut(before, after, stride)

    def forward(self, maps: Tensor) -> Tensor:
        inner = self.bn1(self.conv1(maps)).relu()
        return (self.bn2(self.conv2(inner)) + self.downsample(maps)).relu()


class _Bottleneck(nn.Module):
    """1x1 to `inner` channels, 3x3, 1x1 to `after`; added to its input (figure 5, right)."""

    def __init__(self, before: int, inner: int, after: int, stride: int, caffe: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(before, inner, 1, stride=stride if caffe else 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=1 if caffe else stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, after, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(after)
        self.downsample = _shortcut(before, after, stride)

    def forward(self, maps: Tensor) -> Tensor:
        inner = self.bn1(self.conv1(maps)).relu()
        inner = self.bn2(self.conv2(inner)).relu()
        return (self.bn3(self.conv3(inner)) + self.downsample(maps)).relu()
