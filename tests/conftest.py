"""Shape annotations are checked at run time in every test: jaxtyping + beartype over the mathematical packages."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")

from jaxtyping import install_import_hook

install_import_hook(["ardist.diffusion", "ardist.models", "ardist.inference"], "beartype.beartype")

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of reference tensors made by an independent implementation; the test is skipped where it is absent."""
    if not GOLDEN.is_dir():
        pytest.skip("the golden reference tensors are not on this machine")
    return GOLDEN
