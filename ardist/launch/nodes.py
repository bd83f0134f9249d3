"""The ranks of this machine: start them, say how they are, ask them to save, take their stacks, kill them."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil

from ardist.config.launch import LaunchConfig
from ardist.errors import Preempted
from ardist.events import events
from ardist.launch import processes, scratch
from ardist.launch.engines import MODULE, Launch
from ardist.launch.watchdog import Failure
from ardist.process_identity import began
from ardist.training.heartbeat import DIRECTORY_VARIABLE, Beat, dump_signal, read_beats, stacks_path
from ardist.training.run_dir import GRACE_VARIABLE, LAUNCHER_VARIABLE

STACK_SECONDS = 2.0
KILL_SECONDS = 10.0
_GOOD = (0, Preempted.exit_code)
_log = logging.getLogger("ardist.launch")


@dataclass
class State:
    """How the ranks of a machine are: their beats, a failure of one of them, or the exit code when all have ended."""

    beats: list[Beat] = field(default_factory=list)
    failure: Failure | None = None
    exit_code: int | None = None


class Node(Protocol):
    """The ranks of one machine, this one or another."""

    name: str
    ranks: int
    """How many the job has, as far as this machine's launcher knows."""
    watched: int
    """How many ranks are to be heard here; more than beat as long as some have not been heard of."""

    def state(self) -> State:
        """How the ranks are now."""

    def send_signal(self, number: int) -> None:
        """Pass a signal on to every rank."""

    def stacks(self) -> dict[str, str]:
        """Have all ranks write their stacks; texts by file name."""

    def kill(self) -> None:
        """End every process of the job on the machine, at once."""


