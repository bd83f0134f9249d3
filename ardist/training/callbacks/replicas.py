"""Silent divergence: the weights of all ranks are compared bit for bit now and then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ardist.errors import HardwareError
from ardist.training.callbacks.base import Callback

if TYPE_CHECKING:
    from ardist.training.trainer import Trainer


class ReplicaCheck(Callback):
    """Every ``debug.replica_check_every`` steps: the model, of which ZeRO-3 has no replicas, and the discriminator,
    which is whole on every rank at every stage."""

    def after_step(self, trainer: Trainer) -> None:
        every = trainer.config.debug.replica_check_every
        replicated = [] if trainer.config.training.zero_stage == 3 else [trainer.engine.module]
        replicated += [] if trainer.adversary is None else [trainer.adversary.model]
        if every and trainer.step % every == 0 and replicated:
            sums = [number for module in replicated for number in checksums(module)]
            everyone = trainer.world.all_gather(sums)
            who = who_differs(everyone)
            if who is not None:
                raise HardwareError(
                    f"at step {trainer.step} {who}, which must never happen: look at that machine's memory and GPU. "
                    f"The checkpoint of step {trainer.writer.last_saved} may be older than the damage"
                )


def who_differs(everyone: Sequence[list[int]]) -> str | None:
    """Which ranks have other checksums than most, in words; None when all agree. Without a majority all are named."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for rank, sums in enumerate(everyone):
        groups.setdefault(tuple(sums), []).append(str(rank))
    if len(groups) == 1:
        return None
    largest = max(groups.values(), key=len)
    if 2 * len(largest) > len(everyone):
        odd = sorted((rank for group in groups.values() if group is not largest for rank in group), key=int)
        return f"the weights of rank {', '.join(odd)} differ from those of the other ranks"
    alike = " and of rank ".join(", ".join(group) for group in groups.values())
    return f"the weights of rank {alike} differ, and no majority says which are right"


@torch.no_grad()
def checksums(module: torch.nn.Module) -> list[int]:
    """A weighted sum of the bit patterns of all parameters, two numbers, wrapping around in 64 bits."""
    plain = weighted = 0
    for index, parameter in enumerate(module.parameters()):
        view = torch.int32 if parameter.element_size() == 4 else torch.int16
        total = int(parameter.detach().contiguous().view(-1).view(view).sum(dtype=torch.int64))
        plain, weighted = (plain + total) % 2**63, (weighted + (index + 1) * total) % 2**63
    return [plain, weighted]
