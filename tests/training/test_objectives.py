"""The loss is a mean over samples: neither the split into micro-batches nor the order of samples matters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config, write_latents, write_pixels

from ardist.data.batch import Batch
from ardist.data.loader import read_samples
from ardist.data.manifest import load_manifest
from ardist.models.ar_vae import Posterior
from ardist.training.batches import cut, single_clips
from ardist.training.objectives import AutoencoderObjective, DenoiserObjective

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("latents"), samples=16, classes=3)


def denoiser_objective(data: Path, **changes: Any) -> DenoiserObjective:
    return DenoiserObjective(tiny_config(data, data, denoiser__num_classes=4, **changes), load_manifest(str(data)), CPU)


def run(objective: Any, forward: Any, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a batch in one piece."""
    result: tuple[torch.Tensor, dict[str, torch.Tensor]] = objective.loss(forward, objective.prepare(batch))
    return result


def whole_loss(objective: Any, model: Any, batch: Batch) -> float:
    return run(objective, model, batch)[0].item()


class Recorder:
    """A stand-in for the network that predicts zero and keeps what it was asked."""

    def __init__(self) -> None:
        self.calls: list[dict[str, torch.Tensor]] = []

    def __call__(self, noisy: torch.Tensor, timesteps: torch.Tensor, **condition: torch.Tensor) -> torch.Tensor:
        self.calls.append({"noisy": noisy, "timesteps": timesteps, **condition})
        return torch.zeros_like(noisy)


def test_predicting_zero_costs_a_quarter_on_unit_tokens(data: Path) -> None:
    loss, metrics = run(denoiser_objective(data), Recorder(), read_samples(data))
    assert float(loss) == pytest.approx(0.25, abs=1e-3)
    assert metrics["loss_per_frame"].shape == (4,)


@pytest.mark.parametrize("law", ["fopp", {"fopp": 1.0, "synchronous": 1.0}])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_loss_is_the_same_for_every_split_and_order(data: Path, law: Any, gamma: float | None) -> None:
    objective = denoiser_objective(data, diffusion__law=law, diffusion__min_snr_gamma=gamma)
    torch.manual_seed(0)
    model = objective.build_model()
    torch.nn.init.normal_(model.output.weight, std=0.3)  # type: ignore[union-attr, arg-type]
    batch = replace(read_samples(data), epoch=3)
    whole = whole_loss(objective, model, batch)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    assert batch.class_ids is not None
    shuffled = replace(
        batch, values=batch.values[order], sample_ids=batch.sample_ids[order], class_ids=batch.class_ids[order]
    )
    for other in (batch, shuffled):
        for count in (8, 2, 1):
            parts = [objective.loss(model, part)[0].item() for part in cut(objective.prepare(other), count)]
            assert len(parts) == count
            assert sum(parts) / count == pytest.approx(whole, abs=1e-6)
    assert whole_loss(objective, model, replace(batch, epoch=4)) != pytest.approx(whole, abs=1e-4)


def test_noise_timesteps_and_dropout_are_keyed_by_sample_epoch_and_seed(data: Path) -> None:
    batch = read_samples(data)
    changes = {"diffusion__target": "eps", "diffusion__condition_dropout": 0.5}
    drawn = {}
    for name, seed, epoch in (("a", 0, 1), ("again", 0, 1), ("epoch", 0, 2), ("seed", 1, 1)):
        drawn[name] = denoiser_objective(data, seed=seed, **changes).prepare(replace(batch, epoch=epoch))
    for what in ("target", "timesteps", "class_ids", "noisy"):  # the target is the noise
        assert torch.equal(drawn["a"][what], drawn["again"][what]), what
        for other in ("epoch", "seed"):
            assert not torch.equal(drawn["a"][what], drawn[other][what]), (what, other)
    assert bool((drawn["a"]["timesteps"].diff(dim=1) >= 0).all())
    noise = drawn["a"]["target"]
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.1)
    assert float(noise.std()) == pytest.approx(1.0, abs=0.1)
    assert not torch.equal(noise[0], noise[1])


def test_dropped_and_missing_labels_become_the_null_class(data: Path) -> None:
    batch = read_samples(data)
    assert batch.class_ids is not None
    batch = replace(batch, class_ids=torch.where(torch.arange(16) == 5, -1, batch.class_ids))
    recorder = Recorder()
    for dropout in (0.0, 1.0, 0.5):
        run(denoiser_objective(data, diffusion__condition_dropout=dropout), recorder, batch)
    none, every, some = (call["class_ids"] for call in recorder.calls)
    assert none.tolist() == [4 if i == 5 else i % 3 for i in range(16)]
    assert every.tolist() == [4] * 16
    assert 2 < int((some == 4).sum()) < 14
    denoiser_objective(data).evaluate(recorder, next(single_clips(read_samples(data))))
    assert recorder.calls[-1]["class_ids"].tolist() == [0] * 8, "nothing is dropped when held-out clips are measured"


def test_validation_of_predict_zero_is_one(data: Path) -> None:
    objective = denoiser_objective(data, validation__staircases=3)
    clips = [objective.evaluate(Recorder(), clip) for clip in single_clips(read_samples(data))]
    record = objective.summarise(clips)
    assert record["fraction_of_predict_zero"] == pytest.approx(1.0)
    assert record["clips"] == 16
    table = record["loss_per_frame_and_timestep"]
    assert (len(table), len(table[0])) == (4, 10)
    times = torch.tensor([clip["timestep"] for clip in clips]).unflatten(1, (3, 4))
    assert bool((times.diff(dim=2) >= 0).all())
    assert len({tuple(row) for row in times.flatten(0, 1).tolist()}) > 40, "every clip has staircases of its own"


def test_autoencoder_loss_is_the_mean_absolute_error_in_zero_to_one(tmp_path: Path) -> None:
    data = write_pixels(tmp_path, samples=8)
    shape = {"image_size": 16, "patch_size": 8, "width": 32, "depth": 1, "num_heads": 2, "tokens_per_frame": 3}
    config = tiny_config(tmp_path, data, task="ar_vae", denoiser=None, ar_vae=shape)
    objective = AutoencoderObjective(config, load_manifest(str(data)), CPU)
    batch: Batch = read_samples(data)

    def grey(frames: torch.Tensor, *noise: None) -> tuple[torch.Tensor, Posterior, None]:
        assert frames.shape[2:] == (3, 16, 16)
        latents = torch.ones(*frames.shape[:2], 3, 4)
        return torch.full_like(frames, 0.5), Posterior(latents, torch.zeros_like(latents)), None

    loss, _ = run(objective, grey, batch)
    expected = (batch.values.double() / 255 - 0.5).abs().mean()
    assert float(loss) == pytest.approx(float(expected), abs=1e-6)
    record = objective.summarise([objective.evaluate(grey, clip) for clip in single_clips(batch)])
    assert record["l1"] == pytest.approx(float(expected), abs=1e-6)
    mse = (batch.values.double() / 255 - 0.5).square().flatten(1).mean(dim=1)
    assert record["latent_still_channels"] == [0, 1, 2, 3]
    assert record["latent_norm_error"] == pytest.approx(0.0, abs=1e-6)
    assert record["psnr"] == pytest.approx(float((-10 * mse.log10()).mean()), abs=1e-4)


def test_a_batch_that_cannot_be_cut_evenly_is_refused() -> None:
    for parts in (5, 32):
        with pytest.raises(ValueError, match=f"16 samples cannot be cut into {parts} equal micro-batches"):
            next(cut({"x": torch.zeros(16)}, parts))
