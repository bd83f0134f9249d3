"""Asynchronous sampling: the AD schedule, DDIM and guidance around a denoiser, with an exact cache of final frames.

Paper section 3.4 (adaptive-difference scheduler). Each row of the schedule is one network call; a frame is handed out
as soon as it is final.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ardist.diffusion.ad import WINDOW_KINDS, ADSchedule
from ardist.diffusion.counter_rng import Purpose, normal
from ardist.diffusion.noise import TARGETS, NoiseSchedule
from ardist.errors import InvalidValueError, check_integer, choose
from ardist.inference.conditions import Conditions
from ardist.inference.rows import FinalFrame, Levels, Run, cached_rows, count_cached_programs, recomputed_rows
from ardist.models.attention.flex import COMPILED_LAYOUTS
from ardist.models.denoiser import Denoiser
from ardist.models.packed_linear import can_pack, pack_linears
from ardist.models.parallelize import parallelize


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a row; rows are network calls."""

    row: int
    num_rows: int
    frames_done: int
    num_frames: int
    frames_per_second: float


class ADSampler:
    """Samples latent videos from a denoiser.

    The result for a video depends on its number in `video_ids`, the seed and the settings only, never on which other
    videos are in the batch (up to the rounding of matrix products of another size).

    Args:
        denoiser: on the device and in the dtype to sample with. Latents are kept in fp32. In fp32 on a CPU a run works
            on a rearranged copy of its blocks' weights.
        noise_schedule: the one it was trained with.
        target: what it predicts: ``x0``, ``eps`` or ``v``.
        window: frames it looks at, at most; None: all frames of the video.
        window_kind: ``rolling`` (exact cache; ``strict`` mask only), ``recompute`` (the authors' common window,
            nothing cached), or None for the one that fits the mask.
        compile: compile the blocks (see `ardist.models.parallelize`) of a copy that shares the denoiser's weights; the
            denoiser itself stays as it is.

    Raises:
        InvalidValueError: the window does not fit the denoiser.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        noise_schedule: NoiseSchedule,
        *,
        target: str = "x0",
        window: int | None = None,
        window_kind: str | None = None,
        compile: bool = False,
    ) -> None:
        config = denoiser.config
        if window_kind is None:
            window_kind = "rolling" if config.mask == "strict" else "recompute"
        choose("window_kind", window_kind, WINDOW_KINDS)
        choose("target", target, TARGETS)
        if window is not None:
            check_integer("window", window)
            if window < 1:
                raise InvalidValueError(f"window={window} is illegal; legal: at least 1, or None for all frames")
        if noise_schedule.num_timesteps > config.num_timesteps:
            raise InvalidValueError(
                f"a noise schedule of {noise_schedule.num_timesteps} timesteps is illegal; "
                f"legal: at most {config.num_timesteps}, as the denoiser is configured"
            )
        if window_kind == "rolling" and config.mask != "strict":
            raise InvalidValueError(
                f"window_kind='rolling' is illegal with mask {config.mask!r}, which cannot be cached; "
                "legal: 'recompute'"
            )
        if config.window is not None:
            if window is not None and window > config.window:
                raise InvalidValueError(f"window={window} is illegal; legal: at most {config.window}, as trained")
            window = config.window if window is None else window
        self.denoiser = parallelize(_same_weights(denoiser), compile=True) if compile else denoiser
        # Blocks that somebody has compiled or wrapped already keep to the weights they were compiled with.
        wrapped = compile or any("whole" in vars(block) for block in denoiser.blocks)
        self._packs = not wrapped and can_pack(denoiser.input.weight)
        self.device = denoiser.input.weight.device
        self.noise_schedule = noise_schedule.to(self.device)
        self.target = target
        self.window = window
        self.window_kind = window_kind

    def sample(
        self, num_frames: int, *, prefix: Float[Tensor, "b p l c"] | None = None, **arguments: Any
    ) -> Float[Tensor, "b f l c"]:
        """Whole videos in fp32, a given prefix included; the arguments are those of `stream`."""
        frames = list(self.stream(num_frames, prefix=prefix, **arguments))
        generated = torch.stack([frame.latents for frame in frames], dim=1)
        return generated if prefix is None else torch.cat([prefix.to(generated), generated], dim=1)

    def stream(
        self,
        num_frames: int,
        *,
        num_inference_steps: int = 50,
        difference: int = 5,
        guidance_scale: float | int = 1.0,
        batch_size: int = 1,
        seed: int = 0,
        generator: torch.Generator | None = None,
        video_ids: Int64[Tensor, "b"] | None = None,
        context: Float[Tensor, "b k d"] | None = None,
        class_ids: Int64[Tensor, "b"] | None = None,
        prefix: Float[Tensor, "b p l c"] | None = None,
        noise: Float[Tensor, "b f l c"] | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> Iterator[FinalFrame]:
        """Each generated frame as soon as it is final, in order; arguments are checked before anything runs.

        Args:
            num_frames: length of the videos F, prefix included.
            num_inference_steps: evaluations per frame S; divides the number of training timesteps.
            difference: evaluations s by which a frame is behind the one before it: 0 (all frames together) to
                `num_inference_steps` (one frame after another).
            guidance_scale: weight w of classifier-free guidance; 1 runs the network once per row, others in one call
                of twice the batch.
            batch_size: number of videos; taken from the conditions or `prefix` where they are given.
            seed: of the initial noise, in [0, 2**63).
            generator: draws the seed instead, for callers that keep a `torch.Generator`.
            video_ids: numbers of the videos, which key their noise; default 0, 1, ….
            context, class_ids: conditions as of `Denoiser.forward`; None is the null condition.
            prefix: given first frames, clean latents (continuation; one frame: image-to-video).
            noise: the initial noise of all F frames instead of the seeded one.
            progress: called after each row.

        Raises:
            InvalidValueError: arguments that do not fit together or the denoiser; the message has the legal values.
        """
        for name, value in (("num_frames", num_frames), ("batch_size", batch_size), ("seed", seed)):
            check_integer(name, value)
        if not math.isfinite(guidance_scale):
            raise InvalidValueError(f"guidance_scale={guidance_scale} is illegal; legal: a finite number")
        if not 0 <= seed < 2**63:
            raise InvalidValueError(f"seed={seed} is illegal; legal: 0 to 2^63 - 1")
        if video_ids is not None and (video_ids.ndim != 1 or video_ids.dtype != torch.int64):
            raise InvalidValueError(
                f"video_ids of shape {tuple(video_ids.shape)} and {video_ids.dtype} are illegal; "
                "legal: one int64 per video"
            )
        conditions = Conditions.create(
            self.denoiser.config,
            guided=guidance_scale != 1,
            batch_size=batch_size,
            sizes={"prefix": prefix, "noise": noise, "video_ids": video_ids},
            context=context,
            class_ids=class_ids,
            device=self.device,
        )
        given = 0 if prefix is None else prefix.shape[1] if prefix.ndim == 4 else 1
        prefix = self._latents("prefix", prefix, conditions.batch_size, given)
        schedule = ADSchedule(
            num_frames,
            num_inference_steps,
            difference,
            self.window,
            self.window_kind,
            self.noise_schedule.num_timesteps,
            prefix.shape[1],
        )
        self._check_positions(schedule)
        self._check_programs(schedule)
        if noise is not None:
            noise = self._latents("noise", noise, conditions.batch_size, num_frames)
        if generator is not None:
            seed = int(torch.randint(0, 2**63 - 1, (), generator=generator, device=generator.device))
        run = Run(
            _with_packed_blocks(self.denoiser) if self._packs else self.denoiser,
            schedule,
            self.noise_schedule,
            Levels.of(schedule, self.noise_schedule),
            self.target,
            float(guidance_scale),
            conditions,
            self._noise_source(noise, seed, video_ids, conditions.batch_size),
            prefix,
        )
        return self._frames(run, progress)

    @torch.no_grad()
    def _frames(self, run: Run, progress: Callable[[Progress], None] | None) -> Iterator[FinalFrame]:
        rows = cached_rows(run, self.window) if self.window_kind == "rolling" else recomputed_rows(run)
        schedule = run.schedule
        started, done = time.monotonic(), 0
        for row, frames in enumerate(rows, start=1):
            yield from frames
            done += len(frames)
            if progress is not None:
                rate = done / max(time.monotonic() - started, 1e-9)
                frames_done = schedule.num_prefix_frames + done
                progress(Progress(row, schedule.num_rows, frames_done, schedule.num_frames, rate))

    def _noise_source(
        self, noise: Tensor | None, seed: int, video_ids: Tensor | None, batch_size: int
    ) -> Callable[[int, int], Tensor]:
        """A function that gives the initial noise of the frames [start, stop), [b n l c] in fp32."""
        if noise is not None:
            return lambda start, stop: noise[:, start:stop]
        ids = torch.arange(batch_size) if video_ids is None else video_ids
        ids = ids.to(self.device)
        length, channels = self.denoiser.config.tokens_per_frame, self.denoiser.config.latent_channels

        def draw(start: int, stop: int) -> Tensor:
            shape = (stop - start, length, channels)
            return normal(seed, 0, ids, Purpose.SAMPLER_NOISE, shape, offset=start * length * channels)

        return draw

    def _latents(self, name: str, value: Tensor | None, batch_size: int, frames: int) -> Tensor:
        """Given latents, checked, in fp32 on the device; empty when nothing is given."""
        legal = (batch_size, frames, self.denoiser.config.tokens_per_frame, self.denoiser.config.latent_channels)
        if value is None:
            return torch.empty(legal, device=self.device)
        if tuple(value.shape) != legal or not value.is_floating_point():
            raise InvalidValueError(
                f"{name} of shape {tuple(value.shape)} and {value.dtype} is illegal; legal: {legal}, floating point"
            )
        return value.to(self.device, torch.float32)

    def _check_positions(self, schedule: ADSchedule) -> None:
        """A fixed table of positions must reach as far as the network is going to look."""
        config = self.denoiser.config
        reach = schedule.num_frames
        if self.window_kind == "recompute" and self.window is not None:
            reach = min(reach, self.window)
        if config.positions == "sincos" and reach > config.max_frames:
            raise InvalidValueError(
                f"{reach} frames do not fit the denoiser's sincos table; legal: at most {config.max_frames}, "
                f"or window_kind='recompute' with a window of at most {config.max_frames}"
            )

    def _check_programs(self, schedule: ADSchedule) -> None:
        """FlexAttention compiles each mask of a run; what is beyond the compiler's limit is refused before the run."""
        if self.denoiser.config.attention_backend != "flex" or self.window_kind != "rolling":
            return
        count = count_cached_programs(self.denoiser.config, schedule)
        if count > COMPILED_LAYOUTS:
            raise InvalidValueError(
                f"{schedule.num_frames} frames with difference={schedule.difference} have {count} different attention "
                f"masks, and FlexAttention compiles at most {COMPILED_LAYOUTS}; "
                "legal: attention_backend auto, sdpa or flash, a smaller window, or fewer frames"
            )


def _with_packed_blocks(denoiser: Denoiser) -> Denoiser:
    """A copy for one run: the weights of today, laid out for the CPU's kernel where every row needs them."""
    packed = _same_weights(denoiser)
    for block in packed.blocks:
        pack_linears(block, keep=("modulation",))  # which is computed once per run
    return packed


def _same_weights(denoiser: Denoiser) -> Denoiser:
    """Another module with the very parameters and buffers of this one."""
    shared = {id(tensor): tensor for tensor in (*denoiser.parameters(), *denoiser.buffers())}
    return copy.deepcopy(denoiser, shared)
