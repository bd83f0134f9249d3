"""The network: per-token linear in, blocks, per-token linear out (paper section 3.3)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

from ardist.config.denoiser import DenoiserConfig
from ardist.config.loading import check
from ardist.events import events
from ardist.models.attention import AttentionLayout
from ardist.models.denoiser.block import EPS, Block, KeyValueStore
from ardist.models.denoiser.embedding import ContextEmbedding, TimestepEmbedding
from ardist.models.denoiser.validation import check_inputs
from ardist.models.positions import axial_rotation, sequence_rotation, sincos_table


def preset(name: str, **changes: Any) -> DenoiserConfig:
    """Configuration ``tiny``, ``small``, ``base``, ``xl`` or ``released-xl`` with changes; `ConfigError` if illegal."""
    return check(DenoiserConfig, {"preset": name, **changes}, f"denoiser preset {name!r}")


class Denoiser(nn.Module):
    """Predicts the clean latents (or noise, or velocity) of every frame from noisy ones, each at its own timestep.

    With the ``strict`` mask the prediction for a frame is exactly independent of all later frames. The ``released``
    mask leaks later frames through the context tokens and is meant for imported weights; it warns once.
    """

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = config
        if config.mask == "released":
            _warn_of_released_mask()
        self.input = nn.Linear(config.latent_channels, config.width)
        self.timestep = TimestepEmbedding(config.width)
        self.classes = nn.Embedding(config.num_classes + 1, config.width) if config.num_classes is not None else None
        self.context = (
            ContextEmbedding(config.context_tokens, config.context_dim, config.width) if config.context_tokens else None
        )
        self.position_table: Tensor | None
        length = config.max_frames * config.tokens_per_frame
        # Part of the state: imported weights bring the table they were trained with.
        self.register_buffer(
            "position_table", torch.empty(length, config.width) if config.positions == "sincos" else None
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.output = nn.Linear(config.width, config.latent_channels)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """adaLN-Zero: each block starts as the identity and the output at zero; the rest Xavier or N(0, 0.02²)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.timestep.hidden, self.timestep.output):
            nn.init.normal_(layer.weight, std=0.02)
        if self.classes is not None:
            nn.init.normal_(self.classes.weight, std=0.02)
        if self.context is not None:
            nn.init.normal_(self.context.null, std=0.02)
        if self.position_table is not None:
            self.position_table.copy_(sincos_table(*self.position_table.shape))
        for block in self._blocks():
            nn.init.zeros_(block.modulation.weight)
        nn.init.zeros_(self.output.weight)

    def forward(
        self,
        latents: Float[Tensor, "b f l c"],
        timesteps: Int64[Tensor, "b f"],
        context: Float[Tensor, "b k d"] | None = None,
        class_ids: Int64[Tensor, "b"] | None = None,
        *,
        context_dropped: Bool[Tensor, "b"] | None = None,
        window: int | None = None,
        law: str | None = None,
    ) -> Float[Tensor, "b f l c"]:
        """Predict for whole clips, without a cache.

        Args:
            latents: noisy latents; cast to the dtype of the weights.
            timesteps: one per frame, in [0, T).
            context: condition sequence; None stands for the learned null sequence.
            class_ids: in [0, num_classes]; num_classes is the null class, and None stands for it.
            context_dropped: clips whose context is replaced by the null sequence.
            window: frames a frame looks back to, itself included, at most as configured; None: as configured.
            law: the law that the timesteps follow, so that an order that it forbids is refused; None: any order.

        Raises:
            InvalidValueError: a shape disagrees with the configuration, or a value is out of range. Values are looked
                at where that is free: on a CPU, outside a compiled program (elsewhere: `check_values`).
        """
        config = self.config
        check_inputs(config, latents, timesteps, context, class_ids, context_dropped, window, law)
        frames = latents.shape[1]
        layout = AttentionLayout.training(
            frames,
            config.tokens_per_frame,
            config.context_tokens,
            config.mask,
            config.window if window is None else window,
        )
        tokens = self._embed(latents, 0)
        if self.context is not None:
            tokens = torch.cat([self.context(context, context_dropped, latents.shape[0]), tokens], dim=1)
        conditioning = [self._condition(timesteps, class_ids)] * config.depth
        tokens = self._run(tokens, conditioning, self._rotation(layout, 0), layout)
        return self._project(tokens[:, layout.num_context_queries :], frames)

    def forward_context(
        self,
        context: Float[Tensor, "b k d"] | None,
        context_dropped: Bool[Tensor, "b"] | None,
        batch_size: int,
        stores: Sequence[KeyValueStore],
    ) -> None:
        """Cached inference: run the context tokens alone, so that `stores` (one per block) get their keys and values.

        Exact with the ``strict`` mask only, in which context tokens see nothing but the context.
        """
        if self.context is None:
            return
        layout = AttentionLayout.training(0, self.config.tokens_per_frame, self.config.context_tokens)
        tokens = self.context(context, context_dropped, batch_size)
        conditioning = tokens.new_empty(batch_size, 0, self.config.width)
        self._run(tokens, [conditioning] * self.config.depth, self._rotation(layout, 0), layout, stores)

    def modulations(
        self, timesteps: Int64[Tensor, "s"], class_ids: Int64[Tensor, "b"] | None
    ) -> Float[Tensor, "depth b s m"]:
        """Cached inference: the modulation of every block at each of some timesteps, for `forward_frames`.

        One row (b = 1, to be broadcast) when no class is given. A sampler shows S + 1 different timesteps many times
        over; a third of the network's weights is needed for this table only.
        """
        rows = 1 if class_ids is None else class_ids.shape[0]
        conditioning = self._condition(timesteps.expand(rows, -1), class_ids)
        return torch.stack([block.modulation(conditioning) for block in self._blocks()])

    def forward_frames(
        self,
        latents: Float[Tensor, "b a l c"],
        modulations: Float[Tensor, "depth b2 a m"],
        first_frame: int,
        layout: AttentionLayout,
        stores: Sequence[KeyValueStore],
    ) -> Float[Tensor, "b a l c"]:
        """Cached inference: predict for the frames from `first_frame` on, which also see what `stores` hold.

        Args:
            modulations: of the frames' timesteps, from the method above; one row or one per clip.
            layout: asks with these frames only (no context queries) and may number frames from any origin.
        """
        tokens = self._embed(latents, first_frame)
        tokens = self._run(tokens, modulations, self._rotation(layout, first_frame), layout, stores)
        return self._project(tokens, latents.shape[1])

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def _embed(self, latents: Tensor, first_frame: int) -> Tensor:
        tokens: Tensor = self.input(latents.to(self.input.weight.dtype).flatten(1, 2))
        if self.position_table is None:
            # Not a view: compiled blocks would tell the first one's input from the others' by its base.
            return tokens.clone()
        start = first_frame * self.config.tokens_per_frame
        return tokens + self.position_table[start : start + tokens.shape[1]]

    def _condition(self, timesteps: Tensor, class_ids: Tensor | None) -> Tensor:
        """What the adaLN of every block starts from, [b f w]."""
        embedded: Tensor = self.timestep(timesteps)
        if self.classes is not None:
            null = self.classes.num_embeddings - 1
            vector = self.classes.weight[null] if class_ids is None else self.classes(class_ids)[:, None]
            embedded = embedded + vector
        return silu(embedded)

    def _rotation(self, layout: AttentionLayout, first_frame: int) -> Tensor | None:
        """Rotary tables of the tokens that ask in `layout`, when the first of its frames is number `first_frame`."""
        config, device = self.config, self.input.weight.device
        context = layout.num_context_queries
        if config.positions == "rope":
            frames = (first_frame, first_frame + layout.num_query_frames)
            return axial_rotation(frames, config.tokens_per_frame, context, config.head_dim, config.rope_theta, device)
        if config.positions == "rope_1d":
            first = 0 if context else config.context_tokens + first_frame * config.tokens_per_frame
            return sequence_rotation(first, layout.num_queries, config.head_dim, device)
        return None

    def _run(
        self,
        tokens: Tensor,
        conditioning: Sequence[Tensor] | Tensor,
        rotation: Tensor | None,
        layout: AttentionLayout,
        stores: Sequence[KeyValueStore] | None = None,
    ) -> Tensor:
        for index, block in enumerate(self.blocks):
            store = None if stores is None else stores[index]
            tokens = block(tokens, conditioning[index], rotation, layout, store)
        return tokens

    def _project(self, tokens: Tensor, frames: int) -> Tensor:
        predicted: Tensor = self.output(layer_norm(tokens, tokens.shape[-1:], eps=EPS))
        by_frame: Tensor = predicted.unflatten(1, (frames, self.config.tokens_per_frame))
        return by_frame


@functools.cache
def _warn_of_released_mask() -> None:
    events.count("denoiser.released_mask", reason="context tokens see later frames: neither causal nor cacheable")
