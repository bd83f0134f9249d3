"""The temporally auto-regressive half of the decoder: frames look at themselves and at earlier frames only.

Two attentions stand before each transformer layer (METHOD section 5): "fine", one grid position over frames, and
"coarse", the tokens of a frame to the latent tokens of its own and earlier frames. Both outputs start at zero, so a
model that just got these blocks decodes exactly as the per-frame one. Only the output projection is zeroed: with a
zero value projection or norm as well, no gradient would ever reach the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ardist.models.ar_vae.transformer import init_weights

ROPE_THETA = 10_000.0

COARSE_GROUPS = 4
"""Into how many groups the frames of a pass are cut for the coarse attention. Each computes what its last frame may
see: 4 compute 5/8 of all pairs, one group per frame little more than a half, in four times as many calls."""

Rotation = tuple[Float[Tensor, "f r"], Float[Tensor, "f r"]]


@dataclass(frozen=True)
class KeyValues:
    """Keys and values of earlier frames; the dimension before the last runs over frames (and their tokens)."""

    keys: Float[Tensor, "n heads t c"]
    values: Float[Tensor, "n heads t c"]

    def extended(self, keys: Float[Tensor, "n heads t2 c"], values: Float[Tensor, "n heads t2 c"]) -> KeyValues:
        """These followed by those of later frames."""
        return KeyValues(torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2))

    def last(self, length: int) -> KeyValues:
        """The last `length` entries, as copies that do not hold on to the rest."""
        if length >= self.keys.shape[2]:
            return self
        start = self.keys.shape[2] - length
        return KeyValues(self.keys[:, :, start:].clone(), self.values[:, :, start:].clone())


@dataclass
class DecoderCache:
    """What a decoder keeps of the frames it has decoded, to go on with the next ones.

    With a `window` of W frames at most W - 1 are kept, so memory is constant however long the video is.
    One cache belongs to one video (or one batch of videos that are decoded together).
    """

    window: int | None
    frames_seen: int = 0
    layers: list[tuple[KeyValues, KeyValues]] = field(default_factory=list)
    shape: tuple[int, int, int] | None = None
    """Batch size and patch grid of the stream, fixed by its first frames."""

    @property
    def frames_held(self) -> int:
        """Frames whose keys and values are kept."""
        return self.frames_seen if self.window is None else min(self.frames_seen, self.window - 1)

    def num_bytes(self) -> int:
        """Bytes of all kept keys and values."""
        tensors = (tensor for layer in self.layers for kept in layer for tensor in (kept.keys, kept.values))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True)
class FrameContext:
    """How the frames at hand relate to each other and to the kept ones; made once per pass, used by every layer."""

    num_frames: int
    fine_mask: Bool[Tensor, "f t"] | None
    coarse_mask: Bool[Tensor, "q k"] | None
    coarse_keys: int
    """Latent tokens of a frame."""
    rotation: Rotation | None


def frame_mask(num_frames: int, held: int, window: int | None, device: torch.device) -> Bool[Tensor, "f t"]:
    """True where a new frame (row) may look at a kept or new frame (column): itself and the `window` - 1 before."""
    columns = torch.arange(held + num_frames, device=device)
    rows = torch.arange(held, held + num_frames, device=device)[:, None]
    seen = columns <= rows
    return seen if window is None else seen & (columns > rows - window)


def rope_table(start: int, num_frames: int, head_dim: int, device: torch.device) -> Rotation:
    """Cosine and sine of the rotary angles of frames `start`, `start` + 1, ..."""
    # float64: in float32 the angle of frame one million would be off by several degrees.
    frames = torch.arange(start, start + num_frames, device=device, dtype=torch.float64)
    rates = ROPE_THETA ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / head_dim)
    angles = frames[:, None] * rates
    return angles.cos().float(), angles.sin().float()


def rotate(x: Float[Tensor, "*n f t c"], rotation: Rotation | None) -> Float[Tensor, "*n f t c"]:
    """Rotate the channel pairs (i, i + c/2) of the t tokens of each frame by the frame's angles."""
    if rotation is None:
        return x
    cos, sin = (part[:, None, :].to(x.dtype) for part in rotation)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def make_context(
    cache: DecoderCache,
    num_frames: int,
    tokens: tuple[int, int],
    head_dim: int | None,
    device: torch.device,
) -> FrameContext:
    """The context of `num_frames` frames after those in `cache`.

    `tokens`: query and key tokens per frame of the coarse attention; `head_dim`: None without rotary positions.
    """
    rotation = None if head_dim is None else rope_table(cache.frames_seen, num_frames, head_dim, device)
    if num_frames == 1:  # a single new frame sees all that is kept
        return FrameContext(num_frames, None, None, tokens[1], rotation)
    mask = frame_mask(num_frames, cache.frames_held, cache.window, device)
    coarse = mask.repeat_interleave(tokens[0], dim=0).repeat_interleave(tokens[1], dim=1)
    return FrameContext(num_frames, mask, coarse, tokens[1], rotation)


