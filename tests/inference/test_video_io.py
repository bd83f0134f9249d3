"""mp4 files out, videos and images in."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ardist.errors import DataError, HardwareError, InvalidValueError
from ardist.inference import video_io
from ardist.inference.contact_sheet import contact_sheet
from ardist.inference.video_io import Mp4Writer, read_frames, write_mp4


def gradient(frames: int = 6, height: int = 32, width: int = 48) -> NDArray[np.uint8]:
    """Brightness rises with time; a red square marks the top left corner."""
    made = np.ones((frames, height, width, 3)) * np.linspace(20, 235, frames)[:, None, None, None]
    made[:, : height // 4, : height // 4] = (255, 0, 0)
    return made.astype(np.uint8)


@pytest.mark.parametrize("size", [(32, 48), (31, 33)])
def test_frames_come_back_in_order_and_nearly_as_they_were(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "it's $(a) video; 'x'.mp4"
    frames = gradient(6, *size)
    write_mp4(path, frames, fps=12.5)
    read = read_frames(path)
    assert read.shape == (6, size[0] + size[0] % 2, size[1] + size[1] % 2, 3)
    error = np.abs(read[:, : size[0], : size[1]].astype(int) - frames)
    assert error.mean() < 3
    # Where a side was odd, its last row or column is repeated, not black.
    assert np.abs(read[:, -1].astype(int) - read[:, size[0] - 1]).mean() < 3
    assert [name.name for name in tmp_path.iterdir()] == [path.name]


def test_parts_of_a_video_and_sizes(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    frames = gradient(10, 32, 64)
    write_mp4(path, frames)
    first, last = read_frames(path, num_frames=3), read_frames(path, num_frames=3, last=True)
    assert np.abs(first.astype(int) - frames[:3]).mean() < 3
    assert np.abs(last.astype(int) - frames[-3:]).mean() < 3
    assert len(read_frames(path, num_frames=99)) == 10
    square = read_frames(path, 16)
    assert square.shape == (10, 16, 16, 3)
    assert square[0, 0, 0, 0] < 100, "the middle is kept, so the mark in the corner is gone"
    assert read_frames(path, 64).shape == (10, 64, 64, 3)


def test_an_image_is_a_video_of_one_frame(tmp_path: Path) -> None:
    for suffix in ("png", "jpg", "webp"):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(gradient(1, 40, 20)[0]).save(path)
        assert read_frames(path).shape == (1, 40, 20, 3)
        assert read_frames(path, 10).shape == (1, 10, 10, 3)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>no</html>",
        b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile good.mp4\n",
        b"\x89PNG\r\n\x1a\n broken",
    ],
)
def test_what_is_no_video_or_names_other_files_is_refused(tmp_path: Path, content: bytes) -> None:
    write_mp4(tmp_path / "good.mp4", gradient())
    path = tmp_path / "bad.mp4"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.mp4"):
        read_frames(path)


def test_a_damaged_video_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_mp4(path, gradient(30))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"a\.mp4"):
        read_frames(path)


def test_missing_huge_and_endless_inputs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="is no file"):
        read_frames(tmp_path / "none.mp4")
    os.mkfifo(tmp_path / "fifo.mp4")
    with pytest.raises(DataError, match="is no file"):
        read_frames(tmp_path / "fifo.mp4")
    path, image = tmp_path / "a.mp4", tmp_path / "a.png"
    write_mp4(path, gradient(10))
    Image.fromarray(gradient()[0]).save(image)
    monkeypatch.setattr(video_io, "MAX_FRAMES", 5)
    with pytest.raises(DataError, match="more than 5 frames"):
        read_frames(path)
    monkeypatch.setattr(video_io, "MAX_PIXELS", 100)
    for name in (path, image):
        with pytest.raises(DataError, match="48x32"):
            read_frames(name)
    with pytest.raises(InvalidValueError, match="num_frames=0"):
        read_frames(path, num_frames=0)


def test_a_failing_ffmpeg_is_quoted_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "ffmpeg"
    program.write_text("#!/bin/sh\necho 'the disk is on fire' >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(video_io, "ffmpeg_binary", lambda: str(program))
    out = tmp_path / "out" / "a.mp4"
    with pytest.raises(HardwareError, match="the disk is on fire"):
        write_mp4(out, np.zeros((64, 256, 256, 3), dtype=np.uint8))
    assert list(out.parent.iterdir()) == []


def test_an_interrupted_video_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_mp4(path, gradient())
    before = path.read_bytes()

    def interrupted() -> None:
        with Mp4Writer(path, 8) as writer:
            writer.write(gradient())
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert path.read_bytes() == before
    assert [name.name for name in tmp_path.iterdir()] == ["a.mp4"]


def test_illegal_videos_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match="no frame"):
        write_mp4(tmp_path / "a.mp4", gradient()[:0])
    for rate in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InvalidValueError, match=f"fps={rate} is illegal; legal: above 0"):
            write_mp4(tmp_path / "a.mp4", gradient(), rate)

    def two_sizes() -> None:
        with Mp4Writer(tmp_path / "a.mp4", 8) as writer:
            writer.write(gradient())
            writer.write(gradient(1, 16, 16))

    with pytest.raises(InvalidValueError, match=r"\(16, 16\) after"):
        two_sizes()
    assert list(tmp_path.iterdir()) == []


def test_contact_sheet_shows_first_and_last_frame_of_every_row(tmp_path: Path) -> None:
    path = tmp_path / "sheets" / "sheet.png"
    long = np.zeros((40, 8, 8, 3), dtype=np.uint8)
    long[0], long[-1] = (255, 0, 0), (0, 255, 0)
    contact_sheet([("long", long), ("short", long[:2])], path, max_columns=5, cell=8)
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (2 * (8 + 16 + 4) + 4, 5 * 9 - 1 + 8, 3)
    row = sheet[4 + 16 + 4]
    assert row[6].tolist() == [255, 0, 0]
    assert row[4 + 4 * 9 + 3].tolist() == [0, 255, 0]
    assert [name.name for name in path.parent.iterdir()] == ["sheet.png"]
    with pytest.raises(InvalidValueError, match="at least one row"):
        contact_sheet([], path)
