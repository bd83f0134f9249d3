"""Floating-point operations of the denoiser, exactly, for MFU and planning.

A multiply and an add count as two. Counted are the matrix products and attention (as the model needs them: the pairs
that the mask allows, the backward pass at two products per forward product, nothing for recomputation); elementwise
work is left out, as is usual for MFU.
"""

from __future__ import annotations

from dataclasses import dataclass

from ardist.config.denoiser import DenoiserConfig
from ardist.models.attention import AttentionLayout
from ardist.models.denoiser.embedding import FREQUENCIES


@dataclass(frozen=True)
class Flops:
    """FLOPs of one clip."""

    forward_linear: int
    forward_attention: int
    backward: int

    @property
    def forward(self) -> int:
        """One forward pass."""
        return self.forward_linear + self.forward_attention

    @property
    def training(self) -> int:
        """One forward and one backward pass."""
        return self.forward + self.backward


def denoiser_flops(config: DenoiserConfig, num_frames: int) -> Flops:
    """FLOPs per clip of `num_frames` frames; about 1.67e12 in training for ``xl`` at F=16, L=32 and 77 context tokens.

    The backward pass costs twice the forward pass, less the gradients nobody needs: those of the latents and of the
    timestep sinusoid. (That of the context is needed, for the learned null sequence.)
    """
    width, hidden = config.width, round(config.width * config.mlp_ratio)
    layout = AttentionLayout.training(
        num_frames, config.tokens_per_frame, config.context_tokens, config.mask, config.window
    )
    video_tokens = num_frames * config.tokens_per_frame
    per_token = width * (3 * width) + width * width + 2 * width * hidden
    block = layout.num_queries * per_token + num_frames * 6 * width * width
    leaves = video_tokens * config.latent_channels * width + num_frames * FREQUENCIES * width
    others = (
        num_frames * width * width
        + video_tokens * width * config.latent_channels
        + config.context_tokens * config.context_dim * width
    )
    linear = 2 * (config.depth * block + leaves + others)
    attention = config.depth * 2 * 2 * layout.num_pairs() * width
    return Flops(linear, attention, backward=2 * (linear + attention) - 2 * leaves)
