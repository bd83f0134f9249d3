"""kill -9 at every named point of a build into an S3 server, one builder or three: nothing is lost or done twice."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from dt_builds import build_small
from dt_crashes import BUILD_POINTS, builders, run_builders, run_forked

from ardist import fault
from ardist.storage import Storage, open_storage
from data_tools import layout
from data_tools.gc import collect
from data_tools.lease import Pace
from data_tools.verify import verify

S3_POINTS = [
    "storage.s3_before_create",
    "storage.s3_after_create",
    "storage.s3_before_put",
    "storage.s3_after_put",
]
POINTS = [*S3_POINTS, *BUILD_POINTS]
PACE = Pace(lease_seconds=60.0, poll_seconds=0.05)


@pytest.fixture(scope="module")
def digest(three_videos: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Manifest digest of the same videos built locally."""
    return build_small(three_videos, tmp_path_factory.mktemp("local") / "out").manifest.digest()


def _commits(storage: Storage) -> dict[str, bytes]:
    return {name: storage.read(name) for name in storage.list(layout.COMMITS)}


def test_the_list_of_points_is_complete(three_videos: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fault.VARIABLE, "sleep@nowhere:0")
    build_small(three_videos, f"{s3_url}/out")
    assert {name for name in fault._visits if not name.startswith("storage.local")} == set(POINTS)


@pytest.mark.parametrize(
    ("point", "visit", "count"),
    [
        pytest.param(point, visit, count, marks=() if point == "build.before_commit" else pytest.mark.slow)
        for point in POINTS
        for visit, count in ((1, 1), (1, 3), (2, 1))
        if visit == 1 or point in ("build.sample", "build.before_upload_1", "build.before_commit", *S3_POINTS)
    ],
)
def test_kill_then_run_again(three_videos: Path, s3_url: str, digest: str, point: str, visit: int, count: int) -> None:
    out = f"{s3_url}/out"
    build = builders(lambda: build_small(three_videos, out, pace=PACE), count)
    assert -9 in run_builders(build, f"kill@{point}#{visit}"), "the point was not reached"
    storage = open_storage(out)
    before = _commits(storage)
    assert run_builders(build) == [0] * count
    assert build_small(three_videos, out).manifest.digest() == digest
    assert before.items() <= _commits(storage).items(), "a committed shard was built again"
    report = verify(out)
    assert not report.problems
    assert not report.notes
    assert not collect(out, older_than=0, dry_run=False).names or point.startswith("storage.")


def test_a_stopped_workers_late_commit_loses(three_videos: Path, s3_url: str, digest: str) -> None:
    """SIGSTOP just before the commit, beyond the lease; SIGCONT when the shard is long committed."""
    out, quick = f"{s3_url}/out", Pace(lease_seconds=1.0, poll_seconds=0.05)
    child = run_forked(lambda: build_small(three_videos, out, pace=quick), "stop@build.before_commit#1")
    assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])
    summary = build_small(three_videos, out, pace=Pace(lease_seconds=1.0, poll_seconds=0.05))
    assert summary.manifest.digest() == digest
    assert summary.events["build.lease_taken_over"] == 1
    storage = open_storage(out)
    before = {name: storage.read(name) for name in storage.list()}
    os.kill(child, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert {name: storage.read(name) for name in storage.list() if not name.startswith(layout.LEASES)} == before
    report = verify(out)
    assert not report.problems
    assert not report.notes
