"""One transformer block: adaLN-Zero per frame around block-causal attention and an MLP (paper section 3.3)."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm

from ardist.config.denoiser import DenoiserConfig
from ardist.models.attention import AttentionLayout, attention
from ardist.models.positions import rotate

EPS = 1e-6
QK_EPS = 1e-5


@runtime_checkable
class KeyValueStore(Protocol):
    """What a block asks of the cache of one layer during cached inference."""

    def extend(
        self, keys: Float[Tensor, "b h n d"], values: Float[Tensor, "b h n d"]
    ) -> tuple[Float[Tensor, "b h m d"], Float[Tensor, "b h m d"]]:
        """Take the keys and values of the tokens at hand; return those of everything that is visible."""


class QKNorm(nn.Module):
    """LayerNorm over the channels of each head, with one affine map for queries and one for keys."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 1, head_dim))
        self.bias = nn.Parameter(torch.zeros(2, 1, head_dim))

    def forward(self, x: Float[Tensor, "b n 2 h d"]) -> Float[Tensor, "b n 2 h d"]:
        """Normalise queries ``x[:, :, 0]`` and keys ``x[:, :, 1]`` per token and head."""
        return torch.addcmul(self.bias, layer_norm(x, x.shape[-1:], eps=QK_EPS), self.weight)


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated per frame; context tokens are neither modulated nor gated.

    Tokens are ``[context ; frames]``, [b, k + f*l, w]. `ardist.models.parallelize` compiles `whole`, the block without
    a cache, and for cached inference the two halves around the attention call, `before_attention` and
    `after_attention`, which know nothing of caches.
    """

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        width, hidden = config.width, round(config.width * config.mlp_ratio)
        self.num_heads = config.num_heads
        self.tokens_per_frame = config.tokens_per_frame
        self.overwrite_with_norm = config.residual == "released"
        self.backend = config.attention_backend
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.qk_norm = QKNorm(config.head_dim) if config.qk_norm else None
        self.projection = nn.Linear(width, width)
        self.mlp_hidden = nn.Linear(width, hidden)
        self.mlp_output = nn.Linear(hidden, width)

    def forward(
        self,
        tokens: Float[Tensor, "b n w"],
        conditioning: Float[Tensor, "#b f c"],
        rotation: Float[Tensor, "2 n 2 1 d"] | None,
        layout: AttentionLayout,
        store: KeyValueStore | None = None,
    ) -> Float[Tensor, "b n w"]:
        """Tokens in, tokens out.

        Args:
            conditioning: per frame, what the modulation is computed from (c = w), or the modulation itself (c = 6 w).
            store: holds keys and values of tokens that are not among `tokens`.
        """
        if store is None:
            return self.whole(tokens, conditioning, rotation, layout)
        context_tokens, modulation = layout.num_context_queries, self._modulation(tokens, conditioning)
        residual, q, k, v = self.before_attention(tokens, modulation, rotation, context_tokens)
        k, v = store.extend(k, v)
        attended = attention(q, k, v, layout, self.backend)
        return self.after_attention(residual, modulation, attended, context_tokens)

    def whole(
        self,
        tokens: Float[Tensor, "b n w"],
        conditioning: Float[Tensor, "#b f c"],
        rotation: Float[Tensor, "2 n 2 1 d"] | None,
        layout: AttentionLayout,
    ) -> Float[Tensor, "b n w"]:
        """The block on tokens that see nothing but each other."""
        context_tokens, modulation = layout.num_context_queries, self._modulation(tokens, conditioning)
        # The class's own halves: those of this object may be compiled programs.
        residual, q, k, v = Block.before_attention(self, tokens, modulation, rotation, context_tokens)
        attended = attention(q, k, v, layout, self.backend)
        return Block.after_attention(self, residual, modulation, attended, context_tokens)

    def _modulation(self, tokens: Tensor, conditioning: Tensor) -> Tensor:
        modulation: Tensor
        modulation = self.modulation(conditioning) if conditioning.shape[-1] == tokens.shape[-1] else conditioning
        return modulation

    def before_attention(
        self,
        tokens: Float[Tensor, "b n w"],
        modulation: Float[Tensor, "#b f m"],
        rotation: Float[Tensor, "2 n 2 1 d"] | None,
        context_tokens: int,
    ) -> tuple[Float[Tensor, "b n w"], Float[Tensor, "b h n d"], Float[Tensor, "b h n d"], Float[Tensor, "b h n d"]]:
        """The residual stream, and rotated q, k and v."""
        normed = layer_norm(tokens, tokens.shape[-1:], eps=EPS)
        residual = normed if self.overwrite_with_norm else tokens
        shift, scale = modulation.chunk(6, dim=-1)[:2]
        qkv = self.qkv(self._modulate(normed, shift, scale, context_tokens)).unflatten(-1, (3, self.num_heads, -1))
        qk = qkv[:, :, :2]
        if self.qk_norm is not None:
            qk = self.qk_norm(qk)
        if rotation is not None:
            qk = rotate(qk, rotation)
        q, k, v = qk[:, :, 0], qk[:, :, 1], qkv[:, :, 2]
        return residual, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def after_attention(
        self,
        residual: Float[Tensor, "b n w"],
        modulation: Float[Tensor, "#b f m"],
        attended: Float[Tensor, "b h n d"],
        context_tokens: int,
    ) -> Float[Tensor, "b n w"]:
        """Add the gated attention branch, then the gated MLP branch."""
        gate, mlp_shift, mlp_scale, mlp_gate = modulation.chunk(6, dim=-1)[2:]
        branch = self.projection(attended.transpose(1, 2).flatten(2))
        tokens = self._add_gated(residual, branch, gate, context_tokens)
        normed = layer_norm(tokens, tokens.shape[-1:], eps=EPS)
        residual = normed if self.overwrite_with_norm else tokens
        hidden = self.mlp_hidden(self._modulate(normed, mlp_shift, mlp_scale, context_tokens))
        return self._add_gated(residual, self.mlp_output(gelu(hidden, approximate="tanh")), mlp_gate, context_tokens)

    def _modulate(self, x: Tensor, shift: Tensor, scale: Tensor, context_tokens: int) -> Tensor:
        """``x * (1 + scale) + shift`` on the video tokens of each frame; context tokens pass as they are."""
        # In place on a fresh product: one pass over memory less, and the plain rounding of x * (1 + scale) + shift.
        video = self._by_frame(x, shift, context_tokens) * (1 + scale[:, :, None])
        video = video.add_(shift[:, :, None]).flatten(1, 2)
        return torch.cat([x[:, :context_tokens], video], dim=1) if context_tokens else video

    def _add_gated(self, residual: Tensor, branch: Tensor, gate: Tensor, context_tokens: int) -> Tensor:
        """``residual + gate * branch`` on the video tokens of each frame, ``residual + branch`` on context tokens."""
        gated = (self._by_frame(branch, gate, context_tokens) * gate[:, :, None]).flatten(1, 2)
        if not context_tokens:
            return residual + gated
        context = residual[:, :context_tokens] + branch[:, :context_tokens]
        return torch.cat([context, residual[:, context_tokens:] + gated], dim=1)

    def _by_frame(self, x: Tensor, modulation: Tensor, context_tokens: int) -> Tensor:
        """The video tokens of ``[context ; frames]`` as a view [b f l w]; `modulation` is [b f w]."""
        video: Tensor = x[:, context_tokens:].unflatten(1, (modulation.shape[1], self.tokens_per_frame))
        return video
