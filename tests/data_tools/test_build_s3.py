"""The same build, with videos and dataset on an S3 server over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dt_builds import build_small
from s3_servers import FaultProxy, S3Server

from ardist.data.manifest import load_manifest
from ardist.errors import ConfigError
from ardist.storage import Storage, open_storage
from data_tools.cli import main
from data_tools.lease import Pace
from data_tools.verify import verify

Child = Callable[[Callable[[], Any], str], int]


@pytest.fixture(scope="module")
def digest(three_videos: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Manifest digest of the same videos built locally."""
    return build_small(three_videos, tmp_path_factory.mktemp("local") / "out").manifest.digest()


def _upload(folder: Path, url: str) -> Storage:
    storage = open_storage(url)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            storage.put(path.relative_to(folder).as_posix(), path)
    return storage


def test_from_s3_to_s3_is_the_local_dataset(three_videos: Path, s3_url: str, digest: str) -> None:
    source = _upload(three_videos, f"{s3_url}/videos")
    source.put("readme.txt", b"not a video")
    summary = build_small(f"{s3_url}/videos", f"{s3_url}/out")
    assert summary.manifest.digest() == digest
    assert load_manifest(f"{s3_url}/out") == summary.manifest
    assert not verify(f"{s3_url}/out").problems
    assert build_small(f"{s3_url}/videos", f"{s3_url}/out").reused
    names = {name.split("/")[0] for name in open_storage(f"{s3_url}/out").list()}
    assert not names & {"leases", "probes", "listing.jsonl"}


def test_a_single_object_and_a_replaced_one(three_videos: Path, s3_url: str, tmp_path: Path, in_child: Child) -> None:
    storage = _upload(three_videos, f"{s3_url}/videos")
    assert build_small(f"{s3_url}/videos/a.mp4", tmp_path / "one").manifest.num_samples == 3
    assert in_child(lambda: build_small(f"{s3_url}/videos", tmp_path / "all"), "kill@build.after_plan") == -9
    storage.put("a.mp4", three_videos / "c.mp4")
    storage.delete("c.mp4")
    summary = build_small(f"{s3_url}/videos", tmp_path / "all")
    assert summary.manifest.num_samples == 3
    assert summary.reasons == "3 x changed, 3 x vanished"


def test_other_parameters_and_empty_prefixes(three_videos: Path, s3_url: str) -> None:
    build_small(three_videos, f"{s3_url}/out")
    with pytest.raises(ConfigError, match="stride: built with 4, asked for 2"):
        build_small(three_videos, f"{s3_url}/out", stride=2)
    with pytest.raises(ConfigError, match="no video found"):
        build_small(f"{s3_url}/nothing", f"{s3_url}/out2")
    with pytest.raises(ConfigError, match="bucket does not exist"):
        build_small("s3://no-such-bucket-anywhere/x", f"{s3_url}/out2")
    assert not list(open_storage(f"{s3_url}/out2").list())


def test_a_server_without_conditional_writes_is_refused(
    three_videos: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ardist.storage.s3 import S3Storage

    monkeypatch.setattr(S3Storage, "create", lambda self, name, data: self.put(name, data) or True)
    assert main(["build", "--videos", str(three_videos), "--out", f"{s3_url}/out", "--num-frames", "4"]) == 4
    assert "does not honour conditional writes" in capsys.readouterr().err
    assert not list(open_storage(f"{s3_url}/out").list())


def test_through_a_bad_network(
    three_videos: Path, s3_url: str, s3_server: S3Server, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fault of a network, one request in four: the same dataset, and every repeat counted."""
    _upload(three_videos, f"{s3_url}/videos")
    proxy = FaultProxy(s3_server.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.start())
    monkeypatch.setattr("ardist.storage.retry.time.sleep", lambda seconds: None)
    faults = ["500", "503", "reset", "lost", "429", "html"]
    proxy.script = [("*", faults[n // 4 % len(faults)] if n % 4 == 3 else "") for n in range(400)]
    # A lost answer may also be given as a body that breaks.
    proxy.script += [("GET", "short")] * 3
    summary = build_small(f"{s3_url}/videos", f"{s3_url}/out")
    struck = sum(bool(fault) for _, _, fault in proxy.seen)
    proxy.script.clear()
    assert summary.manifest.digest() == digest
    assert struck > 10
    assert summary.events["storage.retry"] >= struck // 2
    assert not verify(f"{s3_url}/out").problems
    proxy.stop()


def test_workers_and_a_kill(three_videos: Path, s3_url: str, digest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARDIST_FAULT", "kill@build.before_commit#2")
    pace = Pace(lease_seconds=2.0, poll_seconds=0.05)
    summary = build_small(three_videos, f"{s3_url}/out", workers=2, start_method="fork", pace=pace)
    assert summary.manifest.digest() == digest
    assert not verify(f"{s3_url}/out").problems
