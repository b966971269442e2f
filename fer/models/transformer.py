"""Backbones from transformers: ViT and DeiT, Swin, in named or custom sizes."""

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fer.errors import UserError
from fer.models.network import Backbone
from fer.settings import Depth, Fault, Fraction, Positive, Side, Width
from fer.weights import HUB_ERRORS, misfit


class Vit(Backbone):
    """ViT (Dosovitskiy et al. 2021, arXiv 2010.11929), DeiT (Touvron et al. 2021, arXiv 2012.12877)."""

    patch_size: Side
    """Side of a patch in pixels."""
    hidden_size: Width
    """Width of a token."""
    depth: Depth
    """Number of layers."""
    num_heads: Width
    """Attention heads per layer."""
    mlp_ratio: Positive
    """Width of the hidden layer of a block's MLP, as a multiple of hidden_size."""
    dropout: Fraction
    """Dropout after the embeddings and dense layers."""
    layer_norm_eps: Annotated[float, Field(gt=0)] = 1e-12
    """Added to the variance in layer norm; ViT and DeiT were trained with 1e-6, transformers' files say 1e-12."""
    pool: Literal["token", "pooler"]
    """The embedding: the class token (token), or that after a dense layer with tanh (pooler)."""

    def build(self, size: int, channels: int) -> "Transformer":
        from transformers import ViTConfig, ViTModel

        config = ViTConfig(
            image_size=size,
            num_channels=channels,
            patch_size=self.patch_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.depth,
            num_attention_heads=self.num_heads,
            intermediate_size=self.hidden_size * self.mlp_ratio,
            hidden_dropout_prob=self.dropout,
            layer_norm_eps=self.layer_norm_eps,
            pooler_output_size=self.hidden_size,
        )
        return Transformer(ViTModel(config, add_pooling_layer=self.pool == "pooler"), self.pool, self.hidden_size)

    def faults(self, size: int) -> list[Fault]:
        found = []
        if size % self.patch_size:
            found.append(Fault("patch_size", f"{self.patch_size} does not divide the image's side of {size}"))
        if self.hidden_size % self.num_heads:
            found.append(Fault("num_heads", f"{self.num_heads} does not divide hidden_size {self.hidden_size}"))
        return found


class Swin(Backbone):
    """Swin (Liu et al. 2021, arXiv 2103.14030)."""

    patch_size: Side
    """Side of a patch in pixels."""
    embed_dim: Width
    """Width of a token in the first stage; it doubles in each further stage."""
    depths: list[Depth]
    """Blocks per stage."""
    num_heads: list[Width]
    """Attention heads per stage."""
    window_size: Side
    """Side of an attention window in patches."""
    mlp_ratio: Positive
    """Width of the hidden layer of a block's MLP, as a multiple of the block's width."""
    drop_path_rate: Fraction
    """Stochastic depth: drop rate of the last block, rising linearly from 0."""

    def build(self, size: int, channels: int) -> "Transformer":
        from transformers import SwinConfig, SwinModel

        config = SwinConfig(
            image_size=size,
            num_channels=channels,
            patch_size=self.patch_size,
            embed_dim=self.embed_dim,
            depths=self.depths,
            num_heads=self.num_heads,
            window_size=self.window_size,
            mlp_ratio=self.mlp_ratio,
            drop_path_rate=self.drop_path_rate,
        )
        return Transformer(SwinModel(config), "pooler", self.embed_dim * 2 ** (len(self.depths) - 1))

    def faults(self, size: int) -> list[Fault]:
        found, stages = [], len(self.depths)
        if len(self.num_heads) != stages:
            found.append(Fault("num_heads", f"has {len(self.num_heads)} stages but depths has {stages}"))
        smallest = self.patch_size * 2 ** (stages - 1)
        if size % smallest:
            halved = f"patch_size {self.patch_size}, halved in {stages} stages"
            found.append(Fault("patch_size", f"the image's side of {size} does not divide by {smallest} ({halved})"))
        elif size // smallest < self.window_size:
            map_size = f"the last stage's map of {size // smallest} patches (images of {size} px)"
            found.append(Fault("window_size", f"{self.window_size} is larger than {map_size}"))
        for stage, heads in enumerate(self.num_heads):
            if self.embed_dim * 2**stage % heads:
                width = self.embed_dim * 2**stage
                found.append(Fault("num_heads", f"{heads} does not divide the width {width} of stage {stage + 1}"))
        return found


class Transformer(nn.Module):
    """A transformers encoder as a backbone: [B, channels, size, size] -> embedding [B, num_features]."""

    # settings that change the output but not the shape of any tensor that is needed
    SAME = (
        "model_type", "num_hidden_layers", "depths", "num_attention_heads", "num_heads", "window_size", "patch_size",
        "hidden_act",
    )  # fmt: skip

    def __init__(self, network: Any, pool: str, num_features: int):
        super().__init__()
        self.network, self.pool, self.num_features = network, pool, num_features

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.network(pixel_values=images)
        if self.pool == "token":
            return outputs.last_hidden_state[:, 0]
        return outputs.pooler_output

    def load_pretrained(self, source: str, key: str) -> None:
        """Load the weights of a hub id or local folder. Raises UserError naming `key` if they do not load or fit."""
        from transformers import AutoConfig

        pooler = {} if self.pool == "pooler" or not hasattr(self.network, "pooler") else {"add_pooling_layer": False}
        if self.network.config.model_type == "swin":
            pooler = {}  # its pooler is used, and has no weights
        remedy = "Give a hub id that can be reached, a local folder with config.json and model.safetensors, or null"
        if Path(source).suffix in (".safetensors", ".bin", ".pt", ".pth") and not Path(source).is_dir():
            raise UserError(f"{key}: cannot load '{source}': it names a file. {remedy}")  # the hub is not worth asking
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
            raise UserError(f"{key}: cannot load '{source}': {reason}. {remedy}") from None
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
