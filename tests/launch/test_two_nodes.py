"""Two machines joined by a cable: words arrive intact, a machine that is cut off is named, replaced by what is left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import settings
from two_nodes import Pair, possible, two_nodes

from ardist.training import goodput

HERE = Path(__file__).parent
REASON = possible()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
ODD = ['tracking.name="it\'s $(not) a `shell`; & | > * ?"', "tracking.project='two  blanks'"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with two_nodes(tmp_path_factory.mktemp("machines")) as machines:
        yield machines


def start(
    pair: Pair, directory: Path, hosts: str, *overrides: str, steps: int = 12, **limits: Any
) -> subprocess.Popen[str]:
    """The supervisor on the first machine, with toy ranks on both. Only where a machine is cut off must it be silent
    for no longer than a test can wait."""
    (directory / "run").mkdir()
    config, hostfile = directory / "a config.yaml", directory / "host file"
    quick = {"heartbeat_seconds": 60, "node_seconds": 60, "restart_pause_seconds": 0.05}
    config.write_text(
        yaml.safe_dump(settings(directory / "run", directory, training__steps=steps, launch={**quick, **limits}))
    )
    hostfile.write_text(hosts)
    words = [*pair.inside(0), sys.executable, str(HERE / "job_program.py"), "--hostfile", str(hostfile)]
    words += [str(config), *overrides]
    environment = {**os.environ, "PATH": pair.path, "PYTHONPATH": f"{HERE}:{HERE.parents[1]}", "ARDIST_TOKEN": "a b'c"}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(process: subprocess.Popen[str], seconds: float = 200) -> str:
    """The output, after an end in time; without orphans."""
    output, _ = process.communicate(timeout=seconds)
    return output


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def toy_ranks(pair: Pair) -> list[int]:
    """Those that run on the two machines: other jobs of this computer are not looked at."""
    found = []
    for pid in pair.running():
        with contextlib.suppress(OSError):  # it ended meanwhile
            if b"toy_words" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                found.append(pid)
    return found


def test_words_and_environment_arrive_intact_on_both(pair: Pair, tmp_path: Path) -> None:
    before = pair.running()
    process = start(pair, tmp_path, "10.77.0.1 slots=1\n10.77.0.2 slots=1\n", *ODD)
    output = finish(process)
    assert process.returncode == 0, output
    for rank in range(2):
        told = json.loads((tmp_path / "run" / f"told-{rank}.json").read_text())
        assert told["words"] == [str(tmp_path / "a config.yaml"), *ODD]
        assert told["environment"]["WORLD_SIZE"] == "2"
        assert told["environment"]["MASTER_ADDR"] == "10.77.0.1"
        assert told["environment"]["GLOO_SOCKET_IFNAME"] == "veth0"
        assert told["environment"]["ARDIST_TOKEN"] == "a b'c"
    wait_for(lambda: not pair.running() - before)


def test_a_machine_cut_off_is_named_and_the_rest_goes_on(pair: Pair, tmp_path: Path) -> None:
    before = pair.running()
    process = start(pair, tmp_path, "10.77.0.1 slots=1\n10.77.0.2 slots=1\n", steps=400, node_seconds=6)
    wait_for(lambda: (tmp_path / "run" / "saved").exists())
    pair.cut()
    try:
        output = finish(process)
        wait_for(lambda: not pair.running() - before)
    finally:
        pair.mend()
    assert process.returncode == 0, output
    [row] = goodput.restarts(goodput.read(tmp_path / "run"))
    assert row["cause"] == "cut off"
    assert "machine 10.77.0.2 gave no sign of life" in row["detail"]
    assert 6 <= row["detect_seconds"] < 60, "by the silence of the machine, before a rank is missed"
    assert "this attempt runs on 1 of 2 machines: 10.77.0.1 slots=1" in output
    history = [int(line) for line in (tmp_path / "run" / "history").read_text().split()]
    assert history[-1] == 400


def test_a_machine_that_is_back_takes_part_from_the_next_restart_on(pair: Pair, tmp_path: Path) -> None:
    before = pair.running()
    run = tmp_path / "run"
    process = start(pair, tmp_path, "10.77.0.1 slots=1\n10.77.0.2 slots=1\n", steps=4000, node_seconds=6)
    wait_for(lambda: (run / "saved").exists())
    pair.cut()
    try:
        wait_for(lambda: ends(run) == 1 and first_steps(run) == 2)
    finally:
        pair.mend()
    for path in (run / "told-1.json", run / "at-1"):
        path.unlink()
    time.sleep(1)
    assert ends(run) == 1, "a machine that is back is no reason to disturb the job"
    assert not (run / "told-1.json").exists()
    [alone] = toy_ranks(pair)
    os.kill(alone, signal.SIGKILL)
    wait_for(lambda: ends(run) == 2 and first_steps(run) == 3)
    told = json.loads((run / "told-1.json").read_text())
    assert told["environment"]["WORLD_SIZE"] == "2", "the machine takes part again"
    process.terminate()
    output = finish(process)
    assert process.returncode == 75, output
    assert output.count("this attempt runs on 1 of 2 machines") == 1
    records = [record for record in goodput.read(run) if record["event"] == "first_step"]
    assert [record["ranks"] for record in records] == [2, 1, 2]
    wait_for(lambda: not pair.running() - before)


def ends(run: Path) -> int:
    """Attempts that have failed so far."""
    return len([record for record in goodput.read(run) if record["event"] == "end"])


def first_steps(run: Path) -> int:
    """Attempts that have made a step so far."""
    return len([record for record in goodput.read(run) if record["event"] == "first_step"])


def test_a_machine_that_is_not_there_is_refused(pair: Pair, tmp_path: Path) -> None:
    before = pair.running()
    process = start(pair, tmp_path, "10.77.0.1 slots=1\n10.77.0.9 slots=1\n")
    output = finish(process)
    assert process.returncode == 4
    assert "machine 10.77.0.9 cannot be reached" in output
    assert "Traceback" not in output
    wait_for(lambda: not pair.running() - before)
