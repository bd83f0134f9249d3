"""The temporal decoder: exactly causal, the identity at the start, the same pixels piece by piece, bounded memory."""

from __future__ import annotations

import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ardist.errors import InvalidValueError
from ardist.models.ar_vae import ARVAE, preset, temporal
from ardist.models.ar_vae.temporal import DecoderCache, frame_mask, rope_table, rotate

FRAMES = 6


def temporal_model(*, trained: bool = True, **changes: object) -> ARVAE:
    """A small temporal model; `trained` gives its temporal blocks weights that matter."""
    torch.manual_seed(0)
    shape = {"width": 32, "depth": 2, "num_heads": 2, "tokens_per_frame": 6, "image_size": 32, "temporal": True}
    model = ARVAE(preset("tiny", **{**shape, **changes})).eval()
    if trained:
        for parameter in model.temporal_parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


def some_latents(frames: int = FRAMES, batch: int = 2) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(batch, frames, 6, 4), dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["rope", "none"])
@pytest.mark.parametrize("changed", [1, 3, 5])
def test_causal_to_the_last_bit(changed: int, positions: str) -> None:
    model = temporal_model(temporal_positions=positions)
    latents = some_latents()
    other = latents.clone()
    other[:, changed] = some_latents(1)[:, 0]
    before, after = model.decode(latents), model.decode(other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    difference = (before - after).abs().amax(dim=(0, 2, 3, 4))
    assert (difference[changed:] > 1e-4).all(), "an earlier latent must reach every later frame"


def test_training_pass_is_causal_too() -> None:
    model = temporal_model()
    latents = some_latents().requires_grad_()
    pixels, _ = model._pixels(latents, (32, 32), model.new_cache())
    (gradient,) = torch.autograd.grad(pixels[:, 2].sum(), latents)
    per_frame = gradient.abs().amax(dim=(0, 2, 3))
    assert (per_frame[:3] > 0).all()
    assert (per_frame[3:] == 0).all()


@torch.no_grad()
def test_both_attentions_carry_earlier_frames() -> None:
    for silenced in ("fine", "coarse"):
        model = temporal_model()
        for block in model.decoder.temporal:
            for parameter in getattr(block, silenced).out.parameters():
                parameter.zero_()
        latents = some_latents()
        other = latents.clone()
        other[:, 0] = some_latents(1)[:, 0]
        assert (model.decode(latents) - model.decode(other))[:, 1:].abs().max() > 1e-4


@torch.no_grad()
def test_starts_as_the_per_frame_model() -> None:
    torch.manual_seed(1)
    single = ARVAE(preset("tiny", width=32, depth=2, num_heads=2, tokens_per_frame=6, image_size=32)).eval()
    grown = single.with_temporal_blocks().eval()
    assert grown.config.temporal
    latents = some_latents()
    assert torch.equal(single.decode(latents), grown.decode(latents))
    names = {name for name, _ in grown.named_parameters()} - {name for name, _ in single.named_parameters()}
    assert names == {name for name, _ in grown.named_parameters() if ".temporal." in name}
    assert len(list(grown.temporal_parameters())) == len(names)
    with pytest.raises(InvalidValueError, match="already"):
        grown.with_temporal_blocks()


def test_the_first_step_already_moves_the_temporal_outputs() -> None:
    model = temporal_model(trained=False).train()
    model(torch.rand(1, 3, 3, 32, 32))[0].square().sum().backward()
    for block in model.decoder.temporal:
        assert block.fine.out.weight.grad.abs().max() > 0
        assert block.coarse.out.weight.grad.abs().max() > 0


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("positions", ["rope", "none"])
def test_streaming_gives_the_pixels_of_the_whole_clip(window: int | None, positions: str) -> None:
    model = temporal_model(temporal_window=window, temporal_positions=positions)
    latents = some_latents(9)
    whole = model.decode(latents, chunk=9)
    by_frame = torch.cat(list(model.decode_stream(latents)), dim=1)
    by_piece = torch.cat(list(model.decode_stream(latents.split([2, 4, 1, 2], dim=1))), dim=1)
    cache = model.new_cache()
    by_hand = torch.cat([model.decode(part, cache=cache) for part in latents.split(5, dim=1)], dim=1)
    for other in (by_frame, by_piece, by_hand, model.decode(latents, chunk=4)):
        torch.testing.assert_close(other, whole, atol=1e-5, rtol=0)
    assert cache.frames_seen == 9


@torch.no_grad()
def test_window_limits_what_a_frame_sees() -> None:
    """With depth 2 and window 2, frame 0 reaches frame 1 in one layer and frame 2 in two, and no further."""
    model = temporal_model(temporal_window=2)
    latents = some_latents()
    other = latents.clone()
    other[:, 0] = some_latents(1)[:, 0]
    difference = (model.decode(latents) - model.decode(other)).abs().amax(dim=(0, 2, 3, 4))
    assert (difference[:3] > 0).all()
    assert (difference[3:] == 0).all()


@torch.no_grad()
def test_memory_of_a_stream_is_constant_with_a_window() -> None:
    model = temporal_model(temporal_window=4)
    cache = model.new_cache()
    sizes = []
    for _ in range(12):
        model.decode(some_latents(1), cache=cache)
        sizes.append(cache.num_bytes())
    assert sizes[0] < sizes[1] < sizes[2] == sizes[3] == sizes[-1]
    held = [part.keys for layer in cache.layers for part in layer]
    # Copies, not views that keep older frames alive.
    assert all(keys.untyped_storage().nbytes() == keys.numel() * keys.element_size() for keys in held)


@torch.no_grad()
def test_a_long_stream_needs_no_more_memory_than_a_short_one() -> None:
    """512 frames one by one: what is kept stays at three frames, and the process does not grow."""
    model = temporal_model(temporal_window=4)
    piece, cache, process = some_latents(1, batch=1), model.new_cache(), psutil.Process()
    kept, resident = [], []
    for _ in range(512):
        (frame,) = model.decode_stream([piece], cache=cache)
        assert frame.shape == (1, 1, 3, 32, 32)
        kept.append(cache.num_bytes())
        resident.append(process.memory_info().rss)
    assert len(set(kept[2:])) == 1
    assert cache.frames_seen == 512
    # Without a window the same stream would keep 128 times as much.
    unbounded = temporal_model(temporal_window=None)
    endless = unbounded.new_cache()
    unbounded.decode(some_latents(16, batch=1), cache=endless)
    assert endless.num_bytes() == kept[-1] * 16 // 3
    assert max(resident[100:]) - resident[100] < 8 * 2**20


@torch.no_grad()
def test_only_distances_between_frames_matter() -> None:
    """A stream that is far along decodes as one that just began, when a window hides how it began."""
    model = temporal_model(temporal_window=3)
    latents = some_latents(12)
    early = model.decode(latents[:, :5], chunk=1)
    cache = model.new_cache()
    model.decode(latents[:, 5:], cache=cache)
    late = model.decode(latents[:, :5], cache=cache, chunk=1)
    # Two layers of window 3 reach four frames back, so the fifth frame knows nothing of what came before.
    torch.testing.assert_close(early[:, 4:], late[:, 4:], atol=1e-5, rtol=0)
    assert (early[:, 0] - late[:, 0]).abs().max() > 1e-4


def test_rotation_depends_on_the_distance_far_into_a_stream() -> None:
    q, k = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 1, 64)

    def score(start: int) -> float:
        return float(
            (rotate(q, rope_table(start + 3, 1, 64, q.device)) * rotate(k, rope_table(start, 1, 64, q.device))).sum()
        )

    assert score(10_000_000) == pytest.approx(score(0), abs=1e-4)
    assert score(0) != pytest.approx(float((q * k).sum()), abs=1e-2)


