"""AR-VAE training speed: frames per second of one forward and backward pass, by preset, precision and compilation.

    python benchmarks/ar_vae.py [--presets tiny small] [--device cuda] [--temporal] [--frames 16] [--batch-size 1]

Every case runs in one process, one after the other; the ratio is to the first case of the same preset (float32 eager).
FLOPs are counted, not estimated: those of the matrix products, convolutions and attention of the very pass that is
timed. MFU is shown where the device's peak is known.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from ardist.config.ar_vae import PRESETS
from ardist.models.ar_vae import ARVAE, preset
from ardist.models.ar_vae.losses import reconstruction_loss
from ardist.training.throughput import device_name, peak_flops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def training_pass(model: ARVAE, frames: torch.Tensor, compiled: bool) -> Callable[[], None]:
    """One forward and backward pass with the L1 loss."""
    forward = torch.compile(model) if compiled else model

    def run() -> None:
        model.zero_grad(set_to_none=True)
        reconstruction, _, _ = forward(frames)
        reconstruction_loss("l1", reconstruction, frames).backward()

    return run


def seconds(run: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Median time of a pass, after one that is not counted."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    run()
    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=["tiny"], choices=list(PRESETS))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--temporal", action="store_true", help="with the temporal decoder blocks")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--batch-size", type=int, default=4, help="clips")
    parser.add_argument("--frames", type=int, default=4, help="frames of a clip")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    device = torch.device(args.device)
    name = device_name(device)
    table = Table(
        title=f"AR-VAE forward + backward, {name}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    for column in ("preset", "pixels", "dtype", "mode", "ms", "frames/s", "ratio", "TFLOP/s", "MFU"):
        table.add_column(column, justify="right")
    for preset_name in args.presets:
        first: float | None = None
        for dtype in args.dtypes:
            for mode in args.modes:
                torch.manual_seed(0)
                config = preset(preset_name, temporal=args.temporal)
                with device:
                    model = ARVAE(config).to(DTYPES[dtype]).train()
                    frames = torch.rand(args.batch_size, args.frames, 3, config.image_size, config.image_size)
                model.set_activation_checkpointing(args.checkpointing)
                with FlopCounterMode(display=False) as counter:
                    training_pass(model, frames, compiled=False)()
                took = seconds(training_pass(model, frames, mode == "compiled"), device, args.repeats)
                first = first or took
                rate = counter.get_total_flops() / took
                peak = peak_flops(name, dtype)
                table.add_row(
                    preset_name,
                    str(config.image_size),
                    dtype,
                    mode,
                    f"{took * 1e3:.0f}",
                    f"{args.batch_size * args.frames / took:.1f}",
                    f"{first / took:.2f}",
                    f"{rate / 1e12:.3f}",
                    f"{rate / peak:.1%}" if peak else "n/a",
                )
    Console().print(table)


if __name__ == "__main__":
    main()
