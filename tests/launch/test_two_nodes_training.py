"""Real training over two machines: one is cut off, the other goes on, and nothing of it shows in what was learned."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from tiny import losses, records, sample_ids, settings, write_latents
from two_nodes import HOSTS, SCRIPT, possible, two_nodes

from ardist.training import goodput

REASON = possible()
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]
STEPS = 30


@pytest.mark.parametrize("engine", ["deepspeed", "torchrun"])
def test_training_goes_on_without_the_machine_that_was_cut_off(tmp_path: Path, engine: str) -> None:
    data = write_latents(tmp_path / "latents")
    launch = {"node_seconds": 12, "heartbeat_seconds": 60, "restart_pause_seconds": 0.1}
    changes = {"training__steps": STEPS, "checkpoint__every": 5, "launch": launch}
    config, hostfile = tmp_path / "a config.yaml", tmp_path / "hosts"
    config.write_text(yaml.safe_dump(settings(tmp_path / "the run", data, **changes)))
    hostfile.write_text(HOSTS)
    plain = tmp_path / "uninterrupted"
    with two_nodes(tmp_path / "machines") as pair:
        environment = {**os.environ, "PATH": pair.path, "ARDIST_FAULT": "sleep@trainer.batch:0.4"}
        words = [*pair.inside(0), str(SCRIPT), "--launcher", engine, "--hostfile", str(hostfile), str(config)]
        job = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        wait_for_step(tmp_path / "the run", 8)
        pair.cut()
        output, _ = job.communicate(timeout=500)
    assert job.returncode == 0, output
    [row] = goodput.restarts(goodput.read(tmp_path / "the run"))
    assert (row["cause"], row["lost_steps"] <= 6) == ("cut off", True), row
    assert "machine 10.77.0.2 gave no sign of life" in row["detail"]
    assert row["detect_seconds"] < 60
    alone = [str(SCRIPT), "--launcher", "plain", "--ranks", "1", str(config), f"run_dir={plain}"]
    subprocess.run(alone, check=True, timeout=300, capture_output=True)
    resumed = goodput.read(tmp_path / "the run")[-2]["resumed_step"]
    forget_steps_after(tmp_path / "the run" / "logs" / "samples-rank-00001.jsonl", resumed)
    assert sample_ids(tmp_path / "the run") == sample_ids(plain)
    assert losses(tmp_path / "the run") == pytest.approx(losses(plain), abs=1e-5)
    summary = json.loads((tmp_path / "the run" / "summary.json").read_text())
    assert summary["launches"]["by_cause"]["cut off"]["count"] == 1
    assert 0 < summary["goodput"] < 1


def wait_for_step(run_dir: Path, step: int) -> None:
    end = time.monotonic() + 300
    while time.monotonic() < end:
        if (run_dir / "metrics.jsonl").exists() and max(records(run_dir), default=0) >= step:
            return
        time.sleep(0.1)
    raise AssertionError(f"step {step} was never logged")


def forget_steps_after(log: Path, step: int) -> None:
    """What the lost machine did after the checkpoint is no part of the run: the machine left did it again."""
    lines = log.read_text().splitlines()
    log.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step))
