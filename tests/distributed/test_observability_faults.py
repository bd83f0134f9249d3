"""What a run shows and writes: closed streams, unwritable logs, other settings on one machine, secrets, half a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks, run_ranks
from tiny import losses, tiny_config, train_outcome, write_latents

from ardist.training.commit import newest_valid
from ardist.training.run_dir import write_atomically

pytestmark = pytest.mark.distributed

STEPS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("clips with ünïcode"), samples=16)


def config_of(run_dir: Path, data: Path, **changes: Any) -> Any:
    return tiny_config(run_dir, data, **{"training__steps": STEPS, **changes})


def _train_into_a_closed_pipe(config: Any) -> str:
    reader, writer = os.pipe()
    os.close(reader)
    kept = [os.dup(number) for number in (1, 2)]
    for number in (1, 2):
        os.dup2(writer, number)
    outcome = train_outcome(config)
    for number, copy in zip((1, 2), kept, strict=True):
        os.dup2(copy, number)
    return outcome


def test_streams_that_nobody_reads_do_not_stop_training(tmp_path: Path, data: Path) -> None:
    run_dir = tmp_path / "ein lauf"
    assert run_ranks(_train_into_a_closed_pipe, 1, config_of(run_dir, data)) == ["done"]
    assert len(losses(run_dir)) == STEPS
    assert "finished 4 steps" in (run_dir / "logs" / "rank-00000.log").read_text()


def test_a_rank_leaves_with_its_code_though_nobody_reads_its_streams() -> None:
    program = (
        "import os, sys; from ardist.training import distributed; r, w = os.pipe(); os.close(r); "
        "sys.stdout = open(w, 'w'); print('x'); distributed.leave(75)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=120).returncode == 75


def test_a_log_that_cannot_be_written_is_counted(tmp_path: Path, data: Path) -> None:
    fault = {"ARDIST_FAULT": "raise@run_dir.before_log/0:30"}
    assert [o.value for o in Ranks(train_outcome, 1, config_of(tmp_path, data), env=fault).wait()] == ["done"]
    assert json.loads((tmp_path / "summary.json").read_text())["events"]["log.unavailable"] == 1
    assert not (tmp_path / "logs" / "rank-00000.log").exists()
    assert newest_valid(tmp_path / "checkpoints")[1].step == STEPS


def _train_with_another_seed_on_rank_one(config: Any) -> str:
    return train_outcome(config.model_copy(update={"seed": int(os.environ["RANK"])}))


def test_a_machine_with_other_settings_is_refused_and_named(tmp_path: Path, data: Path) -> None:
    for outcome in run_ranks(_train_with_another_seed_on_rank_one, 2, config_of(tmp_path, data)):
        assert outcome.startswith("ConfigError: the ranks do not run the same thing")
        assert "rank 1: configuration" in outcome


def _train_with_other_code_on_rank_one(config: Any) -> str:
    from ardist.training import trainer

    usual = trainer.code_digest
    trainer.code_digest = lambda: os.environ["RANK"] + usual()[1:]  # type: ignore[attr-defined]
    return train_outcome(config)


def test_a_machine_with_other_code_is_refused_and_named(tmp_path: Path, data: Path) -> None:
    for outcome in run_ranks(_train_with_other_code_on_rank_one, 2, config_of(tmp_path, data)):
        assert outcome.startswith("ConfigError: the ranks do not run the same thing")
        assert "rank 1: code" in outcome


CANARIES = {name: f"canary-{number}" for number, name in enumerate(("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"))}
CANARIES |= {"WANDB_API_KEY": "canary" + "0" * 34, "HF_TOKEN": "canary-hf"}


def test_no_secret_of_the_environment_is_written_anywhere(
    tmp_path: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path, data, tracking__wandb="offline", tracking__tensorboard=True)
    assert [o.value for o in Ranks(train_outcome, 1, config, env={**CANARIES, "WANDB_MODE": "offline"}).wait()] == [
        "done"
    ]
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 8, "checkpoints, logs, metrics, trackers"
    assert [path for path in files if b"canary" in path.read_bytes()] == []
    assert "canary" not in "".join(capfd.readouterr())


def test_a_reader_never_sees_half_a_summary(tmp_path: Path) -> None:
    path, done, seen = tmp_path / "summary.json", threading.Event(), []
    write_atomically(path, json.dumps({"step": 0}))

    def read() -> None:
        while not done.is_set():
            seen.append(json.loads(path.read_text())["step"])

    reader = threading.Thread(target=read)
    reader.start()
    for step in range(300):
        write_atomically(path, json.dumps({"filler": "x" * 4096, "step": step}))
    done.set()
    reader.join()
    assert seen == sorted(seen)
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]
