"""The part of a run's report that only an AR-VAE has: fidelity, both sides of stage 1, latents, reconstructions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ardist.models.ar_vae.latents import latent_problems
from ardist.report.curves import draw_curves
from ardist.report.html import Page
from ardist.report.metrics import Record, series

_FIDELITY = (
    ("psnr", "PSNR on held-out clips, in dB"),
    ("ssim", "SSIM on held-out clips"),
    ("flicker", "Temporal flicker on held-out clips: change of the error from frame to frame"),
)
_SIDES = ("generator", "discriminator")


def add_ar_vae(records: Sequence[Record], run_dir: Path, figures: Path, page: Page) -> None:
    """Add the section where the run has validated an AR-VAE; otherwise nothing."""
    validations = [record for record in records if record.get("latent_histogram")]
    if not validations:
        return
    page.heading("Reconstruction")
    for name, title in _FIDELITY:
        curves = {
            label: series(list(records), f"{prefix}{name}", "validation")
            for label, prefix in (("last weights", ""), ("averaged weights", "ema_"))
        }
        _picture(figures / f"{name}.png", {label: curve for label, curve in curves.items() if curve[0]}, title, page)
    sides = {name: series(list(records), name) for name in _SIDES}
    _picture(
        figures / "adversarial.png", {name: curve for name, curve in sides.items() if curve[0]}, "Hinge losses", page
    )
    shown = [record for record in records if record.get("kind") == "reconstruction"]
    if shown and (picture := run_dir / shown[-1]["media"]["frames"]).is_file():
        page.picture(picture, f"Held-out clips and their reconstruction at step {shown[-1]['step']}")
    _latents(validations[-1], figures, page)


def _latents(record: Record, figures: Path, page: Page) -> None:
    page.heading("Latents")
    curves = {}
    for channel, counts in enumerate(record["latent_histogram"]):
        width, total = 2.0 / len(counts), max(1.0, sum(counts))
        centres = [-1.0 + (index + 0.5) * width for index in range(len(counts))]
        curves[f"channel {channel}"] = (centres, [count / total / width for count in counts])
    _picture(
        figures / "latents.png",
        curves,
        f"Density of each channel's values over held-out clips at step {record['step']}; tokens are unit vectors",
        page,
        axes=("value", "density"),
    )
    still = set(record.get("latent_still_channels") or ())
    rows = [
        (channel, mean, deviation, "constant: it says nothing" if channel in still else "in use")
        for channel, (mean, deviation) in enumerate(zip(record["latent_mean"], record["latent_std"], strict=True))
    ]
    page.table(("channel", "mean", "standard deviation", ""), rows)
    problems = latent_problems(record)
    page.text("They suit a denoiser: unit length, every channel in use." if not problems else "; ".join(problems) + ".")
    if record.get("latent_still_values"):
        page.text(f"{record['latent_still_values']} values of single tokens hardly change from frame to frame.")


def _picture(
    path: Path,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    page: Page,
    *,
    axes: tuple[str, str] | None = None,
) -> None:
    if curves:
        x_label, y_label = axes or ("optimiser step", path.stem)
        draw_curves(path, curves, x_label=x_label, y_label=y_label)
        page.picture(path, title)
