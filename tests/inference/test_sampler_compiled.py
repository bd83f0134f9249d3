"""Sampling through compiled blocks and through FlexAttention, each in a process of its own.

The run-time shape checks of the tests are no part of what is compiled.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from sampler_cases import random_denoiser

from ardist.diffusion.noise import NoiseSchedule
from ardist.inference.sampler import ADSampler
from ardist.models.attention import available_backends

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on CPU needs a C++ compiler")


def run(program: str, pytestconfig: pytest.Config) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=pytestconfig.rootpath / "tests" / "inference",
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_compiled_sampler_leaves_the_denoiser_as_it_was() -> None:
    denoiser = random_denoiser(context_tokens=5, context_dim=6)
    attributes = [set(vars(block)) for block in denoiser.blocks]
    sampler = ADSampler(denoiser, NoiseSchedule.create(), compile=True)
    assert sampler.denoiser is not denoiser
    assert [set(vars(block)) for block in denoiser.blocks] == attributes
    assert [set(vars(block)) for block in sampler.denoiser.blocks] != attributes
    ours, theirs = dict(sampler.denoiser.named_parameters()), dict(denoiser.named_parameters())
    assert all(ours[name] is theirs[name] for name in theirs), "no weight is held twice"
    with torch.no_grad():
        denoiser.output.bias.fill_(3)
    assert (sampler.denoiser.output.bias == 3).all()


_COMPILED = """
import torch
from sampler_cases import random_denoiser
from torch._dynamo.utils import counters
from ardist.diffusion.noise import NoiseSchedule
from ardist.inference.sampler import ADSampler

denoiser = random_denoiser(num_classes=3)
arguments = dict(num_inference_steps=4, class_ids=torch.tensor([0, 2]), guidance_scale=2)
plain, compiled = (ADSampler(denoiser, NoiseSchedule.create(), window=3, compile=c) for c in (False, True))
seen = []
for frames, difference in ((5, 2), (6, 3), (7, 2)):
    expected = plain.sample(frames, difference=difference, **arguments)
    actual = compiled.sample(frames, difference=difference, **arguments)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    seen.append(counters["stats"]["unique_graphs"])
assert seen[0] > 0, "nothing was compiled"
assert seen[1] == seen[2], f"other lengths compile nothing new: {seen}"
assert not counters["graph_break"]
"""


@pytest.mark.slow
@pytest.mark.timeout(1000)
@NEEDS_COMPILER
def test_compiled_videos_are_the_plain_ones(pytestconfig: pytest.Config) -> None:
    """With the default compiler, on a CPU."""
    run(_COMPILED, pytestconfig)


_FLEX = """
import torch
from sampler_cases import random_denoiser
from ardist.diffusion.noise import NoiseSchedule
from ardist.inference.sampler import ADSampler

denoiser = random_denoiser(context_tokens=5, context_dim=6, attention_backend="flex")
plain = random_denoiser(context_tokens=5, context_dim=6)
arguments = dict(num_inference_steps=2, difference=1)
noise = torch.randn(1, 3, 3, 4, generator=torch.Generator().manual_seed(1))
sampler = ADSampler(denoiser, NoiseSchedule.create())
before = sampler.sample(3, noise=noise, **arguments)
expected = ADSampler(plain, NoiseSchedule.create()).sample(3, noise=noise, **arguments)
torch.testing.assert_close(before, expected, rtol=0, atol=1e-4)
for frame in (1, 2):
    changed = noise.clone()
    changed[:, frame] += 1
    difference = sampler.sample(3, noise=changed, **arguments) - before
    assert not difference[:, :frame].any(), f"frame {frame} reached an earlier one"
    assert difference[:, frame:].abs().amax(dim=(0, 2, 3)).min() > 0
"""


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_flex_is_causal_in_cached_inference(pytestconfig: pytest.Config) -> None:
    reason = available_backends()["flex"]
    if reason:
        pytest.skip(reason)
    run(_FLEX, pytestconfig)
