"""Odd but good inputs: what is decoded must be what a careful player shows."""

from __future__ import annotations

import shutil
import unicodedata
from pathlib import Path

import numpy as np
from dt_videos import make_video, run_ffmpeg
from zoo import (
    BLUE,
    GREEN,
    LOSSLESS,
    RED,
    WHITE,
    X264,
    Clips,
    corners,
    good,
    greys,
    levels,
    quadrants,
    upright,
    with_matrix,
)


@good("plain.mp4")
def _plain(path: Path) -> None:
    make_video(path)


# ---- containers and codecs ------------------------------------------------------------------------------------------


def _quadrants(*options: str) -> object:
    return lambda path: quadrants(path, *options)


good("faststart.mp4", upright)(_quadrants(*X264, "-movflags", "+faststart"))
good("fragmented.mp4", upright)(_quadrants(*X264, "-movflags", "+frag_keyframe+empty_moov"))
good("matroska_named.mp4", upright)(_quadrants(*X264, "-f", "matroska"))
good("avi_named.mkv", upright)(_quadrants("-c:v", "mpeg4", "-q:v", "2", "-f", "avi"))
good("no_extension", upright)(_quadrants(*X264, "-metadata", "comment=x", "-f", "mp4"))
good("UPPER.MP4", upright)(_quadrants(*X264))
good("hevc10.mp4", upright)(
    _quadrants("-c:v", "libx265", "-preset", "ultrafast", "-pix_fmt", "yuv420p10le", "-x265-params", "log-level=none")
)
good("av1.mp4", upright)(_quadrants("-c:v", "libaom-av1", "-cpu-used", "8", "-pix_fmt", "yuv420p", "-b:v", "300k"))
good("vp9.webm", upright)(_quadrants("-c:v", "libvpx-vp9", "-cpu-used", "8", "-b:v", "500k", "-pix_fmt", "yuv420p"))
good("vp8.webm", upright)(_quadrants("-c:v", "libvpx", "-cpu-used", "8", "-b:v", "500k", "-pix_fmt", "yuv420p"))
good("prores.mov", upright)(_quadrants("-c:v", "prores_ks", "-profile:v", "3"))
good("mpeg4_bframes.avi", upright)(_quadrants("-c:v", "mpeg4", "-bf", "2", "-q:v", "2"))
good("mjpeg.avi", upright)(_quadrants("-c:v", "mjpeg", "-q:v", "2", "-pix_fmt", "yuvj420p"))
good("mpeg2.ts", upright, clips=None)(
    lambda path: quadrants(path, "-c:v", "mpeg2video", "-q:v", "2", "-bf", "2", rate="25")
)
good("h264.ts", upright)(_quadrants(*X264))
good("mpeg1.mpg", upright, clips=None)(lambda path: quadrants(path, "-c:v", "mpeg1video", "-q:v", "2", rate="25"))
good("flash.flv", upright)(_quadrants("-c:v", "flv", "-q:v", "2"))
good("windows.wmv", upright)(_quadrants("-c:v", "wmv2", "-q:v", "2"))
good("theora.ogv", upright)(
    lambda path: quadrants(path, "-c:v", "libtheora", "-q:v", "10", extra=",noise=alls=6:allf=t")
)
good("animation.gif", upright, clips=None)(lambda path: quadrants(path, rate="10"))
good("raw.y4m", upright)(_quadrants("-pix_fmt", "yuv420p"))
good("lossless_rgb.mkv", upright)(_quadrants(*LOSSLESS))
good("ffv1_444p12.mkv", upright)(_quadrants("-c:v", "ffv1", "-pix_fmt", "yuv444p12le"))


# ---- streams --------------------------------------------------------------------------------------------------------


@good("two_streams.mkv", upright)
def _two_streams(path: Path) -> None:
    """The default stream is not the first, and not the larger."""
    small, large = path.with_name("s.tmp.mkv"), path.with_name("l.tmp.mkv")
    quadrants(small, *X264)
    make_video(large, size="128x128")
    run_ffmpeg(
        "-i",
        large,
        "-i",
        small,
        "-map",
        "0",
        "-map",
        "1",
        "-c",
        "copy",
        "-disposition:v:0",
        "0",
        "-disposition:v:1",
        "default",
        path,
    )
    small.unlink()
    large.unlink()


