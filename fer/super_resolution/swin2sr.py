"""Swin2SR: x2 or x4 super-resolution with the network of transformers."""

from typing import Any

import torch
from torch import Tensor, nn

from fer.errors import UserError
from fer.super_resolution.dic import pad
from fer.weights import HUB_ERRORS, misfit

PUBLISHED = {2: "caidas/swin2SR-classical-sr-x2-64", 4: "caidas/swin2SR-classical-sr-x4-64"}


class Swin2Sr(nn.Module):
    """`Swin2SRForImageSuperResolution` (Conde et al. 2022, arXiv 2209.11345) for images of any size."""

    def __init__(self, network: Any, scale: int):
        super().__init__()
        self.network, self.scale = network, scale

    def forward(self, images: Tensor) -> Tensor:
        """RGB in [0, 1], [B, 3, H, W] -> [B, 3, scale*H, scale*W] in [0, 1]."""
        height, width = images.shape[2:]
        # pad here: the padding of transformers fails, as it forgets the padded size, but it skips whole windows
        whole = pad(images, self.network.config.window_size)
        larger = self.network(pixel_values=whole).reconstruction
        return larger.clamp(0, 1)[:, :, : self.scale * height, : self.scale * width]


def load_swin2sr(source: str, scale: int, key: str) -> nn.Module:
    """The network in `source`, a hub id or local folder, in float32 and eval mode.

    Raises UserError, beginning with the setting `key`, if it cannot be loaded, is of another kind or scale, or lacks
    weights.
    """
    from transformers import AutoConfig, Swin2SRForImageSuperResolution

    kind: Any = Swin2SRForImageSuperResolution
    try:
        config = AutoConfig.from_pretrained(source)
        _refuse_another(config, f"{key}: '{source}'", scale)
        network, report = kind.from_pretrained(
            source,
            config=config,
            ignore_mismatched_sizes=True,  # they are reported below, by name
            use_safetensors=True,
            dtype=torch.float32,  # otherwise the dtype of the file
            output_loading_info=True,
        )
    except HUB_ERRORS as error:
        reason = str(error).splitlines()[0].rstrip(".:")
        raise UserError(
            f"{key}: cannot load '{source}': {reason}. "
            "Use a hub id that can be reached, or a local folder with config.json and model.safetensors"
        ) from None
    if wrong := misfit(report):
        raise UserError(
            f"{key}: '{source}' does not match its config.json: {wrong}; download it again or use another network"
        )
    return Swin2Sr(network, scale).eval()


def _refuse_another(config: Any, where: str, scale: int) -> None:
    if config.model_type != "swin2sr":
        another = PUBLISHED.get(scale, PUBLISHED[2])
        raise UserError(f"{where} is a network of type {config.model_type}, not swin2sr; use one such as {another}")
    factor = config.upscale if config.upsampler else 1
    if factor != scale:
        raise UserError(
            f"{where} enlarges images by {factor}, but scale is {scale}; set scale to {factor} or use another network"
        )
    channels = config.num_channels, config.num_channels_out
    if channels != (3, 3):
        raise UserError(
            f"{where} takes {channels[0]} channels and returns {channels[1]}, but both must be 3; "
            "use a network for colour images"
        )
