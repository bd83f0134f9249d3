"""The patch discriminator of stage 1 and the hinge losses of both sides (METHOD section 5)."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ardist.models.ar_vae.pixel_decoder import group_norm

MAX_MULTIPLIER = 8
MAX_ADAPTIVE_WEIGHT = 1e4


def smallest_side(num_layers: int) -> int:
    """Pixels a side that leave one patch: two 4x4 convolutions of stride 1 after `num_layers` halvings."""
    return int(3 * 2**num_layers)


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): one logit per overlapping patch, high for real ones.

    Group norm where the original has batch norm: a frame's logits then depend on that frame alone, so the loss is
    the same for every micro batch size and number of ranks.
    """

    def __init__(self, channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        before = channels
        for i in range(1, num_layers + 1):
            after = channels * min(2**i, MAX_MULTIPLIER)
            stride = 2 if i < num_layers else 1
            layers += [nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=False), group_norm(after)]
            layers.append(nn.LeakyReLU(0.2))
            before = after
        self.layers = nn.Sequential(*layers, nn.Conv2d(before, 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, frames: Float[Tensor, "b f 3 h w"]) -> Float[Tensor, "bf 1 ph pw"]:
        """Logits of the patches of every frame; frames in [0, 1]."""
        weight = self.layers.get_parameter("0.weight")
        logits: Tensor = self.layers(frames.flatten(0, 1).to(weight.dtype) * 2.0 - 1.0)
        return logits.float()


def discriminator_hinge_loss(real: Float[Tensor, "*n"], fake: Float[Tensor, "*m"]) -> Float[Tensor, ""]:
    """What the discriminator minimises: real patches above 1, fake ones below -1."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def generator_hinge_loss(fake: Float[Tensor, "*n"]) -> Float[Tensor, ""]:
    """What the autoencoder minimises: the negative mean logit of its reconstructions."""
    return -fake.mean()


def adaptive_weight(reconstruction: Float[Tensor, "*n"], adversarial: Float[Tensor, "*n"]) -> Float[Tensor, ""]:
    """Weight that makes both losses pull equally at the last layer, from their gradients there (Esser et al. 2021,
    section 3.1)."""
    weight: Tensor = reconstruction.float().norm() / (adversarial.float().norm() + 1e-4)
    return weight.clamp(0.0, MAX_ADAPTIVE_WEIGHT).detach()
