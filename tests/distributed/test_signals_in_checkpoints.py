"""A signal while a checkpoint is being written: that one is finished or none of it counts, and the run stops saved."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks, run_ranks
from tiny import losses, records, sample_ids, tiny_config, train_outcome, write_latents

from ardist import fault
from ardist.training import stopping
from ardist.training.commit import candidates, newest_valid

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS, EVERY = 45, 3
CASES = [
    ("checkpoint.before_part/0#1", signal.SIGTERM, True),
    ("checkpoint.half_part/1#1", signal.SIGUSR1, True),
    ("checkpoint.half_part/0#1", signal.SIGINT, False),
    ("checkpoint.after_part/1#1", signal.SIGUSR2, False),
    ("checkpoint.before_commit/0#1", signal.SIGTERM, True),
    ("checkpoint.after_commit/0#1", signal.SIGUSR1, False),
    ("checkpoint.after_rename/0#1", signal.SIGHUP, True),
    ("checkpoint.during_prune/0#1", signal.SIGTERM, False),
]
"""Where on which rank, which signal, and whether the loop goes on beside the write."""


def signalled(config: Any, numbers: Sequence[int], debounce: float) -> str:
    """Train; where the fault would strike, this rank gets signals instead."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever started the tests may have it ignored

    def strike(planned: fault.Fault) -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    fault._strike = strike
    stopping._DEBOUNCE_SECONDS = debounce
    return train_outcome(config)


def test_a_signal_at_every_point_of_a_checkpoint_saves_and_the_next_start_goes_on(tmp_path: Path) -> None:
    data = write_latents(tmp_path / "latents")

    def config_of(name: str, asynchronous: bool) -> Any:
        changes = {"training__steps": STEPS, "checkpoint__every": EVERY, "checkpoint__keep": 1}
        return tiny_config(tmp_path / name, data, checkpoint__asynchronous=asynchronous, **changes)

    assert run_ranks(train_outcome, 2, config_of("undisturbed", True)) == ["done", "done"]
    run_dir, before = tmp_path / "run", 0
    for point, number, asynchronous in CASES:
        env = {"ARDIST_FAULT": f"kill@{point}"}
        outcomes = Ranks(signalled, 2, config_of("run", asynchronous), [number], 2.0, env=env).wait(90)
        assert [outcome.error for outcome in outcomes] == [None, None], point
        assert all(outcome.value.startswith("Preempted: stopped on") for outcome in outcomes), (point, outcomes)
        assert any(signal.Signals(number).name in outcome.value for outcome in outcomes)
        step = newest_valid(run_dir / "checkpoints")[1].step
        assert step == max(records(run_dir)), "everything is saved"
        assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step-{step:08d}"], point
        if not asynchronous:
            first_save = before // EVERY * EVERY + EVERY
            assert step in (first_save + 1, first_save + 2), "the step in which all ranks agreed is the last one"
        before = step

    # A second signal ends the rank in the middle of its part; what was saved before is what the next start has.
    env = {"ARDIST_FAULT": "kill@checkpoint.half_part/1#2"}
    twice = [signal.SIGTERM, signal.SIGINT]
    outcomes = Ranks(signalled, 2, config_of("run", False), twice, 0.0, env=env).wait(90)
    assert outcomes[1].exit_code in {128 + number for number in twice}, outcomes
    assert [outcome.value for outcome in outcomes] != ["done", "done"]
    assert [int(path.name[5:]) for path in candidates(run_dir / "checkpoints")] == [before // EVERY * EVERY + EVERY]

    assert run_ranks(train_outcome, 2, config_of("run", True)) == ["done", "done"]
    assert losses(run_dir) == losses(tmp_path / "undisturbed")
    assert sample_ids(run_dir) == sample_ids(tmp_path / "undisturbed")
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step-{STEPS:08d}"]
