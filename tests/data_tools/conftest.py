"""Videos, servers and a short way to build for the data tools' tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "storage"))

from dt_videos import make_video
from s3_servers import BUCKET, S3Server, server_kind, start_server

from ardist import fault
from ardist.events import events


@pytest.fixture(autouse=True)
def _clean_counters() -> None:
    events.clear()
    fault._visits.clear()


@pytest.fixture(scope="session")
def three_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three good videos of 12 frames: nine clips of four."""
    folder = tmp_path_factory.mktemp("three")
    make_video(folder / "a.mp4")
    make_video(folder / "sub" / "b.mkv", pattern="testsrc")
    make_video(folder / "c.mp4", pattern="smptebars")
    return folder


@pytest.fixture
def in_child() -> Callable[[Callable[[], Any], str], int]:
    """Run a function in a forked child with a fault planned; returns the exit status (-9: killed)."""

    def run(function: Callable[[], Any], planned: str) -> int:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.environ[fault.VARIABLE] = planned
                fault._visits.clear()
                function()
                status = 0
            except BaseException as error:  # noqa: BLE001 - the child must not run the parent's test session
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
            finally:
                os._exit(status)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    return run


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Ceph where it is installed, else moto; ARDIST_TEST_S3=moto|ceph decides otherwise."""
    with start_server(server_kind()[0], tmp_path_factory.mktemp("s3")) as server:
        before = dict(os.environ)
        os.environ.update(server.environment())
        import boto3

        boto3.client("s3").create_bucket(Bucket=BUCKET)
        os.environ.clear()
        os.environ.update(before)
        yield server


@pytest.fixture
def s3_url(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """An empty prefix, with the environment pointing at the server."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{abs(hash(request.node.nodeid)):x}-{os.getpid()}"
