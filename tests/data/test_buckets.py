"""Buckets of frame counts under a token budget: one bucket per step, exact and resumable."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from dataset_factory import latent, make_dataset, number_of
from hypothesis import given, settings
from hypothesis import strategies as st

from ardist.config import check
from ardist.config.data import DataConfig
from ardist.config.training import micro_batches
from ardist.data.batch import RowBuffer
from ardist.data.buckets import bucket_batches, check_buckets, tokens_of
from ardist.data.loader import BatchLoader, open_loader
from ardist.errors import ConfigError

FRAMES, COUNTS = [8, 4, 1], [[60, 50], [90, 47], [200, 220]]
BUDGET = 8 * 3 * 12 + 5  # 12 clips of 8 frames of 3 tokens, 24 of 4, 96 images


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    base = tmp_path_factory.mktemp("buckets")
    for number, (frames, counts) in enumerate(zip(FRAMES, COUNTS, strict=True)):
        make_dataset(base / str(frames), counts, shape=(frames, 3, 4), make=numbered(1000 * number))
    return [base / str(frames) for frames in FRAMES]


def numbered(first: int) -> Any:
    return lambda number, shape: latent(first + number, shape)


def open_buckets(
    folders: list[Path], *, batch: int = 12, rank: int = 0, world_size: int = 1, **options: Any
) -> BatchLoader:
    mixture = [{"path": str(path), "weight": w} for path, w in zip(folders, [2, 1, 1], strict=True)]
    fields = {"mixture": mixture, "mixture_by": "step", "lanes": 4, "window": 24, "tokens_per_batch": BUDGET}
    config = DataConfig(**{**fields, "prefetch_bytes": 2**21, **options})
    return open_loader(config, seed=5, global_batch_size=batch, rank=rank, world_size=world_size)


def taken(loader: BatchLoader) -> tuple[int, int, list[int], bytes]:
    batch = next(loader)
    return batch.values.shape[1], batch.epoch, [number_of(v) for v in batch.values], batch.values.numpy().tobytes()


def test_every_step_is_of_one_bucket_and_keeps_the_budget(folders: list[Path]) -> None:
    with open_buckets(folders) as loader:
        assert loader.global_batch_sizes == (12, 24, 96)
        assert (loader.batch_size, loader.global_batch_size) == (12, 12)
        steps = {8: 0, 4: 0, 1: 0}
        seen: dict[tuple[int, int], list[int]] = {}
        samples = 0
        for step in range(1, 81):
            frames, epoch, numbers, _ = taken(loader)
            steps[frames] += 1
            samples += len(numbers)
            assert len(numbers) == {8: 12, 4: 24, 1: 96}[frames]
            assert BUDGET - 4 * frames * 3 < len(numbers) * frames * 3 <= BUDGET
            assert {number // 1000 for number in numbers} == {FRAMES.index(frames)}
            seen.setdefault((frames, epoch), []).extend(numbers)
            for bucket, share in ((8, 0.5), (4, 0.25), (1, 0.25)):
                assert abs(steps[bucket] - share * step) < 1
        assert loader.metrics()["samples"] == samples
    for numbers in seen.values():
        assert len(set(numbers)) == len(numbers)  # nothing twice in an epoch of its dataset
    whole = {key: len(numbers) for key, numbers in seen.items() if (key[0], key[1] + 1) in seen}
    assert whole == {
        (frames, epoch): sum(COUNTS[FRAMES.index(frames)]) // 4 * 4 // size * size
        for frames, epoch in whole
        for size in [{8: 12, 4: 24, 1: 96}[frames]]
    }
    assert {frames for frames, _ in whole} == {8, 4, 1}


def test_ranks_and_resumes_do_not_change_the_steps(folders: list[Path]) -> None:
    with open_buckets(folders) as loader:
        expected = [taken(loader) for _ in range(30)]
    rng, got = random.Random(2), []
    state: dict[str, Any] | None = None
    while len(got) < 30:
        ranks = rng.choice([1, 2, 3, 4, 12])
        loaders = [open_buckets(folders, rank=rank, world_size=ranks) for rank in range(ranks)]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(state)
        for _ in range(rng.randint(2, 6)):
            parts = [taken(loader) for loader in loaders]
            assert len({(frames, epoch) for frames, epoch, *_ in parts}) == 1
            numbers = [number for *_, part, _ in parts for number in part]
            got.append((parts[0][0], parts[0][1], numbers, b"".join(part[3] for part in parts)))
        state = json.loads(json.dumps(loaders[0].state_dict()))
        assert all(loader.state_dict() == state for loader in loaders)
        for loader in loaders:
            loader.close()
    assert got[:30] == expected


def test_another_budget_goes_on_with_the_same_stream(folders: list[Path]) -> None:
    """As with another global batch of one dataset: what was served stays a prefix of each dataset's stream."""
    with open_buckets(folders) as first, open_buckets(folders, batch=4, tokens_per_batch=8 * 3 * 4) as second:
        numbers = [n for _ in range(8) for n in taken(first)[2]]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert second.global_batch_sizes == (4, 8, 32)
        numbers += [n for _ in range(8) for n in taken(second)[2]]
    assert len(set(numbers)) == len(numbers)


