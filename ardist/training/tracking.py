"""Where the numbers of a run go besides metrics.jsonl: W&B and TensorBoard. Neither can block or break training."""

from __future__ import annotations

import importlib
import logging
import os
import queue
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ardist.config import TrainConfig
from ardist.events import events

_log = logging.getLogger("ardist.training")

START_SECONDS = 10.0
FINISH_SECONDS = 20.0
QUEUE_LENGTH = 1000

Sink = Callable[[dict[str, Any]], None]


class Tracker:
    """Hands records to trackers in a thread of its own; whatever goes wrong there is counted and training goes on.

    Connecting happens in that thread too: a tracker that does not answer delays nothing, its records wait in a
    bounded queue and are dropped, counted, when that is full.
    """

    def __init__(self, open_sinks: Callable[[], list[tuple[str, Sink, Callable[[], None]]]]) -> None:
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(QUEUE_LENGTH)
        self._open_sinks = open_sinks
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self._thread.start()

    def log(self, record: dict[str, Any]) -> None:
        """Hand over one record (as in metrics.jsonl); never waits."""
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            events.count("tracking.dropped", level=logging.DEBUG)

    def finish(self) -> None:
        """Give the trackers a bounded time to take what is left."""
        try:
            self._queue.put(None, timeout=1.0)
        except queue.Full:
            events.count("tracking.dropped", reason="the queue is full at the end")
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            events.count("tracking.unfinished", seconds=FINISH_SECONDS)

    def _work(self) -> None:
        sinks = self._open_sinks()
        while (record := self._queue.get()) is not None:
            for name, write, close in list(sinks):
                try:
                    write(record)
                except Exception as error:  # noqa: BLE001  (a tracker must not be able to end a run)
                    events.count("tracking.failed", tracker=name, reason=f"{type(error).__name__}: {error}")
                    sinks.remove((name, write, close))
        for name, _, close in sinks:
            try:
                close()
            except Exception as error:  # noqa: BLE001
                events.count("tracking.failed", tracker=name, reason=f"{type(error).__name__}: {error}")


def open_tracker(config: TrainConfig, run_dir: Path) -> Tracker:
    """The trackers that ``config.tracking`` asks for."""

    def sinks() -> list[tuple[str, Sink, Callable[[], None]]]:
        opened = []
        if config.tracking.wandb != "disabled" and _wandb_mode(config) != "disabled":
            opened += _attempt("wandb", lambda: _open_wandb(config, run_dir))
        if config.tracking.tensorboard:
            opened += _attempt("tensorboard", lambda: _open_tensorboard(run_dir))
        return opened

    return Tracker(sinks)


def _attempt(
    name: str, opener: Callable[[], tuple[Sink, Callable[[], None]]]
) -> list[tuple[str, Sink, Callable[[], None]]]:
    try:
        write, close = opener()
    except Exception as error:  # noqa: BLE001  (wandb raises its own errors, and theirs of the network below)
        events.count("tracking.unavailable", tracker=name, reason=f"{type(error).__name__}: {error}")
        return []
    return [(name, write, close)]


def run_id(run_dir: Path) -> str:
    """The run's id at the tracker, kept in the run directory so that a resume continues the same curve."""
    path = run_dir / "wandb_id.txt"
    try:
        known = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        known = ""
    if not known.isalnum():
        known = secrets.token_hex(5)
        path.write_text(known + "\n", encoding="utf-8")
    return known


def _open_wandb(config: TrainConfig, run_dir: Path) -> tuple[Sink, Callable[[], None]]:
    wandb: Any = importlib.import_module("wandb")
    mode = _wandb_mode(config)
    arguments = {
        "project": config.tracking.project,
        "name": config.tracking.name or run_dir.name,
        "id": run_id(run_dir),
        "resume": "allow",
        "dir": str(run_dir),
        "config": config.model_dump(mode="json"),
    }
    settings = wandb.Settings(init_timeout=START_SECONDS, silent=True, console="off", x_disable_stats=True)
    try:
        run = wandb.init(mode=mode, settings=settings, **arguments)
    except Exception as error:  # no network, no key, no server: the numbers are kept offline
        if mode != "online":
            raise
        events.count("tracking.offline", tracker="wandb", reason=f"{type(error).__name__}: {error}")
        wandb.teardown()  # what it began still holds the run's id
        run = wandb.init(mode="offline", settings=settings, **arguments)

    # W&B's own count of steps only rises, and it ignores what is logged below it; ours goes back after a roll-back and
    # after a resume from an earlier checkpoint.
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    kinds = {".mp4": "Video", ".png": "Image"}

    def write(record: dict[str, Any]) -> None:
        files = [(name, path) for name, path in _media(record, run_dir) if path.suffix in kinds]
        shown = {name: getattr(wandb, kinds[path.suffix])(str(path)) for name, path in files}
        run.log({**_scalars(record), **shown, "step": int(record["step"])})

    return write, run.finish


def _wandb_mode(config: TrainConfig) -> str:
    """The configured mode, unless ``WANDB_MODE`` asks for less: it may turn the network off, never on."""
    asked = os.environ.get("WANDB_MODE", "").strip().lower()
    return asked if asked in ("offline", "disabled") else config.tracking.wandb


def _open_tensorboard(run_dir: Path) -> tuple[Sink, Callable[[], None]]:
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(run_dir / "tensorboard"))

    def write(record: dict[str, Any]) -> None:
        for name, value in _scalars(record).items():
            writer.add_scalar(name, value, int(record["step"]))

    return write, writer.close


def _media(record: dict[str, Any], run_dir: Path) -> list[tuple[str, Path]]:
    """Names and files of a record's pictures and videos, those that this machine sees."""
    named = {f"{record['kind']}/{name}": run_dir / path for name, path in record.get("media", {}).items()}
    return [(name, path) for name, path in named.items() if path.is_file()]


def _scalars(record: dict[str, Any]) -> dict[str, float]:
    """Names and numbers of a record: ``train/loss``, ``train/loss_per_frame/03``; what is unknown is left out.

    Tables, lists of lists, are for metrics.jsonl and the report: at a tracker each of their cells would be a curve.
    """
    kind = record.get("kind", "train")
    named: dict[str, float] = {}
    for name, value in record.items():
        if name in ("kind", "step", "time"):
            continue
        if isinstance(value, list):
            cells = {f"{kind}/{name}/{index:02d}": item for index, item in enumerate(value)}
        else:
            cells = {f"{kind}/{name}": value}
        named |= {
            cell: float(number)
            for cell, number in cells.items()
            if isinstance(number, int | float) and not isinstance(number, bool)
        }
    return named
