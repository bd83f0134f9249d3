"""The harness itself: values in rank order, exceptions, deaths and hangs are all reported."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from ranks import RankError, Ranks, run_ranks

from ardist.training import distributed

pytestmark = pytest.mark.distributed


def _sum_of_ranks() -> tuple[int, float]:
    world = distributed.start()
    total = torch.tensor([float(world.rank + 1)])
    torch.distributed.all_reduce(total)
    return world.rank, float(total)


def test_values_come_back_in_rank_order() -> None:
    assert run_ranks(_sum_of_ranks, 3) == [(0, 6.0), (1, 6.0), (2, 6.0)]


def _raise_on_rank_one() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("broken on purpose")


def test_an_exception_names_its_rank() -> None:
    with pytest.raises(RankError, match=r"rank 1 .exit code 1.(.|\n)*broken on purpose"):
        run_ranks(_raise_on_rank_one, 2)


def _sleep() -> None:
    time.sleep(600)


def test_a_killed_rank_and_a_hanging_rank_are_reported() -> None:
    ranks = Ranks(_sleep, 2)
    ranks.send_signal(0, signal.SIGKILL)
    ranks.processes[0].join(60)
    first, second = ranks.wait(timeout=1)
    assert (first.exit_code, first.error) == (-signal.SIGKILL, "ended without a result")
    assert (second.exit_code, second.error) == (-signal.SIGKILL, "timed out")
