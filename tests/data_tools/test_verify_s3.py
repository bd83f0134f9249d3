"""Damage of every kind to a finished dataset on an S3 server, and verify must find all of it there as well."""

from __future__ import annotations

import random
from pathlib import Path

from dt_builds import build_small

from ardist.storage import Storage, open_storage
from data_tools import layout
from data_tools.verify import verify


def _harm(storage: Storage, name: str, good: bytes, dice: random.Random) -> None:
    """Turn one bit, cut the end off, or delete the object."""
    kind, at = dice.choice(("flip", "flip", "cut", "delete")), dice.randrange(len(good))
    if kind == "delete":
        storage.delete(name)
    elif kind == "cut":
        storage.put(name, good[:at])
    else:
        storage.put(name, good[:at] + bytes([good[at] ^ (1 << dice.randrange(8))]) + good[at + 1 :])


def test_two_hundred_damages_are_all_found(three_videos: Path, s3_url: str, tmp_path: Path) -> None:
    """Records one by one, as each hides others; all tars and indices at once, as each must be named by itself."""
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "a.mp4").symlink_to(three_videos / "a.mp4")
    (tmp_path / "v" / "broken.mp4").write_bytes(b"no video" * 50)
    build_small(tmp_path / "v", s3_url, samples_per_shard=1)
    storage = open_storage(s3_url)
    good = {name: storage.read(name) for name in storage.list()}
    shards = [name for name in good if name.startswith(layout.SHARDS)]
    records = sorted(set(good) - set(shards))
    assert (len(shards), len(records)) == (6, 8)
    assert not verify(s3_url).problems
    dice = random.Random(11)
    done, missed = 0, []
    for group in [[name] for name in records] * 5 + [shards] * 27:
        for name in group:
            _harm(storage, name, good[name], dice)
        problems = verify(s3_url).problems
        named = {problem.name for problem in problems}
        missed += [name for name in group if (name not in named if group is shards else not problems)]
        for name in group:
            storage.put(name, good[name])
        done += len(group)
    assert done >= 200
    assert missed == []
    assert not verify(s3_url).problems
