"""Typed configuration: schema, YAML with dotted overrides, one message with every problem, digests."""

from ardist.config.ar_vae import ARVAEConfig
from ardist.config.base import Section, canonical_digest
from ardist.config.denoiser import DenoiserConfig
from ardist.config.loading import apply_override, check, dump_config, load_config, parse_yaml
from ardist.config.training import TrainConfig, batch_layout

__all__ = [
    "ARVAEConfig",
    "DenoiserConfig",
    "Section",
    "TrainConfig",
    "apply_override",
    "batch_layout",
    "canonical_digest",
    "check",
    "dump_config",
    "load_config",
    "parse_yaml",
]
