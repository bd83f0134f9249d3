"""The checkpoint writer on its own: what it refuses, how it overlaps, what it leaves on disk."""

from __future__ import annotations

import os
import pickle
import shutil
import threading
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
from ardist.training.commit import Part, candidates, newest_valid, read_commit, step_of, write_commit
from ardist.training.ema import ShardedEMA
from ardist.training.parts import PartsReader, hash_file

pytestmark = pytest.mark.distributed


def _save_not_finite(root: Path, kind: str) -> tuple[str, list[int]]:
    engine = toy_engine(toy_config(zero_stage=1))
    ema = ShardedEMA(engine.fragments, (0.9,))
    toy_step(engine, 0)
    writer = CheckpointWriter(root, engine.fragments, ema)
    writer.save(snapshot(1), wait=True)
    if engine.world.rank == 1:
        run = engine.fragments.owned[0]
        states = {"master": engine.fragments.master(run), "ema_0.9": ema.buffers[0.9][0]}
        states["exp_avg"] = engine.fragments.moment(run, "exp_avg")
        states[kind][0] = float("nan")
    try:
        writer.save(snapshot(2), wait=True)
    except CheckpointError as error:
        engine.world.barrier()
        return str(error), [step_of(path) for path in candidates(root)]
    return "saved", []


@pytest.mark.parametrize("kind", ["master", "exp_avg", "ema_0.9"])
def test_state_that_is_not_finite_is_not_saved(tmp_path: Path, kind: str) -> None:
    for message, steps in run_ranks(_save_not_finite, 2, tmp_path, kind):
        assert f"rank 1: the {kind} state holds values that are not finite" in message
        assert steps == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"], "nothing half-written is left"


def _overlap(root: Path) -> dict[str, Any]:
    engine = toy_engine(toy_config(zero_stage=2))
    writer = CheckpointWriter(root, engine.fragments, None, keep=5)
    gate = root / f"gate-{engine.world.rank}"
    os.environ["ARDIST_FAULT"] = f"wait@checkpoint.before_part#1:{gate}"
    for step in range(3):
        toy_step(engine, step)
        before = engine.fragments.master(engine.fragments.owned[0]).clone()
        if step == 1:
            saving = threading.Thread(target=writer.save, args=(snapshot(step + 1),))
            saving.start()
            saving.join(0.5)
            waited = saving.is_alive()
            opened = time.monotonic()
            gate.touch()
            saving.join()
            snapshot_only = writer.blocked_seconds - writer.waited_seconds <= time.monotonic() - opened
        else:
            writer.save(snapshot(step + 1))  # the first one returns, though its part cannot be written yet
        toy_step(engine, 100 + step)  # changes the weights while the thread still has to write the snapshot
    writer.wait()
    path, commit = newest_valid(root)
    with safe_open(path / commit.parts[engine.world.rank].file, "pt") as part:
        saved = part.get_tensor("master")
    length = sum(fragment.length for fragment in engine.fragments.owned[0].fragments)
    return {
        "waited": waited,
        "equal": torch.equal(saved[:length], before[:length]),
        "snapshot_only": snapshot_only,
    }


def test_writing_goes_on_behind_the_loop_one_at_a_time(tmp_path: Path) -> None:
    for result in run_ranks(_overlap, 2, tmp_path):
        assert result["waited"], "the second save waits for the one before: a queue of one"
        assert result["snapshot_only"], "that is counted apart from the time to take the snapshot"
        assert result["equal"], "what is written is the state at the time of the save"
    assert [step_of(path) for path in candidates(tmp_path)] == [3, 2, 1]


def _wait_for_the_write_before(root: Path) -> list[tuple[float, float]]:
    engine = toy_engine(toy_config(zero_stage=1))
    writer = CheckpointWriter(root, engine.fragments, None)
    write_parts, wait, awaited = writer._write_parts, writer.wait, threading.Event()

    def write_parts_once_awaited(*arguments: Any) -> Any:
        assert awaited.wait(60)
        time.sleep(0.1)
        return write_parts(*arguments)

    def wait_audibly(timeout: float | None = None) -> None:
        if writer._thread is not None:
            awaited.set()
        wait(timeout)

    writer._write_parts, writer.wait = write_parts_once_awaited, wait_audibly  # type: ignore[method-assign]
    times = []
    for step in (1, 2):
        writer.save(snapshot(step))
        times.append((writer.blocked_seconds, writer.waited_seconds))
    writer.wait()
    assert events.snapshot() == {"checkpoint.waited": 1}
    return times


