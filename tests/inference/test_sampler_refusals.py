"""What the sampler refuses before the first frame: one message with the legal values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from sampler_cases import random_denoiser
from torch import Tensor

from ardist.diffusion.ad import ADSchedule
from ardist.diffusion.noise import NoiseSchedule
from ardist.errors import InvalidValueError
from ardist.inference.rows import count_cached_programs
from ardist.inference.sampler import ADSampler
from ardist.models.attention import AttentionLayout, attention
from ardist.models.denoiser import block

NOISE = NoiseSchedule.create()
CONTEXT: dict[str, Any] = {"context_tokens": 5, "context_dim": 6}


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Past the type annotations, which these tests check at run time and the product does not."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("changes", "frames", "steps", "difference", "window", "given"),
    [
        ({}, 7, 5, 2, None, 0),
        ({}, 9, 5, 1, 3, 0),
        ({}, 6, 4, 4, 1, 0),
        ({}, 9, 2, 0, None, 3),
        (CONTEXT, 12, 5, 2, 3, 8),
    ],
)
def test_programs_of_a_run_are_counted(
    changes: dict[str, Any],
    frames: int,
    steps: int,
    difference: int,
    window: int | None,
    given: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A kernel that is compiled for each mask and each shape of its inputs is compiled as often as predicted."""
    programs: set[tuple[Any, ...]] = set()

    def recorded(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, backend: str) -> Tensor:
        programs.add((layout.relative(), q.shape, k.shape, k.stride(), v.stride()))
        return attention(q, k, v, layout, backend)

    monkeypatch.setattr(block, "attention", recorded)
    denoiser = random_denoiser(**changes)
    prefix = torch.randn(1, given, 3, 4) if given else None
    sampler = ADSampler(denoiser, NOISE, window=window)
    sampler.sample(frames, num_inference_steps=steps, difference=difference, prefix=prefix)
    schedule = ADSchedule(frames, steps, difference, window, num_prefix_frames=given)
    assert count_cached_programs(denoiser.config, schedule) == len(programs)


def test_more_masks_than_flex_compiles_are_refused_before_the_run() -> None:
    denoiser = random_denoiser(attention_backend="flex")
    with pytest.raises(InvalidValueError, match="have 127 different attention masks, .* at most 64; legal: .*sdpa"):
        ADSampler(denoiser, NOISE).stream(64)
    ADSampler(denoiser, NOISE).stream(32)  # 63 masks
    ADSampler(denoiser, NOISE, window=16).stream(1000)
    ADSampler(denoiser, NOISE, window=70, window_kind="recompute").stream(200)  # one
    ADSampler(random_denoiser(), NOISE).stream(64)


@pytest.mark.parametrize(
    ("frames", "arguments", "message"),
    [
        (0, {}, "num_frames=0"),
        (4, {"num_inference_steps": 7}, "num_steps=7 must divide.*legal: 1, 2, 4, 5"),
        (4, {"num_inference_steps": 5, "difference": 6}, r"difference=6.*legal: 0\.\.5"),
        (4, {"guidance_scale": 2}, "needs a condition"),
        (4, {"prefix": torch.zeros(1, 4, 3, 4)}, "num_prefix_frames=4"),
        (4, {"batch_size": 2, "prefix": torch.zeros(3, 1, 3, 4)}, "batch sizes differ"),
        (4, {"class_ids": torch.tensor([3, 4])}, "class_ids contains 4; legal: 0 to 2"),
        (4, {"class_ids": torch.tensor([-1])}, "class_ids contains -1"),
        (4, {"prefix": torch.zeros(1, 2, 5, 4)}, r"prefix of shape \(1, 2, 5, 4\).*legal: \(1, 2, 3, 4\)"),
        (4, {"noise": torch.zeros(1, 3, 3, 4)}, r"noise of shape.*legal: \(1, 4, 3, 4\)"),
        (4, {"context": torch.zeros(1, 2, 3)}, "context of shape.*legal: None"),
        (4, {"seed": -1}, r"seed=-1 is illegal; legal: 0 to 2\^63 - 1"),
        (4, {"seed": 2**63}, "seed=9223372036854775808"),
        (4, {"guidance_scale": float("nan")}, "guidance_scale=nan is illegal; legal: a finite"),
        (4, {"batch_size": 0}, "batch_size=0"),
    ],
)
def test_illegal_requests_name_what_is_legal(frames: int, arguments: dict[str, Any], message: str) -> None:
    sampler = ADSampler(random_denoiser(num_classes=3), NOISE)
    with pytest.raises(InvalidValueError, match=message):
        sampler.stream(frames, **arguments)  # refused before the first frame is asked for


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 4.0}, r"num_frames=4\.0 is illegal; legal: an integer"),
        ({"seed": 1.5}, r"seed=1\.5 is illegal; legal: an integer"),
        ({"batch_size": "2"}, "batch_size='2' is illegal; legal: an integer"),
        ({"difference": 2.0}, r"difference=2\.0 is illegal; legal: an integer"),
        ({"num_inference_steps": None}, "num_steps=None is illegal; legal: an integer"),
        ({"video_ids": torch.zeros(1, 1, dtype=torch.int64)}, r"video_ids of shape \(1, 1\)"),
        ({"video_ids": torch.zeros(1)}, "video_ids of .*float32 are illegal; legal: one int64"),
        ({"class_ids": torch.zeros(1)}, "class_ids of .*float32 are illegal; legal: .*integers"),
        ({"prefix": torch.zeros(1, 3, 4)}, r"prefix of shape \(1, 3, 4\)"),
        ({"class_ids": torch.tensor(1)}, r"class_ids of shape \(\).*legal: shape \(1,\), integers"),
        ({"noise": torch.zeros(1, 4, 3, 4, dtype=torch.int64)}, "noise of .*int64 is illegal; legal: .*floating"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_types_are_refused_before_the_first_frame(arguments: dict[str, Any], message: str) -> None:
    sampler = ADSampler(random_denoiser(num_classes=3), NOISE)
    with pytest.raises(InvalidValueError, match=message):
        sampler.stream(**{"num_frames": 4, **arguments})


def test_a_longer_noise_schedule_than_the_denoiser_knows_is_refused() -> None:
    with pytest.raises(InvalidValueError, match="2000 timesteps is illegal; legal: at most 1000"):
        ADSampler(random_denoiser(), NoiseSchedule.create(num_timesteps=2000))


def test_illegal_windows_name_what_is_legal() -> None:
    sampler = ADSampler(random_denoiser(), NOISE, window=4, window_kind="recompute")
    with pytest.raises(InvalidValueError, match=r"difference=1 is too small.*legal: 3"):
        sampler.sample(8, num_inference_steps=10, difference=1)
    with pytest.raises(InvalidValueError, match="at most 3, as trained"):
        ADSampler(random_denoiser(window=3), NOISE, window=4)
    with pytest.raises(InvalidValueError, match="at most 4"):
        ADSampler(random_denoiser(positions="sincos", max_frames=4), NOISE).sample(5)
