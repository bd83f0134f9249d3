"""Architecture of the denoiser and its presets (paper section 3.3; the DiT-XL shape)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from ardist.config.base import Section

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"width": 128, "depth": 4, "num_heads": 4},
    "small": {"width": 384, "depth": 12, "num_heads": 6},
    "base": {"width": 768, "depth": 12, "num_heads": 12},
    "xl": {"width": 1152, "depth": 28, "num_heads": 16},
    "released-xl": {
        "width": 1152,
        "depth": 28,
        "num_heads": 16,
        "mask": "released",
        "positions": "sincos",
        "residual": "released",
        "qk_norm": False,
        "context_tokens": 77,
        "context_dim": 768,
        "max_frames": 16,
    },
}


class DenoiserConfig(Section):
    """Shape and variants of the denoiser; ``preset`` fills in what is not given."""

    latent_channels: int = Field(4, ge=1, description="channels C of one latent token")
    tokens_per_frame: int = Field(32, ge=1, description="tokens L of one frame")
    width: int = Field(128, ge=8)
    depth: int = Field(4, ge=1)
    num_heads: int = Field(4, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    mask: Literal["strict", "released", "bidirectional"] = "strict"
    window: int | None = Field(None, ge=1, description="frames a frame may look back to, itself included; null: all")
    positions: Literal["rope", "rope_1d", "sincos"] = "rope"
    max_frames: int = Field(16, ge=1, description="rows of the sincos table in frames; rope has no bound")
    rope_theta: float = Field(
        100.0,
        gt=1,
        description="rope: the pair j of the p pairs of an axis turns by theta ** (-j / p) radians per frame or token, "
        "from 1 down to nearly 1 / theta",
    )
    num_timesteps: int = Field(
        1000, ge=2, le=4096, description="timesteps T that may come in; not fewer than the diffusion's"
    )
    residual: Literal["prenorm", "released"] = "prenorm"
    qk_norm: bool = True
    num_classes: int | None = Field(None, ge=1, description="class-conditional when given; the null class is one more")
    context_tokens: int = Field(0, ge=0, description="tokens K of the context sequence; 0: no context")
    context_dim: int = Field(0, ge=0, description="channels D of a context token")
    attention_backend: Literal["auto", "sdpa", "flex", "flash", "reference"] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset") is not None:
            changes = dict(values)
            name = changes.pop("preset")
            if name not in PRESETS:
                raise ValueError(f"preset {name!r} is not known; legal: {', '.join(PRESETS)}")
            return {**PRESETS[name], **changes}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> DenoiserConfig:
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        if self.positions != "sincos" and (self.head_dim % 2 or self.head_dim < 8):
            raise ValueError(
                f"positions {self.positions!r} rotates pairs of channels: width/num_heads is {self.head_dim}, "
                "legal: even and at least 8"
            )
        if self.positions == "sincos" and self.width % 2:
            raise ValueError(f"positions 'sincos' needs an even width, not {self.width}")
        if self.window is not None and self.mask == "bidirectional":
            raise ValueError(f"window={self.window} has no meaning with mask 'bidirectional'; legal: null")
        if bool(self.context_tokens) != bool(self.context_dim):
            raise ValueError("context_tokens and context_dim are given together or not at all")
        return self

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.width // self.num_heads
