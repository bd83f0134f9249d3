"""What one training run is: model, data, diffusion, optimiser, checkpoints, validation, tracking."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ardist.config.ar_vae import ARVAEConfig, ARVAELossConfig
from ardist.config.base import Section
from ardist.config.data import DataConfig
from ardist.config.denoiser import DenoiserConfig
from ardist.config.launch import LaunchConfig
from ardist.config.migration import VERSION
from ardist.config.paths import PathText

Law = Literal["fopp", "synchronous", "independent", "uniform_monotone"]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class DiffusionConfig(Section):
    """Noise schedule, prediction target, loss weights and the law of the training timesteps (METHOD sections 1, 3)."""

    num_timesteps: int = Field(1000, ge=2, le=4096, description="T")
    schedule: Literal["scaled_linear", "cosine"] = "scaled_linear"
    target: Literal["x0", "eps", "v"] = "x0"
    law: Law | dict[Law, float] = Field("fopp", description="a timestep law, or weights of a mixture of laws")
    min_snr_gamma: float | None = Field(None, gt=0, description="min-SNR weighting; null: plain MSE")
    frame_weights: tuple[float, ...] | None = Field(None, description="weight of each frame's loss, first to last")
    condition_dropout: Fraction = 0.1

    @model_validator(mode="after")
    def _weights(self) -> DiffusionConfig:
        for name, weights in (("a mixture of laws", self.law), ("frames", self.frame_weights)):
            values = list(weights.values()) if isinstance(weights, dict) else weights
            if isinstance(values, str) or values is None:
                continue
            if not all(math.isfinite(value) and value >= 0 for value in values) or not sum(values) > 0:
                raise ValueError(f"the weights of {name} must be finite, not negative, and need a positive sum")
        return self


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: float = Field(1e-4, gt=0)
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    grad_clip: float = Field(1.0, ge=0, description="global norm; 0: off")
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    decay_steps: int = Field(0, ge=0, description="last steps of wsd")
    final_lr_fraction: Fraction = 0.0

    def contradictions(self) -> Iterator[str]:
        """What cannot be meant."""
        if (self.schedule == "wsd") != bool(self.decay_steps):
            yield (
                f"optimizer.schedule={self.schedule!r} with optimizer.decay_steps={self.decay_steps}; legal: "
                "decay_steps of 1 or more with wsd, 0 with the others"
            )


class TrainingConfig(Section):
    """Length, batch, precision and sharding."""

    steps: int = Field(100_000, ge=1)
    global_batch_size: int = Field(
        48, ge=1, description="clips per optimiser step over all ranks; with data.tokens_per_batch the longest clips"
    )
    micro_batch_size: int = Field(
        16,
        ge=1,
        description="clips per rank and forward; accumulation is derived. With data.tokens_per_batch the longest "
        "clips: the others' batches are cut into as many micro-batches",
    )
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload: Literal["none", "optimizer", "parameters"] = "none"
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    compile: bool = False
    guard: Literal["deepspeed", "device"] = Field(
        "deepspeed",
        description="who skips a step with a non-finite gradient; device: no host reads, ZeRO 0-2 only",
    )
    grad_accumulation: Literal["auto", "fp32", "model"] = Field(
        "auto",
        description="type in which micro-batches' gradients are added; auto: fp32 where DeepSpeed can, "
        "for bf16 weights and more than one micro-batch per step",
    )
    spike_policy: Literal["off", "count", "skip"] = Field(
        "count", description="what becomes of a step whose gradient norm stands out from the window's"
    )
    spike_sigmas: float = Field(6.0, gt=0, description="a spike is above mean + this many deviations of the window")
    spike_window: int = Field(128, ge=2, description="good steps before this one that it is compared with")
    max_skipped_in_row: int = Field(
        20, ge=1, description="go back to the last checkpoint, else stop, after this many skipped steps in a row"
    )
    good_steps_to_go_back_again: int = Field(
        100,
        ge=1,
        description="steps made, not skipped, behind those that the run last went back from, before it may do so again",
    )
    log_every: int = Field(10, ge=1)
    timeout_minutes: float = Field(30, gt=0, description="how long a rank waits for the others in a collective")
    ema_decays: tuple[Decay, ...] = (0.9999,)
    dry_run: bool = Field(
        True, description="run the largest micro-batch once before the first step: out of memory shows at once"
    )
    stop_after: int | None = Field(
        None, ge=1, description="save and stop with exit code 75 after this step, as if preempted"
    )

    def contradictions(self) -> Iterator[str]:
        """What cannot be done together."""
        if self.zero_stage == 3 and self.guard == "device":
            yield "training.guard: device works with zero_stage 0, 1 and 2; ZeRO-3 always checks by itself"
        if self.offload == "optimizer" and self.zero_stage == 0:
            yield "training.offload: optimizer needs zero_stage 1, 2 or 3"
        if self.offload == "parameters" and self.zero_stage != 3:
            yield "training.offload: parameters needs zero_stage 3"
        if self.offload != "none" and self.guard == "device":
            yield "training.guard: device needs the optimiser on the device; legal with offload: deepspeed"
        if self.offload != "none" and self.spike_policy == "skip":
            yield "training.spike_policy: skip needs the optimiser on the device; legal with offload: count, off"
        if self.precision == "fp16" and self.guard == "device":
            yield "training.guard: device cannot drive the loss scale of fp16; legal with fp16: deepspeed"
        if self.grad_accumulation == "fp32" and self.precision != "fp32":
            if self.precision == "fp16" or self.zero_stage == 0 or self.offload != "none":
                yield "training.grad_accumulation: fp32 needs bf16, zero_stage 1, 2 or 3, and no offload"
            elif self.zero_stage == 1 and self.guard == "device":
                yield "training.grad_accumulation: fp32 with zero_stage 1 needs guard: deepspeed"
        if len(set(self.ema_decays)) != len(self.ema_decays):
            yield f"training.ema_decays: {list(self.ema_decays)} names a decay twice"


class CheckpointConfig(Section):
    """When checkpoints are written and how many are kept."""

    every: int = Field(1000, ge=1)
    keep: int = Field(3, ge=1)
    asynchronous: bool = True
    url: str | None = Field(
        None, pattern=r"^s3://[^/?@]+", description="s3://bucket/prefix of the checkpoints; null: in the run directory"
    )
    staging: PathText | None = Field(
        None,
        description="folder of each machine for parts on their way to and from s3; null: in the run directory",
    )


class ValidationConfig(Section):
    """Loss on held-out clips at fixed timesteps."""

    path: PathText | None = Field(None, description="held-out dataset; null: no validation")
    every: int = Field(1000, ge=1)
    num_clips: int = Field(64, ge=1)
    staircases: int = Field(8, ge=1, description="fixed FoPP timestep sequences per clip")
    weights: Literal["raw", "both"] = Field(
        "both", description="both: the EMA of the first decay too, as ema_loss etc."
    )


class SamplesConfig(Section):
    """Videos that the denoiser samples during training, with the average of the largest decay.

    Classes are taken in turn; a denoiser with context is shown its null context.
    """

    every: int | None = Field(None, ge=1, description="steps from one sampling to the next; null: none")
    ar_vae: PathText | None = Field(None, description="bundle with the AR-VAE that made the latents, to decode with")
    num_videos: int = Field(4, ge=1, description="videos per difference")
    differences: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0, 5), min_length=1, description="AD timestep differences s, in sampler steps"
    )
    num_inference_steps: int = Field(50, ge=1, description="sampler steps S; divides diffusion.num_timesteps")
    num_frames: int | None = Field(None, ge=1, description="null: as many as the training clips have")
    guidance_scale: float = Field(1.0, ge=0)
    seed: int = Field(0, ge=0, lt=2**63)
    fps: float = Field(8.0, gt=0)


class DebugConfig(Section):
    """Checks and measurements that cost time."""

    replica_check_every: int = Field(0, ge=0, description="compare the weights of all ranks every N steps; 0: never")
    profile_step: int | None = Field(None, ge=0, description="first step of a torch profiler trace; null: none")
    profile_steps: int = Field(3, ge=1, description="length of the trace in steps")
    deterministic: bool = Field(False, description="refuse kernels whose result depends on timing")
    log_sample_ids: bool = Field(False, description="append the sample ids of every step to logs/samples-<rank>.jsonl")


class TrackingConfig(Section):
    """Where the numbers go; metrics.jsonl is always written."""

    wandb: Literal["online", "offline", "disabled"] = "offline"
    project: str = "ardist"
    name: str | None = None
    tensorboard: bool = False


class AugmentationConfig(Section):
    """Random changes of the frames an AR-VAE is trained on, one draw per clip."""

    frames: int | None = Field(
        None, ge=1, description="random frames of each clip that are trained on, in their order; null: all of them"
    )
    flip: bool = Field(True, description="mirror half of the clips left-right")
    shift: int = Field(0, ge=0, description="largest shift in pixels, borders mirrored")
    colour: float = Field(0.0, ge=0, le=0.5, description="largest relative change of each channel's contrast and level")
    latent_noise: float = Field(
        0.0,
        ge=0,
        le=1,
        description="largest standard deviation of noise on the unit-length latents that are decoded, each clip its "
        "own; teaches the temporal blocks of stage 2 to steady what flickers",
    )


class TrainConfig(Section):
    """One training run, complete."""

    version: Literal[1] = Field(VERSION, description="of this schema; older ones are migrated")
    task: Literal["denoiser", "ar_vae"]
    run_dir: PathText
    seed: int = Field(0, ge=0, lt=2**63)
    init_from: PathText | None = Field(
        None, description="run directory or checkpoint whose weights a fresh run starts from; no effect on a resume"
    )
    init_weights: str = Field("auto", description="auto: the largest EMA decay there is; raw; or an EMA decay")
    denoiser: DenoiserConfig | None = None
    ar_vae: ARVAEConfig | None = None
    ar_vae_loss: ARVAELossConfig = ARVAELossConfig()
    trainable: Literal["all", "temporal"] = Field(
        "all", description="temporal: only the temporal blocks of the AR-VAE's decoder (its stage 2)"
    )
    augmentation: AugmentationConfig = AugmentationConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    samples: SamplesConfig = SamplesConfig()
    tracking: TrackingConfig = TrackingConfig()
    debug: DebugConfig = DebugConfig()
    launch: LaunchConfig = LaunchConfig()
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="passed through to DeepSpeed, over our own")

    @field_validator("init_weights", mode="before")
    @classmethod
    def _decay_as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value

    @field_validator("init_weights")
    @classmethod
    def _auto_raw_or_decay(cls, value: str) -> str:
        try:
            known = value in ("auto", "raw") or 0 <= float(value) < 1
        except ValueError:
            known = False
        if not known:
            raise ValueError("legal: auto, raw, or an EMA decay of at least 0 and below 1")
        return value

    @model_validator(mode="after")
    def _no_contradictions(self) -> TrainConfig:
        """What sections cannot know by themselves, in one message; each problem names its settings in full."""
        checks = (self._model, self.optimizer.contradictions, self.training.contradictions, self._batch, self._samples)
        problems = [problem for check in checks for problem in check()]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _model(self) -> Iterator[str]:
        if getattr(self, self.task) is None:
            yield f"task {self.task!r} needs a section {self.task!r}"
        if self.trainable == "temporal":
            if self.task != "ar_vae" or self.ar_vae is None or not self.ar_vae.temporal:
                yield "trainable: temporal needs task ar_vae with ar_vae.temporal: true; legal else: all"
            if self.init_from is None:
                yield (
                    "trainable: temporal needs init_from, the run, checkpoint or bundle of stage 1: all other weights "
                    "stay what they are there"
                )
        if self.denoiser is not None and self.diffusion.num_timesteps > self.denoiser.num_timesteps:
            yield (
                f"diffusion.num_timesteps={self.diffusion.num_timesteps} is above "
                f"denoiser.num_timesteps={self.denoiser.num_timesteps}, the timesteps that the denoiser knows"
            )
        if self.ar_vae is not None and self.augmentation.shift >= self.ar_vae.image_size:
            yield (
                f"augmentation.shift={self.augmentation.shift} is not below ar_vae.image_size={self.ar_vae.image_size}"
            )

    def _batch(self) -> Iterator[str]:
        batch, lanes = self.training.global_batch_size, self.data.lanes
        if batch % lanes:
            legal = [d for d in range(1, batch + 1) if batch % d == 0]
            yield f"data.lanes={lanes} does not divide training.global_batch_size={batch}; legal lanes: {legal}"

    def _samples(self) -> Iterator[str]:
        samples, timesteps = self.samples, self.diffusion.num_timesteps
        if samples.every is None:
            return
        if self.task != "denoiser":
            yield "samples.every: only a denoiser is sampled; legal for task ar_vae: null"
        if samples.ar_vae is None:
            yield "samples.every needs samples.ar_vae, the bundle that decodes the samples"
        if timesteps % samples.num_inference_steps:
            yield (
                f"samples.num_inference_steps={samples.num_inference_steps} does not divide "
                f"diffusion.num_timesteps={timesteps}"
            )
        if max(samples.differences) > samples.num_inference_steps:
            yield (
                f"samples.differences={list(samples.differences)}; legal: 0 to "
                f"samples.num_inference_steps={samples.num_inference_steps}"
            )
        if samples.guidance_scale != 1 and self.denoiser is not None and self.denoiser.num_classes is None:
            yield (
                f"samples.guidance_scale={samples.guidance_scale} guides by classes, and denoiser.num_classes is null; "
                "legal: 1"
            )
        if len(set(samples.differences)) != len(samples.differences):
            yield f"samples.differences={list(samples.differences)} names a difference twice"


def batch_layout(training: TrainingConfig, world_size: int) -> tuple[int, int]:
    """(micro batch size, gradient accumulation steps) for a number of ranks; ValueError names the legal ranks.

    The micro batch is the largest divisor of a rank's batch that is not above ``micro_batch_size``.
    """
    batch = training.global_batch_size
    if batch % world_size:
        legal = [d for d in range(1, batch + 1) if batch % d == 0]
        raise ValueError(
            f"global_batch_size={batch} cannot be split over {world_size} ranks; legal numbers of ranks: {legal}"
        )
    return micro_batches(batch // world_size, training.micro_batch_size)


def micro_batches(per_rank: int, largest: int) -> tuple[int, int]:
    """(clips, number) of the equal micro-batches of a rank's batch: the largest that have at most `largest` clips."""
    micro = next(size for size in range(min(largest, per_rank), 0, -1) if per_rank % size == 0)
    return micro, per_rank // micro
