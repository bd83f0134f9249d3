"""One job per prefix of an object store: a claim kept alive by writing, since no kernel's lock reaches that far.

The claim of generation g is the object ``claim-<g>``. It is taken by creating generation g + 1, which exactly one job
can, and kept by rewriting it with a growing beat. No clocks are compared: a claim is stale when its beat did not change
for `stale` seconds while we watched.
"""

from __future__ import annotations

import json
import threading
import time
from typing import Any

from ardist.errors import ArdistError, ConfigError
from ardist.events import events
from ardist.storage import MissingObjectError, Storage

PREFIX = "claim-"
BEAT_SECONDS, STALE_SECONDS = 15.0, 90.0


class Claim:
    """Held by rank 0 for the life of a run; `owner` is unique to a run directory on a machine, whose own lock we hold,
    so that a claim of the same owner is always one of a job that died."""

    def __init__(
        self, storage: Storage, owner: str, *, beat: float = BEAT_SECONDS, stale: float = STALE_SECONDS
    ) -> None:
        self.storage = storage
        self.owner = owner
        self.beat = beat
        self.stale = stale
        self.name = ""
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Take the prefix; waits while a silent claim may still be alive, `ConfigError` names a job that is."""
        seen: dict[str, Any] | None = None
        since = time.monotonic()
        while True:
            latest = max(self.storage.list(PREFIX), default=None)
            holder = None if latest is None else self._read(latest)
            free = holder is None or holder.get("owner") == self.owner
            if not free and seen is not None and holder != seen:
                raise ConfigError(
                    f"another job writes checkpoints to {self.storage.url}: {holder}. Stop it, or set checkpoint.url "
                    "to another prefix"
                )
            if free or (seen is not None and time.monotonic() - since >= self.stale):
                if not free:
                    events.count("checkpoint.claim_taken_over", holder=holder)
                if self._create(latest):
                    return
                seen = None  # somebody was faster
                continue
            if seen is None:
                seen, since = holder, time.monotonic()
            time.sleep(min(1.0, self.beat / 4))

    def lost(self) -> str | None:
        """Who took the prefix from this job while it was silent, or None."""
        latest = max(self.storage.list(PREFIX), default=self.name)
        return None if latest == self.name else f"another job has taken {self.storage.url}: {self._read(latest)}"

    def release(self) -> None:
        """Give the prefix back; when the store does not answer, the next job waits until the claim is stale."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(self.beat)
            self._thread = None
            try:
                self.storage.delete(self.name)
            except ArdistError as error:
                events.count("checkpoint.claim_left_behind", reason=error)

    def _create(self, latest: str | None) -> bool:
        number = 0 if latest is None else int(latest.removeprefix(PREFIX))
        self.name = f"{PREFIX}{number + 1:08d}"
        if not self.storage.create(self.name, self._content(0)):
            return False
        if latest is not None:
            self.storage.delete(latest)
        self._thread = threading.Thread(target=self._keep, name="checkpoint-claim", daemon=True)
        self._thread.start()
        return True

    def _keep(self) -> None:
        beat = 0
        while not self._ended.wait(self.beat):
            beat += 1
            try:
                if self.lost() is not None:
                    return  # the next commit will say so
                self.storage.put(self.name, self._content(beat))
            except ArdistError as error:
                events.count("checkpoint.claim_silent", reason=error)

    def _content(self, beat: int) -> bytes:
        return json.dumps({"owner": self.owner, "beat": beat}).encode()

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            found = json.loads(self.storage.read(name))
        except MissingObjectError:
            return None
        except ValueError:
            return {"owner": "unknown"}
        return found if isinstance(found, dict) else {"owner": "unknown"}
