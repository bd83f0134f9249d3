"""Attention backends against PyTorch's fused attention with a dense mask, in one run.

    python benchmarks/attention.py                                # small shapes on CPU; the large ones where CUDA is
    python benchmarks/attention.py --shapes reference 8k-64 --dtype bfloat16 --json attention.json

Per shape: the median time of the forward pass and of forward plus backward, the ratio to the dense mask (above 1 is
faster), TFLOP/s, and the largest difference of the outputs. FLOPs are those the mask allows, so skipping forbidden
pairs shows as speed: 4 x head dimension per pair and head forward, twice that backward. Candidates take turns within
each round, so that a change of the machine's pace meets all of them. A candidate that fails (no memory, a shape it does
not do) has the reason in its row, and the others go on.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from ardist.errors import InvalidValueError
from ardist.models.attention import AttentionLayout, attention, available_backends
from ardist.models.attention.flash import KERNELS
from ardist.models.attention.merging import block_causal

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
T = TypeVar("T")


@dataclass(frozen=True)
class Shape:
    """A layout and the rest of what attention is called with."""

    layout: AttentionLayout
    batch: int
    heads: int
    head_dim: int


TRAINING = AttentionLayout.training
SHAPES = {
    # CPU: the shapes of the presets, short clips, and one active frame over a full cache.
    "preset-tiny": Shape(TRAINING(16, 32), 2, 4, 32),
    "preset-small": Shape(TRAINING(16, 32), 2, 6, 64),
    "context": Shape(TRAINING(16, 32, 77), 1, 6, 64),
    "few-tokens": Shape(TRAINING(64, 8), 2, 4, 32),
    "large-frames": Shape(TRAINING(8, 256), 1, 4, 64),
    "window": Shape(TRAINING(64, 32, window=8), 1, 4, 64),
    "cached": Shape(AttentionLayout(32, (15, 16), (0, 16), context_queries=False), 1, 6, 64),
    # GPU: the paper's shape, then 8,192 and 32,768 tokens.
    "reference": Shape(TRAINING(16, 32, 77), 16, 16, 72),
    "8k-64": Shape(TRAINING(16, 512), 2, 16, 64),
    "8k-128": Shape(TRAINING(16, 512), 2, 16, 128),
    "32k-64": Shape(TRAINING(64, 512), 1, 16, 64),
    "32k-128": Shape(TRAINING(64, 512), 1, 16, 128),
    "32k-window": Shape(TRAINING(64, 512, window=16), 1, 16, 64),
}
ON_CPU = ("preset-tiny", "preset-small", "context", "few-tokens", "large-frames", "window", "cached")
ON_CUDA = ("reference", "8k-64", "8k-128", "32k-64", "32k-128", "32k-window")
BASELINE = "dense mask"


@dataclass
class Result:
    """One row: times in milliseconds, None where the candidate does not do it or, as `failure` says, could not."""

    shape: str
    candidate: str
    forward_ms: float | None = None
    both_ms: float | None = None
    forward_tflops: float | None = None
    both_tflops: float | None = None
    difference: float | None = None
    failure: str | None = None


def candidates(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Attend]:
    """What is timed: the dense mask first, then every backend and every flash kernel that works here."""
    layout = shape.layout
    mask = functools.cache(layout.dense_mask)
    found: dict[str, Attend] = {
        BASELINE: lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask(device))
    }
    for name, reason in available_backends(device, dtype, shape.head_dim).items():
        if reason is not None or name in ("reference", "flash"):
            continue
        if name.startswith("flash/"):
            kernel = KERNELS[name.removeprefix("flash/")]
            found[name] = functools.partial(block_causal, layout=layout, kernel=kernel)
        else:
            found[name] = functools.partial(attention, layout=layout, backend=name)
    return found


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Duration of one call, the device's queue drained before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3


def measure(shape_name: str, shape: Shape, device: torch.device, dtype: torch.dtype, repeats: int) -> list[Result]:
    """All candidates at one shape."""
    layout = shape.layout
    torch.manual_seed(0)
    sizes = (layout.num_queries, layout.num_keys, layout.num_keys)
    # As the denoiser hands them over: [b, tokens, heads, d] in memory, heads first in shape.
    values = [torch.randn(shape.batch, n, shape.heads, shape.head_dim, device=device, dtype=dtype) for n in sizes]
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in values)
    grad = torch.randn_like(q)

    def forward(attend: Attend) -> Tensor:
        with torch.no_grad():
            return attend(q, k, v)

    def both(attend: Attend) -> object:
        return torch.autograd.grad(attend(q, k, v), (q, k, v), grad)

    attends = candidates(shape, device, dtype)
    passes: dict[str, Callable[[Attend], object]] = {"forward": forward, "both": both}
    times: dict[tuple[str, str], list[float]] = {
        (candidate, name): []
        for name in passes
        for candidate in attends
        if name == "forward" or candidate != "flex" or device.type == "cuda"
    }
    failures: dict[tuple[str, str], str] = {}

    def attempt(candidate: str, name: str, run: Callable[[Attend], T]) -> T | None:
        """What `run` returns; None where this pass of the candidate fails or has failed, with the reason noted."""
        if (candidate, name) in failures:
            return None
        try:
            return run(attends[candidate])
        except (torch.cuda.OutOfMemoryError, RuntimeError, InvalidValueError) as problem:
            reason = (str(problem).splitlines() or ["no message"])[0]
            failures[candidate, name] = f"{name}: {type(problem).__name__}: {reason}"
            return None

    def timed(run: Callable[[Attend], object], attend: Attend) -> float:
        return milliseconds(functools.partial(run, attend), device)

    def distance(attend: Attend) -> float | None:
        return None if expected is None else float((forward(attend).float() - expected).abs().max())

    expected = attempt(BASELINE, "forward", lambda attend: forward(attend).float())
    differences = {candidate: attempt(candidate, "forward", distance) for candidate in attends}
    for turn in range(repeats + 2):
        for (candidate, name), row in times.items():
            taken = attempt(candidate, name, functools.partial(timed, passes[name]))
            if taken is not None and turn >= 2:
                row.append(taken)
    flops = 4.0 * layout.num_pairs() * shape.head_dim * shape.heads * shape.batch
    results = []
    for candidate in attends:
        one, two = (
            statistics.median(times[candidate, name])
            if times.get((candidate, name)) and (candidate, name) not in failures
            else None
            for name in passes
        )
        results.append(
            Result(
                shape_name,
                candidate,
                one,
                two,
                None if one is None else flops / one / 1e9,
                None if two is None else 3 * flops / two / 1e9,
                differences[candidate],
                "; ".join(failures[candidate, name] for name in passes if (candidate, name) in failures) or None,
            )
        )
    return results


def cells(milliseconds: float | None, baseline: float | None, tflops: float | None) -> tuple[str, str, str]:
    """Time, ratio to the baseline and TFLOP/s as the table shows them; a dash for what there is not."""
    if milliseconds is None:
        return "-", "-", "-"
    ratio = "-" if baseline is None else f"{baseline / milliseconds:.2f}"
    return f"{milliseconds:.2f} ms", ratio, f"{tflops:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="float32 on CPU, else bfloat16")
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    on_cuda = device.type == "cuda"
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if on_cuda else "float32"))
    machine = (
        torch.cuda.get_device_name(device) if on_cuda else f"{platform.machine()}, {torch.get_num_threads()} thread"
    )
    title = f"attention, {dtype}, {machine}, torch {torch.__version__}"

    table = Table("shape", "candidate", "forward", "x", "TFLOP/s", "fwd+bwd", "x", "TFLOP/s", "max diff", title=title)
    for column in table.columns[2:]:
        column.justify = "right"
    everything = []
    for name in arguments.shapes or (ON_CUDA if on_cuda else ON_CPU):
        shape = SHAPES[name]
        results = measure(name, shape, device, dtype, arguments.repeats)
        everything += results
        base = results[0]
        pairs = shape.layout.num_pairs() / (shape.layout.num_queries * shape.layout.num_keys)
        label = f"{name}\n{shape.layout.num_queries}x{shape.layout.num_keys} d{shape.head_dim}\n{pairs:.0%} allowed"
        for result in results:
            first = cells(result.forward_ms, base.forward_ms, result.forward_tflops)
            second = cells(result.both_ms, base.both_ms, result.both_tflops)
            who = result.candidate if result.failure is None else f"{result.candidate}\n{escape(result.failure)}"
            table.add_row(label, who, *first, *second, "-" if result.difference is None else f"{result.difference:.1e}")
            label = ""
        table.add_section()
    Console(width=120).print(table)
    if arguments.json:
        report = {
            "title": title,
            "date": time.strftime("%Y-%m-%d"),
            "results": [asdict(result) for result in everything],
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
