"""IR-50, the residual network of face recognition, with the tensor names of face.evoLVe's files."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from fer.models.network import Backbone, too_small
from fer.settings import Channels, Depth, Fault
from fer.weights import load_strictly, read_tensors


class Ir50(Backbone):
    """ResNet with ArcFace's improved blocks (Deng et al. 2019, arXiv 1801.07698), for faces of 112 px."""

    name: Literal["ir50"] = "ir50"
    weights: str | None = None
    """Initial weights: a file, such as backbone_ir50_ms1m_epoch120.pth; null: random."""
    layers: Annotated[list[Depth], Field(min_length=1)] = [3, 4, 14, 3]
    """Blocks per stage."""
    width: Channels = 64
    """Channels of the first stage."""
    pool: Literal["dense", "mean"] = "dense"
    """Embedding from the last map: by the published dense layer, which fits one image size, or its mean."""

    def build(self, size: int, channels: int) -> "Ir50Network":
        return Ir50Network(self.layers, self.width, channels, size if self.pool == "dense" else None)

    def faults(self, size: int) -> list[Fault]:
        return too_small(size, 2 ** len(self.layers))


class Ir50Network(nn.Module):
    """[B, channels, S, S] -> embeddings [B, num_features].

    Published: `layers` [3, 4, 14, 3] and `width` 64; with 3 channels and a dense layer for `size` 112 43,574,976
    parameters. Without `size` the last map is averaged.
    """

    def __init__(self, layers: list[int], width: int, channels: int, size: int | None):
        super().__init__()
        self.input_layer = nn.Sequential(_conv(channels, width, 1), nn.BatchNorm2d(width), nn.PReLU(width))
        blocks: list[nn.Module] = []
        before = width
        for stage, count in enumerate(layers):
            after = width * 2**stage
            blocks += [_Block(before if block == 0 else after, after, 1 if block else 2) for block in range(count)]
            before = after
        self.body = nn.Sequential(*blocks)
        self.num_features = before
        self.output_layer: nn.Sequential | None = None
        if size is not None:
            for _ in layers:
                size = (size + 1) // 2
            self.output_layer = nn.Sequential(
                nn.BatchNorm2d(before), nn.Dropout(0.5), nn.Flatten(),
                nn.Linear(before * size**2, before), nn.BatchNorm1d(before),
            )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """[B, channels, S, S] -> embeddings [B, num_features]."""
        maps = self.body(self.input_layer(images))
        return maps.mean((2, 3)) if self.output_layer is None else self.output_layer(maps)

    def load_pretrained(self, source: str, key: str) -> None:
        """Load the weights of file `source`. Raises UserError naming `key` if they do not fit."""
        unused = ("output_layer.",) if self.output_layer is None else ()
        load_strictly(self, read_tensors(source, key), f"{key}: {source}", optional=unused)


def _conv(channels: int, out: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)


class _Block(nn.Module):
    """Batch norm, a 3x3 convolution, PReLU, another one, which halves the map, batch norm; added to the input."""

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        if before == after:
            self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        else:
            shortcut = nn.Conv2d(before, after, 1, stride, bias=False)
            self.shortcut_layer = nn.Sequential(shortcut, nn.BatchNorm2d(after))
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(before), _conv(before, after, 1), nn.PReLU(after),
            _conv(after, after, stride), nn.BatchNorm2d(after),
        )  # fmt: skip

    def forward(self, maps: Tensor) -> Tensor:
        return self.res_layer(maps) + self.shortcut_layer(maps)
