"""The denoiser against outputs of an independent implementation, through the documented state-dict conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ardist.config import DenoiserConfig
from ardist.errors import CheckpointError
from ardist.models.denoiser import Denoiser
from ardist.models.released import convert_released_state_dict

SHAPE: dict[str, Any] = {
    "width": 48,
    "depth": 3,
    "num_heads": 4,
    "tokens_per_frame": 3,
    "latent_channels": 4,
    "max_frames": 4,
    "context_tokens": 5,
    "context_dim": 8,
    "qk_norm": False,
    "positions": "sincos",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "released": {"mask": "released", "residual": "released"},
    "strict": {"mask": "strict", "residual": "released"},
    "rope_qknorm": {"mask": "released", "residual": "released", "positions": "rope_1d", "qk_norm": True},
    "prenorm": {"mask": "strict", "residual": "prenorm"},
}


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights under their published names, everything else)"""
    tensors = load_file(path)
    weights = {key.removeprefix("w."): value for key, value in tensors.items() if key.startswith("w.")}
    return weights, {key: value for key, value in tensors.items() if not key.startswith("w.")}


@pytest.mark.parametrize("variant", VARIANTS)
def test_reproduces_the_reference_output(golden_dir: Path, variant: str) -> None:
    weights, case = load(golden_dir / f"denoiser_{variant}.safetensors")
    config = DenoiserConfig(**SHAPE | VARIANTS[variant])
    model = Denoiser(config)
    model.load_state_dict(convert_released_state_dict(weights, config))
    with torch.no_grad():
        y = model(case["x"], case["t"], case["context"])
    torch.testing.assert_close(y, case["y"], rtol=0, atol=1e-5)


def test_our_sincos_table_is_the_published_one(golden_dir: Path) -> None:
    weights, _ = load(golden_dir / "denoiser_released.safetensors")
    table = Denoiser(DenoiserConfig(**SHAPE)).position_table
    assert table is not None
    torch.testing.assert_close(table, weights["pos_embed"][0], rtol=0, atol=1e-6)


def test_conversion_refuses_what_it_does_not_know(golden_dir: Path) -> None:
    weights, _ = load(golden_dir / "denoiser_rope_qknorm.safetensors")
    config = DenoiserConfig(**SHAPE | VARIANTS["rope_qknorm"])
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.extra"):
        convert_released_state_dict({**weights, "blocks.0.attn.extra": torch.zeros(1)}, config)
    with pytest.raises(CheckpointError, match="frequencies"):
        convert_released_state_dict({**weights, "rotary_emb.freqs": torch.ones(6)}, config)
    with pytest.raises(CheckpointError, match=r"c_embedder\.weight"):
        convert_released_state_dict({k: v for k, v in weights.items() if "c_embedder" not in k}, config)
