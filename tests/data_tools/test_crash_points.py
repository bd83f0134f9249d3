"""kill -9 at every named point of a build: the next run ends with the manifest of an undisturbed one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dt_builds import build_small, samples
from dt_crashes import BUILD_POINTS, builders, run_builders
from dt_videos import make_video

from ardist import fault
from data_tools import layout
from data_tools.lease import Pace

LOCAL_POINTS = [
    "storage.local_read",
    "storage.local_before_sync",
    "storage.local_before_link",
    "storage.local_before_rename",
    "storage.local_after_rename",
]
POINTS = [*LOCAL_POINTS, *BUILD_POINTS]
ALWAYS = {("build.before_plan", 1), ("build.sample", 2), ("build.before_upload_1", 2), ("build.before_commit", 1)}
Child = Callable[[Callable[[], Any], str], int]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good videos and one that is none: five clips, three shards."""
    folder = tmp_path_factory.mktemp("crash")
    make_video(folder / "a.mp4")
    make_video(folder / "b.mkv", frames=8, pattern="testsrc")
    (folder / "broken.mp4").write_bytes(b"no video" * 99)
    return folder


@pytest.fixture(scope="module")
def undisturbed(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of a build that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    build_small(videos, out, samples_per_shard=2)
    return out


def _contents(out: Path) -> dict[str, bytes]:
    """What a trainer and a person see of a dataset, without times."""
    names = [layout.QUARANTINE, *(path.relative_to(out).as_posix() for path in (out / "shards").iterdir())]
    return {name: (out / name).read_bytes() for name in sorted(names)}


def _check(out: Path, undisturbed: Path, videos: Path) -> None:
    before = {path.name: path.read_bytes() for path in (out / "commits").glob("*.json")} if out.exists() else {}
    finished = build_small(videos, out, samples_per_shard=2).manifest
    expected = build_small(videos, undisturbed, samples_per_shard=2).manifest
    assert finished.digest() == expected.digest()
    assert _contents(out) == _contents(undisturbed)
    after = {path.name: path.read_bytes() for path in (out / "commits").glob("*.json")}
    assert before.items() <= after.items(), "a committed shard was built again"
    assert not [path for path in out.rglob(".tmp-*") if path.is_dir()]
    assert not list(out.parent.glob(".tmp-*"))


def test_the_list_of_points_is_complete(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fault.VARIABLE, "sleep@nowhere:0")
    build_small(videos, tmp_path / "out", samples_per_shard=2)
    assert set(fault._visits) == set(POINTS)
    assert len(POINTS) >= 20


@pytest.mark.parametrize(
    ("point", "visit"),
    [
        pytest.param(point, visit, marks=() if (point, visit) in ALWAYS else pytest.mark.slow)
        for point in POINTS
        for visit in (1, 2)
    ],
)
def test_kill_then_run_again(
    videos: Path, undisturbed: Path, tmp_path: Path, in_child: Child, point: str, visit: int
) -> None:
    out = tmp_path / "out"
    status = in_child(lambda: build_small(videos, out, samples_per_shard=2), f"kill@{point}#{visit}")
    assert status == -9 or (visit == 2 and status == 0), "the point was not reached"
    _check(out, undisturbed, videos)


@pytest.mark.parametrize(
    "point", [pytest.param(p, marks=() if p == "build.before_commit" else pytest.mark.slow) for p in POINTS]
)
def test_three_builders_are_killed_and_three_go_on(videos: Path, undisturbed: Path, tmp_path: Path, point: str) -> None:
    out = tmp_path / "out"
    build = builders(lambda: build_small(videos, out, samples_per_shard=2))
    assert -9 in run_builders(build, f"kill@{point}#1"), "the point was not reached"
    before = {path.name: path.read_bytes() for path in (out / "commits").glob("*.json")}
    assert run_builders(build) == [0, 0, 0]
    after = {path.name: path.read_bytes() for path in (out / "commits").glob("*.json")}
    assert before.items() <= after.items(), "a committed shard was built again"
    _check(out, undisturbed, videos)


def test_two_kills_in_a_row(videos: Path, undisturbed: Path, tmp_path: Path, in_child: Child) -> None:
    out = tmp_path / "out"
    for planned in ("kill@build.before_commit#2", "kill@build.after_upload#1", "kill@build.after_quarantine"):
        assert in_child(lambda: build_small(videos, out, samples_per_shard=2), planned) == -9
    _check(out, undisturbed, videos)


def test_the_next_run_does_not_wait_for_a_dead_workers_lease(videos: Path, tmp_path: Path, in_child: Child) -> None:
    out = tmp_path / "out"
    assert in_child(lambda: build_small(videos, out), "kill@build.sample") == -9
    leases = list((out / "leases").iterdir())
    assert len(leases) == 1
    assert json.loads(leases[0].read_text())["pid"] > 0
    summary = build_small(videos, out, pace=Pace(3600, 3600))
    assert summary.events["build.lease_taken_over"] == 1
    assert len(samples(out)) == summary.manifest.num_samples == 5


def test_disk_full_is_one_message_and_the_next_run_goes_on(
    videos: Path, undisturbed: Path, tmp_path: Path, in_child: Child, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    status = in_child(lambda: build_small(videos, out, samples_per_shard=2), "raise@storage.local_before_sync#6:28")
    assert status == 1
    assert "StorageError" in capfd.readouterr().err
    _check(out, undisturbed, videos)
