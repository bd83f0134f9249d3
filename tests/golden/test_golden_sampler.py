"""The sampler against videos of an independent implementation: AD, DDIM, guidance and the recompute window."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_golden_denoiser import SHAPE, VARIANTS, load
from torch import Tensor

from ardist.config import DenoiserConfig
from ardist.diffusion.noise import NoiseSchedule
from ardist.inference.sampler import ADSampler
from ardist.models.denoiser import Denoiser
from ardist.models.released import convert_released_state_dict

CASES = ["F4_S10_s0_w1", "F4_S10_s10_w1", "F4_S10_s3_w1", "F4_S10_s3_w2", "F8_S10_s10_w1", "F8_S10_s3_w1"]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> tuple[Denoiser, dict[str, Tensor]]:
    weights, tensors = load(golden_dir / "sampler.safetensors")
    config = DenoiserConfig(**SHAPE | VARIANTS["strict"])
    denoiser = Denoiser(config)
    denoiser.load_state_dict(convert_released_state_dict(weights, config))
    return denoiser, tensors


def test_every_case_of_the_file_is_tested(golden_dir: Path) -> None:
    names = {key.split(".")[0] for key in load_file(golden_dir / "sampler.safetensors") if key.startswith("F")}
    assert names == set(CASES)


@pytest.mark.parametrize("window_kind", ["recompute", "rolling"])
@pytest.mark.parametrize("case", CASES)
def test_reproduces_the_reference_videos(
    golden: tuple[Denoiser, dict[str, Tensor]], case: str, window_kind: str
) -> None:
    denoiser, tensors = golden
    match = re.fullmatch(r"F(\d+)_S(\d+)_s(\d+)_w(\d+)", case)
    assert match is not None
    frames, steps, difference, guidance_scale = map(int, match.groups())
    if window_kind == "rolling" and frames > 4:
        pytest.skip("a sliding recompute window is another computation than a rolling one")
    sampler = ADSampler(denoiser, NoiseSchedule.create(), window=4, window_kind=window_kind)
    videos = sampler.sample(
        frames,
        num_inference_steps=steps,
        difference=difference,
        guidance_scale=guidance_scale,
        context=tensors["context"],
        noise=tensors[f"{case}.xT"],
    )
    assert relative_error(videos, tensors[f"{case}.y"]) <= 2e-3
