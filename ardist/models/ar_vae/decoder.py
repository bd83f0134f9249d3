"""The token decoder: latent tokens of each frame (and of earlier frames) to a grid of codebook vectors."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ardist.config import ARVAEConfig
from ardist.errors import InvalidValueError
from ardist.models.ar_vae.temporal import DecoderCache, FrameContext, KeyValues, TemporalBlock, make_context
from ardist.models.ar_vae.transformer import (
    grid_positions,
    init_weights,
    learned_positions,
    learned_tokens,
    transformer_layers,
)

Past = tuple[KeyValues, KeyValues]


class TokenDecoder(nn.Module):
    """CLS, mask tokens and latent tokens through a transformer with temporal blocks, then a soft codebook look-up."""

    def __init__(self, config: ARVAEConfig) -> None:
        super().__init__()
        width = config.width
        side = config.image_size // config.patch_size
        self.grid = (side, side)
        self.num_latents = config.tokens_per_frame
        self.head_dim = width // config.num_heads if config.temporal_positions == "rope" else None
        self.activation_checkpointing = False
        self.embed = nn.Linear(config.latent_channels, width)
        self.mask_token = learned_tokens(1, width, std=1.0)
        self.cls_token = learned_tokens(1, width)
        self.cls_position = learned_tokens(1, width)
        self.patch_positions, self.latent_positions = learned_positions(side, config.tokens_per_frame, width)
        self.norm_in = nn.LayerNorm(width)
        self.layers = transformer_layers(width, config.depth, config.num_heads, config.mlp_ratio)
        self.temporal = nn.ModuleList(
            TemporalBlock(width, config.num_heads) for _ in range(config.depth if config.temporal else 0)
        )
        self.norm_out = nn.LayerNorm(width)
        self.to_logits = nn.Sequential(
            nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, config.codebook_size)
        )
        self.codebook = nn.Linear(config.codebook_size, config.codebook_dim)
        for part in (self.embed, self.to_logits):
            part.apply(init_weights)
        with torch.no_grad():  # see transformer.py: latents speak in the second half of the channels
            self.embed.weight[: width // 2] = 0.0
            # A mask token has nothing to say. Noise there makes its place count less than a latent token's, so that
            # patches attend to latents rather than to each other.
            self.mask_token[:, : width // 2] = 0.0
        nn.init.normal_(self.codebook.weight)

    def forward(
        self, latents: Float[Tensor, "b f l c"], grid: tuple[int, int], cache: DecoderCache
    ) -> Float[Tensor, "bf z gh gw"]:
        """Codebook vectors on `grid` for frames that follow those in `cache`, which is brought up to date."""
        batch, frames = latents.shape[:2]
        x = self._tokens(latents, grid)
        if self.temporal:
            x = self._temporal_layers(x, batch, frames, grid, cache)
        else:
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False) if self._recompute else layer(x)
        cache.frames_seen += frames
        patches = x[:, 1 : x.shape[1] - self.num_latents]
        codes: Tensor = self.codebook(self.to_logits(self.norm_out(patches)).softmax(dim=-1))
        return rearrange(codes, "n (gh gw) z -> n z gh gw", gh=grid[0])

    @property
    def _recompute(self) -> bool:
        return self.activation_checkpointing and torch.is_grad_enabled()

    def _tokens(self, latents: Float[Tensor, "b f l c"], grid: tuple[int, int]) -> Float[Tensor, "bf t d"]:
        embedded = self.embed(latents.flatten(0, 1)) + self.latent_positions
        patches = self.mask_token + grid_positions(self.patch_positions, self.grid, grid)
        single = torch.cat([self.cls_token + self.cls_position, patches])
        tokens: Tensor = self.norm_in(torch.cat([repeat(single, "t d -> n t d", n=len(embedded)), embedded], dim=1))
        return tokens

    def _temporal_layers(
        self, x: Float[Tensor, "bf t d"], batch: int, frames: int, grid: tuple[int, int], cache: DecoderCache
    ) -> Float[Tensor, "bf t d"]:
        if cache.shape not in (None, (batch, *grid)):
            raise InvalidValueError(
                f"the decoder cache belongs to a stream of (batch, rows, columns) {cache.shape}, these latents are of "
                f"{(batch, *grid)}; start a new stream with new_cache()"
            )
        tokens = (x.shape[1] - 1, self.num_latents)
        context = make_context(cache, frames, tokens, self.head_dim, x.device)
        kept: list[Past] = []
        for i, (block, layer) in enumerate(zip(self.temporal, self.layers, strict=True)):
            past = cache.layers[i] if cache.layers else None
            arguments = (block, layer, x, context, past)
            if self._recompute:
                x, now = checkpoint(self._one_layer, *arguments, use_reentrant=False)
            else:
                x, now = self._one_layer(*arguments)
            kept.append(now)
        cache.shape = (batch, *grid)
        held = DecoderCache(cache.window, cache.frames_seen + frames).frames_held
        cache.layers = [(fine.last(held), coarse.last(held * self.num_latents)) for fine, coarse in kept]
        return x

    def _one_layer(
        self, block: nn.Module, layer: nn.Module, x: Float[Tensor, "bf t d"], context: FrameContext, past: Past | None
    ) -> tuple[Float[Tensor, "bf t d"], Past]:
        x, now = block(x, self.num_latents, context, past)
        return layer(x), now
