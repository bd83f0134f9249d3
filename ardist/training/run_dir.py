"""The directory of a run: where its files are, and the lock that keeps a second job out."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import IO, Any

from ardist import fault, log
from ardist.config import TrainConfig, dump_config
from ardist.errors import ConfigError, HardwareError
from ardist.events import events
from ardist.process_identity import is_running

LOCK = ".lock"
LAUNCHER_VARIABLE = "ARDIST_LAUNCHER"
"""Process id and time of creation of the program of launchers/train.sh, joined by a colon."""
GRACE_VARIABLE = "ARDIST_GRACE_SECONDS"
"""How long ranks may save after the launcher's death."""


class RunDirectory:
    """Paths of a run, made at once; raises `HardwareError` when the directory cannot be written."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser().absolute()
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"
        self.metrics = self.path / "metrics.jsonl"
        self.summary = self.path / "summary.json"
        self.skipped_steps = self.path / "skipped_steps.jsonl"
        self.rollback = self.path / "rollback.json"
        self._lock: IO[str] | None = None

    def make(self) -> None:
        """Create the directory, readable by its owner alone."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            self.logs.mkdir(exist_ok=True)
        except OSError as error:
            raise HardwareError(f"the run directory {self.path} cannot be written: {error.strerror}") from error

    def begin_log(self) -> None:
        """Send this rank's log to the console and to a file of the run; to the console alone where that cannot be."""
        level = logging.getLogger("ardist").level or logging.INFO
        try:
            fault.point("run_dir.before_log")
            log.configure(self.path, level)
        except OSError as error:
            log.configure(level=level)
            events.count("log.unavailable", reason=error)

    def write_config(self, config: TrainConfig) -> None:
        """Write ``config.resolved.yaml``: what this run was started with, complete."""
        temporary = self.path / ".config.resolved.yaml"
        dump_config(config, temporary)
        temporary.replace(self.path / "config.resolved.yaml")

    def lock(self, wait_seconds: float = 20.0) -> None:
        """Take the run directory for this job; `ConfigError` names the holder when another one has it.

        The lock is the kernel's (flock): it ends with its process, however that dies, so that none is ever stale.
        The wait covers a restart that overtakes the end of the job before. A holder whose launcher is gone, or is on
        another machine and may be, is given its `launch.grace_seconds` on top: it may be saving.
        """
        file = open(self.path / LOCK, "a+", encoding="utf-8")  # noqa: SIM115  (held for the life of the run)
        began = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                if time.monotonic() - began >= wait_seconds + _grace(holder):
                    file.close()
                    raise ConfigError(
                        f"another job is running in {self.path}: {holder}. Stop it, or set run_dir to another directory"
                    ) from None
                time.sleep(0.2)
            except OSError as error:
                file.close()
                raise HardwareError(f"{self.path} cannot be locked: {error.strerror}") from error
        file.truncate(0)
        holder_info = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%FT%TZ", time.gmtime()),
            "launcher": os.environ.get(LAUNCHER_VARIABLE),
            "grace_seconds": os.environ.get(GRACE_VARIABLE, "0"),
        }
        file.write(json.dumps(holder_info))
        file.flush()
        self._lock = file

    def unlock(self) -> None:
        """Give the run directory back."""
        if self._lock is not None:
            self._lock.truncate(0)
            self._lock.close()
            self._lock = None


def launcher_is_gone(identity: str) -> bool:
    """Whether a launcher of this machine, as in `LAUNCHER_VARIABLE`, has ended."""
    pid, created = identity.split(":")
    return not is_running(int(pid), float(created))


def _grace(holder: str) -> float:
    """Seconds that the holder of a lock, by what it wrote into it, may take to save and end."""
    try:
        told = json.loads(holder)
        elsewhere = told["host"] != socket.gethostname()
        if told["launcher"] is None or not (elsewhere or launcher_is_gone(told["launcher"])):
            return 0.0
        return float(told["grace_seconds"])
    except (KeyError, TypeError, ValueError):
        return 0.0  # it is being written, or an older version's


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line in one write; a line that a killed run left unfinished is ended first."""
    text = json.dumps(record, allow_nan=False) + "\n"
    with open(path, "ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                text = "\n" + text
        file.write(text.encode())


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file at once: a reader sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
