"""Damage of every kind to a finished dataset, and verify must find all of it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dt_builds import build_small

from ardist.data.manifest import MANIFEST_NAME
from ardist.errors import DataError
from ardist.storage import LocalStorage, StorageError
from data_tools import layout
from data_tools.cli import main
from data_tools.sealed import seal, unseal
from data_tools.verify import verify


@pytest.fixture(scope="module")
def dataset(three_videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished dataset with a refused video."""
    folder = tmp_path_factory.mktemp("verify")
    shutil.copytree(three_videos, folder / "v")
    (folder / "v" / "broken.mp4").write_bytes(b"no video" * 50)
    build_small(folder / "v", folder / "out", classes_from_folders=False)
    return folder / "out"


def _files(dataset: Path) -> list[str]:
    return sorted(path.relative_to(dataset).as_posix() for path in dataset.rglob("*") if path.is_file())


def test_a_good_dataset_has_no_problems(dataset: Path) -> None:
    report = verify(str(dataset))
    assert (report.problems, report.notes) == ([], [])
    assert (report.shards, report.samples) == (3, 9)
    assert not verify(str(dataset), quick=True).problems


def test_what_a_finished_dataset_consists_of(dataset: Path) -> None:
    """Nothing that only the making needed is left, and nothing is there that verify does not look at."""
    kinds = {name.split("/")[0] for name in _files(dataset)}
    records = {layout.CLAIM, layout.PLAN, "plan", layout.QUARANTINE, "commits"}
    assert kinds == {MANIFEST_NAME, "shards", *records}


def test_two_hundred_flipped_bytes_are_all_found(dataset: Path) -> None:
    """Each flip by itself, anywhere in any file; the file is restored afterwards."""
    dice = random.Random(7)
    names = _files(dataset)
    missed = []
    for number in range(200):
        # Every file gets its share, the large ones do not take all.
        name = names[number % len(names)]
        path = dataset / name
        good = path.read_bytes()
        at, bit = dice.randrange(len(good)), dice.randrange(8)
        path.write_bytes(good[:at] + bytes([good[at] ^ (1 << bit)]) + good[at + 1 :])
        if not verify(str(dataset)).problems:
            missed.append((name, at, bit))
        path.write_bytes(good)
    assert missed == []
    assert not verify(str(dataset)).problems


def test_rows_that_cannot_be_read_are_listed_with_the_rest(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, shard = (next(name for name in _files(dataset) if kind in name) for kind in ("plan/", ".tar"))
    read, stream = LocalStorage.read, LocalStorage.stream

    def broken(real: Callable[..., Any]) -> Callable[..., Any]:
        def once(self: LocalStorage, name: str, *words: Any) -> Any:
            if name == rows:
                raise StorageError(f"cannot read {name}: Input/output error")
            return real(self, name, *words)

        return once

    monkeypatch.setattr(LocalStorage, "read", broken(read))
    monkeypatch.setattr(LocalStorage, "stream", broken(stream))
    good = (dataset / shard).read_bytes()
    (dataset / shard).write_bytes(good[:-1])
    assert main(["verify", str(dataset)]) == 3
    said = "".join("".join(capsys.readouterr()).split())
    assert f"{rows}:cannotread{rows}:Input/outputerror" in said
    assert f"{shard}:{len(good) - 1}bytes,themanifestsays{len(good)}" in said
    (dataset / shard).write_bytes(good)


@pytest.mark.parametrize("quick", [False, True])
def test_every_missing_or_cut_file_is_named(dataset: Path, quick: bool) -> None:
    for name in _files(dataset):
        path = dataset / name
        good = path.read_bytes()
        path.unlink()
        assert any(problem.name in (name, layout.COMMITS) for problem in verify(str(dataset), quick=quick).problems), (
            name
        )
        for size in (0, len(good) // 2, len(good) - 1):
            path.write_bytes(good[:size])
            assert verify(str(dataset), quick=quick).problems, f"{name} cut to {size}"
        path.write_bytes(good)


def test_swapped_shards_are_found(dataset: Path) -> None:
    first, second = sorted((dataset / "shards").glob("*.tar"))[:2]
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    names = {problem.name for problem in verify(str(dataset)).problems}
    first.write_bytes(one)
    second.write_bytes(two)
    assert {f"shards/{first.name}", f"shards/{second.name}"} <= names


def test_an_orphan_is_a_note_and_a_bare_copy_is_fine(dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset / "shards", copy / "shards")
    shutil.copy(dataset / MANIFEST_NAME, copy)
    (copy / "shards" / "shard-000009-deadbeef.tar").write_bytes(b"x")
    report = verify(str(copy))
    assert not report.problems
    assert len(report.notes) == 2


def test_command_line(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(dataset)]) == 0
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    tar = sorted((copy / "shards").glob("*.tar"))[1]
    tar.write_bytes(tar.read_bytes()[:-600])
    assert main(["verify", "--quick", str(copy)]) == 3
    error = capsys.readouterr().err
    assert tar.name in error
    assert main(["verify", str(tmp_path / "nothing")]) == 3


def test_a_seal_holds_for_every_byte() -> None:
    fields = {"a": 1.5e-7, "b": ["x", None], "c": "ü\udcff"}
    data = seal(fields)
    assert unseal(data, "x") == fields
    for changed in (data.replace(b",", b", ", 1), data.replace(b"e-07", b"E-07"), data[:-1], data + b" ", b"[]", b""):
        assert changed != data
        with pytest.raises(DataError, match="x is damaged"):
            unseal(changed, "x")
