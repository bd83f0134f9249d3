"""The program of launchers/train.sh: check, start, watch, restart."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from ardist import log
from ardist.config import TrainConfig, load_config
from ardist.errors import ArdistError, InvalidValueError
from ardist.launch.engines import ENGINES, MODULE, Host, Placement, launches
from ardist.launch.nodes import LocalNode, Node
from ardist.launch.supervisor import Supervisor
from ardist.training.goodput import JOB_VARIABLE


def parser() -> argparse.ArgumentParser:
    """The command line of launchers/train.sh."""
    words = argparse.ArgumentParser(
        prog="train.sh",
        description="Train on several GPUs or CPU processes, on one machine or many, and start again what dies.",
        epilog="Exit codes: 0 done, 2 bad configuration, 3 bad data, 4 bad machine (a rank was killed or hung, a "
        "machine was lost, and restarts did not help), 75 stopped and saved: run again.",
    )
    words.add_argument("--ranks", type=int, help="processes on this machine; default: every GPU, or 1 on a CPU")
    words.add_argument("--launcher", choices=ENGINES, default=ENGINES[0], help="what starts the ranks of a machine")
    words.add_argument("--master-port", type=int, help="port on the first machine; default: a free one")
    words.add_argument("--debug", action="store_true", help="tracebacks and debug messages")
    words.add_argument("config", help="a YAML file such as configs/quickstart/denoiser.yaml")
    words.add_argument("overrides", nargs="*", help="settings over the file's: training.steps=200")
    return words


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a job to its end and return its exit code."""
    options = parser().parse_intermixed_args(arguments)
    log.configure(level="DEBUG" if options.debug else "INFO")
    try:
        return run(options)
    except ArdistError as error:
        print(f"train.sh: {error}", file=sys.stderr)
        return error.exit_code


def run(options: argparse.Namespace) -> int:
    """Check the options and the configuration before anything is started, then supervise."""
    if options.ranks is not None and options.ranks < 1:
        raise InvalidValueError(f"--ranks {options.ranks} is out of range; legal: 1 and more")
    config = load_config(TrainConfig, options.config, options.overrides)
    ranks = options.ranks or default_ranks()
    hosts = (Host("localhost", ranks),)
    program = [MODULE, options.config, *options.overrides, *(["--debug"] if options.debug else [])]

    def start(attempt: int, job: str) -> list[Node]:
        node = LocalNode("localhost", config.launch)
        placement = Placement(hosts, 0, "127.0.0.1", options.master_port or free_port())
        environment = rank_environment(ranks) | {JOB_VARIABLE: f"{job}:{attempt}"}
        node.start(launches(options.launcher, placement, program, node.scratch, debug=options.debug), environment)
        return [node]

    return Supervisor(config.launch, Path(config.run_dir).expanduser().absolute(), start).run()


def rank_environment(ranks: int) -> dict[str, str]:
    """The environment of a rank's process on this machine."""
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    if not _uses_gpu():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    return environment


def default_ranks() -> int:
    """Every GPU of this machine, or one process without."""
    if not _uses_gpu():
        return 1
    import torch

    return torch.cuda.device_count()


def _uses_gpu() -> bool:
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return False
    # Only now: it takes seconds.
    from ardist.training.distributed import uses_gpu

    return uses_gpu()


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
