"""Memory of the devices whose peak rates are known."""

from __future__ import annotations

from ardist.errors import choose
from ardist.training.throughput import PEAK_TFLOPS

MEMORY_GB: dict[str, float] = {
    # As the vendors' data sheets give it, in 10^9 bytes.
    "H200": 141, "H100 PCIe": 80, "H100 NVL": 94, "H100": 80, "GH200": 96, "B200": 180, "A100": 80, "A6000": 48,
    "L40S": 48, "RTX 5090": 32, "RTX 4090": 24, "RTX 3090": 24, "V100": 32, "T4": 16,
}  # fmt: skip


CPU = "CPU"
"""Processes of this machine, whose peak rate nobody knows."""


def find_device(name: str) -> str:
    """The table's name of a device, however it is written; `InvalidValueError` lists the known ones."""
    known = {_plain(one): one for one in (*PEAK_TFLOPS, CPU)}
    return known[choose("device", _plain(name), known)]


def _plain(name: str) -> str:
    return name.lower().replace(" ", "-").replace("_", "-")
