"""The trainer's adversarial step against a plain loop with two optimisers; what is drawn and counted for the AR-VAE."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ar_vae_runs import ADVERSARY, MODEL, ar_vae_config, write_clips
from torch import Tensor

from ardist.config.training import AugmentationConfig
from ardist.data.loader import read_samples
from ardist.data.manifest import load_manifest
from ardist.errors import CheckpointError
from ardist.models.ar_vae import ARVAE, ARVAEConfig
from ardist.models.ar_vae.discriminator import PatchDiscriminator, discriminator_hinge_loss, generator_hinge_loss
from ardist.training import distributed
from ardist.training.adversary import Adversary
from ardist.training.augmentation import choose_frames
from ardist.training.distributed import World
from ardist.training.objectives_ar_vae import AutoencoderObjective

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module", autouse=True)
def _process_group() -> Iterator[None]:
    """For the discriminator's engine."""
    distributed.start()
    yield
    distributed.stop()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"), samples=8)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_steps_are_those_of_two_plain_optimisers(data: Path, stage: int) -> None:
    """Losses of both sides, the adaptive weight by autograd at the weights themselves, both AdamW updates."""
    decay = 5.0  # so large that it shows who decays
    changes = {"training__micro_batch_size": 8, "optimizer__grad_clip": 0.0, "training__zero_stage": stage}
    changes |= {"optimizer__weight_decay": decay}
    config = ar_vae_config(data, data, augmentation={"flip": False}, **changes)
    adversary = Adversary(config, ALONE)
    objective = AutoencoderObjective(config, load_manifest(str(data)), ALONE.device, adversary)
    torch.manual_seed(0)
    model, reference = objective.build_model(), ARVAE(ARVAEConfig(**MODEL))
    reference.load_state_dict(model.state_dict())
    judge = PatchDiscriminator(ADVERSARY["discriminator_channels"], ADVERSARY["discriminator_layers"])
    judge.load_state_dict(adversary.model.state_dict())
    betas = {"betas": config.optimizer.betas, "eps": config.optimizer.eps, "weight_decay": 1e-4}
    ours = torch.optim.AdamW(model.parameters(), lr=1e-3, **betas)
    generators = torch.optim.AdamW(reference.parameters(), lr=1e-3, **betas)
    kernels = [p for p in judge.parameters() if p.ndim == 4]
    others = [p for p in judge.parameters() if p.ndim == 1]  # biases, and weights of norms
    groups = [{"params": kernels, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    judges = torch.optim.AdamW(groups, lr=1e-3, **betas)
    batch = read_samples(data)
    frames = batch.values.permute(0, 1, 4, 2, 3).float() / 255
    weight = torch.zeros(())

    for step in range(4):
        adversary.begin(step)
        loss, terms = objective.loss(model, objective.prepare(batch))
        ours.zero_grad()
        loss.backward()
        ours.step()
        adversary.step(1e-3, False)

        reconstruction, _, _ = reference(frames)
        error = (reconstruction - frames).abs().mean()
        verdict = generator_hinge_loss(judge(reconstruction))
        last = reference.pixel_decoder.conv_out.weight
        pulls: list[Tensor] = [torch.autograd.grad(part, last, retain_graph=True)[0] for part in (error, verdict)]
        total = error + 0.5 * weight * verdict
        generators.zero_grad()
        total.backward()
        judges.zero_grad()
        own = discriminator_hinge_loss(judge(frames), judge(reconstruction.detach()))
        own.backward()
        generators.step()
        judges.step()

        assert float(loss) == pytest.approx(float(total), abs=1e-6)
        assert float(terms["discriminator"]) == pytest.approx(float(own), abs=1e-6)
        assert float(terms["adaptive_weight"]) == pytest.approx(float(weight), rel=1e-4)
        weight = pulls[0].norm() / (pulls[1].norm() + 1e-4)
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(adversary.model.parameters(), judge.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert float(weight) > 0.01


def test_the_discriminators_gradient_is_clipped_and_its_rate_is_its_own(data: Path) -> None:
    config = ar_vae_config(
        data, data, training__micro_batch_size=8, optimizer__grad_clip=1e-9, ar_vae_loss__discriminator_lr=6e-3
    )
    adversary = Adversary(config, ALONE)
    frames = read_samples(data).values.permute(0, 1, 4, 2, 3).float() / 255
    before = [p.detach().clone() for p in adversary.model.parameters()]
    adversary.begin(0)
    shown = (frames * 0.5).requires_grad_()
    adversary.judge(shown, frames)
    assert shown.grad is None, "what the discriminator learns is no gradient of the autoencoder's"
    adversary.compare(torch.ones(3, 2, 3, 3), torch.ones(3, 2, 3, 3))
    adversary.step(1e-3, False)
    groups = adversary.engine.deepspeed.basic_optimizer.param_groups
    assert [group["lr"] for group in groups] == pytest.approx([2e-3, 2e-3])  # 1e-3 x 6e-3 / 3e-3
    # Clipped to 1e-9, below AdamW's eps of 1e-8: a step of a tenth of the rate at most.
    steps = [(a - b).abs().max() for a, b in zip(adversary.model.parameters(), before, strict=True)]
    assert 0 < max(float(step) for step in steps) < 4e-4


def test_micro_batches_add_up_to_the_batch(data: Path) -> None:
    """Gradients, not only what AdamW makes of them: it would hide a wrong scale."""
    frames = read_samples(data).values.permute(0, 1, 4, 2, 3).float() / 255
    states = []
    for size in (8, 4):
        config = ar_vae_config(data, data, training__micro_batch_size=size, optimizer__grad_clip=0.0)
        adversary = Adversary(config, ALONE)
        adversary.begin(0)
        for part in frames.split(size):
            verdict = adversary.judge((part * 0.5).requires_grad_(), part)
            adversary.compare(part.mean() * torch.ones(3, 2, 3, 3), verdict.gradient.sum() * torch.ones(3, 2, 3, 3))
        adversary.step(1e-3, False)
        states.append(adversary.state())
    for name, value in states[0].items():
        if name.startswith("exp_avg."):
            torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=1e-7)


def test_back_at_a_checkpoint_without_a_discriminator_it_is_new(data: Path) -> None:
    config = ar_vae_config(data, data, training__micro_batch_size=8)
    frames = read_samples(data).values.permute(0, 1, 4, 2, 3).float() / 255
    adversary = Adversary(config, ALONE)
    beginning = adversary.state()

    def learn() -> dict[str, Tensor]:
        adversary.begin(0)
        adversary.judge((frames * 0.5).requires_grad_(), frames)
        adversary.compare(torch.ones(3, 2, 3, 3), torch.ones(3, 2, 3, 3))
        adversary.step(1e-3, False)
        adversary.skipped_alone += 1
        return adversary.state()

    learned = learn()
    assert float(learned["adaptive_weight"]) > 0
    adversary.restore(data, [])
    again = adversary.state()
    assert again.keys() == beginning.keys(), "no moments"
    assert all(torch.equal(again[name], value) for name, value in beginning.items())
    assert adversary.skips_told == 0
    again = learn()
    assert all(torch.equal(again[name], value) for name, value in learned.items()), "it learns as at the beginning"
    adversary.load(learned, "there")
    assert adversary.skips_told == 1, "a run that goes back has told what its checkpoint knows of"


def test_another_discriminators_state_is_refused(data: Path) -> None:
    small = Adversary(ar_vae_config(data, data), ALONE)
    large = Adversary(ar_vae_config(data, data, ar_vae_loss={**ADVERSARY, "discriminator_channels": 8}), ALONE)
    with pytest.raises(CheckpointError, match="holds another discriminator: set ar_vae_loss.discriminator_channels"):
        large.load(small.state(), "there")


def test_the_discriminator_does_not_change_how_the_autoencoder_starts(data: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    Adversary(ar_vae_config(data, data), ALONE)
    assert torch.equal(torch.rand(1), expected)


def test_random_frames_of_each_clip() -> None:
    values = torch.arange(4 * 10).view(4, 10, 1)
    ids = torch.arange(4)
    chosen = choose_frames(AugmentationConfig(frames=3), values, 0, 0, ids)
    assert chosen.shape == (4, 3, 1)
    assert bool((chosen.diff(dim=1) > 0).all()), "different frames in their order"
    assert bool((chosen // 10 == ids[:, None, None]).all()), "of the clip itself"
    assert torch.equal(choose_frames(AugmentationConfig(frames=3), values[2:], 0, 0, ids[2:]), chosen[2:])
    assert not torch.equal(choose_frames(AugmentationConfig(frames=3), values, 0, 1, ids), chosen)
    assert choose_frames(AugmentationConfig(), values, 0, 0, ids) is values
    assert choose_frames(AugmentationConfig(frames=10), values, 0, 0, ids) is values


def test_with_a_kl_weight_latents_are_drawn_by_sample(data: Path) -> None:
    plain = AutoencoderObjective(ar_vae_config(data, data, ar_vae_loss={}), load_manifest(str(data)), ALONE.device)
    config = ar_vae_config(data, data, ar_vae_loss={"kl_weight": 0.1})
    sampled = AutoencoderObjective(config, load_manifest(str(data)), ALONE.device)
    batch = read_samples(data)
    assert "noise" not in plain.prepare(batch)
    inputs = sampled.prepare(batch)
    assert inputs["noise"].shape == (8, 3, 4, 4)
    torch.manual_seed(0)
    model = sampled.build_model()
    loss, terms = sampled.loss(model, inputs)
    assert float(loss) == pytest.approx(float(terms["l1"] + 0.1 * terms["kl"]), abs=1e-6)
    assert float(loss) != pytest.approx(float(plain.loss(model, plain.prepare(batch))[0]), abs=1e-3)
