"""The discriminator of the AR-VAE's stage 1 in training: its gradients, its engine, its state (METHOD section 5).

It trains under a DeepSpeed engine of its own, beside the autoencoder's: in fp32, with the autoencoder's ZeRO stage up
to 2. Its weights stay whole on every rank (2.8M parameters beside 641M), its gradients and AdamW's state are
partitioned as the stage says.

The autoencoder needs the discriminator's gradient at the frames. DeepSpeed 0.19.8 hangs hooks on what an engine puts
out and takes every gradient that reaches them for the engine's own backward pass, at whose end it reduces gradients
that nobody has made: an IndexError in ``reduce_ipg_grads`` with ZeRO 1 and 2, a RuntimeError with ZeRO-0. So that
gradient is taken within the forward pass of the engine's module, before there are outputs; hooks on weights do not
fire, as it is one with respect to the frames only. The engine's own backward pass goes as far as the frames too, since
DeepSpeed takes no list of what to differentiate; what it leaves there is thrown away. They are a leaf: it ends there.

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
from torch import Tensor, nn

from ardist import fault
from ardist.config import TrainConfig
from ardist.errors import CheckpointError
from ardist.events import events
from ardist.models.ar_vae.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_hinge_loss,
    generator_hinge_loss,
)
from ardist.training.adversary_config import adversary_config
from ardist.training.distributed import World
from ardist.training.engine import Engine
from ardist.training.fragments import MOMENTS
from ardist.training.guard import on_device

ADVERSARY_FILE = "discriminator.safetensors"
_SEED_OFFSET = 1


class Verdict(NamedTuple):
    """What the discriminator says of a micro-batch: the autoencoder's loss, its gradient at the frames, numbers."""

    loss: Float[Tensor, ""]
    gradient: Float[Tensor, "b f 3 h w"]
    terms: dict[str, Tensor]


