"""Attention under the block-causal mask of AR-Diffusion (paper section 3.3): one mask, several backends."""

from ardist.models.attention.dispatch import BACKENDS, attention, available_backends, resolve_backend
from ardist.models.attention.layout import AttentionLayout, MaskKind

__all__ = ["BACKENDS", "AttentionLayout", "MaskKind", "attention", "available_backends", "resolve_backend"]
