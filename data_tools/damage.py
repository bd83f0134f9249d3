"""Where a video is damaged: decoded once, packet by packet in one thread, by PyAV inside a child process.

ffmpeg's threads read ahead, so when it stops with an error, which frames had come by then is chance. This verdict is
not: the same file always gives the same intervals, by ffmpeg's own two signs (a packet that a decoder refuses, a
frame that it marks as damaged). Frames after the damage lean on it until the next key frame that is a whole picture.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from data_tools.probe import demux_options, open_checked
from data_tools.reasons import Reason, Refusal

Interval = tuple[Fraction, Fraction | None]
"""From a time up to, not including, another; None: to the end. Seconds of the container's clock."""

ERRORS = "crccheck+bitstream+buffer+explode"
"""What a decoder must not gloss over: every error of a packet is reported as one."""

REORDERED = 16
"""Most frames that a decoder holds back: how far a decoding time may lie from the time of showing."""


def find_damage(path: str, version: str | None, stream_index: int, max_pixels: int) -> list[Interval]:
    """The damaged intervals of a video, ascending and apart; raises `Refusal` when it cannot be opened at all."""
    import av

    descriptor = open_checked(path, version)
    try:
        with av.open(f"file:/dev/fd/{descriptor}", options=demux_options(), metadata_errors="replace") as container:
            stream = container.streams[stream_index]
            stream.codec_context.thread_count = 1
            stream.codec_context.options = {"max_pixels": str(max_pixels), "err_detect": ERRORS}
            marks, keys, slack = _marks(container, stream)
            base = Fraction(stream.time_base or 1)
    except (av.FFmpegError, IndexError) as error:
        raise Refusal(Reason.DAMAGED, f"cannot be opened: {error}") from None
    finally:
        os.close(descriptor)
    return _intervals(sorted(marks), sorted(keys), slack, base)


def _marks(container: Any, stream: Any) -> tuple[list[int], list[int], int]:
    """Times of damaged frames, of key frames, and how far off they may be, in units of the stream's clock."""
    import av
    from av.video.frame import PictureType

    marks: list[int] = []
    keys: list[int] = []
    times: list[int] = []
    exact = True
    shown: int | None = None
    waiting: list[int] = []  # times of packets whose frames have not come out yet, ascending
    last = 0

    def mark(time: int) -> None:
        """The packet of `time` failed: so did whatever is still inside the decoder with it."""
        marks.extend((time, min([time, *waiting[:1]])))

    def collect(frames: Sequence[Any]) -> None:
        nonlocal exact, shown
        for frame in frames:
            # A frame without a time is taken for the first of those that wait.
            time = frame.pts if frame.pts is not None else (waiting[0] if waiting else last)
            # Frames leave a decoder in the order of showing, so times that fall back are times of decoding.
            exact, shown = exact and (shown is None or shown <= time), time
            if frame.is_corrupt:
                marks.append(time)
            elif frame.key_frame and frame.pict_type in (PictureType.I, PictureType.NONE):
                # A refresh that is spread over many frames begins at a "key" frame that is only predicted.
                keys.append(time)
            del waiting[: bisect.bisect_right(waiting, time)]

    try:
        for packet in container.demux(stream):
            if packet.size == 0:
                continue
            time = packet.pts if packet.pts is not None else packet.dts
            exact = exact and packet.pts is not None
            last = last if time is None else time
            times.append(last)
            bisect.insort(waiting, last)
            if packet.is_corrupt:
                mark(last)
            try:
                collect(packet.decode())
            except av.FFmpegError:
                mark(last)
    except av.FFmpegError:
        mark(last)  # the container itself breaks off here
    try:
        collect(stream.codec_context.decode(None))
    except av.FFmpegError:
        mark(waiting[0] if waiting else last)
    slack = 0 if exact or len(times) < 2 else REORDERED * (max(times) - min(times)) // (len(times) - 1)
    return marks, keys, slack


def _intervals(marks: Sequence[int], keys: Sequence[int], slack: int, base: Fraction) -> list[Interval]:
    """From every mark to the next key frame, wider by `slack` on both sides, joined where they touch."""
    found: list[Interval] = []
    for mark in marks:
        at = bisect.bisect_right(keys, mark)
        end = (keys[at] + slack) * base if at < len(keys) else None
        start = (mark - slack) * base
        if found and (found[-1][1] is None or start <= found[-1][1]):
            start = found.pop()[0]
        found.append((start, end))
    return found


def touches(intervals: Sequence[Interval], first: Fraction, last: Fraction) -> Interval | None:
    """The first damaged interval that holds a time of [first, last], or None."""
    return next(((a, b) for a, b in intervals if a <= last and (b is None or b > first)), None)
