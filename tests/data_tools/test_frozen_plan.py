"""The frozen plan: the same for the same videos, opened without its rows, and guarded to the last byte."""

from __future__ import annotations

import functools
import json
import re
import sqlite3
import tempfile
import tracemalloc
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import pytest
from dt_builds import build_small
from dt_plans import RATE, Watched, frozen, invented

from ardist.errors import DataError
from ardist.storage import LocalStorage, Storage, StorageError, open_storage
from data_tools import freeze, layout
from data_tools.cli import main
from data_tools.finalize import finalize
from data_tools.gc import collect
from data_tools.lease import Lease, Leases
from data_tools.listing import CHUNK, Listing
from data_tools.parameters import BuildParameters
from data_tools.plan import Plan, load_plan
from data_tools.plan_header import PAGE
from data_tools.probed import Source
from data_tools.reasons import Reason, Refusal
from data_tools.sealed import seal, unseal
from data_tools.sources import Listed
from data_tools.verify import verify

Child = Callable[[Callable[[], Any], str], int]


@pytest.fixture(params=["local", "s3"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty output, a folder and a prefix of a server."""
    return str(tmp_path / "out") if request.param == "local" else f"{request.getfixturevalue('s3_url')}/out"


def _mixed() -> list[Source]:
    """Twelve videos: good ones of different lengths and classes, copies, short, refused and unlabelled ones."""
    sources = [invented(n, 8 + 4 * (n % 3), class_name=f"class {n % 2}", caption="a" * n) for n in range(8)]
    sources += [invented(8, content=3), invented(9, 3), invented(10, 9), invented(11)]
    sources[11] = Source("11.mp4", 5, "v").refusal(Refusal(Reason.FORMAT, "no video"), "probe")
    return sources


def _rows(plan: Plan) -> list[tuple[str, int]]:
    return [(clip.video.name, clip.start) for shard in range(plan.num_shards) for clip in plan.clips(shard)]


def _opened(storage: Storage | Watched) -> Plan:
    plan = load_plan(cast(Storage, storage))
    assert plan is not None
    return plan


@pytest.mark.parametrize(("limit", "used"), [({}, 9), ({"limit_videos": 3}, 3), ({"limit_clips": 7}, 9)])
def test_rows_are_those_of_a_plain_sort(out: str, limit: dict[str, int], used: int) -> None:
    """Shards cut the sorted rows wherever they are full, also within a video."""
    sources = _mixed()
    plan = frozen(out, sources, **limit)
    good = [*sources[:8], sources[10]][:used]
    rows = sorted(
        (source.facts.sha256, start, source.name)  # type: ignore[union-attr]
        for source in good
        for start in range(0, source.facts.count - 3, 4)  # type: ignore[union-attr]
    )[: limit.get("limit_clips")]
    assert _rows(plan) == [(name, start) for _, start, name in rows]
    assert [len(plan.clips(shard)) for shard in range(plan.num_shards)][:-1] == [4] * (plan.num_shards - 1)
    assert plan.header.num_clips == len(rows)
    clips = [clip for shard in range(plan.num_shards) for clip in plan.clips(shard)]
    assert [clip.row for clip in clips] == list(range(len(rows)))
    by_name = {source.name: source for source in sources}
    assert len({clip.key for clip in clips}) == len(clips)
    classes = plan.classes()
    assert classes == ["class 0", "class 1"]
    for clip in clips:
        source = by_name[clip.video.name]
        assert (clip.video.size, clip.video.version, clip.video.facts) == (source.size, source.version, source.facts)
        assert (clip.video.caption, clip.fps) == (source.caption, RATE)
        assert source.class_name == (None if clip.video.class_id is None else classes[clip.video.class_id])
    refused: list[bytes] = []
    plan.stream_refused(refused.append)
    records = [json.loads(line) for line in b"".join(refused).splitlines()]
    assert [(record["source"], record["reason"]) for record in records] == [
        ("00008.mp4", "duplicate"),
        *([("00009.mp4", "too_short")] if used > 3 else []),
        ("11.mp4", "format"),
    ]
    assert records[0]["detail"] == "same content as 00003.mp4"
    header = plan.header
    assert (header.num_videos, header.num_duplicates, header.num_bad) == (12, 1, len(records) - 1)


def test_the_digest_is_one_of_content(tmp_path: Path) -> None:
    """Neither places nor times, but everything that decides what comes out."""
    numbers = iter(range(100))

    def digest(sources: list[Source], **changes: Any) -> str:
        return frozen(tmp_path / str(next(numbers)), sources, **changes).digest

    first = digest(_mixed())
    assert digest(_mixed()) == first
    moved = [Source(s.name, s.size, "other", s.facts, s.class_name, s.caption, s.refused) for s in _mixed()]
    assert digest(moved, root="/elsewhere") == first
    others = [_mixed() for _ in range(6)]
    others[0].pop()
    others[1][0] = invented(0, 8, class_name="class 1", caption="")
    others[2][1] = invented(1, 12, class_name="class 1", caption="b")
    others[3][0] = invented(0, 8, class_name="class 0", caption="", content=77)
    others[4][11] = Source("11.mp4", 5, "v").refusal(Refusal(Reason.CODEC, "no video"), "probe")
    others[5][2] = invented(2, 16, class_name="class 0", caption="aa", name="renamed.mp4")
    digests = [digest(sources) for sources in others]
    digests += [digest(_mixed(), stride=2), digest(_mixed(), samples_per_shard=5)]
    assert len({first, *digests}) == 9


def test_a_worker_reads_only_its_shards(out: str) -> None:
    """The header to open it, then one page of digests and one range for a shard: counted in bytes, not in seconds."""
    shards = PAGE + 60
    plan = frozen(out, (invented(number) for number in range(3 * shards)), samples_per_shard=9)
    assert plan.num_shards == shards
    watched = Watched(open_storage(out))
    plan = _opened(watched)
    [(name, start, header)] = watched.new_reads()
    assert (name, start) == (layout.PLAN, 0)
    assert header < 4096
    clips = plan.clips(7)
    (_, _, page), (name, start, block) = watched.new_reads()
    assert name == plan.header.rows_name
    assert len(clips) == 9
    assert block * shards == pytest.approx(plan.header.rows_bytes, rel=0.25), "of the rows it reads its share"
    assert page < 200 * PAGE, "what leads to a shard does not grow with what shards hold"
    plan.clips(8)
    [(_, after, _)] = watched.new_reads()
    assert after == start + block, "shards lie side by side, their page is read once"
    assert len(plan.clips(PAGE + 1)) == 9
    assert len(list(watched.new_reads())) == 2


def test_memory_does_not_grow_with_the_plan(tmp_path: Path) -> None:
    """Neither in a worker nor in the planner, but for what SQLite caches, which has a limit of its own."""
    peaks: list[tuple[int, int]] = []
    frozen(tmp_path / "first", [invented(0)])
    for count in (150, 1500):
        tracemalloc.start()
        frozen(tmp_path / str(count), (invented(number) for number in range(count)), samples_per_shard=30)
        _, planner = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        plan = _opened(LocalStorage(tmp_path / str(count)))
        plan.clips(plan.num_shards - 1)
        peaks.append((planner, tracemalloc.get_traced_memory()[1] - before))
        tracemalloc.stop()
    (small_planner, small_worker), (large_planner, large_worker) = peaks
    rows = plan.header.rows_bytes
    page = 700 * min(PAGE, plan.num_shards)
    assert large_worker < small_worker + page + 10_000 < rows / 3
    assert large_planner < small_planner + page + 10_000 < rows / 3


def test_every_byte_of_the_rows_is_guarded(out: str) -> None:
    """A flipped byte in a shard's rows is found and named with the shard, and all other shards can still be read."""
    plan = frozen(out, _mixed())
    watched = Watched(open_storage(out))
    plan = _opened(watched)
    plan.clips(0)
    list(watched.new_reads())
    ranges: dict[int, tuple[int, int]] = {}
    for shard in range(plan.num_shards):
        plan.clips(shard)
        [(_, start, size)] = watched.new_reads()
        ranges[shard] = (start, start + size)
    assert len(ranges) == 7
    storage, name = open_storage(out), plan.header.rows_name
    good = storage.read(name)
    step = 23 if storage.local_path(name) else 997
    for at in range(0, len(good), step):
        storage.put(name, good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        damaged = _opened(storage)
        found = [str(error) for error in damaged.damage()]
        assert found, at
        hit = [shard for shard, (start, end) in ranges.items() if start <= at < end]
        for shard in ranges:
            if shard in hit:
                assert [f"{name} is damaged: the rows of shard {shard}," in message for message in found] == [True]
                with pytest.raises(DataError, match=f"is damaged: the rows of shard {shard},"):
                    damaged.clips(shard)
            elif hit:
                damaged.clips(shard)
    storage.put(name, good)
    assert not list(_opened(storage).damage())


def test_cut_rows_are_named(out: str) -> None:
    plan = frozen(out, _mixed())
    storage, name = open_storage(out), plan.header.rows_name
    good = storage.read(name)
    for size in (0, 10, len(good) // 3, len(good) - 1):
        storage.put(name, good[:size])
        cut = _opened(storage)
        found = [str(error) for error in cut.damage()]
        assert any(f"has {size} bytes, plan.json says {len(good)}" in message for message in found)
        with pytest.raises(DataError, match=r"is cut: the (digests of shards 0 to 6|class names) take \d+ bytes from"):
            cut.clips(0), cut.classes()
    # What stands behind the page that leads to it is missing alone.
    plan.clips(0)
    storage.put(name, good[: len(good) // 3])
    with pytest.raises(DataError, match=r"is cut: the rows of shard 6 take \d+ bytes from byte \d+, of which 0 are"):
        plan.clips(6)
    storage.put(name, good + b"x")
    assert len(list(_opened(storage).damage())) == 1
    storage.delete(name)
    gone = _opened(storage)
    for read in (functools.partial(gone.clips, 0), gone.classes, lambda: gone.stream_refused(lambda piece: None)):
        with pytest.raises(DataError, match=f"{name} is missing: without its rows the plan cannot be built"):
            read()
    assert [str(error) for error in gone.damage() if "is missing" not in str(error)] == []


def test_every_byte_of_the_header_is_guarded(tmp_path: Path) -> None:
    plan = frozen(tmp_path, _mixed())
    path = tmp_path / layout.PLAN
    good = path.read_bytes()
    for at in range(0, len(good), 3):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(DataError, match=r"plan\.json is damaged"):
            load_plan(LocalStorage(tmp_path))
    for size in (0, 1, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(DataError, match=r"plan\.json is damaged"):
            load_plan(LocalStorage(tmp_path))
    path.write_bytes(good)
    # Whoever edits digests and seals them again has made another plan, under this one's name.
    fields = unseal(good, "plan")
    fields["pages"][0][2][1] = "0" * 64
    path.write_bytes(seal(fields))
    with pytest.raises(DataError, match=r"it describes plan [0-9a-f]{12} and names another"):
        load_plan(LocalStorage(tmp_path))
    assert plan.digest == unseal(good, "plan")["plan"]


def test_plans_of_other_versions_are_refused(
    three_videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_small(three_videos, tmp_path / "out")
    path = tmp_path / "out" / layout.PLAN
    fields = unseal(path.read_bytes(), "plan")
    path.write_bytes(seal({**fields, "version": 3}))
    with pytest.raises(DataError, match="is a plan of version 3, this program reads version 2: go on with the release"):
        build_small(three_videos, tmp_path / "out")
    path.unlink()
    (tmp_path / "out" / layout.OLD_PLAN).write_bytes(b"{}")
    with pytest.raises(DataError, match=r"plan\.jsonl is a plan of version 1") as caught:
        build_small(three_videos, tmp_path / "out")
    assert caught.value.exit_code == 3
    assert main(["verify", str(tmp_path / "out")]) == 3
    assert "plan.jsonl is a plan of version 1" in capsys.readouterr().err
    assert main(["gc", str(tmp_path / "out")]) == 3


@pytest.mark.parametrize("point", ["build.before_rows", "build.before_plan", "build.after_plan"])
def test_a_planner_that_dies_is_followed_by_another(out: str, tmp_path: Path, in_child: Child, point: str) -> None:
    """Between rows and header nothing stands; the next one writes the same bytes under the same name."""
    storage = open_storage(out)
    assert in_child(lambda: frozen(out, _mixed()), f"kill@{point}") == -9
    assert list(storage.list()) == sorted(
        name
        for name in (frozen(tmp_path / "whole", _mixed()).header.rows_name, layout.PLAN)
        if point == "build.after_plan" or (point == "build.before_plan" and name != layout.PLAN)
    )
    plan = frozen(out, _mixed())
    assert plan.digest == _opened(LocalStorage(tmp_path / "whole")).digest
    assert list(storage.list()) == sorted([layout.PLAN, plan.header.rows_name])
    assert not list(plan.damage())


def test_a_planner_that_comes_late_leaves_the_plan_alone(tmp_path: Path) -> None:
    """Rows that differ, as those of another release may, go away with their planner."""
    first = frozen(tmp_path, _mixed())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert frozen(tmp_path, _mixed(), root="/elsewhere").digest == first.digest
    assert frozen(tmp_path, _mixed()[:5]).digest == first.digest
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_one_builder_plans_and_the_others_wait(
    three_videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = LocalStorage(tmp_path / "out")
    lease = Leases(storage, "other", 3600).take("plan")
    assert isinstance(lease, Lease)
    waited: list[bool] = []

    def sleep(seconds: float) -> None:
        waited.append(storage.exists(layout.PLAN) or any(storage.list(layout.ROWS)))
        if len(waited) == 3:
            lease.__exit__()

    monkeypatch.setattr("data_tools.freeze.time", types.SimpleNamespace(sleep=sleep))
    said: list[str] = []
    monkeypatch.setattr(freeze._log, "info", lambda text, *words: said.append(text % words))
    build_small(three_videos, tmp_path / "out")
    assert waited == [False, False, False]
    assert said == ["waiting for another builder, which makes the plan", "making the plan of 3 videos"]


def _fill_the_disk(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """From now on files of this name have no room."""
    real = Path.open

    def opened(self: Path, mode: str = "r", *words: Any, **more: Any) -> Any:
        full = self.name == name and mode in ("xb", "wb")
        return real(Path("/dev/full"), "wb") if full else real(self, mode, *words, **more)

    monkeypatch.setattr(Path, "open", opened)


def _place(out: str) -> str:
    """Where a disk without room is named: TMPDIR helps where the output is no folder."""
    if out.startswith("s3://"):
        return (
            f"{tempfile.gettempdir()}: No space left on device; make room there, or name another folder in TMPDIR, and"
        )
    return f"{out}: No space left on device; make room there and"


def test_no_room_for_a_plan_is_one_message(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as during:
        _fill_the_disk(during, "rows")
        with pytest.raises(StorageError, match=re.escape(f"cannot write the plan in {_place(out)} run build again")):
            frozen(out, _mixed())
    with monkeypatch.context() as during:
        full = sqlite3.OperationalError("database or disk is full")
        during.setattr("data_tools.draft.Draft.add", Mock(side_effect=full))
        with pytest.raises(StorageError, match="cannot write the plan in .*: database or disk is full; make room"):
            frozen(out, _mixed())
    with monkeypatch.context() as during:
        during.setattr("data_tools.freeze.tool_versions", Mock(side_effect=FileNotFoundError(2, "no", "ffmpeg")))
        with pytest.raises(FileNotFoundError):  # no matter of room
            frozen(out, _mixed())
    assert list(open_storage(out).list()) == []
    assert not list(frozen(out, _mixed()).damage())


def test_no_room_for_the_quarantine_is_one_message(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = Source("a.mp4", 5, "v").refusal(Refusal(Reason.FORMAT, "no video"), "probe")
    plan, storage = frozen(out, [refused]), open_storage(out)
    before = list(storage.list())
    _fill_the_disk(monkeypatch, layout.QUARANTINE)
    message = f"cannot write {layout.QUARANTINE} in {_place(out)} run build again"
    with pytest.raises(StorageError, match=re.escape(message)) as caught:
        finalize(storage, plan)
    assert caught.value.exit_code == 4
    assert list(storage.list()) == before


def test_rows_of_another_plan_are_garbage(three_videos: Path, tmp_path: Path) -> None:
    build_small(three_videos, tmp_path / "out")
    rows = _opened(LocalStorage(tmp_path / "out")).header.rows_name
    stray = tmp_path / "out" / layout.rows_name("f" * 64)
    stray.write_bytes(b"x")
    report = verify(str(tmp_path / "out"))
    assert ([note.name for note in report.notes], report.problems) == ([layout.rows_name("f" * 64)], [])
    assert collect(str(tmp_path / "out"), older_than=0, dry_run=False).names == [layout.rows_name("f" * 64)]
    assert not stray.exists()
    assert (tmp_path / "out" / rows).exists()


def test_a_listing_is_read_by_the_chunk(tmp_path: Path) -> None:
    """Also where the last chunk is full, and with names that are no valid text."""
    for count in (CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1):
        listed = [Listed(f"{n} ü\udcff\n.mp4", n, "v", Reason.EMPTY if n % 7 == 0 else None) for n in range(count)]
        lines = [json.dumps({"root": "/v"}), *(item.line() for item in listed)]
        storage = LocalStorage(tmp_path / str(count))
        storage.put(layout.LISTING, "".join(line + "\n" for line in lines).encode())
        listing = Listing.read(storage, tmp_path / f"{count}.copy")
        assert (listing.count, listing.root.address) == (count, "/v")
        assert [item for number in range(listing.num_chunks) for item in listing.chunk(number)] == listed


def test_no_videos_make_an_empty_plan(tmp_path: Path) -> None:
    refused = [Source("a.mp4", 5, "v").refusal(Refusal(Reason.FORMAT, "no video"), "probe")]
    plan = frozen(tmp_path, refused)
    assert (plan.num_shards, plan.header.pages, plan.classes()) == (0, (), None)
    assert isinstance(plan.parameters, BuildParameters)
    lines: list[bytes] = []
    plan.stream_refused(lines.append)
    assert json.loads(b"".join(lines))["reason"] == "format"
    assert not list(plan.damage())
