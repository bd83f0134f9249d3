"""The training loop: from a configuration to a trained model, resumable at any step on any number of ranks."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import TypeVar

import torch

from ardist import fault
from ardist.code_digest import code_digest
from ardist.config import TrainConfig
from ardist.data.loader import open_loader
from ardist.errors import ArdistError, ConfigError, Preempted
from ardist.training import distributed
from ardist.training.adversary import ADVERSARY_FILE, build_adversary
from ardist.training.batches import DeviceCopy, cut
from ardist.training.callbacks import Callback
from ardist.training.callbacks.ar_vae_health import DiscriminatorSkips, LatentCheck
from ardist.training.callbacks.checkpoints import Checkpoints
from ardist.training.callbacks.metrics import MetricsLog
from ardist.training.callbacks.numerics import SkippedSteps
from ardist.training.callbacks.profiler import Profiler
from ardist.training.callbacks.progress import ProgressBar
from ardist.training.callbacks.reconstructions import Reconstructions
from ardist.training.callbacks.replicas import ReplicaCheck
from ardist.training.callbacks.restarts import Restarts
from ardist.training.callbacks.sampled_videos import SampledVideos
from ardist.training.callbacks.samples import SampleLog
from ardist.training.callbacks.stragglers import Stragglers
from ardist.training.callbacks.validation import Validation
from ardist.training.checkpoint import CheckpointWriter
from ardist.training.dataset import TrainingSet
from ardist.training.distributed import World
from ardist.training.dry_run import dry_run
from ardist.training.ema import ShardedEMA
from ardist.training.engine import Engine, StepOutcome
from ardist.training.heartbeat import Phase, heartbeat
from ardist.training.object_store import open_store
from ardist.training.objectives import build_objective
from ardist.training.optimizer import learning_rate
from ardist.training.preflight import check_run
from ardist.training.records import Records
from ardist.training.run_dir import RunDirectory
from ardist.training.state import History, resume_or_begin
from ardist.training.stopping import StopRequest
from ardist.training.store import CheckpointStore
from ardist.training.throughput import Throughput, device_name, peak_flops
from ardist.training.window import Window

_log = logging.getLogger("ardist.training")

Number = TypeVar("Number", int, float)

CLOSE_SECONDS = 60.0
"""How long a checkpoint under way may take when the run ends by an error."""


def train(config: TrainConfig, callbacks: Sequence[Callback] = ()) -> None:
    """Train what `config` says; called by every rank, or by one process without a launcher.

    Continues by itself from the newest good checkpoint of ``config.run_dir``. `callbacks` are called after the
    built-in ones. Raises `ConfigError` or `DataError` before any process group exists when the run cannot start,
    and `Preempted` (exit code 75) after a requested stop, with everything saved.
    """
    distributed.prepare_environment()
    rank, size, _ = distributed.environment()
    run = RunDirectory(config.run_dir)
    data = check_run(config, size, run.checkpoints)
    if rank == 0:
        run.make()
        run.lock()
    try:
        world = distributed.start(config.training.timeout_minutes)
        world.barrier()  # the run directory exists from here on
        run.begin_log()
        trainer = Trainer(config, data, world, run, callbacks)
        try:
            trainer.fit()
        finally:
            trainer.close()
    except Preempted:
        distributed.stop()
        raise
    except BaseException:
        if size == 1:
            distributed.stop()
        # With peers the group is left to the end of the process: they may be waiting in it, and so would we.
        raise
    else:
        distributed.stop()
    finally:
        run.unlock()


class Trainer:
    """One run on one rank. Callbacks read its attributes; only the loop changes weights."""

    def __init__(
        self,
        config: TrainConfig,
        data: TrainingSet,
        world: World,
        run: RunDirectory,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.config = config
        self.data = data
        self.world = world
        self.run = run
        check_ranks_agree(world, config, data)
        torch.use_deterministic_algorithms(config.debug.deterministic)
        torch.manual_seed(config.seed)

        self.step = 0
        self.total_steps = config.training.steps
        self.stopping = False
        self.history = History()
        self.stop = StopRequest(world)

        self.adversary = build_adversary(config, world)
        objectives = [build_objective(config, manifest, world.device, self.adversary) for manifest in data.manifests]
        self.objective = objectives[0]
        self.engine = Engine(self.objective.build_model(), config, world)
        decays = config.training.ema_decays
        self.ema = ShardedEMA(self.engine.fragments, decays) if decays else None
        self.loader = open_loader(
            config.data,
            seed=config.seed,
            global_batch_size=config.training.global_batch_size,
            rank=world.rank,
            world_size=world.size,
        )
        self.to_device = DeviceCopy(world.device)
        self.store = open_store(config.checkpoint, run.checkpoints)
        lock_store(self.store, world, run)
        self.writer = CheckpointWriter(
            self.store,
            self.engine.fragments,
            self.ema,
            keep=config.checkpoint.keep,
            asynchronous=config.checkpoint.asynchronous,
            beside={} if self.adversary is None else {ADVERSARY_FILE: self.adversary.state},
        )
        self.throughput = Throughput(
            # Datasets of a mixture differ in the number of frames at most.
            tokens_per_clip=by_frames(data, [objective.tokens_per_clip for objective in objectives]),
            flops_per_clip=by_frames(data, [objective.flops_per_clip for objective in objectives]),
            world_size=world.size,
            peak=peak_flops(device_name(world.device), config.training.precision),
        )
        self.window = Window(max(manifest.shape[0] for manifest in data.manifests))
        self.callbacks = [*built_in_callbacks(config), *callbacks]

        # What the last step did, for the callbacks.
        self.epoch = 0
        self.sample_ids = torch.empty(0, dtype=torch.int64)
        self.num_frames = 0
        self.losses: list[torch.Tensor] = []
        self.own_seconds = 0.0
        self.outcome = StepOutcome(None, False)

        resume_or_begin(self)
        self.records = Records(self)
        if world.is_main:
            run.write_config(config)
            self.engine.save_settings(run.path)

    def fit(self) -> None:
        """Train to the last step; raises `Preempted` when asked to stop before it."""
        self.stop.install()
        self.engine.train()
        for callback in self.callbacks:
            callback.on_start(self)
        self.stopping = self.stop_after_reached()
        first_step = self.step
        heartbeat.resumed(first_step)
        if self.config.training.dry_run and first_step < self.total_steps and not self.stopping:
            dry_run(self)

        while self.step < self.total_steps and not self.stopping:
            self.advance()

        heartbeat.enter(Phase.END)
        self.stop.drain()
        for callback in self.callbacks:
            callback.on_end(self)
        self.stop.saved = True
        if self.step > first_step:  # a run that was complete already keeps the summary of its last session
            self.records.write_summary()
        if self.step < self.total_steps:
            reason = "as training.stop_after asks" if self.stop_after_reached() else f"on {self.stop.name}"
            raise Preempted(f"stopped {reason} after step {self.step}; everything is saved, run again to continue")
        if self.world.is_main:
            _log.info("finished %d steps; checkpoint and summary are in %s", self.step, self.run.path)

    def advance(self) -> None:
        """One step and everything that follows it."""
        self.train_step()
        self.stopping = self.stop.agreed(self.step) or self.stop_after_reached()
        for callback in self.callbacks:
            callback.after_step(self)

    def train_step(self) -> None:
        """One optimiser step over the global batch."""
        began = time.perf_counter()
        with self.window.waiting_for_data(), heartbeat.phase(Phase.DATA):
            batch = next(self.loader)
        fault.point("trainer.batch")
        self.sample_ids, self.epoch, self.num_frames, self.losses = (
            batch.sample_ids,
            batch.epoch,
            batch.values.shape[1],
            [],
        )

        if self.adversary is not None:
            self.adversary.begin(self.step)
        for micro_batch in cut(self.objective.prepare(self.to_device(batch)), self.engine.accumulation):
            loss, metrics = self.objective.loss(self.engine, micro_batch)
            if (factor := fault.point("trainer.loss")) is not None:
                loss = loss * float(factor or "nan")
            heartbeat.advance()  # whoever hangs before this line keeps those waiting who are behind it
            self.own_seconds += time.perf_counter() - began
            self.engine.backward(loss)
            began = time.perf_counter()
            self.window.add(loss, metrics)
            self.losses.append(loss.detach())

        fault.point("trainer.before_step")
        if self.engine.spikes is not None:
            self.engine.spikes.begin(self.num_frames)
        heartbeat.advance()
        rate = learning_rate(self.config.optimizer, self.step, self.total_steps)
        self.outcome = self.engine.step(rate)
        if self.adversary is not None:
            self.adversary.step(rate, self.outcome.skipped)
        if self.ema is not None:
            self.ema.update(self.outcome.skipped)
        self.step += 1
        clips = len(self.sample_ids) * self.world.size
        self.history.samples += clips
        self.window.stepped(self.num_frames, clips)
        heartbeat.stepped(self.step)
        fault.point("trainer.after_step")

    @property
    def checkpoint_due(self) -> bool:
        """Whether a checkpoint is taken in the background after this step; the last one of the process is another."""
        return self.step % self.config.checkpoint.every == 0 and self.step < self.total_steps

    @property
    def outcomes_due(self) -> bool:
        """Whether the host reads what became of the steps: at log points, before every checkpoint, which holds their
        number, and where it knows of a skip without a wait for the device."""
        logged = self.step % self.config.training.log_every == 0
        last = self.stopping or self.step >= self.total_steps
        return logged or self.checkpoint_due or last or self.outcome.skipped is True

    def stop_after_reached(self) -> bool:
        """True when ``training.stop_after`` asks for an end here."""
        after = self.config.training.stop_after
        return after is not None and after <= self.step < self.total_steps

    @contextmanager
    def outside_of_training(self) -> Iterator[None]:
        """Time spent here is no training time: it does not count in rates and goodput."""
        began = time.perf_counter()
        with heartbeat.phase(Phase.OTHER):
            yield
        self.window.other_seconds += time.perf_counter() - began

    def close(self) -> None:
        """Let go of threads, files and trackers; after an error too."""
        self.stop.uninstall()
        for callback in self.callbacks:
            callback.close()
        self.loader.close()
        self.writer.wait(CLOSE_SECONDS)
        self.store.unlock()
        self.records.close()


def built_in_callbacks(config: TrainConfig) -> list[Callback]:
    """Everything that is not the step, in its order: what is counted is logged after it, what is logged is saved.

    `SkippedSteps` may go back to a checkpoint: what that would make forgotten is read before it.
    """
    autoencoder = config.task == "ar_vae"
    callbacks: list[tuple[bool, Callback]] = [
        (config.debug.log_sample_ids, SampleLog()),
        (autoencoder, DiscriminatorSkips()),
        (True, SkippedSteps()),
        (config.debug.replica_check_every > 0, ReplicaCheck()),
        (True, Stragglers()),
        (True, MetricsLog()),
        (True, Restarts()),
        (True, ProgressBar()),
        (config.validation.path is not None, Validation()),
        (config.samples.every is not None, SampledVideos()),
        (autoencoder and config.validation.path is not None, Reconstructions()),
        (autoencoder, LatentCheck()),
        (config.debug.profile_step is not None, Profiler()),
        (True, Checkpoints()),
    ]
    return [callback for wanted, callback in callbacks if wanted]


def by_frames(data: TrainingSet, values: Sequence[Number]) -> dict[int, Number]:
    """A number per dataset, by the frames of its clips."""
    return {manifest.shape[0]: value for manifest, value in zip(data.manifests, values, strict=True)}


def lock_store(store: CheckpointStore, world: World, run: RunDirectory) -> None:
    """Keep other jobs off the checkpoints, for all ranks (collective)."""
    problem = None
    if world.is_main:
        try:
            store.lock(str(run.path))
        except (OSError, ArdistError) as error:
            problem = str(error)
    problem = world.broadcast(problem)
    if problem is not None:
        raise ConfigError(problem)


def check_ranks_agree(world: World, config: TrainConfig, data: TrainingSet) -> None:
    """Refuse ranks that do not run the same code on the same settings and data (collective)."""
    mine = {
        "configuration": config.digest(),
        "data": data.digest,
        "code": code_digest(),
        **{name: version(name) for name in ("ardist", "torch", "deepspeed")},
    }
    everyone = world.all_gather(mine)
    odd = [
        f"rank {rank}: {name} {theirs[name][:16]} instead of {everyone[0][name][:16]}"
        for rank, theirs in enumerate(everyone)
        for name in mine
        if theirs[name] != everyone[0][name]
    ]
    if odd:
        raise ConfigError("the ranks do not run the same thing:\n" + "\n".join(f"  {line}" for line in odd))
