"""The command line of launchers/train.sh: words, not lines; refusals before anything is started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import settings

from ardist.launch import main as program
from ardist.launch.engines import MODULE, Host, Placement, launches

WORDS = [MODULE, "my config.yaml", "data.path=s3://a b/'c'", 'tracking.name="$(x)"', "--debug"]


@pytest.mark.parametrize("engine", ["deepspeed", "torchrun", "plain"])
def test_the_launcher_gets_words_not_a_line(tmp_path: Path, engine: str) -> None:
    started = launches(engine, Placement((Host("localhost", 2),), 0, "127.0.0.1", 29400), WORDS, tmp_path)
    assert len(started) == (2 if engine == "plain" else 1)
    for launch in started:
        assert launch.words[-len(WORDS) :] == WORDS
    if engine == "deepspeed":
        assert started[0].words[started[0].words.index("--num_gpus") + 1] == "2"


def test_machines_are_told_apart_by_their_number(tmp_path: Path) -> None:
    placement = Placement((Host("10.0.0.1", 2), Host("10.0.0.2", 4)), 1, "10.0.0.1", 29400)
    [launch] = launches("deepspeed", placement, WORDS, tmp_path)
    hostfile = Path(launch.words[launch.words.index("--hostfile") + 1])
    assert hostfile.read_text() == "10.0.0.1 slots=2\n10.0.0.2 slots=4\n"
    assert launch.words[launch.words.index("--node_rank") + 1] == "1"
    assert "--no_ssh" in launch.words
    [launch] = launches("torchrun", placement, WORDS, tmp_path)
    assert launch.words[launch.words.index("--nproc-per-node") + 1] == "4"
    assert launch.words[launch.words.index("--local-addr") + 1] == "10.0.0.2"


@pytest.mark.parametrize(
    ("file", "override", "text"),
    [("absent.yaml", "training.steps=3", "cannot read"), ("run.yaml", "training.stepz=3", "did you mean 'steps'")],
)
def test_a_bad_configuration_ends_before_anything_is_started(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    file: str,
    override: str,
    text: str,
) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps(settings(tmp_path / "run", tmp_path)))
    monkeypatch.setattr(program, "Supervisor", lambda *words: pytest.fail("something was started"))
    assert program.main(["--ranks", "2", str(tmp_path / file), override]) == 2
    assert text in capsys.readouterr().err


def test_impossible_numbers_of_ranks_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--ranks", "0", "absent.yaml"]) == 2
    assert "legal: 1 and more" in capsys.readouterr().err