class Lesson(nn.Module):
    """The discriminator with both of its losses: the module that its engine trains."""

    def __init__(self, judge: PatchDiscriminator, autocast: torch.autocast) -> None:
        super().__init__()
        self.judge = judge
        self.autocast = autocast

    def forward(
        self, reconstruction: Float[Tensor, "b f 3 h w"], frames: Float[Tensor, "b f 3 h w"]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What the discriminator minimises, with a graph; without one what the autoencoder does, the gradient of that
        at the frames of `reconstruction` (a leaf that requires one), and the mean logits of real and fake patches."""
        with self.autocast:
            fake, real = self.judge(reconstruction), self.judge(frames)
        theirs = generator_hinge_loss(fake)
        (gradient,) = torch.autograd.grad(theirs, reconstruction, retain_graph=True)
        own = discriminator_hinge_loss(real, fake)
        return own, theirs.detach(), gradient, real.detach().mean(), fake.detach().mean()


class Adversary:
    """The discriminator under its engine; the weights are equal on every rank at every time."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config = config.ar_vae_loss
        self.world = world
        self.lr_ratio = (self.config.discriminator_lr or config.optimizer.lr) / config.optimizer.lr
        autocast = torch.autocast(
            world.device.type, torch.bfloat16, enabled=config.training.precision == "bf16", cache_enabled=False
        )
        self._seed = config.seed + _SEED_OFFSET
        self.model = self._new_model()
        numbers = sum(parameter.numel() for parameter in self.model.parameters())
        with torch.random.fork_rng(devices=[]):  # as that: whatever DeepSpeed draws
            self.engine = Engine(Lesson(self.model, autocast), adversary_config(config, numbers), world)
        self.active = False
        self.weight = torch.zeros((), device=world.device)
        """The adaptive weight for the present step."""
        self.skipped_alone = torch.zeros((), device=world.device)
        """Steps that only the discriminator had to skip."""
        self.skips_told = 0
        """How many of them have been counted as events."""
        self._pulls: Tensor | None = None

    def _new_model(self) -> PatchDiscriminator:
        """A discriminator as it is at the beginning, always the same; the autoencoder's own weights do not depend on
        whether it is made."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            return PatchDiscriminator(self.config.discriminator_channels, self.config.discriminator_layers)

    def begin(self, step: int) -> None:
        """Before optimiser step `step` (0-based): take part from ``adversarial_start`` on."""
        self.active = step >= self.config.adversarial_start
        self._pulls = None

    def judge(self, reconstruction: Float[Tensor, "b f 3 h w"], frames: Float[Tensor, "b f 3 h w"]) -> Verdict:
        """Judge a micro-batch, and add to the discriminator's gradients what it learns from it.

        `reconstruction` is a leaf that requires a gradient; nothing flows on from it, and nothing is left at it.
        """
        own, loss, gradient, real, fake = self.engine(reconstruction, frames)
        if (factor := fault.point("adversary.loss")) is not None:
            own = own * float(factor or "nan")
        self.engine.backward(own)
        reconstruction.grad = None  # the discriminator's own loss is not the autoencoder's; and it takes memory
        terms = {
            "generator": loss,
            "discriminator": own.detach(),
            "logits_real": real,
            "logits_fake": fake,
            "adaptive_weight": self.weight,
        }
        return Verdict(loss, gradient, terms)

    def compare(self, reconstruction: Float[Tensor, "3 c 3 3"], adversarial: Float[Tensor, "3 c 3 3"]) -> None:
        """Add one micro-batch's gradients of both losses at the autoencoder's last layer."""
        both = torch.stack([reconstruction, adversarial]) / self.engine.accumulation
        self._pulls = both if self._pulls is None else self._pulls + both

    @torch.no_grad()
    def step(self, lr: float, skipped: Tensor | bool) -> None:
        """Update the discriminator with learning rate `lr` of the autoencoder's schedule; collective, no host read.

        Nothing changes when the autoencoder's step was `skipped` or the own gradient is not finite on any rank.
        """
        if not self.active:
            return
        assert self._pulls is not None
        outcome = self.engine.step(lr * self.lr_ratio, veto=skipped)
        bad = on_device(outcome.skipped, self.weight)
        self.skipped_alone += (bad & ~on_device(skipped, self.weight)).float()
        if self.world.size > 1:
            dist.all_reduce(self._pulls)
        fresh = adaptive_weight(*(self._pulls / self.world.size))
        self.weight = torch.where(bad | ~torch.isfinite(fresh), self.weight, fresh)

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint must hold, whole and on the host (collective)."""
        fragments = self.engine.fragments
        stretches = {"master": [fragments.master(run) for run in fragments.owned]}
        state = {"adaptive_weight": self.weight, "skipped_alone": self.skipped_alone}
        if fragments.has_moments():
            stretches |= {kind: [fragments.moment(run, kind) for run in fragments.owned] for kind in MOMENTS}
            count = torch.tensor(max(fragments.steps().values(), default=0.0))  # both parameter groups step together
            state |= {f"step.{_short(name)}": count for name in fragments.shapes}
        for kind, mine in stretches.items():
            state |= {f"{kind}.{_short(name)}": value for name, value in fragments.whole(mine)}
        return {name: value.detach().cpu().clone() for name, value in state.items()}

    def restore(self, checkpoint: Path, files: Sequence[str]) -> None:
        """Continue from a checkpoint (collective); after one that was written without a discriminator this one is new,
        whatever it has learned: weights as at the beginning, no moments, an adaptive weight of 0."""
        if ADVERSARY_FILE in files:
            self.load(load_file(checkpoint / ADVERSARY_FILE), str(checkpoint))
            return
        if self.world.is_main:
            events.count("training.new_discriminator", checkpoint=checkpoint)
        zeros = {name: torch.zeros(()) for name in ("adaptive_weight", "skipped_alone")}
        weights = {f"master.{name}": weight.detach() for name, weight in self._new_model().named_parameters()}
        self.load({**weights, **zeros}, "a new discriminator")

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], source: str) -> None:
        """Take over a saved state bit for bit, into whatever layout this is (collective); `CheckpointError` when it is
        of another discriminator."""
        fragments = self.engine.fragments
        shapes = {f"master.{_short(name)}": tuple(shape) for name, shape in fragments.shapes.items()}
        saved = {name: tuple(value.shape) for name, value in state.items() if name.startswith("master.")}
        if shapes != saved:
            raise CheckpointError(
                f"{source} holds another discriminator: set ar_vae_loss.discriminator_channels and "
                "discriminator_layers to what they were, or begin a new run with init_from"
            )
        self.weight = state["adaptive_weight"].to(self.world.device)
        self.skipped_alone = state["skipped_alone"].to(self.world.device)
        self.skips_told = int(state["skipped_alone"])
        counts = [float(value) for name, value in state.items() if name.startswith("step.")]
        if counts:
            fragments.create_moments()
            fragments.set_steps({run.group: counts[0] for run in fragments.held})
        else:
            fragments.drop_moments()
        for run in fragments.held:
            targets = {"master": fragments.master(run)}
            targets |= {kind: fragments.moment(run, kind) for kind in MOMENTS if counts}
            for name, start, length, offset in run.fragments:
                for kind, target in targets.items():
                    whole = state[f"{kind}.{_short(name)}"].view(-1)
                    target.narrow(0, offset, length).copy_(whole.narrow(0, start, length))
        fragments.refresh_working_weights()


def _short(name: str) -> str:
    """A parameter's name within the discriminator, from its name within the engine's module."""
    return name.removeprefix("judge.")


def build_adversary(config: TrainConfig, world: World) -> Adversary | None:
    """The discriminator that ``ar_vae_loss`` asks for; None without one."""
    wanted = config.task == "ar_vae" and config.ar_vae_loss.adversarial_weight > 0
    return Adversary(config, world) if wanted else None
