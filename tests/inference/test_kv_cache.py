"""The cache: bounded memory, one contiguous slice, and the right frames in it after evictions and moves."""

from __future__ import annotations

import pytest
import torch
from sampler_cases import random_denoiser

from ardist.config import DenoiserConfig
from ardist.diffusion.noise import NoiseSchedule
from ardist.errors import InvalidValueError
from ardist.inference import rows
from ardist.inference.kv_cache import KVCache
from ardist.inference.sampler import ADSampler

CONFIG = DenoiserConfig(width=16, depth=2, num_heads=2, tokens_per_frame=2, context_tokens=5, context_dim=3)


def make_cache(num_frames: int, max_row_frames: int, window: int | None) -> KVCache:
    return KVCache(CONFIG, 1, num_frames, max_row_frames, window, torch.device("cpu"), torch.float32)


def marked(first: int, count: int) -> torch.Tensor:
    """Keys of `count` tokens that carry the numbers first, first + 1, …"""
    return (first + torch.arange(count)).float()[None, None, :, None].expand(1, 2, count, 8)


def test_a_row_sees_the_context_and_the_window_in_order_through_every_eviction() -> None:
    window, frames = 3, 40
    cache = make_cache(frames, 2, window)
    for layer in cache.context_layers:
        layer.extend(marked(-5, 5), marked(-5, 5))
    for start in range(frames - 1):
        layout = cache.begin_row(start, start + 2, num_final=1)
        oldest = max(0, start - window + 1)
        assert layout.key_frames == (0, start + 2 - oldest)
        assert layout.query_frames == (start - oldest, start + 2 - oldest)
        for layer in cache.layers:
            # The second frame of the row is not final: its keys differ from those it will have in the next row.
            keys = torch.cat([marked(2 * start, 2), marked(-100, 2)], dim=2)
            seen_keys, seen_values = layer.extend(keys, keys + 0.5)
            expected = [*range(-5, 0), *range(2 * oldest, 2 * start + 2), -100, -99]
            assert seen_keys[0, 0, :, 0].tolist() == expected
            assert seen_values[0, 1, 5:, 3].tolist() == [number + 0.5 for number in expected[5:]]
            assert seen_keys.shape[2] == layout.num_keys


def test_memory_is_bounded_by_the_window() -> None:
    sizes = [make_cache(frames, 4, window=8).num_bytes for frames in (100, 1000)]
    assert sizes[0] == sizes[1]
    assert sizes[0] < make_cache(100, 4, window=None).num_bytes / 4


def test_masks_that_are_not_causal_have_no_cache() -> None:
    config = CONFIG.model_copy(update={"mask": "released"})
    with pytest.raises(InvalidValueError, match="legal: 'strict'"):
        KVCache(config, 1, 4, 2, None, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(("prefix_frames", "difference"), [(0, 1), (0, 5), (9, 2)])
def test_sampler_memory_does_not_grow_with_the_video(
    monkeypatch: pytest.MonkeyPatch, prefix_frames: int, difference: int
) -> None:
    made: list[KVCache] = []

    class Recorded(KVCache):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            made.append(self)

    monkeypatch.setattr(rows, "KVCache", Recorded)
    sampler = ADSampler(random_denoiser(), NoiseSchedule.create(), window=3)
    for frames in (20, 40):
        prefix = torch.randn(1, prefix_frames, 3, 4) if prefix_frames else None
        sampler.sample(frames, num_inference_steps=5, difference=difference, prefix=prefix)
    assert made[0].num_bytes == made[1].num_bytes
