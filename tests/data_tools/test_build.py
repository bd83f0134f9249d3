"""From videos to a dataset: what comes out, that it comes out the same again, and what is refused in words."""

from __future__ import annotations

import datetime
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from dt_builds import build_small, quarantine, samples
from dt_videos import make_video, real_clips, run_ffmpeg

from ardist.data.manifest import load_manifest
from ardist.data.tar_index import TarIndex, build_index
from ardist.errors import ConfigError, DataError
from ardist.storage import open_storage
from data_tools import layout
from data_tools.cli import main
from data_tools.plan import load_plan


def test_what_comes_out(three_videos: Path, tmp_path: Path) -> None:
    summary = build_small(three_videos, tmp_path / "out")
    manifest = load_manifest(tmp_path / "out")
    assert summary.manifest == manifest
    assert (manifest.num_samples, manifest.kind, manifest.dtype, manifest.shape) == (
        9,
        "pixels",
        "uint8",
        (4, 16, 16, 3),
    )
    assert [shard.n for shard in manifest.shards] == [4, 4, 1]
    found = samples(tmp_path / "out")
    assert len(found) == 9
    spans = sorted((str(info["source"]), info["start_frame"]) for _, info in found.values())
    assert spans == sorted((name, start) for name in ("a.mp4", "sub/b.mkv", "c.mp4") for start in (0, 4, 8))
    for array, info in found.values():
        assert array.shape == (4, 16, 16, 3)
        assert info["fps"] == 12.0
        assert info["start"] == info["start_frame"] / 12
        assert info["class_id"] is None
        assert info["frames"] == 4
    assert quarantine(tmp_path / "out") == []
    plan = load_plan(open_storage(tmp_path / "out"))
    assert plan is not None
    planned = [clip for number in range(plan.num_shards) for clip in plan.clips(number)]
    assert list(found) == [clip.key for clip in planned], "samples do not stand in the order of the plan"
    assert [clip.row for clip in planned] == list(range(9))
    order = [(clip.video.facts.sha256, clip.start) for clip in planned]
    assert order == sorted(order), "clips are ordered by their video's content, then by time"
    assert manifest.created == plan.header.created
    assert abs(time.time() - datetime.datetime.fromisoformat(plan.header.created).timestamp()) < 600
    for shard in manifest.shards:
        index = build_index(tmp_path / "out" / shard.name, shape=shard.shape, dtype=shard.dtype)
        assert index.to_bytes() == (tmp_path / "out" / shard.index_name).read_bytes()
        TarIndex.open(tmp_path / "out" / shard.index_name, n=shard.n, tar_sha256=shard.sha256)


def test_pixels_are_those_of_a_plain_decode(tmp_path: Path) -> None:
    """Clip for clip the frames of one plain pass over the whole video, scaled by the same filters."""
    video = make_video(tmp_path / "v" / "a.mp4", frames=30, size="64x48", rate="30000/1001")
    build_small(tmp_path / "v", tmp_path / "out", stride=3)
    raw = tmp_path / "raw"
    flags = "bicubic+accurate_rnd+full_chroma_int+full_chroma_inp+bitexact"
    run_ffmpeg("-i", video, "-vf", f"scale=21:16:flags={flags},format=rgb24,crop=16:16", "-f", "rawvideo", raw)
    frames = np.fromfile(raw, np.uint8).reshape(-1, 16, 16, 3)
    assert len(frames) == 30
    found = samples(tmp_path / "out")
    assert len(found) == 9
    for array, info in found.values():
        start = int(str(info["start_frame"]))
        np.testing.assert_array_equal(array, frames[start : start + 4])


def test_the_same_input_gives_the_same_bytes(three_videos: Path, tmp_path: Path) -> None:
    shutil.copytree(three_videos, tmp_path / "elsewhere")
    first = build_small(three_videos, tmp_path / "one").manifest
    second = build_small(tmp_path / "elsewhere", tmp_path / "two").manifest
    assert first.digest() == second.digest()
    for shard in first.shards:
        assert (tmp_path / "one" / shard.name).read_bytes() == (tmp_path / "two" / shard.name).read_bytes()