@good("with_cover.mp4", upright)
def _with_cover(path: Path) -> None:
    video, png = path.with_name("v.tmp.mp4"), path.with_name("c.tmp.png")
    quadrants(video, *X264)
    run_ffmpeg("-f", "lavfi", "-i", "testsrc=s=640x480", "-frames:v", "1", "-f", "image2", png)
    run_ffmpeg("-i", png, "-i", video, "-map", "0", "-map", "1", "-c", "copy", "-disposition:v:0", "attached_pic", path)
    video.unlink()
    png.unlink()


@good("with_sound.mp4", upright)
def _with_sound(path: Path) -> None:
    video = path.with_name("w.tmp.mp4")
    quadrants(video, *X264)
    run_ffmpeg("-i", video, "-f", "lavfi", "-i", "sine=duration=3", "-c:v", "copy", "-c:a", "aac", path)
    video.unlink()


# ---- times ----------------------------------------------------------------------------------------------------------


def _shows(*expected: list[int]) -> object:
    def check(clips: Clips) -> None:
        assert levels(clips) == list(expected)

    return check


TENTHS = [i / 10 for i in range(12)]
good("steady.mkv", _shows([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]))(lambda path: greys(path, TENTHS, *LOSSLESS))
# Mean rate 10/s: at tenths of a second a player shows the latest frame that has begun.
good("variable.mkv", _shows([0, 0, 2, 3], [3, 3, 3, 7], [8, 9, 9, 11]))(
    lambda path: greys(path, [0, 0.16, 0.2, 0.3, 0.66, 0.68, 0.69, 0.7, 0.8, 0.9, 1.06, 1.1], *LOSSLESS)
)
good("late_start.mkv", _shows([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]))(
    lambda path: greys(path, [37.5 + time for time in TENTHS], *LOSSLESS)
)
# The edit list begins at zero: the first five frames are in the file but not shown.
good("before_zero.mp4", _shows([5, 6, 7, 8]), clips=1)(
    lambda path: greys(path, [time - 0.5 for time in TENTHS], *LOSSLESS, "-avoid_negative_ts", "disabled")
)


@good("edit_list.mp4", _shows([2, 3, 4, 5], [6, 7, 8, 9]), clips=2)
def _edit_list(path: Path) -> None:
    """Cut by an edit list: two frames are in the file but not to be shown."""
    whole = path.with_name("e.tmp.mp4")
    greys(whole, TENTHS, *LOSSLESS, "-g", "12")
    run_ffmpeg("-ss", "0.2", "-i", whole, "-c", "copy", path)
    whole.unlink()


@good("no_times.avi", _shows([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]))
def _no_times(path: Path) -> None:
    timed = greys(path.with_name("t.tmp.mkv"), TENTHS, "-c:v", "ffv1")
    run_ffmpeg("-i", timed, "-c", "copy", path)
    timed.unlink()


@good("interlaced.mkv", upright)
def _interlaced(path: Path) -> None:
    codec = ("-c:v", "mpeg2video", "-q:v", "2", "-flags", "+ildct+ilme", "-pix_fmt", "yuv420p")
    quadrants(path, *codec, frames=12, rate="50", extra=",tinterlace=interleave_top,fieldorder=tff")


# ---- geometry -------------------------------------------------------------------------------------------------------

good("turned_90.mp4", lambda clips: corners(clips, (BLUE, RED, WHITE, GREEN)))(
    lambda path: with_matrix(path, (0, 1, -1, 0))
)
good("turned_180.mp4", lambda clips: corners(clips, (WHITE, BLUE, GREEN, RED)))(
    lambda path: with_matrix(path, (-1, 0, 0, -1))
)
good("turned_270.mp4", lambda clips: corners(clips, (GREEN, WHITE, RED, BLUE)))(
    lambda path: with_matrix(path, (0, -1, 1, 0))
)
good("mirrored.mp4", lambda clips: corners(clips, (GREEN, RED, WHITE, BLUE)))(
    lambda path: with_matrix(path, (-1, 0, 0, 1))
)
good("upside_down.mp4", lambda clips: corners(clips, (BLUE, WHITE, RED, GREEN)))(
    lambda path: with_matrix(path, (1, 0, 0, -1))
)


@good("anamorphic.mp4")
def _anamorphic_place(path: Path) -> None:
    make_video(path, "-vf", "setsar=2/1")


def _circle(clips: Clips) -> None:
    """A disc in a frame of non-square pixels must come out round: as wide as high."""
    for clip in clips.values():
        bright = clip[0].mean(2) > 128
        height, width = bright.any(1).sum(), bright.any(0).sum()
        assert abs(int(height) - int(width)) <= 1, (height, width)
        assert 6 <= height <= 10


