"""ViT and Swin image classifiers of transformers: from random weights by size, or from a hub id or local folder."""

import json
from collections.abc import Callable
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import nn

from fer.config import Fraction, Positive, RunConfig, Section
from fer.errors import UserError


class VitOptions(Section):
    """ViT, Dosovitskiy et al. 2021 (arXiv 2010.11929). With `weights` the sizes are the file's, not these."""

    weights: str | None  # hub id or local folder; null: random
    patch_size: Positive  # pixels
    hidden_size: Positive
    depth: Positive
    num_heads: Positive
    mlp_ratio: Positive
    dropout: Fraction


class SwinOptions(Section):
    """Swin, Liu et al. 2021 (arXiv 2103.14030). With `weights` the sizes are the file's, not these."""

    weights: str | None
    patch_size: Positive
    embed_dim: Positive
    depths: list[Positive]
    num_heads: list[Positive]
    window_size: Positive  # patches
    mlp_ratio: Positive
    drop_path_rate: Fraction


class TransformerClassifier(nn.Module):
    """A transformers image-classification network that returns bare logits."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network: Any = network

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> logits [B, num_labels]."""
        return self.network(pixel_values=pixel_values).logits

    def sizes(self) -> dict[str, Any]:
        """The network's own configuration, from which `rebuild` makes it again without the file of its weights."""
        return json.loads(self.network.config.to_json_string())


def rebuild_vit(sizes: dict[str, Any]) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return TransformerClassifier(ViTForImageClassification(ViTConfig.from_dict(sizes)))


def rebuild_swin(sizes: dict[str, Any]) -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    return TransformerClassifier(SwinForImageClassification(SwinConfig.from_dict(sizes)))


class _Options(Protocol):
    weights: str | None


def build_vit(options: VitOptions, num_labels: int, image_size: int, channels: int) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    def random_weights() -> nn.Module:
        return ViTForImageClassification(
            ViTConfig(
                image_size=image_size,
                num_channels=channels,
                patch_size=options.patch_size,
                hidden_size=options.hidden_size,
                num_hidden_layers=options.depth,
                num_attention_heads=options.num_heads,
                intermediate_size=options.hidden_size * options.mlp_ratio,
                hidden_dropout_prob=options.dropout,
                num_labels=num_labels,  # type: ignore[call-arg]
            )
        )

    kept = {"hidden_dropout_prob": options.dropout}
    return _classifier(ViTForImageClassification, options, random_weights, kept, num_labels, image_size, channels)


def build_swin(options: SwinOptions, num_labels: int, image_size: int, channels: int) -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    def random_weights() -> nn.Module:
        return SwinForImageClassification(
            SwinConfig(
                image_size=image_size,
                num_channels=channels,
                patch_size=options.patch_size,
                embed_dim=options.embed_dim,
                depths=options.depths,
                num_heads=options.num_heads,
                window_size=options.window_size,
                mlp_ratio=options.mlp_ratio,
                drop_path_rate=options.drop_path_rate,
                num_labels=num_labels,  # type: ignore[call-arg]
            )
        )

    kept = {"drop_path_rate": options.drop_path_rate}
    return _classifier(SwinForImageClassification, options, random_weights, kept, num_labels, image_size, channels)


def _classifier(
    kind: Any,
    options: _Options,
    random_weights: Callable[[], nn.Module],
    kept: dict[str, float],  # options that hold for the file's network too
    num_labels: int,
    image_size: int,
    channels: int,
) -> nn.Module:
    if options.weights is None:
        return TransformerClassifier(random_weights())
    try:
        network, report = kind.from_pretrained(
            options.weights,
            num_labels=num_labels,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            output_loading_info=True,
            **kept,
        )
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"options.weights: cannot load '{options.weights}': {reason} "
            "Give a hub id that can be reached, a local folder with config.json and model.safetensors, or null."
        ) from None
    # transformers itself would go on with random numbers in their place
    reset = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    reset = {name for name in reset if not name.startswith("classifier.")}
    if reset:
        raise UserError(
            f"options.weights: '{options.weights}' holds no whole {kind.__name__} with its config.json: {len(reset)} "
            f"tensors are missing or of another shape, among them {min(reset)}; name other weights or change model"
        )
    for key, wanted in (("image_size", image_size), ("num_channels", channels)):
        if getattr(network.config, key) != wanted:
            setting = {"num_channels": "channels"}.get(key, key)
            raise UserError(
                f"{setting} {wanted} does not fit '{options.weights}', which was trained with "
                f"{getattr(network.config, key)}: set {setting}={getattr(network.config, key)}"
            )
    return TransformerClassifier(network)


def vit_faults(run: RunConfig, options: VitOptions) -> list[str]:
    if options.weights is not None:
        return []
    faults = []
    if run.image_size % options.patch_size:
        faults.append(f"image_size {run.image_size} does not divide by options.patch_size {options.patch_size}")
    if options.hidden_size % options.num_heads:
        faults.append(f"options.hidden_size {options.hidden_size} does not divide by num_heads {options.num_heads}")
    return faults


def swin_faults(run: RunConfig, options: SwinOptions) -> list[str]:
    if options.weights is not None:
        return []
    faults = []
    stages = len(options.depths)
    if len(options.num_heads) != stages:
        faults.append(f"options.num_heads has {len(options.num_heads)} stages but depths has {stages}")
    smallest = options.patch_size * 2 ** (stages - 1)
    if run.image_size % smallest:
        faults.append(
            f"image_size {run.image_size} does not divide by {smallest} (options.patch_size {options.patch_size} "
            f"halved in {stages} stages)"
        )
    elif run.image_size // smallest < options.window_size:
        faults.append(
            f"options.window_size {options.window_size} is larger than the last stage's map of "
            f"{run.image_size // smallest} patches (image_size {run.image_size})"
        )
    for stage, heads in enumerate(options.num_heads):
        if options.embed_dim * 2**stage % heads:
            faults.append(f"options.num_heads: width {options.embed_dim * 2**stage} does not divide by {heads}")
    return faults
