"""The convolutional pixel decoder: a grid of codebook vectors to an image, one doubling per stage."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from ardist.config import ARVAEConfig

MAX_GROUPS = 32
MIN_CHANNELS_PER_GROUP = 4
"""Fewer would turn a thin layer's group norm into an instance norm, which forgets brightness and colour."""


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm with as many groups (at most 32) as divide the channels into groups of four or more."""
    limit = max(1, min(MAX_GROUPS, channels // MIN_CHANNELS_PER_GROUP))
    groups = next(n for n in range(limit, 0, -1) if channels % n == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.norm2 = group_norm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.shortcut = (
            nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1, bias=False)
        )

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h w"]:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))  # type: ignore[no-any-return]


class Stage(nn.Module):
    """The residual blocks of one resolution, then (but for the last stage) nearest-neighbour doubling and a conv."""

    def __init__(self, channels_in: int, channels_out: int, num_blocks: int, *, upsample: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(ResidualBlock(channels_in if i == 0 else channels_out, channels_out) for i in range(num_blocks))
        )
        self.upsample = nn.Conv2d(channels_out, channels_out, 3, padding=1) if upsample else None

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]:
        x = self.blocks(x)
        if self.upsample is not None:
            x = self.upsample(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class PixelDecoder(nn.Module):
    """Codebook vectors on the patch grid to pixels in about [-1, 1]."""

    def __init__(self, config: ARVAEConfig) -> None:
        super().__init__()
        channels = [config.decoder_channels * multiplier for multiplier in reversed(config.decoder_multipliers)]
        self.conv_in = nn.Conv2d(config.codebook_dim, channels[0], 3, padding=1)
        self.middle = nn.Sequential(
            *(ResidualBlock(channels[0], channels[0]) for _ in range(config.decoder_res_blocks))
        )
        self.stages = nn.Sequential(
            *(
                Stage(before, after, config.decoder_res_blocks, upsample=i < len(channels) - 1)
                for i, (before, after) in enumerate(zip([channels[0], *channels[:-1]], channels, strict=True))
            )
        )
        self.norm_out = group_norm(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)
        with torch.no_grad():  # the first pictures are about mid-grey
            self.conv_out.weight.mul_(0.3)

    def forward(self, codes: Float[Tensor, "n z gh gw"]) -> tuple[Float[Tensor, "n 3 h w"], Float[Tensor, "n c h w"]]:
        """Pixels, and what the last convolution made them from."""
        features = F.silu(self.norm_out(self.stages(self.middle(self.conv_in(codes)))))
        return self.conv_out(features), features


def last_layer_gradient(
    features: Float[Tensor, "n c h w"], gradient: Float[Tensor, "b f 3 h w"]
) -> Float[Tensor, "3 c 3 3"]:
    """Gradient at the weights of the last convolution of a loss whose gradient at the decoded frames is `gradient`.

    From the convolution's input alone: no second pass through the model, whose weights ZeRO-3 may have put away.
    """
    pixels = 0.5 * gradient.flatten(0, 1).float()  # frames are 0.5 * output + 0.5
    size = (3, features.shape[1], 3, 3)
    weight_gradient: Tensor = conv2d_weight(features.detach().float(), size, pixels, padding=1)
    return weight_gradient
