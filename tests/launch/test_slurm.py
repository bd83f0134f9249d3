"""launchers/slurm/train.sbatch under a queue that behaves as Slurm's: directives, signals, requeue, the same job id."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import settings, tiny_config

from ardist.errors import HardwareError
from ardist.launch import requeue

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SCRIPT = ROOT / "launchers" / "slurm" / "train.sbatch"

QUEUE = f"""#!{sys.executable}
# sbatch: runs a script now, in the foreground, again whenever it was requeued.
import os, pathlib, psutil, re, signal, subprocess, sys, threading, time
script, words = sys.argv[1], sys.argv[2:]
options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", pathlib.Path(script).read_text(), re.M))
shell, name, before = re.fullmatch(r"(B:)?(\\w+)@(\\d+)", options["signal"]).groups()
state = pathlib.Path(os.environ["QUEUE"])
limits = [float(text) for text in os.environ["LIMITS"].split()]
for count in range(9):
    environment = {{**os.environ, "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_SUBMIT_DIR": os.getcwd(), "SLURM_RESTART_COUNT": str(count), "SLURM_GPUS_ON_NODE": "1"}}
    copy = state / "spooled-script"  # Slurm runs a copy, never the file itself
    copy.write_bytes(pathlib.Path(script).read_bytes()); copy.chmod(0o755)
    job = subprocess.Popen([str(copy), *words], env=environment, start_new_session=True)
    def end(limit):
        if limit < 0:  # scancel: to every process of every step, and to the batch shell
            for step in (state / "steps").read_text().split():
                for process in [*psutil.Process(int(step)).children(recursive=True), psutil.Process(int(step))]:
                    process.send_signal(signal.SIGTERM)
            time.sleep(float(os.environ["BATCH_LATER"]))
            job.send_signal(signal.SIGTERM)
        elif "BREAK" in os.environ:  # one rank cannot save, and dies of it
            [rank, *_] = [process for step in (state / "steps").read_text().split()
                for process in psutil.Process(int(step)).children(recursive=True) if "toy_words" in process.cmdline()]
            rank.suspend()
            job.send_signal(signal.SIGUSR1)
            # Only when the other one was asked to stop is this no failure of before.
            while job.poll() is None and not list(pathlib.Path(os.environ["RUN"]).glob("asked-*")): time.sleep(0.02)
            rank.kill()
        else:  # the time limit comes near: to the batch shell alone, as B: says
            job.send_signal(getattr(signal, "SIG" + name)) if shell else os.killpg(job.pid, signal.SIGUSR1)
    def watch(limit=limits[count] if count < len(limits) else None):
        wanted = abs(limit) if limit is not None else None
        while wanted is not None and job.poll() is None:
            try: now = int((pathlib.Path(os.environ["RUN"]) / "saved").read_text())
            except (OSError, ValueError): now = 0
            if now >= wanted and not (pathlib.Path(os.environ["RUN"]) / "fault-0").exists(): return end(limit)
            time.sleep(0.02)
    threading.Thread(target=watch, daemon=True).start()
    code = job.wait()
    with open(state / "codes", "a") as file: file.write(f"{{code}}\\n")
    if not (state / "requeued").exists(): sys.exit(code)
    (state / "requeued").unlink()
"""

CONTROL = f"""#!{sys.executable}
# scontrol: show hostnames, requeue.
import os, pathlib, re, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    name, first, last = re.fullmatch(r"(\\w+)\\[(\\d+)-(\\d+)\\]", sys.argv[3]).groups()
    for number in range(int(first), int(last) + 1): print(f"{{name}}{{number}}")
elif sys.argv[1] == "requeue":
    (pathlib.Path(os.environ["QUEUE"]) / "requeued").write_text(sys.argv[2])
else: sys.exit(f"scontrol: unknown {{sys.argv[1:]}}")
"""

RUN = f"""#!{sys.executable}
# srun: one task on one machine of the allocation, with standard input; signals go to the task.
import os, pathlib, sys
start = next(index for index, word in enumerate(sys.argv) if index and not word.startswith("--"))
options, words = sys.argv[1:start], sys.argv[start:]
assert "--overlap" in options and "--ntasks=1" in options, options
[node] = [word.partition("=")[2] for word in options if word.startswith("--nodelist=")]
assert node in ("node0", "node1"), node
with open(pathlib.Path(os.environ["QUEUE"]) / "tasks", "a") as file: file.write(node + "\\n")
with open(pathlib.Path(os.environ["QUEUE"]) / "steps", "a") as file: file.write(f"{{os.getpid()}}\\n")
os.execvp(words[0], words)
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tools = tmp_path / "bin"
    tools.mkdir()
    python = f'#!/bin/sh\nshift 2\nexec {sys.executable} {HERE}/job_program.py "$@"\n'
    programs = {"sbatch": QUEUE, "scontrol": CONTROL, "srun": RUN, "python-of-the-test": python}
    for name, text in programs.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tmp_path / "queue").mkdir()
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHON", str(tools / "python-of-the-test"))
    monkeypatch.setenv("PYTHONPATH", f"{HERE}:{ROOT}")
    monkeypatch.setenv("QUEUE", str(tmp_path / "queue"))
    monkeypatch.setenv("RUN", str(tmp_path / "the run"))
    return tmp_path


