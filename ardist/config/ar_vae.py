"""Architecture of the AR-VAE and its presets (METHOD section 5)."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from ardist.config.base import Section

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"image_size": 64, "patch_size": 8, "width": 128, "depth": 4, "num_heads": 4},
    "small": {"image_size": 128, "patch_size": 16, "width": 384, "depth": 8, "num_heads": 6},
    "full": {"image_size": 256, "patch_size": 16, "width": 1024, "depth": 24, "num_heads": 16},
}


class ARVAEConfig(Section):
    """Shape of the autoencoder; ``preset`` fills in what is not given."""

    image_size: int = Field(64, ge=8, description="height and width of a frame in pixels")
    patch_size: int = Field(8, ge=2)
    width: int = Field(128, ge=8)
    depth: int = Field(4, ge=1)
    num_heads: int = Field(4, ge=1)
    latent_channels: int = Field(4, ge=1)
    tokens_per_frame: int = Field(32, ge=1)
    temporal: bool = Field(False, description="with the temporally auto-regressive decoder blocks (stage 2)")

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
    def _consistent(self) -> ARVAEConfig:
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        return self
