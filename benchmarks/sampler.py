"""The cached sampler against the recomputing one, which evaluates its whole window in every row as the authors do.

    python benchmarks/sampler.py                              # the full table: `small`, 50 steps, 15 minutes on 2 cores
    python benchmarks/sampler.py --steps 10                   # the same proportions in a fifth of the time
    python benchmarks/sampler.py --cases 0 1 --rounds 3       # medians of three rounds of the short cases

Both run in one process on the same weights and noise, one after the other for each case; for videos no longer than the
window the largest difference of their latents is printed too. For longer ones they compute different things: a rolling
band and a common window. With several rounds the seconds and the ratio are medians of them.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from clocks import add_clock, chosen_clock
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ardist.diffusion.ad import ADSchedule
from ardist.diffusion.noise import NoiseSchedule
from ardist.inference.sampler import ADSampler
from ardist.models.denoiser import Denoiser, preset


@dataclass(frozen=True)
class Case:
    """A length, a difference as a fraction of the steps, a window, and the ratio that is asked for."""

    frames: int
    difference: float
    window: int
    goal: float | None


CASES = [
    Case(16, 0.0, 16, 0.95),
    Case(16, 0.1, 16, 2.0),
    Case(16, 0.5, 16, None),
    Case(16, 1.0, 16, 8.0),
    Case(128, 0.1, 16, None),
]


def random_denoiser(name: str, device: str, dtype: torch.dtype) -> Denoiser:
    """A denoiser in which no weight is zero and no activation saturates, so that nothing is trivially fast or equal."""
    torch.manual_seed(0)
    denoiser = Denoiser(preset(name))
    with torch.no_grad():
        for parameter in denoiser.parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(noise, alpha=0.05)
    return denoiser.to(device, dtype).eval()


def timed(
    sampler: ADSampler, case: Case, steps: int, batch_size: int, clock: Callable[[], float]
) -> tuple[float, Tensor]:
    """(seconds, latents) of one run."""
    if sampler.device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    latents = sampler.sample(
        case.frames,
        num_inference_steps=steps,
        difference=round(case.difference * steps),
        batch_size=batch_size,
        seed=1,
    )
    if sampler.device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start, latents


def main() -> None:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", type=int, nargs="*", help="numbers of the cases to run, from 0")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    add_clock(parser)
    arguments = parser.parse_args()
    clock = chosen_clock(arguments)
    torch.set_num_threads(arguments.threads)
    dtype = torch.bfloat16 if arguments.device.startswith("cuda") else torch.float32
    denoiser = random_denoiser(arguments.preset, arguments.device, dtype)
    chosen = [CASES[number] for number in (arguments.cases or range(len(CASES)))]
    name = torch.cuda.get_device_name() if dtype == torch.bfloat16 else f"{platform.machine()} CPU"
    table = Table(
        title=f"{arguments.preset}, {arguments.steps} steps, batch {arguments.batch_size}, {dtype}, {name}, "
        f"{arguments.threads} threads, {arguments.clock} time, torch {torch.__version__}"
    )
    for column in ("F", "s", "W", "rows", "frame evaluations", "recompute s", "cached s", "ratio", "goal", "max diff"):
        table.add_column(column, justify="right")
    for case in chosen:
        difference = round(case.difference * arguments.steps)
        kinds = ("recompute", "rolling")
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        latents: dict[str, Tensor] = {}
        plans = {kind: ADSchedule(case.frames, arguments.steps, difference, case.window, kind) for kind in kinds}
        samplers = {
            kind: ADSampler(denoiser, NoiseSchedule.create(), window=case.window, window_kind=kind) for kind in kinds
        }
        for sampler in samplers.values():
            sampler.sample(min(case.frames, 4), num_inference_steps=2, difference=0)
        for _ in range(arguments.rounds):
            for kind, sampler in samplers.items():
                time_used, latents[kind] = timed(sampler, case, arguments.steps, arguments.batch_size, clock)
                seconds[kind].append(time_used)
        same = case.frames <= case.window
        worst = (latents["rolling"] - latents["recompute"]).abs().max().item()
        ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
        table.add_row(
            str(case.frames),
            str(difference),
            str(case.window),
            str(plans["rolling"].num_rows),
            f"{plans['recompute'].num_frame_evaluations} / {plans['rolling'].num_frame_evaluations}",
            f"{statistics.median(seconds['recompute']):.2f}",
            f"{statistics.median(seconds['rolling']):.2f}",
            f"{ratio:.2f}x",
            "" if case.goal is None else f"{case.goal}x {'met' if ratio >= case.goal else 'MISSED'}",
            f"{worst:.1e}" if same else "other mask",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