def test_illegal_budgets_name_the_legal_ones(folders: list[Path]) -> None:
    with pytest.raises(ConfigError, match="the longest samples: 12, not 8"):
        open_buckets(folders, batch=8)
    with pytest.raises(ConfigError, match=r"holds 3 samples of \[8, 3, 4\] with 24 tokens each.*at least 96"):
        open_buckets(folders, tokens_per_batch=95)
    with pytest.raises(ConfigError, match=r"legal numbers of ranks: \[1, 2, 3, 4, 6, 12\]"):
        open_buckets(folders, world_size=5)
    with pytest.raises(ConfigError, match="fewer than one global batch of"):
        open_buckets(folders, batch=60, tokens_per_batch=60 * 24)
    one = {"mixture": [{"path": "a", "weight": 1}], "tokens_per_batch": 8}
    for broken in ({"path": "a", "tokens_per_batch": 8}, one, {**one, "mixture_by": "step", "tokens_per_batch": 0}):
        with pytest.raises(ConfigError, match="tokens_per_batch"):
            check(DataConfig, broken, "x.yaml")


def test_without_a_budget_all_batches_are_of_one_size(folders: list[Path]) -> None:
    with open_buckets(folders, tokens_per_batch=None) as loader:
        assert loader.global_batch_sizes == (12, 12, 12)


def refusal(**changes: Any) -> str:
    """What is said of batches of 12 clips, 20 shorter clips and 100 images on 2 ranks."""
    shapes = [(8, 3, 4), (5, 3, 4), (1, 3, 4)]
    manifests: Any = [SimpleNamespace(shape=shape, context_shape=None) for shape in shapes]
    with pytest.raises(ConfigError) as caught:
        check_buckets(manifests, (12, 20, 100), **{"world_size": 2, "global_batch_size": 12, **changes})
    return str(caught.value)


def test_batches_that_cannot_be_cut_into_as_many_parts_name_what_can() -> None:
    """6, 10 and 50 clips per rank: micro-batches of 2 would be 3 of them, which cuts neither 10 nor 50."""
    message = refusal(micro_batch_size=2)
    assert "batches of 12 of [8, 3, 4], 20 of [5, 3, 4], 100 of [1, 3, 4] cannot all be cut into 3 micro-b" in message
    assert "legal training.micro_batch_size: [3, 6]" in message
    assert "with this one legal numbers of ranks: none" in message
    assert "lanes that are a multiple of 6" in message
    # At most 5 of 12 at once are 3 times 4, and 20 cannot be cut into 3; on two ranks it is 2 times 3 of 6.
    assert "legal numbers of ranks: [1, 2, 4]" in refusal(world_size=3, micro_batch_size=100)
    assert "legal numbers of ranks: [2, 4]" in refusal(world_size=1, micro_batch_size=5)


def test_all_that_is_wrong_with_buckets_is_one_message() -> None:
    message = refusal(world_size=5, global_batch_size=20)
    assert "cannot all be split over 5 ranks; legal numbers of ranks: [1, 2, 4]" in message
    assert "the longest samples: 12, not 20" in message
    message = refusal(micro_batch_size=2, global_batch_size=20)
    assert "into 3 micro-batches" in message
    assert "the longest samples: 12, not 20" in message


def test_memory_counts_every_bucket(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowBuffer, "bytes_for", staticmethod(lambda rows, *_: 10_000 * rows))
    with pytest.raises(ConfigError, match=r"two batches of 12 samples \[8, 3, 4\].* and 96 .* take 2640000 bytes"):
        open_buckets(folders)
    with open_buckets(folders, prefetch_bytes=2_640_000) as loader:
        assert loader._blocks == 2


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(1, 300)), min_size=1, max_size=5),
    st.integers(0, 80),
    st.integers(1, 64),
    st.integers(1, 200_000),
    st.integers(1, 64),
    st.integers(1, 64) | st.none(),
)
def test_batches_are_the_largest_legal_ones(
    shapes: list[tuple[int, int]], context: int, lanes: int, budget: int, world_size: int, micro: int | None
) -> None:
    manifests: Any = [
        SimpleNamespace(shape=(frames, tokens, 4), context_shape=(context, 8) if context else None)
        for frames, tokens in shapes
    ]
    tokens = [tokens_of(manifest) for manifest in manifests]
    assert tokens == [frames * each + context for frames, each in shapes]
    wanted = [budget // each // lanes * lanes for each in tokens]
    if not min(wanted):
        with pytest.raises(ConfigError, match="legal: at least"):
            bucket_batches(manifests, budget, lanes=lanes)
        return
    got = bucket_batches(manifests, budget, lanes=lanes)
    arguments = {"world_size": world_size, "global_batch_size": min(wanted), "micro_batch_size": micro}
    legal = all(batch % world_size == 0 for batch in wanted)
    if legal and micro is not None:
        parts = micro_batches(min(wanted) // world_size, micro)[1]
        legal = all(batch // world_size % parts == 0 for batch in wanted)
    if legal:
        check_buckets(manifests, got, **arguments)
    else:
        with pytest.raises(ConfigError) as caught:
            check_buckets(manifests, got, **arguments)
        # What the message calls legal is.
        for name, pattern in (("world_size", r"numbers of ranks: (\[.*?\])"), ("micro_batch_size", r"size: (\[.*?\])")):
            for found in re.findall(pattern, str(caught.value)):
                for value in json.loads(found):
                    check_buckets(manifests, got, **{**arguments, name: value})
    for batch, each in zip(got, tokens, strict=True):
        assert batch % lanes == 0
        assert batch * each <= budget < (batch + lanes) * each
    assert np.array_equal(got, wanted)
