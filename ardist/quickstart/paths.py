"""The directory of a quickstart."""

from __future__ import annotations

from pathlib import Path


class Paths:
    """Where each stage leaves what the next one reads."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.videos = root / "videos"
        self.pixels_train = root / "data" / "pixels-train"
        self.pixels_held_out = root / "data" / "pixels-held-out"
        self.latents_train = root / "data" / "latents-train"
        self.latents_held_out = root / "data" / "latents-held-out"
        self.run_ar_vae = root / "train" / "ar-vae"
        self.run_denoiser = root / "train" / "denoiser"
        self.bundle_ar_vae = root / "bundles" / "ar-vae"
        self.bundle = root / "bundles" / "denoiser"
        self.scores_ar_vae = root / "scores" / "ar-vae.json"
        self.scores_denoiser = root / "scores" / "denoiser.json"
        self.samples = root / "samples"
        self.figures = root / "figures"
        self.report = root / "report.html"
