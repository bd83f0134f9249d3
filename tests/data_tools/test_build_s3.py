"""The same build, with videos and dataset on an S3 server over HTTP."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dt_builds import build_small, samples
from s3_servers import FaultProxy, S3Server

from ardist.data.manifest import load_manifest
from ardist.errors import ConfigError, DataError
from ardist.events import events
from ardist.storage import Storage, StorageError, open_storage
from data_tools.build import Summary
from data_tools.cli import main
from data_tools.fetch import local_copy
from data_tools.lease import Pace
from data_tools.reasons import Refusal
from data_tools.sources import SourceRoot
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


@pytest.fixture
def proxy(s3_server: S3Server, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Between the builder and the server, without a script so far."""
    between = FaultProxy(s3_server.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", between.start())
    yield between
    between.stop()


def _in_parts(url: str, name: str, path: Path) -> None:
    """Store a file as an upload of one part: its ETag is then not the MD5 of its bytes."""
    import boto3

    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    client, where = boto3.client("s3"), {"Bucket": bucket, "Key": f"{prefix}/{name}"}
    upload = client.create_multipart_upload(**where)["UploadId"]
    part = client.upload_part(Body=path.read_bytes(), PartNumber=1, UploadId=upload, **where)
    parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    client.complete_multipart_upload(UploadId=upload, MultipartUpload=parts, **where)
    assert "-1" in client.head_object(**where)["ETag"]


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


# A passing fetch is "", one with a wrong byte in its frames "flip/…"; the first fetch is the probe's.
@pytest.mark.parametrize(
    ("in_parts", "faults"),
    [
        (False, ["flip/1500"]),
        (False, ["flip/1500", "noise"]),
        (False, ["", "flip/1500"]),
        (False, ["", "noise", "flip/1500"]),
        (True, ["noise"]),
        (True, ["noise", "", "flip/1500"]),
        (True, ["", "flip/1500"]),
    ],
)
def test_wrong_bytes_of_a_source_are_fetched_again(
    three_videos: Path, s3_url: str, proxy: FaultProxy, digest: str, tmp_path: Path, in_parts: bool, faults: list[str]
) -> None:
    _upload(three_videos, f"{s3_url}/videos")
    if in_parts:
        _in_parts(f"{s3_url}/videos", "a.mp4", three_videos / "a.mp4")
    proxy.script = [("GET:/videos/a.mp4", fault) for fault in faults]
    summary = build_small(f"{s3_url}/videos", tmp_path / "out")
    assert not proxy.script
    assert not summary.refused_videos + summary.refused_clips, summary.reasons
    assert summary.manifest.digest() == digest
    assert events.snapshot()["build.wrong_bytes"] == sum(bool(fault) for fault in faults)


def test_other_bytes_than_those_that_were_probed_are_refused(
    three_videos: Path, s3_url: str, proxy: FaultProxy, tmp_path: Path
) -> None:
    """What no fetch gives any more cannot be built, and a good ETag does not make it so."""
    _upload(three_videos, f"{s3_url}/videos")
    proxy.script = [("GET:/videos/a.mp4", fault) for fault in ("", *["flip/1500"] * 20)]
    summary = build_small(f"{s3_url}/videos", tmp_path / "out")
    assert summary.reasons == "3 x changed"
    assert summary.manifest.num_samples == 6
    proxy.script = [("GET:/videos/a.mp4", f"flip/{1500 + number}") for number in range(4)]
    summary = build_small(f"{s3_url}/videos", tmp_path / "other")
    assert summary.reasons == "1 x changed"
    assert summary.manifest.num_samples == 6


def test_etags_that_are_no_md5(
    three_videos: Path, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encrypted objects have ETags that look like one: two fetches that agree are believed."""
    _upload(three_videos, f"{s3_url}/videos")
    monkeypatch.setattr("data_tools.fetch._md5_of", lambda path: "0" * 32)
    summary = build_small(f"{s3_url}/videos", tmp_path / "out", probers=1)
    assert summary.manifest.num_samples == 9
    assert 1 <= events.snapshot()["build.wrong_bytes"] <= 2  # those that were under way together


@pytest.mark.parametrize("code", ["403/InvalidObjectState", "403/AccessDenied", "400/KMS.DisabledException"])
def test_one_object_that_is_denied_costs_that_object(
    three_videos: Path, s3_url: str, proxy: FaultProxy, tmp_path: Path, code: str
) -> None:
    _upload(three_videos, f"{s3_url}/videos")
    proxy.script = [("GET:/videos/c.mp4", code)]
    summary = build_small(f"{s3_url}/videos", tmp_path / "out")
    assert summary.reasons == "1 x unreadable"
    assert summary.manifest.num_samples == 6


def test_many_denied_objects_end_the_build(three_videos: Path, s3_url: str, proxy: FaultProxy, tmp_path: Path) -> None:
    """Then it is the credentials; nothing is written down about the objects, and the next run finds all of them."""
    storage = open_storage(f"{s3_url}/videos")
    for number in range(6):
        storage.put(f"{number}.mp4", (three_videos / "a.mp4").read_bytes() + bytes(number))
    proxy.script = [("GET:.mp4", "403/AccessDenied")] * 6
    with pytest.raises(StorageError, match="objects in a row were denied"):
        build_small(f"{s3_url}/videos", tmp_path / "out")
    proxy.script.clear()
    assert build_small(f"{s3_url}/videos", tmp_path / "out").manifest.num_samples == 18
    proxy.script = [("GET:.mp4", "403/InvalidObjectState")] * 6
    with pytest.raises(DataError, match="6 x unreadable"):
        build_small(f"{s3_url}/videos", tmp_path / "archived")


def test_denied_after_what_was_granted_is_denied_too(
    three_videos: Path, s3_url: str, proxy: FaultProxy, tmp_path: Path
) -> None:
    """Credentials that lose their rights on the way cost no object: one look at what could be read tells."""
    storage = _upload(three_videos, f"{s3_url}/videos")
    root = SourceRoot(f"{s3_url}/videos")
    with local_copy(root, "a.mp4", storage.stat("a.mp4").version, tmp_path):
        pass
    proxy.script = [("GET", "403/AccessDenied")]
    with pytest.raises(Refusal, match="unreadable"), local_copy(root, "c.mp4", storage.stat("c.mp4").version, tmp_path):
        pass
    proxy.script = [("GET", "403/AccessDenied")] * 2
    with pytest.raises(StorageError, match="nor read what could be read before"):
        local_copy(root, "c.mp4", storage.stat("c.mp4").version, tmp_path).__enter__()
    assert not list(tmp_path.iterdir())


def test_denied_to_a_worker_that_has_read_nothing_yet(
    three_videos: Path,
    s3_url: str,
    proxy: FaultProxy,
    tmp_path: Path,
    in_child: Child,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the plan says could be read tells a denied object from a worker without rights; that one commits nothing."""
    _upload(three_videos, f"{s3_url}/videos")

    def whole() -> Summary:
        return build_small(f"{s3_url}/videos", tmp_path / "out", samples_per_shard=1)

    assert in_child(whole, "kill@build.after_plan") == -9
    proxy.script = [("GET:/videos/", "403/AccessDenied")] * 20
    with pytest.raises(StorageError, match="access denied"):
        whole()
    monkeypatch.setattr("data_tools.fetch._accesses", {})
    proxy.script = [("GET:/videos/a.mp4", "403/AccessDenied")] * 20
    summary = whole()
    assert summary.reasons == "3 x unreadable"
    assert summary.manifest.num_samples == 6


def test_one_denied_object_is_counted_once(three_videos: Path, s3_url: str, proxy: FaultProxy, tmp_path: Path) -> None:
    """It is fetched for every stretch of it: still one object."""
    storage = _upload(three_videos, f"{s3_url}/videos")
    version = storage.stat("a.mp4").version
    proxy.script = [("GET", "403/AccessDenied")] * 8
    for _ in range(8):
        with pytest.raises(Refusal), local_copy(SourceRoot(f"{s3_url}/videos"), "a.mp4", version, tmp_path):
            pass


def test_odd_keys(three_videos: Path, s3_url: str, tmp_path: Path) -> None:
    """Whatever a store takes for a key is a source like any other: empty parts, dots, what a URL means something by,
    1,024 bytes."""
    import boto3

    bucket, _, prefix = f"{s3_url}/videos/".removeprefix("s3://").partition("/")
    names = ["/b.mp4", "x//y.mp4", "./c.mp4", "../d.mp4", " e.mp4", "f?g#h%2e.mp4"]
    names.append("l" * (1024 - len(prefix) - 4) + ".mp4")  # the longest key there is
    for number, name in enumerate(names):
        body = (three_videos / "a.mp4").read_bytes() + bytes(number)
        boto3.client("s3").put_object(Bucket=bucket, Key=prefix + name, Body=body)
    summary = build_small(f"{s3_url}/videos", tmp_path / "out")
    assert not summary.refused_videos + summary.refused_clips, summary.reasons
    assert {str(info["source"]) for _, info in samples(tmp_path / "out").values()} == set(names)


def test_no_room_for_a_copy(
    three_videos: Path, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sources of a remote prefix are probed as copies; files may not grow beyond what the records need."""
    _upload(three_videos, f"{s3_url}/videos")
    words = [sys.executable, "-m", "data_tools", "build", "--videos", f"{s3_url}/videos", "--out", str(tmp_path / "o")]
    words += ["--num-frames", "4", "--size", "16"]
    done = subprocess.run(
        words,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 4, done.stderr
    assert f"cannot write a copy of {s3_url}/videos/" in done.stderr
    assert "File too large" in done.stderr
    assert "run build again" in done.stderr
    assert "Traceback" not in done.stderr
    assert main(words[3:]) == 0
