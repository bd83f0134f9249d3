"""The sampler on a GPU: the same videos as on the CPU, compiled or not, and no waiting for the device inside a run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from sampler_cases import random_denoiser

from ardist.diffusion.noise import NoiseSchedule
from ardist.inference.sampler import ADSampler

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ARGUMENTS: dict[str, Any] = {"num_inference_steps": 5, "difference": 2, "batch_size": 2, "seed": 3}


def test_same_video_as_on_the_cpu() -> None:
    denoiser = random_denoiser(width=64, context_tokens=5, context_dim=6)
    expected = ADSampler(denoiser, NoiseSchedule.create(), window=3).sample(7, **ARGUMENTS)
    actual = ADSampler(copy.deepcopy(denoiser).cuda(), NoiseSchedule.create(), window=3).sample(7, **ARGUMENTS)
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=1e-3)


def test_half_precision_and_compiled() -> None:
    denoiser = random_denoiser(width=64, std=0.05).cuda()
    expected = ADSampler(denoiser, NoiseSchedule.create(), window=3).sample(7, **ARGUMENTS)
    half = copy.deepcopy(denoiser).bfloat16()
    for compiled in (False, True):
        actual = ADSampler(half, NoiseSchedule.create(), window=3, compile=compiled).sample(7, **ARGUMENTS)
        assert ((actual - expected).norm() / expected.norm()).item() < 0.05


def test_rows_do_not_wait_for_the_device() -> None:
    sampler = ADSampler(random_denoiser(width=64).cuda().bfloat16(), NoiseSchedule.create(), window=3)
    sampler.sample(7, **ARGUMENTS)
    frames = sampler.stream(7, **ARGUMENTS)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in frames:
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")
