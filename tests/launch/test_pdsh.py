"""DeepSpeed's launcher over pdsh: two machines train, words arrive intact, deaths are healed, nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ssh_servers import missing, ssh_servers
from tiny import losses, records, sample_ids, settings, write_latents
from two_nodes import HOSTS, ODD, SCRIPT, Pair, two_nodes, until_said, wait_until

from ardist.training import goodput

REASON = missing()
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]
STEPS = 16


class Machines:
    """The two machines, the way to them, and jobs on them."""

    def __init__(self, pair: Pair, environment: dict[str, str], data: Path) -> None:
        self.pair = pair
        self.environment = environment
        self.data = data
        self._servers = pair.running()

    def left(self) -> set[int]:
        """What is still there of any job."""
        return self.pair.running() - self._servers

    def start(self, directory: Path, *words: str, hosts: str = HOSTS, before: int = 0) -> subprocess.Popen[str]:
        """The script on the first machine; its ranks wait at the `before`-th batch they ask for until the file
        ``gate`` is there."""
        directory.mkdir(exist_ok=True)
        config, hostfile = directory / "a config.yaml", directory / "hosts"
        launch = {"restart_pause_seconds": 0.1, "node_seconds": 30, "heartbeat_seconds": 60}
        changes = {"training__steps": STEPS, "checkpoint__every": 4, "launch": launch}
        config.write_text(yaml.safe_dump(settings(directory / "the run", self.data, **changes)))
        hostfile.write_text(hosts)
        line = [*self.pair.inside(0), str(SCRIPT), "--hostfile", str(hostfile), "--remote-shell", "pdsh"]
        environment = self.environment | {
            "ARDIST_FAULT": f"wait@trainer.batch#{before}:{directory / 'gate'}" if before else "",
            "AWS_SECRET_ACCESS_KEY": "canary",
        }
        return subprocess.Popen(
            [*line, str(config), *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    root = tmp_path_factory.mktemp("machines")
    with two_nodes(root / "pair") as pair, ssh_servers(pair, root / "keys") as environment:
        yield Machines(pair, environment, write_latents(root / "latents"))


@pytest.fixture(scope="module")
def one_machine(machines: Machines, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with both ranks on one machine and nothing in between."""
    directory = tmp_path_factory.mktemp("one-machine")
    values = settings(directory / "the run", machines.data, training__steps=STEPS, checkpoint__every=4)
    (directory / "config.yaml").write_text(yaml.safe_dump(values))
    words = [str(SCRIPT), "--launcher", "plain", "--ranks", "2", str(directory / "config.yaml")]
    subprocess.run(words, check=True, timeout=300, capture_output=True)
    return directory / "the run"


def processes_of(text: str) -> dict[int, list[str]]:
    """Running processes with `text` in their command line."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if text in line and int(path.parent.name) != os.getpid():
            found[int(path.parent.name)] = line.split("\0")
    return found


def rank_of_machine(node: int, config: Path) -> int:
    """The process of the one rank there."""
    for pid, words in processes_of("ardist.training.main").items():
        if str(config) in words:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            assert b"AWS_SECRET_ACCESS_KEY=canary" not in environment, "what can be read by all holds no secret"
            if f"RANK={node}".encode() in environment:
                return pid
    raise AssertionError(f"rank {node} is not there")


def reached(job: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    """Wait until the job has logged a step; what it said when it ends before."""

    def there() -> bool:
        assert job.poll() is None, job.communicate()[0]
        return (run_dir / "metrics.jsonl").exists() and max(records(run_dir), default=0) >= step

    wait_until(there, 200)


def test_both_machines_train_and_a_rank_killed_on_the_other_one_is_healed(
    machines: Machines, one_machine: Path, tmp_path: Path
) -> None:
    job = machines.start(tmp_path, f"tracking.name={ODD}", before=7)
    reached(job, tmp_path / "the run", 6)
    assert not any("canary" in " ".join(words) for words in processes_of("pdsh").values())
    os.kill(rank_of_machine(1, tmp_path / "a config.yaml"), signal.SIGKILL)
    (tmp_path / "gate").touch()
    output, _ = job.communicate(timeout=400)
    assert job.returncode == 0, output
    resolved = yaml.safe_load((tmp_path / "the run" / "config.resolved.yaml").read_text())
    assert resolved["tracking"]["name"] == ODD
    assert losses(tmp_path / "the run") == losses(one_machine)
    assert sample_ids(tmp_path / "the run") == sample_ids(one_machine)
    [row] = goodput.restarts(goodput.read(tmp_path / "the run"))
    assert row["lost_steps"] <= 6
    wait_until(lambda: not machines.left())


def test_asked_to_stop_both_save_and_a_killed_launcher_leaves_nothing(
    machines: Machines, one_machine: Path, tmp_path: Path
) -> None:
    job = machines.start(tmp_path, before=3)
    reached(job, tmp_path / "the run", 2)
    job.send_signal(signal.SIGTERM)
    until_said(job, "SIGTERM was passed on")
    (tmp_path / "gate").touch()
    output, _ = job.communicate(timeout=200)
    assert job.returncode == 75, output
    saved = max(records(tmp_path / "the run"))
    wait_until(lambda: not machines.left())
    (tmp_path / "gate").unlink()
    job = machines.start(tmp_path, before=3)
    reached(job, tmp_path / "the run", saved + 2)
    job.kill()
    job.communicate(timeout=60)
    wait_until(lambda: not machines.left())
    job = machines.start(tmp_path)
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    assert losses(tmp_path / "the run") == losses(one_machine)
    assert sample_ids(tmp_path / "the run") == sample_ids(one_machine)


@pytest.mark.parametrize(
    ("hosts", "words", "code", "text"),
    [
        ("10.77.0.1 slots=1\n10.77.0.9 slots=1\n", (), 4, "machine 10.77.0.9 cannot be reached by pdsh"),
        ("10.77.0.2 slots=1\n", (), 2, "this machine must be in the hostfile"),
        (HOSTS, ("--launcher", "torchrun"), 2, "legal with it: --launcher deepspeed, not torchrun"),
    ],
)
def test_what_cannot_be_is_refused(
    machines: Machines, tmp_path: Path, hosts: str, words: tuple[str, ...], code: int, text: str
) -> None:
    job = machines.start(tmp_path, *words, hosts=hosts)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == code, output
    assert output.count(text) == 1
    assert "Traceback" not in output
    assert not (tmp_path / "the run").exists()
    wait_until(lambda: not machines.left(), 20)
