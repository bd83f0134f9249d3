"""AR-VAE: the published sizes, latents on the unit sphere, any size and length, gradients, clear refusals."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from ardist.config.ar_vae import PRESETS
from ardist.errors import InvalidValueError
from ardist.models.ar_vae import ARVAE, ARVAEConfig, Posterior, preset
from ardist.models.ar_vae.pixel_decoder import group_norm

SMALLER = {"width": 32, "depth": 2, "num_heads": 2, "tokens_per_frame": 6}


def small_model(seed: int = 0, **changes: object) -> ARVAE:
    torch.manual_seed(seed)
    return ARVAE(preset("tiny", **{**SMALLER, **changes})).eval()


@pytest.mark.parametrize(("temporal", "millions"), [(False, 641.0), (True, 842.7)])
def test_full_size_has_the_published_number_of_parameters(temporal: bool, millions: float) -> None:
    with torch.device("meta"):
        model = ARVAE(preset("full", temporal=temporal))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=1e-3)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_consistent_and_reach_pixels(name: str) -> None:
    config = preset(name)
    with torch.device("meta"):
        model = ARVAE(config)
        frames, posterior, _ = model(torch.zeros(1, 2, 3, config.image_size, config.image_size))
    assert frames.shape == (1, 2, 3, config.image_size, config.image_size)
    assert posterior.mean.shape == (1, 2, config.tokens_per_frame, config.latent_channels)


def test_the_default_configuration_is_tiny() -> None:
    assert ARVAEConfig() == preset("tiny") == ARVAEConfig.model_validate({"preset": "tiny"})


def test_latents_are_unit_length_and_frames_in_range() -> None:
    model = small_model()
    frames = torch.rand(2, 3, 3, 64, 64)
    latents = model.encode(frames)
    torch.testing.assert_close(latents.norm(dim=-1), torch.ones(2, 3, 6))
    decoded = model.decode(latents * 7.0)  # any length: the decoder normalises
    assert decoded.shape == frames.shape
    assert decoded.min() >= 0
    assert decoded.max() <= 1
    torch.testing.assert_close(decoded, model.decode(latents))


def test_the_encoder_knows_no_time() -> None:
    model = small_model(temporal=True)
    frames = torch.rand(1, 4, 3, 64, 64)
    together = model.encode(frames)
    alone = torch.cat([model.encode(frame) for frame in frames.split(1, dim=1)], dim=1)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_sampling_uses_the_predicted_variance() -> None:
    model = small_model()
    frames = torch.rand(1, 2, 3, 64, 64)
    draws = [model.encode(frames, sample=True, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    mean, logvar = torch.tensor([[[[3.0, 4.0]]]]), torch.tensor([[[[0.0, 2.0]]]])
    sampled = Posterior(mean, logvar).sample(torch.tensor([[[[1.0, 1.0]]]]))
    expected = torch.tensor([4.0, 4.0 + torch.e])
    torch.testing.assert_close(sampled[0, 0, 0], expected / expected.norm())


def test_kl_is_the_mean_divergence_from_the_standard_normal() -> None:
    mean, logvar = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    own = torch.distributions.Normal(mean, torch.exp(0.5 * logvar))
    standard = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    torch.testing.assert_close(Posterior(mean, logvar).kl(), torch.distributions.kl_divergence(own, standard).mean())


def test_log_variance_is_clamped() -> None:
    model = small_model()
    with torch.no_grad():
        model.encoder.moments.bias[4:] = torch.tensor([-100.0, 100.0, -100.0, 100.0])
    logvar = model.posterior(torch.rand(1, 1, 3, 64, 64)).logvar
    assert logvar.min() == -30.0
    assert logvar.max() == 20.0


@pytest.mark.parametrize("size", [(64, 64), (32, 32), (40, 96)])
@pytest.mark.parametrize("temporal", [False, True])
def test_any_size_that_is_a_multiple_of_the_patch(size: tuple[int, int], temporal: bool) -> None:
    model = small_model(temporal=temporal)
    frames = torch.rand(1, 2, 3, *size)
    assert model(frames)[0].shape == frames.shape
    assert model.decode(model.encode(frames), size=size).shape == frames.shape


def test_resampled_positions_keep_their_place() -> None:
    from ardist.models.ar_vae.transformer import grid_positions

    rows = torch.arange(4.0)[:, None].expand(4, 4).reshape(16, 1)
    finer = grid_positions(rows, (4, 4), (8, 8)).reshape(8, 8)
    assert torch.equal(finer[:, 0], finer[:, 7])  # still a function of the row alone
    assert (finer[1:, 0] > finer[:-1, 0]).all()
    assert finer.mean() == pytest.approx(1.5, abs=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_gets_a_gradient(checkpointing: bool) -> None:
    model = small_model(temporal=True).train()
    model.set_activation_checkpointing(checkpointing)
    for parameter in model.temporal_parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    frames = torch.rand(2, 3, 3, 64, 64)
    reconstruction, posterior, _ = model(frames, torch.randn(2, 3, 6, 4))
    ((reconstruction - frames).abs().mean() + posterior.kl()).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A key's bias moves all scores of a query alike, so softmax does not see it.
    assert [name for name in silent if not name.endswith("coarse.key.bias")] == []


def test_activation_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for enabled in (False, True):
        model = small_model(temporal=True).train()
        model.set_activation_checkpointing(enabled)
        model(torch.ones(1, 3, 3, 64, 64) * 0.3)[0].square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_bfloat16_model_takes_and_gives_float32() -> None:
    model = small_model(temporal=True).bfloat16()
    frames = torch.rand(1, 3, 3, 64, 64)
    latents = model.encode(frames)
    assert latents.dtype == torch.float32
    decoded = model.decode(latents)
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, small_model(temporal=True).decode(latents), atol=0.05, rtol=0)


@torch.no_grad()
def test_a_new_model_already_tells_images_apart() -> None:
    """What makes training leave the mean image quickly: at the start images differ in latents and in the output."""
    torch.manual_seed(0)
    model = ARVAE(preset("tiny")).eval()
    frames = torch.nn.functional.interpolate(torch.rand(16, 3, 4, 4), size=64, mode="bilinear")[:, None]
    reconstruction, posterior, _ = model(frames)
    latents = posterior.mode()
    assert latents.var(dim=0).mean() / latents.square().mean() > 0.1
    assert reconstruction.var(dim=0).mean().sqrt() > 5e-3
    assert (reconstruction.mean() - 0.5).abs() < 0.15
    # And a latent token tells of the patches near its place: a change in one corner moves few of them.
    frames[:, :, :, :16, :16] = 1.0 - frames[:, :, :, :16, :16]
    moved = (model.encode(frames) - latents).square().mean(dim=(0, 1, 3)).sort(descending=True).values
    assert moved[:8].sum() > 0.7 * moved.sum()


def test_thin_group_norms_keep_groups_of_four_channels() -> None:
    assert [group_norm(channels).num_groups for channels in (8, 16, 24, 48, 128, 512)] == [2, 4, 6, 12, 32, 32]


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        (torch.zeros(1, 2, 4, 64, 64), "expected \\[batch, frames, 3"),
        (torch.zeros(2, 3, 64, 64), "expected \\[batch, frames, 3"),
        (torch.zeros(1, 0, 3, 64, 64), "none of them 0"),
        (torch.zeros(1, 1, 3, 60, 64), "60x64 pixels .* multiples of 8"),
        (torch.full((1, 1, 3, 64, 64), 255.0), "\\[255, 255\\]; divide uint8 frames by 255"),
        (torch.full((1, 1, 3, 64, 64), -0.1), "must lie in \\[0, 1\\]"),
        (torch.full((1, 1, 3, 64, 64), float("nan")), "must lie in \\[0, 1\\]"),
        (torch.zeros(1, 1, 3, 64, 64, dtype=torch.uint8), "expected floating point"),
    ],
)
def test_encode_refuses(frames: torch.Tensor, words: str) -> None:
    with pytest.raises(InvalidValueError, match=words) as caught:
        small_model().encode(frames)
    assert caught.value.exit_code == 2


def test_decode_refuses() -> None:
    model = small_model()
    with pytest.raises(InvalidValueError, match="decodes \\[batch, frames, 6, 4\\]"):
        model.decode(torch.zeros(1, 2, 5, 4))
    with pytest.raises(InvalidValueError, match="decodes \\[batch, frames, 6, 4\\]"):
        model.decode(torch.zeros(2, 6, 4))
    with pytest.raises(InvalidValueError, match="floating point"):
        model.decode(torch.zeros(1, 2, 6, 4, dtype=torch.int64))
    with pytest.raises(InvalidValueError, match="multiples of 8"):
        model.decode(torch.zeros(1, 2, 6, 4), size=(64, 33))
    with pytest.raises(InvalidValueError, match="chunk=0"):
        model.decode(torch.zeros(1, 2, 6, 4), chunk=0)


def test_configuration_refuses() -> None:
    with pytest.raises(InvalidValueError, match="did you mean 'tiny'"):
        preset("tyni")
    with pytest.raises(ValidationError, match="did you mean 'small'"):
        ARVAEConfig.model_validate({"preset": "smal"})
    with pytest.raises(ValidationError, match="enlarge a patch 8 times, but patch_size is 16"):
        preset("tiny", patch_size=16)
    with pytest.raises(ValidationError, match="not a multiple of num_heads"):
        preset("tiny", num_heads=5)
    with pytest.raises(ValidationError, match="even head size"):
        preset("tiny", width=20, num_heads=4)
    with pytest.raises(ValidationError, match="must all be 1 or more"):
        preset("tiny", decoder_multipliers=(0, 1, 2, 4))
