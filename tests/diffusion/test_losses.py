"""Weighted losses, their split by frame and timestep, and condition dropout."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ardist.diffusion.losses import (
    condition_dropout,
    diffusion_loss,
    loss_by_frame,
    loss_by_timestep,
    min_snr_weights,
    per_frame_mse,
)
from ardist.diffusion.noise import TARGETS, NoiseSchedule
from ardist.errors import InvalidValueError

GENERATOR = torch.Generator().manual_seed(0)


def test_plain_loss_is_the_mean_squared_error() -> None:
    prediction, target = torch.randn(2, 3, 4, 5, generator=GENERATOR), torch.randn(2, 3, 4, 5, generator=GENERATOR)
    frames = per_frame_mse(prediction, target)
    assert frames.shape == (2, 3)
    torch.testing.assert_close(frames[1, 2], ((prediction - target)[1, 2] ** 2).mean())
    torch.testing.assert_close(diffusion_loss(frames), torch.nn.functional.mse_loss(prediction, target))


def test_errors_of_narrow_types_are_squared_in_float32() -> None:
    prediction = torch.full((1, 1, 1000), 1.0, dtype=torch.bfloat16)
    assert per_frame_mse(prediction, torch.full((1, 1, 1000), 1.00390625)).item() == pytest.approx(0.00390625**2)


def test_weights_multiply_the_frames_they_belong_to() -> None:
    frames = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    timestep_weights = torch.tensor([[1.0, 0.0], [0.5, 2.0]])
    frame_weights = torch.tensor([1.0, 10.0])
    weighted = diffusion_loss(frames, timestep_weights=timestep_weights, frame_weights=frame_weights)
    assert weighted.item() == pytest.approx((1 + 0 + 1.5 + 80) / 4)
    assert diffusion_loss(frames, frame_weights=frame_weights).item() == pytest.approx((1 + 20 + 3 + 40) / 4)


@pytest.mark.parametrize("target", TARGETS)
def test_min_snr_gives_one_x0_error_the_same_loss_under_every_target(target: str) -> None:
    """The weighted error of a prediction must be min(SNR, gamma) times the squared error of the x0 it implies."""
    schedule = NoiseSchedule.create()
    timesteps = torch.tensor([[0, 150, 400, 900]])
    x0, eps, slip = (torch.randn(1, 4, 6, generator=GENERATOR, dtype=torch.float64) for _ in range(3))
    x_t = schedule.add_noise(x0, eps, timesteps)
    truth = schedule.target(target, x0, eps, timesteps)
    x0_error = schedule.to_x0(target, truth + slip, x_t, timesteps) - schedule.to_x0(target, truth, x_t, timesteps)
    weighted = min_snr_weights(schedule, target, timesteps, 5) * per_frame_mse(truth + slip, truth)
    expected = schedule.snr(timesteps).clamp(max=5) * x0_error.square().mean(dim=2)
    torch.testing.assert_close(weighted, expected, rtol=1e-5, atol=0)


def test_min_snr_values() -> None:
    schedule, timesteps = NoiseSchedule.create(), torch.tensor([[0, 999]])
    low = float(schedule.snr(timesteps)[0, 1])
    assert min_snr_weights(schedule, "x0", timesteps, 5.0)[0].tolist() == pytest.approx([5, low])
    assert min_snr_weights(schedule, "eps", timesteps, 5.0)[0].tolist() == pytest.approx([5 / 9999, 1], rel=1e-3)
    with pytest.raises(InvalidValueError, match="gamma=0"):
        min_snr_weights(schedule, "x0", timesteps, 0.0)


def test_split_by_frame_is_the_mean_over_clips() -> None:
    frames = torch.tensor([[1.0, 2.0], [3.0, 6.0]], requires_grad=True)
    split = loss_by_frame(frames)
    assert split.tolist() == [2.0, 4.0]
    assert not split.requires_grad


def test_split_by_timestep_sums_and_counts() -> None:
    frames = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], requires_grad=True)
    timesteps = torch.tensor([[0, 249, 250], [999, 500, 499]])
    sums, counts = loss_by_timestep(frames, timesteps, 1000, 4)
    assert sums.tolist() == [3.0, 36.0, 16.0, 8.0]
    assert counts.tolist() == [2.0, 2.0, 1.0, 1.0]
    assert not sums.requires_grad


def test_uneven_buckets_cover_every_timestep_and_nan_stays_in_its_bucket() -> None:
    timesteps = torch.arange(10).unsqueeze(0)
    losses = torch.ones(1, 10)
    sums, counts = loss_by_timestep(losses, timesteps, 10, 3)
    assert counts.tolist() == [4.0, 3.0, 3.0]
    assert torch.equal(sums, counts)
    losses[0, 0] = float("nan")
    assert loss_by_timestep(losses, timesteps, 10, 3)[0].isnan().tolist() == [True, False, False]
    with pytest.raises(InvalidValueError, match=r"num_buckets=11 .* legal: 1\.\.10"):
        loss_by_timestep(losses, timesteps, 10, 11)


def test_losses_and_weights_read_nothing_back_to_the_host() -> None:
    schedule = NoiseSchedule.create().to("meta")
    timesteps = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    frames = per_frame_mse(torch.empty(2, 3, 4, device="meta"), torch.empty(2, 3, 4, device="meta"))
    loss = diffusion_loss(frames, timestep_weights=min_snr_weights(schedule, "v", timesteps, 5.0))
    sums, _ = loss_by_timestep(frames, timesteps, 1000, 10)
    assert loss.device.type == sums.device.type == "meta"


def test_condition_dropout_is_a_function_of_the_sample() -> None:
    ids = torch.arange(5000)
    dropped = condition_dropout(0.1, seed=1, epoch=2, sample_ids=ids)
    assert abs(dropped.double().mean() - 0.1) < 0.02
    assert torch.equal(condition_dropout(0.1, seed=1, epoch=2, sample_ids=ids[1000:1010]), dropped[1000:1010])
    assert not torch.equal(condition_dropout(0.1, seed=1, epoch=3, sample_ids=ids), dropped)


TRACED = """
import torch
from ardist.diffusion.counter_rng import normal
from ardist.diffusion.fopp import sample_timesteps
from ardist.diffusion.losses import condition_dropout, diffusion_loss, loss_by_timestep, min_snr_weights, per_frame_mse
from ardist.diffusion.noise import NoiseSchedule

