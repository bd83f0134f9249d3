"""Statistics of latents: they add up over clips, name what is constant, and FLOPs are those of the graph."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ardist.models.ar_vae import ARVAE, preset
from ardist.models.ar_vae.flops import ar_vae_flops
from ardist.models.ar_vae.latents import HISTOGRAM_BINS, LatentStatistics, latent_problems


def latents(clips: int = 3, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(clips, 5, 6, 4, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_clips_together_are_what_they_are_in_one_piece() -> None:
    values = latents()
    parts = [LatentStatistics.of(clip[None]).to_list() for clip in values]
    together, once = LatentStatistics.from_lists(parts, 6, 4), LatentStatistics.of(values)
    torch.testing.assert_close(together.sums, once.sums)
    torch.testing.assert_close(together.histogram, once.histogram)
    torch.testing.assert_close(together.channel_std(), values.double().flatten(0, 2).std(dim=0, unbiased=False))
    torch.testing.assert_close(together.token_std(), values.double().flatten(0, 1).std(dim=0, unbiased=False))
    assert together.histogram.shape == (4, HISTOGRAM_BINS)
    assert together.histogram.sum() == values.numel()
    assert latent_problems(together.describe()) == []


def test_a_constant_channel_and_a_wrong_length_are_named() -> None:
    values = latents()
    values[..., 2] = 0.3
    record = LatentStatistics.of(values).describe()
    assert record["latent_still_channels"] == [2]
    assert record["latent_still_values"] == 6
    problems = latent_problems(record)
    assert problems[0].startswith("channel 2 is constant (standard deviation ")
    assert "not of unit length" in problems[1]
    unit = LatentStatistics.of(F.normalize(values, dim=-1)).describe()
    assert unit["latent_still_channels"] == []


def test_latents_that_are_no_numbers_are_a_problem() -> None:
    values = latents()
    values[0, 0, 0, 1] = torch.nan
    record = LatentStatistics.of(values).describe()
    assert 1 in record["latent_still_channels"]
    assert any("unit length" in problem for problem in latent_problems({**record, "latent_norm_error": None}))
    assert latent_problems({"psnr": 20.0}) == []


def test_flops_count_what_is_trained() -> None:
    config = preset("tiny", width=32, depth=1, num_heads=2, tokens_per_frame=6, image_size=32)
    one = ar_vae_flops(config, 1, (32, 32))
    assert ar_vae_flops(config, 2, (32, 32)) == pytest.approx(2 * one)
    # At least two FLOPs per weight, use and pass: 16 patches, and three passes.
    weights = sum(p.numel() for p in ARVAE(config).decoder.layers.parameters())
    assert one > 3 * 2 * 16 * weights

    def temporal_only(model: ARVAE) -> None:
        model.requires_grad_(False)
        for parameter in model.temporal_parameters():
            parameter.requires_grad_(True)

    clip = preset("tiny", width=32, depth=1, num_heads=2, tokens_per_frame=6, image_size=32, temporal=True)
    assert ar_vae_flops(clip, 2, (32, 32), temporal_only) < ar_vae_flops(clip, 2, (32, 32))
