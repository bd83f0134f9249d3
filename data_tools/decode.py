"""From a video to its clips: decode a stretch; where it is damaged, keep the clips that the damage does not touch."""

from __future__ import annotations

import functools
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from ardist.events import events
from data_tools.damage import Interval, touches
from data_tools.ffmpeg_graph import DecodeRequest, command_line
from data_tools.frame_stream import Frames, FrameStream
from data_tools.probe import VideoFacts
from data_tools.probe_pool import ProbeChild
from data_tools.reasons import Reason, Refusal

STRETCH_BYTES, STRETCH_FRAMES = 128 * 2**20, 2048
"""A seekable video is decoded in stretches of at most this much; part of how a shard is defined, not a tuning knob."""

SECONDS_PER_FRAME = 0.1
"""Slower than this, a frame counts as a hang; added to the timeout for every frame that must be decoded."""


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
    are none. Which clips are refused for damage depends on the file alone: a stretch without any is taken as it is,
    else every clip is judged by where the damage lies.
    """
    request = _request(facts, starts, target)
    try:
        yield list(starts), _frames(path, version, request, settings, strict=True)
        return
    except Refusal as refusal:
        if refusal.reason is not Reason.DAMAGED:
            yield list(starts), refusal
            return
    events.count("build.damage_judged", level=logging.INFO, clips=len(starts))
    try:
        with ProbeChild(timeout=settings.timeout) as child:
            damage = child.damage(path, version, facts, target.max_pixels)
    except Refusal as refusal:
        yield list(starts), refusal
        return
    for group, why in _sound_groups(facts, starts, target, damage):
        if why is not None:
            yield group, why
            continue
        try:
            yield group, _frames(path, version, _request(facts, group, target), settings, strict=False)
        except Refusal as refusal:
            yield from _one_by_one(path, version, facts, group, target, settings, refusal)


def _request(facts: VideoFacts, starts: Sequence[int], target: Target) -> DecodeRequest:
    count = starts[-1] + target.num_frames - starts[0]
    return DecodeRequest(facts, starts[0], count, target.fps, target.size, target.max_pixels)


def _sound_groups(
    facts: VideoFacts, starts: Sequence[int], target: Target, damage: Sequence[Interval]
) -> Iterator[tuple[list[int], Refusal | None]]:
    """Runs of clips that no damage touches, and each other clip by itself with its refusal; in order."""
    group: list[int] = []
    for start in starts:
        why = _touched(_request(facts, [start], target), damage)
        if why is None:
            group.append(start)
            continue
        if group:
            yield group, None
        yield [start], why
        group = []
    if group:
        yield group, None


def _touched(request: DecodeRequest, damage: Sequence[Interval]) -> Refusal | None:
    """Why a clip is refused: damage to a frame that it shows. Rounding to the grid counts as half a frame."""
    if request.facts.by_index:
        # Without times the damage cannot be placed: what a video without times holds is whole or refused.
        return Refusal(Reason.DAMAGED, "damaged, and without times that could tell where") if damage else None
    half = max(1 / request.fps, 1 / Fraction(request.facts.rate)) / 2
    first = request.begin - Fraction(request.facts.max_gap) - half
    last = request.begin + (request.count - 1) / request.fps + half
    found = touches(damage, first, last)
    if found is None:
        return None
    until = "the end" if found[1] is None else f"{float(found[1]):.3f} s"
    return Refusal(Reason.DAMAGED, f"damaged from {float(found[0]):.3f} s to {until}")


def _one_by_one(
    path: str,
    version: str | None,
    facts: VideoFacts,
    group: list[int],
    target: Target,
    settings: DecodeSettings,
    refusal: Refusal,
) -> Iterator[tuple[list[int], Frames | Refusal]]:
    """Clips of a sound group of which not all frames came: those whose frames do come by themselves are kept."""
    if len(group) == 1 or refusal.reason is not Reason.DAMAGED:
        yield group, refusal
        return
    for start in group:
        try:
            yield [start], _frames(path, version, _request(facts, [start], target), settings, strict=False)
        except Refusal as why:
            yield [start], why


def _frames(
    path: str, version: str | None, request: DecodeRequest, settings: DecodeSettings, *, strict: bool
) -> Frames:
    """All frames of a request; raises `Refusal` unless every one came and, if `strict`, the process ended well."""
    frames = _room((request.count, request.size, request.size, 3), settings)
    command = functools.partial(command_line, request, strict=strict)
    # A hanging decoder is given up soon, an honest one with a long way to go is not.
    patience = settings.timeout + SECONDS_PER_FRAME * request.decoded_frames
    with FrameStream(path, version, command, timeout=patience, memory=settings.memory) as stream:
        got = stream.read_into(frames)
        complaint = stream.finish()
    if got < request.count:
        raise Refusal(Reason.DAMAGED, f"only {got} of {request.count} frames came")
    if complaint and strict:
        raise Refusal(Reason.DAMAGED, complaint.replace("file:/dev/fd/", "fd "))
    return frames


def _room(shape: tuple[int, ...], settings: DecodeSettings) -> Frames:
    """Memory for a stretch; of a long one that cannot be split, pages of an unnamed file that the system can evict."""
    if int(np.prod(shape)) <= settings.held_bytes:
        return np.empty(shape, np.uint8)
    with tempfile.TemporaryFile(dir=settings.scratch, prefix="stretch-") as file:
        # Really there before it is mapped: a full disk is then an error here, not a signal at the first touch.
        os.posix_fallocate(file.fileno(), 0, int(np.prod(shape)))
        return np.memmap(file, np.uint8, mode="r+", shape=shape)
