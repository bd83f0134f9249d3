"""The benchmark that trains both stages of an AR-VAE: by which Python."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def test_both_stages_are_trained_by_the_interpreter_that_judges_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load_benchmark: Callable[[str], ModuleType]
) -> None:
    benchmark = load_benchmark("ar_vae_quality")
    calls: list[tuple[list[str], dict[str, Any]]] = []
    monkeypatch.setattr(benchmark.subprocess, "run", lambda words, **options: calls.append((words, options)))
    (tmp_path / "bundle1").mkdir()
    benchmark.train(tmp_path, 1, 2, [])
    [(words, options)] = calls
    assert words[0].endswith("launchers/train.sh")
    assert options["env"]["PYTHON"] == sys.executable
