"""The denoiser: a diffusion transformer with one timestep per frame and block-causal attention (paper section 3.3)."""

from ardist.models.denoiser.model import Denoiser, preset
from ardist.models.denoiser.validation import check_shapes, check_values

__all__ = ["Denoiser", "check_shapes", "check_values", "preset"]
