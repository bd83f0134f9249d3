"""The denoiser on CUDA: compiled blocks in half precision, one program for every number of frames."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from ardist.config import DenoiserConfig
from ardist.models.attention import available_backends
from ardist.models.denoiser import Denoiser, check_values
from ardist.models.parallelize import parallelize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _as_in_the_product() -> Iterator[None]:
    """Without the run-time shape checks of the tests, which are no part of the compiled program."""
    jaxtyping.config.update("jaxtyping_disable", True)
    torch._dynamo.reset()
    counters.clear()
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def denoiser() -> Denoiser:
    torch.manual_seed(0)
    config = DenoiserConfig(width=128, depth=3, num_heads=2, tokens_per_frame=32, context_tokens=7, context_dim=6)
    made = Denoiser(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.05)
    return made.cuda()


def step(model: Denoiser, batch: int, frames: int) -> list[Tensor]:
    """Output and gradients of one call, in fp64."""
    generator = torch.Generator().manual_seed(frames)
    latents = torch.randn(batch, frames, 32, 4, generator=generator).cuda()
    timesteps = torch.randint(0, 1000, (batch, frames), generator=generator).sort(dim=1).values.cuda()
    context = torch.randn(batch, 7, 6, generator=generator).cuda()
    model.zero_grad()
    out = model(latents, timesteps, context)
    out.float().square().mean().backward()
    return [out.detach().double(), *(p.grad.double() for p in model.parameters() if p.grad is not None)]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_compiled_blocks_follow_the_plain_ones(checkpointing: str) -> None:
    exact = denoiser()
    half = copy.deepcopy(exact).bfloat16()
    compiled = parallelize(copy.deepcopy(half), activation_checkpointing=checkpointing, compile=True)
    flash = available_backends("cuda", torch.bfloat16, 64)["flash"] is None
    graphs = []
    for batch, frames in ((4, 4), (3, 7), (2, 16)):
        expected, plain, found = (step(model, batch, frames) for model in (exact, half, compiled))
        for a, b, c in zip(expected, plain, found, strict=True):
            scale = a.norm() + 1e-3
            assert (c - a).norm() / scale < 2 * (b - a).norm() / scale + 0.02
        graphs.append(counters["stats"]["unique_graphs"])
    if flash:
        assert graphs == [1, 1, 1], "attention stands in the block's graph as one operator"
    assert not counters["graph_break"]


def test_a_call_does_not_wait_for_the_device() -> None:
    """Values on the device are not looked at, unless asked for."""
    model = denoiser().bfloat16()
    latents = torch.randn(2, 4, 32, 4, device="cuda")
    timesteps = torch.full((2, 4), 5000, device="cuda")
    with torch.no_grad():
        model(latents, timesteps)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(latents, timesteps)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(ValueError, match="timestep 5000 is illegal; legal: 0 to 999"):
        check_values(model.config, timesteps)
