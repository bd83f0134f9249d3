"""Videos that are good only in part: what is sound is kept, what is not is refused, and always the same."""

from __future__ import annotations

import itertools
import random
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from dt_builds import build_small, quarantine, samples
from dt_videos import make_video
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from data_tools.probe import ProbeCaps
from data_tools.probe_pool import ProbeChild
from data_tools.reasons import Refusal
from data_tools.verify import verify

CODEC = ("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p", "-g", "8", "-bf", "2")


def _clips(out: Path) -> dict[int, np.ndarray]:
    return {int(str(info["start_frame"])): array for array, info in samples(out).values()}


@pytest.mark.parametrize("container", ["mp4", "mkv", "ts", "avi"])
def test_damage_in_the_middle_costs_only_the_clips_it_touches(tmp_path: Path, container: str) -> None:
    video = make_video(tmp_path / "good" / f"a.{container}", frames=64, size="96x96", codec=CODEC)
    build_small(tmp_path / "good", tmp_path / "good-out")
    good = _clips(tmp_path / "good-out")
    data = bytearray(video.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 400] = random.Random(1).randbytes(400)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / video.name).write_bytes(data)
    first = build_small(tmp_path / "bad", tmp_path / "one").manifest
    second = build_small(tmp_path / "bad", tmp_path / "two").manifest
    assert first.digest() == second.digest()
    bad = _clips(tmp_path / "one")
    refused = {int(str(record["start"])) for record in quarantine(tmp_path / "one")}
    assert refused
    assert {str(record["reason"]) for record in quarantine(tmp_path / "one")} == {"damaged"}
    assert set(bad) | refused == set(good)
    assert not set(bad) & refused
    for start, clip in bad.items():
        np.testing.assert_array_equal(clip, good[start])
    if container in ("mp4", "mkv"):
        # Where a seek is possible the part behind the damage is kept as well.
        assert min(bad) < min(refused)


@pytest.mark.parametrize("container", ["mkv", "ts"])
def test_lost_packets_leave_the_others_on_their_grid(tmp_path: Path, container: str) -> None:
    video = make_video(tmp_path / "v" / f"a.{container}", frames=64, size="96x96", rate="25", codec=CODEC)
    build_small(tmp_path / "v", tmp_path / "whole")
    whole, data = _clips(tmp_path / "whole"), bytearray(video.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 8000] = random.Random(1).randbytes(8000)
    video.write_bytes(data)
    build_small(tmp_path / "v", tmp_path / "out")
    kept = samples(tmp_path / "out").values()
    assert {info["fps"] for _, info in kept} == {25.0}
    assert len(kept) >= 2
    for array, info in kept:
        np.testing.assert_array_equal(array, whole[int(str(info["start_frame"]))])


def test_behind_the_damage_a_seekable_video_goes_on(tmp_path: Path) -> None:
    video = make_video(
        tmp_path / "v" / "a.mp4", frames=160, size="64x64", rate="8", codec=(*CODEC, "-x264-params", "scenecut=0")
    )
    data = bytearray(video.read_bytes())
    at = len(data) * 4 // 10
    data[at : at + 300] = random.Random(1).randbytes(300)
    video.write_bytes(data)
    build_small(tmp_path / "v", tmp_path / "out")
    kept = set(_clips(tmp_path / "out"))
    refused = {int(str(record["start"])) for record in quarantine(tmp_path / "out")}
    assert len(kept) + len(refused) == 40
    assert 1 <= len(refused) <= 10
    assert min(kept) < min(refused) < max(kept)


def test_a_gradual_refresh_is_no_key_frame(tmp_path: Path) -> None:
    """Pictures that are renewed column by column: what looks like a key frame still leans on what was before."""
    gradual = (*CODEC[:-4], "-g", "8", "-x264-params", "intra-refresh=1")
    video = make_video(tmp_path / "v" / "a.mp4", frames=96, size="96x96", rate="8", codec=gradual)
    build_small(tmp_path / "v", tmp_path / "whole")
    whole, good = _clips(tmp_path / "whole"), video.read_bytes()
    judged = 0
    for share in (3, 4, 5):
        data = bytearray(good)
        at = len(data) * share // 10
        data[at : at + 40] = random.Random(share).randbytes(40)
        video.write_bytes(data)
        build_small(tmp_path / "v", tmp_path / str(share))
        kept = _clips(tmp_path / str(share))
        refused = {int(str(record["start"])) for record in quarantine(tmp_path / str(share))}
        judged += bool(refused)
        for start in kept if refused else ():
            np.testing.assert_array_equal(kept[start], whole[start], str(start))
    assert judged


