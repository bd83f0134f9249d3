"""Frames on the grid: a seek gives the very frames of a plain pass; limits and timeouts bite."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from dt_videos import make_video, run_ffmpeg

from data_tools import decode
from data_tools.decode import DecodeSettings, Target, decode_stretch, stretches
from data_tools.ffmpeg_graph import DecodeRequest, command_line
from data_tools.frame_stream import FrameStream
from data_tools.probe import ProbeCaps, VideoFacts, open_checked, probe
from data_tools.probe_pool import ProbeChild, probe_all
from data_tools.reasons import Reason, Refusal
from data_tools.sources import local_version

CAPS = ProbeCaps(10_000_000, 3600, 8)
LONG = ("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p", "-g", "25", "-bf", "2", "-sc_threshold", "0")


def _look(path: Path) -> VideoFacts:
    return probe(str(path), None, CAPS)


def _target(facts: VideoFacts, num_frames: int = 4, size: int = 16) -> Target:
    return Target(num_frames, Fraction(facts.rate), size, CAPS.max_pixels)


def _all(path: Path, facts: VideoFacts, starts: list[int]) -> dict[int, np.ndarray]:
    target = _target(facts)
    found = {}
    for group, frames in decode_stretch(str(path), None, facts, starts, target, DecodeSettings()):
        assert not isinstance(frames, Refusal), frames
        found.update({start: frames[start - group[0] : start - group[0] + 4] for start in group})
    return found


def _late(path: Path) -> None:
    run_ffmpeg(
        "-i",
        make_video(path.with_name("x.mkv"), frames=150, rate="25", codec=LONG),
        "-c",
        "copy",
        "-output_ts_offset",
        "37.5",
        path,
    )


def _with_sound(path: Path) -> None:
    video = make_video(path.with_name("x.mp4"), frames=150, rate="25", codec=LONG)
    run_ffmpeg("-i", video, "-f", "lavfi", "-i", "sine=duration=6", "-c:v", "copy", "-c:a", "aac", path)


def _trimmed(path: Path) -> None:
    video = make_video(path.with_name("x.mp4"), frames=200, rate="25", codec=LONG)
    run_ffmpeg("-ss", "1.4", "-i", video, "-c", "copy", path)


def _open_gop(path: Path) -> None:
    options = "log-level=none:keyint=25:min-keyint=25:open-gop=1"
    codec = ("-c:v", "libx265", "-preset", "ultrafast", "-x265-params", options)
    make_video(path, frames=150, rate="25", codec=codec)


MAKERS = {
    "plain.mp4": lambda path: make_video(path, frames=150, rate="25", codec=LONG),
    "plain.mkv": lambda path: make_video(path, frames=150, rate="25", codec=LONG),
    "film.mp4": lambda path: make_video(path, frames=150, rate="24000/1001", codec=LONG),
    "late.mkv": _late,
    "sound.mp4": _with_sound,
    "trimmed.mp4": _trimmed,
    "open_gop.mkv": _open_gop,
    "vp9.webm": lambda path: make_video(
        path, frames=150, rate="25", codec=("-c:v", "libvpx-vp9", "-cpu-used", "8", "-g", "25", "-auto-alt-ref", "1")
    ),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_seek_gives_the_frames_of_a_plain_pass(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    MAKERS[name](path)
    facts = _look(path)
    assert len(facts.keyframes) > 1
    length = facts.timeline().grid_length(None)
    starts = list(range(0, length - 3, 13))
    plain = _all(path, facts, starts)
    for start in [start for start in starts if facts.seek_before(Fraction(facts.start) + start / Fraction(facts.rate))]:
        np.testing.assert_array_equal(_all(path, facts, [start])[start], plain[start], err_msg=f"{name} at {start}")


def test_stretches_are_split_only_where_a_seek_can_join(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(4, Fraction(10), 16, 10**7)
    assert list(stretches([0, 4, 200, 204], target, seekable=True)) == [[0, 4], [200, 204]]
    assert list(stretches([0, 4, 200, 204], target, seekable=False)) == [[0, 4, 200, 204]]
    assert list(stretches([0, 4, 100], target, seekable=True)) == [[0, 4, 100]]
    monkeypatch.setattr(decode, "STRETCH_FRAMES", 8)
    assert list(stretches(list(range(0, 40, 4)), target, seekable=True)) == [[i, i + 4] for i in range(0, 40, 8)]
    assert list(stretches([], target, seekable=True)) == []


def test_a_long_stretch_goes_through_a_file(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", frames=40)
    facts = _look(path)
    settings = DecodeSettings(held_bytes=1000, scratch=tmp_path)
    starts = list(range(0, 36, 4))
    [(_, small)] = decode_stretch(str(path), None, facts, starts, _target(facts), settings)
    [(_, plain)] = decode_stretch(str(path), None, facts, starts, _target(facts), DecodeSettings())
    assert isinstance(small, np.memmap)
    np.testing.assert_array_equal(small, plain)
    assert list(tmp_path.iterdir()) == [path]


def test_frames_that_do_not_come_are_noticed(tmp_path: Path) -> None:
    """A decoder that ends well but early: nothing is made up."""
    path = make_video(tmp_path / "a.mp4", frames=12)
    facts = _look(path)
    outcomes = list(decode_stretch(str(path), None, facts, [4, 8, 10], _target(facts), DecodeSettings()))
    assert [starts for starts, _ in outcomes] == [[4], [8], [10]]
    assert [isinstance(frames, Refusal) for _, frames in outcomes] == [False, False, True]
    assert "only 2 of 4 frames came" in str(outcomes[2][1])


def test_the_command_is_closed_to_the_world(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a $(touch x).mp4")
    facts = _look(path)
    words = command_line(DecodeRequest(facts, 0, 4, Fraction(12), 16, 1000), 7, strict=True)
    assert not any("touch" in word for word in words)
    options = dict(itertools.pairwise(words[: words.index("-i") + 2]))
    assert options["-i"] == "file:/dev/fd/7"
    assert options["-protocol_whitelist"] == "file,pipe"
    assert options["-f"] == "mov"
    assert options["-max_pixels"] == "1000"
    assert not {"hls", "concat", "dash", "sdp", "image2", "rtp"} & set(options["-format_whitelist"].split(","))
    assert "-xerror" in words
    assert "-nostdin" in words


def test_opening_never_waits(tmp_path: Path) -> None:
    """A FIFO that takes a video's place after the listing must not make us wait for a writer."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Refusal) as caught:
        open_checked(str(tmp_path / "pipe"), None)
    assert caught.value.reason is Reason.NOT_A_FILE