class LocalNode:
    """The ranks of this machine, under a launcher of somebody else's or directly."""

    def __init__(self, name: str, limits: LaunchConfig, module: str = MODULE) -> None:
        self.name = name
        self.ranks = 0
        self.watched = 0
        self._module = module
        self.scratch = scratch.make()
        self._mark = secrets.token_hex(8)
        self._limits = limits
        self._processes: list[subprocess.Popen[bytes]] = []
        self._guard: subprocess.Popen[bytes] | None = None
        self._pipe: int | None = None
        self._failure: Failure | None = None
        self.holder: socket.socket | None = None
        """What keeps the port where the ranks meet from being given to others; closed with the ranks."""

    @property
    def variables(self) -> dict[str, str]:
        """What ranks of this machine have in their environment so that they can be watched."""
        return {
            processes.VARIABLE: self._mark,
            DIRECTORY_VARIABLE: str(self.scratch),
            LAUNCHER_VARIABLE: f"{os.getpid()}:{began(os.getpid())}",
            GRACE_VARIABLE: str(self._limits.grace_seconds),
        }

    def start(self, launches: list[Launch], environment: Mapping[str, str]) -> None:
        """Start the processes of an attempt, and first of all the guard that outlives us.

        Raises `OSError` when the machine has no room for one of them; then nothing is left of the others.
        """
        try:
            self._start(launches, environment)
        except OSError:
            self.kill()
            raise

    def _start(self, launches: list[Launch], environment: Mapping[str, str]) -> None:
        common = {**environment, **self.variables}
        reader, self._pipe = os.pipe()
        words = [sys.executable, "-I", "-S", processes.__file__, str(reader), self._mark]
        words.append(str(self._limits.grace_seconds))
        try:
            self._guard = subprocess.Popen(words, pass_fds=[reader], start_new_session=True, stdin=subprocess.DEVNULL)
        finally:
            os.close(reader)
        for launch in launches:
            # Sessions of their own: Ctrl-C reaches the supervisor only, which asks the ranks to save.
            process = subprocess.Popen(
                launch.words,
                env={**common, **launch.environment},
                start_new_session=True,
                stdin=subprocess.DEVNULL,
            )
            self._processes.append(process)

    def state(self) -> State:
        """Deaths first: a rank that died is why its peers fail a moment later."""
        # Processes before beats: the beats of a process that has ended are its last.
        codes = {process.pid: process.poll() for process in self._processes}
        beats = read_beats(self.scratch)
        if self._failure is None:
            self._failure = self._judge(beats, codes)
        ended = all(code is not None for code in codes.values())
        return State(beats, self._failure, self._exit_code(beats, codes) if ended else None)

    def _judge(self, beats: list[Beat], codes: Mapping[int, int | None]) -> Failure | None:
        for beat in beats:
            if beat.exit_code is None and not beat.alive:
                # Its last words may have been written between our look at the file and at the process.
                [again] = [other for other in read_beats(self.scratch) if other.rank == beat.rank]
                if again.exit_code is None:
                    return self._died(again, codes.get(beat.pid))
        failed = [beat for beat in beats if beat.exit_code not in (None, *_GOOD)]
        if failed:
            first = min(failed, key=lambda beat: beat.ended)
            detail = f"rank {first.rank} on {first.host} ended with exit code {first.exit_code}: {first.message}"
            seconds = max(0.0, time.monotonic() - first.ended)
            return Failure(
                "error", detail, first.rank, first.host, first.phase.words, first.step, seconds, first.exit_code
            )
        bad = [code for code in codes.values() if code not in (None, *_GOOD)]
        if bad and len([beat for beat in beats if beat.exit_code in _GOOD]) < max(1, len(beats)):
            return Failure(
                "start", f"the ranks of {self.name} ended with {_code_words(bad[0])}", exit_code=_plain(bad[0])
            )
        good = [beat for beat in beats if beat.exit_code in _GOOD]
        wanted = max(1, self.watched)
        if not bad and None not in codes.values() and len(good) < wanted:
            detail = f"the ranks of {self.name} ended, but {len(good)} of {wanted} said that they were done"
            return Failure("start", detail)
        return None

    def _died(self, beat: Beat, code: int | None) -> Failure:
        own = next((process for process in self._processes if process.pid == beat.pid), None)
        if own is not None and code is None:
            code = own.wait(1)  # the kernel's notice of a death may come a moment after it
        how = f"was ended by {_code_words(code)}" if code is not None else "died without a word"
        detail = f"rank {beat.rank} on {beat.host} {how} {beat.phase.words}, after step {beat.step}"
        seconds = max(0.0, time.monotonic() - beat.beat)
        return Failure("died", detail, beat.rank, beat.host, beat.phase.words, beat.step, seconds)

    def _exit_code(self, beats: list[Beat], codes: Mapping[int, int | None]) -> int:
        told = {beat.exit_code for beat in beats if beat.exit_code is not None}
        given = {_plain(code) for code in codes.values() if code is not None}
        for code in (*sorted(told - {*_GOOD}), Preempted.exit_code):
            if code in told:
                return code
        # A launcher reports 1 for ranks that said why they ended.
        bad = given - {0}
        return 0 if told == {0} or not bad else min(bad)

    def send_signal(self, number: int) -> None:
        """To the ranks, not to their launcher, which would not wait for their save."""
        ranks = rank_processes(self._mark, self._module)
        processes.send(ranks, number)
        if not ranks:
            for process in self._processes:
                process.terminate()

    def stacks(self) -> dict[str, str]:
        """A stopped rank is woken to write its stacks; it is killed right after anyway."""
        running = [beat for beat in read_beats(self.scratch) if beat.alive]
        sizes = {beat.rank: _size(stacks_path(self.scratch, beat.rank)) for beat in running}
        for beat in running:
            processes.send([beat.pid], dump_signal())
            processes.send([beat.pid], signal.SIGCONT)
        end = time.monotonic() + STACK_SECONDS
        waiting = dict(sizes)
        while waiting and time.monotonic() < end:
            time.sleep(0.1)
            now = {rank: _size(stacks_path(self.scratch, rank)) for rank in waiting}
            # They are written line by line: whole when the file has grown and then stays as it is.
            waiting = {rank: size for rank, size in now.items() if size == sizes[rank] or size != waiting[rank]}
        files = sorted(self.scratch.glob("stacks-rank-*.txt"))
        return {path.name: text for path in files if (text := path.read_text(encoding="utf-8", errors="replace"))}

    def kill(self) -> None:
        """SIGKILL to all, which ends stopped ones too; then the guard has nothing left to do."""
        left = processes.kill(self._mark)
        if left:
            _log.error("processes %s of the job cannot be killed", left)
        end = time.monotonic() + KILL_SECONDS
        for process in self._processes:
            process.kill()
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                # It hangs in the kernel, in a driver or a file system; the others need not wait for that.
                events.count("launch.not_killed", host=self.name, pid=process.pid)
        if self._guard is not None:
            self._guard.kill()
            self._guard.wait()
            self._guard = None
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None
        if self.holder is not None:
            self.holder.close()
        shutil.rmtree(self.scratch, ignore_errors=True)


def rank_processes(mark: str, module: str = MODULE) -> list[int]:
    """Process ids of the ranks of a job on this machine, without processes that a rank forked."""
    found = {}
    for pid in processes.members(mark):
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            if ("-m", module) in itertools.pairwise(process.cmdline()):
                found[pid] = process.ppid()
    return [pid for pid, parent in found.items() if parent not in found]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _plain(code: int) -> int:
    return code if code >= 0 else 128 - code


def _code_words(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name
