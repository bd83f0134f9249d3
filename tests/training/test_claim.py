"""Two jobs never write to one object-store prefix; a job that died is replaced, one that was only silent gives up."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from ardist.errors import ConfigError
from ardist.events import events
from ardist.storage import open_storage
from ardist.training.claim import PREFIX, Claim


def claim(tmp_path: Path, owner: str, stale: float = 0.6) -> Claim:
    return Claim(open_storage(tmp_path), owner, beat=0.05, stale=stale)


def silence(dead: Claim) -> None:
    """No beat is under way any more."""
    dead._ended.set()
    assert dead._thread is not None
    dead._thread.join()


def names(tmp_path: Path) -> list[str]:
    return list(open_storage(tmp_path).list(PREFIX))


def test_a_second_job_is_refused_while_the_first_lives_and_let_in_after_it(tmp_path: Path) -> None:
    first, second = claim(tmp_path, "a:/run"), claim(tmp_path, "b:/run", stale=100.0)
    first.take()
    with pytest.raises(ConfigError, match="another job writes checkpoints to .*'a:/run'"):
        second.take()
    assert first.lost() is None
    first.release()
    assert names(tmp_path) == []
    second.take()
    assert names(tmp_path) == ["claim-00000001"]
    second.release()


def test_a_job_that_died_is_replaced_and_one_that_wakes_up_gives_up(tmp_path: Path) -> None:
    dead, heir = claim(tmp_path, "a:/run"), claim(tmp_path, "b:/run")
    dead.take()
    silence(dead)
    before = events.snapshot().get("checkpoint.claim_taken_over", 0)
    began = time.monotonic()
    heir.take()
    assert time.monotonic() - began >= 0.6, "it was watched for as long as a claim may be silent"
    assert events.snapshot()["checkpoint.claim_taken_over"] == before + 1
    assert "another job has taken" in str(dead.lost())
    assert heir.lost() is None
    heir.release()


def test_a_restart_in_the_same_run_directory_does_not_wait(tmp_path: Path) -> None:
    dead = claim(tmp_path, "a:/run", stale=60.0)
    dead.take()
    silence(dead)
    again = claim(tmp_path, "a:/run", stale=60.0)
    began = time.monotonic()
    again.take()
    assert time.monotonic() - began < 50, "it may be silent for longer"
    assert names(tmp_path) == ["claim-00000002"]
    again.release()


def test_of_two_jobs_that_start_together_one_gets_in(tmp_path: Path) -> None:
    outcomes: list[str] = []

    def start(owner: str) -> None:
        mine = claim(tmp_path, owner, stale=100.0)
        try:
            mine.take()
            outcomes.append("in")
        except ConfigError:
            outcomes.append("out")

    threads = [threading.Thread(target=start, args=(f"{number}:/run",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert sorted(outcomes) == ["in", "out", "out", "out"]