def test_a_finished_dataset_is_found_finished(three_videos: Path, tmp_path: Path) -> None:
    first = build_small(three_videos, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    again = build_small(three_videos, tmp_path / "out")
    assert again.reused
    assert not first.reused
    assert again.manifest == first.manifest
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert not list((tmp_path / "out").glob(".tmp-*"))
    assert not list((tmp_path / "out").glob("leases/*"))


def test_other_parameters_are_refused_with_the_difference(three_videos: Path, tmp_path: Path) -> None:
    build_small(three_videos, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"stride: built with 4, asked for 2") as caught:
        build_small(three_videos, tmp_path / "out", stride=2)
    assert caught.value.exit_code == 2
    with pytest.raises(ConfigError, match=r"videos: built with .*three.*, asked for"):
        build_small(three_videos / "sub", tmp_path / "out")


def test_another_tools_dataset_is_left_alone(three_videos: Path, tmp_path: Path) -> None:
    build_small(three_videos, tmp_path / "out")
    (tmp_path / "out" / layout.CLAIM).unlink()
    with pytest.raises(ConfigError, match="another dataset"):
        build_small(three_videos, tmp_path / "out")


def test_one_broken_video_does_not_stop_the_others(three_videos: Path, tmp_path: Path) -> None:
    shutil.copytree(three_videos, tmp_path / "v")
    (tmp_path / "v" / "broken.mp4").write_bytes(b"not a video at all" * 100)
    (tmp_path / "v" / "empty.mp4").write_bytes(b"")
    shutil.copy(tmp_path / "v" / "a.mp4", tmp_path / "v" / "z-copy.mp4")
    summary = build_small(tmp_path / "v", tmp_path / "out")
    assert (summary.videos, summary.refused_videos, summary.duplicates) == (6, 2, 1)
    assert summary.manifest.num_samples == 9
    assert [(r["source"], r["stage"], r["reason"]) for r in quarantine(tmp_path / "out")] == [
        ("broken.mp4", "probe", "format"),
        ("empty.mp4", "scan", "empty"),
        ("z-copy.mp4", "plan", "duplicate"),
    ]
    with pytest.raises(DataError, match=r"33\.3% was refused, above --max-bad 0\.3") as caught:
        build_small(tmp_path / "v", tmp_path / "out2", max_bad=0.3)
    assert caught.value.exit_code == 3
    assert load_manifest(tmp_path / "out2").digest() == summary.manifest.digest()


def test_only_broken_videos(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "x.mp4").write_bytes(b"nothing" * 50)
    with pytest.raises(DataError, match=r"no clip of any video could be used: 1 x format"):
        build_small(tmp_path / "v", tmp_path / "out")
    assert len(quarantine(tmp_path / "out")) == 1


def test_no_videos_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "v" / ".hidden").mkdir(parents=True)
    (tmp_path / "v" / ".hidden" / "x.mp4").write_bytes(b"x")
    (tmp_path / "v" / "._x.mp4").write_bytes(b"x")
    (tmp_path / "v" / "notes.txt").write_text("hello")
    with pytest.raises(ConfigError, match="no video found"):
        build_small(tmp_path / "v", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="cannot be read"):
        build_small(tmp_path / "missing", tmp_path / "out")


def test_a_source_that_changes_after_planning_is_refused(three_videos: Path, tmp_path: Path, in_child: object) -> None:
    shutil.copytree(three_videos, tmp_path / "v")
    assert in_child(lambda: build_small(tmp_path / "v", tmp_path / "out"), "kill@build.after_plan") == -9  # type: ignore[operator]
    make_video(tmp_path / "v" / "a.mp4", pattern="smptehdbars")
    (tmp_path / "v" / "c.mp4").unlink()
    make_video(tmp_path / "v" / "new.mp4", pattern="yuvtestsrc")
    summary = build_small(tmp_path / "v", tmp_path / "out")
    assert summary.manifest.num_samples == 3
    reasons = sorted((str(r["source"]), str(r["reason"])) for r in quarantine(tmp_path / "out"))
    assert reasons == [("a.mp4", "changed")] * 3 + [("c.mp4", "vanished")] * 3


def test_classes_from_folders(three_videos: Path, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "v" / name).mkdir(parents=True)
    shutil.copy(three_videos / "a.mp4", tmp_path / "v" / "dog" / "x.mp4")
    shutil.copy(three_videos / "c.mp4", tmp_path / "v" / "cat" / "x.mp4")
    make_video(tmp_path / "v" / "stray.mp4", pattern="yuvtestsrc")
    summary = build_small(tmp_path / "v", tmp_path / "out", classes_from_folders=True)
    assert summary.manifest.classes == ("cat", "dog")
    found = {(info["source"], info["class_id"]) for _, info in samples(tmp_path / "out").values()}
    assert found == {("dog/x.mp4", 1), ("cat/x.mp4", 0)}
    assert [(r["source"], r["reason"]) for r in quarantine(tmp_path / "out")] == [("stray.mp4", "label")]
    for shard in summary.manifest.shards:
        assert set(TarIndex.open(tmp_path / "out" / shard.index_name).records["class_id"]) <= {0, 1}


