"""From a video to its clips: decode a stretch, and where that fails, halve it until the damage is cornered."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from data_tools.ffmpeg_graph import DecodeRequest, command_line
from data_tools.frame_stream import Frames, FrameStream
from data_tools.probe import VideoFacts
from data_tools.reasons import Reason, Refusal

STRETCH_BYTES, STRETCH_FRAMES = 128 * 2**20, 2048
"""A seekable video is decoded in stretches of at most this much; part of how a shard is defined, not a tuning knob."""

SECONDS_PER_FRAME = 0.1
"""Slower than this, a frame counts as a hang; added to the timeout for every frame that must be decoded."""

_WHOLE = frozenset(Reason) - {Reason.DAMAGED}
"""Refusals that halving cannot narrow down, or that cost too much to be met more than once."""


@dataclass(frozen=True)
class DecodeSettings:
    """How decoding is done here; none of it changes a pixel."""

    timeout: float = 300.0
    memory: int = 4 * 2**30
    held_bytes: int = STRETCH_BYTES
    scratch: Path | None = None


@dataclass(frozen=True)
class Target:
    """What clips look like."""

    num_frames: int
    fps: Fraction
    size: int
    max_pixels: int


def stretches(starts: Sequence[int], target: Target, seekable: bool) -> Iterator[list[int]]:
    """Split ascending clip starts where a new process is better than decoding through.

    That is where a seek skips more than ten seconds, and where a stretch would grow beyond its bounds. A video that
    cannot be sought in is one stretch.
    """
    most = max(target.num_frames, min(STRETCH_FRAMES, STRETCH_BYTES // (target.size * target.size * 3)))
    stretch: list[int] = []
    for start in starts:
        if stretch and seekable:
            gap = (start - stretch[-1] - target.num_frames) / target.fps
            if gap > 10 or start + target.num_frames - stretch[0] > most:
                yield stretch
                stretch = []
        stretch.append(start)
    if stretch:
        yield stretch


def decode_stretch(
    path: str, version: str | None, facts: VideoFacts, starts: Sequence[int], target: Target, settings: DecodeSettings
) -> Iterator[tuple[list[int], Frames | Refusal]]:
    """Consecutive groups of the clips that begin at grid frames `starts` (ascending), in order.

    With each group come its frames uint8 [n, H, W, 3], the first of which is the first clip's first, or why there
    are none. Which clips are refused depends on the file alone: a stretch counts only when its process ended well,
    else both halves are tried by themselves, down to single clips.
    """
    count = starts[-1] + target.num_frames - starts[0]
    request = DecodeRequest(facts, starts[0], count, target.fps, target.size, target.max_pixels)
    try:
        yield list(starts), _frames(path, version, request, settings)
        return
    except Refusal as refusal:
        if len(starts) == 1 or refusal.reason in _WHOLE:
            yield list(starts), refusal
            return
    half = len(starts) // 2
    for part in (starts[:half], starts[half:]):
        yield from decode_stretch(path, version, facts, part, target, settings)


def _frames(path: str, version: str | None, request: DecodeRequest, settings: DecodeSettings) -> Frames:
    """All frames of a request; raises `Refusal` unless every one came and the process ended well."""
    frames = _room((request.count, request.size, request.size, 3), settings)
    command = functools.partial(command_line, request)
    # A hanging decoder is given up soon, an honest one with a long way to go is not.
    patience = settings.timeout + SECONDS_PER_FRAME * request.decoded_frames
    with FrameStream(path, version, command, timeout=patience, memory=settings.memory) as stream:
        got = stream.read_into(frames)
        complaint = stream.finish()
    if complaint:
        raise Refusal(Reason.DAMAGED, complaint.replace("file:/dev/fd/", "fd "))
    if got < request.count:
        raise Refusal(Reason.DAMAGED, f"only {got} of {request.count} frames came")
    return frames


def _room(shape: tuple[int, ...], settings: DecodeSettings) -> Frames:
    """Memory for a stretch; of a long one that cannot be split, pages of an unnamed file that the system can evict."""
    if int(np.prod(shape)) <= settings.held_bytes:
        return np.empty(shape, np.uint8)
    with tempfile.TemporaryFile(dir=settings.scratch, prefix="stretch-") as file:
        file.truncate(int(np.prod(shape)))
        return np.memmap(file, np.uint8, mode="r+", shape=shape)
