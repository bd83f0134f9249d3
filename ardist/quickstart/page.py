"""The quickstart's report: what was trained, how well, and what it looks like."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

import ardist
from ardist.data.loader import read_samples
from ardist.diffusion.ad import ADSchedule
from ardist.inference.contact_sheet import contact_sheet
from ardist.inference.video_io import read_frames
from ardist.models.weights import load_ar_vae
from ardist.quickstart.paths import Paths
from ardist.report.curves import draw_curves
from ardist.report.html import Page
from ardist.report.metrics import read_metrics, series
from ardist.report.schedules import draw_ad_schedule, draw_timestep_laws

PASS_FRACTION = 0.75
"""Held-out denoising loss must be below this fraction of what predicting zero costs."""
PASS_GAIN = 2.5
"""Held-out PSNR of the AR-VAE must be this many dB above the best constant colour."""

_CAPTIONS = {
    "synchronous": "s = 0: all frames denoised together",
    "in-between": "s = 5: each frame five steps behind the one before",
    "frame-by-frame": "s = 50: strictly one frame after another",
    "longer-than-training": "40 frames from a model that saw 16",
}


def score_lines(paths: Paths) -> list[str]:
    """The quickstart's result in four lines, each with the level it is measured against."""
    ar_vae, denoiser = _read(paths.scores_ar_vae), _read(paths.scores_denoiser)
    gain = ar_vae["psnr"] - ar_vae["constant_colour_psnr"]
    _, losses = series(read_metrics(paths.run_denoiser), "loss", kind="validation")
    falling = len(losses) > 1 and losses[-1] < losses[-2]
    return [
        f"AR-VAE, held-out PSNR: {ar_vae['psnr']:.2f} dB, {gain:+.2f} dB over the best constant colour per clip "
        f"({ar_vae['constant_colour_psnr']:.2f} dB) {_verdict(gain >= PASS_GAIN)}",
        f"  beside it: {ar_vae['pca_components']} principal components of training frames {ar_vae['pca_psnr']:.2f} dB, "
        f"SSIM of the AR-VAE {ar_vae['ssim']:.3f}",
        f"denoiser, held-out loss at fixed FoPP staircases: {denoiser['fraction_of_predict_zero']:.3f} of the "
        f"predict-zero level {_verdict(denoiser['fraction_of_predict_zero'] < PASS_FRACTION)}",
        f"  still falling at the end: {'yes' if falling else 'no'} {_verdict(falling)}",
    ]


def write_page(paths: Paths) -> None:
    """Draw all figures as PNG files and the page that holds them."""
    paths.figures.mkdir(exist_ok=True)
    page = Page(
        "ardist quickstart",
        f"ardist {ardist.__version__}, torch {torch.__version__}, {platform.machine()}, {platform.python_version()}",
    )
    page.text(
        "Real clips were cut into a training part and a held-out end; a small AR-VAE turned them into latent tokens; "
        "a small denoiser was trained on those with one timestep per frame, and sampled with the AD schedule. "
        "The models are tiny and trained for minutes: the point is that every stop of the road works."
    )
    page.heading("Result")
    for line in score_lines(paths):
        page.text(line)
    page.heading("Sampled videos")
    page.videos((paths.samples / f"{name}.mp4", caption) for name, caption in _CAPTIONS.items())
    _frames(paths, page)
    _losses(paths, page)
    _timesteps(paths, page)
    page.write(paths.report)


def _frames(paths: Paths, page: Page) -> None:
    clips = read_samples(str(paths.pixels_held_out))
    chosen = [0, len(clips.values) // 2, len(clips.values) - 1]
    real = clips.values[chosen]
    ar_vae = load_ar_vae(paths.bundle)
    with torch.no_grad():
        pixels = ar_vae.decode(ar_vae.encode(real.permute(0, 1, 4, 2, 3).float() / 255))
    reconstructed = (pixels * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 1, 3, 4, 2)
    rows = []
    for number in range(len(chosen)):
        rows.append((f"real, held out {number + 1}", real[number].numpy()))
        rows.append((f"reconstructed {number + 1}", reconstructed[number].numpy()))
    for name in ("synchronous", "in-between", "frame-by-frame"):
        rows.append((f"sampled, {name}", read_frames(paths.samples / f"{name}.mp4")))
    sheet = paths.figures / "frames.png"
    contact_sheet(rows, sheet)
    page.heading("Frames")
    page.picture(sheet, "Held-out clips, the same clips through the AR-VAE, and sampled clips; time runs to the right.")


def _losses(paths: Paths, page: Page) -> None:
    page.heading("Training")
    for run, title, levels in (
        (paths.run_ar_vae, "AR-VAE: L1 on frames", {}),
        (paths.run_denoiser, "Denoiser: squared error of x0", {"predict zero": 0.25, "goal": 0.25 * PASS_FRACTION}),
    ):
        records = read_metrics(run)
        figure = paths.figures / f"loss-{run.name}.png"
        curves = {"training": series(records, "loss"), "held out": series(records, "loss", kind="validation")}
        draw_curves(figure, curves, x_label="optimiser step", y_label="loss", levels=levels)
        page.picture(figure, title)
    last = [record for record in read_metrics(paths.run_denoiser) if record.get("kind") == "validation"][-1]
    by_frame = last["loss_per_frame"]
    figure = paths.figures / "loss-by-frame.png"
    draw_curves(figure, {"held out": (range(len(by_frame)), by_frame)}, x_label="frame", y_label="loss")
    page.picture(figure, "Held-out loss by frame: later frames are noisier under FoPP, so they cost more.")


def _timesteps(paths: Paths, page: Page) -> None:
    page.heading("Timesteps")
    figure = paths.figures / "training-timesteps.png"
    draw_timestep_laws(figure, num_frames=16)
    page.picture(figure, "Training: the laws of the timesteps per frame; FoPP never lets them decrease over time.")
    for difference in (0, 5, 50):
        figure = paths.figures / f"schedule-{difference}.png"
        draw_ad_schedule(ADSchedule(16, 50, difference), figure)
        page.picture(figure, f"Sampling: the AD schedule at s = {difference}.")


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _verdict(good: bool) -> str:
    return "(goal met)" if good else "(GOAL MISSED)"
