"""How well the fixed-lane order shuffles, and what it costs in shard reads; needs no data.

    python benchmarks/shuffle.py [--shards 400] [--per-shard 1000] [--lanes 48] [--window 256] [--batch 192]

Distances are total variation: 0 is uniform. Beside each stands what a full random permutation of the whole epoch gives,
because a batch of finite size is never exactly uniform.
"""

from __future__ import annotations

import argparse

import numpy as np
from rich.console import Console
from rich.table import Table

from ardist.data.order import LaneOrder

BINS = 10


def distance(counts: np.ndarray) -> float:
    """Total variation between the distribution of counts and the uniform one."""
    return float(0.5 * np.abs(counts / counts.sum() - 1 / len(counts)).sum())


def batches_of(order: LaneOrder, epoch: int, batch: int, per_shard: int) -> np.ndarray:
    """[steps, batch]: global sample numbers."""
    rows = []
    for step in range(order.steps(batch)):
        places = order.take(epoch, step * batch, batch)
        rows.append(places.shards * per_shard + places.rows)
    return np.stack(rows)


def quality(batches: np.ndarray, shards: int, per_shard: int) -> tuple[float, float, float]:
    """(distance of the shards in a batch, of the positions inside shards, same-shard pairs over chance)."""
    shard = batches // per_shard
    place = batches % per_shard * BINS // per_shard
    by_shard = np.mean([distance(np.bincount(row, minlength=shards)) for row in shard[:200]])
    by_place = np.mean([distance(np.bincount(row, minlength=BINS)) for row in place[:200]])
    size = batches.shape[1]
    pairs = np.mean(
        [(np.bincount(row, minlength=shards) * (np.bincount(row, minlength=shards) - 1)).sum() for row in shard]
    )
    chance = size * (size - 1) * (per_shard - 1) / (shards * per_shard - 1)
    return float(by_shard), float(by_place), float(pairs / chance)


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Mean share of a batch of the first epoch that stands together in one batch of the second, over chance."""
    batch_of = np.full(max(first.max(), second.max()) + 1, -1)
    for number, row in enumerate(second):
        batch_of[row] = number
    together = 0.0
    for row in first[:200]:
        found = batch_of[row]
        counts = np.bincount(found[found >= 0])
        together += (counts * (counts - 1)).sum() / (len(row) * (len(row) - 1))
    chance = (second.shape[1] - 1) / (second.size - 1)
    return together / min(200, len(first)) / chance


def main() -> None:
    """Print the two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=400)
    parser.add_argument("--per-shard", type=int, default=1000)
    parser.add_argument("--lanes", type=int, default=48)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--batch", type=int, default=192)
    options = parser.parse_args()
    shards, per_shard, batch = options.shards, options.per_shard, options.batch
    order = LaneOrder([per_shard] * shards, seed=1, lanes=options.lanes, window=options.window)
    epochs = [batches_of(order, epoch, batch, per_shard) for epoch in range(2)]
    rng = np.random.default_rng(0)
    ideal = [rng.permutation(shards * per_shard)[: epochs[0].size].reshape(-1, batch) for _ in range(2)]
    console = Console()
    table = Table("per batch", "fixed lanes", "full permutation", title=f"{shards} shards x {per_shard}, batch {batch}")
    names = ("distance of shards to uniform", "distance of positions to uniform", "same-shard pairs over chance")
    for name, ours, full in zip(
        names, quality(epochs[0], shards, per_shard), quality(ideal[0], shards, per_shard), strict=True
    ):
        table.add_row(name, f"{ours:.3f}", f"{full:.3f}")
    table.add_row("pairs kept in the next epoch, over chance", f"{overlap(*epochs):.2f}", f"{overlap(*ideal):.2f}")
    console.print(table)
    reads = Table("ranks", "shard reads per epoch / shards")
    for ranks in (d for d in (1, 2, 4, 8, 16, 48) if batch % d == 0):
        size, total = batch // ranks, 0
        for rank in range(ranks):
            seen: set[int] = set()
            for step in range(order.steps(batch)):
                seen.update(order.take(0, step * batch, batch, rank * size, (rank + 1) * size).shards.tolist())
            total += len(seen)
        reads.add_row(str(ranks), f"{total / shards:.2f}")
    console.print(reads)


if __name__ == "__main__":
    main()
