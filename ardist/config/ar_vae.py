"""Architecture and loss of the AR-VAE, and the presets of its architecture (METHOD section 5)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from ardist.config.base import Section
from ardist.errors import did_you_mean

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "image_size": 64,
        "patch_size": 8,
        "width": 128,
        "depth": 2,
        "num_heads": 4,
        "codebook_size": 256,
        "codebook_dim": 64,
        "decoder_channels": 8,
        "decoder_multipliers": (1, 2, 4, 8),
        "decoder_res_blocks": 1,
    },
    "small": {
        "image_size": 128,
        "patch_size": 16,
        "width": 384,
        "depth": 8,
        "num_heads": 6,
        "codebook_size": 512,
        "codebook_dim": 128,
        "decoder_channels": 48,
        "decoder_multipliers": (1, 1, 2, 2, 4),
        "decoder_res_blocks": 1,
    },
    "full": {
        "image_size": 256,
        "patch_size": 16,
        "width": 1024,
        "depth": 24,
        "num_heads": 16,
        "codebook_size": 1024,
        "codebook_dim": 256,
        "decoder_channels": 128,
        "decoder_multipliers": (1, 1, 2, 2, 4),
        "decoder_res_blocks": 2,
    },
}


class ARVAEConfig(Section):
    """Shape of the autoencoder; ``preset`` fills in what is not given. Without it the shape is that of ``tiny``."""

    image_size: int = Field(64, ge=8, description="height and width of a frame in pixels")
    patch_size: int = Field(8, ge=2)
    width: int = Field(128, ge=8)
    depth: int = Field(2, ge=1, description="transformer layers of the encoder, and as many of the decoder")
    num_heads: int = Field(4, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    latent_channels: int = Field(4, ge=2, description="channels C of one latent token")
    tokens_per_frame: int = Field(32, ge=1, description="tokens L of one frame")
    codebook_size: int = Field(256, ge=2, description="entries of the soft codebook")
    codebook_dim: int = Field(64, ge=1, description="channels of one codebook entry")
    decoder_channels: int = Field(8, ge=4, description="channels of the pixel decoder at full resolution")
    decoder_multipliers: tuple[int, ...] = Field(
        (1, 2, 4, 8), min_length=1, description="of decoder_channels, full resolution first; one doubling between each"
    )
    decoder_res_blocks: int = Field(1, ge=1, description="residual blocks at each resolution of the pixel decoder")
    temporal: bool = Field(False, description="with the temporally auto-regressive decoder blocks (stage 2)")
    temporal_window: int | None = Field(
        16, ge=1, description="frames a frame's decoding may look back to, itself included; null: all"
    )
    temporal_positions: Literal["rope", "none"] = Field(
        "rope", description="how temporal attention knows the distance of two frames; none: only their order"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset") is not None:
            changes = dict(values)
            name = changes.pop("preset")
            if name not in PRESETS:
                hint = did_you_mean(str(name), PRESETS)
                raise ValueError(f"preset {name!r} is not known{hint}; legal: {', '.join(PRESETS)}")
            return {**PRESETS[name], **changes}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> ARVAEConfig:
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        if self.temporal_positions == "rope" and (self.width // self.num_heads) % 2:
            raise ValueError(f"rope needs an even head size; width / num_heads is {self.width // self.num_heads}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if min(self.decoder_multipliers) < 1:
            raise ValueError(f"decoder_multipliers {self.decoder_multipliers} must all be 1 or more")
        upsampling = 2 ** (len(self.decoder_multipliers) - 1)
        if upsampling != self.patch_size:
            raise ValueError(
                f"{len(self.decoder_multipliers)} decoder_multipliers enlarge a patch {upsampling} times, but "
                f"patch_size is {self.patch_size}; it must be 2 to the power of (number of multipliers - 1)"
            )
        return self


class ARVAELossConfig(Section):
    """What the autoencoder is trained to minimise; every term is a mean, never a sum, over values."""

    reconstruction: Literal["l1", "l2"] = "l1"
    kl_weight: float = Field(0.0, ge=0, description="0 in the released runs: latents are normalised instead")
    flicker_weight: float = Field(
        0.0, ge=0, description="of the error's mean absolute change from frame to frame; for clips; 0: as in the paper"
    )
    perceptual: Literal["none", "lpips"] = "none"
    perceptual_weight: float = Field(1.0, ge=0)
    vgg_path: str | None = Field(
        None, description="ImageNet weights of VGG16 as safetensors (keys features.0.weight …)"
    )
    vgg_digest: str | None = Field(
        None, pattern=r"^[0-9a-f]{64}$", description="sha256 of that file; null: as in the .sha256 file beside it"
    )
    lpips_path: str | None = Field(None, description="LPIPS v0.1 VGG heads as safetensors (keys lin0.model.1.weight …)")
    lpips_digest: str | None = Field(
        None, pattern=r"^[0-9a-f]{64}$", description="sha256 of that file; null: as in the .sha256 file beside it"
    )
    adversarial_weight: float = Field(0.0, ge=0, description="times the adaptive weight; 0: no discriminator")
    adversarial_start: int = Field(50_000, ge=0, description="first step (0-based) with a discriminator")
    discriminator_channels: int = Field(64, ge=1, description="channels of the discriminator's first layer")
    discriminator_layers: int = Field(3, ge=1, le=6, description="halvings of the resolution; 3: PatchGAN's own")
    discriminator_lr: float | None = Field(
        None, gt=0, description="peak learning rate of the discriminator's AdamW; null: optimizer.lr"
    )

    @model_validator(mode="after")
    def _perceptual_has_its_weights(self) -> ARVAELossConfig:
        needed = ("vgg_path", "lpips_path")
        missing = [name for name in needed if getattr(self, name) is None]
        if self.perceptual == "lpips" and missing:
            raise ValueError(f"perceptual 'lpips' needs {', '.join(missing)}; or choose perceptual 'none'")
        return self
