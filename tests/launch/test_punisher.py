"""Two minutes of random faults and no human action: the run that comes out is the quiet one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


def test_two_minutes_under_fire(tmp_path: Path) -> None:
    import punisher

    run = punisher.Punisher(tmp_path, seconds=120, every=8, seed=3, least=4)
    outcome = run.run()
    punisher.show(outcome)
    assert {kind[0] for kind in outcome.kinds} == {"A", "B", "E"}, "processes, checkpoints and numerics were hit"
    assert len(outcome.strikes) >= 4
    assert outcome.equal == {"weights": True, "losses": True, "sample ids": True}
    assert outcome.summary["completed"] is True
    assert 0.05 < outcome.summary["launches"]["goodput"] < 1
    assert all(strike.back_seconds is not None for strike in outcome.strikes), "each was survived"
    kinds = outcome.kinds
    assert outcome.fallbacks == kinds[punisher.FLIPPED_BIT] + kinds[punisher.CUT_SHORT]
    for strike in outcome.strikes:
        if strike.kind == punisher.REPLICA:
            assert f"the weights of rank {strike.rank} differ" in strike.detail


@pytest.mark.parametrize("kind", ["E5 bit flip in one rank's replica", "B1 bit flip in the newest checkpoint"])
def test_one_kind_alone(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import punisher

    monkeypatch.setattr(punisher, "FAMILIES", kind[0])
    run = punisher.Punisher(tmp_path, seconds=40, every=10, seed=9, least=1)
    run.kinds = {name: action for name, action in run.kinds.items() if name == kind}
    outcome = run.run()
    punisher.show(outcome)
    assert outcome.equal == {"weights": True, "losses": True, "sample ids": True}
    assert outcome.kinds[kind] >= 1
    for strike in outcome.strikes:
        again = strike.steps_again or 0
        if kind == punisher.REPLICA:
            assert strike.shown_as == "error"
            assert f"the weights of rank {strike.rank} differ" in strike.detail, "found and named"
            assert 0 < again <= 2 * punisher.CHECKPOINT_EVERY, "back to a checkpoint that is good"
        else:
            assert (strike.steps_again or 0) > punisher.CHECKPOINT_EVERY, (
                "back to the checkpoint before the damaged one"
            )
    assert outcome.fallbacks == (outcome.kinds[kind] if kind == punisher.FLIPPED_BIT else 0)
