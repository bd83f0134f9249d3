"""What is refused at the start of a job on two machines: one message, the documented exit code, nothing left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import settings, write_latents
from two_nodes import Pair, possible, two_nodes

import ardist
from ardist.launch import cluster
from ardist.launch import main as program
from ardist.training.run_dir import RunDirectory

HERE = Path(__file__).parent
SCRIPT = HERE.parents[1] / "launchers" / "train.sh"
REASON = possible()
two_machines = pytest.mark.skipif(REASON is not None, reason=str(REASON))
FIRST, SECOND = "10.77.0.1 slots=1\n", "10.77.0.2 slots=1\n"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with two_nodes(tmp_path_factory.mktemp("machines")) as machines:
        yield machines


def start(pair: Pair, directory: Path, hosts: str, *words: str, **changes: Any) -> subprocess.CompletedProcess[str]:
    """The program on the first machine with toy ranks, until its end."""
    (directory / "hosts").write_text(hosts)
    values = settings(directory / "run", directory, **{"launch": {"node_seconds": 60}, **changes})
    (directory / "run.yaml").write_text(yaml.safe_dump(values))
    line = [*pair.inside(0), sys.executable, str(HERE / "job_program.py"), "--hostfile", "hosts", *words, "run.yaml"]
    environment = {**os.environ, "PATH": pair.path, "PYTHONPATH": f"{HERE}:{HERE.parents[1]}"}
    return subprocess.run(
        line, cwd=directory, env=environment, capture_output=True, text=True, timeout=250, check=False
    )


def refused(pair: Pair, before: set[int], ended: subprocess.CompletedProcess[str], code: int, text: str) -> None:
    """One message, the exit code, no process left on either machine."""
    said = ended.stdout + ended.stderr
    assert ended.returncode == code, said
    assert said.count(text) == 1, said
    assert said.count("train.sh: ") == 1, "one message"
    assert "Traceback" not in said
    end = time.monotonic() + 100
    while pair.running() - before:
        assert time.monotonic() < end, "something was left behind"
        time.sleep(0.1)


@two_machines
@pytest.mark.parametrize(
    ("name", "hosts", "code", "text"),
    [
        ("unreachable host", FIRST + "10.77.0.9 slots=1\n", 4, "machine 10.77.0.9 cannot be reached"),
        ("duplicate host", FIRST + SECOND + SECOND, 2, "line 3: 10.77.0.2 is named twice"),
        (
            "slots that do not divide the batch",
            FIRST + "10.77.0.2 slots=2\n",
            2,
            "legal numbers of ranks: [1, 2, 4, 8]",
        ),
    ],
)
def test_hostfiles_that_do_not_fit(pair: Pair, tmp_path: Path, name: str, hosts: str, code: int, text: str) -> None:
    before = pair.running()
    refused(pair, before, start(pair, tmp_path, hosts), code, text)
    assert not (tmp_path / "run").exists()


def test_more_slots_than_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "count_gpus", lambda: 2)
    monkeypatch.setattr(cluster, "LocalNode", lambda *words: pytest.fail("a rank was started"))
    (tmp_path / "hosts").write_text("127.0.0.1 slots=4\n")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(tmp_path / "run", tmp_path)))
    assert program.main(["--hostfile", str(tmp_path / "hosts"), str(tmp_path / "run.yaml")]) == 2
    assert capsys.readouterr().err.count("127.0.0.1 has 2 GPUs, the hostfile gives it slots=4") == 1


@two_machines
@pytest.mark.parametrize("node", [0, 1])
def test_a_port_in_use_on_the_first_machine(pair: Pair, tmp_path: Path, node: int) -> None:
    """Whether the first machine of the file is this one or another."""
    listen = "import socket, time; s = socket.create_server(('', 29411)); print('there', flush=True); time.sleep(600)"
    taken = subprocess.Popen([*pair.inside(node), sys.executable, "-c", listen], stdout=subprocess.PIPE)
    try:
        assert taken.stdout is not None
        assert taken.stdout.readline() == b"there\n"
        hosts = FIRST + SECOND if node == 0 else SECOND + FIRST
        before = pair.running()
        ended = start(pair, tmp_path, hosts, "--master-port", "29411")
        refused(pair, before, ended, 4, "port 29411 of this machine cannot be used: Address already in use")
        assert (f"10.77.0.{node + 1}: port" in ended.stderr) == (node == 1)
        assert not (tmp_path / "run").exists()
    finally:
        taken.kill()
        taken.wait()


def other_machine(pair: Pair, monkeypatch: pytest.MonkeyPatch, directory: Path, old: str, new: str) -> None:
    """Have the second machine do `new` instead of `old` when its agent is started."""
    shell = directory / "ssh-bin"
    shell.mkdir()
    (shell / "ssh").write_text(
        f"#!{sys.executable} -S\nimport os, sys\nwords = sys.argv[1:]\n"
        f"words[-1] = words[-1].replace({old!r}, {new!r}, 1)\n"
        f"os.execv({str(pair.bin / 'ssh')!r}, ['ssh', *words])\n"
    )
    (shell / "ssh").chmod(0o755)
    monkeypatch.setattr(Pair, "path", f"{shell}:{pair.path}")


@two_machines
def test_another_code_on_the_other_machine(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Path(ardist.__file__).parent
    shutil.copytree(ours, tmp_path / "older" / "ardist", ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path / "older" / "ardist" / "events.py", "a") as file:
        file.write("# one line more\n")
    other_machine(pair, monkeypatch, tmp_path, "exec ", f"PYTHONPATH={tmp_path / 'older'} exec ")
    before = pair.running()
    refused(pair, before, start(pair, tmp_path, FIRST + SECOND), 2, "10.77.0.2 has another code: ")
    assert not (tmp_path / "run").exists()


@two_machines
def test_another_configuration_on_the_other_machine(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    values = settings(tmp_path / "run", tmp_path, training__steps=21, launch={"node_seconds": 60})
    (tmp_path / "there" / "run.yaml").write_text(yaml.safe_dump(values))
    other_machine(pair, monkeypatch, tmp_path, f"cd {tmp_path}", f"cd {tmp_path}/there")
    before = pair.running()
    refused(pair, before, start(pair, tmp_path, FIRST + SECOND), 2, "10.77.0.2 has another config: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_directory_that_another_job_holds(tmp_path: Path) -> None:
    holder = RunDirectory(tmp_path / "run")
    holder.make()
    holder.lock()
    values = settings(tmp_path / "run", write_latents(tmp_path / "latents"), training__steps=2)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    words = [str(SCRIPT), "--launcher", "plain", "--ranks", "2", str(tmp_path / "run.yaml")]
    job = subprocess.run(words, capture_output=True, text=True, timeout=280, check=False)
    holder.unlock()
    assert job.returncode == 2, job.stderr
    assert job.stderr.count(f"ardist train: another job is running in {tmp_path / 'run'}: ") == 1
    assert f'"host": "{socket.gethostname()}", "pid": {os.getpid()}' in job.stderr
    assert "Traceback" not in job.stderr
    assert not list((tmp_path / "run").glob("launches.jsonl")), "nothing is written into the other job's book"
    assert not [line for line in command_lines() if str(tmp_path / "run.yaml").encode() in line], "no rank is left"


def command_lines() -> Iterator[bytes]:
    """Of all processes, of which some end while they are looked at."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield path.read_bytes()
