"""A training step of the denoiser alone: compiled blocks with our attention, beside eager ones with a dense mask.

    python benchmarks/model_step.py                                  # `tiny`, fp32, on a CPU
    python benchmarks/model_step.py --preset xl --context 77 --precision bf16 --batch 8      # on a GPU

Forward pass, squared error, backward pass and fused AdamW on one device, weights in the precision that is asked for.
Contenders have the same weights and take turns within each round; rates are medians over rounds. FLOPs are those that
the mask allows, counted once, for all contenders alike; MFU is against the device's dense peak where the table knows
it. Peak memory holds the weights and optimiser states of all three contenders.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ardist.models.attention import AttentionLayout
from ardist.models.denoiser import Denoiser, block, preset
from ardist.models.flops import denoiser_flops
from ardist.models.parallelize import parallelize
from ardist.training.throughput import device_name, peak_flops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Step = Callable[[], None]


@contextmanager
def dense_mask() -> Iterator[None]:
    """Blocks attend through PyTorch's fused attention with a boolean [n, n] mask, made once."""
    masks: dict[object, Tensor] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, _: str) -> Tensor:
        key = layout.key()
        if key not in masks:
            masks[key] = layout.dense_mask(q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=masks[key])

    usual, block.attention = block.attention, attend
    try:
        yield
    finally:
        block.attention = usual


def training_step(model: Denoiser, options: argparse.Namespace, device: torch.device) -> Step:
    """One optimiser step on inputs that are ready."""
    config, dtype = model.config, DTYPES[options.precision]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    shape = (options.batch, options.frames, config.tokens_per_frame, config.latent_channels)
    target = F.normalize(torch.randn(shape, device=device), dim=-1).to(dtype)
    timesteps = torch.randint(0, 1000, shape[:2], device=device).sort(dim=1).values
    context = None
    if config.context_tokens:
        context = torch.randn(options.batch, config.context_tokens, config.context_dim, device=device, dtype=dtype)

    def step() -> None:
        prediction = model(target, timesteps, context)
        (prediction.float() - target.float()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(step: Step, count: int, device: torch.device) -> float:
    """Seconds per step."""
    began = time.perf_counter()
    for _ in range(count):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / count


def main() -> None:
    """Measure the contenders, print the table."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--preset", default="tiny")
    words.add_argument("--frames", type=int, default=16)
    words.add_argument("--tokens", type=int, default=32)
    words.add_argument("--context", type=int, default=0, help="context tokens of 768 channels")
    words.add_argument("--batch", type=int, default=2, help="clips per step")
    words.add_argument("--precision", choices=DTYPES, default="fp32")
    words.add_argument("--checkpointing", choices=("none", "selective", "full"), default="none")
    words.add_argument("--rounds", type=int, default=5)
    words.add_argument("--steps", type=int, default=4, help="steps of one contender in one round")
    words.add_argument("--json", type=Path)
    options = words.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    changes = {"context_tokens": options.context, "context_dim": 768} if options.context else {}
    eager = Denoiser(preset(options.preset, tokens_per_frame=options.tokens, **changes))
    eager = eager.to(device, DTYPES[options.precision])
    dense, compiled = copy.deepcopy(eager), copy.deepcopy(eager)
    parallelize(compiled, compile=True, activation_checkpointing=options.checkpointing)
    parallelize(eager, activation_checkpointing=options.checkpointing)
    contenders: dict[str, tuple[Step, Callable[[], AbstractContextManager[None]]]] = {
        "eager, dense mask": (training_step(dense, options, device), dense_mask),
        "eager, ours": (training_step(eager, options, device), nullcontext),
        "compiled, ours": (training_step(compiled, options, device), nullcontext),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    memory: dict[str, float] = {}
    for number in range(options.rounds + 1):  # the first one compiles and warms up
        for name, (step, surroundings) in contenders.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with surroundings():
                taken = timed(step, options.steps, device)
            if number:
                seconds[name].append(taken)
            if device.type == "cuda":
                memory[name] = torch.cuda.max_memory_allocated() / 2**30
    flops = options.batch * denoiser_flops(eager.config, options.frames).training
    peak = peak_flops(device_name(device), options.precision)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    parameters = sum(parameter.numel() for parameter in eager.parameters())
    title = f"{options.preset}, {parameters / 1e6:.1f} M parameters, {options.batch} clips of {options.frames} x "
    title += f"{options.tokens} + {options.context} tokens, {options.precision}, {where}, torch {torch.__version__}"
    table = Table("", "clips/s", "TFLOP/s", "MFU", "to dense mask", "peak GiB", title=title)
    rows = {}
    for name, values in seconds.items():
        rate = options.batch / statistics.median(values)
        speed = flops / statistics.median(values)
        pairs = zip(seconds["eager, dense mask"], values, strict=True)
        ratio = statistics.median(base / mine for base, mine in pairs)
        rows[name] = {"clips_per_second": rate, "flops_per_second": speed, "ratio": ratio, "peak_gib": memory.get(name)}
        mfu = "n/a" if peak is None else f"{speed / peak:.1%}"
        held = f"{memory[name]:.1f}" if name in memory else "n/a"
        table.add_row(name, f"{rate:.2f}", f"{speed / 1e12:.3g}", mfu, f"{ratio:.2f}x", held)
    Console(width=140).print(table)
    if options.json is not None:
        options.json.write_text(json.dumps({"title": title, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
