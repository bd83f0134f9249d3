"""What a run must survive: signals, kills at every point of the checkpoint writer, bad numbers, full disks."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks, run_ranks
from tiny import losses, records, sample_ids, tiny_config, train_outcome, write_latents

from ardist.errors import CheckpointError
from ardist.training.commit import candidates, newest_valid, read_commit

pytestmark = pytest.mark.distributed

STEPS = 9


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("latents"))


def config_of(run_dir: Path, data: Path, **changes: Any) -> Any:
    defaults = {"training__steps": STEPS, "checkpoint__every": 3, "checkpoint__keep": 1}
    return tiny_config(run_dir, data, **{**defaults, **changes})


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    assert run_ranks(train_outcome, 2, config_of(run_dir, data)) == ["done", "done"]
    return run_dir


def finishes_as(run_dir: Path, data: Path, uninterrupted: Path) -> None:
    """Resume and require the losses and samples of a run that nothing happened to."""
    assert run_ranks(train_outcome, 2, config_of(run_dir, data)) == ["done", "done"]
    assert losses(run_dir) == losses(uninterrupted)
    assert sample_ids(run_dir) == sample_ids(uninterrupted)
    names = [path.name for path in (run_dir / "checkpoints").iterdir()]
    assert names == [f"step-{STEPS:08d}"], "one checkpoint is kept, nothing half-written is left"


class Observer(threading.Thread):
    """Looks for a valid checkpoint all the time, from the first one on, as a reader beside the run would."""

    def __init__(self, root: Path) -> None:
        super().__init__(daemon=True)
        self.root = root
        self.seen: list[int] = []
        self.missing: list[str] = []
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.is_set():
            try:
                self.seen.append(newest_valid(self.root)[1].step)
            except CheckpointError as error:
                if self.seen:
                    self.missing.append(str(error))
            time.sleep(0.002)


@pytest.mark.parametrize(
    "point",
    [
        "checkpoint.before_part/1",
        "checkpoint.half_part/0",
        "checkpoint.half_part/1",
        "checkpoint.after_part/1",
        "checkpoint.before_commit",
        "checkpoint.after_commit",
        "checkpoint.after_rename",
        "checkpoint.during_prune",
    ],
)
def test_kill_at_every_point_of_the_second_checkpoint(
    tmp_path: Path, data: Path, uninterrupted: Path, point: str
) -> None:
    observer = Observer(tmp_path / "checkpoints")
    observer.start()
    visit = 1 if point.endswith("prune") else 2
    ranks = Ranks(train_outcome, 2, config_of(tmp_path, data), env={"ARDIST_FAULT": f"kill@{point}#{visit}"})
    outcomes = ranks.wait()
    assert -signal.SIGKILL in [outcome.exit_code for outcome in outcomes]
    assert not any(outcome.value == "done" for outcome in outcomes)
    step = newest_valid(tmp_path / "checkpoints")[1].step
    assert step == (6 if point.split(".")[1] in ("after_rename", "during_prune") else 3)
    finishes_as(tmp_path, data, uninterrupted)
    observer.done.set()
    observer.join()
    assert observer.missing == []
    assert observer.seen == sorted(observer.seen)


@pytest.mark.parametrize("point", ["trainer.batch", "trainer.before_step", "trainer.after_step"])
def test_kill_of_one_rank_in_the_middle_of_a_step(tmp_path: Path, data: Path, uninterrupted: Path, point: str) -> None:
    ranks = Ranks(train_outcome, 2, config_of(tmp_path, data), env={"ARDIST_FAULT": f"kill@{point}/1#5"})
    assert -signal.SIGKILL in [outcome.exit_code for outcome in ranks.wait()]
    finishes_as(tmp_path, data, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_and_saves_all(tmp_path: Path, data: Path, uninterrupted: Path, number: int) -> None:
    gate = tmp_path / "gate"
    ranks = Ranks(train_outcome, 2, config_of(tmp_path, data), env={"ARDIST_FAULT": f"wait@trainer.batch#4:{gate}"})
    wait_for_step(tmp_path, 2)
    ranks.send_signal(1, number)
    gate.touch()
    outcomes = ranks.wait()
    assert [outcome.error for outcome in outcomes] == [None, None]
    assert all(outcome.value.startswith("Preempted: stopped on") for outcome in outcomes), outcomes
    step = newest_valid(tmp_path / "checkpoints")[1].step
    assert 2 <= step < STEPS
    assert max(records(tmp_path)) == step
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["completed"], summary["step"]) == (False, step)
    finishes_as(tmp_path, data, uninterrupted)
    assert json.loads((tmp_path / "summary.json").read_text())["sessions"] == 2


def wait_for_step(run_dir: Path, step: int) -> None:
    end = time.monotonic() + 200
    while time.monotonic() < end:
        if (run_dir / "metrics.jsonl").exists() and max(records(run_dir), default=0) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was never logged")


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "missing":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "how"),
    [
        ("part-00001-of-00002.safetensors", "bit flipped"),
        ("part-00000-of-00002.safetensors", "truncated"),
        ("part-00001-of-00002.safetensors", "missing"),
        ("COMMIT.json", "bit flipped"),
        ("COMMIT.json", "empty"),
    ],
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, data: Path, uninterrupted: Path, file: str, how: str
) -> None:
    stopped = config_of(tmp_path, data, training__stop_after=7, checkpoint__keep=2)
    run_ranks(train_outcome, 2, stopped)
    assert [read_commit(path).step for path in candidates(tmp_path / "checkpoints")] == [7, 6]
    damage(tmp_path / "checkpoints" / "step-00000007" / file, how)
    assert newest_valid(tmp_path / "checkpoints")[1].step == 6
    assert run_ranks(train_outcome, 2, config_of(tmp_path, data)) == ["done", "done"]
    assert losses(tmp_path) == losses(uninterrupted)
    assert json.loads((tmp_path / "summary.json").read_text())["events"]["checkpoint.fallback"] == 1
    aside = [path.name for path in (tmp_path / "checkpoints").iterdir() if ".damaged-" in path.name]
    assert len(aside) == 1
    assert aside[0].startswith("step-00000007")


def test_only_damaged_checkpoints_is_an_error_that_lists_them(tmp_path: Path, data: Path) -> None:
    run_ranks(train_outcome, 2, config_of(tmp_path, data, training__stop_after=3))
    damage(tmp_path / "checkpoints" / "step-00000003" / "part-00000-of-00002.safetensors", "bit flipped")
    for outcome in run_ranks(train_outcome, 2, config_of(tmp_path, data)):
        assert outcome.startswith("CheckpointError: none of the checkpoints in")
        assert "part-00000-of-00002.safetensors is damaged" in outcome


def test_a_full_disk_at_a_checkpoint_is_counted_and_training_goes_on(
    tmp_path: Path, data: Path, uninterrupted: Path
) -> None:
    fault = {"ARDIST_FAULT": "raise@checkpoint.after_part/1#1:28;raise@trainer.metrics/0#2:28"}
    config = config_of(tmp_path, data)
    assert [outcome.value for outcome in Ranks(train_outcome, 2, config, env=fault).wait()] == ["done", "done"]
    events = json.loads((tmp_path / "summary.json").read_text())["events"]
    assert events["checkpoint.failed"] == 2, "once on each rank"
    assert events["metrics.failed"] == 1
    assert [read_commit(path).step for path in candidates(tmp_path / "checkpoints")] == [STEPS]
    # The record of step 2 is lost, nothing else is.
    assert losses(tmp_path) == [losses(uninterrupted)[0], *losses(uninterrupted)[2:]]


def _train_where_one_save_runs_out_of_memory(config: Any) -> str:
    from ardist.training import distributed
    from ardist.training.checkpoint import CheckpointWriter

    write_parts, calls = CheckpointWriter._write_parts, []

    def write_parts_once_in_vain(*arguments: Any) -> Any:
        calls.append(1)
        if distributed.environment()[0] == 1 and len(calls) == 1:
            raise RuntimeError("can't allocate memory: you tried to allocate 12 bytes")
        return write_parts(*arguments)

    CheckpointWriter._write_parts = write_parts_once_in_vain  # type: ignore[method-assign]
    return train_outcome(config)


def test_an_unforeseen_error_of_one_writer_is_counted_and_keeps_no_peer_waiting(tmp_path: Path, data: Path) -> None:
    config = config_of(tmp_path, data, training__timeout_minutes=4)
    outcomes = Ranks(_train_where_one_save_runs_out_of_memory, 2, config).wait()
    assert [outcome.value for outcome in outcomes] == ["done", "done"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["events"]["checkpoint.failed"] == 2, "once on each rank"
    assert newest_valid(tmp_path / "checkpoints")[1].step == STEPS


def test_the_time_that_checkpoints_take_from_the_loop_is_recorded_over_all_sessions(tmp_path: Path, data: Path) -> None:
    for stop in (3, None):
        config = config_of(tmp_path, data, training__steps=5, checkpoint__every=2, training__stop_after=stop)
        run_ranks(train_outcome, 1, config)
    saves = records(tmp_path, "save")
    assert sorted(saves) == [2, 3, 4, 5]
    assert all(0 <= save["waited_seconds"] <= save["blocked_seconds"] for save in saves.values())
    counted = json.loads((tmp_path / "summary.json").read_text())["checkpoint_blocked_seconds"]
    # The save of step 3 itself is in the record of the run, but not in the checkpoint that the resume goes on from.
    recorded = [saves[step]["blocked_seconds"] for step in (2, 4, 5)]
    assert counted >= sum(recorded) > 0


def test_the_last_checkpoint_is_insisted_on(tmp_path: Path, data: Path) -> None:
    fault = {"ARDIST_FAULT": "raise@checkpoint.before_commit#1:5"}
    config = config_of(tmp_path, data, training__steps=2)
    assert [outcome.value for outcome in Ranks(train_outcome, 2, config, env=fault).wait()] == ["done", "done"]
    assert newest_valid(tmp_path / "checkpoints")[1].step == 2
    assert json.loads((tmp_path / "summary.json").read_text())["events"]["checkpoint.retry"] == 2


@pytest.mark.parametrize("stage", [0, 1])
def test_nan_loss_on_one_rank_is_skipped_counted_and_listed(
    tmp_path: Path, data: Path, uninterrupted: Path, stage: int
) -> None:
    # Two micro-batches per step: the sixth visit is the second half of step 3.
    fault = {"ARDIST_FAULT": "value@trainer.loss/1#6:nan"}
    config = config_of(tmp_path, data, training__zero_stage=stage, training__log_every=4)
    assert [outcome.value for outcome in Ranks(train_outcome, 2, config, env=fault).wait()] == ["done", "done"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["skipped_steps"] == summary["events"]["training.skipped_step"] == 1
    listed = [json.loads(line) for line in (tmp_path / "skipped_steps.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in listed] == [3]
    ranks = listed[0]["ranks"]
    assert [entry["loss"] if isinstance(entry["loss"], str) else "good" for entry in ranks] == ["good", "nan"]
    assert sorted(ranks[0]["sample_ids"] + ranks[1]["sample_ids"]) == sample_ids(uninterrupted)[3]
    assert len(ranks[1]["timesteps"]) == 4
    assert read_commit(candidates(tmp_path / "checkpoints")[0]).adam_steps == {0: STEPS - 1.0, 1: STEPS - 1.0}
    assert read_commit(candidates(tmp_path / "checkpoints")[0]).ema_updates == STEPS - 1
    assert records(tmp_path)[STEPS]["loss"] < 0.3


def test_a_run_that_only_skips_goes_back_once_and_ends(tmp_path: Path, data: Path) -> None:
    visits = ";".join(f"value@trainer.loss/0#{number}:nan" for number in range(9, 41))
    config = config_of(tmp_path, data, training__max_skipped_in_row=2, checkpoint__asynchronous=False)
    outcomes = Ranks(train_outcome, 2, config, env={"ARDIST_FAULT": visits}).wait()
    for outcome in outcomes:
        assert outcome.value is not None, outcome
        assert outcome.value.startswith("TrainingDivergedError: 2 steps in a row up to step 5"), outcome.value
    steps = [json.loads(line)["step"] for line in (tmp_path / "skipped_steps.jsonl").read_text().splitlines()]
    assert steps == [5, 6, 4, 5]
    assert all(record["samples"] == 8 * step for step, record in records(tmp_path).items())
    assert newest_valid(tmp_path / "checkpoints")[1].step == 3


@pytest.mark.parametrize(("needed", "ends"), [(1, "done"), (2, "diverged")])
def test_a_run_goes_back_again_when_it_got_further_since(
    tmp_path: Path, data: Path, uninterrupted: Path, needed: int, ends: str
) -> None:
    changes = {"training__max_skipped_in_row": 2, "training__good_steps_to_go_back_again": needed}
    # Two micro-batches per step: steps 5 and 6 are bad, their repetition is good, and so is step 7.
    bad = {"ARDIST_FAULT": ";".join(f"value@trainer.loss/0#{number}:nan" for number in range(9, 13))}
    first = config_of(tmp_path, data, **changes, training__stop_after=7)
    for outcome in Ranks(train_outcome, 2, first, env=bad).wait():
        assert outcome.value.startswith("Preempted"), outcome
    # Another process, in which steps 8 and 9 are bad: what it may do depends on what the first one did.
    bad = {"ARDIST_FAULT": ";".join(f"value@trainer.loss/0#{number}:nan" for number in range(1, 5))}
    outcomes = Ranks(train_outcome, 2, config_of(tmp_path, data, **changes), env=bad).wait()
    if ends == "done":
        assert [outcome.value for outcome in outcomes] == ["done", "done"]
        assert json.loads((tmp_path / "summary.json").read_text())["events"]["training.rollback"] == 2
        assert losses(tmp_path) == losses(uninterrupted)
    else:
        for outcome in outcomes:
            assert outcome.value.startswith("TrainingDivergedError: 2 steps in a row up to step 9"), outcome
            assert "gone back from step 6 already, 1 good steps behind it" in outcome.value


def test_a_run_killed_after_it_went_back_does_not_go_back_again(tmp_path: Path, data: Path) -> None:
    """Its checkpoints are all from before it did."""
    config = config_of(tmp_path, data, training__max_skipped_in_row=2, checkpoint__asynchronous=False)
    # Steps 5 and 6 are bad, back to step 3, killed in the repetition of step 5.
    bad = ";".join(f"value@trainer.loss/0#{number}:nan" for number in range(9, 13))
    outcomes = Ranks(train_outcome, 2, config, env={"ARDIST_FAULT": f"{bad};kill@trainer.batch/0#8"}).wait()
    assert outcomes[0].exit_code == -9
    bad = ";".join(f"value@trainer.loss/0#{number}:nan" for number in range(1, 9))
    for outcome in Ranks(train_outcome, 2, config, env={"ARDIST_FAULT": bad}).wait():
        assert outcome.value.startswith("TrainingDivergedError: 2 steps in a row up to step 5"), outcome
        assert "gone back from step 6 already, 0 good steps behind it" in outcome.value


SPIKES = {"training__spike_window": 3, "training__spike_sigmas": 30.0}


@pytest.mark.parametrize(("policy", "stage"), [("skip", 1), ("skip", 3), ("count", 1)])
def test_a_gradient_spike_is_skipped_or_only_counted(
    tmp_path: Path, data: Path, uninterrupted: Path, policy: str, stage: int
) -> None:
    # Two micro-batches per step: visits 9 and 10 are step 5.
    fault = {"ARDIST_FAULT": "value@trainer.loss#9:10000;value@trainer.loss#10:10000"}
    changes = {**SPIKES, "training__spike_policy": policy, "training__zero_stage": stage}
    assert [o.value for o in Ranks(train_outcome, 2, config_of(tmp_path, data, **changes), env=fault).wait()] == [
        "done",
        "done",
    ]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["events"]["training.gradient_spike"] == 1
    assert summary["skipped_steps"] == summary["events"].get("training.skipped_step", 0) == int(policy == "skip")
    [entry] = [json.loads(line) for line in (tmp_path / "skipped_steps.jsonl").read_text().splitlines()]
    assert (entry["step"], entry["reason"], entry["skipped"]) == (5, "gradient spike", policy == "skip")
    assert entry["grad_norm"] > 100
    assert sorted(entry["ranks"][0]["sample_ids"] + entry["ranks"][1]["sample_ids"]) == sample_ids(uninterrupted)[5]
    steps = STEPS - float(policy == "skip")
    assert read_commit(candidates(tmp_path / "checkpoints")[0]).adam_steps == {0: steps, 1: steps}


def test_spikes_in_a_row_go_back_once_and_the_window_is_part_of_the_state(tmp_path: Path, data: Path) -> None:
    fault = {"ARDIST_FAULT": ";".join(f"value@trainer.loss#{number}:10000" for number in range(9, 61))}
    changes = {**SPIKES, "training__spike_policy": "skip", "training__max_skipped_in_row": 2}
    changes |= {"checkpoint__asynchronous": False}
    for outcome in Ranks(train_outcome, 2, config_of(tmp_path, data, **changes), env=fault).wait():
        assert outcome.value is not None, outcome
        assert outcome.value.startswith("TrainingDivergedError: 2 steps in a row up to step 5"), outcome.value
    steps = [json.loads(line)["step"] for line in (tmp_path / "skipped_steps.jsonl").read_text().splitlines()]
    assert steps == [5, 6, 4, 5], "after the way back to step 3 the window is that of step 3, and full"
    assert len(read_commit(candidates(tmp_path / "checkpoints")[0]).state["spikes"]["4"]) == 3


def test_a_second_job_on_a_run_directory_is_refused(tmp_path: Path, data: Path) -> None:
    waiting = {"ARDIST_FAULT": f"wait@trainer.batch#3:{tmp_path / 'never'}"}
    first = Ranks(train_outcome, 1, config_of(tmp_path, data), env=waiting)
    wait_for_step(tmp_path, 1)
    [second] = run_ranks(_train_without_waiting, 1, config_of(tmp_path, data))
    assert second.startswith("ConfigError: another job is running in")
    assert '"pid"' in second
    first.send_signal(0, signal.SIGKILL)
    first.wait()
    [third] = run_ranks(train_outcome, 1, config_of(tmp_path, data))
    assert third == "done", "the lock of a dead job is no lock"


def _train_without_waiting(config: Any) -> str:
    from ardist.training.run_dir import RunDirectory

    RunDirectory.lock.__defaults__ = (0.5,)
    return train_outcome(config)


def test_weights_of_another_run_start_a_fresh_one(tmp_path: Path, data: Path, uninterrupted: Path) -> None:
    config = config_of(tmp_path, data, init_from=str(uninterrupted), training__steps=3)
    assert run_ranks(train_outcome, 2, config) == ["done", "done"]
    assert losses(tmp_path)[0] < 0.9 * losses(uninterrupted)[0]
    assert sample_ids(tmp_path)[1] == sample_ids(uninterrupted)[1]
    wider = config_of(tmp_path / "wider", data, init_from=str(uninterrupted), denoiser__width=64)
    for outcome in run_ranks(train_outcome, 2, wider):
        assert outcome.startswith("CheckpointError:")
        assert "belongs to another model" in outcome


def test_replicas_that_differ_are_found_and_named(tmp_path: Path, data: Path) -> None:
    config = config_of(tmp_path, data, debug__replica_check_every=2, training__zero_stage=0)
    outcomes = run_ranks(_train_with_flip, 3, _with_batch(config, 12))
    for outcome in outcomes:
        assert outcome.startswith("HardwareError: at step 4 the weights of rank 1 differ"), outcome


def _with_batch(config: Any, size: int) -> Any:
    return config.model_copy(update={"training": config.training.model_copy(update={"global_batch_size": size})})


def _train_with_flip(config: Any) -> str:
    import torch

    from ardist.errors import ArdistError
    from ardist.training.callbacks import Callback
    from ardist.training.trainer import Trainer, train

    class Flip(Callback):
        def after_step(self, trainer: Trainer) -> None:
            if trainer.step == 3 and trainer.world.rank == 1:
                with torch.no_grad():
                    next(trainer.engine.module.parameters()).view(-1)[0] += 1e-6

    try:
        train(config, [Flip()])
    except ArdistError as error:
        return f"{type(error).__name__}: {error}"
    return "done"


@pytest.fixture(autouse=True)
def _small_disk(tmp_path: Path) -> Any:
    yield
    shutil.rmtree(tmp_path, ignore_errors=True)


def test_a_profile_and_deterministic_kernels_on_request(tmp_path: Path, data: Path) -> None:
    config = config_of(tmp_path, data, training__steps=4, debug__profile_step=1, debug__deterministic=True)
    config = config.model_copy(update={"debug": config.debug.model_copy(update={"profile_steps": 2})})
    assert run_ranks(train_outcome, 1, config) == ["done"]
    trace = json.loads((tmp_path / "logs" / "trace-rank-00000.json").read_text())
    assert any("aten::" in str(event.get("name")) for event in trace["traceEvents"])
