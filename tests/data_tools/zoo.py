"""Hostile and odd inputs, made by ffmpeg and byte surgery, each with what must become of it."""

from __future__ import annotations

import gzip
import os
import random
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from dt_videos import make_video, run_ffmpeg

Clips = Mapping[int, npt.NDArray[np.uint8]]
X264 = ("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p", "-g", "6")
LOSSLESS = ("-c:v", "libx264rgb", "-qp", "0", "-preset", "ultrafast")
RED, GREEN, BLUE, WHITE = (200, 30, 30), (30, 200, 30), (30, 30, 200), (220, 220, 220)


@dataclass(frozen=True)
class Animal:
    """One input. `reasons`: legal reasons of refusal (empty: it is good); `check` looks at its clips by start."""

    name: str
    make: Callable[[Path], object]
    reasons: frozenset[str] = frozenset()
    check: Callable[[Clips], None] | None = None
    clips: int | None = 3


ZOO: list[Animal] = []


def bad(name: str, *reasons: str) -> Callable[[Callable[[Path], object]], Callable[[Path], object]]:
    """Register a maker of something that must be refused for one of the reasons."""

    def register(make: Callable[[Path], object]) -> Callable[[Path], object]:
        ZOO.append(Animal(name, make, frozenset(reasons)))
        return make

    return register


def good(name: str, check: Callable[[Clips], None] | None = None, clips: int | None = 3) -> Callable[..., object]:
    """Register a maker of something odd that must be decoded right."""

    def register(make: Callable[[Path], object]) -> Callable[[Path], object]:
        ZOO.append(Animal(name, make, frozenset(), check, clips))
        return make

    return register


def quadrants(
    path: Path,
    *options: str,
    colours: tuple[tuple[int, int, int], ...] = (RED, GREEN, BLUE, WHITE),
    size: tuple[int, int] = (64, 64),
    frames: int = 12,
    rate: str = "12",
    extra: str = "",
) -> Path:
    """A still video whose quarters (upper left, upper right, lower left, lower right) have different colours."""
    width, height = size
    words: list[str] = []
    for r, g, b in colours:
        source = f"color=c=0x{r:02x}{g:02x}{b:02x}:s={width // 2}x{height // 2}:r={rate},format=gbrp"
        words += ["-f", "lavfi", "-i", source]
    graph = "[0][1]hstack[t];[2][3]hstack[b];[t][b]vstack" + extra
    path.parent.mkdir(parents=True, exist_ok=True)
    run_ffmpeg(*words, "-filter_complex", graph, "-frames:v", str(frames), *options, path)
    return path


def greys(path: Path, times: list[float], *options: str) -> Path:
    """Frames of growing grey (20 more each) shown at the given times in seconds."""
    raw = b"".join(bytes([20 * (i + 1)]) * (32 * 32 * 3) for i in range(len(times)))
    source = path.with_name(path.name + ".raw")
    source.write_bytes(raw)
    steps = "+".join(f"eq(N,{i})*{time:.6f}" for i, time in enumerate(times))
    run_ffmpeg(
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-s",
        "32x32",
        "-r",
        "10",
        "-i",
        source,
        "-vf",
        f"settb=1/90000,setpts='({steps})/TB'",
        "-fps_mode",
        "passthrough",
        "-enc_time_base",
        "1:90000",
        *options,
        path,
    )
    source.unlink()
    return path


def corners(clips: Clips, expected: tuple[tuple[int, int, int], ...], tolerance: float = 14) -> None:
    """Every frame of every clip shows these colours in its quarters."""
    for start, clip in clips.items():
        for frame in clip.astype(float):
            found = [frame[y : y + 4, x : x + 4].mean((0, 1)) for y, x in ((2, 2), (2, 10), (10, 2), (10, 10))]
            for place, (have, want) in enumerate(zip(found, expected, strict=True)):
                assert np.abs(have - np.array(want)).max() < tolerance, (
                    f"clip {start} quarter {place}: {have} for {want}"
                )


def upright(clips: Clips) -> None:
    """The quadrants as they were painted."""
    corners(clips, (RED, GREEN, BLUE, WHITE))


def levels(clips: Clips) -> list[list[int]]:
    """Which of the greys each frame shows, clip by clip."""
    return [[round(float(frame.mean()) / 20) - 1 for frame in clips[start]] for start in sorted(clips)]


def atom(data: bytes, name: bytes) -> int:
    """Position of a box type in an mp4."""
    at = data.index(name)
    return at


