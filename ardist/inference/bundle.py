"""Bundles: one directory with everything that sampling needs, checked when written and when opened.

``config.json``               format, version, configurations, provenance, sha256 of every other file
``denoiser.safetensors``      averaged (EMA) weights; ``denoiser_raw.safetensors`` the last ones
``ar_vae.safetensors``        the AR-VAE that decodes, if one was given (same layout as `ardist.models.weights` writes)
``sampler.json``              defaults for sampling
``verify.safetensors``        a tiny input and what the weights make of it
``README.md``                 the model card
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from ardist.config import ARVAEConfig, DenoiserConfig, Section, check
from ardist.config.training import DiffusionConfig
from ardist.diffusion.noise import NoiseSchedule
from ardist.errors import CheckpointError, ConfigError, choose
from ardist.inference import verification
from ardist.inference.model_card import model_card
from ardist.inference.publish import publish_directory
from ardist.inference.sampler import ADSampler
from ardist.models.ar_vae import ARVAE
from ardist.models.denoiser import Denoiser
from ardist.models.weights import (
    AR_VAE_FILE,
    CONFIG_FILE,
    is_bundle,
    load_ar_vae,
    load_into,
    read_config,
    read_state,
    weights_digest,
    write_config,
    write_state,
)

SAMPLER, CARD, VERIFY = "sampler.json", "README.md", "verify.safetensors"
SectionT = TypeVar("SectionT", bound=Section)
WEIGHTS = {"ema": "denoiser.safetensors", "raw": "denoiser_raw.safetensors"}


class SamplerDefaults(Section):
    """What sampling does when it is not told otherwise."""

    num_frames: int = Field(16, ge=1, description="length of the training clips, and of a video by default")
    window: int | None = Field(None, ge=1, description="frames a frame looks back to; null: as many as num_frames")
    num_inference_steps: int = Field(50, ge=1)
    difference: int = Field(5, ge=0)
    guidance_scale: float = Field(1.0, ge=0)
    fps: float = Field(8.0, gt=0)


@dataclass(frozen=True, eq=False)
class Bundle:
    """An opened bundle: the denoiser on its device, the rest read."""

    directory: Path
    denoiser: Denoiser
    diffusion: DiffusionConfig
    sampler_defaults: SamplerDefaults
    provenance: Mapping[str, Any]
    ar_vae_config: ARVAEConfig | None
    device: torch.device

    @functools.cached_property
    def ar_vae(self) -> ARVAE:
        """The AR-VAE, in fp32 on the denoiser's device, read at first use; `CheckpointError` where there is none."""
        if self.ar_vae_config is None:
            raise CheckpointError(
                f"the bundle {str(self.directory)!r} has no AR-VAE, so it makes latents but no pixels; "
                "export it with --ar-vae"
            )
        return load_ar_vae(self.directory, device=str(self.device))

    def sampler(self, *, window: int | None = None, window_kind: str | None = None, compile: bool = False) -> ADSampler:
        """A sampler with this bundle's noise schedule; `window` replaces the default one."""
        limit = self.sampler_defaults.window or self.sampler_defaults.num_frames
        if self.denoiser.config.window is not None:
            limit = min(limit, self.denoiser.config.window)
        return ADSampler(
            self.denoiser,
            NoiseSchedule.create(self.diffusion.schedule, self.diffusion.num_timesteps),
            target=self.diffusion.target,
            window=limit if window is None else window,
            window_kind=window_kind,
            compile=compile,
        )


