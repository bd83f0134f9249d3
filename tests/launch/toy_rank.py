"""A rank without torch: steps, heartbeats, checkpoints of its own, and faults on demand; for tests of the supervisor.

Run as ``python -m toy_rank DIRECTORY STEPS SECONDS``. A file ``fault-RANK`` in the directory says ``STEP WHAT`` and is
taken once; step -1 is before the first beat, the last one after the last word. ``hold`` waits there until the rank is
asked to stop, of which a file ``asked-RANK`` tells. The state after step n is n, so that what a recovered run did can
be compared with an undisturbed one.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

from ardist.training.heartbeat import Phase, heartbeat

stop = False


def on_signal(number: int, frame: object) -> None:
    global stop
    stop = True
    (Path(sys.argv[1]) / f"asked-{os.environ['RANK']}").touch()


def strike(what: str) -> None:
    if what == "segfault":
        ctypes.string_at(0)
    elif what == "gil":
        ctypes.PyDLL(None).sleep(1000)
    elif what == "loop":
        while True:
            time.sleep(0.1)
    elif what == "hold":
        while not stop:
            time.sleep(0.01)
    elif what == "leave":
        os._exit(0)
    elif what == "raise":
        raise RuntimeError("something unforeseen")
    elif what.startswith("exit"):
        code = int(what[4:])
        heartbeat.end(code, f"told to leave with {code}")
        os._exit(code)
    else:
        os.kill(os.getpid(), getattr(signal, what))


def main() -> int:
    directory, steps, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    take_fault(directory / f"fault-{rank}", -1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, on_signal)
    heartbeat.start_from_environment()
    saved = directory / "saved"
    step = int(saved.read_text()) if saved.exists() else 0
    first = step
    heartbeat.resumed(step)
    while step < steps:
        take_fault(directory / f"fault-{rank}", step)
        step += 1
        # The others wait for a rank that does not come, as they would in a collective.
        (directory / f"at-{rank}").write_text(str(step))
        heartbeat.advance()
        while any(read(directory / f"at-{other}") < step for other in range(size)):
            time.sleep(0.005)
        with heartbeat.phase(Phase.DATA):
            time.sleep(seconds)
        heartbeat.stepped(step)
        announced = directory / "stop-after"
        if stop and read(announced) <= first:
            announced.write_text(str(step + 2))
        leaving = step >= read(announced) > first
        if rank == 0:
            with open(directory / "history", "a") as file:
                file.write(f"{step}\n")
            if step % 5 == 0 or leaving:
                saved.write_text(str(step))
        if leaving:
            heartbeat.end(75, "asked to stop")
            return 75
    heartbeat.end(0)
    take_fault(directory / f"fault-{rank}", steps)
    return 0


def take_fault(path: Path, step: int) -> None:
    words = path.read_text().split() if path.exists() else []
    if words and int(words[0]) == step:
        path.unlink()
        strike(words[1])


def read(path: Path) -> int:
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return 0


if __name__ == "__main__":
    try:
        code = main()
    except RuntimeError as error:
        heartbeat.end(1, str(error))
        code = 1
    os._exit(code)
