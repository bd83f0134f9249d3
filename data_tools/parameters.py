"""What a build does to videos (part of the dataset's identity) and how it does it here (not part of it)."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ardist.config.base import Section

RESIZE = "bicubic-short-side-centre-crop-1"
"""Name of the pixel pipeline; changes whenever the same video would give other pixels."""


class EncoderIdentity(Section):
    """Plain pixels, or the autoencoder that makes the latents."""

    kind: Literal["pixels", "latents"] = "pixels"
    weights_digest: str | None = None
    config_digest: str | None = None
    precision: Literal["fp32", "bf16"] | None = None

    @model_validator(mode="after")
    def _complete(self) -> EncoderIdentity:
        given = (self.weights_digest, self.config_digest, self.precision)
        if any(value is None for value in given) != (self.kind == "pixels"):
            raise ValueError("latents need weights_digest, config_digest and precision; pixels have none of them")
        return self


class BuildParameters(Section):
    """Everything that decides which samples come out; equal parameters over equal videos give equal datasets."""

    encoder: EncoderIdentity = EncoderIdentity()
    num_frames: int = Field(16, ge=1, le=4096, description="F, frames of a clip")
    size: int = Field(256, ge=8, le=4096, description="height and width of a frame in pixels")
    stride: int = Field(16, ge=1, description="frames from the start of a clip to the start of the next")
    fps: str | None = Field(None, description="frames per second, such as 8 or 30000/1001; null: each video's own")
    max_clips_per_video: int | None = Field(None, ge=1, description="evenly spaced when there are more")
    portion: tuple[float, float] = Field((0.0, 1.0), description="part of every video that clips may lie in")
    samples_per_shard: int = Field(ge=1, le=2**20)
    classes_from_folders: bool = False
    labels_digest: str | None = Field(None, description="sha256 of the labels file")
    limit_videos: int | None = Field(None, ge=1)
    limit_clips: int | None = Field(None, ge=1)
    max_pixels: int = Field(8192 * 4320, ge=64, description="largest accepted frame, before resizing")
    max_seconds: float = Field(24 * 3600.0, gt=0)
    max_aspect: float = Field(8.0, ge=1, description="largest accepted ratio of the sides")
    resize: str = RESIZE

    @field_validator("fps", mode="before")
    @classmethod
    def _rate(cls, value: Any) -> Any:
        if value is None:
            return None
        try:
            rate = Fraction(str(value)).limit_denominator(1_000_000)
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"fps {value!r} is not a number such as 8, 29.97 or 30000/1001") from None
        if not Fraction(1, 100) <= rate <= 1000:
            raise ValueError(f"fps {value} is outside 0.01 .. 1000")
        return str(rate)

    @field_validator("portion")
    @classmethod
    def _interval(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] < value[1] <= 1:
            raise ValueError(f"portion {value[0]}:{value[1]} is not an interval within 0:1")
        return value

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """[H, W, 3] of a decoded frame."""
        return (self.size, self.size, 3)

    def sample_parameters(self, fps: str) -> dict[str, object]:
        """What, besides source and span, decides a sample's content; hashed into its key."""
        return {
            "encoder": self.encoder.model_dump(mode="json"),
            "num_frames": self.num_frames,
            "size": self.size,
            "fps": fps,
            "resize": self.resize,
        }


def default_samples_per_shard(bytes_per_sample: int) -> int:
    """Enough samples for about 256 MiB, at least 64 and at most 8192."""
    return max(64, min(8192, 256 * 2**20 // max(1, bytes_per_sample)))