def write_bundle(
    out: Path,
    *,
    denoiser_config: DenoiserConfig,
    ema_state: Mapping[str, Tensor],
    raw_state: Mapping[str, Tensor] | None,
    diffusion: DiffusionConfig,
    ar_vae_dir: Path | None = None,
    sampler_defaults: SamplerDefaults | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write a bundle at `out`, whole or not at all, verify it as it would be opened, and return its path.

    Args:
        ema_state, raw_state: state dicts of ``Denoiser(denoiser_config)``.
        ar_vae_dir: a bundle with an AR-VAE, which is copied into this one.
        provenance: plain values about where the weights come from (run, step, dataset digest, versions).

    Raises:
        CheckpointError: a state dict does not fit the configuration, or what was written does not give it back.
        ConfigError: the AR-VAE's latents are not those of the denoiser, or `out` is something else than a bundle.
    """
    defaults = sampler_defaults or SamplerDefaults()
    states = {"ema": ema_state} if raw_state is None else {"ema": ema_state, "raw": raw_state}
    denoisers = {kind: _build_denoiser(denoiser_config, state, f"the {kind} state") for kind, state in states.items()}
    with publish_directory(Path(out), replaces=is_bundle) as directory:
        config: dict[str, Any] = {
            "denoiser": denoiser_config.model_dump(mode="json"),
            "diffusion": diffusion.model_dump(mode="json"),
            "provenance": dict(provenance or {}),
        }
        if ar_vae_dir is not None:
            config["ar_vae"] = _copy_ar_vae(Path(ar_vae_dir), directory, denoiser_config)
        for kind, state in states.items():
            write_state(directory / WEIGHTS[kind], state)
        write_state(directory / VERIFY, verification.make_case(denoisers, diffusion.num_timesteps))
        (directory / SAMPLER).write_text(json.dumps(defaults.model_dump(mode="json"), indent=2) + "\n", "utf-8")
        card = model_card(denoiser_config, diffusion, defaults.model_dump(), config.get("ar_vae"), provenance or {})
        (directory / CARD).write_text(card, "utf-8")
        config["digests"] = {path.name: weights_digest(path) for path in sorted(directory.iterdir())}
        write_config(directory, config)
        verify_bundle(directory)
    return Path(out)


def load_bundle(
    directory: Path,
    weights: str = "ema",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Bundle:
    """Open a bundle: its version, the digest of what is opened and every shape are checked before anything runs.

    Args:
        weights: ``ema`` or ``raw``.
        dtype: of the denoiser.

    Raises:
        InvalidValueError: `weights` is neither.
        CheckpointError: no bundle, another version, a missing or changed file, weights of another shape.
    """
    directory, device = Path(directory), torch.device(device)
    choose("weights", weights, WEIGHTS)
    config = read_config(directory)
    if config.get("denoiser") is None:
        raise CheckpointError(
            f"the bundle {str(directory)!r} has no denoiser, only {sorted(config.get('digests', {}))}"
        )
    _check_digest(directory, SAMPLER, config)
    state = read_state(directory, WEIGHTS[weights], config)
    source = directory / CONFIG_FILE
    denoiser_config = _section(DenoiserConfig, config, "denoiser", source)
    denoiser = _build_denoiser(denoiser_config, state, str(directory / WEIGHTS[weights]))
    return Bundle(
        directory,
        denoiser.to(device, dtype),
        _section(DiffusionConfig, config, "diffusion", source),
        _read_sampler_defaults(directory / SAMPLER),
        config.get("provenance", {}),
        _ar_vae_config(config, directory),
        device,
    )


def verify_bundle(directory: Path, device: torch.device | str = "cpu") -> None:
    """Check every digest, open the bundle with each of its weights and compare what they compute with what is stored.

    A bundle that holds an AR-VAE only is checked by its digest and opened.

    Raises:
        CheckpointError: as `load_bundle`, or an output differs.
    """
    directory = Path(directory)
    config = read_config(directory)
    for name in config["digests"]:
        _check_digest(directory, name, config)
    if config.get("ar_vae") is not None:
        load_ar_vae(directory)
    if config.get("denoiser") is None:
        return
    for kind, name in WEIGHTS.items():
        if kind == "ema" or name in config["digests"]:
            denoiser = load_bundle(directory, kind, device).denoiser
            error = verification.worst_error(denoiser, read_state(directory, VERIFY, config), kind)
            if not error <= verification.TOLERANCE:
                raise CheckpointError(
                    f"{str(directory / name)!r} computes something else than when it was written: "
                    f"relative error {error:.2g}, legal: {verification.TOLERANCE:.0e}"
                )


def _section(schema: type[SectionT], config: Mapping[str, Any], name: str, source: Path) -> SectionT:
    if not isinstance(config.get(name), dict):
        raise CheckpointError(f"{str(source)!r} has no section {name!r}")
    try:
        return check(schema, config[name], f"{source}, section {name!r}")
    except ConfigError as error:
        raise CheckpointError(f"the bundle was written by another version: {error}") from None


def _read_sampler_defaults(path: Path) -> SamplerDefaults:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error}") from None
    return _section(SamplerDefaults, {"sampler": settings}, "sampler", path)


def _ar_vae_config(config: Mapping[str, Any], directory: Path) -> ARVAEConfig | None:
    return None if config.get("ar_vae") is None else _section(ARVAEConfig, config, "ar_vae", directory / CONFIG_FILE)


def _copy_ar_vae(source: Path, directory: Path, denoiser: DenoiserConfig) -> dict[str, Any]:
    """Copy the AR-VAE of the bundle `source`; returns its section of ``config.json``."""
    config = read_config(source)
    ar_vae = _ar_vae_config(config, source)
    if ar_vae is None:
        raise CheckpointError(f"the bundle {str(source)!r} holds no AR-VAE")
    ours = (denoiser.tokens_per_frame, denoiser.latent_channels)
    theirs = (ar_vae.tokens_per_frame, ar_vae.latent_channels)
    if ours != theirs:
        raise ConfigError(
            f"the AR-VAE of {str(source)!r} decodes {theirs} tokens and channels per frame; "
            f"legal: {ours}, as the denoiser makes them"
        )
    _check_digest(source, AR_VAE_FILE, config)
    shutil.copyfile(source / AR_VAE_FILE, directory / AR_VAE_FILE)
    return ar_vae.model_dump(mode="json")


def _check_digest(directory: Path, name: str, config: Mapping[str, Any]) -> None:
    if Path(name).name != name:
        raise CheckpointError(f"{str(directory / CONFIG_FILE)!r} names a file outside the bundle: {name!r}")
    if weights_digest(directory / name) != config.get("digests", {}).get(name):
        raise CheckpointError(f"{str(directory / name)!r} has changed since the bundle was written: its sha256 differs")


def _build_denoiser(config: DenoiserConfig, state: Mapping[str, Tensor], source: str) -> Denoiser:
    # Nothing is initialised only to be overwritten: `load_into` insists on a complete state.
    with torch.device("meta"):
        denoiser = Denoiser(config)
    denoiser = denoiser.to_empty(device="cpu")
    load_into(denoiser, state, source)
    return denoiser.eval().requires_grad_(False)
