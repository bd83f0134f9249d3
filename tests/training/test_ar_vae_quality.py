"""The benchmark that trains both stages of an AR-VAE: by which Python."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest


def test_both_stages_are_trained_by_the_interpreter_that_judges_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    path = pytestconfig.rootpath / "benchmarks" / "ar_vae_quality.py"
    specification = importlib.util.spec_from_file_location("ar_vae_quality", path)
    assert specification is not None
    assert specification.loader is not None
    benchmark = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, specification.name, benchmark)
    specification.loader.exec_module(benchmark)
    calls: list[tuple[list[str], dict[str, Any]]] = []
    monkeypatch.setattr(benchmark.subprocess, "run", lambda words, **options: calls.append((words, options)))
    (tmp_path / "bundle1").mkdir()
    benchmark.train(tmp_path, 1, 2, [])
    [(words, options)] = calls
    assert words[0].endswith("launchers/train.sh")
    assert options["env"]["PYTHON"] == sys.executable
