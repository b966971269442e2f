"""DIC: x8 super-resolution of faces, which restores image and landmarks in turn, each with the help of the other."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fer.weights import load_strictly, read_tensors

SCALE = 8
MEAN = (0.509, 0.424, 0.378)  # red, green, blue of the training images in [0, 1]
# the sizes of the published model, trained on the Helen data set
PUBLISHED = {
    "num_features": 48, "num_steps": 4, "num_groups": 6, "hg_features": 256, "num_keypoints": 68,
    "num_fusion_blocks": 7,
}  # fmt: skip
# ranges of the 68 landmarks: left eye, right eye, nose, mouth, jaw with the brows
REGIONS = ((36, 42), (42, 48), (27, 36), (48, 68), (0, 27))
SMALLEST_PEAK = 0.05


class Dic(nn.Module):
    """Deep face super-resolution with iterative collaboration (Ma et al., CVPR 2020, arXiv 2003.13063).

    Each of `num_steps` steps restores an image and derives landmark heatmaps and a hidden state from it; the heatmaps
    guide the attention of the next step. `num_features` is the number of channels of the image branch, `num_groups` the
    number of its pairs of up- and downsampling, `num_fusion_blocks` the number of residual blocks of its attention. The
    landmark branch is an hourglass with 2 `hg_features` channels. With the `PUBLISHED` sizes: 21,803,849 parameters.
    """

    def __init__(
        self,
        *,
        num_features: int,
        num_steps: int,
        num_groups: int,
        hg_features: int,
        num_keypoints: int,
        num_fusion_blocks: int,
    ):
        super().__init__()
        self.num_steps = num_steps
        self.conv_in = nn.Sequential(*_conv(3, 4 * num_features, 3), nn.PixelShuffle(2))
        self.first_block = _Feedback(num_features, num_features, num_groups)
        self.block = _AttentiveFeedback(num_features, num_groups, num_fusion_blocks)
        self.out = _scaling(nn.ConvTranspose2d, num_features, 8, 4)
        self.conv_out = nn.Sequential(nn.Conv2d(num_features, 3, 3, padding=1))
        self.HG = _Landmarks(hg_features, num_keypoints)

    def forward(self, images: Tensor) -> Tensor:
        """RGB in [0, 1], [B, 3, H, W] -> [B, 3, 8H, 8W] in [0, 1]."""
        height, width = images.shape[2:]
        mean = torch.tensor(MEAN, dtype=images.dtype, device=images.device).view(3, 1, 1)
        restored, _ = self.steps(pad(images, 8) - mean)[-1]
        return (restored + mean).clamp(0, 1)[:, :, : SCALE * height, : SCALE * width]

    def steps(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """RGB minus MEAN, [B, 3, H, W], H and W multiples of 8 -> the image and heatmaps of each step.

        Shapes [B, 3, 8H, 8W], also minus MEAN, and [B, num_keypoints, 2H, 2W].
        """
        coarse = F.interpolate(images, scale_factor=SCALE, mode="bilinear", align_corners=False)
        shallow = self.conv_in(images)
        features = self.first_block(shallow)
        hidden = None
        found: list[tuple[Tensor, Tensor]] = []
        for _ in range(self.num_steps):
            if found:
                features = self.block(shallow, features, merge(found[-1][1]))
            restored = coarse + self.conv_out(self.out(features))
            heatmaps, hidden = self.HG(restored, hidden)
            found.append((restored, heatmaps))
        return found


def load_dic(path: str | Path, key: str) -> Dic:
    """The published network with the weights in `path`, in eval mode.

    Raises UserError, beginning with the setting `key`, as `read_tensors` and `load_strictly` do.
    """
    tensors = read_tensors(path, key)
    model = Dic(**PUBLISHED)
    load_strictly(model, tensors, f"{key}: {path}")
    return model.eval()


def pad(images: Tensor, multiple: int) -> Tensor:
    """[B, C, H, W], padded at the bottom and right by reflection to multiples of `multiple`.

    An image too small to reflect is padded with its last row and column.
    """
    height, width = images.shape[2:]
    bottom, right = -height % multiple, -width % multiple
    if not bottom and not right:
        return images
    mode = "reflect" if bottom < height and right < width else "replicate"
    return F.pad(images, (0, right, 0, bottom), mode)


def merge(heatmaps: Tensor) -> Tensor:
    """Landmark heatmaps [B, 68, H, W], each scaled to a peak of 1 -> their sums over the REGIONS, [B, 5, H, W].

    A peak below SMALLEST_PEAK is noise, so such a map is scaled as if its peak were SMALLEST_PEAK.
    """
    heatmaps = _exact(heatmaps)
    scaled = heatmaps / heatmaps.amax((2, 3), keepdim=True).clamp(min=SMALLEST_PEAK)
    return torch.stack([scaled[:, first:end].sum(1) for first, end in REGIONS], 1)


def _exact(maps: Tensor) -> Tensor:
    """At least float32, also under autocast."""
    return maps.to(torch.promote_types(maps.dtype, torch.float32))


def _conv(before: int, after: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, kernel, padding=kernel // 2), nn.PReLU(init=0.2))


def _scaling(layer: type[nn.Conv2d] | type[nn.ConvTranspose2d], features: int, kernel: int, by: int) -> nn.Sequential:
    return nn.Sequential(layer(features, features, kernel, stride=by, padding=2), nn.PReLU(init=0.2))


class _Feedback(nn.Module):
    """Upsamples x8 and back in densely connected groups: [B, before, H, W] -> [B, features, H, W]."""

    def __init__(self, before: int, features: int, groups: int):
        super().__init__()
        self.compress_in = _conv(before, features, 1)
        self.upBlocks = nn.ModuleList(_scaling(nn.ConvTranspose2d, features, 12, 8) for _ in range(groups))
        self.downBlocks = nn.ModuleList(_scaling(nn.Conv2d, features, 12, 8) for _ in range(groups))
        self.uptranBlocks = nn.ModuleList(_conv(features * count, features, 1) for count in range(2, groups + 1))
        self.downtranBlocks = nn.ModuleList(_conv(features * count, features, 1) for count in range(2, groups + 1))
        self.compress_out = _conv(features * groups, features, 1)

    def forward(self, maps: Tensor) -> Tensor:
        return self.groups(self.compress_in(maps))

    def groups(self, maps: Tensor) -> Tensor:
        small, large = [maps], []
        for place, (up, down) in enumerate(zip(self.upBlocks, self.downBlocks)):
            maps = torch.cat(small, 1)
            large.append(up(self.uptranBlocks[place - 1](maps) if place else maps))
            maps = torch.cat(large, 1)
            small.append(down(self.downtranBlocks[place - 1](maps) if place else maps))
        return self.compress_out(torch.cat(small[1:], 1))


class _AttentiveFeedback(_Feedback):
    """The same on the shallow maps and those of the previous step, after attention to the regions of the face."""

    def __init__(self, features: int, groups: int, fusion_blocks: int):
        super().__init__(2 * features, features, groups)
        self.fusion_block = _Fusion(features, fusion_blocks)

    def forward(self, shallow: Tensor, last: Tensor, regions: Tensor) -> Tensor:  # type: ignore[override]
        maps = self.compress_in(torch.cat((shallow, last), 1))
        return self.groups(self.fusion_block(maps, regions))


class _Fusion(nn.Module):
    """Separate maps for each region, weighted by the softmax of the region heatmaps."""

    def __init__(self, features: int, blocks: int):
        super().__init__()
        wide = features * len(REGIONS)
        self.conv_in = nn.Sequential(nn.Conv2d(features, wide, 1), nn.LeakyReLU(0.2))
        self.resnet = nn.Sequential(*(_GroupedResidual(wide) for _ in range(blocks)))

    def forward(self, maps: Tensor, regions: Tensor) -> Tensor:
        """[B, features, H, W] and regions [B, 5, H, W] -> [B, features, H, W]."""
        own = self.resnet(self.conv_in(maps)).unflatten(1, (len(REGIONS), -1))
        return (own * _exact(regions).softmax(1).unsqueeze(2)).sum(1)


class _GroupedResidual(nn.Module):
    def __init__(self, wide: int):
        super().__init__()
        first, second = (nn.Conv2d(wide, wide, 3, padding=1, groups=len(REGIONS)) for _ in range(2))
        self.res = nn.Sequential(first, nn.LeakyReLU(0.2), second)

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.res(maps)


class _Landmarks(nn.Module):
    """Recurrent hourglass: image [B, 3, 4H, 4W] -> heatmaps [B, keypoints, H, W], hidden [B, features, H, W]."""

    def __init__(self, features: int, keypoints: int):
        super().__init__()
        half, quarter = features // 2, features // 4
        self.features = features
        self.pre_conv_block = nn.Sequential(
            nn.Conv2d(3, quarter, 7, stride=2, padding=3),
            nn.ReLU(),
            _Residual(quarter, half),
            nn.MaxPool2d(2),
            _Residual(half, half),
            _Residual(half, features),
        )
        self.compress_in = nn.Conv2d(2 * features, 2 * features, 1)
        self.hg = _Hourglass(2 * features)
        self.hg_conv_out = nn.Sequential(
            _Residual(features, features), _Dense(features), nn.Conv2d(features, keypoints, 1)
        )

    def forward(self, images: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        maps = self.pre_conv_block(images)
        both = torch.cat((maps, maps if hidden is None else hidden), 1)
        seen, hidden = self.hg(self.compress_in(both)).split(self.features, 1)
        return self.hg_conv_out(seen), hidden


class _Hourglass(nn.Module):
    """Halves the size four times and restores it, with a skip branch at each size (Newell et al., arXiv 1603.06937)."""

    DEPTH = 4

    def __init__(self, channels: int):
        super().__init__()
        for level in range(self.DEPTH, 0, -1):
            self.add_module(f"res{level}_1", _Residual(channels, channels))
            self.add_module(f"res{level}_2", _Residual(channels, channels))
        self.res_center = _Residual(channels, channels)
        for level in range(1, self.DEPTH + 1):
            self.add_module(f"res{level}_3", _Residual(channels, channels))

    def forward(self, maps: Tensor) -> Tensor:
        """[B, channels, H, W], H and W multiples of 16 -> the same shape."""
        return self._level(self.DEPTH, maps)

    def _level(self, level: int, maps: Tensor) -> Tensor:
        if level == 0:
            return self.res_center(maps)
        branch = self.get_submodule(f"res{level}_1")(maps)
        inner = self.get_submodule(f"res{level}_2")(F.max_pool2d(maps, 2))
        inner = self.get_submodule(f"res{level}_3")(self._level(level - 1, inner))
        return branch + F.interpolate(_exact(inner), scale_factor=2, mode="bilinear", align_corners=True)


class _Residual(nn.Module):
    def __init__(self, before: int, after: int):
        super().__init__()
        half = after // 2
        self.conv_block = nn.Sequential(
            nn.Conv2d(before, half, 1), nn.ReLU(), nn.Conv2d(half, half, 3, padding=1), nn.Conv2d(half, after, 1)
        )
        self.skip_layer = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, maps: Tensor) -> Tensor:
        return self.conv_block(maps) + self.skip_layer(maps)


class _Dense(nn.Module):
    """A 1x1 convolution and ReLU."""

    def __init__(self, features: int):
        super().__init__()
        self.conv_block = nn.Sequential(nn.Conv2d(features, features, 1), nn.ReLU())

    def forward(self, maps: Tensor) -> Tensor:
        return self.conv_block(maps)
