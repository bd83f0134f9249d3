"""Between log points the loop never reads a value back from the device: counted, per kind of guard."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import tiny_config, write_latents
from torch.utils._python_dispatch import TorchDispatchMode

from ardist.config import TrainConfig
from ardist.diffusion import counter_rng
from ardist.diffusion.noise import NoiseSchedule
from ardist.training.callbacks import Callback
from ardist.training.trainer import Trainer, train

pytestmark = pytest.mark.distributed


class Counter(TorchDispatchMode):
    """Counts the operators that make the host wait for a value, with the line that asked for it."""

    READS = ("_local_scalar_dense", "nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket.__name__ in self.READS:
            self.reads.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


class MethodCounter:
    """Counts what copies whole tensors to the host, which on a CPU no operator shows; names who asked for it.

    Batches are born on the host, so what the loader's package does to them is no read.
    """

    METHODS = ("tolist", "numpy", "cpu")

    def __init__(self) -> None:
        self.reads: list[str] = []
        self._usual: dict[str, Any] = {}

    def __enter__(self) -> None:
        for name in self.METHODS:
            self._usual[name] = getattr(torch.Tensor, name)
            setattr(torch.Tensor, name, self._counted(name))

    def __exit__(self, *_: object) -> None:
        for name, method in self._usual.items():
            setattr(torch.Tensor, name, method)

    def _counted(self, name: str) -> Any:
        usual = self._usual[name]

        def method(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1)
            where = f"{Path(caller.f_code.co_filename).parent.name}/{Path(caller.f_code.co_filename).name}"
            if threading.current_thread() is threading.main_thread() and not where.startswith("data/"):
                self.reads.append(f"{name} in {where}:{caller.f_lineno}")
            return usual(tensor, *args, **kwargs)

        return method


class CountedSteps(Callback):
    """Counts from the end of step 2 to the end of step 6; the next log point is step 8."""

    def __init__(self) -> None:
        self.counter, self.methods = Counter(), MethodCounter()

    def after_step(self, trainer: Trainer) -> None:
        if trainer.step == 2:
            self.counter.__enter__()
            self.methods.__enter__()
        if trainer.step == 6:
            self.methods.__exit__()
            self.counter.__exit__(None, None, None)


def _count(config: TrainConfig) -> list[str]:
    # On a CPU the schedule looks at its timesteps, and small draws are NumPy's; on a device neither is so.
    counter_rng.HOST_BLOCKS = 0
    NoiseSchedule.check = lambda self, timesteps: None  # type: ignore[method-assign]
    counted = CountedSteps()
    train(config, [counted])
    return counted.counter.reads + counted.methods.reads


@pytest.mark.parametrize(
    ("stage", "guard", "per_step"),
    [
        (0, "deepspeed", 0),
        (0, "device", 0),
        (1, "device", 0),
        (2, "device", 0),
        (1, "deepspeed", 3),
        (3, "deepspeed", 1),
    ],
)
def test_host_reads_per_step(tmp_path: Path, stage: int, guard: str, per_step: int) -> None:
    data = write_latents(tmp_path / "latents", classes=2)
    config = tiny_config(
        tmp_path / "run",
        data,
        training__steps=8,
        training__log_every=8,
        training__zero_stage=stage,
        training__guard=guard,
        denoiser__num_classes=2,
        debug__log_sample_ids=False,
    )
    [reads] = run_ranks(_count, 1, config)
    assert len(reads) == 4 * per_step, reads
