"""The checkpoint writer on its own: what it refuses, how it overlaps, what it leaves on disk."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors import safe_open
from toy import snapshot, toy_config, toy_engine, toy_step

from ardist.errors import CheckpointError
from ardist.events import events
from ardist.training import commit, resume
from ardist.training.checkpoint import CheckpointWriter
from ardist.training.commit import candidates, newest_valid, read_commit, step_of

pytestmark = pytest.mark.distributed


def _save_not_finite(root: Path) -> tuple[str, list[int]]:
    engine = toy_engine(toy_config(zero_stage=1))
    toy_step(engine, 0)
    writer = CheckpointWriter(root, engine.fragments, None)
    writer.save(snapshot(1), wait=True)
    if engine.world.rank == 1:
        engine.fragments.moment(engine.fragments.owned[0], "exp_avg")[0] = float("nan")
    try:
        writer.save(snapshot(2), wait=True)
    except CheckpointError as error:
        engine.world.barrier()
        return str(error), [step_of(path) for path in candidates(root)]
    return "saved", []


def test_state_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    for message, steps in run_ranks(_save_not_finite, 2, tmp_path):
        assert "rank 1: the exp_avg state holds values that are not finite" in message
        assert steps == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"], "nothing half-written is left"


def _overlap(root: Path) -> dict[str, Any]:
    engine = toy_engine(toy_config(zero_stage=2))
    writer = CheckpointWriter(root, engine.fragments, None, keep=5)
    os.environ["ARDIST_FAULT"] = "sleep@checkpoint.before_part:1.0"
    blocked = []
    for step in range(3):
        toy_step(engine, step)
        before = engine.fragments.master(engine.fragments.owned[0]).clone()
        began = time.monotonic()
        writer.save(snapshot(step + 1))
        blocked.append(time.monotonic() - began)
        toy_step(engine, 100 + step)  # changes the weights while the thread still has to write the snapshot
    writer.wait()
    path, commit = newest_valid(root)
    with safe_open(path / commit.parts[engine.world.rank].file, "pt") as part:
        saved = part.get_tensor("master")
    length = sum(fragment.length for fragment in engine.fragments.owned[0].fragments)
    return {
        "blocked": blocked,
        "equal": torch.equal(saved[:length], before[:length]),
        "snapshot": writer.blocked_seconds,
    }


def test_writing_goes_on_behind_the_loop_one_at_a_time(tmp_path: Path) -> None:
    for result in run_ranks(_overlap, 2, tmp_path):
        assert result["blocked"][0] < 0.7, "the first save does not wait for the disk"
        assert max(result["blocked"][1:]) > 0.7, "the next one waits for the one before: a queue of one"
        assert result["snapshot"] < 0.5
        assert result["equal"], "what is written is the state at the time of the save"
    assert [step_of(path) for path in candidates(tmp_path)] == [3, 2, 1]


def _keep(root: Path) -> None:
    engine = toy_engine(toy_config(zero_stage=1))
    toy_step(engine, 0)
    (root / "step-00000009.tmp-0badc0de").mkdir()
    writer = CheckpointWriter(root, engine.fragments, None, keep=2)
    for step in range(1, 6):
        writer.save(snapshot(step), wait=True)
        if step == 4:
            (root / "step-00000004" / read_commit(root / "step-00000004").parts[0].file).write_bytes(b"short")


def test_only_good_checkpoints_count_as_kept_and_leftovers_go(tmp_path: Path) -> None:
    run_ranks(_keep, 1, tmp_path)
    assert [step_of(path) for path in candidates(tmp_path)] == [5, 4, 3], "the damaged step 4 does not count"
    assert all(".tmp-" not in path.name for path in tmp_path.iterdir())


def _again(root: Path) -> list[Any]:
    engine = toy_engine(toy_config(zero_stage=1))
    toy_step(engine, 0)
    CheckpointWriter(root, engine.fragments, None).save(snapshot(1), wait=True)
    created = (root / "step-00000001" / "COMMIT.json").stat().st_mtime_ns
    try:
        CheckpointWriter(root, engine.fragments, None).save(snapshot(1), wait=True)
    except CheckpointError as error:
        unchanged = created == (root / "step-00000001" / "COMMIT.json").stat().st_mtime_ns
        return [str(error), unchanged, events.snapshot()]
    return []


def test_a_good_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    [(message, unchanged, counted)] = run_ranks(_again, 1, tmp_path)
    assert "exists already and is good" in message
    assert unchanged
    assert counted == {"checkpoint.failed": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def _shapes(root: Path) -> str:
    engine = toy_engine(toy_config(zero_stage=1))
    CheckpointWriter(root, engine.fragments, None).save(snapshot(1), wait=True)
    path, commit = newest_valid(root)
    renamed = commit.model_copy(update={"shapes": {**commit.shapes, "extra": [2]}})
    try:
        resume.load_weights(path, renamed, engine.fragments)
    except CheckpointError as error:
        return str(error)
    return "loaded"


def test_parts_that_do_not_tile_every_parameter_are_refused(tmp_path: Path) -> None:
    [message] = run_ranks(_shapes, 1, tmp_path)
    assert "parameter 'extra' is not complete over the parts" in message


def _one_step(root: Path) -> None:
    engine = toy_engine(toy_config(zero_stage=1))
    CheckpointWriter(root, engine.fragments, None).save(snapshot(1), wait=True)


def test_a_checkpoint_pruned_while_it_is_looked_at_leads_to_the_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_ranks(_one_step, 1, tmp_path)
    listings = iter([[tmp_path / "step-00000000"]])
    monkeypatch.setattr(commit, "candidates", lambda root: next(listings, candidates(root)))
    assert newest_valid(tmp_path)[1].step == 1
