"""The training loop: from a configuration to a trained model, resumable at any step on any number of ranks."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ardist import fault, log
from ardist.config import TrainConfig
from ardist.data.loader import StreamingLoader
from ardist.data.manifest import Manifest
from ardist.errors import CheckpointError, ConfigError, Preempted
from ardist.events import events
from ardist.training import commit as commits
from ardist.training import distributed, resume
from ardist.training.batches import DeviceCopy, micro_batches
from ardist.training.callbacks import Callback
from ardist.training.callbacks.checkpoints import Checkpoints
from ardist.training.callbacks.metrics import MetricsLog, Window
from ardist.training.callbacks.numerics import SkippedSteps
from ardist.training.callbacks.profiler import Profiler
from ardist.training.callbacks.progress import ProgressBar
from ardist.training.callbacks.replicas import ReplicaCheck
from ardist.training.callbacks.samples import SampleLog
from ardist.training.callbacks.validation import Validation
from ardist.training.checkpoint import CheckpointWriter, Snapshot
from ardist.training.distributed import World
from ardist.training.ema import ShardedEMA
from ardist.training.engine import Engine, StepOutcome
from ardist.training.objectives import build_objective
from ardist.training.optimizer import learning_rate
from ardist.training.preflight import check_run, identity_problems
from ardist.training.run_dir import RunDirectory, append_line, write_atomically
from ardist.training.stopping import StopRequest
from ardist.training.throughput import Throughput, device_name, peak_flops
from ardist.training.tracking import Tracker, open_tracker

_log = logging.getLogger("ardist.training")


def train(config: TrainConfig, callbacks: Sequence[Callback] = ()) -> None:
    """Train what `config` says; called by every rank, or by one process without a launcher.

    Continues by itself from the newest good checkpoint of ``config.run_dir``. `callbacks` are called after the
    built-in ones. Raises `ConfigError` or `DataError` before any process group exists when the run cannot start,
    and `Preempted` (exit code 75) after a requested stop, with everything saved.
    """
    distributed.prepare_environment()
    rank, size, _ = distributed.environment()
    run = RunDirectory(config.run_dir)
    manifest = check_run(config, size, run.checkpoints)
    if rank == 0:
        run.make()
        run.lock()
    try:
        world = distributed.start(config.training.timeout_minutes)
        world.barrier()  # the run directory exists from here on
        log.configure(run.path, logging.getLogger("ardist").level or logging.INFO)
        trainer = Trainer(config, manifest, world, run, callbacks)
        try:
            trainer.fit()
        finally:
            trainer.close()
    finally:
        run.unlock()
        distributed.stop()


class Trainer:
    """One run on one rank. Callbacks read its attributes; only the loop changes weights."""

    def __init__(
        self,
        config: TrainConfig,
        manifest: Manifest,
        world: World,
        run: RunDirectory,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.config = config
        self.manifest = manifest
        self.world = world
        self.run = run
        self.total_steps = config.training.steps
        self.step = 0
        self.epoch = 0
        self.skipped_steps = 0
        self.useful_seconds = 0.0
        self.stopping = False
        self.outcome: StepOutcome | None = None
        self.sample_ids = torch.empty(0, dtype=torch.int64)
        self.step_losses: list[torch.Tensor] = []
        self.window = Window()
        self.last_records: dict[str, dict[str, Any]] = {}
        self._began = time.time()
        self._earlier: dict[str, Any] = {"wall_seconds": 0.0, "sessions": 0, "events": {}}
        self._ended = False
        self._check_ranks_agree()
        torch.use_deterministic_algorithms(config.debug.deterministic)
        torch.manual_seed(config.seed)
        self.stop = StopRequest(world)
        self.objective = build_objective(config, manifest, world.device)
        self.engine = Engine(self.objective.build_model(), config, world)
        decays = config.training.ema_decays
        self.ema = ShardedEMA(self.engine.fragments, decays) if decays else None
        self.loader = StreamingLoader(
            config.data,
            seed=config.seed,
            global_batch_size=config.training.global_batch_size,
            rank=world.rank,
            world_size=world.size,
            manifest=manifest,
        )
        self.to_device = DeviceCopy(world.device)
        self.writer = CheckpointWriter(
            run.checkpoints,
            self.engine.fragments,
            self.ema,
            keep=config.checkpoint.keep,
            asynchronous=config.checkpoint.asynchronous,
        )
        self.throughput = Throughput(
            global_batch_size=config.training.global_batch_size,
            tokens_per_clip=self.objective.tokens_per_clip,
            flops_per_clip=self.objective.flops_per_clip,
            world_size=world.size,
            peak=peak_flops(device_name(world.device), config.training.precision),
        )
        self.callbacks = [*self._built_in_callbacks(), *callbacks]
        self.tracker: Tracker | None = None
        self._resume_or_begin()
        if world.is_main:
            run.write_config(config)
            self.engine.save_settings(run.path)
            self.tracker = open_tracker(config, run.path)

    def fit(self) -> None:
        """Train to the last step; raises `Preempted` when asked to stop before it."""
        self.stop.install()
        self.engine.train()
        for callback in self.callbacks:
            callback.on_start(self)
        self.stopping = self._stop_is_due()
        while self.step < self.total_steps and not self.stopping:
            self._train_step()
            self.stopping = self.stop.agreed() or self._stop_is_due()
            for callback in self.callbacks:
                callback.after_step(self)
        self.stop.drain()
        for callback in self.callbacks:
            callback.on_end(self)
        self.stop.saved = True
        self._ended = True
        self.write_summary()
        if self.step < self.total_steps:
            reason = "as training.stop_after asks" if self._stop_is_due() else f"on {self.stop.name}"
            raise Preempted(f"stopped {reason} after step {self.step}; everything is saved, run again to continue")
        if self.world.is_main:
            _log.info("finished %d steps; checkpoint and summary are in %s", self.step, self.run.path)

    def _train_step(self) -> None:
        """One optimiser step over the global batch."""
        began = time.perf_counter()
        batch = next(self.loader)
        self.window.data_seconds += time.perf_counter() - began
        self.sample_ids, self.epoch = batch.sample_ids, batch.epoch
        self.step_losses = []
        fault.point("trainer.batch")
        for micro in micro_batches(self.to_device(batch), self.engine.micro_batch_size):
            loss, metrics = self.objective.loss(self.engine, micro)
            if fault.point("trainer.loss") is not None:
                loss = loss * math.nan
            self.engine.backward(loss)
            self.window.add(loss, metrics)
            self.step_losses.append(loss.detach())
        fault.point("trainer.before_step")
        self.outcome = self.engine.step(learning_rate(self.config.optimizer, self.step, self.total_steps))
        if self.ema is not None:
            self.ema.update(self.outcome.skipped)
        self.step += 1
        self.window.steps += 1
        fault.point("trainer.after_step")

    def _built_in_callbacks(self) -> list[Callback]:
        optional: list[tuple[bool, Callback]] = [
            (self.config.debug.log_sample_ids, SampleLog()),
            (True, SkippedSteps()),
            (self.config.debug.replica_check_every > 0, ReplicaCheck()),
            (True, MetricsLog()),
            (True, ProgressBar()),
            (self.config.validation.path is not None, Validation()),
            (self.config.debug.profile_step is not None, Profiler()),
            (True, Checkpoints()),
        ]
        return [callback for wanted, callback in optional if wanted]

    def _stop_is_due(self) -> bool:
        after = self.config.training.stop_after
        return after is not None and self.step >= after and self.step < self.total_steps

    @contextmanager
    def outside_of_training(self) -> Iterator[None]:
        """Time spent here is no training time: it does not count in rates and goodput."""
        began = time.perf_counter()
        yield
        self.window.other_seconds += time.perf_counter() - began

    # State ---------------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """What a checkpoint holds besides the tensors."""
        return Snapshot(
            step=self.step,
            config=self.config.model_dump(mode="json"),
            config_digest=self.config.digest(),
            manifest_digest=self.manifest.digest(),
            zero_stage=self.config.training.zero_stage,
            precision=self.config.training.precision,
            state={
                "data": self.loader.state_dict(),
                "counters": self.engine.counters(),
                "loss_scaler": self.engine.loss_scaler(),
                "skipped_steps": self.skipped_steps,
                "useful_seconds": self.useful_seconds,
                "wall_seconds": self._wall_seconds(),
                "sessions": self._earlier["sessions"] + 1,
                "events": self._all_events(),
            },
        )

    def _resume_or_begin(self) -> None:
        found = resume.find(self.run.checkpoints, self.world)
        if found is not None:
            self._restore(*found)
            return
        if self.config.init_from is not None:
            self._init_from(Path(self.config.init_from).expanduser())
        if self.ema is not None:
            self.ema.restart()

    def _restore(self, path: Path, commit: commits.Commit) -> None:
        problems = list(identity_problems(commit, self.config))
        if problems:
            raise ConfigError("\n".join(problems))
        resume.restore(path, commit, self.engine.fragments, self.ema)
        self.loader.load_state_dict(commit.state["data"])
        self.step = commit.step
        self.engine.set_counters(commit.state["counters"], commit.step)
        self.engine.set_loss_scaler(commit.state["loss_scaler"])
        self.skipped_steps = int(commit.state["skipped_steps"])
        self.useful_seconds = float(commit.state["useful_seconds"])
        self._earlier = {name: commit.state[name] for name in ("wall_seconds", "sessions", "events")}
        self.writer.last_saved = commit.step
        if self.world.is_main:
            resume.set_aside_newer(self.run.checkpoints, commit.step)
            _log.info(
                "resumed after step %d from %s, saved by %d ranks at ZeRO stage %d",
                commit.step,
                path,
                commit.world_size,
                commit.zero_stage,
            )
            if commit.config_digest != self.config.digest():
                _log.info(
                    "settings changed since then: %s", _changes(commit.config, self.config.model_dump(mode="json"))
                )

    def _init_from(self, source: Path) -> None:
        root = source / "checkpoints" if (source / "checkpoints").is_dir() else source
        if root.name.startswith("step-"):
            path, commit = root, commits.read_commit(root)
        else:
            found = resume.find(root, self.world)
            if found is None:
                raise CheckpointError(f"init_from: {source} holds no checkpoint")
            path, commit = found
        kind = resume.weights_kind(commit, self.config.init_weights)
        resume.load_weights(path, commit, self.engine.fragments, kind)
        if self.world.is_main:
            _log.info("started from the %s weights of %s", kind, path)

    def roll_back(self) -> bool:
        """Return to the newest good checkpoint, data position included; False when there is none (collective)."""
        self.writer.wait()
        found = resume.find(self.run.checkpoints, self.world)
        if found is None:
            return False
        if self.world.is_main:
            events.count("training.rollback", from_step=self.step, to_step=found[1].step)
        skipped = self.skipped_steps
        self._restore(*found)
        self.skipped_steps = skipped
        return True

    def _check_ranks_agree(self) -> None:
        """Every rank must run the same code on the same settings and data."""
        mine = {
            "configuration": self.config.digest(),
            "manifest": self.manifest.digest(),
            **{name: version(name) for name in ("ardist", "torch", "deepspeed")},
        }
        everyone = self.world.all_gather(mine)
        odd = [
            f"rank {rank}: {name} {theirs[name][:16]} instead of {everyone[0][name][:16]}"
            for rank, theirs in enumerate(everyone)
            for name in mine
            if theirs[name] != everyone[0][name]
        ]
        if odd:
            raise ConfigError("the ranks do not run the same thing:\n" + "\n".join(f"  {line}" for line in odd))

    # Records -------------------------------------------------------------------------------------------------------

    def write_record(self, record: dict[str, Any]) -> None:
        """Append a record to metrics.jsonl and hand it to the trackers (rank 0); a full disk does not stop training."""
        record = {name: _finite(value) for name, value in record.items()}
        self.last_records[record["kind"]] = record
        if not self.world.is_main:
            return
        try:
            fault.point("trainer.metrics")
            append_line(self.run.metrics, record)
        except OSError as error:
            events.count("metrics.failed", step=self.step, reason=error)
        if self.tracker is not None:
            self.tracker.log(record)

    def write_summary(self) -> None:
        """Write ``summary.json``: where the run stands, how its time was spent, every event (rank 0)."""
        gathered = self.world.all_gather(events.snapshot())
        if not self.world.is_main:
            return
        wall = self._wall_seconds()
        counts = Counter(self._earlier["events"])
        for rank_counts in gathered:
            counts.update(rank_counts)
        summary = {
            "completed": self.step >= self.total_steps,
            "step": self.step,
            "steps": self.total_steps,
            "samples": self.step * self.config.training.global_batch_size,
            "skipped_steps": self.skipped_steps,
            "useful_seconds": self.useful_seconds,
            "wall_seconds": wall,
            "goodput": self.useful_seconds / wall if wall else None,
            "sessions": self._earlier["sessions"] + 1,
            "world_size": self.world.size,
            "zero_stage": self.config.training.zero_stage,
            "last_checkpoint": self.writer.last_saved,
            "checkpoint_blocked_seconds": self.writer.blocked_seconds,
            "events": dict(sorted(counts.items())),
            **{f"last_{kind}": record for kind, record in self.last_records.items()},
        }
        try:
            write_atomically(self.run.summary, _json(summary))
        except OSError as error:
            events.count("summary.failed", reason=error)

    def _wall_seconds(self) -> float:
        return float(self._earlier["wall_seconds"]) + time.time() - self._began

    def _all_events(self) -> dict[str, int]:
        return dict(Counter(self._earlier["events"]) + Counter(events.snapshot()))

    def close(self) -> None:
        """Let go of threads, files and trackers; after an error too."""
        self.stop.uninstall()
        for callback in self.callbacks:
            if isinstance(callback, ProgressBar):
                callback.close()
        self.loader.close()
        if self._ended:
            self.writer.wait()
        if self.tracker is not None:
            self.tracker.finish()


def _finite(value: Any) -> Any:
    """JSON has no NaN: what is not finite becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def _changes(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> str:
    """``training.steps 100 -> 200, …`` between two configurations."""
    lines = []
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            lines.append(_changes(old, new, f"{prefix}{name}."))
        elif old != new:
            lines.append(f"{prefix}{name} {old!r} -> {new!r}")
    return ", ".join(filter(None, lines))
