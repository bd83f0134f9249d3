"""The diagonal Gaussian that the encoder predicts for each latent token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

LOGVAR_RANGE = (-30.0, 20.0)


def unit_norm(latents: Float[Tensor, "*shape c"]) -> Float[Tensor, "*shape c"]:
    """Each token divided by its Euclidean length, in float32 (METHOD section 3: latents lie on the unit sphere)."""
    return F.normalize(latents.float(), dim=-1)


@dataclass(frozen=True)
class Posterior:
    """Mean and log-variance of the latent tokens, float32, before normalisation."""

    mean: Float[Tensor, "b f l c"]
    logvar: Float[Tensor, "b f l c"]

    def mode(self) -> Float[Tensor, "b f l c"]:
        """The most likely latents, unit length per token."""
        return unit_norm(self.mean)

    def sample(self, noise: Float[Tensor, "b f l c"]) -> Float[Tensor, "b f l c"]:
        """Latents drawn with the given standard normal noise, unit length per token."""
        return unit_norm(self.mean + torch.exp(0.5 * self.logvar) * noise)

    def kl(self) -> Float[Tensor, ""]:
        """KL divergence from the standard normal in nats, mean (not sum) over all latent values."""
        return 0.5 * torch.mean(self.mean.square() + self.logvar.exp() - 1.0 - self.logvar)
