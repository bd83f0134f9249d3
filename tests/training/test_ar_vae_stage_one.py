"""Stage 1 with a discriminator: one loss curve on every layout, bit-equal resumes, and what a bad step leaves alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ar_vae_runs import ar_vae_config, ar_vae_settings, write_clips
from ranks import Ranks, run_ranks
from safetensors.torch import load_file
from test_host_reads import _count as count_reads
from tiny import losses, records, sample_ids, train_outcome, weights

from ardist.config import TrainConfig
from ardist.errors import ArdistError, ConfigError
from ardist.training import distributed
from ardist.training.adversary import ADVERSARY_FILE, Adversary
from ardist.training.callbacks import Callback
from ardist.training.commit import newest_valid
from ardist.training.preflight import check_run
from ardist.training.trainer import Trainer, train

pytestmark = pytest.mark.distributed

STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run of ZeRO-1 on two ranks from the first to the last step."""
    return train_on(2, tmp_path_factory.mktemp("whole"), data)


def train_on(ranks: int, run_dir: Path, data: Path, env: dict[str, str] | None = None, **changes: Any) -> Path:
    """Train (or resume) and require that every rank ended as it should."""
    config = ar_vae_config(run_dir, data, **{"training__steps": STEPS, **changes})
    stops = config.training.stop_after is not None
    for outcome in run_ranks(train_outcome, ranks, config, env=env):
        assert outcome.startswith("Preempted: stopped as") if stops else outcome == "done", outcome
    return run_dir


