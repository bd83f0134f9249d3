"""The discriminator of the AR-VAE's stage 1 in training: its gradients, its optimiser, its state (METHOD section 5).

It is a small module with an AdamW of its own, whole on every rank in fp32, and no second DeepSpeed engine. At full
size (2.8M parameters beside 641M) sharding its 44 MB would save each rank 0.4 % of what ZeRO-0 holds for the
autoencoder. And an engine refuses what is needed here: after a gradient at the frames was taken through its model,
ZeRO-1 of DeepSpeed 0.19.8 ends its own backward pass with an IndexError in ``reduce_ipg_grads`` (tried with two ranks).
So all ranks hold it and average its gradients themselves, once per step, in the same reduction that brings the last
layer's gradients together.

Both sides learn in every step, from one pass of the discriminator over the reconstructions. The adaptive weight is
that of the step before: both norms are then of the whole global batch, and neither the number of ranks nor the
micro-batch size changes the loss curve. In the first step, when the discriminator has learned nothing yet, it is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from ardist import fault
from ardist.config import TrainConfig, batch_layout
from ardist.errors import CheckpointError
from ardist.events import events
from ardist.models.ar_vae.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_hinge_loss,
    generator_hinge_loss,
)
from ardist.training.distributed import World
from ardist.training.fragments import MOMENTS

ADVERSARY_FILE = "discriminator.safetensors"
_SEED_OFFSET = 1


class Verdict(NamedTuple):
    """What the discriminator says of a micro-batch: the autoencoder's loss, its gradient at the frames, numbers."""

    loss: Float[Tensor, ""]
    gradient: Float[Tensor, "b f 3 h w"]
    terms: dict[str, Tensor]


