"""What the AR-VAE learns: stage 1 on frames, stage 2 on clips with the temporal blocks only (METHOD section 5).

Every term is a mean over the values of a micro-batch, and what is random about a sample is a function of (seed, epoch,
sample id), so that the loss of a global batch does not depend on how it was cut.
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
from ardist.models.ar_vae import ARVAE
from ardist.models.ar_vae.fidelity import SSIM_WINDOW, ssim
from ardist.models.ar_vae.flops import ar_vae_flops
from ardist.models.ar_vae.latents import LatentStatistics
from ardist.models.ar_vae.losses import AutoencoderLoss
from ardist.models.ar_vae.pixel_decoder import last_layer_gradient
from ardist.models.ar_vae.posterior import Posterior
from ardist.training import augmentation
from ardist.training.adversary import Adversary
from ardist.training.objective import Forward, Inputs

MAX_PSNR = 100.0
"""What an exact reconstruction counts as, in dB: one such clip must not make a mean infinite."""


class AutoencoderObjective:
    """Reconstruction, perceptual distance, KL and a discriminator's verdict, as ``config.ar_vae_loss`` weights them."""

    def __init__(
        self, config: TrainConfig, manifest: Manifest, device: torch.device, adversary: Adversary | None = None
    ) -> None:
        assert config.ar_vae is not None
        self.config = config
        self.model_config = config.ar_vae
        self.device = device
        self.adversary = adversary
        self.loss_config = config.ar_vae_loss
        frames, height, width, _ = manifest.shape
        frames = min(frames, config.augmentation.frames or frames)
        self.tokens_per_clip = frames * self.model_config.tokens_per_frame
        self.flops_per_clip = ar_vae_flops(self.model_config, frames, (height, width), self._choose_trainable)
        self.autocast = torch.autocast(
            device.type, torch.bfloat16, enabled=config.training.precision == "bf16", cache_enabled=False
        )
        self._criterion: AutoencoderLoss | None = None

    @property
    def criterion(self) -> AutoencoderLoss:
        """The loss without the discriminator; reads the perceptual weights when it is first needed."""
        if self._criterion is None:
            self._criterion = AutoencoderLoss(self.loss_config).to(self.device)
        return self._criterion

    def build_model(self) -> nn.Module:
        """A fresh AR-VAE with the parameters that this stage trains."""
        model = ARVAE(self.model_config)
        self._choose_trainable(model)
        model.set_activation_checkpointing(self.config.training.activation_checkpointing != "none")
        return model

    def _choose_trainable(self, model: ARVAE) -> None:
        if self.config.trainable == "temporal":
            model.freeze_all_but_temporal()

    def prepare(self, batch: Batch) -> Inputs:
        """The pixels as they are stored, one byte each until their micro-batch's turn comes, and what is drawn."""
        drawn = augmentation.draw(self.config.augmentation, self.config.seed, batch.epoch, batch.sample_ids)
        pixels = augmentation.choose_frames(
            self.config.augmentation, batch.values, self.config.seed, batch.epoch, batch.sample_ids
        )
        inputs: Inputs = {"pixels": pixels, **drawn}
        shape = (pixels.shape[1], self.model_config.tokens_per_frame, self.model_config.latent_channels)
        if self.config.augmentation.latent_noise:
            inputs["latent_noise"] = augmentation.latent_noise(
                self.config.augmentation, self.config.seed, batch.epoch, batch.sample_ids, shape
            )
        if self.loss_config.kl_weight:
            inputs["noise"] = counter_rng.normal(
                self.config.seed, batch.epoch, batch.sample_ids, Purpose.POSTERIOR, shape
            )
        return inputs

    def loss(self, forward: Forward, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of all terms, and each term by itself.

        With a KL weight the latents are sampled; without one they are the posterior's mean.
        """
        frames = augmentation.augment(_frames(inputs["pixels"]), inputs)
        reconstruction, posterior, features = forward(frames, inputs.get("noise"), inputs.get("latent_noise"))
        if self.adversary is None or not self.adversary.active:
            with self.autocast:
                loss, terms = self.criterion(reconstruction, frames, posterior)
            return loss, terms
        return self._adversarial_loss(self.adversary, reconstruction, frames, posterior, features)

    def _adversarial_loss(
        self, adversary: Adversary, reconstruction: Tensor, frames: Tensor, posterior: Posterior, features: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same with the discriminator's verdict.

        Both losses are differentiated as far as the decoded frames only. From there their gradients at the last layer
        follow for the adaptive weight, and one backward pass of their weighted sum goes through the autoencoder.
        """
        shown = reconstruction.detach().requires_grad_()
        with self.autocast:
            distance, terms = self.criterion.distance(shown, frames)
        (gradient,) = torch.autograd.grad(distance, shown)
        verdict = adversary.judge(shown, frames)
        adversary.compare(last_layer_gradient(features, gradient), last_layer_gradient(features, verdict.gradient))
        weight = self.loss_config.adversarial_weight * adversary.weight
        divergence, more = self.criterion.divergence(posterior)
        carrier = (reconstruction * (gradient + weight * verdict.gradient)).sum() + divergence
        value = distance.detach() + weight * verdict.loss + divergence.detach()
        # The value of the loss with the gradient of the carrier.
        return carrier + (value - carrier.detach()), terms | more | verdict.terms

    def evaluate(self, forward: Forward, clip: Batch) -> dict[str, list[float]]:
        """L1 and squared error of every frame; SSIM, flicker and latent statistics of the clip."""
        frames = _frames(clip.values)
        reconstruction, posterior, _ = forward(frames)
        reconstruction = reconstruction.clamp(0.0, 1.0)
        error = reconstruction - frames
        measures = {
            "l1": error.abs().flatten(2).mean(dim=2).flatten().tolist(),
            "mse": error.square().flatten(2).mean(dim=2).flatten().tolist(),
            "latents": LatentStatistics.of(posterior.mode()).to_list(),
        }
        if frames.shape[1] > 1:
            measures["flicker"] = [error.diff(dim=1).abs().mean().item()]
        if min(frames.shape[-2:]) >= SSIM_WINDOW:
            measures["ssim"] = ssim(reconstruction, frames).tolist()
        return measures

    def summarise(self, clips: list[dict[str, list[float]]]) -> dict[str, Any]:
        """Means over clips of L1, PSNR [dB, errors pooled over a clip's frames], SSIM and flicker; latents over all."""
        l1, mse = (torch.tensor([clip[name] for clip in clips], dtype=torch.float64) for name in ("l1", "mse"))
        psnr = -10.0 * torch.log10(mse.mean(dim=1).clamp(min=10 ** (-MAX_PSNR / 10)))
        means: dict[str, Any] = {
            name: sum(clip[name][0] for clip in clips) / len(clips) for name in ("ssim", "flicker") if name in clips[0]
        }
        latents = LatentStatistics.from_lists(
            [clip["latents"] for clip in clips], self.model_config.tokens_per_frame, self.model_config.latent_channels
        )
        return {
            "loss": float(l1.mean()),
            "l1": float(l1.mean()),
            "psnr": float(psnr.mean()),
            **means,
            "loss_per_frame": l1.mean(dim=0).tolist(),
            **latents.describe(),
            "clips": len(clips),
        }

    def describe(self, sample_ids: Tensor, epoch: int, num_frames: int) -> dict[str, Any]:
        """Nothing that could make a step bad is added to the samples."""
        return {}


def _frames(pixels: Tensor) -> Tensor:
    """uint8 [m, F, H, W, 3] to float [m, F, 3, H, W] in [0, 1]."""
    return pixels.permute(0, 1, 4, 2, 3).float() / 255.0
