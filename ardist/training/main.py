"""The program of one rank: ``python -m ardist.training.main CONFIG [section.key=value ...]``."""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from types import FrameType

from ardist import log
from ardist.config import TrainConfig, load_config
from ardist.errors import ArdistError, Preempted
from ardist.process_identity import is_running
from ardist.training import distributed
from ardist.training.heartbeat import heartbeat
from ardist.training.stopping import SIGNALS

LAUNCHER_VARIABLE = "ARDIST_LAUNCHER"
WATCH_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as one rank of the launcher's; returns the exit code (0, or that of the error's family)."""
    parser = argparse.ArgumentParser(
        prog="python -m ardist.training.main",
        description="One rank of a training run; started by launchers/train.sh, or alone.",
    )
    parser.add_argument("config", help="a YAML file such as configs/quickstart/denoiser.yaml")
    parser.add_argument("overrides", nargs="*", help="settings over the file's: training.steps=200")
    parser.add_argument("--local_rank", type=int, default=None, help="given by the deepspeed launcher")
    parser.add_argument("--debug", action="store_true", help="tracebacks and debug messages")
    options = parser.parse_intermixed_args(arguments)
    if options.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    log.configure(level=logging.DEBUG if options.debug else logging.INFO)
    try:
        config = load_config(TrainConfig, options.config, options.overrides)
        distributed.prepare_environment()
        from ardist.training.trainer import train

        train(config)
        heartbeat.end(0)
        return 0
    except ArdistError as error:
        heartbeat.end(error.exit_code, str(error))
        # Every rank meets the same bad configuration; one message per machine is enough.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            _show(error, f"ardist train: {error}", options.debug)
        return error.exit_code
    except KeyboardInterrupt:
        heartbeat.end(128 + signal.SIGINT, "interrupted")
        return 128 + signal.SIGINT
    except Exception as error:  # noqa: BLE001 - the last line of defence: reported, and the launcher ends the others
        heartbeat.end(1, f"{type(error).__name__}: {error}")
        rank = os.environ.get("RANK", "0")
        _show(error, f"ardist train, rank {rank}: unexpected {type(error).__name__}: {error}", debug=True)
        return 1


def prepare_process() -> None:
    """What only a process of its own needs: traces of native crashes, a heartbeat, an end when the launcher ends."""
    faulthandler.enable()
    leave_on_signals()
    heartbeat.start_from_environment()
    die_with_parent()
    watch_launcher()
    # DeepSpeed calls functions that this torch names otherwise; once per rank and kind is once too often.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def leave_on_signals() -> None:
    """Until the loop takes the signals over there is nothing to save: whoever asks for an end gets it at once."""

    def leave(number: int, frame: FrameType | None) -> None:
        heartbeat.end(Preempted.exit_code, f"{signal.Signals(number).name} while starting")
        os._exit(Preempted.exit_code)

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)


def die_with_parent() -> None:
    """Have the kernel send SIGTERM when the launcher dies, so that no orphan goes on training alone (Linux)."""
    if sys.platform == "linux" and "WORLD_SIZE" in os.environ:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def watch_launcher() -> None:
    """End this rank as on SIGTERM when the program of launchers/train.sh is gone, even if it was killed outright."""
    identity = os.environ.get(LAUNCHER_VARIABLE, "")
    if ":" not in identity:
        return
    pid, created = identity.split(":")

    def watch() -> None:
        while True:
            time.sleep(WATCH_SECONDS)
            if not is_running(int(pid), float(created)):
                os.kill(os.getpid(), signal.SIGTERM)
                return

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


def _show(error: BaseException, message: str, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    prepare_process()
    distributed.leave(main())
