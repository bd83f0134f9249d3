"""The AR-VAE: per-frame encoder, temporally auto-regressive decoder, and the losses it is trained with."""

from ardist.config import ARVAEConfig
from ardist.models.ar_vae.model import ARVAE, preset
from ardist.models.ar_vae.posterior import Posterior
from ardist.models.ar_vae.temporal import DecoderCache

__all__ = ["ARVAE", "ARVAEConfig", "DecoderCache", "Posterior", "preset"]
