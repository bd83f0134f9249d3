"""Clips, tokens and FLOPs per second, and MFU against a table of peaks; an unknown device has no MFU."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

PEAK_TFLOPS: dict[str, dict[str, float]] = {
    # Dense peaks of the vendors' data sheets, without sparsity. The first name that is a word of the device's name
    # counts; a laptop's chip and other variants of a name are other devices.
    "H200": {"bf16": 989.4, "fp16": 989.4, "fp32": 67.0},
    "H100 PCIe": {"bf16": 756.0, "fp16": 756.0, "fp32": 51.0},
    "H100 NVL": {"bf16": 835.0, "fp16": 835.0, "fp32": 60.0},
    "H100": {"bf16": 989.4, "fp16": 989.4, "fp32": 67.0},
    "GH200": {"bf16": 989.4, "fp16": 989.4, "fp32": 67.0},
    "B200": {"bf16": 2250.0, "fp16": 2250.0, "fp32": 80.0},
    "A100": {"bf16": 312.0, "fp16": 312.0, "fp32": 19.5},
    "A6000": {"bf16": 154.8, "fp16": 154.8, "fp32": 38.7},
    "L40S": {"bf16": 362.0, "fp16": 362.0, "fp32": 91.6},
    "RTX 5090": {"bf16": 209.5, "fp16": 209.5, "fp32": 104.8},
    "RTX 4090": {"bf16": 165.2, "fp16": 165.2, "fp32": 82.6},
    "RTX 3090": {"bf16": 71.0, "fp16": 71.0, "fp32": 35.6},
    "V100": {"fp16": 125.0, "fp32": 15.7},
    "T4": {"fp16": 65.0, "fp32": 8.1},
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense peak of one device in FLOP/s, or None when the table does not know it."""
    for name, peaks in PEAK_TFLOPS.items():
        if re.search(rf"\b{name}\b(?! *(?:Laptop|D|Ti|Super|Max-Q|Mobile)\b)", device_name, re.IGNORECASE):
            peak = peaks.get(precision)
            return None if peak is None else peak * 1e12
    return None


def device_name(device: torch.device) -> str:
    """Name of the device as its vendor gives it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


class Throughput:
    """Rates over a window of steps, for all ranks together.

    tokens_per_clip, flops_per_clip: by the number of frames of a clip; FLOPs of 0 mean that nobody has counted them.
    """

    def __init__(
        self,
        *,
        tokens_per_clip: Mapping[int, int],
        flops_per_clip: Mapping[int, float],
        world_size: int,
        peak: float | None,
    ) -> None:
        self.tokens_per_clip = tokens_per_clip
        self.flops_per_clip = flops_per_clip
        self.world_size = world_size
        self.peak = peak

    def rates(self, clips: Mapping[int, int], steps: int, seconds: float) -> dict[str, Any]:
        """Rates of `steps` optimiser steps in `seconds`; what cannot be known is None.

        clips: how many were trained in these steps over all ranks, by their number of frames.
        """
        passed = max(seconds, 1e-9)
        tokens = sum(count * self.tokens_per_clip[frames] for frames, count in clips.items())
        flops: float | None = None
        if all(self.flops_per_clip[frames] for frames in clips):
            flops = sum(count * self.flops_per_clip[frames] for frames, count in clips.items()) / passed
        mfu = None if flops is None or self.peak is None else flops / (self.peak * self.world_size)
        return {
            "step_seconds": seconds / max(steps, 1),
            "clips_per_second": sum(clips.values()) / passed,
            "tokens_per_second": tokens / passed,
            "tflops": None if flops is None else flops / 1e12,
            "mfu": mfu,
        }
