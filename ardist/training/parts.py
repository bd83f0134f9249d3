"""One rank's part of a checkpoint: a safetensors file of flat fp32 stretches with an index of named fragments.

Tensors are one-dimensional, one per kind of state (``master``, ``exp_avg``, ``exp_avg_sq``, ``ema_<decay>``), all laid
out alike; the header's metadata holds ``fragments``, a JSON list of [parameter name, start in the flattened parameter,
length, offset in the stretch]. Any safetensors reader opens the file.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ardist import fault
from ardist.errors import CheckpointError

_PIECE = 16 * 2**20
EXTRA_FILE = "module.safetensors"


def part_name(rank: int, world_size: int) -> str:
    """File name of rank `rank`'s part."""
    return f"part-{rank:05d}-of-{world_size:05d}.safetensors"


def holds_fragments(file: str) -> bool:
    """True for a rank's part; the other files of a checkpoint hold whole tensors."""
    return file.startswith("part-")


def write_part(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> tuple[int, str]:
    """Write CPU tensors as a safetensors file, durably; returns (bytes, sha256).

    Written in large unbuffered pieces straight from the tensors' memory and hashed on the way: no second copy, and
    the interpreter's lock is free meanwhile, so that training goes on.
    """
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.bool: "BOOL"}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    total = 0
    with open(path, "wb", buffering=0) as file:

        def put(data: bytes | memoryview) -> None:
            nonlocal total
            while data:
                written = file.write(data[:_PIECE])
                digest.update(data[:written])
                total += written
                data = data[written:]

        put(struct.pack("<Q", len(text)) + text)
        for number, tensor in enumerate(tensors.values()):
            if number == 1:
                fault.point("checkpoint.half_part")
            values: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
            put(memoryview(values))
        os.fsync(file.fileno())
    return total, digest.hexdigest()


def ema_kind(decay: float) -> str:
    """Name of an EMA's state in the parts; two decays never share one."""
    return f"ema_{decay_text(decay)}"


def decay_text(decay: float) -> str:
    """A decay in words that read back as the same number: short where that is exact, as for 0.9999."""
    short = f"{decay:g}"
    return short if float(short) == decay else repr(decay)


def hash_file(path: Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class PartsReader:
    """Reads any stretch of any parameter from the parts of one checkpoint, whatever layout wrote them.

    `shapes` are the parameters' shapes. Raises `CheckpointError` when the parts do not tile every parameter exactly.
    """

    def __init__(self, directory: Path, files: Iterable[str], shapes: Mapping[str, list[int]]) -> None:
        self.directory = directory
        self.shapes = {name: list(shape) for name, shape in shapes.items()}
        self._open: dict[str, Any] = {}
        self._pieces: dict[str, list[tuple[int, int, str, int]]] = {name: [] for name in self.shapes}
        self.kinds: set[str] = set()
        for file in files:
            handle = self._handle(file)
            self.kinds |= set(handle.keys())
            for name, start, length, offset in json.loads((handle.metadata() or {}).get("fragments", "[]")):
                if name not in self._pieces:
                    raise CheckpointError(
                        f"{directory}: part {file} holds a parameter {name!r} the commit does not list"
                    )
                self._pieces[name].append((start, length, file, offset))
        for name, pieces in self._pieces.items():
            pieces.sort()
            position = 0
            for start, length, _, _ in pieces:
                if start != position:
                    break
                position += length
            if position != math.prod(self.shapes[name]):
                raise CheckpointError(f"{directory}: parameter {name!r} is not complete over the parts")

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(self.directory / file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.directory / file} cannot be read: {error}") from error
        return self._open[file]

    def read_into(self, kind: str, name: str, start: int, destination: torch.Tensor) -> None:
        """Copy elements [start, start + n) of parameter `name` into a flat tensor of n elements."""
        pieces = self._pieces[name]
        position, end = start, start + destination.numel()
        index = bisect.bisect_right(pieces, position, key=lambda piece: piece[0]) - 1
        while position < end:
            piece_start, length, file, offset = pieces[index]
            last = min(end, piece_start + length)
            values = self._handle(file).get_slice(kind)[offset + position - piece_start : offset + last - piece_start]
            destination.narrow(0, position - start, last - position).copy_(values)
            position, index = last, index + 1

    def full(self, kind: str, name: str) -> torch.Tensor:
        """The whole parameter of one kind of state, fp32, in its shape."""
        shape = self.shapes[name]
        flat = torch.empty(math.prod(shape), dtype=torch.float32)
        self.read_into(kind, name, 0, flat)
        return flat.view(shape)
