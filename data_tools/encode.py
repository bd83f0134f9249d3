"""From decoded clips to what a shard stores: the pixels themselves, or latents of an AR-VAE."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt

from ardist import fault
from ardist.data.sample import SampleDtype
from ardist.errors import ConfigError, HardwareError, choose
from ardist.events import events
from data_tools.frame_stream import Frames
from data_tools.parameters import EncoderIdentity
from data_tools.reasons import Reason, Refusal

if TYPE_CHECKING:
    import torch

    from ardist.models.ar_vae import ARVAE

Stored = npt.NDArray[Any]
Precision = Literal["fp32", "bf16"]


class Encoder(ABC):
    """Turns stretches of frames into the stored arrays of clips; `identity` goes into the dataset's parameters."""

    identity: EncoderIdentity
    dtype: SampleDtype

    @abstractmethod
    def encode(self, frames: Frames, offsets: Sequence[int], num_frames: int) -> Iterator[Stored | Refusal]:
        """For each clip frames[offset : offset + num_frames] of uint8 [n, H, W, 3]: what is stored, or why not."""

    @abstractmethod
    def sample_shape(self, num_frames: int, size: int) -> tuple[int, ...]:
        """Shape of one stored sample; raises `ConfigError` for frames that the encoder cannot take."""


class PixelEncoder(Encoder):
    """Stores the frames as they are: uint8 [F, H, W, 3]."""

    identity = EncoderIdentity()
    dtype: SampleDtype = "uint8"

    def encode(self, frames: Frames, offsets: Sequence[int], num_frames: int) -> Iterator[Stored | Refusal]:
        return (frames[offset : offset + num_frames] for offset in offsets)

    def sample_shape(self, num_frames: int, size: int) -> tuple[int, ...]:
        return (num_frames, size, size, 3)


class LatentEncoder(Encoder):
    """Stores float16 latents [F, L, C]: the posterior mean of an AR-VAE bundle.

    The autoencoder looks at every frame by itself (METHOD section 5), so a frame that several clips share is encoded
    once.
    """

    dtype: SampleDtype = "float16"

    def __init__(self, bundle: str, *, device: str, precision: Precision, batch_frames: int) -> None:
        folder = Path(bundle).expanduser()
        if not folder.is_dir():
            raise ConfigError(f"--encoder {bundle!r} is not a folder; legal: pixels, or a bundle with an AR-VAE")
        from ardist.models.weights import AR_VAE_FILE, load_ar_vae, weights_digest

        self.model: ARVAE = load_ar_vae(folder, device=device).eval()
        self.device, self.precision, self.batch_frames = device, precision, batch_frames
        self.identity = EncoderIdentity(
            kind="latents",
            weights_digest=weights_digest(folder / AR_VAE_FILE),
            config_digest=self.model.config.digest(),
            precision=precision,
        )

    def sample_shape(self, num_frames: int, size: int) -> tuple[int, ...]:
        config = self.model.config
        if size != config.image_size:
            raise ConfigError(f"--size {size} does not fit the encoder; legal: {config.image_size}")
        return (num_frames, config.tokens_per_frame, config.latent_channels)

    def encode(self, frames: Frames, offsets: Sequence[int], num_frames: int) -> Iterator[Stored | Refusal]:
        used = sorted({frame for offset in offsets for frame in range(offset, offset + num_frames)})
        row_of = {frame: row for row, frame in enumerate(used)}
        config = self.model.config
        latents = np.empty((len(used), config.tokens_per_frame, config.latent_channels), np.float16)
        problems: dict[int, Refusal] = {}
        for low in range(0, len(used), self.batch_frames):
            numbers = used[low : low + self.batch_frames]
            part = frames[numbers[0] : numbers[-1] + 1] if numbers[-1] - numbers[0] < len(numbers) else frames[numbers]
            problems |= {numbers[i]: why for i, why in self._rows(part, latents[low : low + len(numbers)]).items()}
        for offset in offsets:
            bad = next((problems[frame] for frame in range(offset, offset + num_frames) if frame in problems), None)
            yield bad or latents[row_of[offset] : row_of[offset] + num_frames]

    def _rows(self, frames: Frames, latents: Stored) -> dict[int, Refusal]:
        """Encode frames into rows of `latents`; returns the rows that failed. Halves what does not fit memory."""
        import torch

        try:
            stored = self._forward(torch.from_numpy(frames).to(self.device)).to(torch.float16)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(error):
                raise  # on a CPU lack of memory is a plain RuntimeError with these words
            if len(frames) == 1:
                events.count("build.encoder_out_of_memory", device=self.device)
                return {0: Refusal(Reason.MEMORY, "the encoder ran out of memory with a single frame")}
            events.count("build.encoder_batch_halved", device=self.device, frames=len(frames))
            half = len(frames) // 2
            second = self._rows(frames[half:], latents[half:])
            return self._rows(frames[:half], latents[:half]) | {half + row: why for row, why in second.items()}
        if fault.point("build.encoded") == "nan":
            stored[0] = float("nan")
        latents[:] = stored.cpu().numpy()
        wrong = torch.nonzero(~torch.isfinite(stored).flatten(1).all(1)).flatten().tolist()
        return {row: Refusal(Reason.NONFINITE, "the encoder gave NaN or infinity, or beyond float16") for row in wrong}

    def _forward(self, batch: torch.Tensor) -> torch.Tensor:
        import torch

        kind = torch.device(self.device).type
        autocast = torch.autocast(kind, torch.bfloat16) if self.precision == "bf16" else contextlib.nullcontext()
        with torch.inference_mode(), autocast:
            frames = batch.permute(0, 3, 1, 2).to(torch.float32).div_(255)
            return self.model.encode(frames[None])[0].float()


