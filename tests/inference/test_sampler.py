"""The cached sampler against a plain uncached one, and what it promises: streaming, prefixes, seeds."""

from __future__ import annotations

from itertools import pairwise
from random import Random
from typing import Any

import pytest
import torch
from sampler_cases import plain_sample, random_denoiser
from torch import Tensor

from ardist.diffusion.counter_rng import Purpose, normal
from ardist.diffusion.noise import NoiseSchedule
from ardist.errors import InvalidValueError
from ardist.inference.kv_cache import KVCache
from ardist.inference.sampler import ADSampler, Progress
from ardist.models.attention import AttentionLayout, sdpa
from ardist.models.denoiser import Denoiser

NOISE = NoiseSchedule.create()
CONTEXT: dict[str, Any] = {"context_tokens": 5, "context_dim": 6}


def conditions(denoiser: Denoiser, batch: int) -> dict[str, Tensor]:
    config, generator = denoiser.config, torch.Generator().manual_seed(3)
    made = {}
    if config.context_tokens:
        made["context"] = torch.randn(batch, config.context_tokens, config.context_dim, generator=generator)
    if config.num_classes is not None:
        made["class_ids"] = torch.arange(batch) % config.num_classes
    return made


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_classes": 3, **CONTEXT},
        {"residual": "released", "positions": "sincos", "max_frames": 11, "qk_norm": False, **CONTEXT},
        {"positions": "rope_1d", **CONTEXT},
    ],
    ids=["rope", "conditioned", "released-layout", "rope-1d"],
)
@pytest.mark.parametrize("difference", [0, 1, 2, 5])
@pytest.mark.parametrize(("frames", "window"), [(1, None), (4, None), (4, 9), (6, 4), (11, 3), (5, 1)])
def test_cached_equals_uncached(changes: dict[str, Any], difference: int, frames: int, window: int | None) -> None:
    denoiser = random_denoiser(**changes)
    arguments = conditions(denoiser, 2)
    expected = plain_sample(denoiser, frames, 5, difference, batch=2, window=window, **arguments)
    sampler = ADSampler(denoiser, NOISE, window=window)
    actual = sampler.sample(frames, num_inference_steps=5, difference=difference, batch_size=2, **arguments)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("difference", [0, 2])
