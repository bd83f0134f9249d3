"""Augmentation: keyed by sample, the same for all frames, each change as drawn."""

from __future__ import annotations

import torch

from ardist.config.training import AugmentationConfig
from ardist.training.augmentation import augment, draw, latent_noise

IDS = torch.arange(64)
ALL = AugmentationConfig(flip=True, shift=3, colour=0.2)


def test_a_draw_depends_on_the_sample_alone() -> None:
    whole = draw(ALL, 7, 2, IDS)
    part = draw(ALL, 7, 2, IDS[40:44])
    for name, values in part.items():
        assert torch.equal(values, whole[name][40:44])
    assert not torch.equal(draw(ALL, 7, 3, IDS)["shift"], whole["shift"])
    assert set(whole["shift"].flatten().tolist()) == {-3, -2, -1, 0, 1, 2, 3}
    assert 16 < int(whole["flip"].sum()) < 48
    assert whole["colour"].abs().max() <= 0.2


def test_nothing_is_drawn_for_what_is_off() -> None:
    assert draw(AugmentationConfig(flip=False), 0, 0, IDS) == {}
    frames = torch.rand(2, 3, 3, 8, 8)
    assert torch.equal(augment(frames, {}), frames)


def test_each_change_is_what_it_says() -> None:
    frames = torch.rand(2, 2, 3, 8, 6)
    flipped = augment(frames, {"flip": torch.tensor([True, False])})
    assert torch.equal(flipped[0], frames[0].flip(-1))
    assert torch.equal(flipped[1], frames[1])
    moved = augment(frames, {"shift": torch.tensor([[2, -1], [0, 0]])})
    assert torch.equal(moved[0, :, :, :6, 1:], frames[0, :, :, 2:, :-1])
    assert torch.equal(moved[0, :, :, 6, 1:], frames[0, :, :, 6, :-1])  # mirrored below the last row
    assert torch.equal(moved[0, :, :, 0, 0], frames[0, :, :, 2, 1])  # and left of the first column
    assert torch.equal(moved[1], frames[1])
    colour = torch.zeros(2, 2, 3)
    colour[0, 0, 1] = 0.2
    tinted = augment(frames, {"colour": colour})
    assert torch.allclose(tinted[0, :, 1], ((frames[0, :, 1] - 0.5) * 1.2 + 0.5).clamp(0, 1))
    assert torch.allclose(tinted[0, :, [0, 2]], frames[0, :, [0, 2]])
    assert torch.allclose(tinted[1], frames[1])


def test_noise_on_latents_depends_on_the_sample_alone_and_stays_within_its_limit() -> None:
    config = AugmentationConfig(latent_noise=0.3)
    whole = latent_noise(config, 7, 2, IDS, (4, 32, 4))
    assert whole.shape == (64, 4, 32, 4)
    assert torch.equal(latent_noise(config, 7, 2, IDS[40:44], (4, 32, 4)), whole[40:44])
    assert not torch.equal(latent_noise(config, 7, 3, IDS, (4, 32, 4)), whole)
    amounts = whole.flatten(1).std(dim=1)
    assert amounts.max() < 0.33
    assert amounts.min() < 0.03
    assert 0.12 < amounts.mean() < 0.18