class Adversary:
    """The discriminator and its optimiser; equal on every rank at every time."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config = config.ar_vae_loss
        self.world = world
        self.accumulation = batch_layout(config.training, world.size)[1]
        self.clip = config.optimizer.grad_clip
        self.lr_ratio = (self.config.discriminator_lr or config.optimizer.lr) / config.optimizer.lr
        self.autocast = torch.autocast(
            world.device.type, torch.bfloat16, enabled=config.training.precision == "bf16", cache_enabled=False
        )
        with torch.random.fork_rng(devices=[]):  # the autoencoder's own weights do not depend on whether we are here
            torch.manual_seed(config.seed + _SEED_OFFSET)
            self.model = PatchDiscriminator(self.config.discriminator_channels, self.config.discriminator_layers)
        self.model.to(world.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.optimizer.lr * self.lr_ratio,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )
        self.active = False
        self.weight = torch.zeros((), device=world.device)
        """The adaptive weight for the present step."""
        self.skipped_alone = torch.zeros((), device=world.device)
        """Steps that only the discriminator had to skip."""
        self._sizes = [parameter.numel() for parameter in self.model.parameters()]
        self._sums = torch.empty(0)
        self._pulls: list[Tensor] = []

    def begin(self, step: int) -> None:
        """Before optimiser step `step` (0-based): take part from ``adversarial_start`` on."""
        self.active = step >= self.config.adversarial_start
        self._pulls = []

    def judge(self, reconstruction: Float[Tensor, "b f 3 h w"], frames: Float[Tensor, "b f 3 h w"]) -> Verdict:
        """Judge a micro-batch, and add to the discriminator's gradients what it learns from it.

        `reconstruction` is a leaf that requires a gradient; nothing flows on from it.
        """
        with self.autocast:
            fake, real = self.model(reconstruction), self.model(frames)
        loss = generator_hinge_loss(fake)
        (gradient,) = torch.autograd.grad(loss, reconstruction, retain_graph=True)
        own = discriminator_hinge_loss(real, fake)
        if (factor := fault.point("adversary.loss")) is not None:
            own = own * float(factor or "nan")
        parameters = list(self.model.parameters())
        (own / self.accumulation).backward(inputs=parameters)
        terms = {
            "generator": loss.detach(),
            "discriminator": own.detach(),
            "logits_real": real.detach().mean(),
            "logits_fake": fake.detach().mean(),
            "adaptive_weight": self.weight,
        }
        return Verdict(loss.detach(), gradient, terms)

    def compare(self, reconstruction: Float[Tensor, "3 c 3 3"], adversarial: Float[Tensor, "3 c 3 3"]) -> None:
        """Add one micro-batch's gradients of both losses at the autoencoder's last layer."""
        both = torch.stack([reconstruction, adversarial]) / self.accumulation
        self._pulls = [both if not self._pulls else self._pulls[0] + both]

    @torch.no_grad()
    def step(self, lr: float, skipped: Tensor | bool) -> None:
        """Update the discriminator with learning rate `lr` of the autoencoder's schedule; collective, no host read.

        Nothing changes when the autoencoder's step was `skipped` or the own gradient is not finite on any rank.
        """
        if not self.active:
            return
        parameters = list(self.model.parameters())
        gradients = [parameter.grad for parameter in parameters]
        assert all(gradient is not None for gradient in gradients)
        flat = torch.cat([part.flatten() for part in (*gradients, *self._pulls) if part is not None])
        if self.world.size > 1:
            dist.all_reduce(flat)
            flat /= self.world.size
        own, pulls = flat.split([sum(self._sizes), flat.numel() - sum(self._sizes)])
        for parameter, part in zip(parameters, own.split(self._sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        norm = own.norm()
        bad = ~torch.isfinite(norm)
        theirs = skipped > 0 if isinstance(skipped, Tensor) else torch.full_like(bad, skipped)
        self.skipped_alone += (bad & ~theirs).float()
        bad = bad | theirs
        for group in self.optimizer.param_groups:
            group["lr"] = lr * self.lr_ratio
        scale = ((norm + 1e-6) / self.clip).clamp(min=1.0) if self.clip else torch.ones_like(norm)
        # The fused kernel divides by the one and leaves weights, moments and step count alone for the other.
        self.optimizer.grad_scale = torch.where(bad, torch.ones_like(scale), scale)  # type: ignore[attr-defined]
        self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        fresh = adaptive_weight(*pulls.chunk(2))
        self.weight = torch.where(bad | ~torch.isfinite(fresh), self.weight, fresh)

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint must hold, as copies on the host; equal on every rank."""
        state = {"adaptive_weight": self.weight, "skipped_alone": self.skipped_alone}
        for name, parameter in self.model.named_parameters():
            state[f"master.{name}"] = parameter
            moments = self.optimizer.state.get(parameter, {})
            state |= {f"{kind}.{name}": moments[kind] for kind in (*MOMENTS, "step") if kind in moments}
        return {name: value.detach().cpu().clone() for name, value in state.items()}

    def restore(self, checkpoint: Path, files: Sequence[str]) -> None:
        """Continue from a checkpoint; one that was written without a discriminator leaves this one new."""
        if ADVERSARY_FILE in files:
            self.load(load_file(checkpoint / ADVERSARY_FILE), str(checkpoint))
        elif self.world.is_main:
            events.count("training.new_discriminator", checkpoint=checkpoint)

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], source: str) -> None:
        """Take over a saved state bit for bit; `CheckpointError` when it is of another discriminator."""
        shapes = {f"master.{name}": tuple(p.shape) for name, p in self.model.named_parameters()}
        saved = {name: tuple(value.shape) for name, value in state.items() if name.startswith("master.")}
        if shapes != saved:
            raise CheckpointError(
                f"{source} holds another discriminator: set ar_vae_loss.discriminator_channels and "
                "discriminator_layers to what they were, or begin a new run with init_from"
            )
        self.weight = state["adaptive_weight"].to(self.world.device)
        self.skipped_alone = state["skipped_alone"].to(self.world.device)
        for name, parameter in self.model.named_parameters():
            parameter.copy_(state[f"master.{name}"])
            kinds = [kind for kind in (*MOMENTS, "step") if f"{kind}.{name}" in state]
            self.optimizer.state[parameter] = {
                kind: state[f"{kind}.{name}"].to(self.world.device).clone() for kind in kinds
            }
            if not kinds:
                del self.optimizer.state[parameter]


def build_adversary(config: TrainConfig, world: World) -> Adversary | None:
    """The discriminator that ``ar_vae_loss`` asks for; None without one."""
    wanted = config.task == "ar_vae" and config.ar_vae_loss.adversarial_weight > 0
    return Adversary(config, world) if wanted else None
