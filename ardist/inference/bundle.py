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
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
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
from ardist.models.weights import load_ar_vae, weights_digest

FORMAT, VERSION = "ardist-bundle", 1
CONFIG, SAMPLER, CARD, VERIFY, AR_VAE = (
    "config.json",
    "sampler.json",
    "README.md",
    "verify.safetensors",
    "ar_vae.safetensors",
)
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

    def sampler(self, *, window: int | None = None, compile: bool = False) -> ADSampler:
        """A sampler with this bundle's noise schedule; `window` replaces the default one."""
        limit = self.sampler_defaults.window or self.sampler_defaults.num_frames
        if self.denoiser.config.window is not None:
            limit = min(limit, self.denoiser.config.window)
        return ADSampler(
            self.denoiser,
            NoiseSchedule.create(self.diffusion.schedule, self.diffusion.num_timesteps),
            target=self.diffusion.target,
            window=window or limit,
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
    with publish_directory(Path(out), replaces=_is_bundle) as directory:
        config: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "denoiser": denoiser_config.model_dump(mode="json"),
            "diffusion": diffusion.model_dump(mode="json"),
            "provenance": dict(provenance or {}),
        }
        for kind, state in states.items():
            save_file(
                {name: value.detach().cpu().contiguous() for name, value in state.items()}, directory / WEIGHTS[kind]
            )
        if ar_vae_dir is not None:
            source = _read_config(Path(ar_vae_dir))
            ar_vae_config = _ar_vae_config(source, Path(ar_vae_dir))
            if ar_vae_config is None:
                raise CheckpointError(f"{str(ar_vae_dir)!r} holds no AR-VAE")
            _check_latents(denoiser_config, ar_vae_config)
            config["ar_vae"] = source["ar_vae"]
            _check_digest(Path(ar_vae_dir), AR_VAE, source)
            shutil.copyfile(Path(ar_vae_dir) / AR_VAE, directory / AR_VAE)
        denoisers = {kind: _build_denoiser(denoiser_config, directory / WEIGHTS[kind]) for kind in states}
        save_file(verification.make_case(denoisers, diffusion.num_timesteps), directory / VERIFY)
        (directory / SAMPLER).write_text(json.dumps(defaults.model_dump(mode="json"), indent=2) + "\n", "utf-8")
        (directory / CARD).write_text(
            model_card(denoiser_config, diffusion, defaults.model_dump(), config.get("ar_vae"), config["provenance"]),
            "utf-8",
        )
        config["digests"] = {path.name: weights_digest(path) for path in sorted(directory.iterdir())}
        (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
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
    config = _read_config(directory)
    if "denoiser" not in config:
        raise CheckpointError(
            f"the bundle {str(directory)!r} has no denoiser, only {sorted(config.get('digests', {}))}"
        )
    if WEIGHTS[weights] not in config["digests"]:
        raise CheckpointError(f"the bundle {str(directory)!r} has no {weights} weights")
    for name in (WEIGHTS[weights], SAMPLER):
        _check_digest(directory, name, config)
    denoiser = _build_denoiser(_section(DenoiserConfig, config, "denoiser", directory), directory / WEIGHTS[weights])
    return Bundle(
        directory,
        denoiser.to(device, dtype),
        _section(DiffusionConfig, config, "diffusion", directory),
        _checked(SamplerDefaults, _read_json(directory / SAMPLER), directory / SAMPLER),
        config.get("provenance", {}),
        _ar_vae_config(config, directory),
        device,
    )


def verify_bundle(directory: Path, device: torch.device | str = "cpu") -> None:
    """Check every digest, open the bundle with each of its weights and compare what they compute with what is stored.

    Raises:
        CheckpointError: as `load_bundle`, or an output differs.
    """
    directory = Path(directory)
    config = _read_config(directory)
    for name in config["digests"]:
        _check_digest(directory, name, config)
    if "ar_vae" in config:
        load_ar_vae(directory)
    for kind, name in WEIGHTS.items():
        if kind == "ema" or name in config["digests"]:
            denoiser = load_bundle(directory, kind, device).denoiser
            error = verification.worst_error(denoiser, _load_tensors(directory / VERIFY), kind)
            if not error <= verification.TOLERANCE:
                raise CheckpointError(
                    f"{str(directory / name)!r} computes something else than when it was written: "
                    f"relative error {error:.2g}, legal: {verification.TOLERANCE:.0e}"
                )


def _is_bundle(directory: Path) -> bool:
    try:
        _read_config(directory)
    except CheckpointError:
        return False
    return True


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{str(path)!r} is missing: {str(path.parent)!r} is no bundle") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{str(path)!r} must hold a JSON object")
    return value


def _read_config(directory: Path) -> dict[str, Any]:
    config = _read_json(directory / CONFIG)
    if config.get("format") != FORMAT:
        raise CheckpointError(f"{str(directory)!r} is no bundle: format {config.get('format')!r}, legal: {FORMAT!r}")
    if config.get("version") != VERSION:
        raise CheckpointError(
            f"the bundle {str(directory)!r} has version {config.get('version')!r}; this ardist reads version {VERSION}"
        )
    if not isinstance(config.get("digests"), dict):
        raise CheckpointError(f"{str(directory / CONFIG)!r} has no digests")
    return config


def _checked(schema: type[Any], settings: dict[str, Any], path: Path) -> Any:
    try:
        return check(schema, settings, str(path))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def _section(schema: type[Any], config: dict[str, Any], name: str, directory: Path) -> Any:
    if not isinstance(config.get(name), dict):
        raise CheckpointError(f"{str(directory / CONFIG)!r} has no section {name!r}")
    return _checked(schema, config[name], directory / CONFIG)


def _ar_vae_config(config: dict[str, Any], directory: Path) -> ARVAEConfig | None:
    if "ar_vae" not in config:
        return None
    section: ARVAEConfig = _section(ARVAEConfig, config, "ar_vae", directory)
    return section


def _check_latents(denoiser: DenoiserConfig, ar_vae: ARVAEConfig) -> None:
    ours = (denoiser.tokens_per_frame, denoiser.latent_channels)
    theirs = (ar_vae.tokens_per_frame, ar_vae.latent_channels)
    if ours != theirs:
        raise ConfigError(f"the denoiser makes {ours} tokens and channels per frame, the AR-VAE decodes {theirs}")


def _check_digest(directory: Path, name: str, config: dict[str, Any]) -> None:
    if Path(name).name != name:
        raise CheckpointError(f"{str(directory / CONFIG)!r} names a file outside the bundle: {name!r}")
    expected = config["digests"].get(name)
    path = directory / name
    if not path.is_file():
        raise CheckpointError(f"{str(path)!r} is missing from the bundle")
    if weights_digest(path) != expected:
        raise CheckpointError(f"{str(path)!r} has changed since the bundle was written (sha256 differs)")


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error}") from None


def _build_denoiser(config: DenoiserConfig, path: Path) -> Denoiser:
    state = _load_tensors(path)
    with torch.device("meta"):
        denoiser = Denoiser(config)
    expected = denoiser.state_dict()
    wrong = sorted(
        {*expected} ^ {*state} | {name for name in {*expected} & {*state} if expected[name].shape != state[name].shape}
    )
    if wrong:
        raise CheckpointError(
            f"{str(path)!r} does not fit its configuration: {len(wrong)} missing, unknown or of another shape, "
            f"such as {', '.join(wrong[:3])}"
        )
    denoiser.load_state_dict(state, assign=True)
    return denoiser.eval().requires_grad_(False)
