"""Two minutes of random faults and no human action: the run that comes out is the quiet one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


def test_two_minutes_under_fire(tmp_path: Path) -> None:
    from punisher import Punisher, show

    outcome = Punisher(tmp_path, seconds=120, every=15, seed=3).run()
    show(outcome)
    assert sum(outcome.faults.values()) >= 4, "it was under fire"
    assert outcome.rows, "the supervisor had work to do"
    assert outcome.equal == {"weights": True, "losses": True, "sample ids": True}
    assert outcome.summary["completed"] is True
    assert 0.05 < outcome.summary["launches"]["goodput"] < 1
