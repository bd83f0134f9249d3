"""Checkpointing and compilation: same numbers, same names, no graph break, no recompilation for other shapes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from denoiser_cases import inputs, random_denoiser
from torch import Tensor

from ardist.errors import InvalidValueError
from ardist.models.denoiser import Denoiser
from ardist.models.parallelize import parallelize


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_checkpointing_changes_memory_and_nothing_else(kind: str) -> None:
    plain = random_denoiser(context_tokens=5, context_dim=6)
    kept: dict[str, int] = {}

    def run(name: str, denoiser: Denoiser) -> tuple[Tensor, dict[str, Tensor]]:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
            out = denoiser(**inputs(denoiser.config)).square().mean()
        kept[name] = sum(sizes)
        out.backward()
        return out.detach(), {n: p.grad for n, p in denoiser.named_parameters() if p.grad is not None}

    expected = run("none", plain)
    changed = parallelize(random_denoiser(context_tokens=5, context_dim=6), activation_checkpointing=kind)
    assert list(changed.state_dict()) == list(plain.state_dict())
    actual = run(kind, changed)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert kept[kind] < kept["none"]


def test_unknown_kind_of_checkpointing_is_refused() -> None:
    with pytest.raises(InvalidValueError, match="selective"):
        parallelize(random_denoiser(), activation_checkpointing="some")


# In a process of its own: the run-time shape checks of the test session are not part of the compiled product.
_PROGRAM = """
import json
import torch
from torch._dynamo.utils import counters
from denoiser_cases import inputs, random_denoiser
from ardist.diffusion.noise import NoiseSchedule
from ardist.inference.sampler import ADSampler
from ardist.models.parallelize import parallelize

changes = dict(context_tokens=5, context_dim=6, num_classes=3, depth=3)
report = {"trained": {}}
for kind, attention in (("none", "auto"), ("none", "flash"), ("selective", "auto"), ("full", "auto")):
    torch._dynamo.reset()
    counters.clear()
    plain = random_denoiser(**changes, attention_backend=attention)
    compiled = random_denoiser(**changes, attention_backend=attention)
    parallelize(compiled, activation_checkpointing=kind, compile=True, backend="aot_eager")
    graphs, worst = [], 0.0
    for batch, frames in ((4, 4), (3, 7), (2, 16)):
        arguments = inputs(plain.config, batch, frames)
        for denoiser in (plain, compiled):
            denoiser.zero_grad()
            denoiser(**arguments).square().mean().backward()
        pairs = zip(plain.parameters(), compiled.parameters())
        worst = max([worst, *((p.grad - q.grad).abs().max().item() for p, q in pairs if p.grad is not None)])
        graphs.append(counters["stats"]["unique_graphs"])
    seen = {"graphs": graphs, "worst": worst, "breaks": dict(counters["graph_break"])}
    report["trained"][kind + " " + attention] = seen
sampled = []
for denoiser in (plain, compiled):
    sampler = ADSampler(denoiser, NoiseSchedule.create(), window=3)
    before = counters["stats"]["unique_graphs"]
    videos = [sampler.sample(n, num_inference_steps=4, difference=s, batch_size=2) for n, s in ((5, 2), (8, 4), (6, 0))]
    sampled.append(torch.cat(videos, dim=1))
    report["sampling_graphs"] = counters["stats"]["unique_graphs"] - before
report["sampling_error"] = (sampled[0] - sampled[1]).abs().max().item()
print(json.dumps(report))
"""


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_blocks_compile_without_a_break_and_once_for_all_shapes(pytestconfig: pytest.Config) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        cwd=pytestconfig.rootpath / "tests" / "models",
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    # Two halves, times: the context alone, one frame, several frames.
    assert 0 < report.pop("sampling_graphs") <= 6
    assert report.pop("sampling_error") < 1e-5
    for kind, seen in report["trained"].items():
        assert seen["graphs"] == [1, 1, 1], f"{kind}: one program for all blocks, attention in it, for every shape"
        assert seen["breaks"] == {}, kind
        assert seen["worst"] < 1e-6, kind
