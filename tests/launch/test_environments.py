"""Two ranks whose environments differ in everything that may change an order: what they train is one and the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ranks import run_ranks
from tiny import losses, sample_ids, settings, train_outcome, weights, write_latents
from two_nodes import wait_until

from ardist.config import TrainConfig
from ardist.launch.local import hold_port

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

LISTING = '''
"""Folders are listed in the order that this rank's file system likes."""
import contextlib, os
backwards = os.environ["LISTED"] == "backwards"
listdir, scandir = os.listdir, os.scandir
os.listdir = lambda *words: sorted(listdir(*words), reverse=backwards)
class Entries(list):
    close = lambda self: None
    __enter__ = lambda self: self
    __exit__ = lambda self, *words: None
    def __next__(self):
        self.iterator = getattr(self, "iterator", None) or iter(self)
        return next(self.iterator)
def ordered(*words):
    with scandir(*words) as entries:
        return Entries(sorted(entries, key=lambda entry: entry.name, reverse=backwards))
os.scandir = ordered
'''
ENVIRONMENTS = [
    {"LISTED": "forwards", "PYTHONHASHSEED": "1", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "TZ": "UTC"},
    {"LISTED": "backwards", "PYTHONHASHSEED": "4711", "LC_ALL": "C.UTF-8", "TZ": "Asia/Kathmandu"},
]


def test_hash_seeds_locales_and_listings_that_differ_between_ranks_change_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "Größe İ ☃"
    paths = [write_latents(folder / name, samples=32, seed=seed) for seed, name in enumerate(("zwei", "Äpfel", "B"))]
    mixture = [{"path": str(path), "weight": 1 + number} for number, path in enumerate(paths)]
    changes = {
        "training__steps": 14, "checkpoint__every": 2, "checkpoint__keep": 3, "tracking__name": "İstanbul ☃",
        "training__ema_decays": [0.9, 0.99], "validation": {"path": str(paths[0]), "every": 5, "num_clips": 8},
    }  # fmt: skip

    def values(name: str, **more: object) -> dict[str, object]:
        made = settings(folder / name, folder, **{**changes, **more})
        made["data"] = {**made["data"], "path": "", "mixture": mixture}
        return made

    def forked(name: str, **more: object) -> list[object]:
        return run_ranks(train_outcome, 2, TrainConfig.model_validate(values(name, **more)))

    assert forked("alike") == ["done", "done"]
    # Three checkpoints are there to choose from when the ranks that differ take over.
    assert all(str(said).startswith("Preempted") for said in forked("different", training__stop_after=7))

    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(LISTING)
    config = folder / "lauf ☃.yaml"
    config.write_text(yaml.safe_dump(values("different"), allow_unicode=True), encoding="utf-8")
    holder = hold_port(0)
    port = str(holder.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
    root = Path(__file__).resolve().parents[2]
    ranks = []
    for rank, own in enumerate(ENVIRONMENTS):
        environment = os.environ | meeting | own | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        environment["PYTHONPATH"] = f"{tmp_path / 'site'}:{root}"
        words = [sys.executable, "-m", "ardist.training.main", str(config)]
        with open(tmp_path / f"said-{rank}", "wb") as log:
            ranks.append(subprocess.Popen(words, env=environment, stdout=log, stderr=log))
    try:
        wait_until(lambda: all(rank.poll() == 0 for rank in ranks) or any(rank.poll() for rank in ranks))
    finally:
        for rank in ranks:
            rank.kill()  # one that is left alone would wait for the other
            rank.wait()
        holder.close()
    said = [(tmp_path / f"said-{rank}").read_text(encoding="utf-8", errors="replace") for rank in range(2)]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    assert not any("Traceback" in text or "Logging error" in text for text in said), "\n".join(said)

    assert losses(folder / "different") == losses(folder / "alike")
    assert sample_ids(folder / "different") == sample_ids(folder / "alike")
    mine, theirs = weights(folder / "different"), weights(folder / "alike")
    assert all(bool((mine[name] == theirs[name]).all()) for name in theirs)
