"""The table of ``python -m data_tools bench``: how fast a dataset is read here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.table import Table

from ardist.config.data import DataConfig
from ardist.data.health import Substitution
from ardist.data.manifest import Manifest, load_manifest
from ardist.data.measure import measure_loading


@dataclass(frozen=True)
class Measured:
    """What was read, and what the loader counted while it was."""

    config: DataConfig
    batch_size: int
    manifest: Manifest
    metrics: dict[str, Any]

    @property
    def bad(self) -> list[Substitution]:
        """The bad samples that were met, the latest thousand."""
        return list(self.metrics["substituted"])


def bench(config: DataConfig, *, batch_size: int, seconds: float, step_seconds: float = 0.0) -> Measured:
    """Read a dataset for some time as one rank of a run would; raises what opening a loader raises."""
    manifest = load_manifest(config.path)
    metrics = measure_loading(config, batch_size=batch_size, seconds=seconds, step_seconds=step_seconds)
    return Measured(config, batch_size, manifest, metrics)


def table(measured: Measured) -> Table:
    """One line per number."""
    metrics, manifest, config = measured.metrics, measured.manifest, measured.config
    view = Table(show_header=False, title=config.path, title_justify="left")
    view.add_column()
    view.add_column(overflow="fold")
    for name, value in {
        "dataset": f"{manifest.num_samples:,} samples of {manifest.dtype} {list(manifest.shape)}, "
        f"{len(manifest.shards):,} shards, {manifest.num_bytes / 2**20:,.1f} MiB",
        "read as": f"batches of {measured.batch_size}, {config.lanes} lanes x window {config.window}, "
        f"{config.fetch_threads} threads, one rank, checksums on",
        "first batch": f"{metrics['first_batch_seconds']:.2f} s, opening included",
        "samples/s": f"{metrics['samples_per_second']:,.0f}",
        "MB/s": f"{metrics['megabytes_per_second']:,.1f}",
        "waited": f"{metrics['wait_seconds']:.2f} s, {metrics['wait_fraction']:.1%} of the time after the first batch",
        "samples read": f"{metrics['samples']:,.0f} in {metrics['batches']:,} batches",
        "retries": f"{metrics['read_retries']:,.0f} of reads, {metrics['storage_retries']:,} of the store",
        "cache": _cache(metrics),
        "substitutions": _substitutions(metrics),
    }.items():
        view.add_row(name, value)
    return view


def _cache(metrics: dict[str, Any]) -> str:
    if "cache_hits" not in metrics:
        return "not used: the dataset is on this machine"
    return (
        f"{metrics['cache_hits']:,.0f} hits, {metrics['cache_misses']:,.0f} misses, "
        f"{metrics['cache_evicted']:,.0f} evicted, {metrics['bytes_fetched'] / 2**20:,.1f} MiB fetched"
    )


def _substitutions(metrics: dict[str, Any]) -> str:
    prefix = "substitutions_"
    reasons = [f"{name.removeprefix(prefix)} {value}" for name, value in metrics.items() if name.startswith(prefix)]
    return f"{metrics['substitutions']}" + (f": {', '.join(reasons)}" if reasons else "")
