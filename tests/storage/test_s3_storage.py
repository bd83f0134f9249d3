"""S3 over real HTTP: the same promises as a folder, and every fault of the network ridden out or named."""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest
from s3_servers import BUCKET, FaultProxy, S3Server

from ardist.errors import InvalidValueError
from ardist.events import events
from ardist.storage import ChangedObjectError, MissingObjectError, StorageError, open_storage, s3, s3_client
from ardist.storage.base import DeniedObjectError, UnreadableObjectError
from ardist.storage.retry import RetryPolicy
from ardist.storage.s3 import S3Storage


class _Clock:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, list[float]()

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


@pytest.fixture
def storage(s3_url: str, clock: _Clock) -> S3Storage:
    bucket, _, prefix = s3_url.removeprefix("s3://").partition("/")
    events.clear()
    return S3Storage(bucket, prefix, policy=RetryPolicy(clock=clock, sleep=clock.sleep, dice=lambda: 1.0))


def test_put_read_ranges_stat_delete(storage: S3Storage, s3_url: str) -> None:
    storage.put("a/b.bin", b"0123456789")
    assert storage.read("a/b.bin") == b"0123456789"
    assert storage.read("a/b.bin", 3) == b"3456789"
    assert storage.read("a/b.bin", 3, 4) == b"3456"
    assert storage.read("a/b.bin", 8, 10) == b"89"
    assert storage.read("a/b.bin", 20, 5) == b""
    assert storage.read("a/b.bin", 0, 0) == b""
    assert storage.size("a/b.bin") == 10
    assert storage.local_path("a/b.bin") is None
    assert open_storage(s3_url).read("a/b.bin", 1, 1) == b"1"
    storage.delete("a/b.bin")
    storage.delete("a/b.bin")
    assert not storage.exists("a/b.bin")
    with pytest.raises(MissingObjectError, match=r"a/b\.bin does not exist"):
        storage.read("a/b.bin")


def test_an_empty_object(storage: S3Storage) -> None:
    storage.put("empty", b"")
    assert storage.read("empty") == b""
    assert storage.read("empty", 0, 5) == b""


@pytest.mark.parametrize(
    "name",
    ["with space", "plus+sign", "ümläut/日本", "percent%20", "a=b&c", "dots..in", "/slash", "empty//part", "a/../b"],
)
def test_odd_keys(storage: S3Storage, name: str) -> None:
    storage.put(name, name.encode())
    assert storage.read(name) == name.encode()
    assert list(storage.list()) == [name]


