"""What is in a video file: looked at by PyAV inside a child process that may die of it."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from data_tools.reasons import Reason, Refusal
from data_tools.sandbox import ALLOWED_FORMATS, PROTOCOLS
from data_tools.sources import local_version
from data_tools.timing import Timeline, measure, seek_time

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

HASH_CHUNK = 2**20
FIRST_FRAMES = 2
"""Frames decoded by the probe, which tells an undecodable video before any plan is made."""

SEEKABLE = frozenset({"mov", "matroska"})
"""Containers whose index makes a seek land exactly on a key frame."""

ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""Codecs whose alpha is a second picture beside the first, which ffmpeg's own decoders pass over."""

_TRANSFER_PQ, _TRANSFER_HLG = 16, 18
_UNSPECIFIED = 2
_PROGRESSIVE = (0, 1)


@dataclass(frozen=True)
class VideoFacts:
    """All that planning and decoding need to know about one good video; times in seconds as fractions.

    `decoding_times`: some packets say only when they are decoded, so frames are placed to within the reordering.
    """

    sha256: str
    format: str
    stream: int
    codec: str
    width: int
    height: int
    pix_fmt: str
    sar: str
    container_start: str
    rate: str
    start: str
    last: str
    count: int
    max_gap: str
    by_index: bool
    decoding_times: bool
    interlaced: bool
    alpha: bool
    hdr: bool
    matrix_unknown: bool
    keyframes: tuple[str, ...]

    def timeline(self) -> Timeline:
        """The times as numbers."""
        rate, start, last, gap = map(Fraction, (self.rate, self.start, self.last, self.max_gap))
        return Timeline(rate, start, last, self.count, gap, self.by_index)

    def seek_before(self, time: Fraction) -> Fraction | None:
        """A safe place to start decoding from for a frame at `time`, or None for the beginning."""
        return seek_time([Fraction(key) for key in self.keyframes], time)

    def as_json(self) -> dict[str, Any]:
        """Plain values for ``probes/`` and the plan."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> VideoFacts:
        """The inverse of `as_json`."""
        return cls(**{**fields, "keyframes": tuple(fields["keyframes"])})


@dataclass(frozen=True)
class ProbeCaps:
    """What is refused before anything large is decoded."""

    max_pixels: int
    max_seconds: float
    max_aspect: float


def open_checked(path: str, version: str | None) -> int:
    """A descriptor of a regular file that is still the listed one; raises `Refusal`."""
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        gone = error.errno in (errno.ENOENT, errno.ENOTDIR)
        raise Refusal(Reason.VANISHED if gone else Reason.UNREADABLE, f"cannot be opened: {error.strerror}") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise Refusal(Reason.NOT_A_FILE, "not a regular file")
        if version is not None and local_version(found) != version:
            raise Refusal(Reason.CHANGED, "size or time changed since it was listed")
        if found.st_size == 0:
            raise Refusal(Reason.EMPTY, "zero bytes")
    except Refusal:
        os.close(descriptor)
        raise
    return descriptor


def probe(path: str, version: str | None, caps: ProbeCaps) -> VideoFacts:
    """Hash a video, read all its packet times and decode its first frames; raises `Refusal`.

    The file is opened once and named to the demuxer by its descriptor, so neither its name nor a swap matters.
    """
    descriptor = open_checked(path, version)
    try:
        sha256 = _hash(descriptor)
        facts = _demux(f"file:/dev/fd/{descriptor}", sha256, caps)
        if version is not None and local_version(os.fstat(descriptor)) != version:
            raise Refusal(Reason.CHANGED, "changed while it was probed")
        return facts
    finally:
        os.close(descriptor)


def _hash(descriptor: int) -> str:
    digest = hashlib.sha256()
    offset = 0
    while chunk := os.pread(descriptor, HASH_CHUNK, offset):
        digest.update(chunk)
        offset += len(chunk)
    return digest.hexdigest()


def demux_options() -> dict[str, str]:
    """What a demuxer may open: this file, as one of the allowed containers."""
    return {"protocol_whitelist": PROTOCOLS, "format_whitelist": ",".join(ALLOWED_FORMATS)}


def _demux(url: str, sha256: str, caps: ProbeCaps) -> VideoFacts:
    import av

    try:
        container = av.open(url, options=demux_options(), metadata_errors="replace")
    except (av.FFmpegError, ValueError, UnicodeError) as error:
        raise Refusal(Reason.FORMAT, f"not a video container that is allowed: {_plain(error)}") from None
    with container:
        stream = _choose_stream(container)
        _check_frame(stream, caps)
        return _facts(container, stream, sha256, caps)


def _choose_stream(container: InputContainer) -> VideoStream:
    """The moving picture: the default stream, else the largest, else the first."""
    from av.stream import Disposition

    still = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
    candidates = [stream for stream in container.streams.video if not stream.disposition & still]
    if not candidates:
        kinds = sorted({stream.type for stream in container.streams})
        raise Refusal(Reason.NO_VIDEO, f"no moving picture among the streams: {', '.join(kinds) or 'none'}")
    for stream in candidates:
        if _has_decoder(stream) and _is_encrypted(stream):
            raise Refusal(Reason.ENCRYPTED, "the video stream is encrypted")
    usable = [stream for stream in candidates if _has_decoder(stream)]
    if not usable:
        raise Refusal(Reason.CODEC, "no decoder for the video stream")
    return max(
        usable,
        key=lambda stream: (
            bool(stream.disposition & Disposition.default),
            stream.codec_context.width * stream.codec_context.height,
            -stream.index,
        ),
    )


def _has_decoder(stream: VideoStream) -> bool:
    # The bindings' types do not say so, but a stream of an unknown codec has no context.
    context: object = stream.codec_context
    return context is not None


def _is_encrypted(stream: VideoStream) -> bool:
    return stream.codec_context.codec_tag in ("encv", "drmi")


def _check_frame(stream: VideoStream, caps: ProbeCaps) -> None:
    width, height = stream.codec_context.width, stream.codec_context.height
    if width <= 0 or height <= 0:
        raise Refusal(Reason.DAMAGED, "the stream states no frame size")
    if width * height > caps.max_pixels:
        raise Refusal(Reason.TOO_LARGE, f"frames of {width}x{height} are above the cap of {caps.max_pixels} pixels")
    sar = Fraction(stream.sample_aspect_ratio or 1) or Fraction(1)
    aspect = Fraction(width, height) * sar
    if max(aspect, 1 / aspect) > caps.max_aspect:
        raise Refusal(Reason.ASPECT, f"shown at {float(aspect):.4g}:1, beyond the cap of {caps.max_aspect:g}:1")


def _facts(container: InputContainer, stream: VideoStream, sha256: str, caps: ProbeCaps) -> VideoFacts:
    import av

    if stream.time_base is None:
        raise Refusal(Reason.TIMESTAMPS, "the stream states no time base")
    context = stream.codec_context
    context.thread_count = 1
    context.options = {"max_pixels": str(caps.max_pixels)}
    times: list[int | None] = []
    keys: list[int] = []
    frames: list[Any] = []
    decodable, encrypted, decoding_times = True, False, False
    limit = int(caps.max_seconds * 250)
    try:
        for packet in container.demux(stream):
            if packet.size == 0:
                continue  # the end, or a repeated frame, which decoders pass over
            encrypted = encrypted or packet.has_sidedata("encryption_info")
            decoding_times = decoding_times or packet.pts is None
            if not packet.is_discard:
                time = packet.pts if packet.pts is not None else packet.dts
                times.append(time)
                if packet.is_keyframe and time is not None:
                    keys.append(time)
            if len(times) > limit:
                raise Refusal(Reason.TOO_LONG, f"more than {limit} frames")
            if decodable and len(frames) < FIRST_FRAMES:
                decodable = _decode(packet, frames)
        if decodable and not frames:
            frames.extend(context.decode(None))
    except av.FFmpegError as error:
        if not times:
            raise Refusal(Reason.DAMAGED, f"cannot be read: {_plain(error)}") from None
    if not frames:
        if encrypted:
            raise Refusal(Reason.ENCRYPTED, "the video stream is encrypted")
        raise Refusal(Reason.DAMAGED, "its first frames cannot be decoded")
    claimed = [stream.average_rate, stream.guessed_rate, stream.base_rate]
    line = measure(times, stream.time_base, claimed)
    if line.last - line.start > caps.max_seconds:
        raise Refusal(
            Reason.TOO_LONG, f"{float(line.last - line.start):.0f} s, above the cap of {caps.max_seconds:g} s"
        )
    first = frames[0]
    name = container.format.name.split(",")[0]
    seekable = name in SEEKABLE and not line.by_index
    beside = context.codec.name in ALPHA_DECODERS and stream.metadata.get("alpha_mode") == "1"
    known_alpha = beside or any(component.is_alpha for component in first.format.components)
    return VideoFacts(
        sha256=sha256,
        format=name,
        stream=stream.index,
        codec=context.codec.name,
        width=first.width,
        height=first.height,
        pix_fmt=first.format.name,
        sar=str(Fraction(stream.sample_aspect_ratio or 1) or Fraction(1)),
        container_start=str(Fraction(container.start_time or 0, 1_000_000)),
        rate=str(line.rate),
        start=str(line.start),
        last=str(line.last),
        count=line.count,
        max_gap=str(line.max_gap),
        by_index=line.by_index,
        # AVI and its like store no times of showing: where frames are reordered, the times in the file are of decoding.
        decoding_times=decoding_times or (not seekable and context.has_b_frames and _ascending(times)),
        interlaced=bool(first.interlaced_frame) or context.field_order not in _PROGRESSIVE,
        alpha=known_alpha,
        hdr=int(first.color_trc) in (_TRANSFER_PQ, _TRANSFER_HLG),
        matrix_unknown=int(first.colorspace) == _UNSPECIFIED,
        keyframes=_sparse(sorted(keys), stream.time_base) if seekable else (),
    )


def _ascending(times: Sequence[int | None]) -> bool:
    return all(a is not None and b is not None and a < b for a, b in itertools.pairwise(times))


def _decode(packet: Any, frames: list[Any]) -> bool:
    """Add the packet's frames; False when the decoder refuses it, and then no more are tried."""
    import av

    try:
        frames.extend(packet.decode())
    except av.FFmpegError:
        return False
    return True


def _sparse(keys: list[int], time_base: Fraction) -> tuple[str, ...]:
    """Key frame times, at least two seconds apart and at most some two thousand: the record stays small."""
    kept: list[Fraction] = []
    apart = max(Fraction(2), (keys[-1] - keys[0]) * time_base / 2000) if keys else Fraction(2)
    for key in keys:
        time = key * time_base
        if not kept or time - kept[-1] >= apart:
            kept.append(time)
    return tuple(map(str, kept)) if len(kept) > 1 else ()


def _plain(error: Exception) -> str:
    """An error's text without the descriptor path that stands for the file."""
    text = getattr(error, "strerror", None) or str(error)
    return str(text).split(": 'file:/dev/fd/")[0]
