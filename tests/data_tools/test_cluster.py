"""Many kinds of workers on one plan: tasks of Slurm arrays, ranks of torchrun, actors of Ray."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from dt_builds import SMALL, build_small
from dt_videos import make_video

from ardist.data.manifest import load_manifest
from ardist.errors import ConfigError, HardwareError
from ardist.events import events
from data_tools.cli import main
from data_tools.cluster import ClusterTask, cluster_task
from data_tools.lease import Pace, worker_name
from data_tools.shard import ShardSettings
from data_tools.verify import verify

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install 'ardist[ray]'"
)
ON_RAY: dict[str, Any] = {
    "samples_per_shard": 2,
    "pace": Pace(lease_seconds=5.0, poll_seconds=0.05),
    "shard": ShardSettings(decoders=1),
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos: twenty-four clips, twelve shards of two."""
    folder = tmp_path_factory.mktemp("cluster")
    for number, pattern in enumerate(("testsrc", "testsrc2", "smptebars")):
        make_video(folder / f"{number}.mp4", frames=32, pattern=pattern)
    return folder


@pytest.fixture(scope="module")
def alone(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the manifest that one worker makes."""
    return build_small(videos, tmp_path_factory.mktemp("alone") / "out", samples_per_shard=2).manifest.digest()


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A Ray cluster of two machines, as far as Ray can tell: each has its own raylet; three places."""
    environment = dict(os.environ)
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - 15 by default, which starves on a busy machine
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    os.environ.clear()
    os.environ.update(environment)
    ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def _workers(out: Path) -> set[str]:
    """Those that committed."""
    return {json.loads(path.read_text())["worker"] for path in (out / "commits").glob("*.json")}


def _authors(out: Path) -> set[str]:
    """Kinds of the workers that committed, without their numbers."""
    return {name.partition("@")[0].rstrip("0123456789") if "@" in name else "plain" for name in _workers(out)}


def _task(videos: Path, out: Path, *words: str, **environment: str) -> subprocess.Popen[bytes]:
    """The command line as a task of a cluster job would run it."""
    base = [sys.executable, "-m", "data_tools", "build", "--videos", str(videos), "--out", str(out), "--worker"]
    for name, value in {**SMALL, "samples_per_shard": 2}.items():
        base += [f"--{name.replace('_', '-')}", str(value)]
    # A shard takes long enough that nobody can do all before the others have begun.
    slow = {"ARDIST_FAULT": "sleep@build.shard_started:1.0"}
    return subprocess.Popen([*base, "--decoders", "1", *words], env={**os.environ, **slow, **environment})


def test_what_the_environment_says() -> None:
    assert cluster_task({}) is None
    assert cluster_task({"SLURM_ARRAY_TASK_ID": "12", "SLURM_LOCALID": "0"}) == ClusterTask("slurm12", 0)
    assert cluster_task({"SLURM_PROCID": "5", "SLURM_LOCALID": "1"}) == ClusterTask("proc5", 1)
    assert cluster_task({"RANK": "9", "LOCAL_RANK": "3", "WORLD_SIZE": "16"}) == ClusterTask("rank9", 3)
    both = {"SLURM_ARRAY_TASK_ID": "2", "RANK": "1", "LOCAL_RANK": "1", "SLURM_LOCALID": "0"}
    assert cluster_task(both) == ClusterTask("slurm2-rank1", 1)
    with pytest.raises(ConfigError, match="RANK='one' in the environment is not the number of a task"):
        cluster_task({"RANK": "one"})


def test_a_workers_name_tells_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    assert worker_name().startswith("slurm7@")
    assert worker_name("ray3").startswith("ray3@")


def test_slurm_tasks_and_torchrun_ranks_share_a_plan(videos: Path, alone: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    gate = tmp_path / "gate"  # nobody makes a second shard before all have made their first
    planned = {"ARDIST_FAULT": f"wait@build.shard_started#2:{gate}"}
    tasks = [_task(videos, out, SLURM_ARRAY_TASK_ID=str(n), SLURM_LOCALID="0", **planned) for n in range(2)]
    tasks.append(_task(videos, out, RANK="0", LOCAL_RANK="0", **planned))
    while len(_workers(out)) < 3:
        assert [task.poll() for task in tasks] == [None] * 3
        time.sleep(0.05)
    gate.touch()
    assert [task.wait(240) for task in tasks] == [0, 0, 0]
    assert load_manifest(out).digest() == alone
    assert _authors(out) == {"slurm", "rank"}
    assert not verify(str(out)).problems
    logs = sorted(path.name.partition("@")[0] for path in out.glob("build-log-*.jsonl"))
    assert logs == ["build-log-rank0", "build-log-slurm0", "build-log-slurm1"]


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_kinds_at_once(ray: Any, videos: Path, alone: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tasks = [_task(videos, out, SLURM_ARRAY_TASK_ID="0"), _task(videos, out, RANK="0", LOCAL_RANK="0")]
    summary = build_small(videos, out, executor="ray", workers=2, **ON_RAY)
    assert [task.wait(240) for task in tasks] == [0, 0]
    assert summary.manifest.digest() == load_manifest(out).digest() == alone
    assert "ray" in _authors(out)
    assert len(_authors(out)) >= 2
    assert not verify(str(out)).problems


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ray_actors_make_the_dataset_of_one(ray: Any, videos: Path, alone: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = build_small(videos, out, executor="ray", workers=3, **ON_RAY)
    assert summary.manifest.digest() == alone
    assert _authors(out) == {"ray"}
    assert not verify(str(out)).problems
    assert not list(out.glob(".tmp-*"))


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_actor_is_replaced(ray: Any, videos: Path, alone: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed: list[int] = []

    def kill_the_first_owner() -> None:
        deadline = time.monotonic() + 300
        while not killed and time.monotonic() < deadline:
            for path in (out / "leases").glob("0*.json"):
                with contextlib.suppress(OSError, ValueError):
                    owner = json.loads(path.read_text())
                    os.kill(owner["pid"], signal.SIGKILL)
                    killed.append(owner["pid"])
                    return
            time.sleep(0.01)

    killer = threading.Thread(target=kill_the_first_owner)
    killer.start()
    summary = build_small(videos, out, executor="ray", workers=1, **ON_RAY)
    killer.join()
    assert len(killed) == 1
    assert summary.manifest.digest() == alone
    assert summary.events["build.worker_died"] == 1
    assert not verify(str(out)).problems


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_machines_join_and_are_lost(ray: Any, videos: Path, alone: str, tmp_path: Path) -> None:
    """An actor that no machine can hold waits, says so, and begins where one joins; with that one lost, on the next."""
    out = tmp_path / "out"
    options = {**ON_RAY, "shard": ShardSettings(decoders=5)}
    halted: list[int] = []
    with ThreadPoolExecutor(1) as pool:  # Ray starts machines in the main thread only
        building = pool.submit(build_small, videos, out, executor="ray", workers=1, **options)
        while "build.ray_waits" not in events.snapshot() and not building.done():
            time.sleep(0.01)
        first = ray.add_node(num_cpus=5)
        while not halted and not building.done():
            for path in (out / "leases").glob("0*.json"):
                with contextlib.suppress(OSError, ValueError):
                    owner = json.loads(path.read_text())["pid"]
                    os.kill(owner, signal.SIGSTOP)  # so that nothing more comes of it, however long a removal takes
                    halted.append(owner)
                    break
            time.sleep(0.01)
        ray.remove_node(first, allow_graceful=False)
        ray.add_node(num_cpus=5)
        summary = building.result()
    assert len(halted) == 1
    with contextlib.suppress(ProcessLookupError):
        os.kill(halted[0], signal.SIGKILL)
    assert summary.manifest.digest() == alone
    assert summary.events["build.ray_waits"] >= 1
    # The actor in its place may still be sent to the machine that is going, where it never begins.
    assert 1 <= summary.events["build.worker_died"] <= 2
    assert _authors(out) == {"ray"}
    assert not verify(str(out)).problems


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_actors_error_reaches_the_user(ray: Any, videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert _task(videos, out, ARDIST_FAULT="kill@build.after_plan").wait(240) == -9
    shutil.rmtree(out / "leases")
    (out / "leases").write_text("in the way")
    with pytest.raises(HardwareError, match="leases is not a plain folder"):
        build_small(videos, out, executor="ray", workers=2, **ON_RAY)


@needs_ray
def test_without_a_cluster(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("RAY_gcs_rpc_server_connect_timeout_s", "1")

    def refuse(**_: object) -> None:
        raise ConnectionError("nobody there")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(HardwareError, match="start one with 'ray start --head' or set RAY_ADDRESS"):
        build_small(videos, tmp_path / "out", executor="ray")


def test_unknown_executor_and_absent_ray(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["build", "--videos", str(videos), "--out", str(tmp_path / "out")]
    assert main([*base, "--executor", "dask"]) == 2
    assert "legal: local, ray" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([*base, "--executor", "ray", "--num-frames", "4", "--size", "16"]) == 4
    assert "pip install 'ardist[ray]'" in capsys.readouterr().err