@good("disc_anamorphic.mkv", _circle)
def _disc(path: Path) -> None:
    """128x64 pixels of aspect 1:2 are a square; a disc of half its height."""
    draw = "geq=lum='if(lte(hypot((X-63.5)/2,Y-31.5),16),235,16)':cb=128:cr=128,setsar=1/2"
    run_ffmpeg(
        "-f", "lavfi", "-i", f"color=black:s=128x64:r=12,format=yuv444p,{draw}", "-frames:v", "12", "-c:v", "ffv1", path
    )


@good("disc_turned.mp4", _circle)
def _disc_turned(path: Path) -> None:
    """A tall phone video: wide frames, turned by the display matrix; the crop takes the middle."""
    draw = "geq=lum='if(lte(hypot(X-63.5,Y-31.5),16),235,16)':cb=128:cr=128"
    whole = path.with_name("d.tmp.mp4")
    run_ffmpeg("-f", "lavfi", "-i", f"color=black:s=128x64:r=12,format=yuv420p,{draw}", "-frames:v", "12", *X264, whole)
    data = bytearray(whole.read_bytes())
    import struct

    struct.pack_into(">9i", data, data.index(b"tkhd") + 44, 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    whole.unlink()


good("odd_1079.mkv", upright)(
    lambda path: quadrants(path, "-c:v", "ffv1", "-pix_fmt", "yuv420p", extra=",scale=119:107")
)
good("tiny_3x5.mkv")(lambda path: make_video(path, "-vf", "scale=3:5", codec=("-c:v", "ffv1", "-pix_fmt", "yuv444p")))
good("tiny_1x1.mkv")(lambda path: make_video(path, "-vf", "scale=1:1", codec=("-c:v", "ffv1", "-pix_fmt", "yuv444p")))


def _joined(second: str) -> object:
    """Half-way the frames become of another kind, inside one stream."""

    def make(path: Path) -> None:
        whole = greys(path.with_name(f"{path.name}.tmp.mkv"), TENTHS, *LOSSLESS)
        parts = [path.with_name(f"{number}-{path.name}.tmp.ts") for number in (1, 2)]
        halves = ("trim=end_frame=6,format=yuv420p", f"trim=start_frame=6,setpts=PTS-STARTPTS,{second}")
        for part, filters in zip(parts, halves, strict=True):
            run_ffmpeg("-i", whole, "-vf", f"{filters},fps=10", *X264[:4], "-g", "6", part)
        script = path.with_name(f"{path.name}.tmp.txt")
        script.write_text("".join(f"file '{part}'\n" for part in parts))
        run_ffmpeg("-f", "concat", "-safe", "0", "-i", script, "-c", "copy", path)
        for made in (whole, *parts, script):
            made.unlink()

    return make


ALL_LEVELS = _shows([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11])
good("changes_size.ts", ALL_LEVELS)(_joined("scale=48:48,format=yuv420p"))
good("changes_format.ts", ALL_LEVELS)(_joined("format=yuv444p"))


# ---- colours --------------------------------------------------------------------------------------------------------


def _colour(matrix: str, tag: str, colour_range: str, size: int, tagged: bool = True) -> object:
    tags = ("-colorspace", tag, "-color_range", colour_range) if tagged else ()

    def make(path: Path) -> None:
        graph_range = "full" if colour_range == "pc" else "limited"
        scale = f"scale=out_color_matrix={matrix}:out_range={graph_range},format=yuv444p,setparams=colorspace={tag}"
        if not tagged:
            scale += ",setparams=colorspace=unknown:range=unknown"
        quadrants_with_filter(path, scale, ("-c:v", "libx264", "-qp", "0", "-preset", "ultrafast", *tags), size)

    return make


def quadrants_with_filter(path: Path, graph: str, codec: tuple[str, ...], size: int) -> None:
    """Quadrants through a filter of their own."""
    plain = path.with_name("q.tmp.mkv")
    quadrants(plain, "-c:v", "ffv1", "-pix_fmt", "gbrp", size=(size, size))
    run_ffmpeg("-i", plain, "-vf", graph, *codec, path)
    plain.unlink()


def _exact(clips: Clips) -> None:
    corners(clips, (RED, GREEN, BLUE, WHITE), tolerance=4)


good("bt601_limited.mp4", _exact)(_colour("bt601", "smpte170m", "tv", 64))
good("bt709_limited.mp4", _exact)(_colour("bt709", "bt709", "tv", 64))
good("bt709_full.mp4", _exact)(_colour("bt709", "bt709", "pc", 64))
good("bt601_full.mp4", _exact)(_colour("bt601", "smpte170m", "pc", 64))
good("bt2020_sdr.mp4", _exact)(_colour("bt2020", "bt2020nc", "tv", 64))
good("untagged_small.mp4", _exact)(_colour("bt601", "smpte170m", "tv", 64, tagged=False))
good("untagged_hd.mp4", _exact)(_colour("bt709", "bt709", "tv", 720, tagged=False))


def _bright(clips: Clips) -> None:
    """Tone mapping keeps grey grey and bright brighter than dark."""
    for clip in clips.values():
        left, right = clip[:, :, :8].astype(float), clip[:, :, 8:].astype(float)
        assert right.mean() > left.mean() + 40
        assert np.abs(clip.astype(float).std(3)).max() < 6


@good("hdr_pq.mkv", _bright)
def _hdr(path: Path) -> None:
    tags = "setparams=color_primaries=bt2020:color_trc=smpte2084:colorspace=bt2020nc:range=limited"
    draw = "geq=lum='if(lt(X,32),250,520)':cb=512:cr=512"
    run_ffmpeg(
        "-f",
        "lavfi",
        "-i",
        f"color=black:s=64x64:r=12,format=yuv420p10le,{draw},{tags}",
        "-frames:v",
        "12",
        "-c:v",
        "libx265",
        "-preset",
        "ultrafast",
        "-x265-params",
        "log-level=none:lossless=1",
        path,
    )


def _half_black(clips: Clips) -> None:
    """The right half was fully transparent: black, whatever colour lies below."""
    for clip in clips.values():
        assert clip[:, :, 10:].max() < 12
        assert np.abs(clip[:, :, :6].astype(float).mean((0, 1, 2)) - np.array(RED)).max() < 12


def _transparent(*codec: str) -> object:
    def make(path: Path) -> None:
        colour = f"color=c=0x{RED[0]:02x}{RED[1]:02x}{RED[2]:02x}:s=64x64:r=12"
        graph = f"{colour},format=gbrap,geq=r='r(X,Y)':g='g(X,Y)':b='b(X,Y)':a='if(lt(X,32),255,0)'"
        run_ffmpeg("-f", "lavfi", "-i", graph, "-frames:v", "12", *codec, path)

    return make


good("alpha_prores.mov", _half_black)(
    _transparent("-c:v", "prores_ks", "-profile:v", "4444", "-pix_fmt", "yuva444p10le")
)
good("alpha_qtrle.mov", _half_black)(_transparent("-c:v", "qtrle", "-pix_fmt", "argb"))
good("alpha_vp9.webm", _half_black)(
    _transparent("-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p", "-cpu-used", "8", "-b:v", "500k")
)
good("alpha_vp8.webm", _half_black)(
    _transparent("-c:v", "libvpx", "-pix_fmt", "yuva420p", "-auto-alt-ref", "0", "-cpu-used", "8", "-b:v", "500k")
)
good("alpha_png.mov", _half_black)(_transparent("-c:v", "png", "-pix_fmt", "rgba"))


# ---- names ----------------------------------------------------------------------------------------------------------

ODD_NAMES = [
    "with space.mp4",
    'quote\'s "double".mp4',
    "$(touch owned).mp4",
    "-leading.mp4",
    "per%cent %03d.mp4",
    "new\nline.mp4",
    unicodedata.normalize("NFC", "café.mp4"),
    unicodedata.normalize("NFD", "café2.mp4"),
    "日本語.mp4",
    "x" * 251 + ".mp4",
    "concat:a|b.mp4",
    b"not-utf8-\xff\xfe.mp4".decode("utf-8", "surrogateescape"),
]


def _named(number: int) -> object:
    def make(path: Path) -> None:
        made = make_video(path.with_name(f"n{number}.tmp.mp4"), "-metadata", f"comment={number}")
        shutil.move(made, path)

    return make


for _number, _name in enumerate(ODD_NAMES):
    good(_name)(_named(_number))

good("one/same.mp4")(lambda path: make_video(path, "-metadata", "comment=one"))
good("two/same.mp4")(lambda path: make_video(path, "-metadata", "comment=two"))