def test_cached_equals_uncached_where_attention_runs_in_chunks(
    difference: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames of so many tokens that one call of the attention kernel does not hold all frames of a row."""
    layouts: list[AttentionLayout] = []
    begin_row = KVCache.begin_row

    def recorded(cache: KVCache, start: int, stop: int, num_final: int) -> AttentionLayout:
        layouts.append(begin_row(cache, start, stop, num_final))
        return layouts[-1]

    monkeypatch.setattr(KVCache, "begin_row", recorded)
    slow, fast = (random_denoiser(tokens_per_frame=32, attention_backend=name) for name in ("reference", "sdpa"))
    expected = plain_sample(slow, 20, 5, difference, window=5)
    actual = ADSampler(fast, NOISE, window=5).sample(20, num_inference_steps=5, difference=difference)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    chunked = [layout for layout in layouts if len(sdpa.plan(sdpa.CHUNK_TOKENS_INFERENCE, layout)) > 1]
    assert chunked, "every row fitted in one call"
    assert difference == 0 or any(layout.query_frames[0] > 0 for layout in chunked), "no such row read the cache"


@pytest.mark.parametrize("difference", [0, 3, 5])
@pytest.mark.parametrize(
    ("changes", "batch"), [(CONTEXT, 1), ({"num_classes": 3}, 1), ({"num_classes": 3, **CONTEXT}, 3)]
)
def test_cached_equals_uncached_with_guidance(changes: dict[str, Any], difference: int, batch: int) -> None:
    denoiser = random_denoiser(**changes)
    arguments: dict[str, Any] = {"guidance_scale": 2.5, "window": 3, **conditions(denoiser, batch)}
    expected = plain_sample(denoiser, 6, 5, difference, batch=batch, **arguments)
    window = arguments.pop("window")
    sampler = ADSampler(denoiser, NOISE, window=window)
    actual = sampler.sample(6, num_inference_steps=5, difference=difference, **arguments)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("draw", range(10))
def test_cached_equals_uncached_at_random_settings(draw: int) -> None:
    random = Random(draw)
    steps = random.choice([2, 4, 5, 8])
    frames, batch = random.randint(2, 9), random.randint(1, 3)
    given = random.randint(0, frames - 1)
    generator = torch.Generator().manual_seed(draw)
    arguments: dict[str, Any] = {"seed": draw, "guidance_scale": random.choice([1.0, 0.0, 3.0])}
    if given:
        arguments["prefix"] = torch.randn(batch, given, 3, 4, generator=generator)
    denoiser = random_denoiser(seed=draw, num_classes=2, window=random.choice([None, 4]), **CONTEXT)
    arguments |= conditions(denoiser, batch)
    difference, window = random.randint(0, steps), random.randint(1, 4)
    expected = plain_sample(denoiser, frames, steps, difference, batch=batch, window=window, **arguments)
    sampler = ADSampler(denoiser, NOISE, window=window)
    actual = sampler.sample(frames, num_inference_steps=steps, difference=difference, **arguments)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_synchronous_is_a_plain_ddim_loop() -> None:
    denoiser = random_denoiser(std=0.1)
    actual = ADSampler(denoiser, NOISE).sample(4, num_inference_steps=10, difference=0)
    x = normal(0, 0, torch.tensor([0]), Purpose.SAMPLER_NOISE, (4, 3, 4))
    levels = [*range(901, 0, -100), 0]
    with torch.no_grad():
        for t, t_next in pairwise(levels):
            x0 = denoiser(x, torch.full((1, 4), t))
            a, a_next = NOISE.alphas_cumprod[t], NOISE.alphas_cumprod[t_next]
            eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
            x = a_next.sqrt() * x0 + (1 - a_next).sqrt() * eps
    torch.testing.assert_close(actual, x, rtol=0, atol=1e-6)


def test_largest_difference_is_frame_by_frame_generation() -> None:
    denoiser = random_denoiser(std=0.1)
    actual = ADSampler(denoiser, NOISE).sample(4, num_inference_steps=10, difference=10)
    noise = normal(0, 0, torch.tensor([0]), Purpose.SAMPLER_NOISE, (4, 3, 4))
    video = noise[:, :0]
    levels = [*range(901, 0, -100), 0]
    with torch.no_grad():
        for frame in range(4):
            x = noise[:, frame : frame + 1]
            for t, t_next in pairwise(levels):
                timesteps = torch.tensor([[1] * frame + [t]])
                x0 = denoiser(torch.cat([video, x], dim=1), timesteps)[:, -1:]
                a, a_next = NOISE.alphas_cumprod[t], NOISE.alphas_cumprod[t_next]
                eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
                x = a_next.sqrt() * x0 + (1 - a_next).sqrt() * eps
            video = torch.cat([video, x], dim=1)
    torch.testing.assert_close(actual, video, rtol=0, atol=1e-6)


@pytest.mark.parametrize("difference", [0, 2, 5])
@pytest.mark.parametrize(("given", "window"), [(1, None), (3, None), (2, 4), (7, 3), (8, 2)])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_continuation_equals_uncached(difference: int, given: int, window: int | None, guidance_scale: float) -> None:
    denoiser = random_denoiser(**CONTEXT)
    prefix = torch.randn(2, given, 3, 4, generator=torch.Generator().manual_seed(5))
    arguments: dict[str, Any] = {"prefix": prefix, "guidance_scale": guidance_scale, **conditions(denoiser, 2)}
    expected = plain_sample(denoiser, given + 4, 5, difference, batch=2, window=window, **arguments)
    sampler = ADSampler(denoiser, NOISE, window=window)
    actual = sampler.sample(given + 4, num_inference_steps=5, difference=difference, **arguments)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    streamed = sampler.stream(given + 4, num_inference_steps=5, difference=difference, **arguments)
    assert [frame.index for frame in streamed] == list(range(given, given + 4))


@pytest.mark.parametrize("window_kind", ["rolling", "recompute"])
def test_continuing_after_the_first_frames_gives_the_same_video(window_kind: str) -> None:
    """Frame by frame, generating on from the first three frames is what generating all of them does."""
    sampler = ADSampler(random_denoiser(), NOISE, window_kind=window_kind)
    arguments: dict[str, Any] = {"num_inference_steps": 5, "difference": 5, "seed": 9}
    whole = sampler.sample(6, **arguments)
    continued = sampler.sample(6, prefix=whole[:, :3], **arguments)
    torch.testing.assert_close(continued, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("difference", [2, 5])
@pytest.mark.parametrize("window_kind", ["rolling", "recompute"])
def test_full_window_kinds_agree(difference: int, window_kind: str) -> None:
    denoiser = random_denoiser(num_classes=3)
    expected = plain_sample(denoiser, 4, 5, difference, class_ids=torch.tensor([1]))
    sampler = ADSampler(denoiser, NOISE, window=4, window_kind=window_kind)
    actual = sampler.sample(4, num_inference_steps=5, difference=difference, class_ids=torch.tensor([1]))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mask", ["released", "bidirectional"])
def test_masks_without_exact_cache_are_recomputed(mask: str) -> None:
    denoiser = random_denoiser(mask=mask, **CONTEXT)
    arguments = conditions(denoiser, 2)
    expected = plain_sample(denoiser, 4, 5, 2, batch=2, **arguments)
    sampler = ADSampler(denoiser, NOISE)
    assert sampler.window_kind == "recompute"
    torch.testing.assert_close(
        sampler.sample(4, num_inference_steps=5, difference=2, **arguments), expected, rtol=0, atol=1e-5
    )
    with pytest.raises(InvalidValueError, match="legal: 'recompute'"):
        ADSampler(denoiser, NOISE, window_kind="rolling")


def test_a_video_does_not_depend_on_the_rest_of_its_batch() -> None:
    sampler = ADSampler(random_denoiser(num_classes=5), NOISE)
    ids, classes = torch.tensor([7, 3, 11]), torch.tensor([0, 4, 2])

    def sample(chosen: list[int]) -> Tensor:
        return sampler.sample(
            5,
            num_inference_steps=5,
            difference=2,
            seed=21,
            guidance_scale=2,
            video_ids=ids[chosen],
            class_ids=classes[chosen],
        )

    together = sample([0, 1, 2])
    torch.testing.assert_close(sample([1]), together[1:2], rtol=0, atol=1e-5)
    torch.testing.assert_close(sample([2, 0]), together[[2, 0]], rtol=0, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_seed_generator_and_length_decide_the_noise() -> None:
    sampler = ADSampler(random_denoiser(), NOISE)
    arguments: dict[str, Any] = {"num_inference_steps": 5, "difference": 5}
    assert torch.equal(sampler.sample(3, seed=1, **arguments), sampler.sample(3, seed=1, **arguments))
    assert (sampler.sample(3, seed=1, **arguments) - sampler.sample(3, seed=2, **arguments)).abs().max() > 0.1
    drawn = [sampler.sample(3, generator=torch.Generator().manual_seed(4), **arguments) for _ in range(2)]
    assert torch.equal(drawn[0], drawn[1])
    longer = sampler.sample(6, seed=1, **arguments)[:, :3]
    torch.testing.assert_close(longer, sampler.sample(3, seed=1, **arguments), rtol=0, atol=1e-5)


@pytest.mark.parametrize("window_kind", ["rolling", "recompute"])
def test_frames_are_handed_out_as_soon_as_they_are_final(window_kind: str) -> None:
    sampler = ADSampler(random_denoiser(), NOISE, window_kind=window_kind)
    seen: list[Progress] = []
    rows_at_frame = []
    frames = []
    prefix = torch.randn(1, 2, 3, 4)
    for frame in sampler.stream(6, num_inference_steps=5, difference=2, prefix=prefix, progress=seen.append):
        rows_at_frame.append((frame.index, len(seen) + 1))
        frames.append(frame.latents)
    assert rows_at_frame == [(2, 5), (3, 7), (4, 9), (5, 11)]
    assert [p.frames_done for p in seen] == [2] * 4 + [3, 3, 4, 4, 5, 5, 6]
    assert (seen[-1].row, seen[-1].num_rows, seen[-1].num_frames) == (11, 11, 6)
    assert seen[-1].frames_per_second > 0
    whole = sampler.sample(6, num_inference_steps=5, difference=2, prefix=prefix)
    assert torch.equal(torch.stack(frames, dim=1), whole[:, 2:])


@pytest.mark.parametrize("window_kind", ["rolling", "recompute"])
def test_what_is_done_to_a_frame_handed_out_does_not_reach_the_next_ones(window_kind: str) -> None:
    """A consumer may scale a frame in place, before the row that shows it to the network as final."""
    sampler = ADSampler(random_denoiser(), NOISE, window_kind=window_kind)
    arguments: dict[str, Any] = {"num_inference_steps": 5, "difference": 2}
    expected = sampler.sample(5, **arguments)
    taken = []
    for frame in sampler.stream(5, **arguments):
        taken.append(frame.latents.clone())
        frame.latents.fill_(7)
    assert torch.equal(torch.stack(taken, dim=1), expected)


def count_calls(denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(batch, frames) of every network call from now on."""
    calls: list[tuple[int, int]] = []
    original = denoiser._project

    def project(tokens: Tensor, frames: int) -> Tensor:
        calls.append((tokens.shape[0], frames))
        return original(tokens, frames)

    monkeypatch.setattr(denoiser, "_project", project)
    return calls


def test_work_is_what_the_method_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rolling: every frame S times and, but for the last, once more. One call per row, guided or not."""
    denoiser = random_denoiser(num_classes=2)
    calls = count_calls(denoiser, monkeypatch)
    arguments: dict[str, Any] = {"num_inference_steps": 5, "class_ids": torch.tensor([0, 1])}
    ADSampler(denoiser, NOISE).sample(6, difference=2, **arguments)
    assert len(calls) == 5 + 5 * 2
    assert sum(frames for _, frames in calls) == 6 * 5 + 5
    assert {batch for batch, _ in calls} == {2}
    calls.clear()
    ADSampler(denoiser, NOISE).sample(6, difference=2, guidance_scale=3, **arguments)
    assert len(calls) == 5 + 5 * 2
    assert {batch for batch, _ in calls} == {4}
    calls.clear()
    ADSampler(denoiser, NOISE, window_kind="recompute").sample(6, difference=2, **arguments)
    assert sum(frames for _, frames in calls) == 6 * (5 + 5 * 2)


@pytest.mark.parametrize("target", ["eps", "v"])
def test_other_prediction_targets(target: str) -> None:
    """A network whose prediction is the target of known x0 and noise leads back to x0 in one step."""
    denoiser = random_denoiser()
    x0 = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(1))
    eps = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(2))
    timesteps = torch.full((1, 2), 1)
    sampler = ADSampler(denoiser, NOISE, target=target)
    noisy = NOISE.add_noise(x0, eps, timesteps)

    prediction = NOISE.target(target, x0, eps, timesteps)
    denoiser._project = lambda tokens, frames: prediction  # type: ignore[method-assign]
    one_step = sampler.sample(2, num_inference_steps=1, difference=0, noise=noisy)
    a = NOISE.alphas_cumprod[0]
    torch.testing.assert_close(one_step, (a.sqrt() * x0 + (1 - a).sqrt() * eps).float(), rtol=0, atol=1e-5)


def test_half_precision_follows_the_exact_video() -> None:
    denoiser = random_denoiser()
    arguments: dict[str, Any] = {"num_inference_steps": 5, "difference": 2}
    exact = ADSampler(denoiser, NOISE).sample(4, **arguments)
    rounded = ADSampler(denoiser.to(torch.bfloat16), NOISE).sample(4, **arguments)
    assert rounded.dtype == torch.float32
    assert ((rounded - exact).norm() / exact.norm()).item() < 0.05


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("backend", ["reference", "sdpa", "flash"])
def test_future_frames_never_reach_finished_ones(backend: str, window: int | None) -> None:
    """Perturbing the noise of frame k changes nothing before it: exactly 0, through the cache as well."""
    sampler = ADSampler(random_denoiser(attention_backend=backend, **CONTEXT), NOISE, window=window)
    noise = torch.randn(1, 5, 3, 4, generator=torch.Generator().manual_seed(1))
    before = sampler.sample(5, num_inference_steps=5, difference=2, noise=noise)
    for frame in range(5):
        changed = noise.clone()
        changed[:, frame] += 1
        difference = sampler.sample(5, num_inference_steps=5, difference=2, noise=changed) - before
        assert not difference[:, :frame].any()
        assert difference[:, frame:].abs().amax(dim=(0, 2, 3)).min() > 0


def test_with_the_released_mask_future_frames_do_reach_finished_ones() -> None:
    """The counter-example: through the context tokens the last frame's noise reaches all frames before it."""
    sampler = ADSampler(random_denoiser(mask="released", **CONTEXT), NOISE)
    assert sampler.window_kind == "recompute"
    noise = torch.randn(1, 5, 3, 4, generator=torch.Generator().manual_seed(1))
    before = sampler.sample(5, num_inference_steps=5, difference=2, noise=noise)
    noise[:, 4] += 1
    difference = sampler.sample(5, num_inference_steps=5, difference=2, noise=noise) - before
    assert difference.abs().amax(dim=(0, 2, 3)).min() > 0


def test_trained_band_is_kept() -> None:
    denoiser = random_denoiser(window=2)
    expected = plain_sample(denoiser, 6, 5, 2)
    actual = ADSampler(denoiser, NOISE).sample(6, num_inference_steps=5, difference=2)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
