"""One message, the right exit code, no traceback unless asked for."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from ardist import command_line
from ardist.errors import ConfigError, DataError, HardwareError, Preempted
from ardist.events import EventCounter

ERRORS: dict[str, type[Exception]] = {
    "config": ConfigError,
    "data": DataError,
    "hardware": HardwareError,
    "stop": Preempted,
    "bug": KeyError,
}


@pytest.fixture
def app() -> typer.Typer:
    application = typer.Typer()

    @application.command()
    def fail(kind: str, level: int = 1) -> None:
        if kind == "interrupt":
            raise KeyboardInterrupt
        if kind == "file":
            Path("/proc/self/no-such-file").write_text("x")
        if kind != "none":
            raise ERRORS[kind](f"level {level} went wrong")

    return application


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("none", 0),
        ("config", 2),
        ("data", 3),
        ("hardware", 4),
        ("stop", 75),
        ("bug", 1),
        ("file", 4),
        ("interrupt", 130),
    ],
)
def test_exit_codes(app: typer.Typer, kind: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.run(app, "tool", [kind]) == code
    assert "Traceback" not in capsys.readouterr().err


def test_debug_shows_the_traceback(app: typer.Typer, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.run(app, "tool", ["data", "--debug"]) == 3
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "tool: level 1 went wrong" in shown


@pytest.mark.parametrize("words", [["none", "--level", "x"], ["none", "--lvl", "1"], []])
def test_usage_errors_are_exit_code_2(app: typer.Typer, words: list[str]) -> None:
    assert command_line.run(app, "tool", words) == 2


@pytest.mark.parametrize(
    ("words", "code", "shown"),
    [
        (["ardist", "--help"], 0, "videos \\u2192"),
        (["data_tools", "verify", "Größe"], 3, "Gr\\udcc3\\udcb6\\udcc3\\udc9fe/manifest.json does not exist"),
        (["data_tools", "build", "--videos", "list.txt", "--out", "out"], 4, "set LC_ALL=C.UTF-8 or PYTHONUTF8=1"),
    ],
    ids=lambda value: "-".join(value[:2]) if isinstance(value, list) else "",
)
def test_names_that_the_locale_cannot_write(tmp_path: Path, words: list[str], code: int, shown: str) -> None:
    (tmp_path / "Größe").mkdir()
    (tmp_path / "list.txt").write_text("Größe/é.mp4\n", encoding="utf-8")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    module, *rest = words
    program = ["-m", "ardist.cli" if module == "ardist" else module]
    done = subprocess.run(
        [sys.executable, *program, *rest], cwd=tmp_path, env=environment, capture_output=True, timeout=120, check=False
    )
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == code, said
    assert shown in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x" * 5000 + "\ud83d" + "y" * 5000, "holds half a surrogate pair, which is no valid UTF-8; legal: text"),
        ("x" * 5000 + "\udcff" + "y" * 5000, "is no valid UTF-8; where it names a file, rename that file"),
        ("\udcff.mp4", "tool: '\\udcff.mp4' is no valid UTF-8; where it names"),
    ],
)
def test_text_that_is_no_utf_8_is_shown_in_part(
    text: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "utf-8")
    application = typer.Typer()

    @application.command()
    def write() -> None:
        text.encode()

    assert command_line.run(application, "tool", []) == 4
    shown = capsys.readouterr().err
    assert said in shown
    assert "\\ud" in shown, "the part that cannot be written"
    assert len(shown) < 400
    assert ("rename" in shown) == ("\udcff" in text)


def test_events_are_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    counter = EventCounter()
    with caplog.at_level(logging.WARNING, logger="ardist.events"):
        logging.getLogger("ardist").propagate = True
        counter.count("loader.substitution", shard="a.tar")
        counter.count("loader.substitution", 2, shard="b.tar")
    assert counter.snapshot() == {"loader.substitution": 3}
    assert "shard=a.tar" in caplog.text