def test_the_longest_key(s3_url: str) -> None:
    """1,024 bytes with the prefix, of more than one byte each."""
    storage = open_storage(f"{s3_url}/long")
    room = 1024 - len(s3_url.removeprefix("s3://").partition("/")[2]) - len("/long/")
    for name in ("x" * room, "ü" * (room // 2) + "y" * (room % 2)):
        storage.put(name, b"long")
        assert storage.read(name) == b"long"
        assert list(storage.list()) == [name]
        assert storage.create(name, b"other") is False
        storage.delete(name)
        for illegal in (name + "y", ""):
            with pytest.raises(InvalidValueError, match="1 to 1024 bytes"):
                storage.put(illegal, b"")


def test_list_goes_beyond_a_page_in_order(storage: S3Storage) -> None:
    client = s3_client.clients.get()
    names = sorted(f"k/{number * 7919 % 1050:05d}" for number in range(1050))
    with ThreadPoolExecutor(16) as pool:
        keys = [f"{storage._prefix}/{name}" for name in names]
        list(pool.map(lambda key: client.put_object(Bucket=BUCKET, Key=key, Body=b""), keys))
    client.put_object(Bucket=BUCKET, Key=f"{storage._prefix}-other/x", Body=b"")
    assert list(storage.list()) == names
    assert list(storage.list("k/0000")) == names[:10]


def test_create_has_one_winner(storage: S3Storage) -> None:
    barrier, won = threading.Barrier(6), []

    def compete(number: int) -> None:
        barrier.wait()
        if storage.create("lock", str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=compete, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert storage.read("lock") == str(won[0]).encode()


def test_create_when_the_answer_is_lost(fault_proxy: FaultProxy, storage: S3Storage) -> None:
    fault_proxy.script = [("PUT", "lost")]
    assert storage.create("commit", b"mine")
    fault_proxy.script = [("PUT", "lost")]
    assert not storage.create("commit", b"other")
    assert storage.read("commit") == b"mine"


def test_a_server_that_ignores_conditions_is_refused(storage: S3Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.check_conditional_create()
    assert list(storage.list()) == []
    monkeypatch.setattr(storage, "create", lambda name, data: storage.put(name, data) or True)
    with pytest.raises(StorageError, match="does not honour conditional writes"):
        storage.check_conditional_create()


def test_multipart_upload(storage: S3Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "MULTIPART_FROM", 8 * 2**20)
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    data = os.urandom(12 * 2**20 + 17)
    file = tmp_path / "big"
    file.write_bytes(data)
    storage.put("big", file, move=True)
    assert not file.exists()
    assert storage.size("big") == len(data)
    assert storage.download("big", tmp_path / "back") == hashlib.sha256(data).hexdigest()
    storage.put("bytes", data)
    assert storage.read("bytes", 5 * 2**20 - 3, 10) == data[5 * 2**20 - 3 : 5 * 2**20 + 7]


def test_a_failed_multipart_upload_leaves_nothing(
    fault_proxy: FaultProxy, storage: S3Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "MULTIPART_FROM", 2**20)
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    fault_proxy.script = [("PUT", "403/AccessDenied")]
    with pytest.raises(StorageError, match="access denied"):
        storage.put("big", bytes(6 * 2**20))
    assert not storage.exists("big")
    assert storage.abort_uploads(0) == 0


def test_left_over_uploads_are_aborted(storage: S3Storage, s3_server: S3Server) -> None:
    s3_client.clients.get().create_multipart_upload(Bucket=BUCKET, Key=f"{storage._prefix}/dead")
    if s3_server.name != "moto":  # which says that every upload began in 2010
        assert storage.abort_uploads(3600) == 0
    assert storage.abort_uploads(0) == 1
    assert storage.abort_uploads(0) == 0


def test_left_over_uploads_beyond_a_page_are_aborted(storage: S3Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "_UPLOADS_PER_PAGE", 2)
    for name in ("a", "b", "b", "b", "c", "d/e"):
        s3_client.clients.get().create_multipart_upload(Bucket=BUCKET, Key=f"{storage._prefix}/{name}")
    assert storage.abort_uploads(0) == 6
    assert storage.abort_uploads(0) == 0


@pytest.mark.parametrize("fault", ["500", "503", "429", "reset", "html", "short", "lost"])
def test_a_passing_fault_is_ridden_out_and_counted(fault_proxy: FaultProxy, storage: S3Storage, fault: str) -> None:
    storage.put("a", b"x" * 1000)
    events.clear()
    fault_proxy.script = [("GET", fault)] * 3
    if fault == "html":
        # A web page in place of the object has no ETag: no version of anything.
        fault_proxy.script = [("GET", fault)]
    assert storage.read("a") == b"x" * 1000
    assert events.snapshot()["storage.retry"] == (1 if fault == "html" else 3)


@pytest.mark.parametrize("fault", ["500", "503", "reset", "lost", "html"])
def test_writes_are_repeated(fault_proxy: FaultProxy, storage: S3Storage, fault: str) -> None:
    fault_proxy.script = [("PUT", fault)] * 2
    storage.put("a", b"abc")
    assert storage.read("a") == b"abc"
    assert events.snapshot()["storage.retry"] == 2


def test_a_web_page_is_no_answer(fault_proxy: FaultProxy, storage: S3Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hotel's login page with status 200, to every kind of request."""
    storage.put("a", b"x")
    requests = {
        "stat": lambda: storage.size("a") == 1,
        "list": lambda: list(storage.list()) == ["a"],
        "create": lambda: storage.create("b", b"y"),
    }
    for name, request in requests.items():
        fault_proxy.script = [("*", "html")]
        assert request(), name
    monkeypatch.setattr(s3, "MULTIPART_FROM", 2**20)
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    for kind in ("POST", "PUT"):
        fault_proxy.script = [(kind, "html")]
        storage.put("big", bytes(6 * 2**20))
        assert not fault_proxy.script
        assert storage.size("big") == 6 * 2**20
    assert events.snapshot()["storage.retry"] == 5


def test_a_broken_body_is_resumed_where_it_broke(fault_proxy: FaultProxy, storage: S3Storage) -> None:
    data = os.urandom(100_000)
    storage.put("a", data)
    fault_proxy.seen.clear()
    fault_proxy.script = [("GET", "short"), ("GET", "short")]
    assert storage.read("a") == data
    assert [seen[1] for seen in fault_proxy.seen] == ["", "bytes=50000-", "bytes=75000-"]
    fault_proxy.seen.clear()
    fault_proxy.script = [("GET", "short")]
    assert storage.read("a", 1000, 2000) == data[1000:3000]
    assert [seen[1] for seen in fault_proxy.seen] == ["bytes=1000-2999", "bytes=2000-2999"]


def test_a_stalled_body_is_resumed(
    fault_proxy: FaultProxy, storage: S3Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_client, "READ_SECONDS", 4)
    storage.put("a", b"0123456789")
    fault_proxy.script = [("GET", "stall/250")]
    assert storage.read("a") == b"0123456789"
    fault_proxy.release.set()
    assert events.snapshot() == {"storage.retry": 1}


def test_an_object_replaced_between_two_pieces_is_noticed(fault_proxy: FaultProxy, storage: S3Storage) -> None:
    storage.put("a", b"old" * 1000)

    def replace_and_sleep(_: float) -> None:
        S3Storage(BUCKET, storage._prefix).put("a", b"new" * 1000)

    object.__setattr__(storage._policy, "sleep", replace_and_sleep)
    fault_proxy.script = [("GET", "short")]
    with pytest.raises(ChangedObjectError):
        storage.read("a")


def test_a_version_pins_the_object(storage: S3Storage) -> None:
    storage.put("a", b"old")
    version = storage.stat("a").version
    assert storage.read("a", 0, 2, version=version) == b"ol"
    storage.put("a", b"new")
    with pytest.raises(ChangedObjectError):
        storage.read("a", version=version)


def test_a_server_that_ignores_ranges(fault_proxy: FaultProxy, storage: S3Storage) -> None:
    storage.put("a", bytes(range(100)))
    fault_proxy.script = [("GET", "norange")] * 3
    assert storage.read("a", 10, 5) == bytes(range(10, 15))
    assert storage.read("a", 95, 50) == bytes(range(95, 100))
    assert storage.read("a", 90) == bytes(range(90, 100))
    assert events.snapshot() == {"storage.range_ignored": 3}


def test_retries_end_with_one_message(fault_proxy: FaultProxy, storage: S3Storage, clock: _Clock) -> None:
    fault_proxy.script = [("*", "503")] * 20
    with pytest.raises(StorageError, match=r"gave up after 8 tries in .*SlowDown") as caught:
        storage.read("a")
    assert caught.value.exit_code == 4
    assert clock.slept == [0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6]
    assert len(fault_proxy.seen) == 8


def test_retry_after_is_honoured_within_the_budget(fault_proxy: FaultProxy, storage: S3Storage, clock: _Clock) -> None:
    storage.put("a", b"x")
    fault_proxy.script = [("GET", "503/7")]
    assert storage.read("a") == b"x"
    assert clock.slept == [7 * 1.25]
    fault_proxy.script = [("GET", "503/900")]
    with pytest.raises(StorageError, match="gave up after 1 tries"):
        storage.read("a")


def test_delays_are_spread(clock: _Clock) -> None:
    import itertools

    from ardist.storage.retry import TransientError

    rolls = itertools.cycle([0.0, 0.5, 1.0])
    policy = RetryPolicy(clock=clock, sleep=clock.sleep, dice=lambda: next(rolls))
    outcomes = iter([TransientError("x")] * 3)

    def attempt() -> str:
        error = next(outcomes, None)
        if error is not None:
            raise error
        return "done"

    assert policy.run("read", "a", attempt) == "done"
    assert clock.slept == [0.0, 0.4, 1.6]


def test_expired_credentials_are_refreshed_once(fault_proxy: FaultProxy, storage: S3Storage) -> None:
    storage.put("a", b"x")
    fault_proxy.script = [("GET", "403/ExpiredToken")]
    before = s3_client.clients.get()
    assert storage.read("a") == b"x"
    assert s3_client.clients.get() is not before
    fault_proxy.script = [("GET", "403/ExpiredToken")] * 2
    with pytest.raises(StorageError, match="ExpiredToken, also after fresh credentials"):
        storage.read("a")


def test_refusals_name_the_cause_and_no_secret(
    fault_proxy: FaultProxy, storage: S3Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-secret")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "canary-token")
    for fault in ("403/AccessDenied", "403/ExpiredToken", "403/SignatureDoesNotMatch"):
        fault_proxy.script = [("GET", fault)] * 2
        with pytest.raises(StorageError) as caught:
            storage.read("a")
        assert "canary" not in str(caught.value)
        fault_proxy.script.clear()
    fault_proxy.script = [("GET", "reset")] * 8
    with pytest.raises(StorageError) as caught:
        storage.read("a")
    assert "canary" not in str(caught.value)
    assert "canary" not in caplog.text


def test_refusals_of_one_object_are_told_from_those_of_the_credentials(
    fault_proxy: FaultProxy, storage: S3Storage
) -> None:
    kinds: dict[str, type[StorageError]] = {
        "403/AccessDenied": DeniedObjectError,
        "403/InvalidObjectState": UnreadableObjectError,
        "400/KMS.DisabledException": UnreadableObjectError,
        "403/SignatureDoesNotMatch": StorageError,
        "403/InvalidAccessKeyId": StorageError,
        "401/Unauthorized": StorageError,
    }
    for fault, kind in kinds.items():
        fault_proxy.script = [("GET", fault)]
        with pytest.raises(StorageError) as caught:
            storage.read("a")
        assert type(caught.value) is kind, fault


def test_no_credentials(s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageError, match="no S3 credentials found"):
        open_storage(s3_url).read("a")


def test_a_missing_bucket(s3_url: str) -> None:
    with pytest.raises(MissingObjectError, match="bucket does not exist"):
        list(open_storage("s3://no-such-bucket-here/x").list())


def test_clients_are_not_shared_over_a_fork(storage: S3Storage) -> None:
    storage.put("a", b"x")
    parent = s3_client.clients.get()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        fresh = s3_client.clients.get() is not parent
        os.write(writer, storage.read("a") + str(fresh).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 100) == b"xTrue"
    os.close(reader)
    os.close(writer)


def test_boto3_stays_where_it_belongs() -> None:
    import subprocess
    import sys

    code = "import ardist.storage, sys; ardist.storage.open_storage('/tmp'); print('boto3' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert boto3 is not None