class FineAttention(nn.Module):
    """Causal self-attention of the tokens of one grid position over frames."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "bf p d"], context: FrameContext, past: KeyValues | None
    ) -> tuple[Float[Tensor, "bf p d"], KeyValues]:
        """What to add to the patch tokens `x`, and the keys and values with those of the new frames."""
        frames, patches = context.num_frames, x.shape[1]
        q, k, v = rearrange(
            self.qkv(self.norm(x)),
            "(b f) p (three h c) -> three (b p) h f 1 c",
            f=frames,
            three=3,
            h=self.num_heads,
        )
        q, k, v = rotate(q, context.rotation).squeeze(3), rotate(k, context.rotation).squeeze(3), v.squeeze(3)
        kept = KeyValues(k, v) if past is None else past.extended(k, v)
        y = F.scaled_dot_product_attention(q, kept.keys, kept.values, attn_mask=context.fine_mask)
        return self.out(rearrange(y, "(b p) h f c -> (b f) p (h c)", p=patches)), kept


class CoarseAttention(nn.Module):
    """Attention of the patch and latent tokens of a frame to the latent tokens of its own and earlier frames."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_norm = nn.LayerNorm(width)
        self.key_norm = nn.LayerNorm(width)
        self.value_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x: Float[Tensor, "bf t d"],
        latents: Float[Tensor, "bf l d"],
        context: FrameContext,
        past: KeyValues | None,
    ) -> tuple[Float[Tensor, "bf t d"], KeyValues]:
        """What to add to the tokens `x`, and the keys and values with those of the new frames."""
        split = {"f": context.num_frames, "h": self.num_heads}
        q = rearrange(self.query(self.query_norm(x)), "(b f) t (h c) -> b h f t c", **split)
        k = rearrange(self.key(self.key_norm(latents)), "(b f) l (h c) -> b h f l c", **split)
        v = rearrange(self.value(self.value_norm(latents)), "(b f) l (h c) -> b h (f l) c", **split)
        q, k = (rotate(part, context.rotation).flatten(2, 3) for part in (q, k))
        kept = KeyValues(k, v) if past is None else past.extended(k, v)
        y = _attend_in_groups(q, kept, context)
        return self.out(rearrange(y, "b h (f t) c -> (b f) t (h c)", f=context.num_frames)), kept


def _attend_in_groups(
    q: Float[Tensor, "b heads ft c"], kept: KeyValues, context: FrameContext
) -> Float[Tensor, "b heads ft c"]:
    """Coarse attention of a few frames at a time to what there is up to them: most of what a mask would hide of later
    frames is not computed at all."""
    if context.coarse_mask is None:
        return F.scaled_dot_product_attention(q, kept.keys, kept.values)
    rows, columns = context.coarse_mask.shape
    queries, keys = rows // context.num_frames, context.coarse_keys
    held = columns // keys - context.num_frames
    group = -(-context.num_frames // COARSE_GROUPS)
    pieces = []
    for first in range(0, context.num_frames, group):
        last = min(first + group, context.num_frames)
        mine, seen = slice(first * queries, last * queries), slice((held + last) * keys)
        mask = context.coarse_mask[mine, seen]
        pieces.append(
            F.scaled_dot_product_attention(q[:, :, mine], kept.keys[:, :, seen], kept.values[:, :, seen], mask)
        )
    return torch.cat(pieces, dim=2)


class TemporalBlock(nn.Module):
    """Fine, then coarse temporal attention; the CLS token takes part in neither."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.fine = FineAttention(width, num_heads)
        self.coarse = CoarseAttention(width, num_heads)
        self.apply(init_weights)
        for projection in (self.fine.out, self.coarse.out):
            nn.init.zeros_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        x: Float[Tensor, "bf t d"],
        num_latents: int,
        context: FrameContext,
        past: tuple[KeyValues, KeyValues] | None,
    ) -> tuple[Float[Tensor, "bf t d"], tuple[KeyValues, KeyValues]]:
        """Tokens [CLS, patches, latents] of each frame, and the keys and values of both attentions."""
        cls, patches, latents = x.split([1, x.shape[1] - 1 - num_latents, num_latents], dim=1)
        past_fine, past_coarse = past if past is not None else (None, None)
        change, fine = self.fine(patches, context, past_fine)
        seen = torch.cat([patches + change, latents], dim=1)
        change, coarse = self.coarse(seen, latents, context, past_coarse)
        return torch.cat([cls, seen + change], dim=1), (fine, coarse)
