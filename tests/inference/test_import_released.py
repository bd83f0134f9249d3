"""Published weights become a bundle, safely, and compute what they computed."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sampler_cases import random_denoiser
from torch import Tensor

from ardist import command_line
from ardist.cli import app
from ardist.errors import ArdistError, CheckpointError
from ardist.inference.bundle import load_bundle
from ardist.inference.import_released import import_released
from ardist.models.denoiser import Denoiser

SHAPE: dict[str, Any] = {
    "width": 32,
    "depth": 2,
    "num_heads": 2,
    "tokens_per_frame": 3,
    "max_frames": 4,
    "context_tokens": 5,
    "context_dim": 6,
    "mask": "released",
    "residual": "released",
    "positions": "sincos",
    "qk_norm": False,
}
CHANGES = [f"{name}={str(value).lower()}" for name, value in SHAPE.items()]
PUBLISHED = {
    "input": "x_embedder",
    "timestep.hidden": "t_embedder.mlp.0",
    "timestep.output": "t_embedder.mlp.2",
    "context.projection": "c_embedder",
    "output": "final_layer.1",
    "modulation": "adaLN_modulation.1",
    "qkv": "attn.qkv",
    "projection": "attn.proj",
    "mlp_hidden": "mlp.fc1",
    "mlp_output": "mlp.fc2",
}


def published(denoiser: Denoiser) -> dict[str, Tensor]:
    """The state dict under the published names; the null context has none and is zero."""
    state = {}
    for name, value in denoiser.state_dict().items():
        if name == "position_table":
            state["pos_embed"] = value[None]
        elif name != "context.null":
            stem, _, kind = name.rpartition(".")
            block, layer = stem.rsplit(".", 1) if stem.startswith("blocks.") else ("", stem)
            state[f"{block}.{PUBLISHED[layer]}.{kind}" if block else f"{PUBLISHED[layer]}.{kind}"] = value
    return state


def denoiser(seed: int) -> Denoiser:
    made = random_denoiser(seed, **SHAPE)
    assert made.context is not None
    with torch.no_grad():
        made.context.null.zero_()
    return made


def run(model: Denoiser) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        out: Tensor = model(
            torch.randn(2, 4, 3, 4, generator=generator),
            torch.tensor([[1, 5, 9, 700]] * 2),
            torch.randn(2, 5, 6, generator=generator),
        )
    return out


@pytest.mark.parametrize("form", ["safetensors", "state dict", "ema and model", "wrapped"])
def test_a_bundle_computes_what_the_weights_did(tmp_path: Path, form: str) -> None:
    ema, raw = denoiser(1), denoiser(2)
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pt")
    if form == "safetensors":
        save_file(published(ema), path)
    elif form == "ema and model":
        torch.save({"model": published(raw), "ema": published(ema), "step": 7}, path)
    else:
        before = "module." if form == "wrapped" else ""
        torch.save({before + name: value for name, value in published(ema).items()}, path)
    bundle = import_released(path, tmp_path / "bundle", preset_name="tiny", changes=CHANGES)
    torch.testing.assert_close(run(load_bundle(bundle).denoiser), run(ema), rtol=0, atol=0)
    if form == "ema and model":
        torch.testing.assert_close(run(load_bundle(bundle, "raw").denoiser), run(raw), rtol=0, atol=0)
    opened = load_bundle(bundle)
    assert opened.provenance["imported_from"] == path.name
    assert opened.sampler_defaults.num_frames == 4
    video = opened.sampler().sample(4, num_inference_steps=2, difference=1)
    assert video.isfinite().all()


def test_as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(published(denoiser(1)), tmp_path / "w.safetensors")
    words = ["import-released", str(tmp_path / "w.safetensors"), "--out", str(tmp_path / "b"), "--preset", "tiny"]
    assert command_line.run(app, "ardist", [*words, *CHANGES]) == 0
    assert "wrote and verified" in capsys.readouterr().out
    assert command_line.run(app, "ardist", [*words, *CHANGES[1:]]) == 3
    assert "legal for width 128: 384" in capsys.readouterr().err
    assert command_line.run(app, "ardist", [*words, "widht=32"]) == 2
    assert "did you mean 'width'" in capsys.readouterr().err


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/nonexistent/should-not-run"),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": Evil()}, "could run code"),
        ([torch.zeros(1)], "holds a list; legal: a mapping"),
        ({"x_embedder.weight": 3}, "no state dict: not a tensor: x_embedder.weight"),
        ({}, "nothing at all"),
        ({"unheard.weight": torch.zeros(1)}, "'unheard.weight' is no key of the published"),
        (b"no checkpoint", "cannot read the checkpoint|could run code"),
    ],
)
def test_refusals(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "w.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path, pickle_module=pickle)
    with pytest.raises(CheckpointError, match=message):
        import_released(path, tmp_path / "bundle", preset_name="tiny", changes=CHANGES)
    assert not (tmp_path / "bundle").exists()


def test_a_missing_file_and_an_unknown_preset(tmp_path: Path) -> None:
    for path, name, message in (
        (tmp_path / "absent.pt", "tiny", "cannot read"),
        (tmp_path / "a", "huge", "legal: tiny"),
    ):
        with pytest.raises(ArdistError, match=message):
            import_released(path, tmp_path / "bundle", preset_name=name)