def with_matrix(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Quadrants whose mp4 says they are to be shown turned or mirrored."""
    quadrants(path, *X264)
    data = bytearray(path.read_bytes())
    a, b, c, d = (value << 16 for value in matrix)
    struct.pack_into(">9i", data, data.index(b"tkhd") + 44, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


# ---- what must be refused -------------------------------------------------------------------------------------------


@bad("zero.mp4", "empty")
def _zero(path: Path) -> None:
    path.write_bytes(b"")


@bad("text.mp4", "format")
def _text(path: Path) -> None:
    path.write_text("this is not a video\n" * 500)


@bad("page.mp4", "format")
def _page(path: Path) -> None:
    path.write_text("<!DOCTYPE html><html><body>404 not found</body></html>" * 20)


@bad("archive.mp4", "format")
def _archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hello" * 1000)


@bad("noise.mp4", "format", "damaged", "no_video")
def _noise(path: Path) -> None:
    path.write_bytes(random.Random(3).randbytes(50_000))


@bad("squeezed.mp4", "format")
def _squeezed(path: Path) -> None:
    make_video(path)
    path.write_bytes(gzip.compress(path.read_bytes()))


@bad("no_moov.mp4", "format", "damaged")
def _no_moov(path: Path) -> None:
    make_video(path, frames=40, size="128x128")
    data = path.read_bytes()
    path.write_bytes(data[: atom(data, b"moov") - 100])


@bad("sound.mp4", "no_video")
def _sound(path: Path) -> None:
    run_ffmpeg("-f", "lavfi", "-i", "sine=duration=1", "-c:a", "aac", path)


@bad("cover.mp4", "no_video")
def _cover(path: Path) -> None:
    png = path.with_name("cover-picture.png.tmp")
    run_ffmpeg("-f", "lavfi", "-i", "testsrc=s=64x64", "-frames:v", "1", "-c:v", "png", "-f", "image2", png)
    run_ffmpeg(
        "-f",
        "lavfi",
        "-i",
        "sine=duration=1",
        "-i",
        png,
        "-map",
        "0",
        "-map",
        "1",
        "-c:a",
        "aac",
        "-c:v",
        "copy",
        "-disposition:v",
        "attached_pic",
        path,
    )
    png.unlink()


def _picture(codec: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        run_ffmpeg("-f", "lavfi", "-i", "testsrc=s=64x64", "-frames:v", "1", "-c:v", codec, "-f", "image2", path)

    return make


bad("picture_png.mp4", "format")(_picture("png"))
bad("picture_jpeg.mp4", "format")(_picture("mjpeg"))
bad("picture_bmp.mp4", "format")(_picture("bmp"))


@bad("animated_webp.mp4", "format")
def _webp(path: Path) -> None:
    run_ffmpeg(
        "-f", "lavfi", "-i", "testsrc=s=32x32:r=12", "-frames:v", "12", "-c:v", "libwebp_anim", "-f", "webp", path
    )


@bad("playlist.mp4", "format")
def _playlist(path: Path) -> None:
    lines = ["#EXTM3U", "#EXT-X-TARGETDURATION:1", "#EXTINF:1,", "file:///etc/passwd", "http://127.0.0.1:9/x.ts"]
    path.write_text("\n".join([*lines, "#EXT-X-ENDLIST", ""]))


@bad("script.mp4", "format")
def _script(path: Path) -> None:
    path.write_text("ffconcat version 1.0\nfile /etc/passwd\nfile good.mp4\n")


@bad("session.mp4", "format")
def _session(path: Path) -> None:
    path.write_text(
        "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\nm=video 5004 RTP/AVP 96\r\n"
    )


@bad("dash.mp4", "format")
def _dash(path: Path) -> None:
    path.write_text(
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>http://127.0.0.1:9/</BaseURL></MPD>'
    )


@bad("drawing.mp4", "format")
def _drawing(path: Path) -> None:
    path.write_text('<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>')


@bad("subtitles.mp4", "format")
def _subtitles(path: Path) -> None:
    path.write_text("1\n00:00:00,000 --> 00:00:01,000\nhello\n\n" * 20)


def _alias(target: Path) -> bytes:
    """A QuickTime alias record to an absolute path."""
    name = os.fsencode(target)
    name += b"\0" * (len(name) % 2)
    levels = struct.pack(">HH", 0, 0)  # no relative path: only the absolute one leads there
    return (
        bytes(10 + 28 + 12 + 64 + 16) + levels + bytes(16) + struct.pack(">HH", 2, len(name)) + name + b"\xff\xff\0\0"
    )


def _external(kind: bytes, body: Callable[[Path], bytes]) -> Callable[[Path], None]:
    """A movie whose frames lie in another file, which its dref names: opened, it would show quadrants."""

    def make(path: Path) -> None:
        outside = path.parent.parent / f"{path.name}.frames"
        quadrants(outside, *X264, "-f", "mov")
        data = outside.read_bytes()
        at = data.index(b"dref") - 4
        length = struct.unpack_from(">I", data, at)[0]
        content = kind + bytes(4) + body(outside)
        entry = struct.pack(">I", 4 + len(content)) + content
        dref = struct.pack(">I", 16 + len(entry)) + b"dref\0\0\0\0\0\0\0\1" + entry
        grown = len(dref) - length
        out = bytearray(data[:at] + dref + data[at + length :])
        for name in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):
            place = bytes(out).index(name) - 4
            struct.pack_into(">I", out, place, struct.unpack_from(">I", out, place)[0] + grown)
        # The samples themselves are gone from this file; their places in the other one are as they were.
        mdat = bytes(out).index(b"mdat")
        assert mdat < at
        size = struct.unpack_from(">I", out, mdat - 4)[0]
        out[mdat + 4 : mdat - 4 + size] = bytes(size - 8)
        path.write_bytes(out)

    return make


@bad("external.mov", "damaged", "format", "no_video")
def _external_alias(path: Path) -> None:
    """By an alias, which ffmpeg follows where it is allowed to: the bait is a good one."""
    _external(b"alis", _alias)(path)
    run_ffmpeg("-xerror", "-enable_drefs", "1", "-use_absolute_path", "1", "-i", path, "-f", "null", "-")


bad("external_url.mov", "damaged", "format", "no_video")(
    _external(b"url ", lambda target: f"file://{target}".encode() + b"\0")
)


@bad("two_frames.mp4", "too_short")
def _two(path: Path) -> None:
    make_video(path, frames=2)


@bad("one_frame.mp4", "too_short")
def _one(path: Path) -> None:
    make_video(path, frames=1)


@bad("no_frames.mkv", "damaged", "no_video", "format")
def _none(path: Path) -> None:
    make_video(path)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"\x1f\x43\xb6\x75")])  # up to the first cluster


@bad("bomb.y4m", "too_large", "format")
def _bomb(path: Path) -> None:
    path.write_bytes(b"YUV4MPEG2 W16384 H16384 F25:1 C420\nFRAME\n" + bytes(1000))


@bad("bomb.gif", "too_large", "damaged")
def _gif_bomb(path: Path) -> None:
    screen = b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\xf0\0\0\0\0\0\xff\xff\xff"
    image = b"!\xf9\x04\0\x0a\0\0\0," + struct.pack("<HHHH", 0, 0, 65535, 65535) + b"\0\x02\x02L\x01\0"
    path.write_bytes(screen + image * 12 + b";")


@bad("large.mp4", "too_large")
def _large(path: Path) -> None:
    make_video(path, size="1600x1400", frames=4)


@bad("ribbon.mp4", "aspect")
def _ribbon(path: Path) -> None:
    make_video(path, size="400x16")


@bad("hours.mkv", "too_long")
def _hours(path: Path) -> None:
    make_video(path, rate="1/20", frames=8)


@bad("alien.mkv", "codec", "no_video", "format", "damaged")
def _alien(path: Path) -> None:
    make_video(path)
    path.write_bytes(path.read_bytes().replace(b"V_MPEG4/ISO/AVC", b"V_MPEG4/ISO/XYZ"))


@bad("secret.mp4", "encrypted")
def _secret(path: Path) -> None:
    make_video(path, "-encryption_scheme", "cenc-aes-ctr", "-encryption_key", "0" * 32, "-encryption_kid", "1" * 32)


@bad("folder.mp4", "not_a_file")
def _folder(path: Path) -> None:
    path.mkdir()


@bad("pipe.mp4", "not_a_file")
def _pipe(path: Path) -> None:
    os.mkfifo(path)


@bad("device.mp4", "not_a_file")
def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@bad("loop.mp4", "unreadable")
def _loop(path: Path) -> None:
    path.symlink_to(path.name)


@bad("dangling.mp4", "vanished")
def _dangling(path: Path) -> None:
    path.symlink_to("nowhere.mp4")


@bad("zz_copy.mp4", "duplicate")
def _copy(path: Path) -> None:
    path.write_bytes((path.parent / "plain.mp4").read_bytes())


@bad("rubble.mp4", "damaged", "format", "no_video")
def _rubble(path: Path) -> None:
    """Good tables, and noise where the frames should be."""
    make_video(path, frames=24, size="96x96")
    data = bytearray(path.read_bytes())
    at = data.index(b"mdat")
    size = struct.unpack_from(">I", data, at - 4)[0]
    data[at + 4 : at - 4 + size] = random.Random(5).randbytes(size - 8)
    path.write_bytes(data)


@bad("shuffled_tables.mp4", "damaged", "format", "no_video", "timestamps")
def _tables(path: Path) -> None:
    make_video(path, frames=24)
    data = bytearray(path.read_bytes())
    at = data.index(b"stsz")
    data[at + 12 : at + 100] = bytes([255]) * 88
    path.write_bytes(data)
