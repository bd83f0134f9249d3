"""What can go quietly wrong in an AR-VAE: latents that do not suit a denoiser, a discriminator that skips alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ardist.events import events
from ardist.models.ar_vae.latents import latent_problems
from ardist.training.callbacks.base import Callback

if TYPE_CHECKING:
    from ardist.training.trainer import Trainer


class LatentCheck(Callback):
    """After each validation: constant channels and tokens off the unit sphere are counted as ``ar_vae.latents``."""

    def after_step(self, trainer: Trainer) -> None:
        record = trainer.records.last.get("validation")
        if trainer.world.is_main and record is not None and record["step"] == trainer.step:
            for problem in latent_problems(record):
                events.count("ar_vae.latents", step=trainer.step, problem=problem)


class DiscriminatorSkips(Callback):
    """Steps in which only the discriminator's gradient was not finite, read from the device where the autoencoder's
    outcomes are: at log points, before a checkpoint is saved and before the run goes back to one."""

    def after_step(self, trainer: Trainer) -> None:
        adversary = trainer.adversary
        if adversary is None or not trainer.outcomes_due:
            return
        now = int(adversary.skipped_alone)
        for _ in range(now - adversary.skips_told if trainer.world.is_main else 0):  # equal on all ranks
            events.count("training.skipped_discriminator_step", up_to_step=trainer.step)
        adversary.skips_told = now
