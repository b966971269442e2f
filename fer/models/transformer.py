"""Backbones of transformers: ViT and DeiT, Swin, ConvNeXt V2, at named or own sizes."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from fer.config import Fraction, Positive, Section
from fer.errors import UserError
from fer.weights import HUB_ERRORS, misfit


class VitSettings(Section):
    """ViT (Dosovitskiy et al. 2021, arXiv 2010.11929), DeiT (Touvron et al. 2021, arXiv 2012.12877)."""

    patch_size: Positive  # pixels
    hidden_size: Positive
    depth: Positive
    num_heads: Positive
    mlp_ratio: Positive
    dropout: Fraction
    pool: Literal["token", "pooler"]  # class token; or it through transformers' dense layer with tanh


class SwinSettings(Section):
    """Swin (Liu et al. 2021, arXiv 2103.14030)."""

    patch_size: Positive  # pixels
    embed_dim: Positive
    depths: list[Positive]
    num_heads: list[Positive]
    window_size: Positive  # patches
    mlp_ratio: Positive
    drop_path_rate: Fraction


class ConvNextV2Settings(Section):
    """ConvNeXt V2 (Woo et al. 2023, arXiv 2301.00808)."""

    patch_size: Positive  # pixels, of the stem
    depths: list[Positive]
    hidden_sizes: list[Positive]
    drop_path_rate: Fraction


class Transformer(nn.Module):
    """A transformers encoder as a backbone: [B, channels, size, size] -> embedding [B, num_features]."""

    # what shapes do not show but numbers depend on
    SAME = ("model_type", "num_attention_heads", "num_heads", "window_size", "patch_size", "hidden_act")

    def __init__(self, network: Any, pool: str, num_features: int):
        super().__init__()
        self.network, self.pool, self.num_features = network, pool, num_features

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.network(pixel_values=images)
        if self.pool == "token":
            return outputs.last_hidden_state[:, 0]
        if self.pool == "tokens":  # class and distillation
            return outputs.last_hidden_state[:, :2].mean(1)
        return outputs.pooler_output

    def load_pretrained(self, source: str, key: str) -> None:
        """Take the weights of a hub id or a local folder. Raises UserError naming `key` when they are not these."""
        from transformers import AutoConfig

        pooler = {} if self.pool == "pooler" or not hasattr(self.network, "pooler") else {"add_pooling_layer": False}
        if self.network.config.model_type == "swin":
            pooler = {}  # its pooler has no weights and is what is used
        try:
            theirs = AutoConfig.from_pretrained(source)
            _refuse_another(self.network.config, theirs, source, key)
            network, report = type(self.network).from_pretrained(
                source,
                config=self.network.config,
                ignore_mismatched_sizes=True,  # reported below, by name
                use_safetensors=True,
                dtype=torch.float32,  # else that of the file
                output_loading_info=True,
                **pooler,
            )
        except HUB_ERRORS as error:
            reason = str(error).splitlines()[0].rstrip(".:")
            raise UserError(
                f"{key}: cannot load '{source}': {reason}. "
                "Give a hub id that can be reached, a local folder with config.json and model.safetensors, or null"
            ) from None
        if wrong := misfit(report):
            raise UserError(
                f"{key}: '{source}' does not fit: {wrong}; "
                "change the backbone's name, settings or image size, or name other weights"
            )
        self.network = network.train(self.training)


def _refuse_another(ours: Any, theirs: Any, source: str, key: str) -> None:
    for name in Transformer.SAME:
        wanted, found = getattr(ours, name, None), getattr(theirs, name, None)
        if wanted is not None and wanted != found:
            raise UserError(
                f"{key}: '{source}' is another network: its {name} is {found}, here it is {wanted}; "
                "change the backbone's name or settings, or name other weights"
            )


def build_vit(settings: VitSettings, size: int, channels: int) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    network = ViTModel(_vit(ViTConfig, settings, size, channels), add_pooling_layer=settings.pool == "pooler")
    return Transformer(network, settings.pool, settings.hidden_size)


def build_deit_distilled(settings: VitSettings, size: int, channels: int) -> nn.Module:
    """DeiT with its distillation token; the embedding is the mean of both tokens, as its two heads are averaged."""
    from transformers import DeiTConfig, DeiTModel

    pool = "tokens" if settings.pool == "token" else settings.pool
    network = DeiTModel(_vit(DeiTConfig, settings, size, channels), add_pooling_layer=pool == "pooler")
    return Transformer(network, pool, settings.hidden_size)


def _vit(config: Any, settings: VitSettings, size: int, channels: int) -> Any:
    return config(
        image_size=size,
        num_channels=channels,
        patch_size=settings.patch_size,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.depth,
        num_attention_heads=settings.num_heads,
        intermediate_size=settings.hidden_size * settings.mlp_ratio,
        hidden_dropout_prob=settings.dropout,
        pooler_output_size=settings.hidden_size,
    )


def build_swin(settings: SwinSettings, size: int, channels: int) -> nn.Module:
    from transformers import SwinConfig, SwinModel

    config = SwinConfig(
        image_size=size,
        num_channels=channels,
        patch_size=settings.patch_size,
        embed_dim=settings.embed_dim,
        depths=settings.depths,
        num_heads=settings.num_heads,
        window_size=settings.window_size,
        mlp_ratio=settings.mlp_ratio,
        drop_path_rate=settings.drop_path_rate,
    )
    return Transformer(SwinModel(config), "pooler", settings.embed_dim * 2 ** (len(settings.depths) - 1))


def build_convnextv2(settings: ConvNextV2Settings, size: int, channels: int) -> nn.Module:
    from transformers import ConvNextV2Config, ConvNextV2Model

    config = ConvNextV2Config(
        image_size=size,
        num_channels=channels,
        patch_size=settings.patch_size,
        num_stages=len(settings.depths),
        depths=settings.depths,
        hidden_sizes=settings.hidden_sizes,
        drop_path_rate=settings.drop_path_rate,
    )
    return Transformer(ConvNextV2Model(config), "pooler", settings.hidden_sizes[-1])


def vit_faults(settings: VitSettings, size: int) -> list[str]:
    """What does not fit, one a line: `settings.<key> ...` or `size ...`, which is the image's side."""
    faults = []
    if size % settings.patch_size:
        faults.append(f"size {size} does not divide by patch_size {settings.patch_size}")
    if settings.hidden_size % settings.num_heads:
        faults.append(f"hidden_size {settings.hidden_size} does not divide by num_heads {settings.num_heads}")
    return faults


