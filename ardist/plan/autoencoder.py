"""Memory of a training pass of the AR-VAE with its losses and discriminator, on shapes alone.

The very passes are run on the meta device, where nothing is computed, and the bytes of the tensors that are alive at
the same time are counted. What belongs to the weights is the same for one clip and for two: the difference is a clip's.
"""

from __future__ import annotations

import torch

from ardist.config import TrainConfig
from ardist.models.ar_vae import ARVAE
from ardist.models.ar_vae.discriminator import PatchDiscriminator, discriminator_hinge_loss, generator_hinge_loss
from ardist.models.ar_vae.losses import reconstruction_loss
from ardist.models.ar_vae.perceptual import LPIPS
from ardist.plan.activations import LiveBytes

MODES = ("none", "full")


def autoencoder_bytes(
    config: TrainConfig, num_frames: int, size: tuple[int, int], micro_batch_size: int
) -> dict[str, int]:
    """Bytes that a micro-batch needs at the peak, without weights and their gradients, by checkpointing mode."""
    found = {}
    for mode in MODES:
        one, two = (peak_bytes(config, num_frames, size, clips, mode) for clips in (1, 2))
        # Of a small model the highest peak is that of its gradients, which says nothing about clips.
        found[mode] = micro_batch_size * max(after - before for before, after in zip(one, two, strict=True))
    return found


def peak_bytes(
    config: TrainConfig,
    num_frames: int,
    size: tuple[int, int],
    clips: int,
    checkpointing: str,
    device: str = "meta",
) -> tuple[int, int]:
    """Most bytes that are alive at once in the passes over `clips` clips: until the backward pass of the autoencoder,
    and to its end."""
    assert config.ar_vae is not None
    losses = config.ar_vae_loss
    dtype = torch.float32 if config.training.precision == "fp32" else torch.bfloat16
    with torch.device(device):
        model = ARVAE(config.ar_vae).to(dtype)
        judge = PatchDiscriminator(losses.discriminator_channels, losses.discriminator_layers).to(dtype)
        lpips = LPIPS().requires_grad_(False) if losses.perceptual == "lpips" else None
    if config.trainable == "temporal":
        model.freeze_all_but_temporal()
    model.set_activation_checkpointing(checkpointing != "none")
    with LiveBytes() as live:
        frames = torch.empty(clips, num_frames, 3, *size, device=device)
        reconstruction, posterior, _ = model(frames.to(dtype))
        shown = reconstruction.detach().float().requires_grad_()
        distance = reconstruction_loss(losses.reconstruction, shown, frames)
        if lpips is not None:
            images = [part.flatten(0, 1) * 2.0 - 1.0 for part in (shown, frames)]
            distance = distance + lpips(*images).mean()
            del images
        (gradient,) = torch.autograd.grad(distance, shown)
        del distance
        if losses.adversarial_weight:
            fake, real = judge(shown), judge(frames)
            (more,) = torch.autograd.grad(generator_hinge_loss(fake), shown, retain_graph=True)
            discriminator_hinge_loss(real, fake).backward()  # as far as the frames, like DeepSpeed's
            shown.grad = None
            gradient = gradient + more
            del fake, real, more
        total = (reconstruction * gradient).sum() + posterior.kl()
        del reconstruction, posterior, shown, gradient
        before = live.peak
        total.backward()
    return before, live.peak