def test_portions_do_not_overlap(tmp_path: Path) -> None:
    make_video(tmp_path / "v" / "a.mp4", frames=20)
    build_small(tmp_path / "v", tmp_path / "train", num_frames=2, stride=1, portion=(0.0, 0.8))
    build_small(tmp_path / "v", tmp_path / "held", num_frames=2, stride=1, portion=(0.8, 1.0))
    frames = [
        {int(str(info["start_frame"])) + offset for _, info in samples(tmp_path / name).values() for offset in range(2)}
        for name in ("train", "held")
    ]
    assert frames == [set(range(16)), {16, 17, 18, 19}]


def test_limits_and_max_clips(three_videos: Path, tmp_path: Path) -> None:
    assert build_small(three_videos, tmp_path / "a", limit_clips=5).manifest.num_samples == 5
    assert build_small(three_videos, tmp_path / "b", limit_videos=1).manifest.num_samples == 3
    assert build_small(three_videos, tmp_path / "c", max_clips_per_video=1).manifest.num_samples == 3
    starts = {info["start_frame"] for _, info in samples(tmp_path / "c").values()}
    assert starts == {4}


def test_frame_rate_conversion(tmp_path: Path) -> None:
    make_video(tmp_path / "v" / "a.mp4", frames=24, rate="12")
    build_small(tmp_path / "v", tmp_path / "half", fps="6", num_frames=12)
    build_small(tmp_path / "v", tmp_path / "full", num_frames=24)
    half = next(iter(samples(tmp_path / "half").values()))[0]
    full = next(iter(samples(tmp_path / "full").values()))[0]
    np.testing.assert_array_equal(half, full[::2])


def test_plain_webdataset_reads_the_shards(three_videos: Path, tmp_path: Path) -> None:
    manifest = build_small(three_videos, tmp_path / "out").manifest
    urls = [str(tmp_path / "out" / shard.name) for shard in manifest.shards]
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(read) == manifest.num_samples
    assert all({"npy", "json", "__key__"} <= set(sample) for sample in read)


def test_real_clips(tmp_path: Path) -> None:
    """The command line over real videos: clips of every video, all frames of native rate in place."""
    words = ["build", "--videos", str(real_clips()), "--out", str(tmp_path / "out")]
    assert main([*words, "--num-frames", "16", "--size", "64", "--stride", "64", "--max-clips-per-video", "2"]) == 0
    manifest = load_manifest(tmp_path / "out")
    assert manifest.shape == (16, 64, 64, 3)
    rates = {info["source"]: info["fps"] for _, info in samples(tmp_path / "out").values()}
    assert rates["bikes.mp4"] == rates["bigbuckbunny.mp4"] == 25.0
    assert rates["carphone_pristine.mp4"] == pytest.approx(30000 / 1001)
    assert len(samples(tmp_path / "out")) == 8
    log = [json.loads(line) for line in (tmp_path / "out" / "build-log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in log if line["event"] != "progress"] == [
        "probed",
        "planned",
        "committed",
        "finished",
    ]
    assert log[-1]["digest"] == manifest.digest()


def test_command_line_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["build", "--videos", str(tmp_path), "--out", str(tmp_path / "out")]
    for words, expected in (
        ([], "no video found"),
        (["--fps", "0"], "fps 0 is outside"),
        (["--fps", "abc"], "is not a number"),
        (["--portion", "0.5"], "--portion '0.5' is not of the form A:B"),
        (["--portion", "0.9:0.5"], "is not an interval"),
        (["--encoder", str(tmp_path / "none")], "is not a folder"),
        (["--precision", "fp8"], "legal: fp32, bf16"),
        (["--labels", str(tmp_path / "none.csv")], "does not exist"),
    ):
        code = main([*base, *words])
        error = capsys.readouterr().err
        assert code in (2, 3), words
        assert expected in error
        assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["build"])
def test_help_is_a_manual(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert "--videos" in text
    assert "quarantine" in text
