"""Videos sampled during training with the averaged weights, at several differences s of the AD schedule."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ardist import fault
from ardist.config import TrainConfig
from ardist.data.manifest import Manifest
from ardist.diffusion.noise import NoiseSchedule
from ardist.errors import ArdistError, CheckpointError, InvalidValueError
from ardist.events import events
from ardist.inference.sampler import ADSampler
from ardist.inference.video_io import write_mp4
from ardist.models.ar_vae import ARVAE
from ardist.models.denoiser import Denoiser
from ardist.models.weights import AR_VAE_FILE, load_ar_vae, read_config
from ardist.training.callbacks.base import Callback

if TYPE_CHECKING:
    from ardist.training.trainer import Trainer

_log = logging.getLogger("ardist.training")

AT_ONCE = 4
"""Videos of one rank that are sampled together."""


class SampledVideos(Callback):
    """Every ``samples.every`` steps and at the last one: ``samples/step-00001200/s05-video-00.mp4`` and so on.

    The weights are gathered once, into a denoiser of each rank's own; then the ranks share the list of videos and none
    waits for another. A video depends on its number, the seed and the weights, not on who makes it. A disk that is
    full, an ffmpeg that fails or memory that does not suffice costs the videos, counted, and not the run.
    """

    def after_step(self, trainer: Trainer) -> None:
        every = trainer.config.samples.every
        if every is not None and (trainer.step % every == 0 or trainer.step == trainer.total_steps):
            with trainer.outside_of_training():
                self._sample(trainer)

    def _sample(self, trainer: Trainer) -> None:
        began = time.perf_counter()
        settings = trainer.config.samples
        denoiser = averaged_denoiser(trainer)
        jobs = [(difference, video) for difference in settings.differences for video in range(settings.num_videos)]
        made: dict[str, str] = {}
        problem: str | None = None
        try:
            assert settings.ar_vae is not None
            ar_vae = load_ar_vae(Path(settings.ar_vae).expanduser(), trainer.world.device)
            self._make(trainer, denoiser, ar_vae, jobs[trainer.world.rank :: trainer.world.size], made)
        except (OSError, ArdistError, torch.OutOfMemoryError) as error:
            problem = f"rank {trainer.world.rank}: {error}"
        del denoiser
        results = trainer.world.all_gather([made, problem])
        media = {name: path for paths, _ in results for name, path in paths.items()}
        for _, what in results:
            if what is not None and trainer.world.is_main:
                events.count("samples.failed", step=trainer.step, reason=what)
        record = {"kind": "samples", "step": trainer.step, "videos": len(media), "media": dict(sorted(media.items()))}
        record |= {"seconds": time.perf_counter() - began, "time": time.time()}
        trainer.records.write(record)
        if trainer.world.is_main:
            _log.info("sampled %d videos at step %d in %.1f s", len(media), trainer.step, record["seconds"])

    def _make(
        self,
        trainer: Trainer,
        denoiser: Denoiser,
        ar_vae: ARVAE,
        jobs: list[tuple[int, int]],
        made: dict[str, str],
    ) -> None:
        """Sample, decode and write this rank's videos; `made` gets their names and paths, one by one."""
        settings = trainer.config.samples
        num_frames, sampler = sampler_of(trainer.config, trainer.data.manifests, denoiser)
        by_difference: dict[int, list[int]] = defaultdict(list)
        for difference, video in jobs:
            by_difference[difference].append(video)
        for difference, videos in by_difference.items():
            for first in range(0, len(videos), AT_ONCE):
                ids = torch.tensor(videos[first : first + AT_ONCE])
                latents = sampler.sample(num_frames, **arguments_of(trainer.config, denoiser, difference, ids))
                for video, clip in zip(ids.tolist(), latents, strict=True):
                    with torch.no_grad():
                        pixels = ar_vae.decode(clip[None])[0].float().clamp(0.0, 1.0)
                    frames = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
                    name = f"s{difference:02d}-video-{video:02d}"
                    path = Path("samples") / f"step-{trainer.step:08d}" / f"{name}.mp4"
                    fault.point("samples.before_write")
                    write_mp4(trainer.run.path / path, frames, settings.fps)
                    made[name] = str(path)