schedule = NoiseSchedule.create()

def objective(x0, sample_ids):
    t = sample_timesteps({"fopp": 0.9, "independent": 0.1}, 5, 6, 1000, seed=1, epoch=2, sample_ids=sample_ids)
    eps = normal(1, 2, sample_ids, 1, (6, 3, 4))
    frames = per_frame_mse(0.5 * schedule.add_noise(x0, eps, t), schedule.target("v", x0, eps, t))
    dropped = condition_dropout(0.1, seed=1, epoch=2, sample_ids=sample_ids)
    loss = diffusion_loss(frames, timestep_weights=min_snr_weights(schedule, "v", t, 5.0))
    return t, loss, dropped, *loss_by_timestep(frames, t, 1000, 10)

x0, ids = torch.ones(5, 6, 3, 4), torch.tensor([3, 1, 4, -1, 5])
traced = torch.compile(objective, fullgraph=True, backend="aot_eager")(x0, ids)
for one, other in zip(traced, objective(x0, ids)):
    assert torch.equal(one, other), (one, other)
"""


@pytest.mark.slow
def test_the_whole_objective_is_one_graph() -> None:
    """In a process of its own: the run-time shape checks of the tests are no part of the traced graph."""
    subprocess.run([sys.executable, "-c", TRACED], check=True, timeout=200)
