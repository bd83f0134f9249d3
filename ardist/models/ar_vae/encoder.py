"""The encoder: each frame on its own to a few latent tokens (METHOD section 5)."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ardist.config import ARVAEConfig
from ardist.models.ar_vae.posterior import LOGVAR_RANGE
from ardist.models.ar_vae.transformer import (
    grid_positions,
    init_weights,
    learned_positions,
    learned_tokens,
    transformer_layers,
)


class Encoder(nn.Module):
    """Patches, CLS and learned latent tokens through a transformer; the latent tokens give mean and log-variance."""

    def __init__(self, config: ARVAEConfig) -> None:
        super().__init__()
        width = config.width
        side = config.image_size // config.patch_size
        self.grid = (side, side)
        self.num_latents = config.tokens_per_frame
        self.activation_checkpointing = False
        self.patch_embed = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size)
        self.cls_token = learned_tokens(1, width)
        self.cls_position = learned_tokens(1, width)
        self.latent_tokens = learned_tokens(config.tokens_per_frame, width)
        self.patch_positions, self.latent_positions = learned_positions(side, config.tokens_per_frame, width)
        self.norm_in = nn.LayerNorm(width)
        self.layers = transformer_layers(width, config.depth, config.num_heads, config.mlp_ratio)
        self.norm_out = nn.LayerNorm(width)
        self.moments = nn.Linear(width, 2 * config.latent_channels)
        for module in (self.patch_embed, self.moments):
            init_weights(module)
        with torch.no_grad():  # see transformer.py: patches speak in the second half of the channels
            self.patch_embed.weight[: width // 2] = 0.0
            self.moments.weight[:, : width // 2] = 0.0
        nn.init.normal_(self.moments.bias[: config.latent_channels], std=0.1)

    def forward(self, frames: Float[Tensor, "n 3 h w"]) -> tuple[Float[Tensor, "n l c"], Float[Tensor, "n l c"]]:
        """Mean and clamped log-variance, float32, of frames in [-1, 1]."""
        patches = self.patch_embed(frames)
        grid = (patches.shape[-2], patches.shape[-1])
        patches = rearrange(patches, "n d h w -> n (h w) d") + grid_positions(self.patch_positions, self.grid, grid)
        single = torch.cat([self.cls_token + self.cls_position, self.latent_tokens + self.latent_positions])
        cls, latents = single.expand(len(patches), -1, -1).split([1, self.num_latents], dim=1)
        x = self.norm_in(torch.cat([cls, patches, latents], dim=1))
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        moments = self.moments(self.norm_out(x[:, -self.num_latents :])).float()
        mean, logvar = moments.chunk(2, dim=-1)
        return mean, logvar.clamp(*LOGVAR_RANGE)
