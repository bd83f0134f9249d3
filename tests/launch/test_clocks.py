"""Clocks that are an hour wrong and jump back in the middle of a run: nothing that matters asks for the time of day."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from fork_ranks import TrainingJob
from tiny import losses, records, sample_ids, write_latents

from ardist.launch import wire
from ardist.launch.nodes import State
from ardist.process_identity import began, is_running
from ardist.storage import open_storage
from ardist.training.callbacks import Callback
from ardist.training.claim import Claim
from ardist.training.commit import newest_valid
from ardist.training.heartbeat import Beat, Phase
from ardist.training.trainer import Trainer

HOUR = 3600.0


class Clocks:
    """The time of day of every process: an hour ahead on rank 0, an hour behind on rank 1, right for the launcher, and
    two hours less everywhere once they have jumped back. When a process was created is told in the same time, as the
    kernel tells it."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.jumped = directory / "jumped"
        real, created = time.time, psutil.Process.create_time
        monkeypatch.setattr(time, "time", lambda: real() + self.wrong())
        monkeypatch.setattr(psutil.Process, "create_time", lambda process: created(process) + self.wrong())

    def wrong(self) -> float:
        by_rank = {None: 0.0, "0": HOUR, "1": -HOUR}[os.environ.get("RANK")]
        return by_rank - 2 * HOUR * self.jumped.exists()


class Jump(Callback):
    """Sets all clocks back after a step."""

    def __init__(self, clocks: Clocks) -> None:
        self.clocks = clocks

    def after_step(self, trainer: Trainer) -> None:
        if trainer.step == 5 and trainer.world.is_main:
            self.clocks.jumped.touch()


@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only there the kernel tells it without a clock")
def test_a_job_on_machines_whose_clocks_differ_and_jump_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_latents(tmp_path / "latents")
    changes = {"training__steps": 12, "checkpoint__every": 3, "checkpoint__keep": 2}
    quiet = TrainingJob(tmp_path / "quiet", data, **changes)
    assert quiet.run() == 0, quiet.stderr()

    clocks = Clocks(tmp_path, monkeypatch)
    # Killed in the step before the last one: of two checkpoints the newest has the older time of day.
    kill = "kill@trainer.before_step/1#11"
    job = TrainingJob(tmp_path / "odd", data, faults=(kill,), callbacks=lambda: [Jump(clocks)], **changes)
    assert job.run() == 0, job.stderr()
    assert clocks.jumped.exists()
    [row] = job.rows
    assert (row["cause"], row["rank"]) == ("died", 1), "only who was killed; nobody was taken for dead or stuck"
    assert row["lost_steps"] <= 10 - 6, "it went on from the newest step, not from the latest time"
    assert losses(job.run_dir) == losses(quiet.run_dir)
    assert sample_ids(job.run_dir) == sample_ids(quiet.run_dir)
    times = [record["time"] for _, record in sorted(records(job.run_dir).items())]
    assert times[4] - times[6] > HOUR, "the clocks did jump"
    summary = json.loads((job.run_dir / "summary.json").read_text())
    assert 0 < summary["useful_seconds"] < HOUR
    assert 0 < summary["launches"]["wall_seconds"] < HOUR
    assert 0 < summary["goodput"] <= 1


def test_the_newest_checkpoint_is_that_of_the_highest_step(tmp_path: Path) -> None:
    job = TrainingJob(tmp_path, write_latents(tmp_path / "latents"), ranks=1, checkpoint__keep=3)
    assert job.run() == 0, job.stderr()
    for age, path in enumerate(sorted((job.run_dir / "checkpoints").iterdir())):
        os.utime(path, (1e9 - age * HOUR, 1e9 - age * HOUR))  # the highest step seems the oldest
    assert newest_valid(job.run_dir / "checkpoints")[1].step == 9


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only there the kernel tells it without a clock")
def test_a_process_stays_itself_when_the_clock_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    me = os.getpid()
    since = began(me)
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: 1.0)
    assert is_running(me, since)
    assert not is_running(me, since + 1)


def jumping(step: float) -> Callable[[], float]:
    """A time of day that jumps by `step` seconds whenever it is asked for."""
    now = [1.7e9]

    def time_of_day() -> float:
        now[0] += step
        return now[0]

    return time_of_day


@pytest.mark.parametrize("step", [-HOUR, HOUR])
def test_a_claim_is_kept_and_taken_over_whatever_time_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: float
) -> None:
    monkeypatch.setattr(time, "time", jumping(step))
    storage = open_storage(tmp_path)
    alive = Claim(storage, "a:/run", beat=0.02, stale=60.0)
    alive.take()
    beaten = threading.Event()
    write = storage.put
    monkeypatch.setattr(storage, "put", lambda name, content: (write(name, content), beaten.set()))
    assert beaten.wait(60)
    with pytest.raises(Exception, match="another job writes checkpoints"):
        Claim(storage, "b:/run", beat=0.02, stale=60.0).take()
    assert alive.lost() is None
    alive._ended.set()
    heir = Claim(storage, "b:/run", beat=0.02, stale=0.2)
    heir.take()
    assert heir.lost() is None
    heir.release()


@pytest.mark.parametrize("uptime", [3.0, 5e6])
def test_states_are_told_between_machines_of_any_uptime(monkeypatch: pytest.MonkeyPatch, uptime: float) -> None:
    """Monotonic clocks of two machines have nothing in common, as little as their times of day."""
    told = Beat(1, 7, 5.0, "there", 990.0, 5, 980.0, 7, 3, Phase.STEP, None, 0.0, "")
    monkeypatch.setattr(wire.time, "monotonic", lambda: 1000.0)
    packed = wire.pack_state(State([told]))
    monkeypatch.setattr(wire.time, "monotonic", lambda: uptime)
    [heard] = wire.unpack_state(json.loads(json.dumps(packed))).beats
    assert (uptime - heard.beat, uptime - heard.progress_time) == (10.0, 20.0)
    assert dataclasses.replace(heard, beat=told.beat, progress_time=told.progress_time, ended=told.ended) == told
