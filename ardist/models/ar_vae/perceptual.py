"""LPIPS on VGG16 features, built here and filled from published weights on disk.

Method: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (2018), version 0.1,
VGG. The weights are not part of this package: `ardist.models.ar_vae.perceptual_files` converts the published ``vgg16``
(ImageNet) state dict and the LPIPS linear heads to safetensors once. Give their paths in the configuration; the sha256
of each is given there too, or stands in a file ``….safetensors.sha256`` beside it, as sha256sum writes it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ardist.errors import CheckpointError, InvalidValueError

BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""Channels and convolutions of each VGG16 block; a block ends where LPIPS looks, pooling comes before the next."""

CENTRE = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
"""LPIPS' own normalisation of inputs in [-1, 1]."""

SMALLEST = 16
"""Pixels a side; less is nothing after four poolings."""

ADVICE = (
    "convert the published VGG16 and LPIPS (v0.1, vgg) weights with python -m ardist.models.ar_vae.perceptual_files "
    "and set ar_vae_loss.vgg_path and lpips_path, or train with perceptual: none"
)


class LPIPS(nn.Module):
    """Perceptual distance of images; frozen, differentiable with respect to the images."""

    centre: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        channels_in, blocks = 3, []
        for channels, count in BLOCKS:
            blocks.append(
                nn.ModuleList(
                    nn.Conv2d(channels_in if i == 0 else channels, channels, 3, padding=1) for i in range(count)
                )
            )
            channels_in = channels
        self.blocks = nn.ModuleList(blocks)
        self.heads = nn.ModuleList(nn.Conv2d(channels, 1, 1, bias=False) for channels, _ in BLOCKS)
        self.register_buffer("centre", torch.tensor(CENTRE).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @classmethod
    def load(
        cls, vgg_path: Path | str, vgg_digest: str | None, lpips_path: Path | str, lpips_digest: str | None
    ) -> LPIPS:
        """Build from two safetensors files; raises `CheckpointError` for missing, other or damaged ones.

        Without a digest that of the ``.sha256`` file beside the weights is taken.
        """
        vgg, heads = _read(Path(vgg_path), vgg_digest), _read(Path(lpips_path), lpips_digest)
        with torch.device("meta"):
            model = cls()
        state: dict[str, Tensor] = {}
        index = 0  # counts convolutions, activations and poolings, as the published key names do
        for b, (_, count) in enumerate(BLOCKS):
            for i in range(count):
                for part in ("weight", "bias"):
                    state[f"blocks.{b}.{i}.{part}"] = _take(vgg, f"features.{index}.{part}", vgg_path)
                index += 2
            index += 1
            state[f"heads.{b}.weight"] = _take(heads, f"lin{b}.model.1.weight", lpips_path)
        for name, parameter in model.named_parameters():
            if state[name].shape != parameter.shape:
                shapes = f"{tuple(state[name].shape)}, expected {tuple(parameter.shape)}"
                raise CheckpointError(f"perceptual weights: {name} is {shapes}; {ADVICE}")
        model.load_state_dict(state, assign=True)
        for name, values in (("centre", CENTRE), ("scale", SCALE)):  # not in any file, so still without storage
            setattr(model, name, torch.tensor(values).view(1, 3, 1, 1))
        return model.requires_grad_(False)

    def train(self, mode: bool = True) -> LPIPS:
        """Stays in evaluation mode."""
        return super().train(False)

    def features(self, images: Float[Tensor, "n 3 h w"]) -> list[Tensor]:
        """Unit-length feature vectors at every place after each VGG block, for images in [-1, 1]."""
        x = (images - self.centre) / self.scale
        found = []
        for i, block in enumerate(self.blocks):
            if i:
                x = F.max_pool2d(x, 2)
            assert isinstance(block, nn.ModuleList)
            for conv in block:
                x = F.relu(conv(x))
            found.append(F.normalize(x, dim=1, eps=1e-10))
        return found

    def forward(self, first: Float[Tensor, "n 3 h w"], second: Float[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
        """Distance of each pair of images in [-1, 1]; 0 for equal ones."""
        if min(first.shape[-2:]) < SMALLEST:
            raise InvalidValueError(
                f"LPIPS needs frames of at least {SMALLEST}x{SMALLEST} pixels, these are {tuple(first.shape[-2:])}"
            )
        dtype = self.centre.dtype
        distance = torch.zeros(len(first), device=first.device, dtype=dtype)
        pairs = zip(self.features(first.to(dtype)), self.features(second.to(dtype)), strict=True)
        for head, (one, other) in zip(self.heads, pairs, strict=True):
            distance = distance + head((one - other).square()).mean(dim=(1, 2, 3))
        return distance


def digest_file(path: Path) -> Path:
    """Where the sha256 of a weights file stands, in the form of sha256sum."""
    return path.with_name(f"{path.name}.sha256")


def _read(path: Path, digest: str | None) -> dict[str, Tensor]:
    path = path.expanduser()
    try:
        if digest is None:
            digest = (digest_file(path).read_text(encoding="utf-8").split() or [""])[0]
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        name = error.filename or str(path)
        raise CheckpointError(f"no perceptual weights: cannot read {str(name)!r}: {error.strerror}; {ADVICE}") from None
    if found != digest:
        raise CheckpointError(
            f"{str(path)!r} has sha256 {found}, expected {digest}: another or a damaged file; {ADVICE}"
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{str(path)!r} is no readable safetensors file ({error}); {ADVICE}") from None


def _take(tensors: dict[str, Tensor], name: str, path: Path | str) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"{str(path)!r} has no tensor {name!r}; {ADVICE}")
    return tensors[name].float()
