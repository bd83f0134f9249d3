"""Checkpoints in an object store: resumes from another machine, kills at every point, leftovers, damage, races."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks, run_ranks
from tiny import losses, sample_ids, tiny_config, train_outcome, write_latents

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "storage"))

from s3_servers import BUCKET, S3Server, moto_in_environment

from ardist.events import events
from ardist.storage import open_storage
from ardist.training import claim, object_store
from ardist.training.commit import Commit, Part
from ardist.training.export import export_bundle
from ardist.training.object_store import ObjectStore

pytestmark = pytest.mark.distributed

STEPS = 9


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with moto_in_environment(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture
def url(server: S3Server, request: pytest.FixtureRequest) -> str:
    return f"s3://{BUCKET}/{abs(hash(request.node.name))}/checkpoints"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("latents"))


def config_of(run_dir: Path, data: Path, url: str | None, **changes: Any) -> Any:
    defaults = {"training__steps": STEPS, "checkpoint__every": 3, "checkpoint__keep": 1, "checkpoint__url": url}
    return tiny_config(run_dir, data, **{**defaults, **changes})


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    assert run_ranks(train_outcome, 2, config_of(run_dir, data, None)) == ["done", "done"]
    return run_dir


def objects(url: str) -> list[str]:
    return list(open_storage(url).list())


def nothing_else_is_left(url: str, run_dir: Path) -> None:
    names = objects(url)
    parts = ["part-00000-of-00002.safetensors", "part-00001-of-00002.safetensors"]
    assert [name.rpartition("/")[2] for name in names] == ["COMMIT.json", *parts]
    assert {name.partition("/")[0] for name in names} == {f"step-{STEPS:08d}"}
    assert [path for path in (run_dir / "checkpoints").rglob("*") if path.is_file()] == [], "nothing stays on the way"


def test_another_machine_continues_at_another_stage_and_number_of_ranks(
    tmp_path: Path, data: Path, uninterrupted: Path, url: str
) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    stopped = config_of(first, data, url, training__stop_after=4)
    assert all(outcome.startswith("Preempted") for outcome in run_ranks(train_outcome, 2, stopped))
    # Another run directory: what the first machine had on its disk is gone.
    other = config_of(second, data, url, training__stop_after=7, training__zero_stage=3)
    assert run_ranks(train_outcome, 1, other)[0].startswith("Preempted")
    assert run_ranks(train_outcome, 2, config_of(third, data, url)) == ["done", "done"]
    pieces = losses(first) + losses(second) + losses(third)
    assert pieces[:4] == losses(uninterrupted)[:4]
    assert pieces == pytest.approx(losses(uninterrupted), abs=1e-5)
    ids = {**sample_ids(first), **sample_ids(second), **sample_ids(third)}
    assert ids == sample_ids(uninterrupted)
    nothing_else_is_left(url, third)


@pytest.mark.parametrize(
    ("fault", "step"),
    [
        ("kill@checkpoint.after_upload/1#2", 3),
        ("kill@checkpoint.before_commit#2", 3),
        ("kill@checkpoint.after_commit#2", 6),
        ("kill@checkpoint.during_prune#1", 6),
    ],
)
def test_kill_at_every_point_of_the_second_checkpoint(
    tmp_path: Path, data: Path, uninterrupted: Path, url: str, fault: str, step: int
) -> None:
    outcomes = Ranks(train_outcome, 2, config_of(tmp_path, data, url), env={"ARDIST_FAULT": fault}).wait()
    assert -signal.SIGKILL in [outcome.exit_code for outcome in outcomes]
    assert ObjectStore(url, tmp_path).steps()[0] == step
    assert run_ranks(train_outcome, 2, config_of(tmp_path, data, url)) == ["done", "done"]
    assert losses(tmp_path) == losses(uninterrupted)
    assert sample_ids(tmp_path) == sample_ids(uninterrupted)
    nothing_else_is_left(url, tmp_path)


def test_a_commit_that_the_store_refuses_is_invisible_and_counted(
    tmp_path: Path, data: Path, uninterrupted: Path, url: str
) -> None:
    # Visits 1 and 2 of the creation are the probe at the start, 3 is the claim, 4 the commit of step 3.
    fault = {"ARDIST_FAULT": "raise@storage.s3_before_create/0#4:5"}
    outcomes = Ranks(train_outcome, 2, config_of(tmp_path, data, url), env=fault).wait()
    assert [outcome.value for outcome in outcomes] == ["done", "done"]
    assert json.loads((tmp_path / "summary.json").read_text())["events"]["checkpoint.failed"] == 2
    assert losses(tmp_path) == losses(uninterrupted)
    nothing_else_is_left(url, tmp_path)


def test_a_damaged_part_in_the_store_falls_back_to_the_one_before(
    tmp_path: Path, data: Path, uninterrupted: Path, url: str
) -> None:
    stopped = config_of(tmp_path, data, url, training__stop_after=7, checkpoint__keep=2)
    run_ranks(train_outcome, 2, stopped)
    store = ObjectStore(url, tmp_path)
    assert store.steps() == [7, 6]
    [name] = [name for name in objects(url) if name.startswith("step-00000007/") and "part-00001" in name]
    content = bytearray(store.storage.read(name))
    content[len(content) // 2] ^= 1
    store.storage.put(name, bytes(content))
    assert run_ranks(train_outcome, 2, config_of(tmp_path, data, url)) == ["done", "done"]
    assert losses(tmp_path) == losses(uninterrupted)
    assert json.loads((tmp_path / "summary.json").read_text())["events"]["checkpoint.fallback"] == 1
    aside = [name for name in objects(url) if "COMMIT.json.damaged-" in name]
    assert len(aside) == 1
    assert aside[0].startswith("step-00000007/")


def commit_of(step: int, parts: list[Part]) -> Commit:
    values = {"created": "now", "world_size": 1, "zero_stage": 1, "precision": "fp32", "shapes": {}, "kinds": ()}
    values |= {"adam_steps": {}, "ema_decays": (), "ema_updates": 0, "config": {}, "config_digest": "0"}
    return Commit.model_validate(
        {**values, "step": step, "parts": parts, "manifest_digest": None, "state": {}, "versions": {}}
    )


def write(store: ObjectStore, step: int, nonce: str, content: bytes = b"12345678") -> str | None:
    name = store.new_write(step, nonce)
    (store.folder_for(name) / "part-00000-of-00001.safetensors").write_bytes(content)
    parts = [Part(file="part-00000-of-00001.safetensors", bytes=8, sha256="0" * 64)]
    store.deliver(name, parts)
    return store.publish(name, commit_of(step, parts))


def test_of_two_writers_of_a_step_one_commits_and_a_short_part_never_does(tmp_path: Path, url: str) -> None:
    store, other = ObjectStore(url, tmp_path / "a"), ObjectStore(url, tmp_path / "b")
    assert write(store, 3, "aa") is None
    assert "exists already and is good" in str(write(other, 3, "bb"))
    assert store.commit_of(3).folder == "step-00000003.tmp-aa"
    assert "has 5 bytes in the store instead of 8" in str(write(store, 4, "cc", b"12345"))
    assert store.steps() == [3]
    store.prune(keep=3)
    assert all("tmp-aa" in name or name.endswith("COMMIT.json") for name in objects(url)), objects(url)


def test_uploads_of_a_run_that_is_gone_are_aborted(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    client, prefix = boto3.client("s3"), url.removeprefix(f"s3://{BUCKET}/")
    client.create_multipart_upload(Bucket=BUCKET, Key=f"{prefix}/step-00000003/step-00000003.tmp-aa/part")
    store, before = ObjectStore(url, tmp_path), events.snapshot().get("checkpoint.upload_aborted", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(object_store, "STALE_UPLOAD_SECONDS", 1e12)
        store.prune(keep=1)
    assert events.snapshot().get("checkpoint.upload_aborted", 0) == before, "it may be under way"
    store.prune(keep=1)
    assert events.snapshot()["checkpoint.upload_aborted"] == before + 1
    assert not client.list_multipart_uploads(Bucket=BUCKET, Prefix=prefix).get("Uploads")


def test_a_second_job_on_a_prefix_is_refused(
    tmp_path: Path, data: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim.Claim.__init__, "__kwdefaults__", {"beat": 0.2, "stale": 30.0})
    other = ObjectStore(url, tmp_path)
    other.lock("elsewhere")
    try:
        for outcome in run_ranks(train_outcome, 2, config_of(tmp_path, data, url)):
            assert outcome.startswith("ConfigError: another job writes checkpoints to"), outcome
    finally:
        other.unlock()


def test_weights_are_exported_and_start_a_fresh_run_from_an_object_store(tmp_path: Path, data: Path, url: str) -> None:
    first = config_of(tmp_path / "first", data, url, training__steps=6)
    assert run_ranks(train_outcome, 1, first) == ["done"]
    bundle = export_bundle(tmp_path / "first", tmp_path / "bundle")
    assert (bundle / "denoiser.safetensors").is_file(), "the run directory says where its checkpoints are"
    assert [path for path in (tmp_path / "first" / "checkpoints").rglob("*") if path.is_file()] == []
    second = config_of(tmp_path / "second", data, None, training__steps=1, init_from=url)
    assert run_ranks(train_outcome, 1, second) == ["done"]
    assert losses(tmp_path / "second")[0] < 0.9 * losses(tmp_path / "first")[0]
