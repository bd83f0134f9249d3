"""Keys and values of the frames that are final, so that a row evaluates only the frames that still change.

Exact with the ``strict`` mask: there a final frame's keys and values depend on nothing that can still change. (Paper
section 3.3 has the causal attention that makes this possible; the cache is ours.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ardist.config.denoiser import DenoiserConfig
from ardist.errors import InvalidValueError
from ardist.models.attention import AttentionLayout


@dataclass(frozen=True)
class RowPlan:
    """What a network call reads; two calls with equal layouts and `passes_through` have tensors of equal strides."""

    oldest: int
    """The first frame that the call sees."""
    layout: AttentionLayout
    passes_through: bool
    """Nothing to read and nothing to keep: the call's own keys and values serve as they are."""

    @classmethod
    def of(cls, config: DenoiserConfig, window: int, start: int, stop: int, num_final: int) -> RowPlan:
        """The plan of a call on the frames [start, stop), of which the first `num_final` are final."""
        oldest = max(0, start - window + 1)
        layout = AttentionLayout(
            config.tokens_per_frame,
            query_frames=(start - oldest, stop - oldest),
            key_frames=(0, stop - oldest),
            context_tokens=config.context_tokens,
            context_queries=False,
            window=window if stop - oldest > window else None,
        )
        return cls(oldest, layout, oldest == start and not config.context_tokens and not num_final)


class KVCache:
    """One buffer for all layers, laid out so that what a row sees, ``[context ; final frames ; row]``, is one slice.

    A row writes the keys and values of its frames behind those of the final frames before it; those that are final
    stay, the others are overwritten by the next row. Frames that no later frame can see are forgotten: the slice moves
    on, the context is copied in front of it, and when the buffer's end is reached the few visible frames move back to
    its start. So memory is bounded by the window, nothing is concatenated, and almost nothing is copied.
    """

    def __init__(
        self,
        config: DenoiserConfig,
        batch_size: int,
        num_frames: int,
        max_row_frames: int,
        window: int | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Buffers for rows of at most `max_row_frames` frames of a video of `num_frames` frames.

        Raises:
            InvalidValueError: the mask is not ``strict``.
        """
        if config.mask != "strict":
            raise InvalidValueError(f"mask {config.mask!r} cannot be cached exactly; legal: 'strict'")
        self.batch_size = batch_size
        self._config = config
        self._length, self._context = config.tokens_per_frame, config.context_tokens
        self._window = num_frames if window is None else window
        visible = self._window - 1 + max_row_frames
        self._capacity = min(num_frames, visible + max(1, visible // 2))
        shape = (config.depth, 2, batch_size, config.num_heads)
        tokens = self._context + self._capacity * self._length
        self._buffer = torch.empty(*shape, tokens, config.head_dim, device=device, dtype=dtype)
        self._context_copy = torch.empty(*shape, self._context, config.head_dim, device=device, dtype=dtype)
        self._base = 0  # the frame in the buffer's first place
        self._context_before = -1  # the frame that the context stands in front of
        self._passes_through = False
        self._visible = self._row = slice(0, 0)
        self.layers: Sequence[_LayerCache] = [_LayerCache(self, layer) for layer in range(config.depth)]
        self.context_layers: Sequence[_ContextCache] = [_ContextCache(self, layer) for layer in range(config.depth)]

    @property
    def num_bytes(self) -> int:
        """Memory of the buffers in bytes."""
        return (self._buffer.numel() + self._context_copy.numel()) * self._buffer.element_size()

    def begin_row(self, start: int, stop: int, num_final: int) -> AttentionLayout:
        """Prepare for a network call on the frames [start, stop), of which the first `num_final` are final.

        The frames before `start` must have been final in an earlier row. Returns the layout of the call's attention.
        """
        plan = RowPlan.of(self._config, self._window, start, stop, num_final)
        oldest = plan.oldest
        if stop - self._base > self._capacity:
            self._move_to_front(oldest, start)
        if self._context and self._context_before != oldest:
            self._copy_context(oldest)
        first = self._slot(oldest)
        self._visible = slice(first - self._context, first + (stop - oldest) * self._length)
        self._row = slice(self._slot(start), self._slot(stop))
        self._passes_through = plan.passes_through
        return plan.layout

    def _slot(self, frame: int) -> int:
        """Index in the buffer of the first token of `frame`."""
        return self._context + (frame - self._base) * self._length

    def _move_to_front(self, oldest: int, start: int) -> None:
        """Make `oldest` the buffer's first frame; keeps [oldest, start)."""
        kept = self._buffer[..., self._slot(oldest) : self._slot(start), :]
        self._buffer[..., self._context : self._context + kept.shape[-2], :] = kept.clone()
        self._base, self._context_before = oldest, -1

    def _copy_context(self, oldest: int) -> None:
        stop = self._slot(oldest)
        self._buffer[..., stop - self._context : stop, :] = self._context_copy
        self._context_before = oldest

    def _extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self._passes_through:
            return keys, values
        buffer = self._buffer[layer]
        buffer[0, :, :, self._row] = keys
        buffer[1, :, :, self._row] = values
        return buffer[0, :, :, self._visible], buffer[1, :, :, self._visible]

    def _set_context(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self._context_copy[layer, 0] = keys
        self._context_copy[layer, 1] = values


class _LayerCache:
    """What one block sees of the cache while a row runs."""

    def __init__(self, cache: KVCache, layer: int) -> None:
        self._cache, self._layer = cache, layer

    def extend(
        self, keys: Float[Tensor, "b h n d"], values: Float[Tensor, "b h n d"]
    ) -> tuple[Float[Tensor, "b h m d"], Float[Tensor, "b h m d"]]:
        """Write the row's frames, return everything visible."""
        return self._cache._extend(self._layer, keys, values)


class _ContextCache:
    """What one block sees of the cache while the context tokens run alone."""

    def __init__(self, cache: KVCache, layer: int) -> None:
        self._cache, self._layer = cache, layer

    def extend(
        self, keys: Float[Tensor, "b h k d"], values: Float[Tensor, "b h k d"]
    ) -> tuple[Float[Tensor, "b h k d"], Float[Tensor, "b h k d"]]:
        """Keep the context's keys and values; context tokens see each other and nothing else."""
        self._cache._set_context(self._layer, keys, values)
        return keys, values
