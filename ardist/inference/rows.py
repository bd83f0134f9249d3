"""The rows of an AD schedule over a denoiser: cached and exact, or with the authors' recomputed window.

Paper section 3.4. A row is one network call and one DDIM step of the frames that are active in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from ardist.config.denoiser import DenoiserConfig
from ardist.diffusion.ad import ADSchedule
from ardist.diffusion.ddim import ddim_step, guide
from ardist.diffusion.noise import NoiseSchedule
from ardist.inference.conditions import Conditions
from ardist.inference.kv_cache import KVCache, RowPlan
from ardist.models.denoiser import Denoiser


@dataclass(frozen=True, eq=False)
class FinalFrame:
    """A frame of every video of the batch that will not change any more."""

    index: int
    latents: Float[Tensor, "b l c"]


@dataclass(frozen=True, eq=False)
class Levels:
    """What a frame that has had k evaluations after a row (k = 0..S) is in that row."""

    timesteps: Int64[Tensor, "k"]
    """The timestep at which the network sees it."""
    abar: Float64[Tensor, "k"]
    """Its noise level before the row."""
    next_abar: Float64[Tensor, "k"]
    """Its noise level after the row, if the row updates it."""

    @classmethod
    def of(cls, schedule: ADSchedule, noise: NoiseSchedule) -> Levels:
        """The levels of a schedule, on the device of the noise schedule."""
        device, steps = noise.alphas_cumprod.device, schedule.num_steps
        # In row S of this staircase, frame j has had S - j evaluations: all values of k at once.
        staircase = ADSchedule(steps + 1, steps, 1, num_timesteps=schedule.num_timesteps)
        now = staircase.timesteps(steps, device=device).flip(0)
        then = staircase.next_timesteps(steps, device=device).flip(0)
        return cls(now, noise.alphas_cumprod[now], noise.alphas_cumprod[then])


@dataclass(frozen=True, eq=False)
class Run:
    """Everything that does not change from row to row."""

    denoiser: Denoiser
    schedule: ADSchedule
    noise_schedule: NoiseSchedule
    levels: Levels
    target: str
    guidance_scale: float
    conditions: Conditions
    initial_noise: Callable[[int, int], Tensor]
    """Initial noise of the frames [start, stop), [b n l c] in fp32."""
    prefix: Float[Tensor, "b p l c"]

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.noise_schedule.alphas_cumprod.device

    def guided_x0(
        self, prediction: Float[Tensor, "n f l c"], latents: Float[Tensor, "b f l c"], steps_done: Int64[Tensor, "f"]
    ) -> Float[Tensor, "b f l c"]:
        """x0 in fp32 from the prediction for the batch, or for ``[conditional ; unconditional]``."""
        timesteps = self.levels.timesteps[steps_done].expand(latents.shape[0], -1)
        predicted = [
            self.noise_schedule.to_x0(self.target, part.float(), latents, timesteps)
            for part in prediction.chunk(self.conditions.num_copies)
        ]
        return predicted[0] if len(predicted) == 1 else guide(predicted[0], predicted[1], self.guidance_scale)

    def denoise(
        self, latents: Float[Tensor, "b f l c"], x0: Float[Tensor, "b f l c"], steps_done: Int64[Tensor, "f"]
    ) -> Float[Tensor, "b f l c"]:
        """One DDIM step of frames that a row updates."""
        return ddim_step(latents, x0, self.levels.abar[steps_done], self.levels.next_abar[steps_done])

    def finished(self, row: int) -> range:
        """The frames that are final after `row` and were not before."""
        start, stop = self.schedule.active_range(row)
        return range(start, stop if row == self.schedule.num_rows else self.schedule.active_range(row + 1)[0])


def recomputed_rows(run: Run) -> Iterator[list[FinalFrame]]:
    """Run the whole common window in every row, as the authors do; positions count from the window's start.

    Yields after each row the frames that became final in it.
    """
    schedule, conditions = run.schedule, run.conditions
    latents = torch.cat([run.prefix, run.initial_noise(schedule.num_prefix_frames, schedule.num_frames)], dim=1)
    for row in range(1, schedule.num_rows + 1):
        start, stop = schedule.window_range(row)
        seen = latents[:, start:stop]
        steps_done = schedule.steps_done(row, device=run.device)[start:stop]
        timesteps = run.levels.timesteps[steps_done].expand(latents.shape[0], -1)
        prediction = run.denoiser(
            conditions.repeat(seen),
            conditions.repeat(timesteps),
            conditions.context,
            conditions.class_ids,
            context_dropped=conditions.context_dropped,
        )
        x0 = run.guided_x0(prediction, seen, steps_done)
        active_start, active_stop = schedule.active_range(row)
        active = slice(active_start - start, active_stop - start)
        latents[:, active_start:active_stop] = run.denoise(seen[:, active], x0[:, active], steps_done[active])
        yield [FinalFrame(index, latents[:, index].clone()) for index in run.finished(row)]


def cached_rows(run: Run, window: int | None) -> Iterator[list[FinalFrame]]:
    """Run only the frames that change, and each frame once more when it has just become final, for the cache.

    Yields after each row the frames that became final in it. Only the active frames' latents are kept.
    """
    caller = _CachedCalls(run, window)
    schedule = run.schedule
    # A prefix longer than the window enters in pieces, so that memory stays bounded by the window.
    for first, last in schedule.prefix_ranges:
        steps_done = torch.full((last - first,), schedule.num_steps, device=run.device)
        caller.x0(run.prefix[:, first:last], steps_done, first, num_final=last - first)
    start = schedule.evaluated_range(1)[0]
    latents = run.prefix[:, start:]
    for row in range(1, schedule.num_rows + 1):
        active_start, stop = schedule.active_range(row)
        num_final = active_start - start
        missing = stop - start - latents.shape[1]
        if missing:
            latents = torch.cat([latents, run.initial_noise(stop - missing, stop)], dim=1)
        steps_done = schedule.steps_done(row, device=run.device)[start:stop]
        x0 = caller.x0(latents, steps_done, start, num_final)
        latents = run.denoise(latents[:, num_final:], x0[:, num_final:], steps_done[num_final:])
        start = active_start
        # Copies: what a consumer does to a frame must not reach the rows still to come.
        yield [FinalFrame(index, latents[:, index - start].clone()) for index in run.finished(row)]


def count_cached_programs(config: DenoiserConfig, schedule: ADSchedule) -> int:
    """Different attention masks and shapes of one run of `cached_rows`: what a backend that compiles each has to."""
    window = schedule.window or schedule.num_frames
    calls = [(start, stop, stop - start) for start, stop in schedule.prefix_ranges]
    for row in range(1, schedule.num_rows + 1):
        start, stop = schedule.evaluated_range(row)
        calls.append((start, stop, schedule.active_range(row)[0] - start))
    plans = (RowPlan.of(config, window, *call) for call in calls)
    programs = {(plan.layout, plan.passes_through) for plan in plans}
    return len(programs) + (config.context_tokens > 0)  # the context runs once, alone


class _CachedCalls:
    """Network calls through one cache, with what all of them share computed once."""

    def __init__(self, run: Run, window: int | None) -> None:
        schedule, conditions, denoiser = run.schedule, run.conditions, run.denoiser
        self._run = run
        first_start, first_stop = schedule.evaluated_range(1)
        self._cache = KVCache(
            denoiser.config,
            conditions.num_copies * conditions.batch_size,
            schedule.num_frames,
            max(
                schedule.max_active_frames + 1,
                first_stop - first_start,
                *(stop - start for start, stop in schedule.prefix_ranges),
            ),
            window,
            run.device,
            denoiser.input.weight.dtype,
        )
        denoiser.forward_context(
            conditions.context, conditions.context_dropped, self._cache.batch_size, self._cache.context_layers
        )
        self._modulations = denoiser.modulations(run.levels.timesteps, conditions.class_ids)

    def x0(
        self, latents: Float[Tensor, "b f l c"], steps_done: Int64[Tensor, "f"], start: int, num_final: int
    ) -> Float[Tensor, "b f l c"]:
        """x0 of the frames from `start` on, of which the first `num_final` are final and stay in the cache."""
        layout = self._cache.begin_row(start, start + latents.shape[1], num_final)
        prediction = self._run.denoiser.forward_frames(
            self._run.conditions.repeat(latents),
            self._modulations[:, :, steps_done],
            start,
            layout,
            self._cache.layers,
        )
        return self._run.guided_x0(prediction, latents, steps_done)