def sampler_of(config: TrainConfig, manifests: Sequence[Manifest], denoiser: Denoiser) -> tuple[int, ADSampler]:
    """How many frames are sampled, and with what; longer videos than the training's are seen through its window."""
    trained = max(manifest.shape[0] for manifest in manifests)
    num_frames = config.samples.num_frames or trained
    window = None if num_frames <= trained else min(trained, denoiser.config.window or trained)
    schedule = NoiseSchedule.create(config.diffusion.schedule, config.diffusion.num_timesteps)
    return num_frames, ADSampler(denoiser, schedule, target=config.diffusion.target, window=window)


def arguments_of(config: TrainConfig, denoiser: Denoiser, difference: int, ids: torch.Tensor) -> dict[str, Any]:
    """The sampler's arguments for the videos of these numbers."""
    settings, classes = config.samples, denoiser.config.num_classes
    return {
        "num_inference_steps": settings.num_inference_steps,
        "difference": difference,
        "guidance_scale": settings.guidance_scale,
        "batch_size": len(ids),
        "seed": settings.seed,
        "video_ids": ids,
        "class_ids": None if classes is None else ids % classes,
    }


def averaged_denoiser(trainer: Trainer) -> Denoiser:
    """A denoiser of this rank's own with the averaged weights of the largest decay, or the raw ones where there is no
    average (collective)."""
    config = trainer.config.denoiser
    assert config is not None
    fragments = trainer.engine.fragments
    averages = None if trainer.ema is None else trainer.ema.buffers[max(trainer.ema.buffers)]
    stretches = [fragments.master(run) for run in fragments.owned] if averages is None else averages
    with torch.random.fork_rng(devices=[]):  # a model draws its first weights: the run must not notice
        denoiser = Denoiser(config).to(trainer.world.device, trainer.engine.dtype).eval()
    with torch.no_grad():
        for name, value in fragments.whole(stretches):
            denoiser.get_parameter(name).copy_(value)
    return denoiser


def samples_problems(config: TrainConfig, manifests: Sequence[Manifest]) -> Iterator[str]:
    """Why this run could not sample the videos it is asked for, one line each."""
    if config.samples.every is None or config.task != "denoiser":
        return
    if config.samples.ar_vae is not None:
        yield from _decoder_problems(config, Path(config.samples.ar_vae).expanduser(), manifests)
    if manifests:
        yield from _sampler_problems(config, manifests)


def _sampler_problems(config: TrainConfig, manifests: Sequence[Manifest]) -> Iterator[str]:
    """What the sampler itself refuses of a denoiser without values: it looks at its arguments before it runs."""
    assert config.denoiser is not None
    settings = config.samples
    with torch.device("meta"):
        denoiser = Denoiser(config.denoiser)
    refusals: dict[str, None] = {}
    # With the largest difference there is nothing to refuse about differences, and everything else shows.
    for difference in dict.fromkeys([settings.num_inference_steps, *settings.differences]):
        try:
            num_frames, sampler = sampler_of(config, manifests, denoiser)
            sampler.stream(num_frames, **arguments_of(config, denoiser, difference, torch.arange(1)))
        except InvalidValueError as error:
            refusals[str(error)] = None
    for refusal in refusals:
        yield f"samples: {refusal}"


def _decoder_problems(config: TrainConfig, path: Path, manifests: Sequence[Manifest]) -> Iterator[str]:
    """Why the bundle cannot decode what this run learns to make."""
    model = config.denoiser
    assert model is not None
    try:
        written = read_config(path)
    except CheckpointError as error:
        yield f"samples.ar_vae: {error}"
        return
    shape = tuple(written.get("ar_vae", {}).get(name) for name in ("tokens_per_frame", "latent_channels"))
    wanted = (model.tokens_per_frame, model.latent_channels)
    if "ar_vae" not in written:
        yield f"samples.ar_vae: {path} holds no AR-VAE"
    elif shape != wanted:
        yield (
            f"samples.ar_vae: {path} decodes {shape[0]} tokens x {shape[1]} channels per frame; the denoiser makes "
            f"{wanted[0]} x {wanted[1]}"
        )
    digest = written.get("digests", {}).get(AR_VAE_FILE)
    makers = {found.vae.weights_digest for found in manifests if found.vae is not None}
    if digest is not None and makers and digest not in makers:
        made = ", ".join(sorted(f"{maker[:12]}…" for maker in makers))
        yield f"samples.ar_vae: {path} is the AR-VAE {digest[:12]}…; the latents were made by {made}"
