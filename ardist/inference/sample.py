"""From a bundle to mp4 files: what ``ardist sample`` does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor

from ardist.errors import ConfigError, HardwareError, InvalidValueError, choose
from ardist.inference.bundle import Bundle, load_bundle
from ardist.inference.context_file import read_context
from ardist.inference.sampler import ADSampler
from ardist.inference.sampler import Progress as RowProgress
from ardist.inference.video_io import Mp4Writer, check_fps, read_frames
from ardist.log import console

MAX_BATCH = 8
"""Videos that are sampled at once."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def sample_to_file(
    bundle: Path,
    out: Path,
    *,
    num_frames: int | None = None,
    difference: int | None = None,
    num_inference_steps: int | None = None,
    window: int | None = None,
    window_kind: str | None = None,
    prefix: Path | None = None,
    prefix_frames: int | None = None,
    class_id: int | None = None,
    context: Path | None = None,
    guidance_scale: float | int | None = None,
    seed: int = 0,
    num_videos: int = 1,
    fps: float | int | None = None,
    stream: bool = False,
    weights: str = "ema",
    device: str | None = None,
    dtype: str | None = None,
    compile: bool = False,
) -> list[Path]:
    """Sample videos and write them as mp4; returns their paths. What is None is the bundle's default.

    Args:
        bundle: a bundle with an AR-VAE.
        out: the file; with several videos ``-0``, ``-1``, … is added to its name. Video i of a seed is the same
            whatever `num_videos` is.
        num_frames: length of the video, prefix included.
        class_id: class of a class-conditional bundle; None is no class.
        context: a file of context tokens for all videos or for each, as of `read_context`; None is the null context.
        prefix: a video whose last frames, or an image which, the video starts with.
        prefix_frames: how many frames of a prefix video are taken; None: as many as there are, but at most half of the
            video and half of the window.
        window, window_kind: as of `ADSampler`.
        stream: decode and write each frame as soon as it is final, so that memory does not grow with the video.
        weights: ``ema`` or ``raw``.
        device: None is a GPU if there is one.
        dtype: of the denoiser, one of `DTYPES`; None is bfloat16 on a GPU and float32 on a CPU.

    Raises:
        ArdistError: one message with what was wrong and what is legal, before anything is sampled where possible.
    """
    if num_videos < 1:
        raise InvalidValueError(f"num_videos={num_videos} is illegal; legal: at least 1")
    if out.suffix.lower() != ".mp4":
        raise InvalidValueError(f"out={str(out)!r} is illegal; legal: a name that ends in .mp4")
    if prefix_frames is not None and prefix is None:
        raise InvalidValueError(f"prefix_frames={prefix_frames} is illegal without a prefix; legal: with one, or None")
    rate = None if fps is None else check_fps(fps)
    place = _device(device)
    if dtype is None:
        dtype = "bfloat16" if place.type == "cuda" else "float32"
    opened = load_bundle(bundle, weights, place, DTYPES[choose("dtype", dtype, DTYPES)])
    opened.ar_vae.eval()  # read now: a bundle without one is refused before anything is sampled
    if out.is_dir():
        raise InvalidValueError(f"out={str(out)!r} is a directory; legal: the name of a file")
    out.parent.mkdir(parents=True, exist_ok=True)
    defaults = opened.sampler_defaults
    if class_id is not None and opened.denoiser.config.num_classes is None:
        raise InvalidValueError(f"class_id={class_id} is illegal: the bundle has no classes; legal: none")
    told = None if context is None else read_context(context, opened.denoiser.config, num_videos)
    sampler = opened.sampler(window=window, window_kind=window_kind, compile=compile)
    frames = defaults.num_frames if num_frames is None else num_frames
    steps = defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
    given = None if prefix is None else _encode_prefix(opened, sampler, prefix, frames, prefix_frames)
    scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
    paths = [out] if num_videos == 1 else [out.with_stem(f"{out.stem}-{number}") for number in range(num_videos)]
    for first in range(0, num_videos, MAX_BATCH):
        chosen = range(first, min(first + MAX_BATCH, num_videos))
        count = len(chosen)
        with _ProgressBar(f"videos {first}-{chosen[-1]}" if num_videos > 1 else "video") as bar:
            latents = _latents(
                sampler,
                frames,
                None if given is None else given.expand(count, -1, -1, -1),
                bar,
                num_inference_steps=steps,
                difference=defaults.difference if difference is None else difference,
                guidance_scale=scale,
                batch_size=count,
                seed=seed,
                video_ids=torch.tensor(list(chosen)),
                context=None if told is None else told[chosen.start : chosen.stop],
                class_ids=None if class_id is None else torch.full((count,), class_id),
            )
            if not stream:
                latents = iter([torch.cat(list(latents), dim=1)])
            _write(opened, latents, [paths[number] for number in chosen], rate or defaults.fps)
    return paths


