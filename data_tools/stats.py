"""Numbers about a dataset: sizes, sources, classes, latent statistics, as a table and as a picture."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from ardist.data.manifest import Manifest, load_manifest
from ardist.data.tar_index import TarIndex
from ardist.errors import ConfigError
from ardist.storage import MissingObjectError, open_storage
from data_tools import layout


@dataclass(frozen=True)
class Statistics:
    """What there is to know without reading a single sample."""

    manifest: Manifest
    per_class: dict[str, int]
    per_shard: list[int]
    refused: dict[str, int]


def statistics(url: str) -> Statistics:
    """Collect from manifest, indices and quarantine; raises `DataError` for a dataset that cannot be read."""
    storage = open_storage(url)
    manifest = load_manifest(url)
    counts: Counter[int] = Counter()
    for shard in manifest.shards:
        index = TarIndex.open(storage.read(shard.index_name), name=shard.name, n=shard.n)
        ids, numbers = np.unique(index.records["class_id"], return_counts=True)
        counts.update(dict(zip(ids.tolist(), numbers.tolist(), strict=True)))
    names = manifest.classes or ()
    per_class = {names[number] if number >= 0 else "(none)": counts[number] for number in sorted(counts)}
    per_class = dict.fromkeys(names, 0) | per_class if names else {}
    try:
        lines = storage.read(layout.QUARANTINE).split(b"\n")  # names may hold what else ends a line of text
    except MissingObjectError:
        lines = []
    refused = Counter(str(json.loads(line)["reason"]) for line in lines if line)
    return Statistics(manifest, per_class, [shard.n for shard in manifest.shards], dict(sorted(refused.items())))


def table(found: Statistics) -> Table:
    """The statistics for people."""
    manifest = found.manifest
    view = Table(show_header=False, title=manifest.dataset_id, title_justify="left")
    view.add_column()
    view.add_column(overflow="fold")
    clip_bytes = manifest.num_bytes / manifest.num_samples
    view.add_row("samples", f"{manifest.num_samples} {manifest.kind}, {manifest.dtype} {list(manifest.shape)}")
    view.add_row("frames", str(manifest.num_samples * manifest.shape[0]))
    view.add_row("size", f"{manifest.num_bytes / 2**20:.1f} MiB, {clip_bytes / 1024:.1f} KiB per sample")
    low, high = min(found.per_shard), max(found.per_shard)
    view.add_row("shards", f"{len(found.per_shard)}, {low} to {high} samples each")
    if manifest.latent_statistics is not None:
        view.add_row("latent mean", "  ".join(f"{value:+.4f}" for value in manifest.latent_statistics.mean))
        view.add_row("latent std", "  ".join(f"{value:.4f}" for value in manifest.latent_statistics.std))
    for name, count in list(found.per_class.items())[:40]:
        view.add_row(f"class {name}", f"{count} ({count / manifest.num_samples:.1%})")
    if len(found.per_class) > 40:
        view.add_row("classes", f"{len(found.per_class) - 40} more")
    for reason, count in found.refused.items():
        view.add_row(f"refused: {reason}", str(count))
    view.add_row("manifest", manifest.digest())
    return view


def picture(found: Statistics, path: Path) -> None:
    """Samples per shard, classes and latent statistics as one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if path.suffix.lower() != ".png":
        raise ConfigError(f"--png {str(path)!r} must end in .png")
    latents = found.manifest.latent_statistics
    panels = 1 + bool(found.per_class) + (latents is not None)
    figure = Figure(figsize=(5 * panels, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = iter(np.atleast_1d(np.asarray(figure.subplots(1, panels))))
    first = next(axes)
    first.hist(found.per_shard, bins=min(40, max(1, len(set(found.per_shard)))), color="tab:blue")
    first.set(title="samples per shard", xlabel="samples", ylabel="shards")
    if found.per_class:
        axis = next(axes)
        ordered = sorted(found.per_class.items(), key=lambda item: -item[1])
        axis.bar(range(len(ordered)), [count for _, count in ordered], color="tab:green")
        axis.set(title=f"samples of {len(ordered)} classes", xlabel="class, most frequent first", ylabel="samples")
        if len(ordered) <= 20:
            axis.set_xticks(range(len(ordered)), [name for name, _ in ordered], rotation=60, ha="right")
    if latents is not None:
        axis = next(axes)
        channels = range(len(latents.mean))
        axis.errorbar(channels, latents.mean, yerr=latents.std, fmt="o", capsize=4, color="tab:red")
        axis.set(title="latent mean ± deviation", xlabel="channel")
        axis.set_xticks(list(channels))
    figure.savefig(path, dpi=120)
