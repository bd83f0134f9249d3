"""Stage 2: only the temporal blocks move, from a run or a bundle, on every layout, and resumes are bit-equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ar_vae_runs import ar_vae_config, ar_vae_settings, stage_two, write_clips
from pydantic import ValidationError
from ranks import Ranks, run_ranks
from tiny import losses, records, train_outcome, weights

from ardist.config import TrainConfig
from ardist.data.loader import open_loader
from ardist.errors import ConfigError
from ardist.models.weights import load_ar_vae
from ardist.training import augmentation
from ardist.training.callbacks import Callback
from ardist.training.commit import newest_valid
from ardist.training.engine import StepOutcome
from ardist.training.export import export_bundle
from ardist.training.preflight import check_run
from ardist.training.trainer import Trainer, train

pytestmark = pytest.mark.distributed

STEPS = 4
TEMPORAL = "decoder.temporal."
FAST = {"optimizer__lr": 1e-2, "training__steps": STEPS}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A stage-1 run, with its bundle beside it."""
    run_dir = tmp_path_factory.mktemp("first") / "run"
    config = ar_vae_config(run_dir, data, training__steps=3, augmentation__frames=1)
    assert run_ranks(train_outcome, 2, config) == ["done", "done"]
    export_bundle(run_dir, run_dir.parent / "bundle")
    return run_dir


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory, data: Path, first: Path) -> Path:
    """A whole stage-2 run of two ranks."""
    return train_on(2, tmp_path_factory.mktemp("second"), data, first, validation__path=str(data), validation__every=2)


def train_on(
    ranks: int, run_dir: Path, data: Path, source: Path, env: dict[str, str] | None = None, **more: Any
) -> Path:
    config = stage_two(run_dir, data, source, **{**FAST, **more})
    stops = config.training.stop_after is not None
    for outcome in run_ranks(train_outcome, ranks, config, env=env):
        assert outcome.startswith("Preempted: stopped as") if stops else outcome == "done", outcome
    return run_dir


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_only_the_temporal_blocks_move(first: Path, second: Path, tmp_path: Path) -> None:
    assert weights(second)
    assert all(name.startswith(TEMPORAL) for name in weights(second))
    before = load_ar_vae(first.parent / "bundle").state_dict()
    after = load_ar_vae(export_bundle(second, tmp_path / "bundle")).state_dict()
    assert equal(before, {name: value for name, value in after.items() if not name.startswith(TEMPORAL)})
    moved = [name for name, value in after.items() if name.endswith("out.weight") and bool(value.abs().sum())]
    assert sorted(name for name in moved if TEMPORAL in name) == [
        f"{TEMPORAL}0.coarse.out.weight",
        f"{TEMPORAL}0.fine.out.weight",
    ]


def test_it_starts_as_the_model_of_stage_one(data: Path, first: Path, second: Path) -> None:
    """The first loss is that of the averaged per-frame model on the same clips."""
    model = load_ar_vae(first.parent / "bundle")
    config = stage_two(second, data, first, **FAST)
    loader = open_loader(config.data, seed=config.seed, global_batch_size=8, rank=0, world_size=1)
    batch = next(loader)
    loader.close()
    drawn = augmentation.draw(config.augmentation, config.seed, batch.epoch, batch.sample_ids)
    frames = augmentation.augment(batch.values.permute(0, 1, 4, 2, 3).float() / 255, drawn)
    with torch.no_grad():
        expected = (model(frames)[0] - frames).abs().mean()
    assert losses(second)[0] == pytest.approx(float(expected), abs=1e-6)


def test_a_bundle_is_as_good_a_start_as_its_run(tmp_path: Path, data: Path, first: Path, second: Path) -> None:
    train_on(1, tmp_path, data, first.parent / "bundle", training__zero_stage=3)
    assert losses(tmp_path) == pytest.approx(losses(second), abs=1e-6)


@pytest.mark.parametrize(("stage", "precision"), [pytest.param(3, "fp32", marks=pytest.mark.slow), (1, "bf16")])
def test_a_resumed_run_is_bit_equal(tmp_path: Path, data: Path, first: Path, stage: int, precision: str) -> None:
    layout = {"training__zero_stage": stage, "training__precision": precision}
    straight = train_on(2, tmp_path / "straight", data, first, **layout)
    cut = train_on(2, tmp_path / "cut", data, first, **layout, training__stop_after=2)
    train_on(2, cut, data, first, **layout)
    assert losses(cut) == losses(straight)
    assert equal(weights(cut), weights(straight))
    # The frozen weights come through bf16 and a resume without a change of a bit.
    exported = load_ar_vae(export_bundle(cut, tmp_path / "bundle")).state_dict()
    for name, value in load_ar_vae(first.parent / "bundle").state_dict().items():
        assert torch.equal(exported[name], value), name


def test_another_number_of_ranks_goes_on_as_before(tmp_path: Path, data: Path, first: Path, second: Path) -> None:
    train_on(2, tmp_path, data, first, training__stop_after=2)
    train_on(1, tmp_path, data, first, training__zero_stage=0)
    assert losses(tmp_path) == pytest.approx(losses(second), abs=1e-5)


def test_a_bad_step_changes_nothing(tmp_path: Path, data: Path, first: Path) -> None:
    bad = {"ARDIST_FAULT": "value@trainer.loss/1#5:nan"}
    train_on(2, tmp_path, data, first, bad, training__steps=3, checkpoint__every=2)
    assert equal(weights(tmp_path, step=2), weights(tmp_path, step=3))
    assert json.loads((tmp_path / "summary.json").read_text())["events"]["training.skipped_step"] == 1


