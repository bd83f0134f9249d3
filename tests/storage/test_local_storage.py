"""A folder as storage: what is promised to every reader and writer, also when the writer dies or competes."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ardist.errors import InvalidValueError
from ardist.events import events
from ardist.storage import ChangedObjectError, LocalStorage, MissingObjectError, StorageError, is_remote, open_storage


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "root")


def test_put_then_read_whole_and_ranges(storage: LocalStorage) -> None:
    storage.put("a/b.bin", b"0123456789")
    assert storage.read("a/b.bin") == b"0123456789"
    assert storage.read("a/b.bin", 3) == b"3456789"
    assert storage.read("a/b.bin", 3, 4) == b"3456"
    assert storage.read("a/b.bin", 8, 10) == b"89"
    assert storage.read("a/b.bin", 20, 5) == b""
    assert storage.read("a/b.bin", length=0) == b""
    assert storage.size("a/b.bin") == 10
    assert storage.exists("a/b.bin")
    assert not storage.exists("a")


def test_put_of_a_file_copies_or_moves(storage: LocalStorage, tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(b"x" * 100_000)
    storage.put("copy", source)
    assert source.exists()
    storage.put("moved", source, move=True)
    assert not source.exists()
    assert storage.read("copy") == storage.read("moved") == b"x" * 100_000


def test_folders_are_private(storage: LocalStorage) -> None:
    storage.put("a/b/c", b"")
    assert stat.S_IMODE((storage.root / "a" / "b").stat().st_mode) == 0o700
    assert stat.S_IMODE(storage.root.stat().st_mode) == 0o700


def test_missing_objects_are_named(storage: LocalStorage) -> None:
    with pytest.raises(MissingObjectError, match=r"nothing/here does not exist"):
        storage.read("nothing/here")
    with pytest.raises(MissingObjectError):
        storage.size("nothing")
    storage.delete("nothing")
    assert list(storage.list()) == []


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../../x", "a//b", ".", "a/.", "a\0b"])
def test_names_cannot_leave_the_root(storage: LocalStorage, name: str) -> None:
    with pytest.raises(InvalidValueError, match="is not an object name"):
        storage.put(name, b"x")


def test_list_is_sorted_by_whole_name_and_hides_unfinished_writes(storage: LocalStorage) -> None:
    names = ["a/z", "a-b", "a/b/c", "b", "a", "ä", "a b", "shards/1", "shards/2"]
    for name in ["a/z", "a-b", "a/b/c", "b", "ä", "a b", "shards/1", "shards/2"]:
        storage.put(name, b"")
    (storage.root / "shards" / ".tmp-1-dead").write_bytes(b"half")
    (storage.root / ".tmp-stage").mkdir()
    (storage.root / ".tmp-stage" / "x").write_bytes(b"half")
    names.remove("a")
    assert list(storage.list()) == sorted(names)
    assert list(storage.list("shards/")) == ["shards/1", "shards/2"]
    assert list(storage.list("shards/2")) == ["shards/2"]
    assert list(storage.list("none/")) == []


def test_create_has_exactly_one_winner(storage: LocalStorage) -> None:
    barrier = threading.Barrier(8)
    won: list[int] = []

    def compete(number: int) -> None:
        barrier.wait()
        if storage.create("lock", str(number).encode() * 1000):
            won.append(number)

    threads = [threading.Thread(target=compete, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert storage.read("lock") == str(won[0]).encode() * 1000
    assert list(storage.list()) == ["lock"]


def test_create_works_without_hard_links(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    assert storage.create("a", b"1")
    assert not storage.create("a", b"2")
    assert storage.read("a") == b"1"


def test_a_version_pins_the_object(storage: LocalStorage) -> None:
    storage.put("a", b"old")
    version = storage.stat("a").version
    assert storage.read("a", version=version) == b"old"
    storage.put("a", b"new")
    with pytest.raises(ChangedObjectError):
        storage.read("a", version=version)
    with pytest.raises(ChangedObjectError):
        storage.download("a", storage.root / "copy", version)


def test_download_returns_the_digest(storage: LocalStorage, tmp_path: Path) -> None:
    storage.put("a", b"abc")
    assert storage.download("a", tmp_path / "copy").startswith("ba7816bf")
    assert (tmp_path / "copy").read_bytes() == b"abc"


def test_a_link_is_replaced_not_followed(storage: LocalStorage, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    storage.put("plain", b"")
    (storage.root / "link").symlink_to(outside)
    storage.put("link", b"mine")
    assert outside.read_bytes() == b"precious"
    assert storage.read("link") == b"mine"


def test_a_linked_folder_below_the_root_is_refused(storage: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    storage.put("plain", b"")
    (storage.root / "shards").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="not a plain folder"):
        storage.put("shards/a", b"x")
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("point", ["storage.local_before_sync", "storage.local_before_rename"])
def test_a_kill_while_writing_leaves_the_old_object(storage: LocalStorage, point: str) -> None:
    storage.put("a", b"old")
    code = "from ardist.storage import open_storage; import sys; open_storage(sys.argv[1]).put('a', b'new' * 1000)"
    environment = {**os.environ, "ARDIST_FAULT": f"kill@{point}"}
    done = subprocess.run([sys.executable, "-c", code, storage.url], env=environment, check=False)
    assert done.returncode == -9
    assert storage.read("a") == b"old"
    assert list(storage.list()) == ["a"]


def test_no_space_is_one_message(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARDIST_FAULT", f"raise@storage.local_before_sync:{errno.ENOSPC}")
    with pytest.raises(StorageError, match="No space left on device") as caught:
        storage.put("a", b"x")
    assert caught.value.exit_code == 4
    assert not any(storage.root.iterdir())


def test_a_stale_handle_is_retried_and_counted(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    from ardist import fault

    storage.put("a", b"x")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    fault._visits.clear()
    events.clear()
    monkeypatch.setenv(
        "ARDIST_FAULT", f"raise@storage.local_read#1:{errno.ESTALE};raise@storage.local_read#2:{errno.EIO}"
    )
    assert storage.read("a") == b"x"
    assert events.snapshot() == {"storage.retry": 2}
    monkeypatch.setenv("ARDIST_FAULT", f"raise@storage.local_read:{errno.EIO}")
    with pytest.raises(StorageError, match="cannot read"):
        storage.read("a")


def test_addresses(tmp_path: Path) -> None:
    assert open_storage(str(tmp_path)).url == str(tmp_path)
    assert open_storage(f"file://{tmp_path}").url == str(tmp_path)
    assert not is_remote("file:///data")
    assert not is_remote("C:/data")
    assert is_remote("s3://bucket/prefix")
    for bad in ("", "ftp://x/y", "s3://", "file://relative", "s3://key:secret@bucket/x"):
        with pytest.raises(InvalidValueError):
            open_storage(bad)
