"""Shape annotations are checked at run time in every test: jaxtyping + beartype over the mathematical packages."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

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


@pytest.fixture(scope="session")
def load_benchmark(pytestconfig: pytest.Config) -> Callable[[str], ModuleType]:
    """Makes a module of a program of ``benchmarks/``, by its name; a new one each time."""

    folder = pytestconfig.rootpath / "benchmarks"
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # where a program finds those beside it

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"{name}_benchmark", folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look up their module by its name
        spec.loader.exec_module(module)
        return module

    return load