def test_killed_while_a_checkpoint_is_written(tmp_path: Path, data: Path, first: Path, second: Path) -> None:
    config = stage_two(tmp_path, data, first, **FAST, checkpoint__every=2)
    fault = {"ARDIST_FAULT": "kill@checkpoint.after_part/0#2"}  # in the save after the last step
    outcomes = Ranks(train_outcome, 2, config, env=fault).wait(300)
    assert outcomes[0].exit_code == -9
    assert newest_valid(tmp_path / "checkpoints")[1].step == 2
    train_on(2, tmp_path, data, first)
    assert losses(tmp_path)[-2:] == losses(second)[-2:]
    assert equal(weights(tmp_path), weights(second))


def test_validation_looks_at_the_clips(second: Path) -> None:
    record = records(second, "validation")[STEPS]
    assert record["flicker"] > 0
    assert 0 < record["ssim"] < 1
    assert record["ema_psnr"] > 5
    assert [sum(channel) for channel in record["latent_histogram"]] == [32 * 3 * 4] * 4
    for suffix in ("png", "mp4"):
        assert (second / "samples" / f"reconstruction-{STEPS:08d}.{suffix}").stat().st_size > 500


def test_the_loss_of_a_clip_has_its_flicker_term(tmp_path: Path, data: Path, first: Path, second: Path) -> None:
    """With its weight in the sum, and none of it in a run without one."""
    run = train_on(2, tmp_path, data, first, ar_vae_loss__flicker_weight=4.0, training__steps=1)
    terms = records(run)[1]
    assert terms["flicker"] > 1e-3
    assert terms["l1"] == pytest.approx(losses(second)[0], abs=1e-6)
    assert terms["loss"] == pytest.approx(terms["l1"] + 4.0 * terms["flicker"], abs=1e-6)
    assert "flicker" not in records(second)[1]


def test_what_goes_wrong_beside_training_is_counted(tmp_path: Path, data: Path) -> None:
    """A channel that says nothing, and a folder for pictures that cannot be written to."""
    config = ar_vae_config(
        tmp_path, data, training__steps=1, validation__path=str(data), ar_vae_loss={}, training__ema_decays=[]
    )
    assert run_ranks(_train_with_a_dead_channel, 1, config) == ["done"]
    counted = json.loads((tmp_path / "summary.json").read_text())["events"]
    assert counted["ar_vae.latents"] == 1
    assert counted["reconstructions.failed"] == 1
    assert records(tmp_path, "validation")[1]["latent_still_channels"] == [3]


def _train_with_a_dead_channel(config: TrainConfig) -> str:
    class Silence(Callback):
        def on_start(self, trainer: Trainer) -> None:
            (trainer.run.path / "samples").write_text("a file where a folder should be")
            with torch.no_grad():
                for tensor in trainer.engine.module.encoder.moments.parameters():
                    tensor[3] = 0.0
            trainer.engine.step = lambda lr: StepOutcome(0.0, False)  # type: ignore[method-assign]

    train(config, [Silence()])
    return "done"


def test_what_cannot_be_stage_two(tmp_path: Path, data: Path, first: Path) -> None:
    with pytest.raises(ValidationError, match="needs init_from, the run, checkpoint or bundle of stage 1"):
        ar_vae_config(tmp_path, data, ar_vae__temporal=True, trainable="temporal")
    with pytest.raises(ValidationError, match="needs task ar_vae with ar_vae.temporal: true"):
        ar_vae_config(tmp_path, data, trainable="temporal", init_from=str(first))
    with pytest.raises(ConfigError, match="is not a directory"):
        check_run(stage_two(tmp_path, data, tmp_path / "nowhere"), 1, tmp_path / "checkpoints")
    settings = ar_vae_settings(tmp_path, data, training__steps=1, ar_vae__temporal=True, ar_vae_loss={})
    settings |= {"trainable": "temporal", "init_from": str(first)}
    settings["ar_vae"]["width"] = 64
    [outcome] = run_ranks(train_outcome, 1, TrainConfig.model_validate(settings))
    assert outcome.startswith("CheckpointError")
    assert "belongs to another model" in outcome
    assert " there and [1, 64] here" in outcome


def test_a_run_of_another_stage_is_not_resumed(tmp_path: Path, data: Path, second: Path) -> None:
    config = stage_two(second, data, tmp_path, trainable="all", init_from=None)
    with pytest.raises(ConfigError, match=r"trainable: .* 'temporal' -> 'all'"):
        check_run(config, 1, second / "checkpoints")


def test_noise_on_latents_is_the_same_on_every_number_of_ranks_and_absent_from_validation(
    tmp_path: Path, data: Path, first: Path, second: Path
) -> None:
    noisy = {"augmentation__latent_noise": 0.5, "validation__path": str(data), "validation__every": 1}
    runs = [train_on(ranks, tmp_path / str(ranks), data, first, **noisy) for ranks in (1, 2)]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), abs=1e-5)
    assert abs(losses(runs[0])[0] - losses(second)[0]) > 1e-7, "another input, another loss"
    # A step so small that it moves nothing: what is left is validation itself.
    still = train_on(1, tmp_path / "still", data, first, **{**noisy, "optimizer__lr": 1e-12, "training__steps": 1})
    plain = {"validation__path": str(data), "validation__every": 1, "optimizer__lr": 1e-12, "training__steps": 1}
    without = train_on(1, tmp_path / "without", data, first, **plain)
    assert records(still, "validation")[1]["psnr"] == pytest.approx(records(without, "validation")[1]["psnr"], abs=1e-4)
