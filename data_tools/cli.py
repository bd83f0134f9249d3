"""``python -m data_tools``: each verb parses its line, calls one function and prints what came of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ardist import command_line
from ardist.errors import ConfigError
from ardist.log import console
from ardist.storage import is_remote

app = typer.Typer(
    name="python -m data_tools",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help=(
        "Build, check and describe datasets of WebDataset shards from videos.\n\n"
        "[bold]build[/] turns videos into shards and a manifest, exactly once: stop it anywhere, by any means, and the "
        "same command goes on and ends with the same dataset. Add --debug to any command for tracebacks.\n\n"
        "Exit codes: 0 done, 2 bad usage, 3 bad data, 4 bad hardware or environment."
    ),
)


@app.callback()
def _app() -> None:
    """Keep verbs as verbs even while there is only one."""


@app.command()
def build(
    videos: Annotated[
        str,
        typer.Option(help="A folder (searched below), one video, a .txt list of paths, or an s3:// prefix."),
    ],
    out: Annotated[str, typer.Option(help="Where the dataset goes: a folder or an s3:// prefix.")],
    encoder: Annotated[
        str, typer.Option(help="[bold]pixels[/] stores frames; a bundle folder stores latents of its AR-VAE.")
    ] = "pixels",
    num_frames: Annotated[int, typer.Option(help="Frames of a clip.", min=1)] = 16,
    size: Annotated[int, typer.Option(help="Height and width; short side resized, centre cropped.", min=8)] = 256,
    stride: Annotated[int, typer.Option(help="Frames from the start of a clip to the start of the next.", min=1)] = 16,
    fps: Annotated[
        str | None, typer.Option(help="Frames per second, such as 8 or 30000/1001. Without: native.")
    ] = None,
    max_clips_per_video: Annotated[int | None, typer.Option(help="Evenly spaced when there are more.", min=1)] = None,
    portion: Annotated[
        str, typer.Option(help="Part A:B of every video that clips lie in: 0:0.8 to train, 0.8:1 to hold out.")
    ] = "0:1",
    samples_per_shard: Annotated[
        int | None, typer.Option(help="Without: as many as make about 256 MiB.", min=1)
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="CSV with a header, or JSONL: columns path and label and/or caption."),
    ] = None,
    classes_from_folders: Annotated[bool, typer.Option(help="The folder a video lies in names its class.")] = False,
    limit_videos: Annotated[int | None, typer.Option(help="Use only the first N good videos.", min=1)] = None,
    limit_clips: Annotated[int | None, typer.Option(help="Use only the first N clips of the plan.", min=1)] = None,
    max_pixels: Annotated[int, typer.Option(help="Refuse videos with larger frames.", min=64)] = 8192 * 4320,
    max_seconds: Annotated[float, typer.Option(help="Refuse longer videos.", min=0.1)] = 24 * 3600.0,
    max_bad: Annotated[
        float, typer.Option(help="Exit with 3 when a larger fraction of videos or clips was refused.", min=0, max=1)
    ] = 1.0,
    workers: Annotated[int, typer.Option(help="Processes that build shards side by side.", min=1)] = 1,
    decoders: Annotated[int, typer.Option(help="Videos decoded at once per process; 0: one per core.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="Where the AR-VAE runs: auto, cpu, cuda, cuda:1.")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32 or bf16 for the AR-VAE.")] = "fp32",
    batch_frames: Annotated[int, typer.Option(help="Frames per AR-VAE forward.", min=1)] = 128,
    queue_mib: Annotated[int, typer.Option(help="Most memory for decoded clips that wait, per process.", min=1)] = 512,
    video_timeout: Annotated[float, typer.Option(help="Seconds to wait for one video's frames.", min=1)] = 300.0,
    log: Annotated[Path | None, typer.Option(help="JSONL log. Without: build-log.jsonl in a local --out.")] = None,
) -> None:
    """Turn videos into WebDataset shards with an index and a manifest.

    Every video is looked at in a limited child process and decoded by a limited ffmpeg; what cannot be used is
    skipped, named with a reason in quarantine.jsonl, and counted. Frames lie on an exact grid of frame times;
    rotation, sample aspect, variable frame rate, interlacing, alpha and colour matrices are handled.

    The same videos and parameters give the same dataset. A finished dataset is found finished; other parameters
    need another --out.
    """
    from data_tools.build import BuildOptions, make_parameters
    from data_tools.build import build as run_build
    from data_tools.decode import DecodeSettings
    from data_tools.encode import default_threads, make_encoder
    from data_tools.labels import read_labels
    from data_tools.progress import ConsoleProgress
    from data_tools.shard import ShardSettings

    chosen = make_encoder(encoder, device=device, precision=precision, batch_frames=batch_frames)
    known = read_labels(labels) if labels is not None else None
    parameters = make_parameters(
        chosen,
        samples_per_shard=samples_per_shard,
        num_frames=num_frames,
        size=size,
        stride=stride,
        fps=fps,
        max_clips_per_video=max_clips_per_video,
        portion=_portion(portion),
        labels_digest=known.digest if known else None,
        classes_from_folders=classes_from_folders,
        limit_videos=limit_videos,
        limit_clips=limit_clips,
        max_pixels=max_pixels,
        max_seconds=max_seconds,
    )
    threads = decoders or max(1, default_threads() // workers)
    shard = ShardSettings(threads, queue_mib * 2**20, replace(DecodeSettings(), timeout=video_timeout))
    options = BuildOptions(workers=workers, decoders=threads, max_bad=max_bad, shard=shard)
    if log is None and not is_remote(out):
        log = Path(out).expanduser() / "build-log.jsonl"
    with ConsoleProgress(console, log) as progress:
        run_build(videos, out, chosen, parameters, labels=known, options=options, progress=progress)


def _portion(text: str) -> tuple[float, float]:
    low, separator, high = text.partition(":")
    try:
        if not separator:
            raise ValueError
        return float(low), float(high)
    except ValueError:
        raise ConfigError(f"--portion {text!r} is not of the form A:B, such as 0:0.8") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command_line.run(app, "python -m data_tools", arguments if arguments is not None else sys.argv[1:])
