"""Where the ffmpeg program is: the system's, else the one that the imageio-ffmpeg package carries."""

from __future__ import annotations

import functools
import shutil

from ardist.errors import HardwareError


@functools.cache
def ffmpeg_binary() -> str:
    """Path of an ffmpeg executable; raises `HardwareError` where there is none."""
    found = shutil.which("ffmpeg")
    if found:
        return found
    import imageio_ffmpeg

    try:
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError as error:
        raise HardwareError(f"no ffmpeg found: install ffmpeg or the imageio-ffmpeg package ({error})") from error
