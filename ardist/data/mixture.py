"""Several datasets mixed by weight: sample by sample, or one dataset per step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from ardist.config.data import DataConfig
from ardist.data.batch import Batch, Rows
from ardist.data.batch_loader import BatchLoader
from ardist.data.buckets import bucket_batches, check_buckets
from ardist.data.dataset_stream import DatasetStream, lanes_of_rank
from ardist.data.errors import ManifestError
from ardist.data.keyed import Domain, derive_key
from ardist.data.manifest import Manifest, load_manifest
from ardist.data.order import check_layout
from ardist.data.shares import SlotShares, exact_shares, next_turn
from ardist.data.steps import Block, Piece, Step, one_step
from ardist.errors import CheckpointError, ConfigError

STATE_VERSION: Final = 1


class _Mixed(NamedTuple):
    """What a mixture has consumed: places in all, and for one dataset per step each one's turns and cursor."""

    consumed: int
    turns: tuple[int, ...]
    cursors: tuple[tuple[int, int], ...]


class MixedLoader(BatchLoader):
    """Batches of several datasets in exact shares, resumable like one dataset.

    ``mixture_by: sample``: every batch holds each dataset's share, exact to one sample at every step; all datasets
    have the same sample shape. The samples of one batch may be of different epochs of their datasets, so
    ``Batch.epoch`` is 0 and ``Batch.sample_ids`` are the keys mixed with dataset and epoch: still the same for the
    same occurrence of a sample on any number of ranks, and another one for its next occurrence.

    ``mixture_by: step``: every step is of one dataset on all ranks, exact to one step; shapes may differ (images and
    videos). Epoch and sample ids are those of the dataset. With ``tokens_per_batch`` the datasets are buckets: each
    one's batch is the largest multiple of the lanes whose samples hold no more tokens than that, so that steps of
    short and of long clips cost about the same. Weights are shares of the steps.

    All datasets need the same latents (VAE) and the same classes.
    """

    def __init__(
        self, config: DataConfig, *, seed: int, global_batch_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if not config.mixture:
            raise ConfigError("data.mixture names no dataset")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} is not one of {world_size} ranks (0..{world_size - 1})")
        manifests = [load_manifest(part.path) for part in config.mixture]
        _check_together(config, manifests)
        batches = (global_batch_size,) * len(manifests)
        if config.tokens_per_batch is not None:
            batches = bucket_batches(manifests, config.tokens_per_batch, lanes=config.lanes)
            check_buckets(manifests, batches, world_size=world_size, global_batch_size=global_batch_size)
        for manifest, batch in zip(manifests, batches, strict=True):
            check_layout(manifest.num_samples, lanes=config.lanes, global_batch_size=batch, world_size=world_size)
        self._weights = [part.weight for part in config.mixture]
        self._shares = exact_shares(self._weights)
        self._slots = SlotShares(self._shares, global_batch_size) if config.mixture_by == "sample" else None
        streams = [
            DatasetStream(
                config,
                part.path,
                manifest,
                seed=seed,
                rank=rank,
                lanes=self._lanes_of(number, global_batch_size, rank, world_size, config.lanes),
            )
            for number, (part, manifest) in enumerate(zip(config.mixture, manifests, strict=True))
        ]
        super().__init__(
            config,
            streams,
            global_batch_size=global_batch_size,
            rank=rank,
            world_size=world_size,
            batches=batches,
        )
        self._seed, self._digests = seed, [manifest.digest() for manifest in manifests]
        self._now = _Mixed(0, (0,) * len(streams), ((0, 0),) * len(streams))

    def _lanes_of(self, number: int, batch: int, rank: int, ranks: int, lanes: int) -> range | None:
        """The lanes of a dataset that hold its part of this rank's slots, one more to either side for rounding."""
        if self._slots is None or ranks == 1:
            return lanes_of_rank(lanes, rank, ranks)
        share, before = self._shares[number], sum(self._shares[:number], Fraction(0))
        first = max(Fraction(0), (Fraction(rank, ranks) - before) / share)
        last = min(Fraction(1), (Fraction(rank + 1, ranks) - before) / share)
        if first >= last:
            return range(0)
        if last - first < 1 and share * batch < 4 * lanes:
            # With few samples per lane and batch it is another lane every time that begins a rank's slots.
            return None
        return range(max(0, math.floor(first * lanes) - 1), min(lanes, math.ceil(last * lanes) + 1))

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        """One per dataset."""
        return tuple(stream.manifest for stream in self.streams)

    def _position(self) -> _Mixed:
        return self._now

    def _consume(self, position: _Mixed) -> None:
        self._now = position

    def _plan_block(self, position: _Mixed, most: int) -> Block:
        step = self._plan_slots(position) if self._slots is not None else self._plan_turn(position)
        return one_step(step)

    def _plan_slots(self, position: _Mixed) -> Step:
        assert self._slots is not None
        count = self.global_batch_size
        before, after = self._slots.served(position.consumed), self._slots.served(position.consumed + count)
        first, last = self.rank * self.batch_size, (self.rank + 1) * self.batch_size
        pieces, slot = [], 0
        for number, (start, stop) in enumerate(zip(before, after, strict=True)):
            for epoch, low, size in _epochs(start, stop, self.streams[number].order.stream_length):
                here, end = max(first, slot), min(last, slot + size)
                if here < end:
                    places = self.streams[number].take(epoch, low, size, here - slot, end - slot)
                    pieces.append(Piece(number, epoch, places, here - first))
                slot += size
        return Step(pieces, 0, position._replace(consumed=position.consumed + count))

    def _plan_turn(self, position: _Mixed) -> Step:
        number = next_turn(self._shares, position.turns)
        count = self.global_batch_sizes[number]
        size = count // self.world_size
        epoch, consumed = position.cursors[number]
        if consumed + count > self.streams[number].order.stream_length:
            epoch, consumed = epoch + 1, 0
        places = self.streams[number].take(epoch, consumed, count, self.rank * size, (self.rank + 1) * size)
        turns, cursors = list(position.turns), list(position.cursors)
        turns[number] += 1
        cursors[number] = epoch, consumed + count
        after = _Mixed(position.consumed + count, tuple(turns), tuple(cursors))
        return Step([Piece(number, epoch, places, 0)], epoch, after)

    def _batch(self, step: Step, samples: Rows) -> Batch:
        batch = super()._batch(step, samples)
        if self._slots is None:
            return batch
        ids = samples.keys.copy()
        for piece in step.pieces:
            ids[piece.rows] ^= derive_key(Domain.MIX, piece.dataset, piece.epoch)
        return replace(batch, sample_ids=torch.from_numpy(ids.view(np.int64)), epoch=0)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {**self._identity(), "consumed": self._now.consumed}
        if self._slots is None:
            state |= {"turns": list(self._now.turns), "cursors": [list(cursor) for cursor in self._now.cursors]}
        return state

    def _identity(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "mixture": self.config.mixture_by,
            "manifests": self._digests,
            "weights": self._weights,
            "seed": self._seed,
            "lanes": self.config.lanes,
            "window": self.config.window,
        }

    def _load(self, state: dict[str, Any]) -> None:
        different = [
            f"{name} was {state.get(name)!r} and is now {value!r}"
            for name, value in self._identity().items()
            if state.get(name) != value
        ]
        if different:
            raise CheckpointError(f"the data state belongs to another mixture: {'; '.join(different)}")
        count = len(self.streams)
        turns, cursors = state.get("turns", [0] * count), state.get("cursors", [[0, 0]] * count)
        whole = _natural([state.get("consumed")]) and _natural(turns, count) and len(cursors) == count
        if not whole or not all(_natural(cursor, 2) for cursor in cursors):
            raise CheckpointError("the data state of the mixture is damaged: it needs whole numbers of at least 0")
        self._now = _Mixed(state["consumed"], tuple(turns), tuple((c[0], c[1]) for c in cursors))


