"""Losses of the autoencoder: their scale, the perceptual distance against a plain computation, the discriminator."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from ardist.config.ar_vae import ARVAELossConfig
from ardist.errors import CheckpointError, InvalidValueError
from ardist.models.ar_vae import ARVAE, Posterior, preset
from ardist.models.ar_vae.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_hinge_loss,
    generator_hinge_loss,
)
from ardist.models.ar_vae.losses import AutoencoderLoss, reconstruction_loss
from ardist.models.ar_vae.perceptual import LPIPS, digest_file
from ardist.models.ar_vae.perceptual_files import convert
from ardist.models.ar_vae.pixel_decoder import last_layer_gradient

CONVOLUTIONS = {
    0: 64,
    2: 64,
    5: 128,
    7: 128,
    10: 256,
    12: 256,
    14: 256,
    17: 512,
    19: 512,
    21: 512,
    24: 512,
    26: 512,
    28: 512,
}
"""Published index of every VGG16 convolution, and its output channels."""
POOLINGS = (4, 9, 16, 23, 30)
TAPS = (3, 8, 15, 22, 29)


def frames(seed: int, size: int = 32) -> Tensor:
    return torch.rand(1, 2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def posterior(mean: float = 0.0) -> Posterior:
    return Posterior(torch.full((1, 2, 6, 4), mean), torch.zeros(1, 2, 6, 4))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Files in the published layout with random values: the arguments of `LPIPS.load`, and all tensors."""
    generator = torch.Generator().manual_seed(0)
    vgg, before = {"classifier.0.weight": torch.zeros(2, 2)}, 3
    for index, after in CONVOLUTIONS.items():
        scale = (2 / (9 * before)) ** 0.5
        vgg[f"features.{index}.weight"] = torch.randn(after, before, 3, 3, generator=generator) * scale
        vgg[f"features.{index}.bias"] = torch.randn(after, generator=generator) * 0.1
        before = after
    heads = {
        f"lin{i}.model.1.weight": torch.rand(1, channels, 1, 1, generator=generator)
        for i, channels in enumerate((64, 128, 256, 512, 512))
    }
    folder = tmp_path_factory.mktemp("published")
    arguments = {}
    for name, tensors in (("vgg", vgg), ("lpips", heads)):
        path = folder / f"{name}.safetensors"
        save_file(tensors, path)
        arguments[f"{name}_path"] = str(path)
        arguments[f"{name}_digest"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return arguments, {**vgg, **heads}


def plain_lpips(first: Tensor, second: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """LPIPS layer by layer in the published numbering, in float64."""

    def taps(x: Tensor) -> list[Tensor]:
        x = (x.double() - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor(
            [0.458, 0.448, 0.450]
        ).view(3, 1, 1)
        found = []
        for index in range(30):
            if index in CONVOLUTIONS:
                weight, bias = (tensors[f"features.{index}.{part}"].double() for part in ("weight", "bias"))
                x = F.conv2d(x, weight, bias, padding=1)
            elif index in POOLINGS:
                x = F.max_pool2d(x, 2)
            else:
                x = x.clamp(min=0)
            if index in TAPS:
                found.append(x / x.square().sum(dim=1, keepdim=True).sqrt().clamp(min=1e-10))
        return found

    total = torch.zeros(len(first), dtype=torch.float64)
    for i, (one, other) in enumerate(zip(taps(first), taps(second), strict=True)):
        weights = tensors[f"lin{i}.model.1.weight"].double().view(1, -1, 1, 1)
        total += (weights * (one - other) ** 2).sum(dim=1).mean(dim=(1, 2))
    return total


def test_reconstruction_is_a_mean_in_any_size() -> None:
    for size in (16, 32):
        target = torch.zeros(2, 3, 3, size, size)
        assert reconstruction_loss("l1", target + 0.5, target) == pytest.approx(0.5)
        assert reconstruction_loss("l2", target + 0.5, target) == pytest.approx(0.25)
    with pytest.raises(InvalidValueError, match="legal: l1, l2"):
        reconstruction_loss("l3", target, target)


def test_sum_of_the_terms() -> None:
    loss = AutoencoderLoss(ARVAELossConfig(kl_weight=0.1))
    total, terms = loss(frames(0) * 0 + 0.25, frames(0) * 0, posterior(2.0))
    assert terms.keys() == {"l1", "kl"}
    assert terms["kl"] == pytest.approx(2.0)
    assert total == pytest.approx(0.25 + 0.1 * 2.0)


def test_flicker_is_what_changes_in_the_error() -> None:
    loss = AutoencoderLoss(ARVAELossConfig(flicker_weight=2.0))
    clip = frames(0) * 0.5
    still, plain = loss(clip + 0.25, clip, posterior())[1], AutoencoderLoss(ARVAELossConfig())
    assert still["flicker"] == pytest.approx(0.0, abs=1e-6)
    error = torch.tensor([0.1, 0.3]).view(1, 2, 1, 1, 1)
    value, terms = loss(clip + error, clip, posterior())
    assert terms["flicker"] == pytest.approx(0.2, abs=1e-6)
    assert value == pytest.approx(0.2 + 2.0 * 0.2, abs=1e-6)
    assert "flicker" not in plain(clip, clip, posterior())[1]
    assert "flicker" not in loss(clip[:, :1], clip[:, :1], posterior())[1]


def test_kl_without_weight_is_only_watched() -> None:
    mean = torch.full((1, 2, 6, 4), 1e30, requires_grad=True)  # its square overflows, and 0 * inf is no number
    total, terms = AutoencoderLoss(ARVAELossConfig())(frames(0), frames(1), Posterior(mean, torch.zeros_like(mean)))
    assert torch.isinf(terms["kl"])
    assert torch.isfinite(total)
    assert not total.requires_grad


def test_lpips_agrees_with_a_plain_computation(published: tuple[dict[str, str], dict[str, Tensor]]) -> None:
    arguments, tensors = published
    model = LPIPS.load(**arguments)
    first, second = (frames(seed)[0] * 2 - 1 for seed in (1, 2))
    expected = plain_lpips(first, second, tensors)
    torch.testing.assert_close(model(first, second).double(), expected, rtol=1e-4, atol=1e-6)
    assert (model(first, first) == 0).all()
    assert (expected > 0.01).all()


def test_lpips_is_frozen_and_moves_the_image(published: tuple[dict[str, str], dict[str, Tensor]]) -> None:
    loss = AutoencoderLoss(ARVAELossConfig(perceptual="lpips", perceptual_weight=0.5, **published[0])).train()
    assert not list(filter(lambda p: p.requires_grad, loss.parameters()))
    assert loss.lpips is not None
    assert not loss.lpips.training
    reconstruction = frames(1).requires_grad_()
    total, terms = loss(reconstruction, frames(2), posterior())
    total.backward()
    assert reconstruction.grad is not None
    assert reconstruction.grad.abs().min(dim=-1).values.max() > 0
    assert total.item() == pytest.approx(float(terms["l1"] + 0.5 * terms["lpips"]))
    # The network sees [-1, 1]: frames in [0, 1] are mapped.
    shown = [part[0] * 2 - 1 for part in (frames(1), frames(2))]
    assert terms["lpips"] == pytest.approx(float(plain_lpips(*shown, published[1]).mean()), rel=1e-4)
    with pytest.raises(InvalidValueError, match="at least 16x16"):
        loss(frames(1, 8), frames(2, 8), posterior())


def test_lpips_weights_are_checked(published: tuple[dict[str, str], dict[str, Tensor]], tmp_path: Path) -> None:
    arguments, _ = published
    with pytest.raises(CheckpointError, match=r"absent.*No such file.*convert the published.*perceptual: none"):
        LPIPS.load(**{**arguments, "vgg_path": str(tmp_path / "absent.safetensors")})
    with pytest.raises(CheckpointError, match=r"has sha256 .* expected 0{64}"):
        LPIPS.load(**{**arguments, "lpips_digest": "0" * 64})
    swapped = {**arguments, "vgg_path": arguments["lpips_path"], "vgg_digest": arguments["lpips_digest"]}
    with pytest.raises(CheckpointError, match=r"no tensor 'features.0.weight'"):
        LPIPS.load(**swapped)
    other = tmp_path / "other.safetensors"
    save_file({f"lin{i}.model.1.weight": torch.zeros(1, 3, 1, 1) for i in range(5)}, other)
    digest = hashlib.sha256(other.read_bytes()).hexdigest()
    with pytest.raises(CheckpointError, match=r"expected \(1, 64, 1, 1\)"):
        LPIPS.load(**{**arguments, "lpips_path": str(other), "lpips_digest": digest})
    other.write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="no readable safetensors"):
        LPIPS.load(**{**arguments, "lpips_path": str(other), "lpips_digest": hashlib.sha256(b"no tensors").hexdigest()})
    with pytest.raises(ValidationError, match="needs vgg_path, lpips_path; or choose"):
        ARVAELossConfig(perceptual="lpips")


def test_published_files_are_converted_and_their_digests_kept(
    published: tuple[dict[str, str], dict[str, Tensor]], tmp_path: Path
) -> None:
    arguments, tensors = published
    vgg = {name: value for name, value in tensors.items() if not name.startswith("lin")}
    heads = {name: value for name, value in tensors.items() if name.startswith("lin")}
    torch.save(vgg, tmp_path / "vgg.pth")
    torch.save(heads, tmp_path / "heads.pth")
    made = convert(tmp_path / "vgg.pth", tmp_path / "heads.pth", tmp_path / "out")
    loss = AutoencoderLoss(ARVAELossConfig(perceptual="lpips", vgg_path=str(made[0]), lpips_path=str(made[1])))
    assert loss.lpips is not None
    first, second = (frames(seed)[0] * 2 - 1 for seed in (1, 2))
    torch.testing.assert_close(loss.lpips(first, second), LPIPS.load(**arguments)(first, second))
    damaged = bytearray(made[0].read_bytes())
    damaged[-1] ^= 1
    made[0].write_bytes(damaged)
    with pytest.raises(CheckpointError, match="another or a damaged file"):
        LPIPS.load(made[0], None, made[1], None)
    digest_file(made[0]).unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*vgg16.safetensors.sha256.*perceptual_files"):
        LPIPS.load(made[0], None, made[1], None)
    with pytest.raises(CheckpointError, match="holds no tensor features"):
        convert(tmp_path / "heads.pth", tmp_path / "heads.pth", tmp_path / "out")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(CheckpointError, match=r"cannot read the weights .*text.pth"):
        convert(tmp_path / "text.pth", tmp_path / "heads.pth", tmp_path / "out")


def test_discriminator_shape_and_size() -> None:
    model = PatchDiscriminator()
    assert model(torch.rand(1, 2, 3, 64, 64)).shape == (2, 1, 6, 6)
    # 3 x 64, 64 x 128, 128 x 256, 256 x 512 and 512 x 1 kernels of 4x4, two biases, three affine norms.
    kernels = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512)
    assert sum(p.numel() for p in model.parameters()) == kernels + 64 + 1 + 2 * (128 + 256 + 512)


def test_discriminator_judges_each_frame_alone() -> None:
    model = PatchDiscriminator(channels=8)
    clip = frames(0, 64)
    together = model(clip)
    alone = torch.cat([model(clip[:, i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, alone)


def test_hinge_losses() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert discriminator_hinge_loss(real, fake) == pytest.approx(0.5 * (0.25 + 1.0))
    assert generator_hinge_loss(fake) == pytest.approx(1.0)


def test_adaptive_weight_balances_the_pulls() -> None:
    strong, weak = torch.tensor([30.0, 40.0]), torch.tensor([6.0, 8.0])
    assert adaptive_weight(strong, weak) == pytest.approx(5.0, rel=1e-3)
    assert adaptive_weight(strong * 1e9, weak) == 1e4
    assert adaptive_weight(strong, weak * 0.0) == 1e4
    assert adaptive_weight(strong * 0.0, weak * 0.0) == 0.0


def test_last_layer_gradient_is_that_of_autograd() -> None:
    torch.manual_seed(0)
    model = ARVAE(preset("tiny", width=32, depth=1, num_heads=2))
    reconstruction, _, features = model(frames(0, 64))
    loss = (reconstruction**2).mean()
    gradient, expected = torch.autograd.grad(loss, [reconstruction, model.pixel_decoder.conv_out.weight])
    torch.testing.assert_close(last_layer_gradient(features, gradient), expected)
