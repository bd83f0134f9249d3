"""Mixtures: exact shares at every step, resumable, image and video steps, and what cannot be mixed."""

from __future__ import annotations

import json
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_factory import latent, make_dataset, number_of
from hypothesis import given, settings
from hypothesis import strategies as st

from ardist.config import check
from ardist.config.data import DataConfig
from ardist.data.errors import ManifestError
from ardist.data.loader import BatchLoader, MixedLoader, StreamingLoader, open_loader
from ardist.data.shares import SlotShares, exact_shares, next_turn
from ardist.errors import CheckpointError, ConfigError

SIZES = (61, 40, 23)
WEIGHTS = (0.5, 0.3, 0.2)
weights = st.lists(st.integers(1, 100).map(lambda number: number / 10), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(weights, st.lists(st.integers(60, 400), min_size=1, max_size=30))
def test_slot_shares_are_exact_at_every_step(weights: list[float], batches: list[int]) -> None:
    shares = exact_shares(weights)
    if min(shares) * min(batches) < 1:
        return
    slots, places, before = SlotShares(shares, min(batches)), 0, [0] * len(shares)
    for batch in batches:
        places += batch
        after = slots.served(places)
        assert sum(after) == places
        assert all(high >= low for low, high in zip(before, after, strict=True))
        assert all(abs(have - places * share) < 1 for have, share in zip(after, shares, strict=True))
        before = after


@settings(max_examples=100, deadline=None)
@given(weights)
def test_turns_are_never_off_by_one(weights: list[float]) -> None:
    shares = exact_shares(weights)
    served = [0] * len(shares)
    for turn in range(1, 300):
        served[next_turn(shares, served)] += 1
        assert sum(served) == turn
        assert all(abs(have - turn * share) < 1 for have, share in zip(served, shares, strict=True))


def test_shares_are_the_written_decimals() -> None:
    assert exact_shares([0.1, 0.2]) == [Fraction(1, 3), Fraction(2, 3)]
    with pytest.raises(ConfigError, match=r"share of 0\.01.*shares of at least 1/50, or global batches of .* 100"):
        SlotShares(exact_shares([0.99, 0.01]), 50)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    base = tmp_path_factory.mktemp("mixture")
    for number, size in enumerate(SIZES):
        # Samples of dataset d have the numbers from 1000 d on.
        make_dataset(base / str(number), [size // 2, size - size // 2], make=numbered(1000 * number))
    return [base / str(number) for number in range(3)]


def numbered(first: int) -> Any:
    return lambda number, shape: latent(first + number, shape)


def config_of(folders: list[Path], **options: Any) -> DataConfig:
    mixture = [{"path": str(folder), "weight": weight} for folder, weight in zip(folders, WEIGHTS, strict=False)]
    return DataConfig(**{"mixture": mixture, "lanes": 4, "window": 8, "prefetch_bytes": 2**20, **options})


def take(loader: BatchLoader, steps: int) -> list[tuple[list[int], list[int]]]:
    batches = []
    for _ in range(steps):
        batch = next(loader)
        batches.append(([number_of(value) for value in batch.values], batch.sample_ids.tolist()))
    return batches


def open_mixture(config: DataConfig, *, rank: int = 0, world_size: int = 1) -> BatchLoader:
    return open_loader(config, seed=5, global_batch_size=20, rank=rank, world_size=world_size)


def test_every_batch_has_the_shares_and_every_dataset_its_epochs(folders: list[Path]) -> None:
    with open_mixture(config_of(folders)) as loader:
        assert isinstance(loader, MixedLoader)
        batches = take(loader, 60)
    per_dataset: list[list[int]] = [[], [], []]
    for step, (numbers, ids) in enumerate(batches, 1):
        for number in numbers:
            per_dataset[number // 1000].append(number % 1000)
        assert all(abs(len(got) - 20 * step * weight) < 1 for got, weight in zip(per_dataset, WEIGHTS, strict=True))
        assert len(set(ids)) == 20
    for got, size in zip(per_dataset, SIZES, strict=True):
        epoch = size // 4 * 4
        for first in range(0, len(got) - epoch + 1, epoch):
            assert len(set(got[first : first + epoch])) == epoch
    every_id = [bits for _, ids in batches for bits in ids]
    assert len(set(every_id)) == len(every_id)  # another occurrence of a sample has another id


def test_ranks_and_resumes_do_not_change_the_mixture(folders: list[Path]) -> None:
    config = config_of(folders)
    with open_mixture(config) as loader:
        expected = take(loader, 30)
    got: list[tuple[list[int], list[int]]] = []
    state: dict[str, Any] | None = None
    rng = random.Random(1)
    while len(got) < 30:
        ranks = rng.choice([1, 2, 4, 5, 10])
        loaders = [open_mixture(config, rank=rank, world_size=ranks) for rank in range(ranks)]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(state)
        for _ in range(rng.randint(1, 4)):
            parts = [take(loader, 1)[0] for loader in loaders]
            got.append(([n for numbers, _ in parts for n in numbers], [i for _, ids in parts for i in ids]))
        state = json.loads(json.dumps(loaders[0].state_dict()))
        assert all(loader.state_dict() == state for loader in loaders)
        for loader in loaders:
            loader.close()
    assert got[:30] == expected


def test_one_dataset_per_step_with_another_number_of_frames(folders: list[Path], tmp_path: Path) -> None:
    make_dataset(tmp_path, [30, 30], shape=(1, 3, 4), make=numbered(5000))
    config = config_of([folders[0], tmp_path], mixture_by="step")
    with open_mixture(config) as loader, open_mixture(config) as resumed:
        videos = images = 0
        epochs = set()
        for step in range(1, 41):
            batch = next(loader)
            frames = batch.values.shape[1]
            assert frames in (1, 2)
            assert {number_of(value) >= 5000 for value in batch.values} == {frames == 1}
            videos, images = videos + (frames == 2), images + (frames == 1)
            assert abs(videos - step * 5 / 8) < 1
            epochs.add((frames, batch.epoch))
            if step == 17:
                resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
            if step > 17:
                other = next(resumed)
                assert other.epoch == batch.epoch
                assert np.array_equal(other.values.numpy(), batch.values.numpy())
        assert {(1, 0), (1, 1), (2, 0), (2, 1)} <= epochs


def test_mixture_of_one_is_the_dataset(folders: list[Path]) -> None:
    with open_mixture(config_of(folders[:1], mixture_by="step")) as mixed:
        plain_config = DataConfig(path=str(folders[0]), lanes=4, window=8, prefetch_bytes=2**20)
        with open_loader(plain_config, seed=5, global_batch_size=20) as plain:
            assert isinstance(plain, StreamingLoader)
            assert take(mixed, 20) == take(plain, 20)


def test_state_of_another_mixture_is_refused(folders: list[Path]) -> None:
    with open_mixture(config_of(folders)) as loader, open_mixture(config_of(folders[:2])) as other:
        state = loader.state_dict()
        with pytest.raises(CheckpointError, match="weights was"):
            other.load_state_dict(state)
        for broken in ({"consumed": -1}, {"consumed": 1.5}, {"turns": [1]}, {"cursors": [[0], [1], [2]]}):
            with pytest.raises(CheckpointError):
                loader.load_state_dict({**state, **broken})


def test_what_cannot_be_mixed_is_refused_with_all_reasons(folders: list[Path], tmp_path: Path) -> None:
    make_dataset(
        tmp_path, [30], shape=(1, 3, 4), num_classes=2, vae={"weights_digest": "c" * 64, "config_digest": "b" * 64}
    )
    with pytest.raises(ManifestError) as caught:
        open_mixture(config_of([folders[0], tmp_path]))
    assert all(text in str(caught.value) for text in ("[1, 3, 4]", "another VAE", "other classes", "mixture_by: step"))
    with pytest.raises(ConfigError, match="23 samples"):
        open_loader(config_of(folders), seed=0, global_batch_size=24)


def test_configuration_names_one_dataset_or_a_mixture() -> None:
    for settings_ in ({}, {"path": "a", "mixture": [{"path": "b", "weight": 1}]}):
        with pytest.raises(ConfigError, match="exactly one of"):
            check(DataConfig, settings_, "x.yaml")
    with pytest.raises(ConfigError, match="twice"):
        check(DataConfig, {"mixture": [{"path": "b", "weight": 1}, {"path": "b", "weight": 2}]}, "x.yaml")
    with pytest.raises(ConfigError, match="greater than 0"):
        check(DataConfig, {"mixture": [{"path": "b", "weight": 0}]}, "x.yaml")