def submit(slurm: Path, limits: str, steps: int, later: float = 0.0) -> subprocess.CompletedProcess[str]:
    """sbatch with a word that no shell may touch; `limits`: steps at which USR1 comes (negative: TERM, to the
    batch shell `later` seconds after the steps). The ranks wait for it after step 8."""
    config = slurm / "a config.yaml"
    launch = {"heartbeat_seconds": 60, "node_seconds": 60}
    config.write_text(yaml.safe_dump(settings(slurm / "the run", slurm, training__steps=steps, launch=launch)))
    (slurm / "the run").mkdir(exist_ok=True)
    (slurm / "the run" / "fault-0").write_text("8 hold")
    return subprocess.run(
        ["sbatch", str(SCRIPT), str(config), 'tracking.name="it\'s $HOME"'],
        cwd=ROOT,
        env={**os.environ, "LIMITS": limits, "BATCH_LATER": str(later)},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def test_the_time_limit_saves_and_requeues_until_the_run_is_done(slurm: Path) -> None:
    done = submit(slurm, "5", 60)
    assert done.returncode == 0, done.stderr
    assert (slurm / "queue" / "codes").read_text().split() == ["75", "0"]
    assert "back into the queue as job 4711" in done.stdout
    assert set((slurm / "queue" / "tasks").read_text().split()) == {"node0", "node1"}
    history = [int(step) for step in (slurm / "the run" / "history").read_text().split()]
    assert history == list(range(1, 61)), "no step was lost and none was made twice"
    told = [json.loads((slurm / "the run" / f"told-{rank}.json").read_text()) for rank in range(2)]
    assert all(one["words"][-1] == 'tracking.name="it\'s $HOME"' for one in told)


@pytest.mark.parametrize("later", [0.0, 0.5])
def test_a_cancelled_job_saves_and_is_not_requeued(slurm: Path, later: float) -> None:
    done = submit(slurm, "-5", 400, later)
    assert done.returncode == 75, done.stderr
    assert (slurm / "queue" / "codes").read_text().split() == ["75"]
    assert int((slurm / "the run" / "saved").read_text()) >= 5


@pytest.mark.parametrize(("checkpoint", "before"), [(True, 1), (True, 10), (False, 0)])
def test_a_failure_at_the_time_limit_is_requeued_with_a_checkpoint_only_and_not_for_ever(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: bool, before: int
) -> None:
    monkeypatch.setenv("BREAK", "1")
    if checkpoint:
        (slurm / "the run" / "checkpoints" / "step-00000005").mkdir(parents=True)
        (slurm / "the run" / requeue.FILE).write_text(before * '{"step": 5, "time": 0.0}\n')
    checkpoint = checkpoint and before < 10  # launch.max_restarts
    done = submit(slurm, "5", 60)
    first, *later = (slurm / "queue" / "codes").read_text().split()
    assert first == "4"
    # What a toy rank announced holds for its next start too: it may leave once more before it is done.
    assert later in ([["0"], ["75", "0"]] if checkpoint else [[]])
    assert done.returncode == (0 if checkpoint else 4), done.stderr
    assert ("not saved, but there is an earlier checkpoint" in done.stdout) == checkpoint


def test_failed_jobs_without_a_new_checkpoint_are_counted(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tmp_path, launch={"max_restarts": 2})
    assert not requeue.may_requeue(config), "there is nothing to go on from"
    (tmp_path / "checkpoints" / "step-00000005").mkdir(parents=True)
    assert [requeue.may_requeue(config) for _ in range(3)] == [True, True, False]
    (tmp_path / "checkpoints" / "step-00000009").mkdir()
    assert [requeue.may_requeue(config) for _ in range(3)] == [True, True, False]
    (tmp_path / requeue.FILE).unlink()
    (tmp_path / requeue.FILE).mkdir()
    with pytest.raises(HardwareError, match="cannot be seen or noted"):
        requeue.may_requeue(config)


def test_without_arguments_it_says_how(slurm: Path) -> None:
    done = subprocess.run([str(SCRIPT)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "usage: sbatch" in done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_all_launch_scripts_are_clean() -> None:
    scripts = [ROOT / "launchers" / "train.sh", SCRIPT]
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout
