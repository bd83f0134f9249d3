"""The plan before a run: counts against the real model, rates by hand, memory by its parts, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ar_vae_runs import ar_vae_config
from rich.console import Console
from tiny import settings, tiny_config, write_latents, write_pixels

from ardist.config import TrainConfig
from ardist.data.manifest import load_manifest
from ardist.errors import ArdistError
from ardist.models.ar_vae.discriminator import PatchDiscriminator
from ardist.models.denoiser import Denoiser
from ardist.models.flops import denoiser_flops
from ardist.plan import autoencoder
from ardist.plan.activations import LiveBytes, activation_bytes, kept_bytes
from ardist.plan.memory import Memory, memory_per_rank
from ardist.plan.plan import count_parameters, count_trained, make_plan
from ardist.plan.tables import plan_tables, size
from ardist.training.objectives_ar_vae import AutoencoderObjective


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("latents"))


def config_of(data: Path, **changes: Any) -> TrainConfig:
    return tiny_config(data.parent / "run", data, **changes)


def test_counts_are_those_of_the_real_model(data: Path) -> None:
    config = config_of(data, denoiser__num_classes=3)
    assert config.denoiser is not None
    assert count_parameters(config) == sum(p.numel() for p in Denoiser(config.denoiser).parameters())
    plan = make_plan(config, gpus=4)
    assert plan.flops_per_clip == denoiser_flops(config.denoiser, 4).training
    assert (plan.num_frames, plan.tokens_per_clip, plan.samples) == (4, 12, 64)
    assert (plan.micro_batch_size, plan.accumulation) == (2, 1)
    assert plan.sample_bytes == 4 * 3 * 4 * 2


@pytest.mark.parametrize("trainable", ["all", "temporal"])
def test_an_autoencoders_work_is_what_its_trainer_counts(tmp_path: Path, trainable: str) -> None:
    pixels = write_pixels(tmp_path / "pixels")
    config = ar_vae_config(
        tmp_path / "run", pixels, ar_vae__temporal=True, trainable=trainable, init_from=str(tmp_path / "stage-1")
    )
    counted = AutoencoderObjective(config, load_manifest(pixels), torch.device("cpu")).flops_per_clip
    plan = make_plan(config)
    assert plan.flops_per_clip == counted > 0
    assert plan.tokens_per_clip > 0


def test_rates_follow_from_peak_and_mfu(data: Path) -> None:
    config = config_of(data, training__steps=1000, training__precision="bf16")
    plan = make_plan(config, gpus=2, device="h200", mfu=0.5)
    assert plan.speed is not None
    rate = 2 * 0.5 * 989.4e12 / plan.flops_per_clip
    assert plan.speed.clips_per_second == pytest.approx(rate)
    assert plan.speed.days == pytest.approx(1000 * 8 / rate / 86400)
    assert plan.speed.read_bytes_per_second == pytest.approx(rate * 96)
    assert plan.total_tokens == 1000 * 8 * 12
    fp16 = make_plan(config_of(data), gpus=2, device="v100", mfu=0.5)
    assert fp16.speed is not None
    assert make_plan(config_of(data, training__precision="bf16"), device="t4").speed is None, "no peak, no guess"


def test_states_by_stage() -> None:
    config = TrainConfig.model_validate(settings(Path("run"), Path("data"), training__precision="bf16"))
    million = 1_000_000_000
    states = [memory_per_rank(config, million, 8, 0, stage=stage) for stage in range(4)]
    # bf16 weights and gradients 2 + 2, fp32 masters and two moments 12, one average of which each rank holds a share.
    assert states[0].weights + states[0].gradients + states[0].masters + states[0].moments == 16 * million
    assert states[1].masters + states[1].moments == 12 * million // 8
    # Two buckets of 50 million, and what is not in one of them.
    assert states[1].gradients == 2 * million + 2 * 50_000_000
    assert states[1].reserved == states[2].reserved == 2 * 2 * 50_000_000
    assert states[2].gradients < 2 * million // 3
    assert all(state.averages == 4 * million // 8 for state in states)
    assert states[0].total > states[1].total > states[2].total
    assert (
        memory_per_rank(config, million, 1, 7, stage=0).total == memory_per_rank(config, million, 1, 0, stage=0).total
    )
    many = memory_per_rank(config, million, 1, 9 * million, stage=0)
    assert many.total == (2 + 12 + 4 + 9) * million, "activations above all that the optimiser's step needs"
    few = memory_per_rank(config, million, 1, 0, stage=0)
    assert few.total == (2 + 12 + 4 + 6) * million, "gradients once more in fp32 for the step"
    assert few.buffers == 2 * 500_000_000, "reduced in copies, also alone"
    sums = config.model_copy(
        update={"training": config.training.model_copy(update={"grad_accumulation": "fp32", "zero_stage": 1})}
    )
    whole = memory_per_rank(sums, million, 8, 0, stage=1)
    assert (whole.reserved, whole.gradients) == (4 * million, 6 * million)
    assert memory_per_rank(sums, million, 8, 0, stage=0) == states[0], "there are no such sums"


@pytest.mark.parametrize(("stage", "offload"), [(1, "optimizer"), (3, "parameters")])
def test_what_is_offloaded_stays_where_the_device_is_the_host(stage: int, offload: str) -> None:
    changes = {"training__zero_stage": stage}
    kept = TrainConfig.model_validate(settings(Path("run"), Path("data"), **changes))
    put_away = TrainConfig.model_validate(
        settings(Path("run"), Path("data"), training__offload=offload, training__guard="deepspeed", **changes)
    )
    host = memory_per_rank(put_away, 1000, 2, 0, gloo=True)
    assert host == memory_per_rank(kept, 1000, 2, 0, gloo=True)
    device = memory_per_rank(put_away, 1000, 2, 0)
    assert (device.masters, device.moments, device.averages, device.update) == (0, 0, 0, 0)
    assert (device.weights, host.weights) == ((0, 2000) if stage == 3 else (4000, 4000))


def test_live_bytes_are_those_of_tensors_alive() -> None:
    with LiveBytes() as live:
        first = torch.ones(1000)
        view = first[10:]
        second = first * 2
        del first
        assert live.now == 8000, "a view keeps its storage"
        del view, second
        assert live.now == 0
    assert live.peak == 8000


def test_activations_grow_with_depth_and_clips_and_shrink_with_checkpointing(data: Path) -> None:
    config = config_of(data, denoiser__depth=6)
    planned = activation_bytes(config, 4, 2)
    assert activation_bytes(config, 4, 4) == {mode: 2 * size for mode, size in planned.items()}
    assert activation_bytes(config_of(data, denoiser__depth=12), 4, 2)["none"] > 1.7 * planned["none"]
    assert planned["full"] < planned["selective"] < planned["none"]


def test_the_line_through_two_depths_meets_a_deeper_model(data: Path) -> None:
    line = activation_bytes(config_of(data, denoiser__depth=5), 4, 3)["none"]
    kept = [kept_bytes(config_of(data), 4, 5, clips, "none") for clips in (1, 4)]
    assert line == pytest.approx(kept[1] - kept[0], rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ({"gpus": 3}, 2, "legal numbers of ranks"),
        ({"device": "h20"}, 2, "did you mean 'h200'"),
        ({"mfu": 0.0}, 2, "legal: above 0"),
    ],
)
def test_refusals(data: Path, arguments: dict[str, Any], code: int, text: str) -> None:
    with pytest.raises(ArdistError, match=text) as refused:
        make_plan(config_of(data), **arguments)
    assert refused.value.exit_code == code


def test_without_data_the_frames_must_be_given(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", tmp_path / "absent")
    with pytest.raises(ArdistError, match="--frames"):
        make_plan(config)
    plan = make_plan(config, num_frames=16)
    assert plan.tokens_per_clip == 48
    assert "not there yet" in plan.notes[0]


def test_tables_show_what_fits(data: Path) -> None:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in plan_tables(make_plan(config_of(data), gpus=2)):
        console.print(table)
    text = console.export_text()
    for words in ("denoiser on 2 x H200", "40% MFU", "time to finish", "data to read", "checkpointing full", "ZeRO"):
        assert words in text
    assert (size(3 * 2**30), size(200 * 2**20), size(10)) == ("3 GiB", "200 MiB", "10 B")


def buckets(tmp_path: Path, **changes: Any) -> TrainConfig:
    """Clips of four frames and images, with as many tokens in a batch of either."""
    mixture = [
        {"path": str(write_latents(tmp_path / "images", frames=1, samples=128)), "weight": 1},
        {"path": str(write_latents(tmp_path / "clips", seed=1)), "weight": 3},
    ]
    values = settings(tmp_path / "run", tmp_path, **{"training__steps": 1000, **changes})
    values["data"] |= {"path": "", "mixture": mixture, "mixture_by": "step", "tokens_per_batch": 100}
    return TrainConfig.model_validate(values)


def test_buckets_are_counted_each_with_its_own_batch(tmp_path: Path) -> None:
    config = buckets(tmp_path)
    assert config.denoiser is not None
    plan = make_plan(config, gpus=2, mfu=0.5)
    # 100 tokens hold 8 clips of 12 tokens, or 32 images of 3: multiples of the 4 lanes.
    assert [(kind.frames, kind.global_batch, kind.micro_batch) for kind in plan.kinds] == [(4, 8, 2), (1, 32, 8)]
    assert [kind.share for kind in plan.kinds] == [0.75, 0.25]
    assert (plan.num_frames, plan.micro_batch_size, plan.accumulation) == (4, 2, 2)
    assert plan.total_clips == 750 * 8 + 250 * 32
    assert plan.total_tokens == 750 * 8 * 12 + 250 * 32 * 3
    assert plan.samples == 64 + 128
    flops = (
        750 * 8 * denoiser_flops(config.denoiser, 4).training + 250 * 32 * denoiser_flops(config.denoiser, 1).training
    )
    assert plan.speed is not None
    assert plan.speed.days * 86400 == pytest.approx(flops / (0.5 * 67e12 * 2))
    assert plan.speed.clips_per_second == pytest.approx(plan.total_clips / (plan.speed.days * 86400))
    # The kind of step that needs most decides: eight images are not two clips.
    needed = [activation_bytes(config, kind.frames, kind.micro_batch) for kind in plan.kinds]
    for mode in ("none", "full"):
        assert plan.memory[0, mode].activations == max(one[mode] for one in needed)
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in plan_tables(plan):
        console.print(table)
    text = console.export_text()
    assert "2 clips x 2 x 2 ranks: 75% of the steps, 4 frames each" in text
    assert "8 clips x 2 x 2 ranks: 25% of the steps, 1 frames each" in text


def test_buckets_that_cannot_be_are_refused_as_in_training(tmp_path: Path) -> None:
    with pytest.raises(ArdistError, match="the global batch size is that of the longest samples: 8, not 16"):
        make_plan(buckets(tmp_path, training__global_batch_size=16))


@pytest.mark.parametrize("trainable", ["all", "temporal"])
@pytest.mark.parametrize("mode", autoencoder.MODES)
def test_the_passes_of_an_autoencoder_need_what_is_said_without_making_them(
    tmp_path: Path, trainable: str, mode: str
) -> None:
    changes = {"ar_vae__temporal": True, "trainable": trainable, "init_from": str(tmp_path / "stage-1")}
    config = ar_vae_config(tmp_path / "run", tmp_path / "pixels", **changes)
    for clips in (2, 4):
        planned, needed = (
            autoencoder.peak_bytes(config, 3, (32, 32), clips, mode, device) for device in ("meta", "cpu")
        )
        # Kernels of a CPU keep scratch tensors of their own.
        assert list(planned) == pytest.approx(list(needed), rel=0.1)


def test_the_discriminators_backward_pass_goes_as_far_as_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the frames, which DeepSpeed cannot be told to leave out: once for each of the two losses."""
    reached = []

    class Judge(PatchDiscriminator):
        def forward(self, frames: torch.Tensor) -> torch.Tensor:
            if frames.requires_grad:
                frames.register_hook(lambda gradient: reached.append(gradient.shape))
            return super().forward(frames)

    monkeypatch.setattr(autoencoder, "PatchDiscriminator", Judge)
    autoencoder.peak_bytes(ar_vae_config(tmp_path / "run", tmp_path / "pixels"), 3, (32, 32), 1, "none")
    assert reached == [(1, 3, 3, 32, 32)] * 2


def test_memory_of_an_autoencoder_by_stage_of_training(tmp_path: Path) -> None:
    pixels = write_pixels(tmp_path / "pixels")
    plain = make_plan(ar_vae_config(tmp_path / "run", pixels))
    judged = plain.memory[0, "none"]
    alone = make_plan(ar_vae_config(tmp_path / "run", pixels, ar_vae_loss={})).memory[0, "none"]
    assert judged.activations > alone.activations, "the discriminator's passes count"
    assert plain.memory[0, "full"].activations < judged.activations
    assert plain.chosen in plain.memory
    half = make_plan(ar_vae_config(tmp_path / "run", pixels, training__micro_batch_size=1)).memory[0, "none"]
    assert judged.activations == plain.micro_batch_size * half.activations
    # Stage 2: what is frozen is there, but has no gradients, no optimiser and no averages.
    changes = {"ar_vae__temporal": True, "trainable": "temporal", "init_from": str(tmp_path / "stage-1")}
    config = ar_vae_config(tmp_path / "run", pixels, ar_vae_loss={}, **changes)
    frozen = make_plan(config).memory[0, "none"]
    trained = count_trained(config)
    assert 0 < trained < count_parameters(config)
    assert frozen.weights == 4 * count_parameters(config)
    assert (frozen.gradients, frozen.moments) == (4 * trained, 8 * trained)


def test_memory_of_a_discriminator_is_that_of_its_own_engine(tmp_path: Path) -> None:
    """In fp32, sharded up to stage 2, with buckets of its own size, without averages; nothing of it is put away."""
    pixels = write_pixels(tmp_path / "pixels")
    losses = {"adversarial_weight": 0.5, "discriminator_channels": 4, "discriminator_layers": 1}
    numbers = sum(parameter.numel() for parameter in PatchDiscriminator(4, 1).parameters())

    def planned(device: str, **changes: Any) -> dict[int, Memory]:
        table = make_plan(ar_vae_config(tmp_path / "run", pixels, **changes), gpus=2, device=device).memory
        return {stage: memory for (stage, mode), memory in table.items() if mode == "none"}

    half = -(-numbers // 2)
    assert numbers < 2**16
    for device in ("h200", "cpu"):
        judged, alone = planned(device, ar_vae_loss=losses), planned(device, ar_vae_loss={})
        for stage in range(4):
            more = {
                name: getattr(judged[stage], name) - getattr(alone[stage], name)
                for name in (
                    "weights",
                    "gathered",
                    "masters",
                    "moments",
                    "averages",
                    "snapshots",
                    "reserved",
                    "gradients",
                )
            }
            share = numbers if stage == 0 else half
            laid = 2 * 4 * 2**16 * (device == "h200")
            assert more == {
                "weights": 4 * numbers,
                "gathered": 0,
                "masters": 4 * share * (stage > 0),
                "moments": 8 * share,
                "averages": 0,
                "snapshots": 12 * numbers * (device == "cpu"),
                "reserved": laid * (stage > 0),
                # From stage 2 on what was reduced is kept beside the buckets, to be added up.
                "gradients": (4 * numbers if stage == 0 or device == "cpu" else laid) + 4 * half * (stage >= 2),
            }
            assert judged[stage].total > alone[stage].total


def test_processes_of_this_machine_have_no_peak_rate(data: Path) -> None:
    plan = make_plan(config_of(data), gpus=2, device="cpu")
    assert plan.speed is None
    assert plan.device_bytes == psutil.virtual_memory().total
    memory = plan.memory[1, "none"]
    assert memory.snapshots == memory.masters + memory.moments + memory.averages, "checkpoints are written from copies"
    assert make_plan(config_of(data), gpus=2).memory[1, "none"].snapshots == 0, "which a GPU has on the host"
    assert any("beyond its bare process" in note for note in plan.notes)
