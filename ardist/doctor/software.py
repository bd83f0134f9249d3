"""Versions, devices, attention kernels, ffmpeg."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

import torch
from packaging.requirements import Requirement

from ardist.doctor.findings import Finding, bad, good, weak
from ardist.launch.local import count_gpus
from ardist.models.attention import AttentionLayout, attention, available_backends
from ardist.training.throughput import peak_flops

_NEEDED = ("torch", "deepspeed", "numpy", "safetensors", "pydantic", "boto3")
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def python_and_packages() -> Iterator[Finding]:
    """The interpreter, and every package that training needs in the version that was declared."""
    yield good("Python", f"{'.'.join(map(str, sys.version_info[:3]))}, {sys.executable}")
    wanted = {one.name: one for one in map(Requirement, requires("ardist") or []) if one.marker is None}
    for name in _NEEDED:
        requirement = wanted.get(name)
        try:
            has = version(name)
        except PackageNotFoundError:
            yield bad(name, "not installed", f"pip install '{requirement or name}'")
            continue
        if requirement is not None and not requirement.specifier.contains(has, prereleases=True):
            yield bad(name, f"{has}, but {requirement} is needed", f"pip install '{requirement}'")
        else:
            yield good(name, has)


def devices() -> Iterator[Finding]:
    """The GPUs: seen, usable, known, and with memory to spare."""
    if not count_gpus():
        why = "this torch is a CPU build" if torch.version.cuda is None else "no GPU is visible, or DS_ACCELERATOR=cpu"
        advice = "fine for a first look; for more install a CUDA build of torch and a driver (nvidia-smi must work)"
        yield weak("GPU", f"none: {why}", advice)
        return
    driver = _driver()
    yield good("GPU driver", f"{driver}, CUDA {torch.version.cuda} in torch")
    for index in range(count_gpus()):
        name = torch.cuda.get_device_name(index)
        free, total = torch.cuda.mem_get_info(index)
        x = torch.ones(256, 256, device=f"cuda:{index}")
        right = float((x @ x).sum()) == 256.0**3
        detail = f"{name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
        if not right:
            yield bad(f"GPU {index}", f"{name} multiplies wrongly", "take this device out and test it")
        elif free < 0.8 * total:
            yield weak(f"GPU {index}", detail, "another process holds memory: nvidia-smi names it")
        elif peak_flops(name, "bf16") is None:
            yield weak(f"GPU {index}", detail, "its peak is not in the table: MFU will be n/a")
        else:
            yield good(f"GPU {index}", detail)


def _driver() -> str:
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(words[0]) is None:
        return "driver version unknown (no nvidia-smi)"
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.split("\n")[0].strip() or "driver version unknown"


def attention_backends(head_dim: int = 64) -> Iterator[Finding]:
    """Every backend runs once, forward and backward where it has one, and is compared with the reference."""
    device, dtype = ("cuda", torch.bfloat16) if count_gpus() else ("cpu", torch.float32)
    layout = AttentionLayout.training(3, 4, 0)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, layout.num_queries, head_dim, generator=generator).to(device, dtype) for _ in range(3))
    expected = attention(q.float(), k.float(), v.float(), layout, backend="reference")
    for name, problem in available_backends(device, dtype, head_dim, requires_grad=True).items():
        subject = f"attention {name}"
        if problem is not None:
            yield weak(subject, f"not usable in training: {problem}", "none, unless a configuration asks for it")
            continue
        if "/" in name:
            yield good(subject, "usable by its backend")
            continue
        inputs = [tensor.detach().clone().requires_grad_() for tensor in (q, k, v)]
        began = time.perf_counter()
        try:
            result = attention(inputs[0], inputs[1], inputs[2], layout, backend=name)
            result.sum().backward()
        except (RuntimeError, ImportError, NotImplementedError) as error:
            yield bad(subject, f"fails when run: {error}", "choose another denoiser.attention_backend")
            continue
        worst = float((result.detach().float() - expected).abs().max())
        if worst > _TOLERANCE[dtype]:
            yield bad(
                subject, f"differs from the reference by {worst:.2g}", "choose another denoiser.attention_backend"
            )
        else:
            yield good(subject, f"runs on {device}, {time.perf_counter() - began:.2g} s, differs by {worst:.1g}")


def ffmpeg() -> Iterator[Finding]:
    """A binary that can write the videos of samples and read those of data sets."""
    from ardist.media import ffmpeg_binary

    path = ffmpeg_binary()
    done = subprocess.run([path, "-hide_banner", "-encoders"], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        yield bad("ffmpeg", f"{path} does not run", "apt-get install ffmpeg, or pip install imageio-ffmpeg")
    elif "libx264" not in done.stdout:
        yield bad("ffmpeg", f"{path} has no libx264", "use imageio-ffmpeg's binary: remove the other from PATH")
    else:
        yield good("ffmpeg", path)
