"""From a video to its clips: one ffmpeg process per run of clips, frames through a pipe, on an exact time grid."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import ffmpeg
import numpy as np
import numpy.typing as npt

from ardist.events import events
from ardist.media import ffmpeg_binary
from data_tools.probe import VideoFacts, open_checked
from data_tools.reasons import Reason, Refusal
from data_tools.sandbox import ALLOWED_FORMATS, PROTOCOLS, Limits, kill_group, limit_child

Frames = npt.NDArray[np.uint8]

_PIPE_BYTES = 2**20
_MAX_STDERR = 4000
_STDERR_FLOOD = 16 * 2**20
_F_SETPIPE_SZ = 1031
SCALE_FLAGS = "bicubic+accurate_rnd+full_chroma_int+full_chroma_inp+bitexact"


@dataclass(frozen=True)
class DecodeRequest:
    """Grid frames [first, first + count) of a video at `fps`, as square RGB frames of `size` pixels."""

    facts: VideoFacts
    first: int
    count: int
    fps: Fraction
    size: int
    max_pixels: int

    @property
    def begin(self) -> Fraction:
        """Time of the first wanted frame on the container's clock, in seconds."""
        return Fraction(self.facts.start) + self.first / self.fps


def command_line(request: DecodeRequest, descriptor: int) -> list[str]:
    """ffmpeg's argument list for a request; the video is the inherited `descriptor`, never a name."""
    facts = request.facts
    options: dict[str, Any] = {
        "f": facts.format,
        "protocol_whitelist": PROTOCOLS,
        "format_whitelist": ",".join(ALLOWED_FORMATS),
        "max_pixels": request.max_pixels,
        "threads": 1,
    }
    seek = facts.seek_before(request.begin)
    if seek is not None:
        options |= {"ss": _seconds(seek), "seek_timestamp": 1, "noaccurate_seek": None}
    stream = ffmpeg.input(f"file:/dev/fd/{descriptor}", **options)[str(facts.stream)]
    stream = _on_grid(stream, request)
    stream = _to_rgb(stream, facts, request.size)
    stream = stream.filter("trim", end_frame=request.count)
    output = ffmpeg.output(
        stream, "pipe:1", format="rawvideo", pix_fmt="rgb24", fps_mode="passthrough", threads=1
    ).global_args(
        "-nostdin", "-hide_banner", "-loglevel", "error", "-copyts", "-filter_complex_threads", "1"
    )  # fmt: skip
    return [str(word) for word in ffmpeg.compile(output, cmd=ffmpeg_binary())]


def _on_grid(stream: Any, request: DecodeRequest) -> Any:
    """Frames at the times of the grid: of a variable rate the nearest is shown, whatever was before is dropped."""
    facts = request.facts
    if facts.interlaced:
        stream = stream.filter("bwdif", mode="send_frame", deint="interlaced")
    begin = request.begin
    if facts.by_index:
        stream = stream.filter("setpts", f"N/({facts.rate})/TB")
    return stream.filter("fps", fps=str(request.fps), start_time=_seconds(begin), round="near")


def _to_rgb(stream: Any, facts: VideoFacts, size: int) -> Any:
    """Square pixels, short side to `size`, centre crop; unknown matrix as the frame's height suggests."""
    matrix = {"in_color_matrix": "bt709"} if facts.matrix_unknown and facts.height >= 720 else {}
    if facts.alpha:
        # Transparent parts become black, as a player without a background shows them.
        stream = stream.filter("scale", flags=SCALE_FLAGS, **matrix).filter("format", "gbrap")
        stream = stream.filter("premultiply", inplace=1)
        matrix = {}
    if facts.hdr:
        stream = stream.filter("zscale", transfer="linear", npl=100).filter("format", "gbrpf32le")
        stream = stream.filter("zscale", primaries="bt709").filter("tonemap", tonemap="hable", desat=0)
        stream = stream.filter("zscale", transfer="bt709", matrix="bt709", range="tv").filter("format", "yuv444p10le")
        matrix = {"in_color_matrix": "bt709"}
    stream = stream.filter(
        "scale",
        w=f"if(gte(dar,1),round({size}*dar),{size})",
        h=f"if(gte(dar,1),{size},round({size}/dar))",
        flags=SCALE_FLAGS,
        **matrix,
    )
    return stream.filter("format", "rgb24").filter("crop", size, size)


def _seconds(value: Fraction) -> str:
    """Microseconds are as fine as the filters count."""
    return f"{float(value):.6f}"


