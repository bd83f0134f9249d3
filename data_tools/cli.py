"""``python -m data_tools``: each verb parses its line, calls one function and prints what came of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ardist import command_line
from ardist.errors import ConfigError, DataError
from ardist.log import console
from ardist.storage import open_storage

app = typer.Typer(
    name="python -m data_tools",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help=(
        "Build, check and describe datasets of WebDataset shards from videos.\n\n"
        "**build** turns videos into shards and a manifest, exactly once: stop it anywhere, by any means, and the "
        "same command goes on and ends with the same dataset. Add --debug to any command for tracebacks.\n\n"
        "Exit codes: 0 done, 2 bad usage, 3 bad data, 4 bad hardware or environment."
    ),
)

CLIPS, LATENTS, LIMITS, HERE = "Clips", "Latents", "Limits", "How it runs here (changes no byte of the dataset)"


def _option(text: str, panel: str | None = None, metavar: str | None = None, **settings: Any) -> Any:
    return typer.Option(help=text, rich_help_panel=panel, metavar=metavar, **settings)


@app.callback()
def _app() -> None:
    """Keep verbs as verbs even while there is only one."""


@app.command()
def build(
    videos: Annotated[
        str, _option("A folder (searched below), one video, a .txt list of paths, or s3://bucket/prefix.", None, "PATH")
    ],
    out: Annotated[str, _option("Where the dataset goes: a folder or s3://bucket/prefix.", None, "PATH")],
    encoder: Annotated[
        str, _option("**pixels** stores frames; a bundle folder stores latents of its AR-VAE.", None, "BUNDLE")
    ] = "pixels",
    num_frames: Annotated[int, _option("Frames of a clip.", CLIPS, "N", min=1)] = 16,
    size: Annotated[int, _option("Height and width: short side resized, centre cropped.", CLIPS, "N", min=8)] = 256,
    stride: Annotated[int, _option("Frames from the start of a clip to the next's.", CLIPS, "N", min=1)] = 16,
    group: Annotated[
        list[str] | None,
        _option(
            "Instead of the three above, may be given several times: shard groups side by side, each a dataset of its "
            "own below --out, as 16x256 or 1x512x30.",
            CLIPS,
            "FRAMESxSIZE[xSTRIDE]",
        ),
    ] = None,
    fps: Annotated[str | None, _option("Frames per second, as 8 or 30000/1001. Without: native.", CLIPS, "N")] = None,
    max_clips_per_video: Annotated[int | None, _option("Evenly spaced ones, of more.", CLIPS, "N", min=1)] = None,
    portion: Annotated[
        str, _option("Part of each video that clips lie in: 0:0.8 to train, 0.8:1 to hold out.", CLIPS, "A:B")
    ] = "0:1",
    labels: Annotated[
        str | None, _option("CSV with a header, or JSONL: columns path and label and/or caption.", CLIPS, "FILE")
    ] = None,
    classes_from_folders: Annotated[
        bool, typer.Option("--classes-from-folders", help="A video's folder names its class.", rich_help_panel=CLIPS)
    ] = False,
    samples_per_shard: Annotated[int | None, _option("Without: what makes about 256 MiB.", CLIPS, "N", min=1)] = None,
    precision: Annotated[str, _option("fp32 or bf16.", LATENTS, "NAME")] = "fp32",
    device: Annotated[
        str, _option("auto (every GPU, else cpu), cpu, cuda, or some: cuda:0,cuda:2.", LATENTS, "NAMES")
    ] = "auto",
    batch_frames: Annotated[int, _option("Frames per forward of the AR-VAE.", LATENTS, "N", min=1)] = 128,
    max_bad: Annotated[
        float, _option("Exit with 3 when a larger fraction of videos or clips was refused.", LIMITS, "F", min=0, max=1)
    ] = 1.0,
    max_pixels: Annotated[int, _option("Refuse videos with larger frames.", LIMITS, "N", min=64)] = 8192 * 4320,
    max_seconds: Annotated[float, _option("Refuse longer videos.", LIMITS, "S", min=0.1)] = 24 * 3600.0,
    video_timeout: Annotated[float, _option("Give a decoder that hangs up after this.", LIMITS, "S", min=1)] = 300.0,
    limit_videos: Annotated[int | None, _option("Only the first N good videos.", LIMITS, "N", min=1)] = None,
    limit_clips: Annotated[int | None, _option("Only the first N clips of the plan.", LIMITS, "N", min=1)] = None,
    executor: Annotated[
        str, _option("**local** processes, or **ray**: actors of a Ray cluster that runs already.", HERE, "NAME")
    ] = "local",
    workers: Annotated[
        int | None, _option("Processes that build shards side by side. Without: one per device.", HERE, "N", min=1)
    ] = None,
    decoders: Annotated[
        int, _option("Videos decoded at once per process; 0: all cores shared out.", HERE, "N", min=0)
    ] = 0,
    queue_mib: Annotated[
        int, _option("Most memory for decoded frames that wait, per process.", HERE, "N", min=1)
    ] = 512,
    worker: Annotated[
        bool,
        typer.Option(
            "--worker",
            help="One of many tasks of a Slurm or torchrun job: its own GPU and log, lines instead of bars.",
            rich_help_panel=HERE,
        ),
    ] = False,
    log: Annotated[Path | None, _option("JSONL. Without: build-log.jsonl in a local --out.", HERE, "FILE")] = None,
) -> None:
    """Turn videos into WebDataset shards with an index and a manifest.

    Every video is looked at in a limited child process and decoded by a limited ffmpeg; what cannot be used is
    skipped, named with a reason in quarantine.jsonl, and counted. Frames lie on an exact grid of frame times;
    rotation, sample aspect, variable frame rate, interlacing, alpha and colour matrices are handled.

    The same videos and parameters give the same dataset. A finished dataset is found finished; other parameters
    need another --out.

    The same command may run on any number of machines at once, as a Slurm array or under torchrun: builders lease
    shards from one plan through --out, take over from those that die, and whoever sees the last commit finishes.
    """
    from data_tools.build import BuildOptions, make_parameters
    from data_tools.build import build as run_build
    from data_tools.cluster import cluster_task
    from data_tools.decode import DecodeSettings
    from data_tools.encode import EncoderChoice, default_threads
    from data_tools.groups import Group, check_place, parse_groups, record_groups
    from data_tools.labels import read_labels
    from data_tools.lease import worker_name
    from data_tools.progress import ConsoleProgress
    from data_tools.shard import ShardSettings

    choice = EncoderChoice(encoder, device, precision, batch_frames)
    task = cluster_task() if worker else None
    if task is not None and workers is None:
        choice = choice.for_worker(task.local)
    elsewhere = executor == "ray"
    count = workers or (1 if elsewhere else len(choice.devices()))
    threads = decoders or (1 if elsewhere else max(1, default_threads() // count))
    shard = ShardSettings(threads, queue_mib * 2**20, replace(DecodeSettings(), timeout=video_timeout))
    options = BuildOptions(workers=count, max_bad=max_bad, shard=shard, executor=executor)
    known = read_labels(labels) if labels is not None else None
    groups = parse_groups(group or [], stride)
    check_place(out, groups)
    identity = (choice.on_cpu() if count > 1 or elsewhere else choice).make()
    parameters = {
        each: make_parameters(
            identity,
            samples_per_shard=samples_per_shard,
            num_frames=each.num_frames,
            size=each.size,
            stride=each.stride,
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
        for each in groups or [Group(num_frames, size, stride)]
    }
    log_name = f"build-log-{worker_name()}.jsonl" if worker else "build-log.jsonl"
    for each, chosen in parameters.items():
        place = f"{out.rstrip('/')}/{each.name}" if groups else out
        with ConsoleProgress(console, log or open_storage(place).local_path(log_name), bars=not worker) as progress:
            run_build(videos, place, choice, chosen, labels=known, options=options, progress=progress)
        if groups:
            record_groups(out, [each])


@app.command()
def verify(
    dataset: Annotated[str, typer.Argument(help="A dataset folder or s3:// prefix.")],
    quick: Annotated[bool, typer.Option("--quick", help="Sizes, indices and records only; no shard is read.")] = False,
) -> None:
    """Check a dataset and list everything that is wrong with it; exit code 3 when anything is.

    Reads every byte of every shard: hashes, tar structure, sample shapes, finite latents and their statistics, and
    that plan, commits, quarantine and manifest agree. Objects that belong to nothing are noted, not held against it.
    """
    from data_tools.groups import datasets_at
    from data_tools.verify import verify as run_verify

    complaints = []
    for address in datasets_at(dataset):
        report = run_verify(address, quick=quick)
        for note in report.notes:
            console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
        if report.problems:
            lines = "\n".join(f"  {problem}" for problem in report.problems)
            complaints.append(f"{report.url}: {len(report.problems)} problems\n{lines}")
            continue
        how = "quick look, shards not read" if quick else "every byte read"
        console.print(
            f"{report.url}: {report.samples} samples in {report.shards} shards are as they were built ({how})",
            soft_wrap=True,
        )
    if complaints:
        raise DataError("\n".join(complaints))


@app.command()
def stats(
    dataset: Annotated[str, typer.Argument(help="A dataset folder or s3:// prefix.")],
    png: Annotated[Path | None, typer.Option(help="Also draw shards, classes and latents into this file.")] = None,
) -> None:
    """Show counts, sizes, latent mean and deviation, classes and what was refused; reads no sample."""
    from data_tools.groups import datasets_at
    from data_tools.stats import picture, statistics, table

    addresses = datasets_at(dataset)
    if png is not None and len(addresses) > 1:
        raise ConfigError(f"--png draws one dataset; {dataset} holds {', '.join(addresses)}")
    for address in addresses:
        found = statistics(address)
        if png is not None:
            picture(found, png)
        Console().print(table(found))


@app.command()
def bench(
    dataset: Annotated[str, typer.Argument(help="A dataset folder or s3:// prefix.")],
    seconds: Annotated[float, _option("How long to read, for each dataset.", None, "S", min=0.1)] = 10.0,
    batch_size: Annotated[int, _option("Samples of a batch; a multiple of the lanes.", None, "N", min=1)] = 64,
    lanes: Annotated[int, _option("data.lanes of the run.", None, "N", min=1)] = 8,
    window: Annotated[int, _option("data.window of the run.", None, "N", min=1)] = 256,
    threads: Annotated[int, _option("data.fetch_threads of the run.", None, "N", min=1, max=16)] = 2,
    prefetch_mib: Annotated[int, _option("Most memory for reading ahead.", None, "N", min=1)] = 256,
    cache_dir: Annotated[
        str | None, _option("Local cache of remote shards. Without: the user's.", None, "PATH")
    ] = None,
    step_ms: Annotated[float, _option("Pause after each batch, as a training step would.", None, "MS", min=0)] = 0.0,
) -> None:
    """Measure how fast a dataset is read here: samples and bytes per second, waiting, retries, cache, substitutions.

    Reads it as one rank of a run does: the same order, every checksum on, for --seconds. Rates count from the second
    batch on, the first one and the opening stand by themselves. Without --step-ms the reader is all there is, so it
    waits all the time; with the milliseconds that a training step takes, *waited* is what the run would lose.

    A local dataset that was read before comes from the system's cache; for S3, an empty --cache-dir shows the first
    epoch and a filled one the later ones.

    Exit codes: 2 for a batch size or lanes that are not legal (the legal ones are named), 3 for a dataset that is
    incomplete, or in which a bad sample was met: it is named, **verify** finds all of them.
    """
    from ardist.config.data import DataConfig
    from data_tools.bench import bench as run_bench
    from data_tools.bench import table
    from data_tools.groups import datasets_at

    complaints = []
    for address in datasets_at(dataset):
        config = DataConfig(
            path=address,
            lanes=lanes,
            window=window,
            fetch_threads=threads,
            prefetch_bytes=prefetch_mib * 2**20,
            cache_dir=cache_dir,
            max_bad_fraction=1.0,
        )
        measured = run_bench(config, batch_size=batch_size, seconds=seconds, step_seconds=step_ms / 1000)
        Console().print(table(measured))
        if bad := measured.bad:
            first = bad[0]
            complaints.append(
                f"{address}: bad samples were met, the first: {first.shard} ({first.sample}) {first.detail}"
            )
    if complaints:
        raise DataError("\n".join(complaints))


@app.command()
def inspect(
    dataset: Annotated[str, typer.Argument(help="A dataset folder or s3:// prefix.")],
    key: Annotated[str, typer.Argument(help="The sample's key: 16 hexadecimal digits.")],
    decode: Annotated[Path | None, typer.Option(help="Write the clip beside its source as this mp4 file.")] = None,
    encoder: Annotated[str | None, typer.Option(help="The bundle whose AR-VAE made the latents, to show them.")] = None,
) -> None:
    """Show where a sample came from: video, span, label, shard, tools and autoencoder."""
    from data_tools.inspect_sample import describe, locate, write_clip

    address, found = locate(dataset, key)
    view = Table(show_header=False, title=key, title_justify="left")
    view.add_column()
    view.add_column(overflow="fold")
    for name, value in describe(found).items():
        view.add_row(name, Text(value))
    if decode is not None:
        view.add_row(str(decode), write_clip(address, found, decode, encoder))
    Console().print(view)


@app.command()
def gc(
    dataset: Annotated[str, typer.Argument(help="A dataset folder or s3:// prefix.")],
    older_than: Annotated[float, typer.Option(help="Hours; what is younger may belong to a builder at work.")] = 24.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list.")] = False,
) -> None:
    """Remove what belongs to nothing: shards of lost races, unfinished files, stale leases and uploads."""
    from data_tools.gc import collect
    from data_tools.groups import datasets_at

    for address in datasets_at(dataset):
        garbage = collect(address, older_than=older_than * 3600, dry_run=dry_run)
        for name in garbage.names:
            console.print(name, highlight=False, markup=False, soft_wrap=True)
        done = "would be removed" if dry_run else "removed"
        uploads = f", {garbage.uploads} unfinished uploads aborted" if garbage.uploads else ""
        console.print(f"{len(garbage.names)} objects, {garbage.bytes / 2**20:.1f} MiB {done}{uploads}", soft_wrap=True)


@app.command()
def export_wids(
    dataset: Annotated[str, typer.Argument(help="A dataset folder or s3:// prefix.")],
    out: Annotated[str | None, typer.Option(help="Where to write. Without: wids.json in the dataset.")] = None,
) -> None:
    """Write the JSON shard list that readers of the wids format open."""
    from data_tools.groups import datasets_at
    from data_tools.wids import export_wids as run_export

    addresses = datasets_at(dataset)
    if out is not None and len(addresses) > 1:
        raise ConfigError(f"--out takes the list of one dataset; {dataset} holds {', '.join(addresses)}")
    for address in addresses:
        console.print(run_export(address, out), highlight=False, markup=False, soft_wrap=True)


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