def _latents(
    sampler: ADSampler,
    num_frames: int,
    prefix: Float[Tensor, "b p l c"] | None,
    bar: _ProgressBar,
    **arguments: object,
) -> Iterator[Float[Tensor, "b f l c"]]:
    """The prefix, then each frame as it becomes final, as pieces [b f l c]."""
    # What is illegal is refused here, before the prefix is decoded and written.
    frames = sampler.stream(num_frames, prefix=prefix, progress=bar.update, **arguments)  # type: ignore[arg-type]
    if prefix is not None:
        yield prefix.float()
    for frame in frames:
        yield frame.latents[:, None]


@torch.no_grad()
def _write(bundle: Bundle, latents: Iterable[Float[Tensor, "b f l c"]], paths: list[Path], fps: float | int) -> None:
    with ExitStack() as stack:
        writers = [stack.enter_context(Mp4Writer(path, fps)) for path in paths]
        for pixels in bundle.ar_vae.decode_stream(latents):
            for writer, frames in zip(writers, _to_bytes(pixels), strict=True):
                writer.write(frames)


def _to_bytes(pixels: Float[Tensor, "b f 3 h w"]) -> UInt8[ndarray, "b f h w 3"]:
    quantised: UInt8[ndarray, "b f h w 3"]
    quantised = (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2).cpu().numpy()
    return quantised


@torch.no_grad()
def _encode_prefix(
    bundle: Bundle, sampler: ADSampler, path: Path, num_frames: int, prefix_frames: int | None
) -> Float[Tensor, "1 p l c"]:
    """Latents of the last frames of a video, or of an image."""
    limit = max(1, min(num_frames, sampler.window or num_frames) // 2)
    if prefix_frames is not None and not 0 < prefix_frames < num_frames:
        raise InvalidValueError(f"prefix_frames={prefix_frames} is illegal; legal: 1 to {num_frames - 1}")
    size = bundle.ar_vae.config.image_size
    frames = torch.from_numpy(read_frames(path, size, limit if prefix_frames is None else prefix_frames, last=True))
    if prefix_frames is not None and len(frames) < prefix_frames:
        raise InvalidValueError(
            f"prefix_frames={prefix_frames} is illegal: {str(path)!r} has {len(frames)} frames; "
            f"legal: 1 to {len(frames)}"
        )
    pixels = frames.permute(0, 3, 1, 2)[None].to(bundle.device).float() / 255
    latents: Tensor = bundle.ar_vae.encode(pixels)
    return latents


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r} is not known; legal: cpu, cuda, cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported; legal: cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise HardwareError(f"device {name!r} is not here; there are {torch.cuda.device_count()} CUDA devices")
    return device


class _ProgressBar:
    """Frames done and frames per second on the console; nothing where that is no terminal."""

    def __init__(self, title: str) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=None, state="")

    def update(self, progress: RowProgress) -> None:
        """Show where the sampler is; a row moves the bar, since frames come late and then fast."""
        state = f"{progress.frames_done}/{progress.num_frames} frames, {progress.frames_per_second:.2f} frames/s"
        self._bar.update(self._task, total=progress.num_rows, completed=progress.row, state=state)

    def __enter__(self) -> _ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
