"""Parameters that a run does not train, such as all but the temporal blocks in stage 2 of the AR-VAE."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class FrozenWeights:
    """The frozen parameters of a model, in the fp32 they were given in.

    An engine in bf16 or fp16 works on a rounded copy. What is saved and exported must not be rounded: the encoder of a
    stage-2 export is that of stage 1, bit for bit.
    """

    def __init__(self, module: nn.Module, *, rounded: bool, main: bool) -> None:
        """To be made before the engine; `rounded`: it will cast the weights, so that a copy is kept on rank 0."""
        self.module = module
        self.main = main
        self.rounded = rounded
        frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
        self.shapes = {name: list(p.shape) for name, p in frozen.items()}
        self._kept = {name: _host(p) for name, p in frozen.items()} if rounded and main else {}

    @torch.no_grad()
    def assign(self, values: Mapping[str, Tensor]) -> None:
        """Set some of them from whole fp32 tensors that every rank has (collective)."""
        from deepspeed.runtime.zero import GatheredParameters

        targets = {name: p for name, p in self.module.named_parameters() if name in values}
        partitioned = [p for p in targets.values() if hasattr(p, "ds_id")]
        with GatheredParameters(partitioned, modifier_rank=0, enabled=bool(partitioned)):
            for name, parameter in targets.items():
                parameter.data.copy_(values[name])
        if self._kept:
            self._kept |= {name: _host(values[name]) for name in targets}

    @torch.no_grad()
    def whole(self) -> dict[str, Tensor]:
        """All of them, whole, fp32, on the host of rank 0; under ZeRO-3 they are partitioned (collective)."""
        if self.rounded or not self.shapes:
            return dict(self._kept)
        from deepspeed.runtime.zero import GatheredParameters

        frozen = {name: p for name, p in self.module.named_parameters() if name in self.shapes}
        partitioned = [p for p in frozen.values() if hasattr(p, "ds_id")]
        with GatheredParameters(partitioned, enabled=bool(partitioned)):
            return {name: _host(p) for name, p in frozen.items()} if self.main else {}


def _host(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().clone()
