"""Video files: writing mp4 through ffmpeg, reading the frames that a video is to start with."""

from __future__ import annotations

import math
import os
import secrets
import subprocess
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import av
import ffmpeg
import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image, UnidentifiedImageError

from ardist.errors import DataError, HardwareError, InvalidValueError
from ardist.media import ffmpeg_binary

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
VIDEO_FORMATS = "mov,mp4,matroska,webm,avi,mpegts,gif"
MAX_PIXELS = 8192 * 8192
MAX_FRAMES = 100_000
_STDERR_CHARACTERS = 2000
_CLOSE_TIMEOUT = 600


def check_fps(fps: float | int) -> float | int:
    """`fps`, frames per second, if a video can have it; raises `InvalidValueError` otherwise."""
    if not 0 < fps < math.inf:
        raise InvalidValueError(f"fps={fps} is illegal; legal: above 0, and finite")
    return fps


class Mp4Writer:
    """Writes frames to an H.264 mp4 as they come; the file appears under its name only when it is complete.

    Use it as a context manager: leaving it with an exception removes what was written so far.
    """

    def __init__(self, path: Path, fps: float | int) -> None:
        self.path = Path(path)
        self._fps = check_fps(fps)
        self._temporary = self.path.with_name(f".{self.path.name}.tmp-{secrets.token_hex(4)}.mp4")
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed in __exit__)
        self._size: tuple[int, ...] = ()

    def write(self, frames: UInt8[ndarray, "f h w 3"]) -> None:
        """Append RGB frames, all of one size; raises `HardwareError` with ffmpeg's own words when it fails."""
        if self._process is None:
            self._start(frames.shape[1], frames.shape[2])
        if frames.shape[1:3] != self._size:
            raise InvalidValueError(f"frames of size {frames.shape[1:3]} after frames of size {self._size}; legal: one")
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(np.ascontiguousarray(frames).data)
        except BrokenPipeError:
            raise self._failure() from None

    def __enter__(self) -> Mp4Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
            else:
                self._stop()
        finally:
            self._temporary.unlink(missing_ok=True)
            self._stderr.close()

    def _start(self, height: int, width: int) -> None:
        self._size = (height, width)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        stream = ffmpeg.input(
            "pipe:0", loglevel="error", format="rawvideo", pix_fmt="rgb24", s=f"{width}x{height}", r=self._fps
        )
        # yuv420p, which every player shows, needs even sides; where they are odd, the last row or column is repeated.
        if height % 2 or width % 2:
            stream = stream.filter("pad", "ceil(iw/2)*2", "ceil(ih/2)*2").filter(
                "fillborders", right=width % 2, bottom=height % 2, mode="smear"
            )
        stream = ffmpeg.output(
            stream, f"file:{self._temporary}", vcodec="libx264", pix_fmt="yuv420p", crf=16, movflags="+faststart"
        )
        argv = ffmpeg.compile(stream, cmd=ffmpeg_binary(), overwrite_output=True)
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._stderr, start_new_session=True
        )

    def _finish(self) -> None:
        if self._process is None:
            raise InvalidValueError(f"no frame was written to {str(self.path)!r}; legal: one or more")
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            code = self._process.wait(_CLOSE_TIMEOUT)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            raise self._failure() from None
        if code:
            raise self._failure()
        os.replace(self._temporary, self.path)

    def _failure(self) -> HardwareError:
        self._stop()
        self._stderr.seek(0)
        words = self._stderr.read().decode("utf-8", "replace").strip()[-_STDERR_CHARACTERS:]
        return HardwareError(f"ffmpeg could not write {str(self.path)!r}: {words or 'it stopped without a word'}")

    def _stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
        if self._process is not None:
            self._process.wait()


def write_mp4(path: Path, frames: UInt8[ndarray, "f h w 3"], fps: float | int = 8.0) -> None:
    """Write RGB frames as an H.264 mp4 at `path`, replacing it only when the new one is complete.

    Raises:
        InvalidValueError: no frames, or `fps` is not above 0.
        HardwareError: ffmpeg is missing or failed; the message holds what it said.
    """
    with Mp4Writer(path, fps) as writer:
        if len(frames):
            writer.write(frames)


def read_frames(
    path: Path, size: int | None = None, num_frames: int | None = None, *, last: bool = False
) -> UInt8[ndarray, "f h w 3"]:
    """RGB frames of a video, or the one frame of an image.

    Args:
        size: bring the short side to this many pixels (bicubic) and crop the middle square; None: as they are.
        num_frames: at most so many.
        last: the last ones rather than the first.

    Raises:
        DataError: the file is missing, is no video or image of an allowed kind, or is beyond the limits on its size.
    """
    if num_frames is not None and num_frames < 1:
        raise InvalidValueError(f"num_frames={num_frames} is illegal; legal: at least 1")
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{str(path)!r} is no file; legal: a video or an image")
    image = _open_image(path)
    pictures = iter([image]) if image is not None else _video_pictures(path)
    kept: deque[ndarray[Any, Any]] = deque(maxlen=num_frames if last else None)
    for count, picture in enumerate(pictures):
        if count >= MAX_FRAMES:
            raise DataError(f"{str(path)!r} has more than {MAX_FRAMES} frames; cut it first")
        kept.append(np.asarray(picture if size is None else _square(picture, size)))
        if not last and len(kept) == num_frames:
            break
    if not kept:
        raise DataError(f"{str(path)!r} holds no frame")
    return np.stack(kept)


def _open_image(path: Path) -> Image.Image | None:
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            _check_pixels(path, *image.size)
            return image.convert("RGB")
    except UnidentifiedImageError:
        return None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{str(path)!r} is a damaged or too large image: {error}") from None


def _video_pictures(path: Path) -> Iterator[Image.Image]:
    # Only plain container formats and only this file: a playlist could otherwise name other files or addresses.
    options = {"protocol_whitelist": "file", "format_whitelist": VIDEO_FORMATS}
    try:
        with av.open(f"file:{path}", options=options) as container:
            if not container.streams.video:
                raise DataError(f"{str(path)!r} has no video stream")
            stream = container.streams.video[0]
            _check_pixels(path, stream.codec_context.width, stream.codec_context.height)
            for frame in container.decode(stream):
                _check_pixels(path, frame.width, frame.height)
                turns = round(frame.rotation / 90) % 4
                yield Image.fromarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))
    except av.FFmpegError as error:
        raise DataError(f"{str(path)!r} cannot be read as a video: {error}") from None


def _check_pixels(path: Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(f"{str(path)!r} has frames of {width}x{height}; legal: at most {MAX_PIXELS} pixels")


def _square(picture: Image.Image, size: int) -> Image.Image:
    scale = size / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + size, top + size))
