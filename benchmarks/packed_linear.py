"""Linear layers of a denoiser's block as they are, and packed as the sampler runs them on a CPU.

    python benchmarks/packed_linear.py [--preset small] [--threads 2] [--repeats 15]

Milliseconds for the linear layers of all blocks, without the modulation, on so many rows: a frame of 32 tokens has 32,
a whole window of 16 frames 512. Both take turns; the table holds medians, and the median of the ratios of the turns.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
from collections.abc import Callable

import torch
from clocks import add_clock, chosen_clock
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ardist.models.denoiser import Denoiser, preset
from ardist.models.packed_linear import PackedLinear, can_pack, pack_linears

ROWS = (32, 64, 128, 256, 512)


def layers_of(denoiser: Denoiser) -> list[nn.Module]:
    """What a row of the sampler's schedule runs."""
    children = (child for block in denoiser.blocks for child in block.named_children())
    return [layer for name, layer in children if name != "modulation" and isinstance(layer, (nn.Linear, PackedLinear))]


def timed(layers: list[nn.Module], inputs: list[Tensor], clock: Callable[[], float]) -> float:
    """Seconds of one pass through all layers."""
    began = clock()
    for layer, x in zip(layers, inputs, strict=True):
        layer(x)
    return clock() - began


@torch.inference_mode()
def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=15)
    add_clock(parser)
    options = parser.parse_args()
    clock = chosen_clock(options)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    plain = Denoiser(preset(options.preset)).eval()
    if not can_pack(plain.input.weight):
        raise SystemExit("this build of PyTorch has no kernel for packed weights")
    packed = copy.deepcopy(plain)
    for block in packed.blocks:
        pack_linears(block, keep=("modulation",))
    pairs = layers_of(plain), layers_of(packed)
    widths = [layer.in_features for layer in pairs[0] if isinstance(layer, nn.Linear)]
    title = (
        f"{options.preset}, {len(widths)} layers, fp32, {platform.machine()}, {options.threads} threads, "
        f"{options.clock} time, torch {torch.__version__}"
    )
    table = Table("rows", "plain ms", "packed ms", "plain / packed")
    for rows in ROWS:
        inputs = [torch.randn(1, rows, width) for width in widths]
        # The first two turns find the kernels.
        turns = [tuple(timed(layers, inputs, clock) for layers in pairs) for _ in range(options.repeats + 2)][2:]
        first, second = (1000 * statistics.median(turn[k] for turn in turns) for k in range(2))
        ratio = statistics.median(a / b for a, b in turns)
        table.add_row(str(rows), f"{first:.1f}", f"{second:.1f}", f"{ratio:.2f}x")
    Console(width=120).print(title, table, sep="\n")


if __name__ == "__main__":
    main()
