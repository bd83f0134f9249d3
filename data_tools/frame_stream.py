"""Raw frames out of a limited, killable ffmpeg process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import selectors
import signal
import subprocess
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ardist.events import events
from data_tools.probe import open_checked
from data_tools.reasons import Reason, Refusal
from data_tools.sandbox import Limits, kill_group, limit_child

Frames = npt.NDArray[np.uint8]

_PIPE_BYTES = 2**20
_MAX_STDERR = 4000
_STDERR_FLOOD = 16 * 2**20
_F_SETPIPE_SZ = 1031
_END_SECONDS = 30.0
_ADDRESS = re.compile(r" @ 0x[0-9a-f]+")


class FrameStream:
    """The output of one process that decodes the file at `path`; a context manager that kills it at the end."""

    def __init__(
        self, path: str, version: str | None, command: Callable[[int], list[str]], *, timeout: float, memory: int
    ) -> None:
        self._timeout, self._waited = timeout, 0.0
        self._complaints, self._complaint_bytes = bytearray(), 0
        descriptor = open_checked(path, version)
        try:
            self._process = subprocess.Popen(
                command(descriptor),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(descriptor,),
                start_new_session=True,
                env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C"},
            )
        finally:
            os.close(descriptor)
        limit_child(self._process.pid, Limits(memory=memory, cpu_seconds=max(1, int(timeout))))
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._out, self._err = self._process.stdout.fileno(), self._process.stderr.fileno()
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._out, _F_SETPIPE_SZ, _PIPE_BYTES)
        self._selector = selectors.DefaultSelector()
        for stream in (self._out, self._err):
            os.set_blocking(stream, False)
            self._selector.register(stream, selectors.EVENT_READ)

    def __enter__(self) -> FrameStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        kill_group(self._process)

    def read_into(self, frames: Frames) -> int:
        """Fill `frames` [n, H, W, 3]; returns how many whole frames came before the end.

        Raises `Refusal` when the process lets wait too long or floods its error stream.
        """
        view = frames.reshape(-1).data
        done = 0
        while done < len(view):
            got = self._read_some(view[done:])
            if got == 0:
                break
            done += got
        return done // frames[0].nbytes if len(frames) else 0

    def finish(self) -> str:
        """Read to the end; returns what went wrong, empty when the process ended well.

        Raises `Refusal` when a limit, a crash or our patience ended it.
        """
        scratch = memoryview(bytearray(2**20))
        while self._read_some(scratch):
            pass
        try:
            status = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            raise self._late("did not end after its last frame") from None
        while self._err in self._selector.get_map() and self._selector.select(0):
            self._drain_complaints()
        if status < 0:
            name = signal.Signals(-status).name
            reason = Reason.TIMEOUT if -status == signal.SIGXCPU else Reason.CRASHED
            events.count("build.child_died", stage="decode", status=name)
            raise Refusal(reason, f"the decoder was ended by {name}")
        if status == 0:
            return ""
        said = self._complaints.decode("utf-8", "replace").strip()
        # The first line, without the addresses that differ from run to run.
        return _ADDRESS.sub("", said.partition("\n")[0]) or f"the decoder ended with status {status}"

    def _late(self, what: str) -> Refusal:
        events.count("build.child_killed", stage="decode", reason="timeout")
        return Refusal(Reason.TIMEOUT, f"the decoder {what}")

    def _read_some(self, view: memoryview) -> int:
        """At least one byte into `view`, or 0 at the end."""
        while self._out in self._selector.get_map():
            before = time.monotonic()
            ready = self._selector.select(max(0.0, self._timeout - self._waited))
            # Only waiting for the decoder counts: a full queue downstream is not its fault.
            self._waited += time.monotonic() - before
            if not ready:
                raise self._late(f"kept us waiting for more than {self._timeout:g} s")
            for key, _ in ready:
                if key.fd == self._err:
                    self._drain_complaints()
                    continue
                with contextlib.suppress(BlockingIOError):
                    got = os.readv(self._out, [view])
                    if got == 0:
                        self._selector.unregister(self._out)
                    return got
        return 0

    def _drain_complaints(self) -> None:
        with contextlib.suppress(BlockingIOError):
            piece = os.read(self._err, 2**16)
            if not piece:
                self._selector.unregister(self._err)
            self._complaint_bytes += len(piece)
            self._complaints += piece[: max(0, _MAX_STDERR - len(self._complaints))]
            if self._complaint_bytes > _STDERR_FLOOD:
                events.count("build.child_killed", stage="decode", reason="flood")
                raise Refusal(Reason.CRASHED, "the decoder flooded its error stream")
