"""Nothing of a later frame reaches an earlier one under the strict mask: exactly 0, forward and backward."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from denoiser_cases import inputs, random_denoiser

from ardist.models.attention import BACKENDS, available_backends

CONTEXT: dict[str, Any] = {"context_tokens": 5, "context_dim": 6}
CPU_BACKENDS = [name for name in BACKENDS if name != "flex"]


def change_before(denoiser_changes: dict[str, Any], frame: int) -> float:
    """Largest change of any frame before `frame` when frame `frame` and its timestep are perturbed."""
    denoiser = random_denoiser(**denoiser_changes)
    arguments = inputs(denoiser.config)
    with torch.no_grad():
        before = denoiser(**arguments)
        arguments["latents"][:, frame] += 10
        arguments["timesteps"][:, frame] = 999
        after = denoiser(**arguments)
    assert (after - before)[:, frame:].abs().amax(dim=(0, 2, 3)).min() > 0
    return (after - before)[:, :frame].abs().max().item()


def gradient_from_earlier(denoiser_changes: dict[str, Any], frame: int) -> float:
    """Largest gradient that the frames before `frame` send into the latents of `frame` and later ones."""
    denoiser = random_denoiser(**denoiser_changes)
    arguments = inputs(denoiser.config)
    latents = arguments["latents"].requires_grad_()
    denoiser(**arguments)[:, :frame].square().sum().backward()
    assert latents.grad is not None
    assert latents.grad[:, :frame].abs().amax(dim=(0, 2, 3)).min() > 0
    return latents.grad[:, frame:].abs().max().item()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("changes", [{}, CONTEXT, {"residual": "released", "positions": "sincos", **CONTEXT}])
def test_strict_mask_is_exactly_causal(backend: str, changes: dict[str, Any]) -> None:
    changes = {**changes, "attention_backend": backend}
    for frame in (1, 3, 4):
        assert change_before(changes, frame) == 0
        assert gradient_from_earlier(changes, frame) == 0


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_flex_forward_is_exactly_causal(pytestconfig: pytest.Config) -> None:
    """In a process of its own: run-time shape checks cannot be compiled. (On CPU, flex has no backward.)"""
    reason = available_backends()["flex"]
    if reason:
        pytest.skip(reason)
    program = (
        "from test_denoiser_causality import CONTEXT, change_before\n"
        "assert change_before({**CONTEXT, 'attention_backend': 'flex'}, 3) == 0"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=pytestconfig.rootpath / "tests" / "models",
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("changes", [{"mask": "released", **CONTEXT}, {"mask": "bidirectional"}])
def test_other_masks_are_not_causal_so_the_test_above_can_fail(changes: dict[str, Any]) -> None:
    assert change_before(changes, 3) > 1e-5
    assert gradient_from_earlier(changes, 3) > 1e-6


def test_released_mask_leaks_from_the_second_layer_on() -> None:
    assert change_before({"mask": "released", "depth": 1, **CONTEXT}, 3) == 0
    assert change_before({"mask": "released", "depth": 2, **CONTEXT}, 3) > 1e-6


def test_band_forgets_old_frames() -> None:
    """With depth 1 and window 2, frame 4 sees frames 3 and 4 only; with depth 3 it reaches back 3 frames more."""
    for depth, reach in ((1, 1), (3, 3)):
        denoiser = random_denoiser(depth=depth, window=2)
        arguments = inputs(denoiser.config)
        before = denoiser(**arguments)
        arguments["latents"][:, 0] += 10
        changed = (denoiser(**arguments) - before).abs().amax(dim=(0, 2, 3)) > 0
        assert changed.tolist() == [frame <= reach for frame in range(5)]
