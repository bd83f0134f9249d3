"""Under torch.compile: one graph, the same numbers, and a new graph only for a new layout."""

from __future__ import annotations

from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from attention_cases import tensors
from torch import Tensor
from torch._dynamo.utils import counters

from ardist.models.attention import AttentionLayout, attention


@pytest.fixture(autouse=True)
def _compiled_as_in_the_product() -> Iterator[None]:
    """Without the test session's shape checks, which are no part of the compiled program."""
    jaxtyping.config.update("jaxtyping_disable", True)
    torch._dynamo.reset()
    counters.clear()
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch._dynamo.reset()


def run(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, backend: str) -> Tensor:
    return attention(q * 1.5, k.sin(), v, layout, backend) * 2


@pytest.mark.parametrize("backend", ["sdpa", "flash", "auto"])
def test_one_graph_with_the_same_numbers(backend: str) -> None:
    """`fullgraph` makes any graph break an error."""
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    makers = [
        lambda: AttentionLayout.training(8, 24, 7),
        lambda: AttentionLayout.training(8, 24, 7),
        lambda: AttentionLayout.training(9, 24, 7),
        lambda: AttentionLayout.training(20, 8, 7, window=6),
        lambda: AttentionLayout.training(9, 24, 7),
    ]
    graphs = []
    for make in makers:
        layout = make()
        q, k, v, grad = tensors(layout, dtype=torch.float32)
        out, expected = compiled(q, k, v, layout, backend), run(q, k, v, layout, backend)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
        found, wanted = (torch.autograd.grad(x, (q, k, v), grad) for x in (out, expected))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 1, 2, 3, 3], "equal layouts share a graph even when they are different objects"


def test_flex_inside_a_compiled_function() -> None:
    layout = AttentionLayout.training(8, 24, 7)
    q, k, v, _ = (x.detach() for x in tensors(layout, 16, torch.float32))
    out = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v, layout, "flex")
    torch.testing.assert_close(out, run(q, k, v, layout, "reference"), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_default_compiler() -> None:
    layout = AttentionLayout.training(6, 32, 7)
    q, k, v, grad = tensors(layout, dtype=torch.float32)
    out = torch.compile(run, fullgraph=True)(q, k, v, layout, "flash")
    expected = run(q, k, v, layout, "reference")
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    found, wanted = (torch.autograd.grad(x, (q, k, v), grad) for x in (out, expected))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
