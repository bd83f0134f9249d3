"""Throughput, run directories, the window of a log point, DeepSpeed's settings."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_config

from ardist.errors import HardwareError
from ardist.training.callbacks.metrics import console_line
from ardist.training.callbacks.replicas import ReplicaCheck, checksums, who_differs
from ardist.training.distributed import World, environment
from ardist.training.ema import warmed_decay
from ardist.training.engine import Engine, deepspeed_settings
from ardist.training.parts import ema_kind
from ardist.training.run_dir import append_line
from ardist.training.throughput import Throughput, peak_flops
from ardist.training.window import Window


def test_peaks_are_known_or_not_but_never_guessed() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-40GB", "fp32") == 19.5e12
    assert peak_flops("Tesla T4", "bf16") is None
    assert peak_flops("CPU", "bf16") is None
    assert peak_flops("NVIDIA Something New", "bf16") is None
    assert peak_flops("NVIDIA GeForce RTX 4090", "bf16") == 165.2e12
    assert peak_flops("NVIDIA RTX A6000", "bf16") == 154.8e12
    for other in ("RTX 4090 Laptop GPU", "RTX 4090 D", "RTX 3090 Ti", "RTX A1000 Laptop GPU", "T400 4GB", "GB200"):
        assert peak_flops(f"NVIDIA {other}", "fp16") is None, other


def test_rates() -> None:
    throughput = Throughput(
        tokens_per_clip={16: 512, 1: 32}, flops_per_clip={16: 1e12, 1: 5e10}, world_size=2, peak=1e13
    )
    rates = throughput.rates({16: 80}, 10, 4)
    assert rates == {
        "step_seconds": 0.4,
        "clips_per_second": 20.0,
        "tokens_per_second": 10240.0,
        "tflops": 20.0,
        "mfu": 1.0,
    }
    mixed = throughput.rates({16: 40, 1: 600}, 10, 4)
    assert (mixed["clips_per_second"], mixed["tokens_per_second"], mixed["tflops"]) == (160.0, 9920.0, 17.5)
    unknown = Throughput(tokens_per_clip={16: 512}, flops_per_clip={16: 1e12}, world_size=2, peak=None)
    assert unknown.rates({16: 80}, 10, 4)["tflops"] == 20.0
    assert unknown.rates({16: 80}, 10, 4)["mfu"] is None
    line = console_line({"step": 3, "loss": 0.25, **unknown.rates({16: 80}, 10, 4)}, 9)
    assert "step 3/9 · loss 0.2500 · grad n/a" in line
    assert "MFU n/a" in line
    uncounted = Throughput(tokens_per_clip={16: 512}, flops_per_clip={16: 0.0}, world_size=2, peak=1e13)
    assert (uncounted.rates({16: 80}, 10, 4)["tflops"], uncounted.rates({16: 80}, 10, 4)["mfu"]) == (None, None)


def test_a_line_left_unfinished_by_a_killed_run_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"step": 1})
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"step": 2, "lo')
    append_line(path, {"step": 3})
    lines = path.read_text().splitlines()
    assert [json.loads(lines[0]), json.loads(lines[2])] == [{"step": 1}, {"step": 3}]


def test_window_means_over_micro_batches() -> None:
    window = Window()
    for value in (1.0, 2.0, 6.0):
        window.add(torch.tensor(value), {"per_frame": torch.tensor([value, 0.0])})
    assert window.means(World(0, 1, torch.device("cpu"))) == {"loss": 3.0, "per_frame": [3.0, 0.0]}


@pytest.mark.parametrize("frames", [[1, 3, 3], [1, 1], [3]])
def test_a_window_has_one_name_for_the_frames_of_images_and_another_for_those_of_clips(frames: list[int]) -> None:
    window = Window(longest=3)
    for count in frames:
        window.add(torch.tensor(1.0), {"per_frame": torch.full((count,), float(count)), "by_law": torch.ones(2)})
    means = window.means(World(0, 1, torch.device("cpu")))
    names = {1: "per_frame_1", 3: "per_frame"}
    expected = {names[count]: [float(count)] * count for count in frames}
    assert means == {"loss": 1.0, "by_law": [1.0, 1.0], **expected}


def test_ema_decay_warms_up() -> None:
    assert [warmed_decay(0.999, n) for n in (0, 1, 90)] == [0.1, 2 / 11, 0.91]
    assert warmed_decay(0.999, 10**6) == 0.999


def test_every_deepspeed_setting_comes_from_ours(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path,
        tmp_path,
        training__precision="bf16",
        training__zero_stage=2,
        training__guard="device",
        deepspeed__zero_optimization={"reduce_bucket_size": 7},
        deepspeed__wall_clock_breakdown=True,
    )
    settings = deepspeed_settings(config, 2, cuda=True)
    assert settings["train_batch_size"] == 8
    assert settings["train_micro_batch_size_per_gpu"] * settings["gradient_accumulation_steps"] * 2 == 8
    assert settings["bf16"] == {"enabled": True, "check_grad_overflow": False}
    assert settings["gradient_clipping"] == 0.0, "the guard clips"
    assert settings["zero_optimization"]["reduce_bucket_size"] == 7
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["zero_optimization"]["compute_grad_norm"] is False
    assert settings["wall_clock_breakdown"] is True
    plain = deepspeed_settings(tiny_config(tmp_path, tmp_path), 2, cuda=False)
    assert plain["gradient_clipping"] == 1.0


@pytest.mark.parametrize("values", [("3", "2"), ("x", "2"), ("-1", "2")])
def test_impossible_ranks_are_refused(monkeypatch: pytest.MonkeyPatch, values: tuple[str, str]) -> None:
    monkeypatch.setenv("RANK", values[0])
    monkeypatch.setenv("WORLD_SIZE", values[1])
    with pytest.raises(ValueError, match="RANK"):
        environment()


def test_decays_that_differ_have_names_that_differ() -> None:
    ordinary = {0.9: "ema_0.9", 0.99: "ema_0.99", 0.999: "ema_0.999", 0.9999: "ema_0.9999", 0.0: "ema_0"}
    assert {decay: ema_kind(decay) for decay in ordinary} == ordinary
    near = (0.9999999, 0.99999991, 0.99999990000001)
    assert len({ema_kind(decay) for decay in near}) == len(near)
    assert [float(ema_kind(decay).removeprefix("ema_")) for decay in near] == list(near)


def test_only_a_majority_says_which_replica_is_wrong() -> None:
    assert who_differs([[1, 2]] * 4) is None
    assert who_differs([[1, 2], [9, 9], [1, 2]]) == "the weights of rank 1 differ from those of the other ranks"
    assert who_differs([[9, 9], [1, 2], [1, 2], [8, 8], [1, 2]]) == (
        "the weights of rank 0, 3 differ from those of the other ranks"
    )
    assert who_differs([[9, 9], [1, 2]]) == (
        "the weights of rank 0 and of rank 1 differ, and no majority says which are right"
    )
    assert who_differs([[9, 9], [1, 2], [9, 9], [1, 2]]) == (
        "the weights of rank 0, 2 and of rank 1, 3 differ, and no majority says which are right"
    )


def test_with_zero_3_the_discriminators_are_replicas_all_the_same(tmp_path: Path) -> None:
    judge = torch.nn.Linear(2, 2)
    mine = checksums(judge)
    trainer = SimpleNamespace(
        config=tiny_config(tmp_path, tmp_path, training__zero_stage=3, debug__replica_check_every=2),
        step=2,
        engine=SimpleNamespace(module=torch.nn.Linear(3, 3)),
        adversary=SimpleNamespace(model=judge),
        writer=SimpleNamespace(last_saved=1),
        world=SimpleNamespace(all_gather=lambda sums: [sums, mine, mine]),
    )
    ReplicaCheck().after_step(trainer)  # type: ignore[arg-type]  # the partitioned model is not compared
    with torch.no_grad():
        judge.weight[0, 0] += 1e-6
    with pytest.raises(HardwareError, match="at step 2 the weights of rank 0 differ"):
        ReplicaCheck().after_step(trainer)  # type: ignore[arg-type]


@pytest.mark.parametrize("veto", [True, torch.zeros(())])
def test_a_veto_that_nobody_would_obey_is_refused(veto: bool | torch.Tensor) -> None:
    engine = object.__new__(Engine)
    engine.guard = None
    with pytest.raises(ValueError, match=r"a veto needs training.guard: device"):
        engine.step(1e-3, veto=veto)
