"""kill -9 of all that a job consists of, twice: port, lock and heartbeat files of the dead do not stop the next one."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import yaml
from fork_ranks import TrainingJob
from tiny import losses, records, sample_ids, settings, write_latents

from ardist.launch.local import free_port

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]
SCRIPT = Path(__file__).resolve().parents[2] / "launchers" / "train.sh"


def test_the_same_command_goes_on_after_kill_9_of_everything(tmp_path: Path) -> None:
    data = write_latents(tmp_path / "latents")
    undisturbed = TrainingJob(tmp_path / "undisturbed", data)
    assert undisturbed.run() == 0, undisturbed.stderr()

    run_dir, scratch = tmp_path / "run", tmp_path / "tmp"
    scratch.mkdir()
    values = settings(run_dir, data, training__steps=9, checkpoint__every=3)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    words = [str(SCRIPT), "--ranks", "2", "--master-port", str(free_port()), str(tmp_path / "run.yaml")]
    waiting = f"wait@trainer.batch#5:{tmp_path / 'never'}"  # the first start in step 5; the next one, from 3 on, in 8
    for step in (4, 7):  # in between two checkpoints
        environment = os.environ | {"TMPDIR": str(scratch), "ARDIST_FAULT": waiting}
        with subprocess.Popen(words, env=environment) as job:
            end = time.monotonic() + 200
            while not reached(run_dir, step):
                assert job.poll() is None
                assert time.monotonic() < end, "it did not get so far"
                time.sleep(0.1)
            everything = [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]
            for process in everything:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            _, alive = psutil.wait_procs(everything, 20)
            assert not alive
    assert len(list(scratch.glob("ardist-*/rank-*.beat"))) == 4, "heartbeats of the dead are there"
    assert json.loads((run_dir / ".lock").read_text())["pid"], "and so is what the dead wrote into the lock"
    done = subprocess.run(words, env=os.environ | {"TMPDIR": str(scratch)}, timeout=300, check=False)
    assert done.returncode == 0
    assert losses(run_dir) == losses(undisturbed.run_dir)
    assert sample_ids(run_dir) == sample_ids(undisturbed.run_dir)


def reached(run_dir: Path, step: int) -> bool:
    return (run_dir / "metrics.jsonl").exists() and max(records(run_dir), default=0) >= step
