"""From decoded clips to what a shard stores: the pixels themselves, or latents of an AR-VAE."""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
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
    """Turns clips into stored arrays; `identity` goes into the dataset's parameters."""

    identity: EncoderIdentity
    dtype: SampleDtype
    batch_size: int

    @abstractmethod
    def encode(self, clips: Sequence[Frames]) -> list[Stored | Refusal]:
        """One stored array, or why there is none, for each uint8 [F, H, W, 3] clip."""

    @abstractmethod
    def sample_shape(self, num_frames: int, size: int) -> tuple[int, ...]:
        """Shape of one stored sample; raises `ConfigError` for frames that the encoder cannot take."""


class PixelEncoder(Encoder):
    """Stores the frames as they are: uint8 [F, H, W, 3]."""

    identity = EncoderIdentity()
    dtype: SampleDtype = "uint8"
    batch_size = 1

    def encode(self, clips: Sequence[Frames]) -> list[Stored | Refusal]:
        return list(clips)

    def sample_shape(self, num_frames: int, size: int) -> tuple[int, ...]:
        return (num_frames, size, size, 3)


class LatentEncoder(Encoder):
    """Stores float16 latents [F, L, C]: the posterior mean of an AR-VAE bundle."""

    dtype: SampleDtype = "float16"

    def __init__(self, bundle: str, *, device: str, precision: Precision, batch_size: int) -> None:
        folder = Path(bundle).expanduser()
        if not folder.is_dir():
            raise ConfigError(f"--encoder {bundle!r} is not a folder; legal: pixels, or a bundle with an AR-VAE")
        from ardist.models.weights import AR_VAE_FILE, load_ar_vae, weights_digest

        self.model: ARVAE = load_ar_vae(folder, device=device).eval()
        self.device, self.precision, self.batch_size = device, precision, batch_size
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

    def encode(self, clips: Sequence[Frames]) -> list[Stored | Refusal]:
        import torch

        batch = torch.from_numpy(np.stack(clips)).to(self.device)
        try:
            latents = self._forward(batch)
        except (torch.OutOfMemoryError, MemoryError):
            if len(clips) == 1:
                events.count("build.encoder_out_of_memory", device=self.device)
                return [Refusal(Reason.MEMORY, "the encoder ran out of memory with this clip alone")]
            half = len(clips) // 2
            events.count("build.encoder_batch_halved", device=self.device, clips=len(clips))
            return [*self.encode(clips[:half]), *self.encode(clips[half:])]
        stored = latents.to(torch.float16)
        if fault.point("build.encoded") == "nan":
            stored[0] = float("nan")
        finite = torch.isfinite(stored).flatten(1).all(1).tolist()
        arrays = stored.cpu().numpy()
        return [
            array if good else Refusal(Reason.NONFINITE, "the encoder gave NaN, infinity or a value beyond float16")
            for array, good in zip(arrays, finite, strict=True)
        ]

    def _forward(self, batch: torch.Tensor) -> torch.Tensor:
        import torch

        kind = torch.device(self.device).type
        autocast = torch.autocast(kind, torch.bfloat16) if self.precision == "bf16" else contextlib.nullcontext()
        with torch.inference_mode(), autocast:
            frames = batch.permute(0, 1, 4, 2, 3).to(torch.float32).div_(255)
            return self.model.encode(frames).float()


def make_encoder(name: str, *, device: str, precision: str, batch_size: int) -> Encoder:
    """The encoder called ``pixels``, or the AR-VAE of a bundle folder; raises `ConfigError`, `HardwareError`."""
    chosen = cast(Precision, choose("precision", precision, get_args(Precision)))
    if name == "pixels":
        return PixelEncoder()
    return LatentEncoder(name, device=resolve_device(device), precision=chosen, batch_size=batch_size)


def resolve_device(device: str) -> str:
    """``auto`` means a GPU when there is one; a GPU asked for and absent is a `HardwareError`."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise HardwareError(f"--device {device}: this machine has no CUDA device; legal here: cpu")
    return device


def batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Consecutive groups of `size` items."""
    group: list[Any] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def default_threads() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