@dataclass(frozen=True)
class EncoderChoice:
    """Which encoder, where: ``pixels`` or a bundle folder. Small enough to hand to another process."""

    name: str = "pixels"
    device: str = "auto"
    precision: str = "fp32"
    batch_frames: int = 128

    def make(self) -> Encoder:
        """Load the encoder, once per process; raises `ConfigError`, `HardwareError`, `CheckpointError`."""
        return _load(self)

    def device_names(self) -> list[str]:
        """What was asked for, whether it is here or not; raises `ConfigError` for what is no device."""
        names = self.device.split(",")
        for name in names:
            if re.fullmatch(r"auto|cpu|cuda(:\d+)?", name) is None:
                raise ConfigError(
                    f"--device {name!r} is not a device; legal: auto, cpu, cuda, cuda:N, or several like cuda:0,cuda:1"
                )
        return names

    def devices(self) -> tuple[str, ...]:
        """Where workers of this machine encode, in turn; raises `HardwareError` for a device that is not here."""
        names = self.device_names()
        if self.name == "pixels":
            return ("cpu",)
        return tuple(device for name in names for device in resolve_device(name))

    def for_worker(self, number: int) -> EncoderChoice:
        """The same on the device of one worker: they take the devices in turn."""
        devices = self.devices()
        return replace(self, device=devices[number % len(devices)])

    def on_cpu(self) -> EncoderChoice:
        """The same on the processor, to read its identity without occupying a GPU."""
        self.device_names()
        return replace(self, device="cpu")


@functools.lru_cache(maxsize=1)
def _load(choice: EncoderChoice) -> Encoder:
    precision = cast(Precision, choose("precision", choice.precision, get_args(Precision)))
    device = choice.devices()[0]
    if choice.name == "pixels":
        return PixelEncoder()
    return LatentEncoder(choice.name, device=device, precision=precision, batch_frames=choice.batch_frames)


def resolve_device(device: str) -> tuple[str, ...]:
    """``cuda`` means every GPU, ``auto`` the same where there is one; a GPU that is not here is a `HardwareError`."""
    if device == "cpu":
        return ("cpu",)
    import torch

    gpus = tuple(f"cuda:{number}" for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0))
    if device == "auto":
        return gpus or ("cpu",)
    if device == "cuda" and gpus:
        return gpus
    if device not in gpus:
        has = f"has {', '.join(gpus)}" if gpus else "has no CUDA device"
        raise HardwareError(f"--device {device}: this machine {has}; legal here: {', '.join(('cpu', *gpus))}")
    return (device,)


def default_threads() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
