"""Workers as actors of a Ray cluster: Ray decides where they run, the leases decide what they do."""

from __future__ import annotations

import os
import threading
from typing import Any

from ardist import log
from ardist.errors import ArdistError, HardwareError
from ardist.events import events
from ardist.storage import Storage
from data_tools.finalize import missing_commits
from data_tools.plan import Plan
from data_tools.progress import Progress
from data_tools.shard import Counts
from data_tools.workers import RESTARTS_PER_WORKER, Task, error_of, serve

NEWS_SECONDS = 1.0
"""How often the actors are asked what they did."""

News = tuple[str, int, Counts]


class _Notes:
    """Progress that waits until it is asked for: every commit, and of each shard only the latest state."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._latest: dict[int, Counts] = {}
        self._committed: list[News] = []

    def advanced(self, shard: int, counts: Counts) -> None:
        with self._lock:
            self._latest[shard] = Counts(**vars(counts))

    def committed(self, shard: int, counts: Counts) -> None:
        with self._lock:
            self._latest.pop(shard, None)
            self._committed.append(("committed", shard, counts))

    def take(self) -> list[News]:
        """What happened since the last call."""
        with self._lock:
            news = [*(("advanced", shard, counts) for shard, counts in self._latest.items()), *self._committed]
            self._latest, self._committed = {}, []
        return news


class _Actor:
    """A worker process of Ray; `work` and `news` run side by side."""

    def __init__(self, task: Task, number: int) -> None:
        self._task, self._number, self._notes = task, number, _Notes()

    def work(self) -> tuple[int, str, dict[str, int]]:
        """Build until nothing is left: exit code and message of an error of ours, and what was counted."""
        log.configure()
        events.clear()
        try:
            serve(self._task, self._number, self._notes, f"ray{self._number}")
        except ArdistError as error:
            return error.exit_code, str(error), events.snapshot()
        return 0, "", events.snapshot()

    def news(self) -> list[News]:
        """Progress since the last call."""
        return self._notes.take()


class RayPool:
    """Starts actors, passes their progress on, replaces those that die."""

    def __init__(self, task: Task, count: int, progress: Progress) -> None:
        self._task, self._count, self._progress = task, count, progress
        self._ray = _connected()
        self._work: dict[Any, tuple[int, Any]] = {}
        self._news: dict[Any, Any] = {}
        self._deaths = 0

    def run(self, storage: Storage, plan: Plan) -> None:
        """Return when all shards are committed; raises what a worker raised, `HardwareError` when they keep dying."""
        self._warn_of_small_machines()
        try:
            for number in range(min(self._count, len(missing_commits(storage, plan)))):
                self._start(number)
            while self._work:
                # Waited for by themselves: of several that are ready Ray may name the news for ever and the end never.
                for reference in self._ready(self._work, NEWS_SECONDS):
                    self._ended(reference)
                for reference in self._ready(self._news, 0):
                    self._hear(reference)
        finally:
            for _, actor in self._work.values():
                self._ray.kill(actor)
            self._work.clear()

    def _start(self, number: int) -> None:
        resources = {"num_cpus": self._task.settings.decoders, "num_gpus": self._gpus()}
        kind = self._ray.remote(max_concurrency=2, **resources)(_Actor)
        actor = kind.remote(self._task, number)
        self._work[actor.work.remote()] = (number, actor)
        self._news[actor.news.remote()] = actor

    def _warn_of_small_machines(self) -> None:
        """Say so when Ray has no machine for an actor: then it waits until one joins."""
        wanted = self._task.settings.decoders
        largest = max((node["Resources"].get("CPU", 0) for node in self._ray.nodes() if node["Alive"]), default=0)
        if wanted > largest:
            events.count("build.ray_waits", wanted=f"--decoders {wanted}", largest=f"a machine with {largest:g} CPUs")

    def _gpus(self) -> int:
        """One GPU for an actor that encodes latents, where the cluster has any."""
        encoder = self._task.encoder
        wanted = encoder.name != "pixels" and encoder.device in ("auto", "cuda")
        return int(wanted and self._ray.cluster_resources().get("GPU", 0) > 0)

    def _ready(self, references: dict[Any, Any], seconds: float) -> list[Any]:
        """Those that are ready now, or all of them as soon as they are; waits no longer than `seconds`."""
        waiting = list(references)
        ready: list[Any] = self._ray.wait(waiting, num_returns=len(waiting), timeout=seconds)[0] if waiting else []
        return ready

    def _hear(self, reference: Any) -> None:
        actor = self._news.pop(reference)
        self._pass_on(reference)
        if any(actor is other for _, other in self._work.values()):
            self._news[actor.news.remote()] = actor

    def _pass_on(self, reference: Any) -> None:
        try:
            for kind, shard, counts in self._ray.get(reference):
                (self._progress.committed if kind == "committed" else self._progress.advanced)(shard, counts)
        except self._ray.exceptions.RayActorError:
            return  # its end is heard of through its work

    def _ended(self, reference: Any) -> None:
        number, actor = self._work.pop(reference)
        unheard = [news for news, other in self._news.items() if other is actor]
        for news in unheard:
            del self._news[news]
        try:
            code, message, counted = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            self._deaths += 1
            reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            events.count("build.worker_died", worker=f"ray{number}", status=reason[0][:200])
            if self._deaths > RESTARTS_PER_WORKER * self._count:
                raise HardwareError(
                    f"Ray workers died {self._deaths} times, the last with: {reason[0][:200]}; "
                    "what is committed stays, run build again"
                ) from None
            self._start(number)
            return
        for news in (*unheard, actor.news.remote()):
            self._pass_on(news)
        self._ray.kill(actor)
        for name, count in counted.items():
            events.count(name, count, level=10, worker=f"ray{number}")
        if code:
            raise error_of(code, message)


def _connected() -> Any:
    """The ray module, connected to a cluster that runs already; raises `HardwareError`."""
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise HardwareError("--executor ray needs the ray package: pip install 'ardist[ray]'") from None
    if not ray.is_initialized():
        try:
            ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=False, configure_logging=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise HardwareError(
                f"no Ray cluster can be reached ({error}); start one with 'ray start --head' or set RAY_ADDRESS"
            ) from None
    return ray
