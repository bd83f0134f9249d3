"""The cache by itself: full disks, foreign folders, eviction order, locks."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from pathlib import Path

import pytest

from ardist.data.cache import DiskCache, default_cache_dir
from ardist.errors import HardwareError
from ardist.events import events


def name(number: int) -> str:
    return hashlib.sha256(number.to_bytes(2, "big")).hexdigest() + "-0-100"


def put(cache: DiskCache, number: int) -> bytes:
    descriptor = cache.open(name(number), 100, lambda path: path.write_bytes(bytes([number % 256]) * 100) and None)
    data = os.read(descriptor, 200)
    os.close(descriptor)
    return data


def held(cache: DiskCache) -> list[str]:
    return [path.name for _, _, path in sorted(cache._entries())]


def test_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 300)
    for number in range(3):
        assert put(cache, number) == bytes([number]) * 100
        time.sleep(0.01)
    put(cache, 0)
    time.sleep(0.01)
    put(cache, 3)
    assert held(cache) == [name(2), name(0), name(3)]
    assert (cache.hits, cache.misses, cache.evicted) == (1, 4, 1)


def test_many_entries_are_not_counted_again_for_each_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that holds thousands of entries takes no longer to add one, also where it is full."""
    limit = 100 * 1280
    cache, looks, entries = DiskCache(tmp_path, limit), [], DiskCache._entries
    monkeypatch.setattr(DiskCache, "_entries", lambda self: looks.append(1) or entries(self))
    for number in range(1280):
        put(cache, number)
    assert cache.evicted == 0
    for number in range(1280, 1580):
        put(cache, number)
    assert cache.evicted >= 300
    assert len(looks) <= 1580 / 10 + 10
    assert limit * 0.98 < sum(size for _, size, _ in entries(cache)) <= limit


def test_the_limit_holds_for_several_processes_together(tmp_path: Path) -> None:
    """What others add is found out by and by, what a cache adds by itself at once."""
    limit = 100 * 20
    caches = [DiskCache(tmp_path, limit) for _ in range(3)]
    for number in range(90):
        put(caches[number % 3], number)
        assert sum(size for _, size, _ in caches[0]._entries()) <= limit + 3 * 100
    alone = DiskCache(tmp_path, 100 * 200)
    for number in range(90, 250):
        put(alone, number)
    alone._limit = limit
    put(alone, 250)
    assert sum(size for _, size, _ in alone._entries()) <= limit


def test_full_disk_empties_the_cache_and_tries_once_more(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10_000)
    put(cache, 0)
    calls = []

    def fill(path: Path) -> None:
        calls.append(held(cache))
        path.write_bytes(b"x" * 50)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_bytes(b"x" * 100)

    events.clear()
    os.close(cache.open(name(1), 100, fill))
    assert calls == [[name(0)], []]
    assert events.snapshot()["cache.disk_full"] == 1

    def never(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(HardwareError, match=r"cannot be written: No space left"):
        cache.open(name(2), 100, never)
    assert not list(tmp_path.rglob("*.filling"))


def test_one_thread_fills_while_the_others_wait(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10_000)
    fills = []

    def fill(path: Path) -> None:
        fills.append(1)
        time.sleep(0.1)
        path.write_bytes(b"y" * 100)

    results = []
    threads = [
        threading.Thread(target=lambda: results.append(os.fstat(cache.open(name(7), 100, fill)).st_size))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [100] * 6
    assert len(fills) == 1


def test_a_failed_fill_leaves_nothing(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10_000)

    def fill(path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("the store is gone")

    with pytest.raises(RuntimeError):
        cache.open(name(1), 100, fill)
    assert held(cache) == []
    assert put(cache, 1) == b"\x01" * 100


def test_folders_of_others_are_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "shards").symlink_to(tmp_path / "real")
    with pytest.raises(HardwareError, match="nobody else can write to"):
        DiskCache(tmp_path / "a", 100)
    (tmp_path / "b" / "shards").mkdir(parents=True)
    (tmp_path / "b" / "shards").chmod(0o777)
    with pytest.raises(HardwareError, match="nobody else can write to"):
        DiskCache(tmp_path / "b", 100)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(HardwareError, match="cannot be used"):
        DiskCache(tmp_path / "file", 100)


def test_an_entry_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10_000)
    put(cache, 1)
    path = next(tmp_path.rglob(name(1)))
    path.unlink()
    (tmp_path / "evil").write_bytes(b"e" * 100)
    path.symlink_to(tmp_path / "evil")
    assert put(cache, 1) == b"\x01" * 100
    assert (tmp_path / "evil").read_bytes() == b"e" * 100


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "ardist"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "ardist"
