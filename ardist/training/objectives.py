"""What is learned: the loss of a micro-batch and the held-out measures of the denoiser; the AR-VAE has its own module.

All randomness about a sample is a function of (seed, epoch, sample id), so the loss of a global batch does not depend
on the number of ranks or on the micro-batch size beyond the order of float additions: every objective is a mean over
samples, and micro-batches are equal in size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ardist.config import TrainConfig
from ardist.data.batch import Batch
from ardist.data.manifest import Manifest
from ardist.diffusion import counter_rng
from ardist.diffusion.counter_rng import Purpose
from ardist.diffusion.fopp import sample_timesteps
from ardist.diffusion.losses import (
    condition_dropout,
    diffusion_loss,
    loss_by_frame,
    loss_by_timestep,
    min_snr_weights,
    per_frame_mse,
)
from ardist.diffusion.noise import NoiseSchedule
from ardist.models.denoiser import Denoiser
from ardist.models.flops import denoiser_flops
from ardist.models.parallelize import parallelize
from ardist.training.adversary import Adversary
from ardist.training.objective import Forward, Inputs, Objective
from ardist.training.objectives_ar_vae import AutoencoderObjective

VALIDATION_SEED = 0
"""Held-out noise and staircases are the same for every run, so that runs can be compared."""

TIMESTEP_BUCKETS = 10

CONDITION = ("context", "class_ids", "context_dropped")
"""Keyword arguments of the denoiser."""


def build_objective(
    config: TrainConfig, manifest: Manifest, device: torch.device, adversary: Adversary | None = None
) -> Objective:
    """The objective of ``config.task``; `adversary` is the discriminator of an AR-VAE that is trained with one."""
    if config.task == "denoiser":
        return DenoiserObjective(config, manifest, device)
    return AutoencoderObjective(config, manifest, device, adversary)


class DenoiserObjective:
    """Predict x0 (or eps, or v) of clips whose frames are noised to FoPP timesteps (METHOD sections 1 and 3)."""

    def __init__(self, config: TrainConfig, manifest: Manifest, device: torch.device) -> None:
        assert config.denoiser is not None
        self.config = config
        self.model_config = config.denoiser
        self.diffusion = config.diffusion
        self.schedule = NoiseSchedule.create(self.diffusion.schedule, self.diffusion.num_timesteps).to(device)
        frames, tokens, _ = manifest.shape
        self._conditional = self.model_config.num_classes is not None or self.model_config.context_tokens > 0
        weights = self.diffusion.frame_weights
        self._frame_weights = None if weights is None else torch.tensor(weights, device=device)
        self._num_buckets = min(TIMESTEP_BUCKETS, self.diffusion.num_timesteps)
        self.tokens_per_clip = frames * tokens
        self.flops_per_clip = float(denoiser_flops(self.model_config, frames).training)

    def build_model(self) -> nn.Module:
        """A fresh denoiser."""
        training = self.config.training
        return parallelize(
            Denoiser(self.model_config),
            activation_checkpointing=training.activation_checkpointing,
            compile=training.compile,
        )

    def prepare(self, batch: Batch) -> Inputs:
        """Noisy latents, their timesteps, what the network must return, and its condition."""
        key: dict[str, Any] = {"seed": self.config.seed, "epoch": batch.epoch, "sample_ids": batch.sample_ids}
        x0 = batch.values.float()
        timesteps = self._timesteps(batch.sample_ids, batch.epoch, x0.shape[1])
        eps = counter_rng.normal(**key, purpose=Purpose.NOISE, shape=tuple(x0.shape[1:]))
        dropped = condition_dropout(self.diffusion.condition_dropout, **key) if self._conditional else None
        inputs = self._inputs(x0, eps, timesteps, self._condition(batch, len(x0), dropped))
        if self.diffusion.min_snr_gamma is not None:
            inputs["weights"] = min_snr_weights(
                self.schedule, self.diffusion.target, timesteps, self.diffusion.min_snr_gamma
            )
        return inputs

    def loss(self, forward: Forward, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error per frame, weighted as configured."""
        frame_losses = _frame_losses(forward, inputs)
        weights = None if self._frame_weights is None else self._frame_weights[: frame_losses.shape[1]]
        loss = diffusion_loss(frame_losses, timestep_weights=inputs.get("weights"), frame_weights=weights)
        sums, counts = loss_by_timestep(
            frame_losses, inputs["timesteps"], self.diffusion.num_timesteps, self._num_buckets
        )
        by_timestep = {"timestep_loss_sum": sums, "timestep_frames": counts}
        return loss, {"loss_per_frame": loss_by_frame(frame_losses), **by_timestep}

    def evaluate(self, forward: Forward, clip: Batch) -> dict[str, list[float]]:
        """Loss of every frame at each of the fixed FoPP staircases, its timestep, and the loss of predicting zero."""
        count = self.config.validation.staircases
        staircases, noises = [], []
        for number in range(count):
            # Staircase `number` takes the place of the epoch in the key: as many independent draws as are wanted.
            ids = clip.sample_ids
            staircases.append(
                sample_timesteps(
                    "fopp",
                    1,
                    clip.values.shape[1],
                    self.diffusion.num_timesteps,
                    seed=VALIDATION_SEED,
                    epoch=number,
                    sample_ids=ids,
                    purpose=Purpose.VALIDATION,
                )
            )
            shape = tuple(clip.values.shape[1:])
            noises.append(counter_rng.normal(VALIDATION_SEED, number, ids, Purpose.NOISE, shape))
        timesteps, eps = torch.cat(staircases), torch.cat(noises)
        x0 = clip.values.float().expand(count, *clip.values.shape[1:])
        inputs = self._inputs(x0, eps, timesteps, self._condition(clip, count, None))
        losses = _frame_losses(forward, inputs)
        zero = per_frame_mse(torch.zeros_like(inputs["target"]), inputs["target"])
        return {
            "loss": losses.flatten().tolist(),
            "predict_zero": zero.flatten().tolist(),
            "timestep": timesteps.flatten().tolist(),
        }

    def summarise(self, clips: list[dict[str, list[float]]]) -> dict[str, Any]:
        """Means over clips and staircases: overall, per frame, and per (frame, range of timesteps)."""
        columns = {
            name: torch.tensor([clip[name] for clip in clips], dtype=torch.float64).unflatten(
                1, (self.config.validation.staircases, -1)
            )
            for name in ("loss", "predict_zero", "timestep")
        }
        loss, zero = columns["loss"], float(columns["predict_zero"].mean())
        bucket = (columns["timestep"].long() * TIMESTEP_BUCKETS).div(
            self.diffusion.num_timesteps, rounding_mode="floor"
        )
        table: list[list[float | None]] = []
        for frame in range(loss.shape[2]):
            rows = [loss[..., frame][bucket[..., frame] == index] for index in range(TIMESTEP_BUCKETS)]
            table.append([float(row.mean()) if row.numel() else None for row in rows])
        return {
            "loss": float(loss.mean()),
            "loss_per_frame": loss.mean(dim=(0, 1)).tolist(),
            "predict_zero": zero,
            "fraction_of_predict_zero": float(loss.mean()) / zero,
            "loss_per_frame_and_timestep": table,
            "clips": len(clips),
        }

    def describe(self, sample_ids: Tensor, epoch: int, num_frames: int) -> dict[str, Any]:
        """The timesteps every sample was given."""
        return {"timesteps": self._timesteps(sample_ids, epoch, num_frames).tolist()}

    def _timesteps(self, sample_ids: Tensor, epoch: int, num_frames: int) -> Tensor:
        law: Any = self.diffusion.law
        return sample_timesteps(
            law,
            len(sample_ids),
            num_frames,
            self.diffusion.num_timesteps,
            seed=self.config.seed,
            epoch=epoch,
            sample_ids=sample_ids,
        )

    def _inputs(self, x0: Tensor, eps: Tensor, timesteps: Tensor, condition: Inputs) -> Inputs:
        return {
            "noisy": self.schedule.add_noise(x0, eps, timesteps),
            "timesteps": timesteps,
            "target": self.schedule.target(self.diffusion.target, x0, eps, timesteps),
            **condition,
        }

    def _condition(self, batch: Batch, rows: int, dropped: Tensor | None) -> Inputs:
        condition: Inputs = {}
        if self.model_config.num_classes is not None and batch.class_ids is not None:
            ids, null = batch.class_ids.expand(rows), self.model_config.num_classes
            without = ids < 0 if dropped is None else (ids < 0) | dropped
            condition["class_ids"] = torch.where(without, null, ids)
        if self.model_config.context_tokens and batch.context is not None:
            condition["context"] = batch.context.float().expand(rows, *batch.context.shape[1:])
            if dropped is not None:
                condition["context_dropped"] = dropped
        return condition


def _frame_losses(forward: Forward, inputs: Inputs) -> Tensor:
    condition = {name: inputs[name] for name in CONDITION if name in inputs}
    return per_frame_mse(forward(inputs["noisy"], inputs["timesteps"], **condition), inputs["target"])