def _stream(path: Path, code: str, timeout: float) -> FrameStream:
    """A stand-in for ffmpeg that misbehaves."""
    return FrameStream(str(path), None, lambda _: [sys.executable, "-c", code], timeout=timeout, memory=4 * 2**30)


def test_a_decoder_that_hangs_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"x")
    with _stream(path, "import time; print('x', flush=True); time.sleep(600)", 0.7) as stream:
        with pytest.raises(Refusal) as caught:
            stream.read_into(np.empty((4, 2, 2, 3), np.uint8))
        pid = stream._process.pid
    assert caught.value.reason is Reason.TIMEOUT
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_decoder_that_floods_or_dies_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"x")
    flood = "import sys\nwhile True: sys.stderr.write('e' * 100000)"
    with _stream(path, flood, 100) as stream, pytest.raises(Refusal, match="flooded") as caught:
        stream.read_into(np.empty((4, 2, 2, 3), np.uint8))
    assert caught.value.reason is Reason.CRASHED
    died = _stream(path, "import os; os.kill(os.getpid(), 11)", 100)
    with died, pytest.raises(Refusal, match="SIGSEGV") as caught:
        died.finish()
    assert caught.value.reason is Reason.CRASHED
    with _stream(path, "import sys; sys.exit('broken at 0x12 @ 0xabc')", 100) as stream:
        assert stream.finish() == "broken at 0x12"


def test_a_decoders_memory_and_files_are_limited(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"x")
    # The limits come a moment after the start, the one of core files last.
    limited = "import resource, time\nwhile resource.getrlimit(resource.RLIMIT_CORE)[1]: time.sleep(0.01)\n"
    greedy = f"{limited}try:\n  b = bytearray(3 * 10**9)\nexcept MemoryError: raise SystemExit(7)"
    command = [sys.executable, "-c", greedy]
    with FrameStream(str(path), None, lambda _: command, timeout=100, memory=2**30) as stream:
        assert "status 7" in stream.finish()
    writer = f"{limited}open({str(tmp_path / 'out')!r}, 'wb', 0).write(b'x')"
    with _stream(path, writer, 100) as stream:
        assert stream.finish()
    assert (tmp_path / "out").stat().st_size == 0


def test_the_probe_is_replaced_when_it_dies_or_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = make_video(tmp_path / "a.mp4")
    child = ProbeChild(timeout=100)
    child.probe(str(good), None, CAPS)
    first = child._process
    assert first is not None
    first.kill()
    first.wait()
    with pytest.raises(Refusal) as caught:
        child.probe(str(good), None, CAPS)
    assert caught.value.reason is Reason.CRASHED
    assert child.probe(str(good), None, CAPS).count == 12
    os.kill(child._process.pid, 19)  # SIGSTOP
    child._timeout = 0.5
    with pytest.raises(Refusal) as caught:
        child.probe(str(good), None, CAPS)
    assert caught.value.reason is Reason.TIMEOUT
    child._timeout = 100
    assert child.probe(str(good), None, CAPS).count == 12
    child.close()


def test_probing_many_keeps_their_order(tmp_path: Path) -> None:
    paths = [make_video(tmp_path / f"{n}.mp4", frames=n + 2) for n in range(4)]
    requests = [(str(path), local_version(path.stat()), 0) for path in paths] + [(str(tmp_path / "none"), None, 0)]
    answers = list(probe_all(requests, CAPS, 2, 100))
    assert [answer.count for answer in answers[:4] if isinstance(answer, VideoFacts)] == [2, 3, 4, 5]
    assert isinstance(answers[4], Refusal)
    shutil.copy(paths[3], paths[0])
    assert isinstance(next(iter(probe_all(requests[:1], CAPS, 1, 100))), Refusal)


def test_alpha_that_this_ffmpeg_cannot_decode_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than shown without it: what was transparent would come out in whatever colour lies below."""
    codec = ("-c:v", "libvpx-vp9", "-cpu-used", "8", "-pix_fmt", "yuva420p")
    facts = probe(str(make_video(tmp_path / "a.webm", codec=codec)), None, CAPS)
    assert facts.alpha
    request = DecodeRequest(facts, 0, 4, Fraction(12), 16, 1000)
    assert "libvpx-vp9" in command_line(request, 7, strict=True)
    monkeypatch.setattr("data_tools.ffmpeg_graph._decoders", frozenset)
    with pytest.raises(Refusal, match="codec: has alpha, and the ffmpeg here has no libvpx-vp9"):
        command_line(request, 7, strict=True)
