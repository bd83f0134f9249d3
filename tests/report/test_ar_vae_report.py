"""An AR-VAE run's report shows its fidelity, its latents and what is wrong with them; other runs' reports do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from ardist.models.ar_vae.latents import LatentStatistics
from ardist.report.run_report import write_run_report


def write_run(run_dir: Path, latents: torch.Tensor) -> None:
    statistics: dict[str, Any] = LatentStatistics.of(latents).describe()
    records = [
        {"kind": "train", "step": 1, "loss": 0.5, "generator": 0.1, "discriminator": 1.0},
        {"kind": "validation", "step": 1, "loss": 0.4, "psnr": 13.0, "ssim": 0.2, "flicker": 0.1, "ema_psnr": 12.5}
        | statistics,
        {"kind": "reconstruction", "step": 1, "media": {"frames": "samples/one.png"}},
    ]
    (run_dir / "samples").mkdir()
    Image.new("RGB", (8, 8), "red").save(run_dir / "samples" / "one.png")
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_latents_and_fidelity(tmp_path: Path) -> None:
    write_run(tmp_path, F.normalize(torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0)), dim=-1))
    text = write_run_report(tmp_path).read_text(encoding="utf-8")
    for words in ("PSNR on held-out clips", "Hinge losses", "Density of each channel", "They suit a denoiser"):
        assert words in text
    assert "reconstruction at step 1" in text
    assert (tmp_path / "figures" / "latents.png").stat().st_size > 1000


def test_a_constant_channel_is_named(tmp_path: Path) -> None:
    values = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    values[..., 1] = 0.0
    write_run(tmp_path, F.normalize(values, dim=-1))
    text = write_run_report(tmp_path).read_text(encoding="utf-8")
    assert "channel 1 is constant" in text
    assert "constant: it says nothing" in text
    assert "They suit a denoiser" not in text


def test_a_denoisers_report_has_no_such_section(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 0.5}\n')
    assert "Latents" not in write_run_report(tmp_path).read_text(encoding="utf-8")
