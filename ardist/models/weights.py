"""Weights on disk: safetensors beside a ``config.json`` that names the format, the architecture and every digest.

A bundle is such a directory. Here is what every floor above needs of it: reading and writing the AR-VAE, the
digest of a weights file, and the checks that come before any tensor is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ardist.config import ARVAEConfig
from ardist.errors import CheckpointError
from ardist.models.ar_vae import ARVAE

FORMAT = "ardist-bundle"
VERSION = 1
CONFIG_FILE = "config.json"
AR_VAE_FILE = "ar_vae.safetensors"


def weights_digest(path: Path) -> str:
    """sha256 of a file, 64 hex digits; raises `CheckpointError` when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"cannot read the weights {str(path)!r}: {error.strerror}") from None


def write_state(path: Path, state: Mapping[str, Tensor]) -> str:
    """Write tensors as safetensors, complete or not at all; returns the digest of the file.

    Raises `CheckpointError` for values that are not finite; nothing is written then.
    """
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path.name} was not written: {name} holds values that are not finite")
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, temporary)
        _publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return weights_digest(path)


def read_state(directory: Path, name: str, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of one weights file of a bundle, after its digest matched the one in `config`."""
    path = directory / name
    digests = config.get("digests")
    expected = digests.get(name) if isinstance(digests, Mapping) else None
    if expected is None:
        raise CheckpointError(f"the bundle {str(directory)!r} has no {name}")
    found = weights_digest(path)
    if found != expected:
        raise CheckpointError(f"{str(path)!r} is damaged: sha256 {found[:16]}…, the bundle's is {str(expected)[:16]}…")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{str(path)!r} is no readable safetensors file: {error}") from None


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Write ``config.json`` with format and version, complete or not at all."""
    path = directory / CONFIG_FILE
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    text = json.dumps({"format": FORMAT, "version": VERSION, **config}, indent=1, ensure_ascii=False, allow_nan=False)
    try:
        temporary.write_text(text + "\n", encoding="utf-8")
        _publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json`` of a bundle; raises `CheckpointError` for no bundle or one of another format or version."""
    path = directory / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"no bundle at {str(directory)!r}: cannot read {CONFIG_FILE}: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r} is not JSON: {error}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(f"{str(path)!r} does not describe a bundle: its format is not {FORMAT!r}")
    if config.get("version") != VERSION:
        raise CheckpointError(
            f"the bundle {str(directory)!r} has version {config.get('version')!r}, this code reads version {VERSION}: "
            "use the release that wrote it, or export the run again"
        )
    return config


def is_bundle(directory: Path) -> bool:
    """True for a directory with the files of a bundle and nothing else: what an export may replace."""
    try:
        known = {CONFIG_FILE, *read_config(directory).get("digests", {})}
    except CheckpointError:
        return False
    return all(path.name in known for path in directory.iterdir())


def save_ar_vae(directory: Path, model: ARVAE) -> str:
    """Write an AR-VAE as a bundle of its own; returns the digest of its weights."""
    directory.mkdir(parents=True, exist_ok=True)
    digest = write_state(directory / AR_VAE_FILE, model.state_dict())
    write_config(directory, {"ar_vae": model.config.model_dump(mode="json"), "digests": {AR_VAE_FILE: digest}})
    return digest


def load_ar_vae(directory: Path | str, device: str | torch.device = "cpu") -> ARVAE:
    """The AR-VAE of a bundle, checked, in evaluation mode; raises `CheckpointError` with what is wrong."""
    directory = Path(directory).expanduser()
    config = read_config(directory)
    if config.get("ar_vae") is None:
        raise CheckpointError(f"the bundle {str(directory)!r} holds no AR-VAE; export it with --ar-vae")
    try:
        with torch.device("meta"):  # nothing is drawn only to be overwritten
            model = ARVAE(ARVAEConfig.model_validate(config["ar_vae"]))
    except ValidationError as error:
        raise CheckpointError(
            f"the AR-VAE of {str(directory)!r} has a configuration of another version: {error}"
        ) from None
    state = read_state(directory, AR_VAE_FILE, config)
    load_into(model.to_empty(device=device), state, str(directory / AR_VAE_FILE))
    return model.eval()


def load_into(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a complete state; raises `CheckpointError` that names what is missing, left over or of another shape."""
    own = model.state_dict()
    problems = [f"missing {name}" for name in own.keys() - state.keys()]
    problems += [f"unknown {name}" for name in state.keys() - own.keys()]
    problems += [
        f"{name} is {tuple(state[name].shape)}, the model's is {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if state[name].shape != own[name].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:5]) + (" …" if len(problems) > 5 else "")
        raise CheckpointError(f"{source} does not fit the model ({len(problems)} differences): {shown}")
    model.load_state_dict(dict(state))


def _publish(temporary: Path, path: Path) -> None:
    """Make a written file durable and give it its name."""
    for place in (temporary, path.parent):
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if place == temporary:
            temporary.replace(path)
