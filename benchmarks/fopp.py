"""FoPP timesteps: the batched urn sampler against the paper's tables walked clip by clip, in one run, on one thread.

    python benchmarks/fopp.py [--batch-size 256] [--num-frames 16] [--num-timesteps 1000]

The peers fill the two path-count tables once, by their recurrences, outside the clock; then, for each clip, they draw
the anchor and every other frame from the counts of the paths that remain. One peer draws with Python's random.choices,
the other with numpy's Generator.choice. The ratio is taken to the faster of the two.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
from collections.abc import Callable

import numpy as np
import torch
from clocks import add_clock, chosen_clock
from rich.console import Console
from rich.table import Table

from ardist.diffusion.fopp import sample_timesteps

Draw = Callable[[int], list[int]]


def path_counts(num_frames: int, num_timesteps: int) -> tuple[np.ndarray, np.ndarray]:
    """float64 tables [T, F]: monotone paths from (t, f) to the last frame, and from the first frame to (t, f)."""
    onward = np.ones((num_timesteps, num_frames))
    back = np.ones((num_timesteps, num_frames))
    for f in range(num_frames - 2, -1, -1):
        for t in range(num_timesteps - 2, -1, -1):
            onward[t, f] = onward[t + 1, f] + onward[t, f + 1]
    for f in range(1, num_frames):
        for t in range(1, num_timesteps):
            back[t, f] = back[t - 1, f] + back[t, f - 1]
    return onward, back


def clip_by_table(
    onward: np.ndarray, back: np.ndarray, uniform: Draw, weighted: Callable[[int, np.ndarray], int]
) -> list[int]:
    """One clip: anchor first, then outwards, each next frame weighted by the paths that pass through it."""
    num_timesteps, num_frames = onward.shape
    anchor = uniform(num_frames)[0]
    clip = [0] * num_frames
    clip[anchor] = uniform(num_timesteps)[0]
    for f in range(anchor + 1, num_frames):
        low = clip[f - 1]
        clip[f] = weighted(low, onward[low:, f])
    for f in range(anchor - 1, -1, -1):
        clip[f] = weighted(0, back[: clip[f + 1] + 1, f])
    return clip


def seconds_per_batch(run: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = clock()
        run()
        times.append(clock() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--num-frames", type=int, default=16)
    parser.add_argument("--num-timesteps", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    add_clock(parser)
    options = parser.parse_args()
    clock = chosen_clock(options)
    batch, frames, steps = options.batch_size, options.num_frames, options.num_timesteps
    torch.set_num_threads(1)

    onward, back = path_counts(frames, steps)
    generator, ids, epoch = np.random.default_rng(0), torch.arange(batch), iter(range(10**6))

    def by_random() -> list[list[int]]:
        def weighted(low: int, weights: np.ndarray) -> int:
            return random.choices(range(low, low + len(weights)), weights=weights.tolist())[0]

        return [clip_by_table(onward, back, lambda n: [random.randrange(n)], weighted) for _ in range(batch)]

    def by_numpy() -> list[list[int]]:
        def weighted(low: int, weights: np.ndarray) -> int:
            return low + int(generator.choice(len(weights), p=weights / weights.sum()))

        return [clip_by_table(onward, back, lambda n: [int(generator.integers(n))], weighted) for _ in range(batch)]

    def by_urn() -> torch.Tensor:
        return sample_timesteps("fopp", batch, frames, steps, seed=0, epoch=next(epoch), sample_ids=ids)

    peers = {"tables, random.choices, clip by clip": by_random, "tables, numpy choice, clip by clip": by_numpy}
    seconds = {name: seconds_per_batch(run, options.repeats, clock) for name, run in peers.items()}
    fastest = min(seconds.values())
    seconds["ardist, batched urn"] = seconds_per_batch(by_urn, 10 * options.repeats, clock)
    means = {name: np.mean(run(), axis=0) / steps for name, run in peers.items()}
    means["ardist, batched urn"] = by_urn().double().mean(dim=0).numpy() / steps

    table = Table(
        title=f"FoPP timesteps, batch {batch}, F={frames}, T={steps}, one thread, {options.clock} time, "
        f"torch {torch.__version__}"
    )
    for column in ("sampler", "µs per clip", "faster than the best peer", "mean t/T of the first and last frame"):
        table.add_column(column, justify="left" if column == "sampler" else "right")
    for name, value in seconds.items():
        ends = f"{means[name][0]:.2f} {means[name][-1]:.2f}"
        table.add_row(name, f"{1e6 * value / batch:.1f}", f"{fastest / value:.1f}x", ends)
    Console(width=120).print(table, f"{platform.machine()}, Python {platform.python_version()}")


if __name__ == "__main__":
    main()
