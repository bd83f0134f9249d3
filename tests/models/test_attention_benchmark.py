"""The benchmark of attention: a candidate that fails costs its own row and nothing else."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ardist.errors import InvalidValueError
from ardist.models.attention import AttentionLayout


@pytest.fixture
def benchmark(load_benchmark: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load_benchmark("attention")
    monkeypatch.setattr(module, "SHAPES", {"preset-tiny": module.Shape(AttentionLayout.training(2, 3), 1, 2, 8)})
    return module


def raising(problem: Exception, only_backward: bool = False) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if only_backward and not torch.is_grad_enabled():
            return q + k + v
        raise problem

    return attend


def rows(module: ModuleType, monkeypatch: pytest.MonkeyPatch, **attends: Any) -> dict[str, Any]:
    real = module.candidates

    def candidates(*arguments: Any) -> dict[str, Any]:
        found = {module.BASELINE: real(*arguments)[module.BASELINE], "works": lambda q, k, v: q + k + v}
        return found | {name.replace("_", " "): attend for name, attend in attends.items()}

    monkeypatch.setattr(module, "candidates", candidates)
    shape = module.SHAPES["preset-tiny"]
    measured = module.measure("preset-tiny", shape, torch.device("cpu"), torch.float32, 1)
    return {result.candidate: result for result in measured}


def test_a_failing_candidate_leaves_the_other_rows(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    found = rows(
        benchmark,
        monkeypatch,
        full=raising(torch.cuda.OutOfMemoryError("no memory\nat all")),
        shy=raising(InvalidValueError("head_dim=8 is illegal")),
        half=raising(RuntimeError("no backward"), only_backward=True),
    )
    assert found["full"].failure == "forward: OutOfMemoryError: no memory; both: OutOfMemoryError: no memory"
    assert found["full"].forward_ms is found["full"].both_ms is found["full"].difference is None
    assert "forward: InvalidValueError: head_dim=8 is illegal" in found["shy"].failure
    assert found["half"].failure == "both: RuntimeError: no backward"
    assert found["half"].forward_ms > 0
    assert found["half"].both_ms is None
    for name in (benchmark.BASELINE, "works"):
        assert found[name].failure is None
        assert found[name].forward_ms > 0
        assert found[name].both_ms > 0


def test_the_table_has_the_reason_even_where_the_baseline_fails(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    problem = raising(RuntimeError("[mask] too large"))
    monkeypatch.setattr(
        benchmark, "candidates", lambda *_: {benchmark.BASELINE: problem, "works": lambda q, k, v: q + k + v}
    )
    words = ["attention.py", "--device", "cpu", "--shapes", "preset-tiny", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", words)
    benchmark.main()
    shown = " ".join(capsys.readouterr().out.split())
    assert "RuntimeError" in shown
    assert "[mask]" in shown
    assert "works" in shown
    assert " ms" in shown
