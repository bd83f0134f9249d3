"""--no-ssh: every machine starts its own ranks by the same command, and what is trained is what one machine trains."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tiny import losses, records, sample_ids, settings, write_latents
from two_nodes import HOSTS, ODD, SCRIPT, Pair, possible, two_nodes, until_said, wait_until

from ardist.training import goodput

REASON = possible()
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("latents"))


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with two_nodes(tmp_path / "machines") as machines:
        yield machines


def write_config(path: Path, run_dir: Path, data: Path) -> Path:
    launch = {"restart_pause_seconds": 1, "heartbeat_seconds": 60, "step_seconds": 60}
    changes = {"training__steps": 16, "checkpoint__every": 4, "launch": launch}
    path.write_text(yaml.safe_dump(settings(run_dir, data, **changes)))
    return path


@pytest.fixture(scope="module")
def one_machine(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The same run with both ranks on one machine."""
    directory = tmp_path_factory.mktemp("one-machine")
    config = write_config(directory / "config.yaml", directory / "run", data)
    words = [str(SCRIPT), "--launcher", "plain", "--ranks", "2", str(config)]
    subprocess.run(words, check=True, timeout=300, capture_output=True)
    return directory / "run"


def start(pair: Pair, node: int, *words: str, fault: str = "") -> subprocess.Popen[str]:
    """The script on one of the machines."""
    line = [*pair.inside(node), str(SCRIPT), "--no-ssh", "--node-rank", str(node), *words]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "veth0", "ARDIST_FAULT": fault}
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(jobs: list[subprocess.Popen[str]]) -> list[str]:
    return [job.communicate(timeout=400)[0] for job in jobs]


@pytest.mark.parametrize(
    ("engine", "hostfile"), [("deepspeed", True), ("deepspeed", False), ("torchrun", True), ("plain", True)]
)
def test_each_machine_by_its_own_launcher(
    pair: Pair, tmp_path: Path, data: Path, one_machine: Path, engine: str, hostfile: bool
) -> None:
    before = pair.running()
    config, run = write_config(tmp_path / "a config.yaml", tmp_path / "the run", data), tmp_path / "the run"
    (tmp_path / "hosts").write_text(HOSTS)
    where = ["--hostfile", str(tmp_path / "hosts")]
    if not hostfile:
        where = ["--num-nodes", "2", "--ranks", "1", "--master-addr", "10.77.0.1", "--master-port", "29444"]
    words = ["--launcher", engine, *where, str(config), f"tracking.name={ODD}"]
    jobs = [start(pair, node, *words) for node in (1, 0)]
    said = finish(jobs)
    assert [job.returncode for job in jobs] == [0, 0], "\n".join(said)
    assert yaml.safe_load((run / "config.resolved.yaml").read_text())["tracking"]["name"] == ODD
    assert sample_ids(run) == sample_ids(one_machine)
    assert losses(run) == losses(one_machine)
    assert json.loads((run / "summary.json").read_text())["launches"]["launches"] == 1, "one of them keeps the book"
    assert [record["ranks"] for record in goodput.read(run) if record["event"] == "first_step"] == [2]
    wait_until(lambda: not pair.running() - before, 30)


@pytest.mark.parametrize("engine", ["deepspeed", "plain"])
def test_a_rank_killed_on_one_machine_is_healed_by_both_launchers(
    pair: Pair, tmp_path: Path, data: Path, one_machine: Path, engine: str
) -> None:
    before = pair.running()
    config, run = write_config(tmp_path / "config.yaml", tmp_path / "run", data), tmp_path / "run"
    (tmp_path / "hosts").write_text(HOSTS)
    words = ["--launcher", engine, "--hostfile", str(tmp_path / "hosts"), str(config)]
    gate = tmp_path / "gate"
    jobs = [start(pair, node, *words, fault=f"wait@trainer.batch#7:{gate}") for node in (0, 1)]
    wait_until(lambda: (run / "metrics.jsonl").exists() and max(records(run), default=0) >= 6)
    os.kill(rank(pair, 1, config), signal.SIGKILL)
    gate.touch()
    said = finish(jobs)
    assert [job.returncode for job in jobs] == [0, 0], "\n".join(said)
    assert sample_ids(run) == sample_ids(one_machine)
    assert losses(run) == losses(one_machine)
    assert goodput.restarts(goodput.read(run)), "the first machine's launcher saw its rank fail, and wrote it down"
    assert "was ended by SIGKILL" in said[1] or "died without a word" in said[1], "the other one named the culprit"
    wait_until(lambda: not pair.running() - before, 30)


def test_a_stop_asked_of_one_machine_saves_on_both(pair: Pair, tmp_path: Path, data: Path, one_machine: Path) -> None:
    config, run = write_config(tmp_path / "config.yaml", tmp_path / "run", data), tmp_path / "run"
    (tmp_path / "hosts").write_text(HOSTS)
    words = ["--launcher", "plain", "--hostfile", str(tmp_path / "hosts"), str(config)]
    gate = tmp_path / "gate"
    jobs = [start(pair, node, *words, fault=f"wait@trainer.batch#6:{gate}") for node in (0, 1)]
    wait_until(lambda: (run / "metrics.jsonl").exists() and max(records(run), default=0) >= 5)
    jobs[1].send_signal(signal.SIGTERM)
    until_said(jobs[1], "SIGTERM was passed on")
    gate.touch()
    said = finish(jobs)
    assert [job.returncode for job in jobs] == [75, 75], "\n".join(said)
    alone = [str(SCRIPT), "--launcher", "plain", "--ranks", "2", str(config)]
    subprocess.run(alone, check=True, timeout=300, capture_output=True)
    assert sample_ids(run) == sample_ids(one_machine)
    assert losses(run) == losses(one_machine)


def rank(pair: Pair, node: int, config: Path) -> int:
    """The process of the rank on a machine."""
    found = subprocess.run(["ip", "netns", "pids", pair.names[node]], check=True, capture_output=True, text=True)
    for pid in map(int, found.stdout.split()):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue  # it ended meanwhile
        if str(config) in words and words[words.index("-m") + 1] == "ardist.training.main":
            return pid
    raise AssertionError(f"machine {node} runs no rank")
