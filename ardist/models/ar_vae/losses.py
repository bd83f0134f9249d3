"""The autoencoder's own loss: reconstruction, flicker, perceptual distance, KL; the discriminator is elsewhere.

Scale: every term is a mean over values, so weights mean the same at any resolution, clip length and batch size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ardist.config.ar_vae import ARVAELossConfig
from ardist.errors import choose
from ardist.models.ar_vae.perceptual import LPIPS
from ardist.models.ar_vae.posterior import Posterior

RECONSTRUCTION = ("l1", "l2")


def reconstruction_loss(
    kind: str, reconstruction: Float[Tensor, "b f 3 h w"], frames: Float[Tensor, "b f 3 h w"]
) -> Float[Tensor, ""]:
    """Mean absolute (`l1`) or squared (`l2`) error over all values of frames in [0, 1], in float32."""
    choose("reconstruction", kind, RECONSTRUCTION)
    distance = F.l1_loss if kind == "l1" else F.mse_loss
    return distance(reconstruction.float(), frames.float())


class AutoencoderLoss(nn.Module):
    """Reconstruction + perceptual + KL; without trainable parameters.

    Raises `CheckpointError` when LPIPS is asked for and its weights are missing or others than stated.
    """

    def __init__(self, config: ARVAELossConfig) -> None:
        super().__init__()
        self.config = config
        self.lpips: LPIPS | None = None
        if config.perceptual == "lpips":
            # The configuration refuses lpips without both paths.
            self.lpips = LPIPS.load(
                config.vgg_path or "", config.vgg_digest, config.lpips_path or "", config.lpips_digest
            )

    def distance(
        self, reconstruction: Float[Tensor, "b f 3 h w"], frames: Float[Tensor, "b f 3 h w"]
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Reconstruction + flicker + perceptual loss, and each without weight and gradient."""
        config = self.config
        total = reconstruction_loss(config.reconstruction, reconstruction, frames)
        terms: dict[str, Tensor] = {config.reconstruction: total.detach()}
        if config.flicker_weight and frames.shape[1] > 1:
            flicker = (reconstruction.float() - frames.float()).diff(dim=1).abs().mean()
            total = total + config.flicker_weight * flicker
            terms["flicker"] = flicker.detach()
        if self.lpips is not None:
            images = [part.flatten(0, 1).float() * 2.0 - 1.0 for part in (reconstruction, frames)]
            perceptual = self.lpips(*images).mean()
            total = total + config.perceptual_weight * perceptual
            terms["lpips"] = perceptual.detach()
        return total, terms

    def divergence(self, posterior: Posterior) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """KL times its weight (0: only a number to watch), and KL without gradient."""
        weight = self.config.kl_weight
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight > 0):
            kl = posterior.kl()
        return weight * kl if weight else torch.zeros_like(kl), {"kl": kl.detach()}

    def forward(
        self, reconstruction: Float[Tensor, "b f 3 h w"], frames: Float[Tensor, "b f 3 h w"], posterior: Posterior
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The weighted sum, and its unweighted terms without gradient."""
        distance, terms = self.distance(reconstruction, frames)
        divergence, more = self.divergence(posterior)
        return distance + divergence, terms | more
