"""What one training run is: model, data, diffusion, optimiser, checkpoints, validation, tracking."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ardist.config.ar_vae import ARVAEConfig, ARVAELossConfig
from ardist.config.base import Section
from ardist.config.data import DataConfig
from ardist.config.denoiser import DenoiserConfig
from ardist.config.launch import LaunchConfig

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

    @model_validator(mode="after")
    def _decay_belongs_to_wsd(self) -> OptimizerConfig:
        if (self.schedule == "wsd") != bool(self.decay_steps):
            raise ValueError(
                f"schedule {self.schedule!r} with decay_steps={self.decay_steps}; legal: decay_steps of 1 or more with "
                "wsd, 0 with the others"
            )
        return self


class TrainingConfig(Section):
    """Length, batch, precision and sharding."""

    steps: int = Field(100_000, ge=1)
    global_batch_size: int = Field(48, ge=1, description="clips per optimiser step over all ranks")
    micro_batch_size: int = Field(16, ge=1, description="clips per rank and forward; accumulation is derived")
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
        20, ge=1, description="go back to the last checkpoint, once, then stop, after this many skipped steps in a row"
    )
    log_every: int = Field(10, ge=1)
    timeout_minutes: float = Field(30, gt=0, description="how long a rank waits for the others in a collective")
    ema_decays: tuple[Decay, ...] = (0.9999,)
    stop_after: int | None = Field(
        None, ge=1, description="save and stop with exit code 75 after this step, as if preempted"
    )

    @model_validator(mode="after")
    def _possible(self) -> TrainingConfig:
        problems = []
        if self.zero_stage == 3 and self.guard == "device":
            problems.append("guard: device works with zero_stage 0, 1 and 2; ZeRO-3 always checks by itself")
        if self.offload == "optimizer" and self.zero_stage == 0:
            problems.append("offload: optimizer needs zero_stage 1, 2 or 3")
        if self.offload == "parameters" and self.zero_stage != 3:
            problems.append("offload: parameters needs zero_stage 3")
        if self.offload != "none" and self.guard == "device":
            problems.append("guard: device needs the optimiser on the device; legal with offload: deepspeed")
        if self.offload != "none" and self.spike_policy == "skip":
            problems.append("spike_policy: skip needs the optimiser on the device; legal with offload: count, off")
        if self.precision == "fp16" and self.guard == "device":
            problems.append("guard: device cannot drive the loss scale of fp16; legal with fp16: deepspeed")
        if self.grad_accumulation == "fp32" and self.precision != "fp32":
            if self.precision == "fp16" or self.zero_stage == 0 or self.offload != "none":
                problems.append("grad_accumulation: fp32 needs bf16, zero_stage 1, 2 or 3, and no offload")
            elif self.zero_stage == 1 and self.guard == "device":
                problems.append("grad_accumulation: fp32 with zero_stage 1 needs guard: deepspeed")
        if len(set(self.ema_decays)) != len(self.ema_decays):
            problems.append(f"ema_decays: {list(self.ema_decays)} names a decay twice")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class CheckpointConfig(Section):
    """When checkpoints are written and how many are kept."""

    every: int = Field(1000, ge=1)
    keep: int = Field(3, ge=1)
    asynchronous: bool = True
    url: str | None = Field(
        None, pattern=r"^s3://[^/?@]+", description="s3://bucket/prefix of the checkpoints; null: in the run directory"
    )
    staging: str | None = Field(
        None,
        description="folder of each machine for parts on their way to and from s3; null: in the run directory",
    )


class ValidationConfig(Section):
    """Loss on held-out clips at fixed timesteps."""

    path: str | None = Field(None, description="held-out dataset; null: no validation")
    every: int = Field(1000, ge=1)
    num_clips: int = Field(64, ge=1)
    staircases: int = Field(8, ge=1, description="fixed FoPP timestep sequences per clip")
    weights: Literal["raw", "both"] = Field(
        "both", description="both: the EMA of the first decay too, as ema_loss etc."
    )


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


class TrainConfig(Section):
    """One training run, complete."""

    task: Literal["denoiser", "ar_vae"]
    run_dir: str
    seed: int = Field(0, ge=0, lt=2**63)
    init_from: str | None = Field(
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
    def _task_has_its_model(self) -> TrainConfig:
        if getattr(self, self.task) is None:
            raise ValueError(f"task {self.task!r} needs a section {self.task!r}")
        return self

    @model_validator(mode="after")
    def _temporal_blocks_are_there(self) -> TrainConfig:
        if self.trainable == "temporal":
            if self.task != "ar_vae" or self.ar_vae is None or not self.ar_vae.temporal:
                raise ValueError("trainable: temporal needs task ar_vae with ar_vae.temporal: true; legal else: all")
            if self.init_from is None:
                raise ValueError(
                    "trainable: temporal needs init_from, the run, checkpoint or bundle of stage 1: all other weights "
                    "stay what they are there"
                )
        return self

    @model_validator(mode="after")
    def _shift_fits_the_frame(self) -> TrainConfig:
        if self.ar_vae is not None and self.augmentation.shift >= self.ar_vae.image_size:
            raise ValueError(
                f"augmentation.shift={self.augmentation.shift} is not below ar_vae.image_size={self.ar_vae.image_size}"
            )
        return self

    @model_validator(mode="after")
    def _lanes_divide_batch(self) -> TrainConfig:
        batch, lanes = self.training.global_batch_size, self.data.lanes
        if batch % lanes:
            legal = [d for d in range(1, batch + 1) if batch % d == 0]
            raise ValueError(
                f"data.lanes={lanes} does not divide training.global_batch_size={batch}; legal lanes: {legal}"
            )
        return self


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
    per_rank = batch // world_size
    largest = min(training.micro_batch_size, per_rank)
    micro = next(size for size in range(largest, 0, -1) if per_rank % size == 0)
    return micro, per_rank // micro
