"""The examination of object stores and clocks: what is there, who keeps the time, and nothing is left behind."""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import settings, tiny_config
from yaml import safe_dump

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "storage"))
from s3_servers import BUCKET, S3Server, moto_in_environment

from ardist.doctor import clocks, examine, network, places, software
from ardist.doctor.findings import Finding, Level, good
from ardist.storage import open_storage
from ardist.storage.s3 import S3Storage


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with moto_in_environment(tmp_path_factory.mktemp("s3")) as running:
        yield running


def config_of(tmp_path: Path, url: str | None) -> Any:
    return tiny_config(tmp_path / "run", tmp_path / "data", checkpoint__url=url)


def by_subject(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


def test_a_store_for_checkpoints_is_listed_and_written_and_left_as_it_was(server: S3Server, tmp_path: Path) -> None:
    url = f"s3://{BUCKET}/here"
    found = by_subject(places.checkpoints(config_of(tmp_path, url)))
    assert found["S3 credentials"].detail == "from the environment"
    told = found[f"checkpoints {url}"]
    assert told.level is Level.GOOD
    assert "can be written, none there yet" in told.detail
    open_storage(url).put("step-00000007/COMMIT.json", b"{}")
    told = by_subject(places.checkpoints(config_of(tmp_path, url)))[f"checkpoints {url}"]
    assert "the newest of 1 is of step 7" in told.detail
    assert list(open_storage(url).list()) == ["step-00000007/COMMIT.json"]
    assert not (tmp_path / "run").exists()
    assert list(places.checkpoints(config_of(tmp_path, None))) == [], "a folder is examined with its disk"


def test_a_bucket_that_is_not_there_or_cannot_tell_writers_apart(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = by_subject(places.checkpoints(config_of(tmp_path, "s3://no-such-bucket/x")))[
        "checkpoints s3://no-such-bucket/x"
    ]
    assert told.level is Level.BAD
    assert "rights to list, read, write and delete" in told.advice
    monkeypatch.setattr(S3Storage, "create", lambda storage, name, data: storage.put(name, data) or True)
    url = f"s3://{BUCKET}/odd"
    told = by_subject(places.checkpoints(config_of(tmp_path, url)))[f"checkpoints {url}"]
    assert told.level is Level.BAD
    assert "does not honour conditional writes" in told.detail


@pytest.mark.parametrize(
    ("wrong", "level"), [(0, Level.GOOD), (60, Level.WEAK), (-60, Level.WEAK), (3600, Level.BAD), (-3600, Level.BAD)]
)
def test_our_clock_beside_the_stores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: float, level: Level
) -> None:
    monkeypatch.setattr(S3Storage, "server_time", lambda storage: 1.7e9)
    monkeypatch.setattr(clocks, "time", SimpleNamespace(time=lambda: 1.7e9 + wrong))
    [told] = clocks.store_clocks(config_of(tmp_path, f"s3://{BUCKET}/here"))
    assert (told.subject, told.level) == (f"clock of s3://{BUCKET}", level)
    assert list(clocks.store_clocks(config_of(tmp_path, None))) == []
    monkeypatch.setattr(S3Storage, "server_time", lambda storage: None)
    [told] = clocks.store_clocks(config_of(tmp_path, f"s3://{BUCKET}/here"))
    assert told.level is Level.WEAK


def test_a_server_tells_its_time(server: S3Server) -> None:
    told = open_storage(f"s3://{BUCKET}/here").server_time()  # type: ignore[attr-defined]
    assert abs(told - time.time()) < 600, "it runs on this machine"


@pytest.mark.parametrize(("state", "level"), [(0, Level.GOOD), (5, Level.WEAK), (None, Level.GOOD)])
def test_whether_somebody_keeps_this_machines_clock(
    monkeypatch: pytest.MonkeyPatch, state: int | None, level: Level
) -> None:
    assert clocks.clock_state() in (None, 0, 1, 2, 3, 4, 5)
    monkeypatch.setattr(clocks, "clock_state", lambda: state)
    [told] = clocks.this_clock()
    assert told.level is level


def test_a_configuration_has_its_store_and_the_clocks_examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (clocks, network, places, software):
        for name, check in list(vars(module).items()):
            if inspect.isgeneratorfunction(check) and check.__module__ == module.__name__:
                monkeypatch.setattr(module, name, lambda *words, name=name: iter([good(name, "")]))
    path = tmp_path / "config.yaml"
    path.write_text(safe_dump(settings(tmp_path / "run", tmp_path)))
    asked = {finding.subject for finding in examine.examine(path)}
    assert {"this_clock", "run_directory", "data", "checkpoints", "store_clocks"} <= asked
