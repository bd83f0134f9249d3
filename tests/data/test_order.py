"""The order of samples: against a literal reading of its definition, and under kills, resumes and resizes."""

from __future__ import annotations

import json
import os
import random
import resource
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ardist.data.keyed import Domain, below, derive_key, permutation
from ardist.data.order import Cursor, LaneOrder, batch_start, check_layout, divisors
from ardist.errors import CheckpointError, ConfigError

SCHEDULES = int(os.environ.get("ARDIST_ORDER_SCHEDULES", "10000"))
"""How many random schedules are tried: all of them take about half a minute."""

Ids = list[tuple[int, int]]


def literal_stream(counts: Sequence[int], seed: int, epoch: int, lanes: int, window: int) -> Ids:
    """One epoch as (shard, row), written as the definition reads, one sample at a time."""
    total = sum(counts)
    blocks: list[Ids] = [[(shard, row) for row in range(count)] for shard, count in enumerate(counts)]
    if len(counts) < 4 * lanes:
        longest = max(1, total // (4 * lanes))
        pieces = []
        for block in blocks:
            parts = -(-len(block) // longest)
            pieces += [block[len(block) * part // parts : len(block) * (part + 1) // parts] for part in range(parts)]
        blocks = pieces
    order = permutation(derive_key(Domain.BLOCKS, seed, epoch), len(blocks))
    line = [sample for block in order for sample in blocks[block]]
    turn = below(derive_key(Domain.ROTATION, seed, epoch), total)
    line = line[turn:] + line[:turn]
    length = total // lanes
    shuffled: list[Ids] = []
    for lane in range(lanes):
        own = line[lane * length : (lane + 1) * length]
        result: Ids = []
        for number in range(-(-length // window)):
            part = own[number * window : (number + 1) * window]
            inside = permutation(derive_key(Domain.WINDOW, seed, epoch, lane, number), len(part))
            result += [part[place] for place in inside]
        shuffled.append(result)
    return [shuffled[place % lanes][place // lanes] for place in range(lanes * length)]


def ids(order: LaneOrder, epoch: int, consumed: int, count: int, start: int = 0, stop: int | None = None) -> Ids:
    places = order.take(epoch, consumed, count, start, stop)
    return list(zip(places.shards.tolist(), places.rows.tolist(), strict=True))


counts_of_shards = st.one_of(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.lists(st.sampled_from([1, 2, 300]), min_size=1, max_size=4),
)


@settings(max_examples=100, deadline=None)
@given(counts_of_shards, st.integers(0, 2**64 - 1), st.integers(0, 3), st.integers(1, 9), st.integers(1, 50))
def test_stream_is_the_literal_one(counts: list[int], seed: int, epoch: int, lanes: int, window: int) -> None:
    if lanes > sum(counts):
        return
    order = LaneOrder(counts, seed=seed, lanes=lanes, window=window)
    expected = literal_stream(counts, seed, epoch, lanes, window)
    assert order.stream_length == len(expected) == len(set(expected))
    for start in range(0, len(expected) - lanes + 1, lanes):
        assert ids(order, epoch, start, lanes) == expected[start : start + lanes]


def test_batch_is_laid_out_lane_by_lane_so_that_ranks_keep_to_their_lanes() -> None:
    order = LaneOrder([50, 31, 40], seed=3, lanes=6, window=4)
    for step in range(order.steps(12)):
        lanes = order.take(0, step * 12, 12).positions // order.lane_length
        assert lanes.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


@settings(max_examples=100, deadline=None)
@given(counts_of_shards, st.integers(1, 9), st.integers(1, 50), st.integers(1, 3), st.data())
def test_several_batches_at_once_are_those_one_by_one(
    counts: list[int], lanes: int, window: int, each: int, data: st.DataObject
) -> None:
    count, total = lanes * each, sum(counts) // lanes * lanes
    if count > total:
        return
    order = LaneOrder(counts, seed=1, lanes=lanes, window=window)
    batches = data.draw(st.integers(1, total // count))
    consumed = data.draw(st.integers(0, total - count * batches))
    start, stop = sorted((data.draw(st.integers(0, count)), data.draw(st.integers(0, count))))
    got = order.take(2, consumed, count, start, stop, batches=batches)
    one_by_one = [order.take(2, consumed + number * count, count, start, stop) for number in range(batches)]
    for column, expected in zip(got, zip(*one_by_one, strict=True), strict=True):
        assert column.tolist() == np.concatenate(expected).tolist()


def numbers(order: LaneOrder, epoch: int, consumed: int, count: int, start: int = 0, stop: int | None = None) -> Any:
    """`ids` as one integer each."""
    places = order.take(epoch, consumed, count, start, stop)
    return places.shards * 1000 + places.rows


def whole_stream(order: LaneOrder, epoch: int) -> Any:
    """The epoch in the order of its stream: the lanes in turn."""
    return numbers(order, epoch, 0, order.stream_length).reshape(order.lanes, -1).T.reshape(-1)


def run_schedule(rng: random.Random) -> None:
    """One run with at least three kills inside an epoch, and resizes, against the stream that nothing interrupted."""
    counts = [rng.choice([1, 3, 17, 60, rng.randint(1, 100)]) for _ in range(rng.randint(1, 9))]
    lanes = rng.randint(1, min(12, sum(counts)))
    window, seed, resize = rng.choice([1, 3, 16, 1000]), rng.getrandbits(64), rng.random() < 0.5
    reference = LaneOrder(counts, seed=seed, lanes=lanes, window=window)
    batches = [lanes * max(1, reference.lane_length // steps) for steps in (4, 6, 9)]
    streams = [whole_stream(reference, epoch) for epoch in range(2)]
    served: list[list[Any]] = [[], []]
    cursor, order, batch = Cursor("digest", seed, lanes, window), reference, batches[0]
    kill_before = set(rng.sample(range(1, 5), 3)) | {rng.randint(5, 9)}
    for step in range(10):
        if step in kill_before:
            state = json.loads(json.dumps(cursor.state_dict()))
            cursor = Cursor("digest", seed, lanes, window)
            cursor.load_state_dict(state)
            order = LaneOrder(counts, seed=seed, lanes=lanes, window=window)
            batch = rng.choice(batches) if resize else batch
        epoch, consumed = batch_start(cursor.epoch, cursor.consumed, batch, order.stream_length)
        if epoch == 2:
            break
        ranks = rng.choice([number for number in divisors(batch) if number <= 6])
        size = batch // ranks
        parts = [numbers(order, epoch, consumed, batch, rank * size, (rank + 1) * size) for rank in range(ranks)]
        got = np.concatenate(parts)
        # The ranks' parts are the global batch that one rank without any kill would have got.
        assert np.array_equal(got, numbers(reference, epoch, consumed, batch))
        assert np.array_equal(np.sort(got), np.sort(streams[epoch][consumed : consumed + batch]))
        served[epoch].append(got)
        cursor.epoch, cursor.consumed = epoch, consumed + batch
    for stream, parts in zip(streams, served, strict=True):
        # Nothing twice, nothing left out: what was served is a prefix of the stream, whatever the batches were.
        together = np.sort(np.concatenate([*parts, np.empty(0, np.int64)]))
        assert len(np.unique(stream)) == len(stream)
        assert np.array_equal(together, np.sort(stream[: len(together)]))


def test_kills_resumes_and_resizes_lose_and_repeat_nothing() -> None:
    for number in range(SCHEDULES):
        run_schedule(random.Random(number))


@pytest.mark.parametrize(
    ("counts", "lanes", "batch"),
    [([64], 4, 16), ([40, 23], 4, 8), ([7], 3, 3), ([5, 1, 9], 8, 8), ([1], 1, 1), ([1, 1], 2, 2), ([100] * 40, 8, 24)],
)
def test_no_sample_stays_unserved(counts: list[int], lanes: int, batch: int) -> None:
    order = LaneOrder(counts, seed=0, lanes=lanes, window=16)
    left = {(shard, row) for shard, count in enumerate(counts) for row in range(count)}
    for epoch in range(50):
        for step in range(order.steps(batch)):
            left -= set(ids(order, epoch, step * batch, batch))
    assert not left


def test_epochs_differ_and_overlap_at_chance() -> None:
    order = LaneOrder([100] * 64, seed=5, lanes=8, window=64)
    first, second = (np.array(ids(order, epoch, 0, 6400)) @ [100, 1] for epoch in (0, 1))
    same = np.mean(first == second)
    assert same < 0.005
    neighbours = {(a, b) for a, b in pairwise(first)}
    kept = sum((a, b) in neighbours for a, b in pairwise(second))
    assert kept < 0.05 * 6400


def test_a_rank_reads_each_shard_about_once() -> None:
    shards, lanes, ranks, batch = 256, 48, 16, 48
    order = LaneOrder([100] * shards, seed=2, lanes=lanes, window=64)
    reads, size = 0, batch // ranks
    for rank in range(ranks):
        seen: set[int] = set()
        for step in range(order.steps(batch)):
            seen.update(order.take(0, step * batch, batch, rank * size, (rank + 1) * size).shards.tolist())
        reads += len(seen)
    assert reads <= 1.2 * shards


def test_substitutes_lie_in_the_window_and_are_known() -> None:
    order = LaneOrder([10, 5, 9], seed=3, lanes=2, window=4)
    assert order.take(1, 4, 8).positions.tolist() == [1, 3, 6, 5, 14, 13, 18, 19]
    assert [order.substitute(1, 9, attempt) for attempt in range(5)] == [9, 9, 10, 10, 11]
    for position in range(order.stream_length):
        first, last = order.window_of(position)
        assert first <= position < last <= (position // order.lane_length + 1) * order.lane_length
        assert all(first <= order.substitute(0, position, attempt) < last for attempt in range(20))
    assert {order.substitute(0, 3, attempt) for attempt in range(32, 400)} == set(range(24))


def test_opens_a_billion_samples_in_little_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    order = LaneOrder(np.full(10**6, 1000), seed=1, lanes=512, window=256)
    consumed = order.stream_length * 9 // 10 // 4096 * 4096
    places = order.take(7, consumed, 4096, 0, 64)
    assert len(places.rows) == 64
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ({"num_samples": 100, "lanes": 3, "global_batch_size": 8}, "legal lanes: [1, 2, 4, 8]"),
        (
            {"num_samples": 100, "lanes": 4, "global_batch_size": 8, "world_size": 3},
            "legal numbers of ranks: [1, 2, 4, 8]",
        ),
        ({"num_samples": 7, "lanes": 2, "global_batch_size": 8}, "multiples of 2 up to 6"),
        ({"num_samples": 1, "lanes": 2, "global_batch_size": 2}, "at most 1 lanes"),
        ({"num_samples": 0, "lanes": 2, "global_batch_size": 2}, "must be at least 1"),
    ],
)
def test_illegal_layouts_name_the_legal_ones(layout: dict[str, int], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_layout(**layout)
    assert expected in str(caught.value)


def test_several_problems_come_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        check_layout(5, lanes=3, global_batch_size=8, world_size=3)
    assert all(text in str(caught.value) for text in ("legal lanes", "legal numbers of ranks", "5 samples"))


def test_impossible_orders_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"legal lanes: 1\.\.3"):
        LaneOrder([3], seed=0, lanes=4, window=1)
    with pytest.raises(ConfigError, match="at least one sample"):
        LaneOrder([3, 0], seed=0, lanes=1, window=1)
    with pytest.raises(ConfigError, match="leave the epoch"):
        LaneOrder([8], seed=0, lanes=2, window=1).take(0, 6, 4)


def test_state_is_small_and_belongs_to_one_order() -> None:
    cursor = Cursor("a" * 64, 7, 4, 16, epoch=3, consumed=400)
    state = cursor.state_dict()
    assert len(json.dumps(state)) < 200
    fresh = Cursor("a" * 64, 7, 4, 16)
    fresh.load_state_dict(state)
    assert fresh == cursor
    for name, value in [("manifest", "b" * 64), ("seed", 8), ("lanes", 8), ("window", 17), ("version", 2)]:
        with pytest.raises(CheckpointError, match=name):
            fresh.load_state_dict({**state, name: value})
    for broken in ({**state, "consumed": 401}, {**state, "epoch": -1}, {**state, "consumed": 4.0}):
        with pytest.raises(CheckpointError, match="consumed"):
            fresh.load_state_dict(broken)
    with pytest.raises(CheckpointError, match="lacks consumed"):
        fresh.load_state_dict({name: value for name, value in state.items() if name != "consumed"})
