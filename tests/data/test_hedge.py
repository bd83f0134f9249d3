"""Late reads are asked for a second time: when, how often, and that nothing but a whole answer is ever kept."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
from corruptions import serve
from dataset_factory import make_dataset
from s3_servers import FaultProxy

from ardist.config.data import DataConfig
from ardist.data import hedge, remote_source
from ardist.data.hedge import PEERS, HedgedReads, LostRaceError
from ardist.data.loader import StreamingLoader
from ardist.events import events
from ardist.storage import open_storage

SIZE = 1000


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever does not answer at once is late; no thread of a race is left at the end."""
    monkeypatch.setattr(hedge, "_LEAST_SECONDS", 0.02)
    events.clear()
    yield
    for thread in threading.enumerate():
        if thread.name == "ardist-hedge":
            thread.join(60)
            assert not thread.is_alive()


def quick(file: FileIO, lost: Callable[[], bool]) -> int:
    return file.write(b"p" * SIZE)


def with_peers(folder: Path, count: int = PEERS, factor: float = 4.0) -> HedgedReads:
    """Reads of which so many have ended quickly."""
    reads = HedgedReads(factor)
    for _ in range(count):
        assert reads.run("peer", quick, folder / "peer", SIZE) == SIZE
    return reads


def is_second(file: FileIO) -> bool:
    """Whether this is the file of the second request."""
    return str(file.name).endswith(hedge._SECOND)


