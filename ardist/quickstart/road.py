"""The stages of the quickstart, first to last; each is a command that a person could type."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ardist
from ardist.config import TrainConfig, load_config
from ardist.errors import ConfigError
from ardist.log import console
from ardist.quickstart.clips import copy_clips, packaged_clips
from ardist.quickstart.page import score_lines, write_page
from ardist.quickstart.paths import Paths
from ardist.quickstart.stages import Stage, StageRunner, run_command
from ardist.report.metrics import read_metrics

PREEMPTED = 75
TRAIN, HELD_OUT = "0:0.8", "0.8:1"
"""Which part of every clip is trained on, and which is only judged on."""
SAMPLES = {
    "synchronous": ("--frames", "16", "--difference", "0"),
    "in-between": ("--frames", "16", "--difference", "5"),
    "frame-by-frame": ("--frames", "16", "--difference", "50"),
    "longer-than-training": ("--frames", "40", "--difference", "5"),
}


@dataclass(frozen=True)
class TrainingArguments:
    """What both trainings are given besides their configuration file."""

    ranks: int
    overrides: tuple[str, ...]


def run_quickstart(
    directory: Path,
    *,
    videos: Path | None = None,
    ranks: int | None = None,
    steps: int | None = None,
    fresh: bool = False,
) -> None:
    """Run every stage below `directory`, reusing what an earlier run finished; prints where the report is.

    `steps` replaces the optimiser steps of both trainings, `videos` the clips, `ranks` the number of processes.
    """
    repository = _repository()
    training = _training_arguments(repository, ranks, steps)
    directory = directory.expanduser()
    videos = None if videos is None else _video_folder(videos.expanduser(), directory)
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"--dir {str(directory)!r} is a file; give a directory")
    if fresh and directory.exists():
        _remove(directory)
    directory.mkdir(parents=True, exist_ok=True)
    runner = StageRunner(directory)
    paths = Paths(directory)
    stages = list(_stages(paths, repository, videos, training))
    for number, stage in enumerate(stages, start=1):
        runner.run(stage, f"{number}/{len(stages)}")
    console.print(runner.table())
    for line in score_lines(paths):
        console.print(line, highlight=False)
    console.print(f"the report: {paths.report.resolve()}", style="bold", soft_wrap=True)


def _stages(paths: Paths, repository: Path, videos: Path | None, training: TrainingArguments) -> Iterator[Stage]:
    listing = [] if videos is None else _listing(videos)
    if videos is None:
        videos = paths.videos
        clips = packaged_clips()
        yield Stage(
            "videos",
            "Take four real clips",
            {"clips": [clip.name for clip in clips], "version": ardist.__version__},
            [videos],
            lambda: copy_clips(clips, paths.videos),
        )
    train_frames = _build_arguments(videos, paths.pixels_train, "pixels", TRAIN, num_frames=1, stride=1)
    held_out_frames = _build_arguments(videos, paths.pixels_held_out, "pixels", HELD_OUT, num_frames=16, stride=2)
    yield Stage(
        "pixels",
        "Build pixel shards for the AR-VAE",
        {"train": train_frames, "held_out": held_out_frames, "videos": listing},
        [paths.pixels_train, paths.pixels_held_out],
        lambda: _run_all(train_frames, held_out_frames),
        continues=True,
    )
    yield _training_stage(
        "ar_vae",
        "Train the AR-VAE on frames",
        paths.run_ar_vae,
        paths.pixels_train,
        paths.pixels_held_out,
        repository,
        training,
    )
    yield Stage(
        "export_ar_vae",
        "Export the AR-VAE and judge it on held-out frames",
        {},
        [paths.bundle_ar_vae, paths.scores_ar_vae],
        lambda: _run_all(
            [*_ardist(), "export", paths.run_ar_vae, "--out", paths.bundle_ar_vae],
            [*_ardist(), "evaluate", "--bundle", paths.bundle_ar_vae, "--dataset", paths.pixels_held_out]
            + ["--train-dataset", paths.pixels_train, "--out", paths.scores_ar_vae],
        ),
    )
    encoder = paths.bundle_ar_vae
    train_latents = _build_arguments(videos, paths.latents_train, encoder, TRAIN, num_frames=16, stride=1)
    held_out_latents = _build_arguments(videos, paths.latents_held_out, encoder, HELD_OUT, num_frames=16, stride=2)
    yield Stage(
        "latents",
        "Build latent shards with that AR-VAE",
        {"train": train_latents, "held_out": held_out_latents},
        [paths.latents_train, paths.latents_held_out],
        lambda: _run_all(train_latents, held_out_latents),
        continues=True,
    )
    yield _training_stage(
        "denoiser",
        "Train the denoiser, interrupted half-way and resumed",
        paths.run_denoiser,
        paths.latents_train,
        paths.latents_held_out,
        repository,
        training,
        interrupt=True,
    )
    yield Stage(
        "export",
        "Export the bundle, open it again, judge it on held-out clips",
        {},
        [paths.bundle, paths.scores_denoiser],
        lambda: _run_all(
            [*_ardist(), "export", paths.run_denoiser, "--out", paths.bundle, "--ar-vae", paths.bundle_ar_vae],
            [*_ardist(), "evaluate", "--bundle", paths.bundle, "--dataset", paths.latents_held_out]
            + ["--out", paths.scores_denoiser],
        ),
    )
    yield Stage(
        "samples",
        "Sample videos: synchronous, in between, frame by frame, and one longer than the training window",
        {"samples": {name: list(arguments) for name, arguments in SAMPLES.items()}},
        [paths.samples / f"{name}.mp4" for name in SAMPLES],
        lambda: _run_all(
            *(
                [*_ardist(), "sample", "--bundle", paths.bundle, "--out", paths.samples / f"{name}.mp4", *arguments]
                for name, arguments in SAMPLES.items()
            )
        ),
    )
    yield Stage("report", "Draw the report", {}, [paths.report], lambda: write_page(paths))


def _training_stage(
    task: str,
    title: str,
    run_dir: Path,
    data: Path,
    held_out: Path,
    repository: Path,
    training: TrainingArguments,
    interrupt: bool = False,
) -> Stage:
    config = _config(repository, task)
    command: list[str | Path] = [repository / "launchers" / "train.sh", "--ranks", str(training.ranks), config]
    places = {"run_dir": run_dir, "data.path": data, "validation.path": held_out}
    # Quoted, for an override's value is read as YAML and a path may hold anything.
    command += [f"{key}={json.dumps(str(path))}" for key, path in places.items()]
    command += training.overrides

    def action() -> None:
        settings = load_config(TrainConfig, config, [str(word) for word in command[4:]])
        half = settings.training.steps // 2
        if interrupt and _last_step(run_dir) < half:
            run_command([*command, f"training.stop_after={half}"], expected=PREEMPTED)
            console.print(f"stopped at step {half} on purpose, with everything saved; now the same command again")
        run_command(command)

    inputs = {"config": config.read_text(encoding="utf-8"), "arguments": [training.ranks, *training.overrides]}
    return Stage(f"train_{task}", title, inputs, [run_dir], action, continues=True)


def _last_step(run_dir: Path) -> int:
    """The newest step a run has logged; 0 for one that has not begun."""
    if not (run_dir / "metrics.jsonl").exists():
        return 0
    return max((int(record["step"]) for record in read_metrics(run_dir)), default=0)


def _build_arguments(
    videos: Path, out: Path, encoder: str | Path, portion: str, *, num_frames: int, stride: int
) -> list[str]:
    command = [sys.executable, "-m", "data_tools", "build", "--videos", videos, "--out", out, "--encoder", encoder]
    command += ["--portion", portion, "--num-frames", num_frames, "--stride", stride, "--size", 64]
    return [str(word) for word in command]


def _listing(videos: Path) -> list[tuple[str, int, int]]:
    """What is in a folder of videos: another content makes the shards again."""
    files = sorted(path for path in videos.rglob("*") if path.is_file())
    return [(str(path.relative_to(videos)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _run_all(*commands: list[str] | list[str | Path]) -> None:
    for command in commands:
        run_command(command)


def _ardist() -> list[str | Path]:
    return [sys.executable, "-m", "ardist.cli"]


def _training_arguments(repository: Path, ranks: int | None, steps: int | None) -> TrainingArguments:
    import torch

    from ardist.training.distributed import uses_gpu

    batches = [load_config(TrainConfig, _config(repository, task)).training for task in ("ar_vae", "denoiser")]
    legal = [count for count in range(1, 1025) if all(batch.global_batch_size % count == 0 for batch in batches)]
    if ranks is not None and ranks not in legal:
        raise ConfigError(f"--ranks {ranks} cannot share the quickstart's batches evenly; legal: {legal}")
    overrides = []
    if uses_gpu():
        overrides.append("training.precision=bf16")
    if steps is not None:
        overrides += [f"training.steps={steps}", "optimizer.warmup_steps=0"]
    devices = torch.cuda.device_count() if uses_gpu() else min(2, os.cpu_count() or 1)
    return TrainingArguments(ranks or max(count for count in legal if count <= devices), tuple(overrides))


def _config(repository: Path, task: str) -> Path:
    return repository / "configs" / "quickstart" / f"{task}.yaml"


def _video_folder(videos: Path, directory: Path) -> Path:
    if videos.resolve().is_relative_to(directory.resolve()):
        raise ConfigError(f"--videos {str(videos)!r} lies inside --dir {str(directory)!r}; give another --dir")
    return videos


def _repository() -> Path:
    root = Path(ardist.__file__).resolve().parent.parent
    if not (root / "launchers" / "train.sh").is_file():
        raise ConfigError("the quickstart needs a checkout of the repository: launchers/ and configs/ are not here")
    return root


def _remove(directory: Path) -> None:
    """Delete an earlier quickstart, but nothing that is not one."""
    if any(directory.iterdir()) and not (directory / "stages.json").exists():
        raise ConfigError(
            f"--fresh: {str(directory)!r} is not empty and not made by the quickstart; remove it yourself"
        )
    shutil.rmtree(directory)
