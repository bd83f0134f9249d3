"""Packed linear layers against ordinary ones, and a sampler that packs its weights anew for every run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import nn

from ardist.diffusion.noise import NoiseSchedule
from ardist.inference.sampler import ADSampler
from ardist.models.denoiser import Denoiser, preset
from ardist.models.packed_linear import PackedLinear, can_pack, pack_linears
from ardist.models.parallelize import parallelize

packs = pytest.mark.skipif(not can_pack(torch.empty(1)), reason="this build of PyTorch has no oneDNN kernels")


@packs
@pytest.mark.parametrize("shape", [(1, 24), (2, 32, 24), (3, 7, 5, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_is_the_layer(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(24, 40, bias=bias)
    x = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(PackedLinear(linear)(x), linear(x), rtol=1e-5, atol=1e-6)
        strided = x.transpose(0, -2)
        torch.testing.assert_close(PackedLinear(linear)(strided), linear(strided), rtol=1e-5, atol=1e-6)


@packs
def test_only_the_layers_that_are_not_kept_are_packed() -> None:
    module = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.LayerNorm(4)})
    pack_linears(module, keep=("b",))
    assert [type(child) for child in module.values()] == [PackedLinear, nn.Linear, nn.LayerNorm]


def test_other_types_and_devices_are_left_alone() -> None:
    assert not can_pack(torch.empty(1, dtype=torch.bfloat16))
    assert not can_pack(torch.empty(1, dtype=torch.float64))
    assert not can_pack(torch.empty(1, device="meta"))


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    forward = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: calls.append(1) or forward(self, x))
    return calls


def test_wrapped_blocks_and_layers_that_do_more_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)
    denoiser = parallelize(Denoiser(preset("tiny")).eval(), activation_checkpointing="full")
    ADSampler(denoiser, NoiseSchedule.create()).sample(2, num_inference_steps=2, difference=1)
    assert not calls

    class Adapted(nn.Linear):
        """More than a product, as an adapter is."""

    module = nn.ModuleDict({"a": Adapted(4, 4), "b": nn.Linear(4, 4)})
    module["b"].register_forward_hook(lambda *_: None)
    pack_linears(module)
    assert not any(isinstance(child, PackedLinear) for child in module.values())


@packs
def test_a_run_packs_the_weights_of_its_day(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    denoiser = Denoiser(preset("tiny")).eval()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    calls = count_calls(monkeypatch)
    sampler = ADSampler(denoiser, NoiseSchedule.create())

    def sample() -> torch.Tensor:
        return sampler.sample(3, num_inference_steps=4, difference=2)

    before = sample()
    assert calls
    assert not any(isinstance(module, PackedLinear) for module in denoiser.modules())
    with torch.no_grad():
        denoiser.blocks[0].mlp_output.weight.mul_(2)  # type: ignore[union-attr, operator]
    after = sample()
    assert (after - before).abs().max() > 1e-3
    monkeypatch.setattr("ardist.inference.sampler.can_pack", lambda _: False)
    unpacked = ADSampler(denoiser, NoiseSchedule.create()).sample(3, num_inference_steps=4, difference=2)
    torch.testing.assert_close(after, unpacked, rtol=1e-5, atol=1e-5)


@pytest.fixture
def benchmark(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("packed_linear")


@packs
def test_the_benchmark_times_the_layers_that_a_sampler_packs(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds: list[set[type]] = []
    timed = benchmark.timed
    monkeypatch.setattr(
        benchmark, "timed", lambda layers, *rest: (kinds.append({type(x) for x in layers}), timed(layers, *rest))[1]
    )
    monkeypatch.setattr(benchmark, "ROWS", (3, 40))
    monkeypatch.setattr(sys, "argv", ["packed_linear.py", "--preset", "tiny", "--threads", "1", "--repeats", "1"])
    benchmark.main()
    shown = capsys.readouterr().out
    # Two warming turns and one that counts, for each number of rows: plain layers and packed ones in turn.
    assert kinds == [{nn.Linear}, {PackedLinear}] * 6
    assert "tiny, 16 layers, fp32" in shown
    assert len([line for line in shown.splitlines() if line.rstrip("│ ").endswith("x")]) == 2
