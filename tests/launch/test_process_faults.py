"""Whatever happens to a process, ids and losses of the run that comes out are those of one that nothing happened to."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fork_ranks import ForkNode, TrainingJob
from tiny import losses, records, sample_ids, write_latents

from ardist.training import goodput
from ardist.training.heartbeat import Phase, read_beats
from ardist.training.run_dir import RunDirectory

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("all_stacks")]
TABLE: list[tuple[str, str, str, float, float, int]] = []


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("latents"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    job = TrainingJob(tmp_path_factory.mktemp("uninterrupted"), data)
    assert job.run() == 0, job.stderr()
    assert job.rows == []
    return job.run_dir


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """What every fault cost, printed at the end."""
    yield
    print("\nfault                          cause     detected   back after   lost steps")
    for name, _, cause, detected, back, lost in TABLE:
        print(f"{name:30} {cause:8} {detected:8.2f} s {back:10.2f} s {lost:8d}")


def survives(job: TrainingJob, uninterrupted: Path, name: str) -> dict[str, Any]:
    """Run a job to its end, compare it, and return the row of its one failure."""
    assert job.run() == 0, job.stderr()
    assert losses(job.run_dir) == losses(uninterrupted)
    assert sample_ids(job.run_dir) == sample_ids(uninterrupted)
    [row] = job.rows
    TABLE.append((name, "", row["cause"], row["detect_seconds"], row["restart_seconds"], row["lost_steps"]))
    return row


@pytest.mark.parametrize(
    ("name", "fault", "cause", "within"),
    [
        ("A1 kill -9 in a step", "kill@trainer.before_step/1#5", "died", 2),
        ("A3 kill -9 in a checkpoint", "kill@checkpoint.after_commit/0#2", "died", 2),
        ("A5 stopped", "stop@trainer.before_step/1#5", "stopped", 12),
        ("A5 waits for data for ever", "sleep@trainer.batch/1#5:1000", "stuck", 14),
        ("A8 out of memory", "raise@trainer.batch/1#5:12", "error", 2),
    ],
)
def test_one_rank_fails(
    tmp_path: Path, data: Path, uninterrupted: Path, name: str, fault: str, cause: str, within: float
) -> None:
    quick = {"stopped": {"launch__heartbeat_seconds": 8}, "stuck": {"launch__step_seconds": 10}}.get(cause, {})
    row = survives(TrainingJob(tmp_path, data, faults=(fault,), **quick), uninterrupted, name)
    assert row["cause"] == cause
    assert row["detect_seconds"] < within + 20, "room for a machine that does much else"
    assert row["lost_steps"] <= 4
    if cause != "error":
        assert f"rank {'0' if 'checkpoint' in fault else '1'} " in row["detail"], "the culprit is named"
    if cause in ("stopped", "stuck"):
        stacks = [tmp_path / "run" / "logs" / f"attempt-001-stacks-rank-{rank:05d}.txt" for rank in range(2)]
        assert all("trainer.py" in path.read_text() for path in stacks), "all ranks' stacks are on record"
        if cause == "stuck":  # a stopped rank is woken to write, and may be a line further when it does
            assert "fault.py" in stacks[1].read_text()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["launches"]["by_cause"][cause]["count"] == 1
    assert 0 < summary["goodput"] < 1
    [told] = records(tmp_path / "run", "restart").values()
    assert (told["cause"], told["lost_steps"], told["restarts"]) == (cause, row["lost_steps"], 1)
    assert told["restart_seconds"] == row["restart_seconds"]


def test_a_native_crash_leaves_its_trace(tmp_path: Path, data: Path, uninterrupted: Path) -> None:
    job = TrainingJob(tmp_path, data, faults=(f"wait@trainer.batch#5:{tmp_path / 'never'}",))
    threading.Thread(target=lambda: signal_at(job, 1, 4, signal.SIGSEGV), daemon=True).start()
    row = survives(job, uninterrupted, "A4 segmentation fault")
    assert "SIGSEGV" in row["detail"]
    assert "Segmentation fault" in (tmp_path / "run" / "logs" / "attempt-001-stacks-rank-00001.txt").read_text()


def signal_at(job: TrainingJob, rank: int, step: int, number: int) -> None:
    """Send a signal to a rank of the first attempt once it has made `step` steps."""
    end = time.monotonic() + 200
    while time.monotonic() < end:
        beats = read_beats(job.nodes[0].scratch) if job.nodes else []
        if len(beats) > rank and beats[rank].step >= step:
            return os.kill(beats[rank].pid, number)
        time.sleep(0.01)
    return None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_to_the_launcher_saves_and_the_next_start_goes_on(
    tmp_path: Path, data: Path, uninterrupted: Path, number: int
) -> None:
    job = TrainingJob(tmp_path, data, faults=(f"wait@trainer.batch#5:{tmp_path / 'gate'}",))
    threading.Thread(target=lambda: to_us(job, 3, number), daemon=True).start()
    assert job.run() == 75, job.stderr()
    assert 3 <= max(records(job.run_dir)) < 9
    assert TrainingJob(tmp_path, data).run() == 0
    assert losses(job.run_dir) == losses(uninterrupted)
    assert sample_ids(job.run_dir) == sample_ids(uninterrupted)
    launches = json.loads((job.run_dir / "summary.json").read_text())["launches"]
    assert (launches["launches"], launches["restarts"], launches["lost_steps"]) == (2, 0, 0)


def to_us(job: TrainingJob, step: int, number: int) -> None:
    """Send a signal to this process once the ranks have made so many steps, then open the gate where they wait."""
    end = time.monotonic() + 200
    while time.monotonic() < end:
        beats = read_beats(job.nodes[0].scratch) if job.nodes else []
        # Before all ranks beat, a forked one may still have the signal handlers of this process.
        if len(beats) == job.ranks and beats[0].step >= step:
            os.kill(os.getpid(), number)
            while not job.supervisor._forwarded:
                time.sleep(0.01)
            return job.gate.touch()
        time.sleep(0.01)
    return None


def test_a_signal_at_the_start_ends_with_75_and_touches_nothing(tmp_path: Path, data: Path) -> None:
    job = TrainingJob(tmp_path, data, faults=(f"wait@trainer.batch#2:{tmp_path / 'gate'}",))
    threading.Thread(target=lambda: to_us(job, 0, signal.SIGTERM), daemon=True).start()
    assert job.run() == 75, job.stderr()
    assert not list((tmp_path / "run").glob("checkpoints/step-*")) or max(records(job.run_dir)) >= 1


def test_out_of_step_ranks_are_told_apart_at_once(tmp_path: Path, data: Path, uninterrupted: Path) -> None:
    job = TrainingJob(tmp_path, data, faults=("value@stop.agreed/1#4:skip",))
    row = survives(job, uninterrupted, "A7 one rank skips a collective")
    assert row["cause"] == "error"
    assert "the ranks are out of step" in row["detail"]
    assert "rank 1 at step" in row["detail"]


def test_a_run_directory_that_another_job_holds(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = TrainingJob(tmp_path, data)
    holder = RunDirectory(job.run_dir)
    holder.make()
    holder.lock()
    monkeypatch.setattr(RunDirectory.lock, "__defaults__", (0.3,))
    try:
        assert job.run() == 2
    finally:
        holder.unlock()
    assert len(job.nodes) == 1, "it is not tried again"
    assert job.stderr().count("another job is running in") == 1
    assert goodput.read(job.run_dir) == [], "nothing is written into the other job's book"
    assert all(process.poll() is not None for node in job.nodes for process in node._processes)


def test_a_slow_rank_is_named_and_the_run_goes_on(tmp_path: Path, data: Path, uninterrupted: Path) -> None:
    job = TrainingJob(tmp_path, data, faults=("sleep@trainer.batch/1:1.5",), training__log_every=3)
    assert job.run() == 0, job.stderr()
    assert job.rows == []
    events = json.loads((job.run_dir / "summary.json").read_text())["events"]
    assert events["training.straggler"] >= 2
    assert "training.straggler rank=1" in job.stderr()
    assert "training.straggler rank=0" not in job.stderr()


def test_a_signal_in_validation_does_not_wait_for_its_end(tmp_path: Path, data: Path, uninterrupted: Path) -> None:
    held_out = {"path": str(data), "every": 3, "num_clips": 60, "staircases": 64}
    # After three looks at the stop flag, one a step, there is one before each clip: rank 1 waits before its third clip.
    job = TrainingJob(tmp_path, data, validation=held_out, faults=(f"wait@stop.agreed/1#6:{tmp_path / 'gate'}",))
    threading.Thread(target=lambda: in_phase(job, Phase.OTHER, 1, signal.SIGTERM), daemon=True).start()
    assert job.run() == 75, job.stderr()
    assert "validation at step 3 was given up" in job.stderr()
    assert records(job.run_dir, "validation") == {}
    assert max(records(job.run_dir)) == 3
    assert TrainingJob(tmp_path, data).run() == 0
    assert losses(job.run_dir) == losses(uninterrupted)


def in_phase(job: TrainingJob, phase: Phase, rank: int, number: int) -> None:
    """Send a signal to a rank in such a phase, then open the gate where it waits."""
    end = time.monotonic() + 200
    while time.monotonic() < end:
        beats = read_beats(job.nodes[0].scratch) if job.nodes else []
        if len(beats) > rank and beats[rank].phase is phase and beats[rank].step > 0:
            os.kill(beats[rank].pid, number)
            return job.gate.touch()
        time.sleep(0.005)
    return None


class Elastic(TrainingJob):
    """A job that has another number of ranks in every attempt."""

    def __init__(self, directory: Path, data: Path, sizes: list[int], faults: tuple[str, ...] = ()) -> None:
        super().__init__(directory, data, faults=faults)
        self._sizes = iter(sizes)

    def start(self, attempt: int, job: str) -> list[ForkNode]:
        self.ranks = next(self._sizes)
        return super().start(attempt, job)


def test_nodes_are_lost_and_come_back(tmp_path: Path, data: Path, uninterrupted: Path) -> None:
    """A12: four ranks, two that are left, three that cannot share the batch, one that ends it."""
    # Four lose one in step 5 and go back to 3; two lose one in step 8, their fifth, and go back to 6.
    job = Elastic(tmp_path, data, [4, 2, 3], ("kill@trainer.batch/3#5", "kill@trainer.batch/1#5"))
    assert job.run() == 2
    assert "global_batch_size=8 cannot be split over 3 ranks; legal numbers of ranks: [1, 2, 4, 8]" in job.stderr()
    assert len(job.nodes) == 3, "what cannot be is not tried again"
    assert Elastic(tmp_path, data, [1]).run() == 0, job.stderr()
    book = goodput.read(job.run_dir)
    assert [record["cause"] for record in book if record["event"] == "end"] == ["died", "died", "error", "done"]
    begun = [(record["ranks"], record["resumed_step"]) for record in book if record["event"] == "first_step"]
    assert begun == [(4, 0), (2, 3), (1, 6)]
    for path in (tmp_path / "run" / "logs").glob("samples-rank-*.jsonl"):
        # Steps that ranks made which are no more, and that the ranks left made again.
        last = {0: 9, 1: 6}.get(int(path.stem.rpartition("-")[2]), 3)
        lines = [line for line in path.read_text().splitlines(keepends=True) if json.loads(line)["step"] <= last]
        path.write_text("".join(lines))
    assert sample_ids(job.run_dir) == sample_ids(uninterrupted)
    assert losses(job.run_dir) == pytest.approx(losses(uninterrupted), abs=1e-5)
