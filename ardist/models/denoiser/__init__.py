"""The denoiser: a diffusion transformer with one timestep per frame and block-causal attention (paper section 3.3)."""

from ardist.models.denoiser.model import Denoiser, preset
from ardist.models.denoiser.validation import (
    check_condition_shapes,
    check_inputs,
    check_shapes,
    check_values,
    check_window,
)

__all__ = [
    "Denoiser",
    "check_condition_shapes",
    "check_inputs",
    "check_shapes",
    "check_values",
    "check_window",
    "preset",
]