def discriminator(run_dir: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    path, _ = newest_valid(run_dir / "checkpoints", step)
    return load_file(path / ADVERSARY_FILE)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def events(run_dir: Path) -> dict[str, int]:
    counted: dict[str, int] = json.loads((run_dir / "summary.json").read_text())["events"]
    return counted


def test_both_sides_learn_in_every_step(whole: Path) -> None:
    last = records(whole)[STEPS]
    assert last["discriminator"] < records(whole)[1]["discriminator"]
    assert last["adaptive_weight"] > 0
    # The first step has no weight yet: the autoencoder's loss is its own.
    assert records(whole)[1]["adaptive_weight"] == 0.0
    assert records(whole)[1]["loss"] == pytest.approx(records(whole)[1]["l1"])
    assert last["loss"] == pytest.approx(last["l1"] + 0.5 * last["adaptive_weight"] * last["generator"], abs=2e-3)
    state = discriminator(whole)
    assert {float(value) for name, value in state.items() if name.startswith("step.")} == {float(STEPS)}


@pytest.mark.parametrize(("stage", "ranks", "micro"), [(0, 1, 8), (2, 2, 2), (3, 2, 1)])
def test_stages_ranks_and_micro_batches_have_one_loss_curve(
    tmp_path: Path, data: Path, whole: Path, stage: int, ranks: int, micro: int
) -> None:
    train_on(ranks, tmp_path, data, training__zero_stage=stage, training__micro_batch_size=micro)
    assert sample_ids(tmp_path) == sample_ids(whole)
    assert losses(tmp_path) == pytest.approx(losses(whole), abs=1e-5)
    for name in ("discriminator", "adaptive_weight"):
        theirs = [record[name] for _, record in sorted(records(whole).items())]
        assert [record[name] for _, record in sorted(records(tmp_path).items())] == pytest.approx(theirs, rel=1e-3)
    # AdamW hides the scale of a gradient from the weights, not from its moments.
    mine = discriminator(tmp_path)
    for name, value in discriminator(whole).items():
        if name.startswith("exp_avg."):
            torch.testing.assert_close(mine[name], value, rtol=2e-2, atol=1e-5)


def test_both_sides_learn_in_bf16_as_in_fp32(tmp_path: Path, data: Path, whole: Path) -> None:
    train_on(2, tmp_path, data, training__precision="bf16", training__zero_stage=2, training__steps=3)
    for name in ("loss", "discriminator"):
        mine, theirs = ([records(run)[step][name] for step in (1, 2, 3)] for run in (tmp_path, whole))
        assert mine == pytest.approx(theirs, abs=3e-2)
    state = discriminator(tmp_path)
    assert {float(value) for name, value in state.items() if name.startswith("step.")} == {3.0}


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_resumed_run_is_bit_equal(tmp_path: Path, data: Path, whole: Path, stage: int) -> None:
    straight = whole if stage == 1 else train_on(2, tmp_path / "whole", data, training__zero_stage=stage)
    cut = tmp_path / "cut"
    train_on(2, cut, data, training__zero_stage=stage, training__stop_after=3)
    train_on(2, cut, data, training__zero_stage=stage)
    assert losses(cut) == losses(straight)
    assert equal(weights(cut), weights(straight))
    assert equal(discriminator(cut), discriminator(straight))


def _through_all_layouts(config: TrainConfig, saved: dict[str, torch.Tensor]) -> list[tuple[bool, float]]:
    """For ZeRO 0 to 3: does a discriminator's state come through unchanged, and what share of it is on this rank."""
    world = distributed.start()
    results = []
    for stage in range(4):
        training = config.training.model_copy(update={"zero_stage": stage})
        adversary = Adversary(config.model_copy(update={"training": training}), world)
        adversary.load(saved, "there")
        working = {f"master.{name}": weight.detach() for name, weight in adversary.model.named_parameters()}
        unchanged = equal(adversary.state(), saved) and equal(working, {name: saved[name] for name in working})
        moments = sum(state["exp_avg"].numel() for state in adversary.engine.deepspeed.basic_optimizer.state.values())
        results.append((unchanged, moments / sum(weight.numel() for weight in working.values())))
    return results


def test_the_discriminators_state_fits_every_layout(tmp_path: Path, data: Path, whole: Path) -> None:
    """Weights, moments, step and counters, saved by two ranks with ZeRO-1; and AdamW's state is cut as ZeRO says."""
    saved = discriminator(whole)
    for results in run_ranks(_through_all_layouts, 2, ar_vae_config(tmp_path, data), saved):
        assert [unchanged for unchanged, _ in results] == [True] * 4
        assert [share for _, share in results] == pytest.approx([1.0, 0.5, 0.5, 0.5], abs=0.02)


def test_a_run_resumed_on_another_layout_goes_on_as_before(tmp_path: Path, data: Path, whole: Path) -> None:
    train_on(2, tmp_path, data, training__zero_stage=1, training__stop_after=3)
    train_on(1, tmp_path, data, training__zero_stage=3)
    assert losses(tmp_path) == pytest.approx(losses(whole), abs=1e-5)
    assert {name: value.shape for name, value in discriminator(tmp_path).items()} == {
        name: value.shape for name, value in discriminator(whole).items()
    }


@pytest.mark.parametrize("guard", ["deepspeed", "device"])
def test_a_bad_loss_on_one_rank_skips_both_sides(tmp_path: Path, data: Path, guard: str) -> None:
    bad = {"ARDIST_FAULT": "value@trainer.loss/1#5:nan"}  # the third step: two micro-batches each
    train_on(2, tmp_path, data, bad, training__steps=3, checkpoint__every=2, training__guard=guard)
    assert equal(weights(tmp_path, step=2), weights(tmp_path, step=3))
    before, after = discriminator(tmp_path, 2), discriminator(tmp_path, 3)
    assert equal(before, after)
    assert events(tmp_path)["training.skipped_step"] == 1


def test_a_bad_gradient_of_the_discriminator_skips_it_alone(tmp_path: Path, data: Path) -> None:
    bad = {"ARDIST_FAULT": "value@adversary.loss/1#5:inf"}
    train_on(2, tmp_path, data, bad, training__steps=3, checkpoint__every=2)
    assert not equal(weights(tmp_path, step=2), weights(tmp_path, step=3))
    before, after = discriminator(tmp_path, 2), discriminator(tmp_path, 3)
    assert float(after.pop("skipped_alone")) == 1.0
    assert float(before.pop("skipped_alone")) == 0.0
    assert equal(before, after)
    assert events(tmp_path)["training.skipped_discriminator_step"] == 1
    assert "training.skipped_step" not in events(tmp_path)


@pytest.mark.parametrize("start", [0, 100])
def test_the_loop_reads_nothing_from_the_device(tmp_path: Path, data: Path, start: int) -> None:
    changes: dict[str, Any] = {"training__steps": 8, "training__log_every": 8, "training__guard": "device"}
    changes |= {"debug__log_sample_ids": False, "ar_vae_loss__adversarial_start": start}
    assert run_ranks(count_reads, 1, ar_vae_config(tmp_path, data, **changes)) == [[]]


def _train_with_flip(config: TrainConfig) -> str:
    class Flip(Callback):
        def after_step(self, trainer: Trainer) -> None:
            if trainer.step == 3 and trainer.world.rank == 1 and trainer.adversary is not None:
                with torch.no_grad():
                    next(trainer.adversary.model.parameters()).view(-1)[0] += 1.0

    try:
        train(config, [Flip()])
    except ArdistError as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def test_discriminators_that_differ_are_found(tmp_path: Path, data: Path) -> None:
    """With ZeRO-0: from 1 on a step hands every rank the same weights again."""
    config = ar_vae_config(tmp_path, data, debug__replica_check_every=2, training__steps=4, training__zero_stage=0)
    for outcome in run_ranks(_train_with_flip, 2, config):
        assert outcome.startswith("HardwareError: at step 4 the weights of rank"), outcome


def test_the_discriminator_starts_at_its_step(tmp_path: Path, data: Path) -> None:
    train_on(1, tmp_path, data, training__steps=4, ar_vae_loss__adversarial_start=2)
    assert ["discriminator" in records(tmp_path)[step] for step in (1, 2, 3, 4)] == [False, False, True, True]
    state = discriminator(tmp_path)
    assert {float(value) for name, value in state.items() if name.startswith("step.")} == {2.0}


def test_killed_while_a_checkpoint_is_written(tmp_path: Path, data: Path, whole: Path) -> None:
    config = ar_vae_config(tmp_path, data, training__steps=STEPS, checkpoint__every=2)
    fault = {"ARDIST_FAULT": "kill@checkpoint.after_part/0#2"}  # in the save after step 4
    outcomes = Ranks(train_outcome, 2, config, env=fault).wait(60)
    assert outcomes[0].exit_code == -9
    train_on(2, tmp_path, data)
    assert losses(tmp_path)[-2:] == losses(whole)[-2:]
    assert equal(discriminator(tmp_path), discriminator(whole))


def test_another_discriminator_is_refused_at_a_resume(tmp_path: Path, data: Path) -> None:
    train_on(1, tmp_path, data, training__steps=1)
    other = ar_vae_config(tmp_path, data, ar_vae_loss__discriminator_channels=8)
    with pytest.raises(ConfigError, match=r"ar_vae_loss.discriminator_channels: .* another configuration: 4 -> 8"):
        check_run(other, 1, tmp_path / "checkpoints")


def test_a_discriminator_may_be_added_to_a_run(tmp_path: Path, data: Path) -> None:
    train_on(1, tmp_path, data, training__steps=4, training__stop_after=2, ar_vae_loss={})
    train_on(1, tmp_path, data, training__steps=4)
    assert events(tmp_path)["training.new_discriminator"] == 1
    assert "discriminator" in records(tmp_path)[4]


def test_frames_too_small_for_the_losses_and_missing_files_are_told_at_once(tmp_path: Path) -> None:
    data = write_clips(tmp_path / "small", samples=8, size=8)
    files = {"vgg_path": "no/vgg", "lpips_path": "no/lpips", "vgg_digest": "0" * 64, "lpips_digest": "0" * 64}
    settings = ar_vae_settings(tmp_path / "run", data, ar_vae_loss__perceptual="lpips", ar_vae__image_size=8)
    settings["ar_vae_loss"] |= {**files, "discriminator_layers": 3}
    settings["training"]["zero_stage"] = 3
    settings["training"]["compile"] = True
    with pytest.raises(ConfigError) as caught:
        check_run(TrainConfig.model_validate(settings), 1, tmp_path / "checkpoints")
    for words in (
        "cannot read 'no/vgg': No such file or directory; convert the published VGG16",
        "lpips needs 16x16 or more",
        "a discriminator of 3 layers needs 24x24 or more",
        "training.compile: the AR-VAE is compiled as a whole",
    ):
        assert words in str(caught.value)
