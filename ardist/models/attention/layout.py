"""Who may attend to whom: the one definition of the attention mask, for training and for cached inference.

Paper section 3.3 (temporal causal attention). A sequence is ``[context tokens ; frame, frame, ...]`` with a fixed
number of tokens per frame. Every backend, the FLOP accounting and the tests derive what they need from the class
below, so that the mask the network was trained with is the mask the cached sampler applies.
"""

from __future__ import annotations

import dataclasses
import operator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ardist.errors import InvalidValueError, check_integer, choose

MaskKind = Literal["strict", "released", "bidirectional"]
LayoutKey = tuple[int, int, int, int, int, int, bool, str, int | None]


@dataclass(frozen=True)
class AttentionLayout:
    """Which query token may see which key token. Hashable, so compiled masks are built once per layout.

    The rule, with f the absolute frame index of a query and g that of a key:

    - every query sees every context token;
    - a video query sees the video key iff ``f - window < g <= f`` (``window=None``: iff ``g <= f``), in both directions
      inside its own frame; ``bidirectional`` drops this condition;
    - a context query sees no video token, except in ``released``, where it sees all of them.

    Attributes:
        tokens_per_frame: tokens L of one frame, at least 1.
        query_frames: ``(start, stop)`` of the frames that ask; may be empty when context tokens ask.
        key_frames: ``(start, stop)`` of the frames that are present among the keys. It contains the query frames.
            ``start > 0`` says that older keys have been dropped; `complete` says whether that changes the result.
        context_tokens: context keys, which stand first among the keys.
        context_queries: the context tokens also stand first among the queries (not so in cached inference).
        kind: ``strict`` is exactly causal, ``released`` is the published checkpoints' mask, which lets later frames
            leak through the context from the second layer on, ``bidirectional`` is the ablation without causality.
        window: frames a frame looks back to, itself included; None: all of them.

    Raises:
        InvalidValueError: a count or range is illegal, or nothing asks.
    """

    tokens_per_frame: int
    query_frames: tuple[int, int]
    key_frames: tuple[int, int]
    context_tokens: int = 0
    context_queries: bool = True
    kind: str = "strict"
    window: int | None = None

    def __post_init__(self) -> None:
        choose("kind", self.kind, get_args(MaskKind))
        check_integer("tokens_per_frame", self.tokens_per_frame)
        check_integer("context_tokens", self.context_tokens)
        if self.tokens_per_frame < 1:
            raise InvalidValueError(f"tokens_per_frame={self.tokens_per_frame} is illegal; legal: at least 1")
        if self.context_tokens < 0:
            raise InvalidValueError(f"context_tokens={self.context_tokens} is illegal; legal: at least 0")
        for name in ("query_frames", "key_frames"):
            start, stop = getattr(self, name)
            check_integer(f"the start of {name}", start)
            check_integer(f"the end of {name}", stop)
            if not 0 <= start <= stop:
                raise InvalidValueError(
                    f"{name}={(start, stop)} is illegal; legal: (start, stop) with 0 <= start <= stop"
                )
        if self.window is not None:
            check_integer("window", self.window)
            if self.window < 1:
                raise InvalidValueError(f"window={self.window} is illegal; legal: at least 1, or None for no window")
        if self.window is not None and self.kind == "bidirectional":
            raise InvalidValueError(f"window={self.window} is illegal with kind='bidirectional'; legal: None")
        if self.num_query_frames and not (
            self.key_frames[0] <= self.query_frames[0] and self.query_frames[1] <= self.key_frames[1]
        ):
            raise InvalidValueError(
                f"query_frames={self.query_frames} are not all among key_frames={self.key_frames}; "
                "legal: every asking frame is present among the keys"
            )
        if not self.num_queries:
            raise InvalidValueError("the layout has no query; legal: at least one query frame or context query")

    @classmethod
    def training(
        cls,
        num_frames: int,
        tokens_per_frame: int,
        context_tokens: int = 0,
        kind: str = "strict",
        window: int | None = None,
    ) -> AttentionLayout:
        """The layout in which the whole sequence attends to itself, as in training and in uncached inference."""
        frames = (0, num_frames)
        return cls(tokens_per_frame, frames, frames, context_tokens, kind=kind, window=window)

    @property
    def num_query_frames(self) -> int:
        """Frames that ask."""
        return self.query_frames[1] - self.query_frames[0]

    @property
    def num_key_frames(self) -> int:
        """Frames present among the keys."""
        return self.key_frames[1] - self.key_frames[0]

    @property
    def num_context_queries(self) -> int:
        """Context tokens that ask; they stand first among the queries."""
        return self.context_tokens if self.context_queries else 0

    @property
    def num_queries(self) -> int:
        """Length n of the query sequence."""
        return self.num_context_queries + self.num_query_frames * self.tokens_per_frame

    @property
    def num_keys(self) -> int:
        """Length m of the key sequence."""
        return self.context_tokens + self.num_key_frames * self.tokens_per_frame

    @property
    def complete(self) -> bool:
        """No earlier frame that a query may see is missing from the keys: the result is that of the full sequence."""
        if not self.num_query_frames:
            return True
        oldest = 0 if self.window is None else max(0, self.query_frames[0] - self.window + 1)
        return self.key_frames[0] <= oldest

    def key(self) -> LayoutKey:
        """The layout as plain values, which a compiler can guard by value; `from_key` is the inverse."""
        counts = (self.tokens_per_frame, *self.query_frames, *self.key_frames, self.context_tokens)
        # index(): where a compiler has made a number symbolic, this asks for its value.
        length, first, last, start, stop, context = (operator.index(count) for count in counts)
        window = None if self.window is None else operator.index(self.window)
        return length, first, last, start, stop, context, self.context_queries, self.kind, window

    @classmethod
    def from_key(cls, key: LayoutKey) -> AttentionLayout:
        """The layout of a `key`."""
        length, first, last, start, stop, context, asking, kind, window = key
        return cls(length, (first, last), (start, stop), context, asking, kind, window)

    def relative(self) -> AttentionLayout:
        """The layout of the same mask with frames counted from the first key: rows of a sliding window coincide."""
        shift = self.key_frames[0]
        if shift == 0:
            return self
        start, stop = (max(0, frame - shift) for frame in self.query_frames)
        return dataclasses.replace(self, query_frames=(start, stop), key_frames=(0, self.num_key_frames))

    def visible_frames(self, frame: int) -> tuple[int, int]:
        """``[start, stop)`` of the present key frames that the queries of `frame` see."""
        start, stop = self.key_frames
        if self.kind == "bidirectional":
            return start, stop
        if self.window is not None:
            start = max(start, frame - self.window + 1)
        return start, min(stop, frame + 1)

    def allowed(self, query_index: Int[Tensor, "*q"], key_index: Int[Tensor, "*k"]) -> Bool[Tensor, "*broadcast"]:
        """Whether the query tokens may see the key tokens: positions in q and k, elementwise with broadcasting."""
        length = self.tokens_per_frame
        query = query_index - self.num_context_queries
        key = key_index - self.context_tokens
        query_is_context, key_is_context = query < 0, key < 0
        query_frame = query // length + self.query_frames[0]
        key_frame = key // length + self.key_frames[0]
        if self.kind == "bidirectional":
            visible = key_frame >= 0
        else:
            visible = key_frame <= query_frame
            if self.window is not None:
                visible = visible & (key_frame > query_frame - self.window)
        visible = visible & ~query_is_context
        if self.kind == "released":
            visible = visible | query_is_context
        return key_is_context | visible

    def dense_mask(self, device: torch.device | str = "cpu") -> Bool[Tensor, "n m"]:
        """The whole mask, True where attention is allowed; for the reference, for tests and for drawings."""
        query = torch.arange(self.num_queries, device=device)
        key = torch.arange(self.num_keys, device=device)
        return self.allowed(query[:, None], key[None, :])

    def num_pairs(self) -> int:
        """Allowed (query token, key token) pairs in closed form: what FLOP accounting counts, masked pairs never."""
        first, last = self.query_frames
        start, stop = self.key_frames
        if self.kind == "bidirectional":
            frame_pairs = self.num_query_frames * self.num_key_frames
        else:
            frame_pairs = _sum_of_clipped(first + 1, last + 1, start, stop)
            if self.window is None:
                frame_pairs -= self.num_query_frames * start
            else:
                frame_pairs -= _sum_of_clipped(first - self.window + 1, last - self.window + 1, start, stop)
        video_pairs = frame_pairs * self.tokens_per_frame**2
        context_pairs = self.num_queries * self.context_tokens
        leak = self.num_context_queries * self.num_key_frames * self.tokens_per_frame if self.kind == "released" else 0
        return video_pairs + context_pairs + leak


def _sum_of_clipped(first: int, last: int, low: int, high: int) -> int:
    """``sum(min(max(i, low), high) for i in range(first, last))`` without the loop, for ``low <= high``."""
    below = max(0, min(last, low) - first)
    above = max(0, last - max(first, high))
    inner_first, inner_last = max(first, low), min(last, high)
    inner = (inner_first + inner_last - 1) * (inner_last - inner_first) // 2 if inner_last > inner_first else 0
    return below * low + inner + above * high
