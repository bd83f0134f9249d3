"""Looking at a finished dataset: statistics, one sample's provenance, garbage, the wids list."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
from dt_builds import build_small, samples

from ardist.data.loader import read_samples
from ardist.media import ffmpeg_binary
from data_tools import layout
from data_tools.cli import main
from data_tools.gc import collect
from data_tools.reasons import Reason, Refusal, quarantine_line
from data_tools.stats import statistics
from data_tools.verify import verify


@pytest.fixture(scope="module")
def dataset(three_videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, one of them larger, and a refused video; frames of 64 pixels."""
    folder = tmp_path_factory.mktemp("describe")
    for name in ("a.mp4", "c.mp4", "sub/b.mkv"):
        target = folder / "v" / ("cat" if name == "c.mp4" else "dog") / Path(name).name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(three_videos / name, target)
    (folder / "v" / "cat" / "broken.mp4").write_bytes(b"no video" * 50)
    build_small(folder / "v", folder / "out", classes_from_folders=True, size=32)
    return folder / "out"


def test_statistics(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = statistics(str(dataset))
    assert found.per_class == {"cat": 3, "dog": 6}
    assert found.per_shard == [4, 4, 1]
    assert found.refused == {"format": 1}
    assert main(["stats", str(dataset), "--png", str(tmp_path / "s.png")]) == 0
    text = capsys.readouterr().out
    assert "9 pixels" in text
    assert "66.7%" in text
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert main(["stats", str(dataset), "--png", str(tmp_path / "s.txt")]) == 2


def test_refused_names_may_hold_other_ends_of_lines(dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "copy")
    with (tmp_path / "copy" / layout.QUARANTINE).open("ab") as file:
        file.write(quarantine_line(Refusal(Reason.CODEC, "none").record("a\u2028b\x85c.mp4", "probe")))
    assert statistics(str(tmp_path / "copy")).refused == {"codec": 1, "format": 1}


def test_inspect_tells_where_a_sample_came_from(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, (array, info) = next((k, v) for k, v in samples(dataset).items() if v[1]["source"] == "dog/b.mkv")
    clip = tmp_path / "clip.mp4"
    assert main(["inspect", str(dataset), key, "--decode", str(clip)]) == 0
    text = capsys.readouterr().out
    for expected in ("dog/b.mkv", "4 frames from", "1 (dog)", "uint8", "source at the left"):
        assert expected in text
    command = [ffmpeg_binary(), "-loglevel", "error", "-i", str(clip), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    shown = np.frombuffer(raw, np.uint8).reshape(-1, 256, 512, 3)
    assert len(shown) == info["frames"] == 4
    # Both halves are the same frames, up to what H.264 loses.
    left, right = (half[:, 4::8, 4::8].astype(float) for half in (shown[:, :, :256], shown[:, :, 256:]))
    assert np.abs(left - array).mean() < 12
    assert np.abs(right - array).mean() < 12
    assert main(["inspect", str(dataset), "0" * 16]) == 3
    assert main(["inspect", str(dataset), "not a key"]) == 2


def test_inspect_without_the_source(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset / "shards", copy / "shards")
    shutil.copy(dataset / "manifest.json", copy)
    assert main(["inspect", str(copy), next(iter(samples(copy))), "--decode", str(tmp_path / "c.mp4")]) == 0
    assert "its source cannot be shown" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_gc_removes_only_what_belongs_to_nothing(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    before = {path for path in copy.rglob("*") if path.is_file()}
    assert collect(str(copy), older_than=0, dry_run=False).names == []
    orphans = [copy / "shards" / "shard-000009-deadbeef.tar", copy / "leases" / "000001.0001.json"]
    orphans += [copy / "shards" / ".tmp-1-x", copy / ".tmp-build-x" / "source-1"]
    for path in orphans:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    young = copy / "shards" / "shard-000010-deadbeef.tar"
    young.write_bytes(b"x")
    for path in [*orphans, copy / ".tmp-build-x"]:
        os.utime(path, (1, 1))
    listed = collect(str(copy), older_than=3600, dry_run=True).names
    assert len(listed) == 4
    assert all(path.exists() for path in orphans)
    assert main(["gc", str(copy), "--older-than", "1"]) == 0
    assert not any(path.exists() for path in orphans)
    assert {path for path in copy.rglob("*") if path.is_file()} == before | {young}
    assert not verify(str(copy)).problems
    assert "removed" in capsys.readouterr().err


def test_wids_itself_reads_the_dataset(dataset: Path, tmp_path: Path) -> None:
    wids = pytest.importorskip("wids", reason="the package wids is not installed")
    assert main(["export-wids", str(dataset), "--out", str(tmp_path / "d.json")]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own default way of decoding
        samples = wids.ShardListDataset(str(tmp_path / "d.json"), cache_dir=str(tmp_path / "cache"), keep=True)
    assert len(samples) == 9
    expected = read_samples(str(dataset)).values.numpy()
    for number in range(9):
        assert np.array_equal(samples[number][".npy"], expected[number])


def test_wids_description(dataset: Path, tmp_path: Path) -> None:
    assert main(["export-wids", str(dataset), "--out", str(tmp_path / "d.json")]) == 0
    description = json.loads((tmp_path / "d.json").read_text())
    assert description["wids_version"] == 1
    assert sum(shard["nsamples"] for shard in description["shardlist"]) == 9
    for shard in description["shardlist"]:
        assert Path(shard["url"]).is_relative_to(dataset), "elsewhere a relative address leads nowhere"
        assert Path(shard["url"]).stat().st_size == shard["filesize"]
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    assert main(["export-wids", str(copy)]) == 0
    for shard in json.loads((copy / "wids.json").read_text())["shardlist"]:
        assert not Path(shard["url"]).is_absolute(), "with the dataset it can be moved"
        assert (copy / shard["url"]).stat().st_size == shard["filesize"]
