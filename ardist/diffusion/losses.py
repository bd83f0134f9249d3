"""Training losses with one timestep per frame, and their split by frame and by timestep. Nothing here syncs the host.

Source: AR-Diffusion (arXiv 2503.07418), "Training objective" (plain MSE on x0); min-SNR weights are those of Hang et
al. (2023); dropping the condition is that of classifier-free guidance (Ho & Salimans, 2022).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ardist.diffusion.counter_rng import Purpose, bernoulli
from ardist.diffusion.noise import TARGETS, NoiseSchedule
from ardist.diffusion.shapes import check_clips, check_int64, check_shape
from ardist.errors import InvalidValueError, check_integer, choose


def per_frame_mse(prediction: Float[Tensor, "b f *x"], target: Float[Tensor, "b f *x"]) -> Float[Tensor, "b f"]:
    """Mean squared error of every frame `[b, f]`, in float32 or wider; InvalidValueError for different shapes."""
    check_clips("target", target)
    check_shape("prediction", prediction, target.shape)
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    return (prediction.to(dtype) - target.to(dtype)).square().unsqueeze(2).flatten(2).mean(dim=2)


def min_snr_weights(
    schedule: NoiseSchedule, target: str, timesteps: Int64[Tensor, "b f"], gamma: float | int
) -> Float[Tensor, "b f"]:
    """Weights `[b, f]` (float32) that bound the weight of a frame's x0 error at min(SNR, gamma), for any target.

    An error in eps is sqrt(SNR) times that in x0, one in v sqrt(SNR + 1) times; hence min(SNR, gamma) divided by 1, SNR
    or SNR + 1. `gamma` > 0, usually 5.
    """
    if not gamma > 0:
        raise InvalidValueError(f"min-SNR gamma={gamma} is out of range; legal: > 0")
    snr = schedule.snr(timesteps)
    weights = snr.clamp(max=gamma)
    if choose("target", target, TARGETS) != "x0":
        weights = weights / (snr if target == "eps" else snr + 1)
    return weights.float()


def diffusion_loss(
    frame_losses: Float[Tensor, "b f"],
    *,
    timestep_weights: Float[Tensor, "b f"] | None = None,
    frame_weights: Float[Tensor, " f"] | None = None,
) -> Float[Tensor, ""]:
    """The loss to minimise: the mean over clips and frames of weight x loss; without weights, the plain MSE.

    Weights are used as they are: a mean other than 1 scales the loss. Raises InvalidValueError for shapes other than
    `[b, f]` and `[f]`.
    """
    if timestep_weights is not None:
        check_shape("timestep_weights", timestep_weights, frame_losses.shape)
    if frame_weights is not None:
        check_shape("frame_weights", frame_weights, frame_losses.shape[1:])
    for weights in (timestep_weights, frame_weights):
        if weights is not None:
            frame_losses = frame_losses * weights
    return frame_losses.mean()


def loss_by_frame(frame_losses: Float[Tensor, "b f"]) -> Float[Tensor, " f"]:
    """Mean loss of each frame position over the batch, detached."""
    return frame_losses.detach().mean(dim=0)


def loss_by_timestep(
    frame_losses: Float[Tensor, "b f"], timesteps: Int64[Tensor, "b f"], num_timesteps: int, num_buckets: int
) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """(sum of losses, number of frames) in each of `num_buckets` equal ranges of timesteps, detached, float32.

    Sums and numbers add over micro batches and ranks; divide at the end. Equal inputs give equal bits on a GPU too: no
    atomic additions. Raises InvalidValueError unless every loss has one int64 timestep.
    """
    check_int64("timesteps", timesteps)
    check_shape("timesteps", timesteps, frame_losses.shape)
    check_integer("num_buckets", num_buckets)
    if not 1 <= num_buckets <= num_timesteps:
        raise InvalidValueError(f"num_buckets={num_buckets} is out of range; legal: 1..{num_timesteps}")
    bucket = (timesteps * num_buckets).div(num_timesteps, rounding_mode="floor").flatten()
    member = bucket.unsqueeze(0) == torch.arange(num_buckets, device=bucket.device).unsqueeze(1)
    losses = frame_losses.detach().float().flatten()
    return torch.where(member, losses, 0).sum(dim=1), member.sum(dim=1).float()


def condition_dropout(
    probability: float | int, *, seed: int, epoch: int, sample_ids: Int64[Tensor, " b"]
) -> Bool[Tensor, " b"]:
    """True for the samples whose condition is replaced by the null embedding in this epoch."""
    return bernoulli(seed, epoch, sample_ids, Purpose.CONDITION_DROPOUT, probability)
