"""What people get wrong and what machines run out of: one clear message, the documented status, nothing broken."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from dt_builds import SMALL, build_small
from s3_servers import FaultProxy, S3Server

from ardist.data.manifest import load_manifest
from ardist.errors import HardwareError
from ardist.events import events
from data_tools.cli import main
from data_tools.decode import DecodeSettings
from data_tools.progress import ConsoleProgress
from data_tools.shard import ShardSettings
from data_tools.verify import verify

WORDS = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def _says(words: list[str], code: int, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == code, words
    error = capsys.readouterr().err
    assert expected in " ".join(error.split()), words
    assert "Traceback" not in error


def test_verbs_on_what_is_no_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    for place in ("nothing", "photos"):
        for verb in ("verify", "stats", "gc", "export-wids"):
            _says([verb, str(tmp_path / place)], 3, str(tmp_path / place), capsys)
        _says(["inspect", str(tmp_path / place), "0" * 16], 3, str(tmp_path / place), capsys)
    assert not (tmp_path / "nothing").exists()
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["a.jpg"]
    _says(["gc", "ftp://host/x"], 2, "legal: a folder, file:///path or s3://bucket/prefix", capsys)


def test_devices_groups_and_places(three_videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["build", "--videos", str(three_videos), "--out", str(tmp_path / "out"), *WORDS]
    _says([*base, "--device", "tpu"], 2, "'tpu' is not a device; legal: auto, cpu, cuda", capsys)
    _says([*base, "--executor", "spark"], 2, "legal: local, ray", capsys)
    _says([*base, "--group", "16"], 2, "is not of the form FRAMESxSIZE", capsys)
    _says([*base, "--num-frames", "0"], 2, "--num-frames", capsys)
    _says([*base, "--encoder", "no/bundle"], 2, "legal: pixels, or a bundle with an AR-VAE", capsys)
    _says([*base, "--labels", str(three_videos)], 4, str(three_videos), capsys)
    assert not (tmp_path / "out").exists()
    in_the_way = tmp_path / "file"
    in_the_way.write_text("precious")
    _says(["build", "--videos", str(three_videos), "--out", str(in_the_way), *WORDS], 4, str(in_the_way), capsys)
    assert in_the_way.read_text() == "precious"


def test_a_prefix_that_may_not_be_read(
    s3_server: S3Server,
    s3_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    proxy = FaultProxy(s3_server.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.start())
    proxy.script = [("GET", "403/AccessDenied")]
    _says(["build", "--videos", f"{s3_url}/videos", "--out", str(tmp_path / "out"), *WORDS], 4, "access denied", capsys)
    proxy.stop()
    assert not (tmp_path / "out").exists()


def test_no_room_for_a_shard(three_videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files may not grow beyond what the records need: the first shard does not fit, the next run finishes."""
    out = tmp_path / "out"
    words = [sys.executable, "-m", "data_tools", "build", "--videos", str(three_videos), "--out", str(out), *WORDS]
    done = subprocess.run(
        words,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 4, done.stderr
    assert "cannot write shard" in done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((out / "shards").glob("*"))
    assert main(words[3:]) == 0
    plain = build_small(three_videos, tmp_path / "plain")
    assert load_manifest(out).digest() == plain.manifest.digest()
    assert not verify(str(out)).problems
    assert not verify(str(out)).notes


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 KiB; skipped where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "none", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(three_videos: Path, tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["build", "--videos", str(three_videos), "--out", str(small_disk / "out"), *WORDS, "--size", "64"]
    _says(words, 4, "No space left on device", capsys)
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert main(words) == 0
    assert load_manifest(small_disk / "out").digest() == (
        build_small(three_videos, tmp_path / "plain", size=64).manifest.digest()
    )
    assert not verify(str(small_disk / "out")).problems


def test_no_room_for_a_long_stretch(three_videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    shard = ShardSettings(decode=DecodeSettings(held_bytes=100))
    with pytest.raises(HardwareError, match=r"cannot write shard \d+ in .*: No space left on device"):
        build_small(three_videos, tmp_path / "out", shard=shard)


def test_a_log_that_cannot_be_written_costs_the_log_only(tmp_path: Path) -> None:
    from rich.console import Console

    (tmp_path / "file").write_text("")
    with ConsoleProgress(Console(quiet=True), tmp_path / "file" / "log.jsonl") as progress:
        progress.planned(1, 1, 0)
    with ConsoleProgress(Console(quiet=True), Path("/dev/full")) as progress:
        progress.planned(1, 1, 0)
    assert events.snapshot()["build.log_line_lost"] == 2