def _natural(numbers: Any, count: int = 1) -> bool:
    """Whether this is a list of `count` whole numbers of at least 0."""
    return isinstance(numbers, list) and len(numbers) == count and all(type(n) is int and n >= 0 for n in numbers)


def _epochs(start: int, stop: int, length: int) -> list[tuple[int, int, int]]:
    """(epoch, place in it, count) of the places [start, stop) of a dataset whose epochs have `length` places."""
    runs = []
    while start < stop:
        epoch, low = divmod(start, length)
        size = min(stop - start, length - low)
        runs.append((epoch, low, size))
        start += size
    return runs


def _check_together(config: DataConfig, manifests: Sequence[Manifest]) -> None:
    """Refuse datasets that cannot be mixed, naming the first difference of each kind."""
    first, problems = manifests[0], []
    for part, manifest in zip(config.mixture[1:], manifests[1:], strict=True):
        from_axis = 0 if config.mixture_by == "sample" else 1
        if manifest.shape[from_axis:] != first.shape[from_axis:] or manifest.dtype != first.dtype:
            problems.append(
                f"{part.path} holds {manifest.dtype} {list(manifest.shape)}, {config.mixture[0].path} {first.dtype} "
                f"{list(first.shape)}; only the number of frames may differ, and only with mixture_by: step"
            )
        if manifest.vae != first.vae:
            problems.append(f"{part.path} was encoded by another VAE than {config.mixture[0].path}")
        if manifest.context_shape != first.context_shape:
            problems.append(
                f"{part.path} has context of shape {manifest.context_shape}, {config.mixture[0].path} "
                f"{first.context_shape} (None: no text embeddings)"
            )
        if manifest.classes != first.classes:
            problems.append(f"{part.path} has other classes than {config.mixture[0].path}")
    if problems:
        raise ManifestError("these datasets cannot be mixed: " + "; ".join(problems))