def test_frame_mask_by_hand() -> None:
    mask = frame_mask(3, 2, 3, torch.device("cpu")).int().tolist()
    assert mask == [[1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]


@torch.no_grad()
def test_a_cache_belongs_to_one_stream() -> None:
    model = temporal_model()
    cache = model.new_cache()
    model.decode(some_latents(2), cache=cache)
    with pytest.raises(InvalidValueError, match="start a new stream"):
        model.decode(some_latents(2, batch=1), cache=cache)
    with pytest.raises(InvalidValueError, match="start a new stream"):
        model.decode(some_latents(2), cache=cache, size=(16, 16))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("held", "new"), [(0, 2), (0, 7), (2, 9), (2, 16)])
def test_coarse_attention_in_groups_is_that_under_one_mask(
    monkeypatch: pytest.MonkeyPatch, held: int, new: int, window: int | None
) -> None:
    """The same numbers, from little more than half of the pairs when there are many frames."""
    queries, keys = 5, 2
    context = temporal.make_context(DecoderCache(window, held), new, (queries, keys), None, torch.device("cpu"))
    q = torch.randn(2, 2, new * queries, 8)
    kept = temporal.KeyValues(torch.randn(2, 2, (held + new) * keys, 8), torch.randn(2, 2, (held + new) * keys, 8))
    whole = F.scaled_dot_product_attention(q, kept.keys, kept.values, context.coarse_mask)
    pairs: list[int] = []

    def counted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        pairs.append(q.shape[2] * k.shape[2])
        return whole_attention(q, k, v, mask)

    whole_attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    torch.testing.assert_close(temporal._attend_in_groups(q, kept, context), whole)
    if new == 16:
        assert sum(pairs) < 0.7 * q.shape[2] * kept.keys.shape[2]
    assert len(pairs) <= temporal.COARSE_GROUPS