def swin_faults(settings: SwinSettings, size: int) -> list[str]:
    faults = []
    stages = len(settings.depths)
    if len(settings.num_heads) != stages:
        faults.append(f"num_heads has {len(settings.num_heads)} stages but depths has {stages}")
    smallest = settings.patch_size * 2 ** (stages - 1)
    if size % smallest:
        faults.append(
            f"size {size} does not divide by {smallest} (patch_size {settings.patch_size}, halved in {stages} stages)"
        )
    elif size // smallest < settings.window_size:
        faults.append(
            f"window_size {settings.window_size} is larger than the last stage's map of {size // smallest} patches "
            f"(size {size})"
        )
    for stage, heads in enumerate(settings.num_heads):
        if settings.embed_dim * 2**stage % heads:
            faults.append(f"num_heads: width {settings.embed_dim * 2**stage} does not divide by {heads}")
    return faults


def convnextv2_faults(settings: ConvNextV2Settings, size: int) -> list[str]:
    stages = len(settings.depths)
    if len(settings.hidden_sizes) != stages:
        return [f"hidden_sizes has {len(settings.hidden_sizes)} stages but depths has {stages}"]
    smallest = settings.patch_size * 2 ** (stages - 1)
    if size < smallest:
        return [f"size {size} is too small: at least {smallest} (patch_size {settings.patch_size}, {stages} stages)"]
    return []
