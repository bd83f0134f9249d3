"""Section G: whatever lies in the folder, the build ends, names what it refuses, and decodes the rest right."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import zoo_good
from dt_builds import build_small, quarantine, samples
from zoo import ZOO, Animal, Clips

from data_tools.build import Summary
from data_tools.probed import shown_name
from data_tools.verify import verify

assert zoo_good  # registers the good ones


class Outcome:
    """One build over the whole zoo."""

    def __init__(self, folder: Path) -> None:
        self.videos, self.out = folder / "zoo", folder / "out"
        self.videos.mkdir()
        for animal in sorted(ZOO, key=lambda animal: bool(animal.reasons)):  # the copy needs its original
            path = self.videos / animal.name
            path.parent.mkdir(exist_ok=True)
            animal.make(path)
        self.left_over = sorted(path.name for path in self.videos.rglob("*.tmp*"))
        self.summary: Summary = build_small(
            self.videos, self.out, max_seconds=60.0, max_pixels=1500 * 1400, samples_per_shard=64
        )
        self.refused: dict[str, list[dict[str, object]]] = {}
        for record in quarantine(self.out):
            self.refused.setdefault(str(record["source"]), []).append(record)
        self.clips: dict[str, dict[int, np.ndarray]] = {}
        for array, info in samples(self.out).values():
            self.clips.setdefault(str(info["source"]), {})[int(str(info["start_frame"]))] = array


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return Outcome(tmp_path_factory.mktemp("zoo"))


@pytest.mark.parametrize("animal", [a for a in ZOO if a.reasons], ids=lambda animal: animal.name)
def test_refused_with_a_reason(outcome: Outcome, animal: Animal) -> None:
    records = outcome.refused.get(shown_name(animal.name), [])
    assert records, "not refused"
    assert {str(record["reason"]) for record in records} <= animal.reasons, records
    assert all(len(str(record["detail"])) <= 500 for record in records)
    assert shown_name(animal.name) not in outcome.clips


@pytest.mark.parametrize("animal", [a for a in ZOO if not a.reasons], ids=lambda animal: ascii(animal.name)[:40])
def test_decoded_right(outcome: Outcome, animal: Animal) -> None:
    name = shown_name(animal.name)
    assert name in outcome.clips, outcome.refused.get(name)
    assert name not in outcome.refused, outcome.refused[name]
    clips: Clips = outcome.clips[name]
    if animal.clips is not None:
        assert len(clips) == animal.clips, sorted(clips)
    assert all(clip.shape == (4, 16, 16, 3) for clip in clips.values())
    if animal.check is not None:
        animal.check(clips)


def test_nothing_else_happened(outcome: Outcome) -> None:
    """No command in a name ran, nothing was written beside the sources, every input has exactly one fate."""
    assert not outcome.left_over
    assert not list(outcome.videos.rglob("owned"))
    assert not list(Path.cwd().glob("owned"))
    fates = set(outcome.refused) | set(outcome.clips)
    assert fates == {shown_name(animal.name) for animal in ZOO}
    assert outcome.summary.videos == len(ZOO)
    assert not verify(str(outcome.out)).problems
    assert len(ZOO) >= 70


def test_frames_of_another_file_are_not_looked_at(outcome: Outcome) -> None:
    """The other file holds good frames: had anything opened it, its movie would have passed the probe."""
    for name in ("external.mov", "external_url.mov"):
        assert (outcome.videos.parent / f"{name}.frames").stat().st_size > 1000
        assert [record["stage"] for record in outcome.refused[name]] == ["probe"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "v" / "a.mp4"
    path.parent.mkdir()
    path.write_bytes(b"x")
    path.chmod(0)
    build_small(tmp_path / "v", tmp_path / "out")
    assert [record["reason"] for record in quarantine(tmp_path / "out")] == ["unreadable"]