@pytest.mark.parametrize("container", ["mkv", "ts", "flv"])
def test_a_cut_tail_costs_only_the_tail(tmp_path: Path, container: str) -> None:
    codec = CODEC[:-2] if container == "flv" else CODEC
    video = make_video(tmp_path / "v" / f"a.{container}", frames=64, size="96x96", codec=codec)
    build_small(tmp_path / "v", tmp_path / "whole")
    whole = _clips(tmp_path / "whole")
    data = video.read_bytes()
    video.write_bytes(data[: len(data) * 6 // 10])
    build_small(tmp_path / "v", tmp_path / "out")
    kept = _clips(tmp_path / "out")
    assert 4 <= len(kept) < len(whole)
    for start, clip in kept.items():
        np.testing.assert_array_equal(clip, whole[start])


def test_nothing_outside_is_opened(tmp_path: Path) -> None:
    """Files that name an address: nobody calls there."""
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.2)
    port = server.getsockname()[1]
    calls: list[object] = []
    stop = threading.Event()

    def listen() -> None:
        while not stop.is_set():
            try:
                calls.append(server.accept()[1])
            except TimeoutError:
                continue

    thread = threading.Thread(target=listen)
    thread.start()
    url = f"http://127.0.0.1:{port}/x.ts"
    texts = {
        "hls.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}\n#EXT-X-ENDLIST\n",
        "concat.mp4": f"ffconcat version 1.0\nfile {url}\n",
        "dash.mkv": f'<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><BaseURL>{url}</BaseURL></Period></MPD>',
        "stream.avi": f"{url}\n",
        "asx.wmv": f'<asx version="3.0"><entry><ref href="{url}"/></entry></asx>',
        "sdp.ts": f"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\nm=video {port} RTP/AVP 96\r\n",
    }
    (tmp_path / "v").mkdir()
    for name, text in texts.items():
        (tmp_path / "v" / name).write_text(text)
    make_video(tmp_path / "v" / "good.mp4")
    build_small(tmp_path / "v", tmp_path / "out")
    stop.set()
    thread.join()
    server.close()
    assert calls == []
    assert {str(record["source"]) for record in quarantine(tmp_path / "out")} == set(texts)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """One small video in each of several containers."""
    folder = tmp_path_factory.mktemp("originals")
    videos = [make_video(folder / f"a.{kind}", frames=8, codec=CODEC) for kind in ("mp4", "mkv", "ts", "avi")]
    videos.append(make_video(folder / "a.webm", frames=8, codec=("-c:v", "libvpx", "-cpu-used", "8")))
    videos.append(make_video(folder / "a.gif", frames=8, codec=()))
    return [video.read_bytes() for video in videos]


@pytest.fixture(scope="module")
def child() -> ProbeChild:
    """One probe child for all cases: it must survive, or be replaced."""
    return ProbeChild(timeout=100.0)


def _mutilate(data: bytes, cut: float, flips: list[tuple[float, int]]) -> bytes:
    out = bytearray(data[: max(1, int(len(data) * cut))])
    for place, bit in flips:
        out[int(place * (len(out) - 1))] ^= 1 << bit
    return bytes(out)


places = st.floats(0, 1, allow_nan=False)
flips = st.lists(st.tuples(places, st.integers(0, 7)), max_size=12)
wounds = {"which": st.integers(0, 5), "cut": st.one_of(st.just(1.0), places), "flips": flips}
relaxed = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture], "database": None}


@given(**wounds)
@settings(max_examples=60, derandomize=True, **relaxed)
def test_the_probe_has_an_answer_for_everything(
    originals: list[bytes], child: ProbeChild, tmp_path: Path, which: int, cut: float, flips: list[tuple[float, int]]
) -> None:
    path = tmp_path / "x.mp4"
    path.write_bytes(_mutilate(originals[which], cut, flips))
    try:
        facts = child.probe(str(path), None, ProbeCaps(10_000_000, 3600, 8))
    except Refusal:
        return
    assert facts.count >= 1
    assert facts.timeline().grid_length(None) >= 1


@pytest.mark.slow
def test_five_hundred_random_wounds(originals: list[bytes], tmp_path: Path) -> None:
    """A build over 500 damaged copies ends by itself, every input has a fate, and the result verifies."""
    (tmp_path / "v").mkdir()
    numbers = itertools.count()

    @given(**wounds)
    @settings(max_examples=500, derandomize=True, phases=[Phase.generate], **relaxed)
    def wound(which: int, cut: float, flips: list[tuple[float, int]]) -> None:
        """Only write the copy: one build over all of them costs much less than one each."""
        (tmp_path / "v" / f"{next(numbers):03d}.mp4").write_bytes(_mutilate(originals[which], cut, flips))

    wound()
    assert next(numbers) == 500
    assert len({path.read_bytes() for path in (tmp_path / "v").iterdir()}) > 400
    summary = build_small(tmp_path / "v", tmp_path / "out", probe_timeout=100.0, samples_per_shard=256)
    assert summary.videos == 500
    fates = {str(info["source"]) for _, info in samples(tmp_path / "out").values()}
    fates |= {str(record["source"]) for record in quarantine(tmp_path / "out")}
    assert len(fates) == 500
    assert not verify(str(tmp_path / "out")).problems
