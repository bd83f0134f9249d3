"""``python -m data_tools bench``: the table, the exit codes, and what the numbers mean."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from dataset_factory import key_of, make_dataset

from ardist.config.data import DataConfig
from ardist.data import measure
from ardist.data.loader import BatchLoader
from ardist.data.manifest import load_manifest
from ardist.data.measure import measure_loading
from data_tools.bench import bench, table
from data_tools.cli import main

QUICK = ["--seconds", "0.1", "--batch-size", "8", "--lanes", "4", "--window", "8"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    make_dataset(folder, [50, 31, 41])
    return folder


def config_of(folder: Path | str, **options: Any) -> DataConfig:
    return DataConfig(**{"path": str(folder), "lanes": 4, "window": 8, "max_bad_fraction": 1.0, **options})


def test_prints_every_number(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(dataset), *QUICK]) == 0
    text = capsys.readouterr().out
    for part in ("122 samples of float16 [2, 3, 4]", "samples/s", "MB/s", "first batch", "waited", "retries", "cache"):
        assert part in " ".join(text.split())


def test_every_group_of_a_dataset_is_read(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("2x64", "1x64"):
        shutil.copytree(dataset, tmp_path / name)
    (tmp_path / "groups.json").write_text('["1x64", "2x64"]')
    assert main(["bench", str(tmp_path), *QUICK]) == 0
    text = capsys.readouterr().out
    assert text.count("122 samples") == 2


def test_illegal_layouts_name_the_legal_ones(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(dataset), "--batch-size", "9", "--lanes", "4"]) == 2
    assert "legal lanes: [1, 3, 9]" in capsys.readouterr().err
    assert main(["bench", str(dataset), "--seconds", "0"]) == 2


def test_bad_data_is_named_and_exits_with_3(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch)  # a second is as many batches on any machine
    folder = tmp_path / "damaged"
    shutil.copytree(dataset, folder)
    entry = load_manifest(folder).shards[0]
    data = bytearray((folder / entry.name).read_bytes())
    data[512 + 140] ^= 1  # the first sample's values
    (folder / entry.name).write_bytes(data)
    assert main(["bench", str(folder), *QUICK, "--seconds", "4"]) == 3
    printed = capsys.readouterr()
    assert "checksum" in printed.out
    assert entry.name in printed.err
    assert key_of(0) in printed.err
    (folder / entry.name).unlink()
    assert main(["bench", str(folder), *QUICK]) == 3
    assert "is missing" in capsys.readouterr().err
    assert main(["bench", str(tmp_path / "nothing"), *QUICK]) == 3


class Clock:
    """A clock that only sleeping and taking a batch move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.taken = 100.0, 0
        take = BatchLoader.__next__

        def slow(loader: BatchLoader) -> Any:
            self.taken += 1
            self.now += 3.0 if self.taken == 1 else 0.01
            return take(loader)

        monkeypatch.setattr(BatchLoader, "__next__", slow)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(measure.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_the_first_batch_does_not_count_in_the_rates(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    result = measure_loading(config_of(dataset), batch_size=8, seconds=5.0)
    assert result["first_batch_seconds"] == pytest.approx(3.0)
    assert result["batches"] == clock.taken == pytest.approx(201, abs=2)
    assert result["samples"] == 8 * clock.taken
    assert result["samples_per_second"] == pytest.approx(8 / 0.01)
    assert result["megabytes_per_second"] == pytest.approx(8 * 48 / 0.01 / 1e6)


def test_a_pause_stands_for_the_training_step(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    result = measure_loading(config_of(dataset), batch_size=8, seconds=5.0, step_seconds=0.19)
    assert result["samples_per_second"] == pytest.approx(8 / 0.2)


def test_a_remote_dataset_shows_the_cache(dataset: Path, tmp_path: Path, bucket_url: str) -> None:
    from ardist.storage import open_storage

    storage = open_storage(bucket_url)
    for path in dataset.rglob("*"):
        if path.is_file():
            storage.put(path.relative_to(dataset).as_posix(), path)
    config = config_of(bucket_url, cache_dir=str(tmp_path))
    first, second = (bench(config, batch_size=8, seconds=0.1) for _ in range(2))
    assert first.metrics["cache_misses"] == 6
    assert (second.metrics["cache_misses"], second.metrics["cache_hits"]) == (0, 6)
    cells = list(table(second).columns[1].cells)
    assert any("6 hits, 0 misses" in str(cell) for cell in cells)