class FrameStream:
    """The frames of one request, read from a limited, killable ffmpeg process."""

    def __init__(self, path: str, version: str | None, request: DecodeRequest, *, timeout: float, memory: int) -> None:
        self._request, self._timeout = request, timeout
        descriptor = open_checked(path, version)
        try:
            self._process = subprocess.Popen(
                command_line(request, descriptor),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(descriptor,),
                start_new_session=True,
                env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C"},
            )
        finally:
            os.close(descriptor)
        limit_child(self._process.pid, Limits(memory=memory, cpu_seconds=max(1, int(timeout))))
        self._stderr = bytearray()
        self._stderr_bytes = 0
        self._waited = 0.0
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._out, self._err = self._process.stdout.fileno(), self._process.stderr.fileno()
        with contextlib.suppress(OSError, AttributeError):
            import fcntl

            fcntl.fcntl(self._out, _F_SETPIPE_SZ, _PIPE_BYTES)
        os.set_blocking(self._out, False)
        os.set_blocking(self._err, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._out, selectors.EVENT_READ)
        self._selector.register(self._err, selectors.EVENT_READ)

    def __enter__(self) -> FrameStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        kill_group(self._process)

    def read_into(self, frames: Frames) -> int:
        """Fill `frames` [n, H, W, 3] from the pipe; returns how many whole frames came before the end.

        Raises `Refusal` when the process waits too long, is killed by a limit or floods its error stream.
        """
        view = frames.data.cast("B")
        done = 0
        while done < len(view):
            got = self._read_some(view[done:])
            if got == 0:
                break
            done += got
        return done // (frames[0].nbytes if len(frames) else 1)

    def _read_some(self, view: memoryview) -> int:
        while True:
            before = time.monotonic()
            ready = self._selector.select(max(0.0, self._timeout - self._waited))
            # Only waiting for the decoder counts: a full queue downstream is not its fault.
            self._waited += time.monotonic() - before
            if not ready:
                events.count("build.child_killed", stage="decode", reason="timeout")
                raise Refusal(Reason.TIMEOUT, f"decoding waited longer than {self._timeout:g} s for its frames")
            for key, _ in ready:
                if key.fd == self._err:
                    self._drain_stderr()
                else:
                    with contextlib.suppress(BlockingIOError):
                        return os.readv(self._out, [view])

    def _drain_stderr(self) -> None:
        with contextlib.suppress(BlockingIOError):
            piece = os.read(self._err, 2**16)
            if not piece:
                self._selector.unregister(self._err)
            self._stderr_bytes += len(piece)
            self._stderr += piece[: max(0, _MAX_STDERR - len(self._stderr))]
            if self._stderr_bytes > _STDERR_FLOOD:
                events.count("build.child_killed", stage="decode", reason="flood")
                raise Refusal(Reason.CRASHED, "the decoder flooded its error stream")

    def finish(self) -> str:
        """Wait for the end of the process; returns its complaints, empty when there were none.

        Raises `Refusal` when a limit or a crash ended it.
        """
        try:
            status = self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            raise Refusal(Reason.TIMEOUT, "the decoder did not end after its last frame") from None
        while self._err in self._selector.get_map():
            if not self._selector.select(0):
                break
            self._drain_stderr()
        if status < 0:
            name = signal.Signals(-status).name
            reason = Reason.TIMEOUT if -status == signal.SIGXCPU else Reason.CRASHED
            raise Refusal(reason, f"the decoder was ended by {name}")
        complaints = self._stderr.decode("utf-8", "replace").strip()
        return complaints or (f"exit status {status}" if status else "")


@dataclass(frozen=True)
class DecodeSettings:
    """How decoding is done here; none of it changes a pixel."""

    timeout: float = 300.0
    memory: int = 4 * 2**30


def decode_clips(
    path: str,
    version: str | None,
    facts: VideoFacts,
    starts: Sequence[int],
    num_frames: int,
    fps: Fraction,
    size: int,
    max_pixels: int,
    settings: DecodeSettings,
) -> Iterator[Frames | Refusal]:
    """The clips that begin at `starts` (ascending) in order: each uint8 [F, H, W, 3], or why there is none."""
    for run in _runs(starts, num_frames, fps, bool(facts.keyframes)):
        request = DecodeRequest(facts, run[0], run[-1] + num_frames - run[0], fps, size, max_pixels)
        yield from _decode_run(path, version, request, run, num_frames, settings)


def _runs(starts: Sequence[int], num_frames: int, fps: Fraction, seekable: bool) -> Iterator[list[int]]:
    """Split where skipping by a seek is cheaper than decoding through: gaps above twenty seconds."""
    run: list[int] = []
    for start in starts:
        if run and seekable and (start - run[-1] - num_frames) / fps > 20:
            yield run
            run = []
        run.append(start)
    if run:
        yield run


def _decode_run(
    path: str, version: str | None, request: DecodeRequest, starts: list[int], num_frames: int, settings: DecodeSettings
) -> Iterator[Frames | Refusal]:
    done = 0
    problem: Refusal | None = None
    try:
        with FrameStream(path, version, request, timeout=settings.timeout, memory=settings.memory) as stream:
            at, held = request.first, np.empty((0, request.size, request.size, 3), np.uint8)
            for start in starts:
                clip = np.empty((num_frames, request.size, request.size, 3), np.uint8)
                # `held` are the last frames read, ending at grid frame `at`: overlapping clips share them.
                shared = max(0, at - start)
                clip[:shared] = held[len(held) - shared :] if shared else held[:0]
                if start > at:
                    at += _skip(stream, start - at, clip)
                got = stream.read_into(clip[shared:]) if at >= start else 0
                at += got
                if shared + got < num_frames:
                    break
                held = clip
                done += 1
                yield clip
            complaints = stream.finish() if done < len(starts) else ""
        if done < len(starts):
            missing = f"the frames of clip {done + 1} of {len(starts)} in this run did not come"
            problem = Refusal(Reason.DAMAGED, f"{missing}; {complaints}" if complaints else missing)
    except Refusal as refusal:
        problem = refusal
    for _ in starts[done:]:
        assert problem is not None
        yield problem


def _skip(stream: FrameStream, count: int, scratch: Frames) -> int:
    """Read and forget `count` frames; returns how many there were."""
    skipped = 0
    while skipped < count:
        part = scratch[: min(count - skipped, len(scratch))]
        got = stream.read_into(part)
        skipped += got
        if got < len(part):
            break
    return skipped