def test_a_save_that_waits_for_the_one_before_says_how_long(tmp_path: Path) -> None:
    [[_, (blocked, waited)]] = run_ranks(_wait_for_the_write_before, 1, tmp_path)
    assert 0.1 <= waited <= blocked


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


def test_the_search_goes_by_names_and_not_by_times_or_pointers(tmp_path: Path) -> None:
    run_ranks(_keep, 1, tmp_path)
    (tmp_path / "latest").write_text("step-00000003")
    for age, step in enumerate((5, 4, 3)):
        os.utime(tmp_path / f"step-{step:08d}", (1e9 - 1e6 * age, 1e9 + 1e6 * age))
    assert newest_valid(tmp_path)[1].step == 5


class _Payload:
    def __reduce__(self) -> Any:
        return os.mkdir, (self.place,)

    def __init__(self, place: str) -> None:
        self.place = place


def test_a_pickle_in_the_place_of_a_part_is_refused_without_being_executed(tmp_path: Path) -> None:
    run_ranks(_one_step, 1, tmp_path)
    folder, trap = tmp_path / "step-00000001", tmp_path / "executed"
    commit = read_commit(folder)
    part = folder / commit.parts[0].file
    part.write_bytes(pickle.dumps(_Payload(str(trap))))
    with pytest.raises(CheckpointError, match="bytes instead of"):
        newest_valid(tmp_path)
    # Whoever can write the part can write the commit as well.
    forged = Part(file=part.name, bytes=part.stat().st_size, sha256=hash_file(part))
    write_commit(folder, commit.model_copy(update={"parts": (forged,)}))
    path, commit = newest_valid(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        PartsReader(path, [part.name], commit.shapes)
    assert not trap.exists()


def _last_save_never_works(root: Path) -> tuple[str, list[int]]:
    engine = toy_engine(toy_config(zero_stage=1))
    toy_step(engine, 0)
    writer = CheckpointWriter(root, engine.fragments, None, keep=1)
    writer.save(snapshot(1), wait=True)
    os.environ["ARDIST_FAULT"] = "raise@checkpoint.before_commit:116"
    try:
        writer.save(snapshot(2), wait=True)
    except CheckpointError as error:
        return str(error), [step_of(path) for path in candidates(root)]
    return "saved", []


def test_a_folder_that_went_stale_costs_the_new_checkpoint_and_never_the_old_one(tmp_path: Path) -> None:
    [(message, steps)] = run_ranks(_last_save_never_works, 1, tmp_path)
    assert "Stale file handle" in message
    assert steps == [1]


def _folder_vanishes(root: Path) -> list[int]:
    engine = toy_engine(toy_config(zero_stage=1))
    toy_step(engine, 0)
    writer = CheckpointWriter(root, engine.fragments, None, keep=2)
    writer.save(snapshot(1), wait=True)
    shutil.rmtree(root)
    writer.save(snapshot(2), wait=True)
    return [step_of(path) for path in candidates(root)]


def test_a_folder_that_vanished_is_made_again(tmp_path: Path) -> None:
    assert run_ranks(_folder_vanishes, 1, tmp_path / "checkpoints") == [[2]]


def _pruning_fails(root: Path) -> tuple[int | None, dict[str, int]]:
    engine = toy_engine(toy_config(zero_stage=1))
    toy_step(engine, 0)
    writer = CheckpointWriter(root, engine.fragments, None, keep=1)
    writer.save(snapshot(1), wait=True)
    os.environ["ARDIST_FAULT"] = "raise@checkpoint.during_prune:5"
    writer.save(snapshot(2), wait=True)
    return writer.last_saved, events.snapshot()


def test_a_checkpoint_counts_though_the_older_one_could_not_be_removed(tmp_path: Path) -> None:
    [(saved, counted)] = run_ranks(_pruning_fails, 1, tmp_path)
    assert saved == 2
    assert counted == {"checkpoint.prune_failed": 1}


def test_an_average_of_a_long_decay_is_found_under_its_older_name(tmp_path: Path) -> None:
    run_ranks(_one_step, 1, tmp_path)
    commit = read_commit(tmp_path / "step-00000001")
    older = commit.model_copy(update={"kinds": ("master", "ema_1"), "ema_decays": (0.99999991,)})
    newer = commit.model_copy(update={"kinds": ("master", "ema_1", "ema_0.99999991")})
    assert older.kind_of_ema(0.99999991) == "ema_1"
    assert newer.kind_of_ema(0.99999991) == "ema_0.99999991"
    assert older.kind_of_ema(0.5) == "ema_0.5"
