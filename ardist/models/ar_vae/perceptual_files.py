"""The published weights of the perceptual loss as safetensors with a digest beside each file.

    python -m ardist.models.ar_vae.perceptual_files VGG16.pth LPIPS_VGG.pth OUT

VGG16.pth: the ImageNet state dict of torchvision's ``vgg16``; LPIPS_VGG.pth: the linear heads of LPIPS v0.1 for VGG,
``weights/v0.1/vgg.pth`` of that project. Both are read without running any code in them.
"""

from __future__ import annotations

import argparse
import pickle
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ardist.errors import ArdistError, CheckpointError
from ardist.models.ar_vae.perceptual import LPIPS, digest_file
from ardist.models.weights import weights_digest

VGG_FILE, LPIPS_FILE = "vgg16.safetensors", "lpips_vgg.safetensors"


def convert(vgg: Path, heads: Path, out: Path) -> tuple[Path, Path]:
    """Write both files and their digests into `out`, then load them as training will; returns the two paths."""
    out.mkdir(parents=True, exist_ok=True)
    made = []
    for source, name, prefix in ((vgg, VGG_FILE, "features."), (heads, LPIPS_FILE, "lin")):
        kept = {key: value.float().contiguous() for key, value in _read(source).items() if key.startswith(prefix)}
        if not kept:
            raise CheckpointError(f"{str(source)!r} holds no tensor {prefix}…: it is not the published file")
        path = out / name
        save_file(kept, path)
        digest_file(path).write_text(f"{weights_digest(path)}  {name}\n", encoding="utf-8")
        made.append(path)
    LPIPS.load(made[0], None, made[1], None)
    return made[0], made[1]


def _read(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"cannot read the weights {str(path)!r}: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{str(path)!r} is no state dict of tensors")
    return content


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m ardist.models.ar_vae.perceptual_files", description=__doc__)
    parser.add_argument("vgg", type=Path, help="state dict of torchvision's vgg16, .pth")
    parser.add_argument("heads", type=Path, help="linear heads of LPIPS v0.1 for VGG, .pth")
    parser.add_argument("out", type=Path, help="folder for the two safetensors files and their digests")
    given = parser.parse_args()
    try:
        paths = convert(given.vgg, given.heads, given.out)
    except ArdistError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print("\n".join(f"{path}  {weights_digest(path)}" for path in paths))
    return 0


if __name__ == "__main__":
    sys.exit(main())
