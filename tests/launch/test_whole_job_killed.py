"""kill -9 of a whole job, its launcher included, at every point of the step loop and of the checkpoint writer.

One run is killed again and again, each time at another point, and started again by the same command. Whatever any of
its starts computed must be what the run computes to which nothing happens.
"""

from __future__ import annotations

import json
import os
import re
import signal
import tempfile
from pathlib import Path

import pytest
from fork_ranks import TrainingJob
from tiny import losses, sample_ids, weights, write_latents

import ardist
from ardist import fault
from ardist.training.commit import candidates, newest_valid

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

POINTS = [
    "run_dir.before_log/0#1",
    "dry_run.memory/1#1",
    "data.fill/1#2",
    "checkpoint.before_part/0#1",
    "trainer.batch/0#1",
    "trainer.batch/1#5",
    "trainer.loss/0#10",
    "trainer.before_step/1#5",
    "stop.agreed/0#5",
    "trainer.after_step/1#5",
    "trainer.metrics/0#5",
    "checkpoint.before_part/0#2",
    "checkpoint.before_part/1#2",
    "checkpoint.half_part/0#2",
    "checkpoint.half_part/1#2",
    "checkpoint.after_part/0#2",
    "checkpoint.after_part/1#2",
    "checkpoint.before_commit/0#2",
    "checkpoint.after_commit/0#2",
    "checkpoint.after_rename/0#2",
    "checkpoint.during_prune/0#1",
    "checkpoint.during_prune/0#2",
]
"""Where, on which rank, and at the how-manieth visit of the point; the last ones of a start that comes so far."""

STEPS = 90
CHANGES = {"training__steps": STEPS, "checkpoint__every": 3, "checkpoint__keep": 1}
OWNERS = ("trainer", "checkpoint", "store", "parts", "stopping", "records", "dry_run", "run_dir")


def start(directory: Path, data: Path, faults: str) -> int:
    """Run the launcher and its ranks as one process group; a fault that strikes any of them kills all at once.

    Returns the launcher's exit code, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            tempfile.tempdir = str(directory / "tmp")
            fault._strike = lambda one: os.killpg(0, signal.SIGKILL)
            code = TrainingJob(directory, data, faults=(faults,), **CHANGES).run()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def told(run_dir: Path) -> tuple[set[tuple[int, float]], set[tuple[str, int, str]]]:
    """Every loss of a step and every rank's samples of a step that any start of the run wrote down."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = {(line["step"], line["loss"]) for line in lines if line["kind"] == "train"}
    ids = set()
    for path in (run_dir / "logs").glob("samples-rank-*.jsonl"):
        for text in path.read_text().splitlines():
            entry = json.loads(text)
            ids.add((path.name, entry["step"], " ".join(entry["ids"])))
    return found, ids


def test_every_point_of_the_loop_and_of_the_writer_is_among_them() -> None:
    known = set()
    for owner in OWNERS:
        text = (Path(ardist.__file__).parent / "training" / f"{owner}.py").read_text()
        known |= set(re.findall(r'fault\.point\("([a-z_.]+)"\)', text))
    assert known == {point.split("/")[0] for point in POINTS} - {"data.fill"}


def test_the_same_command_goes_on_after_kill_9_of_the_whole_job_anywhere(tmp_path: Path) -> None:
    data = write_latents(tmp_path / "latents")
    undisturbed = TrainingJob(tmp_path / "undisturbed", data, **CHANGES)
    assert undisturbed.run() == 0, undisturbed.stderr()
    expected = told(undisturbed.run_dir)

    directory = tmp_path / "disturbed"
    (directory / "tmp").mkdir(parents=True)
    checkpoints = directory / "run" / "checkpoints"
    committed = 0
    for point in POINTS:
        assert start(directory, data, f"kill@{point}") == -signal.SIGKILL, point
        assert len(list((directory / "tmp").iterdir())) == 1, "what the launcher before left is gone"
        good = candidates(checkpoints)
        assert len(good) <= 2, "the one that is kept, and the one that was not yet removed"
        assert len(list(checkpoints.iterdir())) - len(good) <= 1, "one half-written or half-removed folder"
        if good:
            step = newest_valid(checkpoints)[1].step
            assert step >= committed, "what was committed once stays"
            committed = step
    assert 0 < committed < STEPS - 3, "all of it happened in the middle of the run"
    assert start(directory, data, "") == 0

    run_dir = directory / "run"
    assert losses(run_dir) == losses(undisturbed.run_dir)
    assert sample_ids(run_dir) == sample_ids(undisturbed.run_dir)
    mine, theirs = weights(run_dir), weights(undisturbed.run_dir)
    assert all(bool((mine[name] == theirs[name]).all()) for name in theirs)
    assert told(run_dir) == expected, "no start ever computed anything else"
    assert [path.name for path in checkpoints.iterdir()] == [f"step-{STEPS:08d}"]
    assert {path.name for path in run_dir.iterdir()} == {path.name for path in undisturbed.run_dir.iterdir()}
    assert list((directory / "tmp").iterdir()) == []
