"""The AR-VAE: frames to a few unit-length latent tokens each, and back, over any number of frames."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ardist.config import ARVAEConfig
from ardist.config.ar_vae import PRESETS
from ardist.errors import InvalidValueError, choose
from ardist.models.ar_vae.decoder import TokenDecoder
from ardist.models.ar_vae.encoder import Encoder
from ardist.models.ar_vae.pixel_decoder import PixelDecoder
from ardist.models.ar_vae.posterior import Posterior, unit_norm
from ardist.models.ar_vae.temporal import DecoderCache

DECODE_CHUNK = 16
"""Frames that `decode` works on at a time; bounds memory, does not change the result."""


def preset(name: str, **changes: Any) -> ARVAEConfig:
    """The configuration `tiny`, `small` or `full` with `changes`, such as ``temporal=True``.

    Raises `InvalidValueError` for an unknown name; unknown or inconsistent fields are pydantic validation errors.
    """
    return ARVAEConfig(**{**PRESETS[choose("preset", name, PRESETS)], **changes})


class ARVAE(nn.Module):
    """Time-agnostic encoder and temporally auto-regressive decoder (paper section "AR-VAE", METHOD section 5).

    Frames are `[b f 3 h w]` in [0, 1], any f, h and w divisible by ``config.patch_size``. Latents are
    `[b f l c]`, unit length over c. With ``config.temporal`` frame t is decoded from the latents of frames
    <= t only, without it from its own.
    """

    def __init__(self, config: ARVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = TokenDecoder(config)
        self.pixel_decoder = PixelDecoder(config)

    def encode(
        self, frames: Shaped[Tensor, "..."], *, sample: bool = False, generator: torch.Generator | None = None
    ) -> Float[Tensor, "b f l c"]:
        """Latents of frames `[b f 3 h w]` in [0, 1], float32: the posterior's mean, or a sample of it.

        Raises `InvalidValueError` for wrong shape, type or range.
        """
        self._check_frames(frames)
        low, high = (float(value) for value in torch.aminmax(frames.detach()))
        if not (low >= 0.0 and high <= 1.0):  # also true for NaN
            raise InvalidValueError(
                f"frames must lie in [0, 1], these are in [{low:g}, {high:g}]; divide uint8 frames by 255"
            )
        posterior = self.posterior(frames)
        if not sample:
            return posterior.mode()
        noise = torch.randn(posterior.mean.shape, generator=generator, device=posterior.mean.device)
        return posterior.sample(noise)

    def posterior(self, frames: Float[Tensor, "b f 3 h w"]) -> Posterior:
        """Mean and log-variance of the latents before normalisation; does not look at the values of the frames."""
        batch = len(frames)
        pixels = frames.flatten(0, 1).to(self.encoder.patch_embed.weight.dtype) * 2.0 - 1.0
        mean, logvar = self.encoder(pixels)
        return Posterior(*(rearrange(part, "(b f) l c -> b f l c", b=batch) for part in (mean, logvar)))

    def forward(
        self,
        frames: Float[Tensor, "b f 3 h w"],
        noise: Float[Tensor, "b f l c"] | None = None,
        latent_noise: Float[Tensor, "b f l c"] | None = None,
    ) -> tuple[Float[Tensor, "b f 3 h w"], Posterior, Float[Tensor, "bf z h w"]]:
        """Reconstruction (not clamped), posterior and input of the last convolution; for training.

        With `noise` the latents are sampled; `latent_noise` is added to what is decoded. Checks shapes but not the
        range of the frames: no device synchronisation. What `last_layer_gradient` needs comes last.
        """
        self._check_frames(frames)
        posterior = self.posterior(frames)
        latents = posterior.mode() if noise is None else posterior.sample(noise)
        if latent_noise is not None:
            latents = unit_norm(latents + latent_noise)
        reconstruction, features = self._pixels(latents, frames.shape[-2:], self.new_cache())
        return reconstruction, posterior, features

    def new_cache(self) -> DecoderCache:
        """An empty cache, for decoding a video piece by piece."""
        return DecoderCache(self.config.temporal_window)

    def decode(
        self,
        latents: Shaped[Tensor, "..."],
        *,
        size: tuple[int, int] | None = None,
        cache: DecoderCache | None = None,
        chunk: int = DECODE_CHUNK,
    ) -> Float[Tensor, "b f 3 h w"]:
        """Frames in [0, 1], float32, of latents `[b f l c]`.

        `size`: height and width, by default the configured image size. `cache`: of the frames decoded before
        these (`new_cache` for the first); it is brought up to date. Raises `InvalidValueError` for wrong shapes.
        """
        self._check_latents(latents)
        if chunk < 1:
            raise InvalidValueError(f"chunk={chunk} must be 1 or more frames")
        size = self._size(size)
        cache = self.new_cache() if cache is None else cache
        pieces = [
            self._pixels(unit_norm(piece), size, cache)[0].clamp(0.0, 1.0) for piece in latents.split(chunk, dim=1)
        ]
        return torch.cat(pieces, dim=1)

    def decode_stream(
        self,
        latents: Shaped[Tensor, "..."] | Iterable[Shaped[Tensor, "..."]],
        *,
        size: tuple[int, int] | None = None,
        cache: DecoderCache | None = None,
    ) -> Iterator[Float[Tensor, "b f 3 h w"]]:
        """Decode a tensor frame by frame, or pieces `[b f l c]` as they come; yields the frames of each piece.

        Gives the pixels of `decode` over the whole clip. Memory per piece is constant with a temporal window.
        """
        cache = self.new_cache() if cache is None else cache
        if isinstance(latents, Tensor):
            self._check_latents(latents)
            latents = latents.split(1, dim=1)
        for piece in latents:
            yield self.decode(piece, size=size, cache=cache)

    def with_temporal_blocks(self) -> ARVAE:
        """A temporal model that decodes as this per-frame one does (the start of stage 2); weights are copied."""
        if self.config.temporal:
            raise InvalidValueError("the model has temporal blocks already")
        model = ARVAE(self.config.model_copy(update={"temporal": True})).to(self.encoder.patch_embed.weight)
        incompatible = model.load_state_dict(self.state_dict(), strict=False)
        assert all(name.startswith("decoder.temporal.") for name in incompatible.missing_keys)
        assert not incompatible.unexpected_keys
        return model

    def freeze_all_but_temporal(self) -> None:
        """Leave only the temporal blocks to be trained, as stage 2 does (METHOD section 5)."""
        self.requires_grad_(False)
        for parameter in self.temporal_parameters():
            parameter.requires_grad_(True)

    def temporal_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that stage 2 trains."""
        return self.decoder.temporal.parameters()

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute the transformer layers in the backward pass instead of keeping their activations."""
        self.encoder.activation_checkpointing = enabled
        self.decoder.activation_checkpointing = enabled

    def _pixels(
        self, latents: Float[Tensor, "b f l c"], size: tuple[int, ...], cache: DecoderCache
    ) -> tuple[Float[Tensor, "b f 3 h w"], Float[Tensor, "bf z h w"]]:
        grid = (size[0] // self.config.patch_size, size[1] // self.config.patch_size)
        codes = self.decoder(latents.to(self.decoder.embed.weight.dtype), grid, cache)
        pixels, features = self.pixel_decoder(codes)
        frames = rearrange(pixels.float() * 0.5 + 0.5, "(b f) c h w -> b f c h w", b=len(latents))
        return frames, features

    def _check_frames(self, frames: Tensor) -> None:
        if frames.dim() != 5 or frames.shape[2] != 3 or 0 in frames.shape:
            raise InvalidValueError(
                f"frames have shape {tuple(frames.shape)}; expected [batch, frames, 3, height, width], none of them 0"
            )
        if not frames.is_floating_point():
            raise InvalidValueError(
                f"frames are {frames.dtype}; expected floating point in [0, 1] (divide uint8 by 255)"
            )
        self._size((frames.shape[3], frames.shape[4]))

    def _check_latents(self, latents: Tensor) -> None:
        tokens = (self.config.tokens_per_frame, self.config.latent_channels)
        shape = tuple(latents.shape)
        if len(shape) != 4 or shape[2:] != tokens or 0 in shape:
            raise InvalidValueError(
                f"latents have shape {shape}; this model decodes [batch, frames, {tokens[0]}, {tokens[1]}]"
            )
        if not latents.is_floating_point():
            raise InvalidValueError(f"latents are {latents.dtype}; expected floating point")

    def _size(self, size: tuple[int, int] | None) -> tuple[int, int]:
        height, width = size or (self.config.image_size, self.config.image_size)
        patch = self.config.patch_size
        if height < patch or width < patch or height % patch or width % patch:
            raise InvalidValueError(
                f"frames of {height}x{width} pixels cannot be cut into patches of {patch}x{patch}; "
                f"resize or crop height and width to multiples of {patch}"
            )
        return height, width
