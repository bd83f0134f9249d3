"""What DeepSpeed starts through pdsh in place of a rank: ``python -m ardist.launch.relay WORD``; it becomes the rank.

The word holds what no line for a shell could: the rank's own words and its environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ardist.launch import processes
from ardist.launch.local import rank_environment
from ardist.launch.wire import decode
from ardist.process_identity import machine_id
from ardist.training.heartbeat import DIRECTORY_VARIABLE


def environment_of(message: dict[str, Any]) -> dict[str, str]:
    """The rank's environment; on the supervisor's machine it beats where the supervisor looks."""
    os.environ.update(message["environment"])
    host = message["hosts"][int(os.environ["CROSS_RANK"])]
    environment = rank_environment(int(os.environ["LOCAL_SIZE"]), host) | {processes.VARIABLE: message["mark"]}
    watched: dict[str, str] = message["watched"]
    if machine_id() == message["machine"] and Path(watched[DIRECTORY_VARIABLE]).is_dir():
        environment |= watched
    return environment


def main() -> None:
    """Leave somebody who kills the rank when the connection ends, then become it."""
    message = decode(sys.argv[-1])
    environment = environment_of(message)
    # Input is the connection's; whoever holds its output would keep the connection open.
    guard = [sys.executable, "-I", "-S", processes.__file__, "0", message["mark"], "0"]
    subprocess.Popen(guard, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.execve(sys.executable, [sys.executable, "-u", "-m", *message["program"]], environment)


if __name__ == "__main__":
    main()
