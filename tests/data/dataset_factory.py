"""Small datasets for the tests of this folder; every value of a sample is a function of its number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ardist.data.loader import StreamingLoader
from ardist.data.manifest import Manifest, fold_shards, write_manifest
from ardist.data.sample import SampleInfo, sample_key
from ardist.data.shard_writer import Sample, write_shard

VAE = {"weights_digest": "a" * 64, "config_digest": "b" * 64}


def latent(number: int, shape: tuple[int, ...] = (2, 3, 4)) -> np.ndarray:
    """A float16 array that names its sample: the first two values hold `number` in base 2048."""
    values = np.random.default_rng(number).standard_normal(shape).astype(np.float16)
    flat = values.reshape(-1)
    flat[0], flat[1] = number // 2048, number % 2048
    return values


def number_of(values: Any) -> int:
    """The inverse of `latent` for one sample."""
    flat = np.asarray(values).reshape(-1)
    return int(flat[0]) * 2048 + int(flat[1])


def key_of(number: int) -> str:
    return sample_key(f"video-{number}.mp4", (0, 2), {"size": 64})


def make_dataset(
    directory: Path,
    counts: Sequence[int],
    shape: tuple[int, ...] = (2, 3, 4),
    make: Callable[[int, tuple[int, ...]], np.ndarray] = latent,
    num_classes: int | None = 5,
    describe: Callable[[int], str | None] = lambda _: None,
    **header: Any,
) -> Manifest:
    """Write a latent dataset with `counts` samples per shard and return its manifest."""
    entries, first = [], 0
    for number, count in enumerate(counts):
        samples = [
            Sample(
                key_of(i),
                make(i, shape),
                SampleInfo(
                    source=f"video-{i}.mp4",
                    frames=shape[0],
                    fps=8,
                    class_id=i % num_classes if num_classes else None,
                    caption=describe(i),
                ),
            )
            for i in range(first, first + count)
        ]
        entries.append(write_shard(directory, number, samples, "float16"))
        first += count
    fields: dict[str, Any] = {
        "dataset_id": "test",
        "created": "2025-01-01T00:00:00Z",
        "code_version": "0",
        "kind": "latents",
        "vae": VAE,
        "classes": tuple(f"class {i}" for i in range(num_classes)) if num_classes else None,
    }
    manifest = fold_shards(entries, **{**fields, **header})
    write_manifest(directory, manifest)
    return manifest


def serve(loader: StreamingLoader, steps: int = 10) -> list[int]:
    """The numbers of the samples of some steps, every value checked against the id it comes with; closes the loader."""
    numbers = []
    with loader:
        for _ in range(steps):
            batch = next(loader)
            for value, bits in zip(batch.values, batch.sample_ids.tolist(), strict=True):
                number = number_of(value)
                assert key_of(number) == f"{bits & (2**64 - 1):016x}"
                assert np.array_equal(value.numpy(), latent(number))
                numbers.append(number)
    return numbers
