"""Two hundred damaged datasets: every damage is detected, named with shard and offset, and never served."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from corruptions import (
    CONTENTS,
    COUNTS,
    RESIZED,
    check_one_bad,
    edit_member,
    flip_index,
    flip_payload,
    named,
    patch,
    records,
    seal,
    serve,
    truncate,
)
from dataset_factory import make_dataset

from ardist.config.data import DataConfig
from ardist.data.health import IN_A_ROW, SampleHealth, Substitution
from ardist.data.loader import StreamingLoader, read_samples
from ardist.data.manifest import Manifest, load_manifest
from ardist.errors import DataError
from ardist.events import events

ROUNDS = 24


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    make_dataset(folder, COUNTS)
    return folder


@pytest.fixture
def copies(original: Path, tmp_path: Path) -> Callable[[int], tuple[Path, Manifest]]:
    def make(number: int) -> tuple[Path, Manifest]:
        folder = tmp_path / str(number)
        shutil.copytree(original, folder)
        return folder, load_manifest(folder)

    return make


def open_loader(folder: Path, **options: object) -> StreamingLoader:
    config = DataConfig(
        **{"path": str(folder), "lanes": 4, "window": 10, "max_bad_fraction": 0.01, "prefetch_bytes": 2**20, **options}
    )
    return StreamingLoader(config, seed=3, global_batch_size=12)


def expect_one_bad(folder: Path, shard: int, row: int, reason: str) -> None:
    check_one_bad(open_loader(folder), load_manifest(folder), shard, row, reason, records(folder, shard))
    with pytest.raises(DataError, match=named(folder, shard, row)):
        read_samples(folder)


def test_flipped_payload_bits(copies: Callable[[int], tuple[Path, Manifest]]) -> None:
    for number in range(3 * ROUNDS):
        folder, manifest = copies(number)
        shard, row = flip_payload(folder, manifest, random.Random(number))
        expect_one_bad(folder, shard, row, "checksum")


@pytest.mark.parametrize(("reason", "edit"), CONTENTS)
def test_wrong_contents_with_right_checksums(
    copies: Callable[[int], tuple[Path, Manifest]], reason: str, edit: Callable[[bytes], bytes]
) -> None:
    for number in range(5):
        folder, manifest = copies(number)
        shard, row = edit_member(folder, manifest, random.Random(number), edit)
        expect_one_bad(folder, shard, row, reason)


def test_class_ids_out_of_range(copies: Callable[[int], tuple[Path, Manifest]]) -> None:
    folder, manifest = copies(0)
    seal(folder, manifest, 1, class_id={7: 5})
    expect_one_bad(folder, 1, 7, "label")


def test_member_sizes_that_differ(copies: Callable[[int], tuple[Path, Manifest]]) -> None:
    folder, manifest = copies(0)
    size = int(records(folder, 1)["size"][0])
    seal(folder, manifest, 1, size={9: size - 2})
    expect_one_bad(folder, 1, 9, "header")


@pytest.mark.parametrize("damage", RESIZED)
def test_files_of_another_size_stop_the_start(copies: Callable[[int], tuple[Path, Manifest]], damage: str) -> None:
    for number in range(6):
        rng = random.Random(number)
        folder, manifest = copies(number)
        entry = manifest.shards[rng.randrange(3)]
        RESIZED[damage](folder / entry.name, rng)
        with pytest.raises(DataError) as caught:
            open_loader(folder)
        assert f"{entry.name} is " in str(caught.value)
        assert caught.value.exit_code == 3


@pytest.mark.parametrize("damage", RESIZED)
def test_files_that_change_after_the_start_are_never_served(
    copies: Callable[[int], tuple[Path, Manifest]], damage: str
) -> None:
    for number in range(3):
        rng = random.Random(number)
        folder, manifest = copies(number)
        shard = rng.randrange(3)
        loader = open_loader(folder, max_bad_fraction=1.0)
        RESIZED[damage](folder / manifest.shards[shard].name, rng)
        assert serve(loader) <= set(range(120)) - set(range(shard * 40, shard * 40 + 40))
        assert {event.shard for event in loader.substitutions} == {manifest.shards[shard].name}
        assert {event.reason for event in loader.substitutions} == {"missing" if damage == "missing" else "length"}


def test_a_file_cut_while_it_is_open_is_noticed(copies: Callable[[int], tuple[Path, Manifest]]) -> None:
    folder, manifest = copies(0)
    loader = open_loader(folder, max_bad_fraction=1.0)
    next(loader)
    state = loader.state_dict()
    truncate(folder / manifest.shards[0].name, 20 * 2048 + 700)
    loader.load_state_dict(state)
    serve(loader, 9)
    assert {event.reason for event in loader.substitutions} == {"length"}
    assert min(event.offset for event in loader.substitutions) > 20 * 2048
    assert max(event.offset for event in loader.substitutions) < 40 * 2048


def test_missing_files_are_all_listed(copies: Callable[[int], tuple[Path, Manifest]]) -> None:
    folder, manifest = copies(0)
    names = [manifest.shards[0].name, manifest.shards[2].index_name]
    for name in names:
        (folder / name).unlink()
    with pytest.raises(DataError) as caught:
        open_loader(folder)
    assert all(f"{name} is missing" in str(caught.value) for name in names)
    assert "missing_shards=substitute" in str(caught.value)


def test_missing_shards_can_be_substituted(copies: Callable[[int], tuple[Path, Manifest]]) -> None:
    folder, manifest = copies(0)
    (folder / manifest.shards[1].name).unlink()
    loader = open_loader(folder, missing_shards="substitute", max_bad_fraction=0)
    assert serve(loader, 50) == {*range(40), *range(80, 120)}
    assert {event.known_missing for event in loader.substitutions} == {True}
    for shard in manifest.shards:
        (folder / shard.name).unlink(missing_ok=True)
    with pytest.raises(DataError, match="no shard of"):
        open_loader(folder, missing_shards="substitute")


def test_index_of_another_shard_is_rebuilt(copies: Callable[[int], tuple[Path, Manifest]]) -> None:
    folder, manifest = copies(0)
    first, second = (folder / manifest.shards[number].index_name for number in (0, 1))
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    events.clear()
    assert len(serve(open_loader(folder))) == 120
    assert events.snapshot()["loader.index_rebuilt"] == 2


def test_flipped_index_bits_are_rebuilt(copies: Callable[[int], tuple[Path, Manifest]]) -> None:
    for number in range(ROUNDS):
        folder, manifest = copies(number)
        flip_index(folder, manifest, random.Random(number))
        events.clear()
        assert len(serve(open_loader(folder))) == 120
        assert events.snapshot()["loader.index_rebuilt"] == 1


def test_another_shard_under_the_name_is_not_served(copies: Callable[[int], tuple[Path, Manifest]]) -> None:
    folder, manifest = copies(0)
    shutil.copyfile(folder / manifest.shards[1].name, folder / manifest.shards[0].name)
    loader = open_loader(folder, max_bad_fraction=1.0)
    assert serve(loader) <= set(range(40, 120))
    assert {event.shard for event in loader.substitutions} == {manifest.shards[0].name}
    assert {event.reason for event in loader.substitutions} == {"checksum"}
    shutil.copyfile(folder / manifest.shards[1].index_name, folder / manifest.shards[0].index_name)
    loader = open_loader(folder, max_bad_fraction=1.0)
    assert serve(loader) <= set(range(40, 120))
    assert {event.reason for event in loader.substitutions} == {"index"}


def test_substitutes_do_not_depend_on_ranks_or_resumes(copies: Callable[[int], tuple[Path, Manifest]]) -> None:
    folder, manifest = copies(0)
    for shard, row in [(0, 3), (1, 9), (2, 30)]:
        patch(folder / manifest.shards[shard].name, int(records(folder, shard)["offset"][row]) + 150, b"!!")
    config = DataConfig(path=str(folder), lanes=4, window=10, max_bad_fraction=0.01, prefetch_bytes=2**20)
    with StreamingLoader(config, seed=3, global_batch_size=12) as whole:
        expected = [next(whole).sample_ids.tolist() for _ in range(20)]
    parts = [StreamingLoader(config, seed=3, global_batch_size=12, rank=rank, world_size=2) for rank in range(2)]
    got = [[number for part in parts for number in next(part).sample_ids.tolist()] for _ in range(12)]
    for part in parts:
        part.close()
    with StreamingLoader(config, seed=3, global_batch_size=12) as resumed:
        resumed.load_state_dict(parts[0].state_dict())
        got += [next(resumed).sample_ids.tolist() for _ in range(8)]
    assert got == expected


def test_too_many_bad_samples_stop_the_run(copies: Callable[[int], tuple[Path, Manifest]]) -> None:
    folder, manifest = copies(0)
    for row in range(12):
        patch(folder / manifest.shards[0].name, int(records(folder, 0)["offset"][row]) + 150, b"!!")
    loader = open_loader(folder, max_bad_fraction=1e-3)
    with pytest.raises(DataError, match=r"11 of the last \d+ samples were bad.*checksum 1\d\. Latest: shards/"):
        serve(loader, 20)


def bad(lane: int, **changes: object) -> Substitution:
    fields = {"epoch": 0, "position": 0, "lane": lane, "shard": "s", "offset": 1, "sample": "k", "reason": "checksum"}
    return Substitution(**{**fields, "detail": "d", "substitute": "k", "attempts": 1, **changes})


def test_a_hundred_in_a_row_in_one_lane_stop_the_run() -> None:
    lanes = np.array([0, 1])
    health = SampleHealth(1.0)
    for _ in range(IN_A_ROW - 1):
        health.served(lambda: lanes, len(lanes), {1: bad(1)})
    health.served(lambda: lanes, len(lanes), {})
    for _ in range(IN_A_ROW - 1):
        health.served(lambda: lanes, len(lanes), {1: bad(1)})
    with pytest.raises(DataError, match="100 samples in a row were bad in lane 1"):
        health.served(lambda: lanes, len(lanes), {1: bad(1)})


def test_the_limit_looks_at_the_last_ten_thousand() -> None:
    health = SampleHealth(2e-4)
    lanes = np.zeros(5000, np.int64)
    for _ in range(10):
        health.served(lambda: lanes, len(lanes), {7: bad(0)})
    health.served(lambda: lanes, len(lanes), {7: bad(0, known_missing=True)})
    health.served(lambda: lanes, len(lanes), {7: bad(0), 8: bad(0)})
    with pytest.raises(DataError, match="3 of the last 10000"):
        health.served(lambda: lanes, len(lanes), {7: bad(0)})
