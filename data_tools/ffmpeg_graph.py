"""The ffmpeg command that shows a stretch of a video on an exact time grid as square RGB frames."""

from __future__ import annotations

import functools
import subprocess
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import ffmpeg

from ardist.media import ffmpeg_binary
from data_tools.probe import ALPHA_DECODERS, VideoFacts
from data_tools.reasons import Reason, Refusal
from data_tools.sandbox import ALLOWED_FORMATS, PROTOCOLS

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

    @property
    def seek(self) -> Fraction | None:
        """Where decoding starts; None for the beginning. The frame at the seek itself is never needed."""
        return self.facts.seek_before(self.begin - 1 / Fraction(self.facts.rate))

    @property
    def decoded_frames(self) -> float:
        """About how many frames are decoded for this request, those passed over included."""
        from_time = self.seek if self.seek is not None else Fraction(self.facts.start)
        return float((self.end - from_time) * Fraction(self.facts.rate))

    @property
    def end(self) -> Fraction:
        """Packets from this decoding time on are not needed: the frame after the last wanted one lies before it."""
        return self.begin + self.count / self.fps + Fraction(self.facts.max_gap) + 1 / Fraction(self.facts.rate)


def command_line(request: DecodeRequest, descriptor: int, *, strict: bool) -> list[str]:
    """ffmpeg's argument list for a request; the video is the inherited `descriptor`, never a name.

    The input is limited rather than the output, so nothing far behind the wanted frames is touched; a few frames
    more than asked for may come. With `strict` any damage ends the process with a status, else it goes on. Raises
    `Refusal` for a video that this ffmpeg has no decoder for.
    """
    facts = request.facts
    options: dict[str, Any] = {
        "f": facts.format,
        **_decoder(facts),
        "protocol_whitelist": PROTOCOLS,
        "format_whitelist": ",".join(ALLOWED_FORMATS),
        "max_pixels": request.max_pixels,
        "threads": 1,
        "reinit_filter": 0,
    }
    # Where times are not exact all is read: then nothing depends on how far threads ran ahead of a limit.
    if not facts.by_index and not facts.decoding_times:
        # ffmpeg counts both from the container's start.
        zero, seek = Fraction(facts.container_start), request.seek
        if seek is not None:
            options["ss"] = _seconds(seek - zero)
        options["t"] = _seconds(request.end - (zero if seek is None else seek))
    stream = ffmpeg.input(f"file:/dev/fd/{descriptor}", **options)[str(facts.stream)]
    stream = _on_grid(stream, request)
    stream = _to_rgb(stream, facts, request.size)
    output = ffmpeg.output(stream, "pipe:1", format="rawvideo", pix_fmt="rgb24", fps_mode="passthrough", threads=1)
    words = ["-nostdin", "-hide_banner", "-loglevel", "error", "-copyts", "-filter_complex_threads", "1"]
    words += ["-xerror"] if strict else []
    return [str(word) for word in ffmpeg.compile(output.global_args(*words), cmd=ffmpeg_binary())]


def _decoder(facts: VideoFacts) -> dict[str, str]:
    """The decoder that must be named because ffmpeg's first choice would not see the alpha."""
    name = ALPHA_DECODERS.get(facts.codec) if facts.alpha else None
    if name is not None and name not in _decoders():
        raise Refusal(Reason.CODEC, f"has alpha, and the ffmpeg here has no {name} to decode it")
    return {} if name is None else {"c:v": name}


@functools.cache
def _decoders() -> frozenset[str]:
    """Names of the decoders of the ffmpeg that is used here."""
    words = [ffmpeg_binary(), "-hide_banner", "-loglevel", "error", "-decoders"]
    lines = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    return frozenset(line.split()[1] for line in lines if len(line.split()) > 1)


def _on_grid(stream: Any, request: DecodeRequest) -> Any:
    """Frames at the times of the grid: each is shown until the next, what was before the first is dropped."""
    facts = request.facts
    if facts.interlaced:
        stream = stream.filter("bwdif", mode="send_frame", deint="interlaced")
    if facts.by_index:
        stream = stream.filter("setpts", f"N/({facts.rate})/TB")
    return stream.filter("fps", fps=str(request.fps), start_time=_seconds(request.begin), round="near")


def _to_rgb(stream: Any, facts: VideoFacts, size: int) -> Any:
    """Square pixels, short side to `size`, centre crop; an unknown matrix is what the frame's height suggests."""
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
    # Through planar RGB: the same values as straight to packed RGB, at half the processor time.
    return stream.filter("format", "gbrp").filter("crop", size, size).filter("format", "rgb24")


def _seconds(value: Fraction) -> str:
    """Microseconds are as fine as the filters count."""
    return f"{float(value):.6f}"
