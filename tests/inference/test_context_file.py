"""Context tokens from files: what is read, and what is refused before anything is sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundle_cases import make_ar_vae, make_bundle
from safetensors.torch import save_file

from ardist.config import DenoiserConfig
from ardist.errors import ArdistError
from ardist.inference.bundle import load_bundle
from ardist.inference.context_file import read_context
from ardist.inference.sample import sample_to_file
from ardist.inference.video_io import read_frames

CONFIG = DenoiserConfig(context_tokens=5, context_dim=6)
TOKENS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


def test_one_set_for_all_videos_or_one_for_each(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", TOKENS[0].numpy())
    np.save(tmp_path / "row.npy", TOKENS[:1].double().numpy())
    save_file({"anything": TOKENS.half()}, tmp_path / "each.safetensors")
    save_file({"context": TOKENS, "other": TOKENS[0].clone()}, tmp_path / "named.safetensors")
    same = TOKENS[:1].expand(3, 5, 6)
    for name in ("one.npy", "row.npy"):
        read = read_context(tmp_path / name, CONFIG, 3)
        assert read.dtype == torch.float32
        torch.testing.assert_close(read, same, rtol=0, atol=0)
    torch.testing.assert_close(read_context(tmp_path / "each.safetensors", CONFIG, 2), TOKENS.half().float())
    torch.testing.assert_close(read_context(tmp_path / "named.safetensors", CONFIG, 2), TOKENS)


@pytest.mark.parametrize(
    ("name", "array", "code", "message"),
    [
        ("a.txt", None, 2, r"legal: a name that ends in \.npy or \.safetensors"),
        ("absent.npy", None, 3, "cannot read the context"),
        ("a.npy", np.zeros((4, 6), np.float32), 2, r"shape \(4, 6\); legal: \(5, 6\) or \(1, 5, 6\) or \(2, 5, 6\)"),
        ("a.npy", np.zeros((3, 5, 6), np.float32), 2, r"shape \(3, 5, 6\)"),
        ("a.npy", np.zeros((5, 6), np.int64), 3, "int64; legal: floating-point"),
        ("a.npy", np.full((5, 6), np.nan, np.float32), 3, "not finite"),
        ("a.npy", np.array([None] * 30).reshape(5, 6), 3, "cannot read the context"),
        ("two.safetensors", None, 3, r"\['a', 'b'\]; legal: one tensor, or one named 'context'"),
        ("torn.safetensors", None, 3, "cannot read the context"),
    ],
)
def test_refusals(tmp_path: Path, name: str, array: Any, code: int, message: str) -> None:
    save_file({"a": TOKENS, "b": TOKENS.clone()}, tmp_path / "two.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"\x08")
    if array is not None:
        np.save(tmp_path / name, array, allow_pickle=True)
    with pytest.raises(ArdistError, match=message) as caught:
        read_context(tmp_path / name, CONFIG, 2)
    assert caught.value.exit_code == code


def test_a_denoiser_without_context_takes_none(tmp_path: Path) -> None:
    with pytest.raises(ArdistError, match="has no context; legal: none"):
        read_context(tmp_path / "a.npy", DenoiserConfig(), 1)


def coarse(frames: Any) -> Any:
    """Brightness of 4x4 blocks: what a codec with coarse colour keeps of noise."""
    f, h, w, _ = frames.shape
    return frames.astype(float).reshape(f, h // 4, 4, w // 4, 4, 3).mean(axis=(2, 4, 5))


def test_the_context_reaches_the_video_and_dtype_the_denoiser(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", make_ar_vae(tmp_path / "vae"), context_tokens=5, context_dim=6)
    np.save(tmp_path / "each.npy", 5 * TOKENS.numpy())
    arguments: dict[str, Any] = {"guidance_scale": 2, "device": "cpu", "num_videos": 2, "seed": 1}
    told = sample_to_file(bundle, tmp_path / "told.mp4", context=tmp_path / "each.npy", **arguments)
    opened = load_bundle(bundle)
    latents = opened.sampler().sample(
        4, num_inference_steps=5, difference=2, seed=1, context=5 * TOKENS, guidance_scale=2
    )
    with torch.no_grad():
        expected = opened.ar_vae.decode(latents).permute(0, 1, 3, 4, 2).numpy()
    for number, path in enumerate(told):
        shown = coarse(read_frames(path) / 255)
        own, other = (np.abs(shown - coarse(expected[index])).mean() for index in (number, 1 - number))
        assert own < 0.5 * other, "each video has its own context"
    half = sample_to_file(bundle, tmp_path / "half.mp4", context=tmp_path / "each.npy", dtype="bfloat16", **arguments)
    rounded = np.abs(coarse(read_frames(half[0]) / 255) - coarse(expected[0])).mean()
    assert 0 < rounded < 0.5 * other
    with pytest.raises(ArdistError, match="dtype='int8' is not known.*legal: float32, bfloat16, float16"):
        sample_to_file(bundle, tmp_path / "x.mp4", dtype="int8", **arguments)
