"""Start a training run on this machine or many through the `deepspeed` launcher, and behave well around it.

The launcher alone leaves its ranks running when it gets SIGTERM, gives them 30 seconds to save, and reports 1 whatever
their exit code was. This program passes signals to the ranks themselves, waits as long as their save takes, and
returns their exit code (75: stopped on request, everything saved).
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

import psutil

from ardist.config import TrainConfig, load_config
from ardist.errors import ArdistError
from ardist.training.distributed import uses_gpu

MODULE = "ardist.training.main"
LAUNCHER_VARIABLE = "ARDIST_LAUNCHER"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def parser() -> argparse.ArgumentParser:
    """The command line of launchers/train.sh."""
    words = argparse.ArgumentParser(
        prog="train.sh",
        description="Train on several GPUs or CPU processes, on one machine or many.",
        epilog="Exit codes: 0 done, 2 bad configuration, 3 bad data, 4 bad machine, 75 stopped and saved: run again.",
    )
    words.add_argument("--ranks", type=int, help="processes on this machine; default: every GPU, or 1 on a CPU")
    words.add_argument("--hostfile", help="machines and their slots, one 'name slots=8' per line")
    words.add_argument("--include", help="part of the hostfile, as the deepspeed launcher reads it: 'a@b:0,2'")
    words.add_argument("--exclude", help="part of the hostfile to leave out")
    words.add_argument("--num-nodes", type=int, help="the first N machines of the hostfile")
    words.add_argument("--launcher", help="how other machines are reached: pdsh (default), slurm, openmpi, ...")
    words.add_argument("--no-ssh", action="store_true", help="start on this machine only; run this on every machine")
    words.add_argument("--node-rank", type=int, help="with --no-ssh: number of this machine in the hostfile")
    words.add_argument("--master-addr", help="address of the first machine")
    words.add_argument("--master-port", type=int, help="port on it; default: a free one, 29500 with a hostfile")
    words.add_argument("--debug", action="store_true", help="tracebacks and debug messages")
    words.add_argument("config", help="a YAML file such as configs/quickstart/denoiser.yaml")
    words.add_argument("overrides", nargs="*", help="settings over the file's: training.steps=200")
    return words


def command(options: argparse.Namespace) -> list[str]:
    """The launcher's command line for parsed options."""
    words = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "info" if options.debug else "error"]
    if options.hostfile:
        for name in ("hostfile", "include", "exclude", "launcher", "master_addr"):
            value = getattr(options, name)
            words += [f"--{name}", value] if value else []
        for name in ("num_nodes", "node_rank"):
            value = getattr(options, name)
            words += [f"--{name}", str(value)] if value is not None else []
        words += ["--no_ssh"] if options.no_ssh else []
        words += ["--num_gpus", str(options.ranks)] if options.ranks else []
    else:
        words += ["--num_gpus", str(options.ranks or _default_ranks())]
    port = options.master_port or (None if options.hostfile else _free_port())
    words += ["--master_port", str(port)] if port else []
    words += ["--module", MODULE, options.config, *options.overrides]
    return words + (["--debug"] if options.debug else [])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the launcher to its end and return the exit code of the ranks."""
    options = parser().parse_intermixed_args(arguments)
    if options.ranks is not None and options.ranks < 1:
        print(f"train.sh: --ranks {options.ranks} is out of range; legal: 1 and more", file=sys.stderr)
        return 2
    try:
        load_config(TrainConfig, options.config, options.overrides)
    except ArdistError as error:
        print(f"train.sh: {error}", file=sys.stderr)
        return error.exit_code
    environment = dict(os.environ)
    ranks = options.ranks or _default_ranks()
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    if not uses_gpu():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    me = psutil.Process()
    environment[LAUNCHER_VARIABLE] = f"{me.pid}:{me.create_time()}"
    # A session of its own: Ctrl-C reaches this program only, which asks the ranks to save.
    launcher = subprocess.Popen(command(options), env=environment, start_new_session=True)

    def forward(number: int, frame: FrameType | None) -> None:
        targets = rank_processes(launcher.pid)
        for target in targets:
            target.send_signal(number)
        if not targets:
            launcher.terminate()

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, forward)
    code = launcher.wait()
    for orphan in rank_processes(launcher.pid):
        orphan.terminate()
    return code if code >= 0 else 128 - code


def rank_processes(launcher: int) -> list[psutil.Process]:
    """The ranks on this machine that descend from a launcher."""
    found = []
    try:
        children = psutil.Process(launcher).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    for process in children:
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if any(pair == ("-m", MODULE) for pair in itertools.pairwise(words)):
            found.append(process)
    return found


def _default_ranks() -> int:
    import torch

    return torch.cuda.device_count() if uses_gpu() else 1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
