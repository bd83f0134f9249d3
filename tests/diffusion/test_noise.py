"""Noise schedules, conversions between prediction targets, and DDIM steps with one level per frame."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import jaxtyping
import pytest
import torch

from ardist.diffusion.ad import ADSchedule
from ardist.diffusion.ddim import ddim_step, guide
from ardist.diffusion.losses import diffusion_loss, loss_by_timestep, min_snr_weights, per_frame_mse
from ardist.diffusion.noise import SCHEDULES, TARGETS, NoiseSchedule
from ardist.errors import InvalidValueError


def clip(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_scaled_linear_levels_of_the_paper() -> None:
    schedule = NoiseSchedule.create()
    assert schedule.num_timesteps == 1000
    for timestep, level in ((0, 0.9999), (981, 1.049e-3), (999, 7.334e-4)):
        assert float(schedule.alphas_cumprod[timestep]) == pytest.approx(level, rel=5e-4)
    betas, product = [], 1.0
    for t in range(1000):
        betas.append((1e-2 + (math.sqrt(2e-2) - 1e-2) * t / 999) ** 2)
        product *= 1 - betas[-1]
        assert float(schedule.alphas_cumprod[t]) == pytest.approx(product, rel=1e-12)


def test_cosine_levels_follow_the_cosine_until_beta_is_capped() -> None:
    schedule = NoiseSchedule.create("cosine", 1000)
    edge = (torch.arange(1, 1001, dtype=torch.float64) / 1000 + 0.008) / 1.008 * math.pi / 2
    expected = edge.cos() ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(schedule.alphas_cumprod[:-1], expected[:-1], rtol=1e-9, atol=0)
    assert float(schedule.alphas_cumprod[-1] / schedule.alphas_cumprod[-2]) == pytest.approx(1e-3)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("num_timesteps", [2, 50, 4096])
def test_levels_fall_strictly_inside_the_unit_interval(kind: str, num_timesteps: int) -> None:
    levels = NoiseSchedule.create(kind, num_timesteps).alphas_cumprod
    assert levels.dtype == torch.float64
    assert (levels.diff() < 0).all()
    assert levels[0] < 1
    assert levels[-1] > 0


def test_every_frame_is_noised_to_its_own_timestep() -> None:
    schedule = NoiseSchedule.create()
    x0, eps = clip(2, 3, 4, 5), clip(2, 3, 4, 5, seed=1)
    timesteps = torch.tensor([[0, 500, 999], [3, 3, 4]])
    noised = schedule.add_noise(x0, eps, timesteps)
    for b in range(2):
        for f in range(3):
            level = float(schedule.alphas_cumprod[timesteps[b, f]])
            expected = math.sqrt(level) * x0[b, f] + math.sqrt(1 - level) * eps[b, f]
            torch.testing.assert_close(noised[b, f], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("target", TARGETS)
def test_targets_convert_back_to_x0_and_eps(kind: str, target: str) -> None:
    schedule = NoiseSchedule.create(kind)
    x0, eps = clip(2, 4, 3), clip(2, 4, 3, seed=1)
    timesteps = torch.tensor([[0, 10, 500, 990], [1, 200, 700, 980]])
    x_t, wanted = schedule.add_noise(x0, eps, timesteps), schedule.target(target, x0, eps, timesteps)
    torch.testing.assert_close(schedule.to_x0(target, wanted, x_t, timesteps), x0, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(schedule.to_eps(target, wanted, x_t, timesteps), eps, rtol=1e-6, atol=1e-8)


def test_v_is_the_velocity_of_the_definition() -> None:
    schedule = NoiseSchedule.create()
    x0, eps, timesteps = clip(1, 2, 3), clip(1, 2, 3, seed=1), torch.tensor([[100, 800]])
    level = schedule.alphas_cumprod[timesteps].unsqueeze(-1)
    torch.testing.assert_close(schedule.target("v", x0, eps, timesteps), level.sqrt() * eps - (1 - level).sqrt() * x0)


def test_snr_is_signal_over_noise() -> None:
    schedule = NoiseSchedule.create()
    timesteps = torch.tensor([[0, 999]])
    expected = [0.9999 / 0.0001, 7.334e-4 / (1 - 7.334e-4)]
    assert schedule.snr(timesteps)[0].tolist() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_types_come_back_as_given_and_are_computed_in_float32(dtype: torch.dtype) -> None:
    schedule = NoiseSchedule.create()
    x0, eps, timesteps = clip(1, 2, 64, dtype=dtype), clip(1, 2, 64, dtype=dtype, seed=1), torch.tensor([[5, 900]])
    noised = schedule.add_noise(x0, eps, timesteps)
    assert noised.dtype == dtype
    assert torch.equal(noised, schedule.add_noise(x0.float(), eps.float(), timesteps).to(dtype))


@pytest.mark.parametrize("timesteps", [[[0, 1000]], [[-1, 5]]])
def test_timesteps_out_of_range_are_refused(timesteps: list[list[int]]) -> None:
    with pytest.raises(InvalidValueError, match=r"are out of range; legal: 0\.\.999"):
        NoiseSchedule.create().add_noise(clip(1, 2, 3), clip(1, 2, 3), torch.tensor(timesteps))


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Past the type annotations, which these tests check at run time and the product does not."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


PLAIN, X, T = NoiseSchedule.create(), clip(4, 4, 3, 2), torch.full((4, 4), 7)
LOSSES, LEVELS = X.mean(dim=(2, 3)), PLAIN.abar(T)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PLAIN.add_noise(X, X, T[0]), r"timesteps of shape \(4,\) is illegal; legal: \(4, 4\)"),
        (lambda: PLAIN.add_noise(X, X, T[:1]), r"timesteps of shape \(1, 4\) is illegal; legal: \(4, 4\)"),
        (lambda: PLAIN.add_noise(X, X[:1], T), r"eps of shape \(1, 4, 3, 2\) is illegal; legal: \(4, 4, 3, 2\)"),
        (lambda: PLAIN.add_noise(X, X, T.double()), r"timesteps of shape .*float64 is illegal; legal: torch\.int64"),
        (lambda: PLAIN.add_noise(X[0, :, 0, 0], X[0, :, 0, 0], T[0]), r"x0 of shape \(4,\) .* \(clips, frames, ...\)"),
        (lambda: PLAIN.snr(T.float()), r"timesteps of shape .*float32 is illegal; legal: torch\.int64"),
        (lambda: PLAIN.abar(T.to(torch.uint8)), r"timesteps of shape .*uint8 is illegal; legal: torch\.int64"),
        *((lambda k=k: PLAIN.target(k, X, X[:1], T), r"eps of shape \(1, 4, 3, 2\)") for k in TARGETS),
        *((lambda k=k: PLAIN.target(k, X, X, T[0]), r"timesteps of shape \(4,\)") for k in TARGETS),
        *((lambda k=k: PLAIN.to_x0(k, X[:1], X, T), r"prediction of shape \(1, 4, 3, 2\)") for k in TARGETS),
        *((lambda k=k: PLAIN.to_x0(k, X, X, T[:1]), r"timesteps of shape \(1, 4\)") for k in TARGETS),
        *((lambda k=k: PLAIN.to_eps(k, X[:1], X, T), r"prediction of shape \(1, 4, 3, 2\)") for k in TARGETS),
        *((lambda k=k: PLAIN.to_eps(k, X, X, T[:1]), r"timesteps of shape \(1, 4\)") for k in TARGETS),
        (lambda: per_frame_mse(X[:1], X), r"prediction of shape \(1, 4, 3, 2\) is illegal; legal: \(4, 4, 3, 2\)"),
        (lambda: per_frame_mse(X[0, 0, 0], X[0, 0, 0]), r"target of shape \(2,\) .* \(clips, frames, ...\)"),
        (lambda: diffusion_loss(LOSSES, frame_weights=LOSSES[0, :1]), r"frame_weights of shape \(1,\) .* \(4,\)"),
        (lambda: diffusion_loss(LOSSES, frame_weights=LOSSES), r"frame_weights of shape \(4, 4\) .* \(4,\)"),
        (lambda: diffusion_loss(LOSSES, timestep_weights=LOSSES[0]), r"timestep_weights of shape \(4,\) .* \(4, 4\)"),
        (lambda: loss_by_timestep(LOSSES, T[0], 1000, 4), r"timesteps of shape \(4,\) is illegal; legal: \(4, 4\)"),
        (lambda: loss_by_timestep(LOSSES, T.double(), 1000, 4), r"timesteps of .*float64 .* legal: torch\.int64"),
        (lambda: min_snr_weights(PLAIN, "v", T.float(), 5), r"timesteps of .*float32 is illegal; legal: torch\.int64"),
        (lambda: ddim_step(X, X[:1], LEVELS, LEVELS), r"x0 of shape \(1, 4, 3, 2\) is illegal; legal: \(4, 4, 3, 2\)"),
        (lambda: ddim_step(X, X, LEVELS[:1], LEVELS), r"abar_t of shape \(1, 4\) .* \(4, 4\) or \(4,\)"),
        (lambda: ddim_step(X, X, LEVELS, LEVELS[0, :1]), r"abar_prev of shape \(1,\) .* \(4, 4\) or \(4,\)"),
        (lambda: ddim_step(X, X, LEVELS, LEVELS, updated=T[:1] > 0), r"updated of shape \(1, 4\) .* or \(4,\)"),
        (lambda: ddim_step(X[0, 0, 0], X[0, 0, 0], LEVELS, LEVELS), r"x_t of shape \(2,\) .* \(clips, frames, ...\)"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_would_only_fit_by_broadcasting_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        call()


@pytest.mark.usefixtures("unchecked")
def test_a_number_of_timesteps_or_buckets_that_is_no_integer_is_refused() -> None:
    """Ten and a half timesteps would be a schedule of ten or eleven that no checkpoint was trained with."""
    with pytest.raises(InvalidValueError, match=r"num_timesteps=10\.5 is illegal; legal: an integer"):
        NoiseSchedule.create("cosine", 10.5)  # type: ignore[arg-type]
    with pytest.raises(InvalidValueError, match=r"num_buckets=2\.5 is illegal; legal: an integer"):
        loss_by_timestep(LOSSES, T, 1000, 2.5)  # type: ignore[arg-type]


def test_clips_of_single_numbers_and_levels_of_either_shape_are_legal() -> None:
    """The least shapes that the annotations allow: no axis after the frames, levels with and without clips."""
    x0, eps, timesteps = X[..., 0, 0], X[..., 1, 1], T[:1].expand(4, 4)
    assert torch.equal(per_frame_mse(x0, eps), (x0 - eps).square())
    here = ddim_step(PLAIN.add_noise(x0, eps, timesteps), x0, LEVELS, LEVELS[0])
    torch.testing.assert_close(here, PLAIN.add_noise(x0, eps, timesteps))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InvalidValueError, match="legal: scaled_linear, cosine"):
        NoiseSchedule.create("linear")
    with pytest.raises(InvalidValueError, match="num_timesteps=1"):
        NoiseSchedule.create(num_timesteps=1)
    schedule, x, t = NoiseSchedule.create(), clip(1, 1, 2), torch.tensor([[3]])
    for call in (schedule.to_x0, schedule.to_eps, schedule.target):
        with pytest.raises(InvalidValueError, match="legal: x0, eps, v"):
            call("epsilon", x, x, t)


def test_ddim_step_moves_along_the_implied_noise() -> None:
    """With the true x0 a step lands exactly where adding the same noise at the lower level would."""
    schedule = NoiseSchedule.create()
    x0, eps = clip(2, 3, 5), clip(2, 3, 5, seed=1)
    here, there = torch.tensor([[981, 500, 1], [21, 999, 41]]), torch.tensor([[961, 480, 0], [1, 979, 0]])
    x_t = schedule.add_noise(x0, eps, here)
    moved = ddim_step(x_t, x0, schedule.abar(here), schedule.abar(there))
    torch.testing.assert_close(moved, schedule.add_noise(x0, eps, there), rtol=1e-9, atol=1e-9)


def test_ddim_step_takes_levels_without_a_batch_axis_and_leaves_other_frames_alone() -> None:
    schedule = NoiseSchedule.create()
    x_t, x0 = clip(2, 4, 3, dtype=torch.float32), clip(2, 4, 3, dtype=torch.float32, seed=1)
    here, there = schedule.abar(torch.tensor([1, 21, 981, 999])), schedule.abar(torch.tensor([0, 1, 961, 999]))
    everywhere = ddim_step(x_t, x0, here.expand(2, 4), there.expand(2, 4))
    updated = torch.tensor([False, True, True, False])
    moved = ddim_step(x_t, x0, here, there, updated=updated)
    assert torch.equal(moved[:, updated], everywhere[:, updated])
    assert torch.equal(moved[:, ~updated], x_t[:, ~updated])
    assert not torch.equal(everywhere[:, 0], x_t[:, 0])


def test_a_whole_schedule_of_steps_with_an_exact_denoiser_reaches_the_clip() -> None:
    """AD rows, levels and steps together: with a perfect prediction every frame ends at abar_0 of the true clip."""
    noise, schedule = NoiseSchedule.create(), ADSchedule(4, 10, 3, num_prefix_frames=1)
    x0, eps = clip(1, 4, 6), clip(1, 4, 6, seed=1)
    x = torch.cat((x0[:, :1], eps[:, 1:]), dim=1)
    for row in range(1, schedule.num_rows + 1):
        here, there = noise.abar(schedule.timesteps(row)), noise.abar(schedule.next_timesteps(row))
        x = ddim_step(x, x0, here, there, updated=schedule.updated(row))
    assert torch.equal(x[:, 0], x0[:, 0])
    # The start is pure noise, the first level is not quite: what is left of eps is sqrt(1 - abar_0) = 1%.
    assert (x - x0).abs().max() < 0.01 * eps.abs().max() * 1.2


def test_guidance_extrapolates() -> None:
    conditional, unconditional = clip(2, 3), clip(2, 3, seed=1)
    assert torch.equal(guide(conditional, unconditional, 0), unconditional)
    torch.testing.assert_close(guide(conditional, unconditional, 1), conditional)
    torch.testing.assert_close(guide(conditional, unconditional, 3.0), 3 * conditional - 2 * unconditional)
