"""Several workers on one plan: they share the work, survive each other, and only one commit counts."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dt_builds import build_small
from dt_crashes import run_forked
from dt_videos import make_video

from ardist import fault
from ardist.errors import HardwareError
from ardist.events import events
from ardist.storage import LocalStorage
from data_tools.lease import Lease, Leases, Pace
from data_tools.verify import verify

Child = Callable[[Callable[[], Any], str], int]
QUICK = Pace(lease_seconds=1.0, poll_seconds=0.05)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos, twelve clips, six shards of two."""
    folder = tmp_path_factory.mktemp("workers")
    for number, pattern in enumerate(("testsrc", "testsrc2", "smptebars")):
        make_video(folder / f"{number}.mp4", frames=16, pattern=pattern)
    return folder


@pytest.fixture(scope="module")
def alone(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the manifest that one worker makes."""
    return build_small(videos, tmp_path_factory.mktemp("alone") / "out", samples_per_shard=2).manifest.digest()


def _authors(out: Path) -> set[str]:
    return {json.loads(path.read_text())["worker"] for path in (out / "commits").glob("*.json")}


@contextlib.contextmanager
def gate_of_two(out: Path) -> Iterator[str]:
    """A fault with which no worker makes a second shard before two have made their first."""
    gate, over = out.with_name("gate"), threading.Event()

    def watch() -> None:
        while len(_authors(out)) < 2 and not over.wait(0.01):
            pass
        gate.touch()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield f"wait@build.shard_started#2:{gate}"
    finally:
        over.set()
        watcher.join()


def test_three_workers_make_the_dataset_of_one(
    videos: Path, alone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with gate_of_two(out) as planned:
        monkeypatch.setenv(fault.VARIABLE, planned)
        summary = build_small(videos, out, samples_per_shard=2, workers=3, start_method="fork", pace=QUICK)
    assert summary.manifest.digest() == alone
    assert len(_authors(out)) >= 2
    assert not verify(str(out)).problems
    assert not list(out.glob(".tmp-*"))
    assert not list((out / "leases").glob("*"))


def test_a_killed_worker_is_replaced(videos: Path, alone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each worker dies at its second commit, again and again: still the same dataset."""
    monkeypatch.setenv(fault.VARIABLE, "kill@build.before_commit#2")
    out = tmp_path / "out"
    summary = build_small(videos, out, samples_per_shard=2, workers=2, start_method="fork", pace=QUICK)
    assert summary.manifest.digest() == alone
    assert summary.events["build.worker_died"] >= 2
    assert not verify(str(out)).problems


def test_workers_that_always_die_end_the_build(
    videos: Path, alone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(fault.VARIABLE, "exit@build.shard_started:9")
    out = tmp_path / "out"
    with pytest.raises(HardwareError, match="workers died 7 times, the last with status 9"):
        build_small(videos, out, samples_per_shard=2, workers=2, start_method="fork", pace=QUICK)
    monkeypatch.delenv(fault.VARIABLE)
    assert build_small(videos, out, samples_per_shard=2).manifest.digest() == alone


def test_a_workers_error_reaches_the_user(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fault.VARIABLE, "raise@storage.local_before_link#7:28")
    with pytest.raises(HardwareError, match="No space left on device"):
        build_small(videos, tmp_path / "out", samples_per_shard=2, workers=2, start_method="fork", pace=QUICK)


def test_workers_end_with_the_coordinator(videos: Path, alone: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = {"samples_per_shard": 2, "workers": 2, "start_method": "fork", "pace": QUICK}
    child = run_forked(lambda: build_small(videos, out, **options), "sleep@build.sample:250")
    deadline = time.monotonic() + 200
    while len(list((out / "leases").glob("0*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    owners = [json.loads(path.read_text())["pid"] for path in (out / "leases").glob("0*")]
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while any(_alive(pid) for pid in owners):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert build_small(videos, out, samples_per_shard=2).manifest.digest() == alone


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def test_two_builders_at_once_share_the_work(videos: Path, alone: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with gate_of_two(out) as planned:
        work = functools.partial(build_small, videos, out, samples_per_shard=2, pace=QUICK)
        children = [run_forked(work, planned) for _ in range(2)]
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert build_small(videos, out, samples_per_shard=2).manifest.digest() == alone
    assert len(_authors(out)) == 2
    assert not verify(str(out)).problems


@pytest.mark.parametrize("point", ["build.draft", "build.before_rows", "build.before_commit"])
def test_who_was_stopped_comes_late_and_loses(videos: Path, alone: str, tmp_path: Path, point: str) -> None:
    """SIGSTOP of a planner or just before a commit, beyond the lease; SIGCONT when the dataset is long finished."""
    out = tmp_path / "out"
    child = run_forked(lambda: build_small(videos, out, samples_per_shard=2, pace=QUICK), f"stop@{point}#1")
    assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])
    summary = build_small(videos, out, samples_per_shard=2, pace=QUICK)
    assert summary.events["build.lease_taken_over"] == 1
    assert summary.manifest.digest() == alone
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    os.kill(child, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path in before} == {
        path: data for path, data in before.items() if path.exists()
    }
    assert not verify(str(out)).problems
    assert not verify(str(out)).notes


def test_a_lease_is_kept_by_its_beat_and_lost_without(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    now = [0.0]
    mine = Leases(storage, "me", 0.4)
    other = Leases(storage, "other", 0.4, clock=lambda: now[0])
    lease = mine.take("000001")
    assert isinstance(lease, Lease)
    path = tmp_path / "leases" / "000001.0001.json"
    foreign = json.loads(path.read_text()) | {"machine": "another machine"}
    assert other.take("000001") is None
    now[0] = 100.0
    beat, deadline = path.read_bytes(), time.monotonic() + 60
    while path.read_bytes() == beat:  # the watcher sees that it beats
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert other.take("000001") is None
    with lease:
        pass
    assert not path.exists()
    path.write_text(json.dumps(foreign))
    assert other.take("000001") is None
    now[0] = 100.3
    assert other.take("000001") is None
    now[0] = 100.5
    taken = other.take("000001")
    assert taken is not None
    assert (tmp_path / "leases" / "000001.0002.json").exists()
    with taken:
        assert mine.take("000001") is None
    assert events.snapshot()["build.lease_taken_over"] == 1


def test_of_many_that_see_a_dead_lease_one_gets_it(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    storage = LocalStorage(tmp_path)
    storage.put("leases/000001.0001.json", b"damaged")
    contenders = [Leases(storage, str(n), 0.0, clock=iter(range(1000)).__next__) for n in range(6)]
    for contender in contenders:
        assert contender.take("000001") is None
    with ThreadPoolExecutor(6) as pool:
        taken = [lease for lease in pool.map(lambda c: c.take("000001"), contenders) if lease is not None]
    assert len(taken) == 1
    with taken[0]:
        pass