class Requests:
    """What becomes of the first, second, … request for one object: ``slow``, ``good``, or an error."""

    def __init__(self, *answers: str | Exception) -> None:
        self._answers, self._lock = list(answers), threading.Lock()
        self.release = threading.Event()
        self.given_up: list[int] = []
        self.made = 0

    def __call__(self, file: FileIO, lost: Callable[[], bool]) -> int:
        # Not in the order in which the threads get to run.
        number = int(is_second(file))
        with self._lock:
            self.made += 1
        answer = self._answers[number]
        if answer == "slow":
            file.write(b"x" * (SIZE // 2))
            assert self.release.wait(60)
            if lost():
                file.write(b"x" * SIZE)
                self.given_up.append(number)
                raise LostRaceError
            return file.write(b"s" * (SIZE // 2)) + SIZE // 2
        if isinstance(answer, Exception):
            raise answer
        return file.write(f"{number}".encode() * SIZE)


def finish(requests: Requests) -> None:
    requests.release.set()
    for thread in threading.enumerate():
        if thread.name == "ardist-hedge":
            thread.join(60)


def test_the_second_answer_counts_when_the_first_is_late(tmp_path: Path) -> None:
    reads, requests, path = with_peers(tmp_path), Requests("slow", "good"), tmp_path / "object"
    assert reads.run("late", requests, path, SIZE) == SIZE
    assert path.read_bytes() == b"1" * SIZE
    finish(requests)
    assert requests.given_up == [0]
    assert path.read_bytes() == b"1" * SIZE, "the loser writes where nobody reads"
    assert (reads.repeated, reads.won) == (1, 1)
    assert events.snapshot() == {"loader.read_repeated": 1}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["object", "peer"]


def test_the_first_answer_counts_when_it_comes_first_after_all(tmp_path: Path) -> None:
    reads, path = with_peers(tmp_path), tmp_path / "object"
    second_runs, first_done = threading.Event(), threading.Event()

    def read(file: FileIO, lost: Callable[[], bool]) -> int:
        if not is_second(file):
            assert second_runs.wait(60)
            return file.write(b"0" * SIZE)
        second_runs.set()
        assert first_done.wait(60)
        return file.write(b"1" * SIZE)

    assert reads.run("late", read, path, SIZE) == SIZE
    first_done.set()
    assert path.read_bytes() == b"0" * SIZE
    assert (reads.repeated, reads.won) == (1, 0)
    assert not path.with_name("object.second").exists()


def test_a_read_that_fails_in_time_is_none_that_is_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hedge, "_LEAST_SECONDS", 60)
    with pytest.raises(OSError, match="gone"):
        with_peers(tmp_path).run("at once", Requests(OSError(errno.EIO, "gone")), tmp_path / "object", SIZE)
    assert events.snapshot() == {}


def test_errors_of_either_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "object"
    requests = Requests("slow", OSError("refused"))
    work = hedge._Request._work

    def then_release(request: hedge._Request) -> None:
        work(request)
        if request.error is not None:
            requests.release.set()

    monkeypatch.setattr(hedge._Request, "_work", then_release)
    assert with_peers(tmp_path).run("the second one", requests, path, SIZE) == SIZE
    assert path.read_bytes() == b"x" * (SIZE // 2) + b"s" * (SIZE // 2)
    assert events.snapshot() == {"loader.read_repeated": 1, "loader.repeated_read_failed": 1}

    second_failed = threading.Event()

    def both(file: FileIO, lost: Callable[[], bool]) -> int:
        if is_second(file):
            second_failed.set()
            raise OSError("the second one")
        assert second_failed.wait(60)
        raise OSError("the first one")

    with pytest.raises(OSError, match="the first one"):
        with_peers(tmp_path).run("both", both, path, SIZE)


def test_without_room_for_a_second_file_the_first_request_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, requests, path = with_peers(tmp_path), Requests("slow"), tmp_path / "object"

    def read(file: FileIO, lost: Callable[[], bool]) -> int:
        (tmp_path / "object.second").mkdir()
        return requests(file, lost)

    def decide() -> bool:
        requests.release.set()
        return True

    monkeypatch.setattr(reads, "_may_repeat", decide)
    assert reads.run("late", read, path, SIZE) == SIZE
    assert path.read_bytes() == b"x" * (SIZE // 2) + b"s" * (SIZE // 2)
    # The folder that stands for a full disk cannot be removed either.
    expected = ("loader.read_repeated", "loader.repeated_read_failed", "loader.second_file_left")
    assert events.snapshot() == dict.fromkeys(expected, 1)


def test_few_peers_or_a_factor_of_none_never_repeat(tmp_path: Path) -> None:
    for reads in (with_peers(tmp_path, PEERS - 1), with_peers(tmp_path, 50, factor=0.0)):
        requests = Requests("slow")
        threading.Timer(0.2, requests.release.set).start()
        assert reads.run("late", requests, tmp_path / "object", SIZE) == SIZE
        assert requests.made == 1
        assert (reads.repeated, reads.won) == (0, 0)


def test_one_read_in_twenty_is_repeated_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that becomes slow for everything is not asked twice for everything."""
    reads = with_peers(tmp_path)
    monkeypatch.setattr(HedgedReads, "_patience", lambda *_: 0.0)
    allowed = reads._may_repeat
    for number in range(PEERS + 1, 121):
        requests = Requests("slow", "good")

        def decide(requests: Requests = requests) -> bool:
            """The first request goes on only when it was decided whether there is a second one."""
            decision = allowed()
            requests.release.set()
            return decision

        monkeypatch.setattr(reads, "_may_repeat", decide)
        reads.run("late", requests, tmp_path / "object", SIZE)
        finish(requests)
        assert reads.repeated == max(1, number // 20)


def test_patience_is_the_median_of_the_peers_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = HedgedReads(4.0)
    for number in range(PEERS):
        assert reads._patience(100) is None
        reads._ended(100, 1.0 if number % 2 else 9.0)
    reads._ended(100, 1.0)
    assert reads._patience(100) == 4.0
    assert reads._patience(1000) == 40.0, "a longer read may take longer"
    assert reads._patience(10) == 4.0, "a shorter one waits for the answer as long"
    for _ in range(64):
        reads._ended(100, 0.0)
    assert reads._patience(100) == hedge._LEAST_SECONDS


@pytest.mark.parametrize("what", ["part", "index"])
def test_a_stalled_request_does_not_hold_up_the_batches(
    tmp_path: Path, bucket_url: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Half of its body comes, then nothing, then the connection breaks, which would count as a retry."""
    make_dataset(tmp_path / "data", [40, 40, 40])
    storage = open_storage(bucket_url)
    for path in (tmp_path / "data").rglob("*"):
        if path.is_file():
            storage.put(path.relative_to(tmp_path / "data").as_posix(), path)
    monkeypatch.setattr(remote_source, "PART_BYTES", 8 * 1024)
    monkeypatch.setattr(hedge, "_LEAST_SECONDS", 100)
    loader = remote_loader(bucket_url, tmp_path / "cache")
    table = loader.streams[0]._reader._table
    monkeypatch.setattr(hedge, "PEERS", 1)
    table.part(0, 0)
    if what == "part":
        table.shard(1)  # its index
    events.clear()
    # Only from here on is a request late: the store may take its time for those before.
    monkeypatch.setattr(hedge, "_LEAST_SECONDS", 0.3)
    proxy.script.append(("GET", "stall/250"))
    table.part(1, 0)
    assert events.snapshot() == {"loader.read_repeated": 1}, "the answer was there before the stall ended"
    assert serve(loader) == set(range(120))
    metrics = loader.metrics()
    assert proxy.script == []
    assert 1 <= metrics["repeated_reads_won"] <= metrics["reads_repeated"] <= 3
    assert events.snapshot()["loader.read_repeated"] == metrics["reads_repeated"]
    assert not loader.substitutions
    proxy.release.set()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.name.endswith((".second", ".filling"))]


def remote_loader(url: str, cache: Path, **options: Any) -> StreamingLoader:
    fields = {"lanes": 4, "window": 10, "prefetch_bytes": 2**20, "cache_dir": str(cache)}
    return StreamingLoader(DataConfig(path=url, **{**fields, **options}), seed=3, global_batch_size=12)
