"""Tests of the launcher share the tiny data set of the distributed ones, and ranks without torch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ardist.launch import nodes

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "distributed"))


@pytest.fixture
def all_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that can write their stacks have all the time to do so."""
    monkeypatch.setattr(nodes, "STACK_SECONDS", 60.0)
