"""One epoch with one loader, in a process of its own: prints a line of JSON. Called by benchmarks/loader.py.

Imports nothing but the reader it runs, so that it also works in the peers' environment, where ardist is not installed.
Every sample carries its number in its first two values, so that what was delivered can be checked for all readers
alike.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import json
import os
import resource
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

NPY_HEADER = 128
WORKERS = 2
READY = torch.empty(0)
"""What every reader yields first, when its modules are imported and the clock may start."""


def numbers(batch: torch.Tensor) -> np.ndarray:
    """The numbers of a batch's samples."""
    flat = batch.reshape(len(batch), -1)[:, :2].to(torch.float32).numpy()
    return (flat[:, 0] * 2048 + flat[:, 1]).astype(np.int64)


def cpu_seconds() -> float:
    """Processor time of this process and its finished children."""
    return sum(
        used.ru_utime + used.ru_stime
        for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def ardist_loader(options: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Ours, with checksums, one process."""
    from ardist.config.data import DataConfig
    from ardist.data.loader import StreamingLoader

    if options.data.startswith("s3://"):
        import boto3  # noqa: F401 - imported on first use otherwise, which would be on the clock

    yield READY
    config = DataConfig(
        path=options.data,
        lanes=options.lanes,
        window=options.window,
        fetch_threads=options.threads,
        prefetch_bytes=options.prefetch,
        cache_dir=options.cache or None,
    )
    with StreamingLoader(config, seed=1, global_batch_size=options.batch) as loader:
        if options.resume_at:
            state = loader.state_dict()
            per_epoch = len(loader) * options.batch
            state["consumed"] = int(per_epoch * options.resume_at) // options.batch * options.batch
            loader.load_state_dict(state)
            yield next(loader).values
            return
        for _ in range(len(loader)):
            yield next(loader).values


def _shard_urls(options: argparse.Namespace) -> list[str]:
    names = sorted(entry["name"] for entry in json.loads(Path(options.manifest).read_text())["shards"])
    return [f"{options.urls}/{name}" for name in names]


def _webdataset(options: argparse.Namespace, workers: int) -> Iterator[torch.Tensor]:
    import webdataset as wds

    yield READY
    shape = tuple(options.shape)

    def decode(sample: dict[str, Any]) -> np.ndarray:
        # The cheapest decoding there is: no json, no np.load.
        return np.frombuffer(sample["npy"], np.float16, offset=NPY_HEADER).reshape(shape)

    def collate(samples: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.stack(samples))

    urls = _shard_urls(options)
    dataset = (
        wds.WebDataset(urls, shardshuffle=len(urls), nodesplitter=None)
        .shuffle(options.lanes * options.window)
        .map(decode)
        .batched(options.batch, collation_fn=collate)
    )
    yield from torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers)


def webdataset_0(options: argparse.Namespace) -> Iterator[torch.Tensor]:
    """webdataset in the process itself."""
    yield from _webdataset(options, 0)


def webdataset_2(options: argparse.Namespace) -> Iterator[torch.Tensor]:
    """webdataset with two worker processes."""
    yield from _webdataset(options, WORKERS)


def prepare_litdata(options: argparse.Namespace) -> None:
    """Rewrite the tars in litdata's format."""
    import litdata

    paths = _shard_urls(options)
    litdata.optimize(
        fn=_tar_tensors, inputs=paths, output_dir=f"{options.converted}/litdata", chunk_bytes="64MB", num_workers=1
    )


def _tar_tensors(path: str) -> Iterator[torch.Tensor]:
    import io
    import tarfile

    with tarfile.open(path) as tar:
        for member in tar:
            if member.name.endswith(".npy"):
                file = tar.extractfile(member)
                assert file is not None
                yield torch.from_numpy(np.load(io.BytesIO(file.read()), allow_pickle=False))


def _litdata(options: argparse.Namespace, workers: int) -> Iterator[torch.Tensor]:
    import litdata

    yield READY
    dataset = litdata.StreamingDataset(f"{options.converted}/litdata", shuffle=True)
    yield from litdata.StreamingDataLoader(dataset, batch_size=options.batch, num_workers=workers)


def litdata_0(options: argparse.Namespace) -> Iterator[torch.Tensor]:
    """litdata in the process itself."""
    yield from _litdata(options, 0)


def litdata_2(options: argparse.Namespace) -> Iterator[torch.Tensor]:
    """litdata with two worker processes."""
    yield from _litdata(options, WORKERS)


class _Absent(types.ModuleType):
    """A package in which every name is an empty class."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        return type(name, (), {})


class _AbsentFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """mosaicml-streaming imports torchvision and transformers for datasets that are not used here.

    They need their very own torch, so empty packages stand in for them.
    """

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in ("torchvision", "transformers"):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


def prepare_mosaic(options: argparse.Namespace) -> None:
    """Rewrite the tars as MDS shards."""
    sys.meta_path.insert(0, _AbsentFinder())
    from streaming import MDSWriter

    with MDSWriter(out=f"{options.converted}/mosaic", columns={"x": "ndarray"}) as writer:
        for path in _shard_urls(options):
            for tensor in _tar_tensors(path):
                writer.write({"x": tensor.numpy()})


def mosaic_0(options: argparse.Namespace) -> Iterator[torch.Tensor]:
    """mosaicml-streaming in the process itself."""
    yield from _mosaic(options, 0)


def mosaic_2(options: argparse.Namespace) -> Iterator[torch.Tensor]:
    """mosaicml-streaming with two worker processes."""
    yield from _mosaic(options, WORKERS)


def _mosaic(options: argparse.Namespace, workers: int) -> Iterator[torch.Tensor]:
    sys.meta_path.insert(0, _AbsentFinder())
    from streaming import StreamingDataLoader, StreamingDataset

    yield READY
    dataset = StreamingDataset(local=f"{options.converted}/mosaic", shuffle=True, batch_size=options.batch)
    for batch in StreamingDataLoader(dataset, batch_size=options.batch, num_workers=workers):
        yield batch["x"]


def torchdata_2(options: argparse.Namespace) -> Iterator[torch.Tensor]:
    """torchdata's StatefulDataLoader over a hand-written index of the same tars."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    yield READY
    dataset = TarTensors(_shard_urls(options), tuple(options.shape))
    yield from StatefulDataLoader(dataset, batch_size=options.batch, shuffle=True, num_workers=WORKERS)


class TarTensors(torch.utils.data.Dataset[torch.Tensor]):
    """Map-style dataset over tars: what a team writes by hand."""

    def __init__(self, paths: list[str], shape: tuple[int, ...]) -> None:
        import tarfile

        self.paths, self.shape, self.places = paths, shape, []
        for number, path in enumerate(paths):
            with tarfile.open(path) as tar:
                self.places += [(number, m.offset_data, m.size) for m in tar if m.name.endswith(".npy")]
        self.files: list[Any] = []

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> torch.Tensor:
        if not self.files:
            self.files = [os.open(path, os.O_RDONLY) for path in self.paths]
        number, offset, size = self.places[index]
        data = bytearray(os.pread(self.files[number], size, offset))
        return torch.from_numpy(np.frombuffer(data, np.float16, offset=NPY_HEADER).reshape(self.shape))


READERS: dict[str, Callable[[argparse.Namespace], Iterator[torch.Tensor]]] = {
    "ardist": ardist_loader,
    "webdataset-0": webdataset_0,
    "webdataset-2": webdataset_2,
    "litdata-0": litdata_0,
    "litdata-2": litdata_2,
    "mosaic-0": mosaic_0,
    "mosaic-2": mosaic_2,
    "torchdata-2": torchdata_2,
}
PREPARE = {"litdata": prepare_litdata, "mosaic": prepare_mosaic}


def main() -> None:
    """Run one reader over one epoch, or convert the dataset for a peer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("reader", choices=[*READERS, *(f"prepare-{name}" for name in PREPARE)])
    parser.add_argument("--data", required=True)
    parser.add_argument("--manifest", required=True)
    parser.add_argument("--urls", required=True)
    parser.add_argument("--converted", default="")
    parser.add_argument("--cache", default="")
    parser.add_argument("--shape", type=int, nargs="+", required=True)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lanes", type=int, default=16)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefetch", type=int, default=64 * 2**20)
    parser.add_argument("--resume-at", type=float, default=0.0)
    options = parser.parse_args()
    if options.reader.startswith("prepare-"):
        PREPARE[options.reader.removeprefix("prepare-")](options)
        return
    torch.set_num_threads(1)
    batches = READERS[options.reader](options)
    next(batches)
    begun, busy, first, seen = time.perf_counter(), cpu_seconds(), 0.0, []
    for batch in batches:
        first = first or time.perf_counter() - begun
        seen.append(numbers(batch))
    seconds = time.perf_counter() - begun
    # Worker processes count once they are waited for.
    del batches
    busy = cpu_seconds() - busy
    delivered = np.concatenate(seen)
    distinct = np.unique(delivered)
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu": busy,
                "first": first,
                "samples": len(delivered),
                "distinct": len(distinct),
                "lowest": int(distinct[0]),
                "highest": int(distinct[-1]),
            }
        )
    )


if __name__ == "__main__":
    main()
