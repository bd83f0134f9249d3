"""The program of launchers/train.sh: check, start, watch, restart."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from ardist import log
from ardist.config import TrainConfig, batch_layout, load_config
from ardist.errors import ArdistError, ConfigError, InvalidValueError
from ardist.launch.cluster import Cluster, Order, run_directory, start_alone
from ardist.launch.engines import ENGINES, MODULE, Host, Placement
from ardist.launch.hosts import is_here, read_hostfile
from ardist.launch.local import count_gpus
from ardist.launch.nodes import Node
from ardist.launch.pdsh import PdshCluster
from ardist.launch.requeue import may_requeue
from ardist.launch.supervisor import Supervisor

DEFAULT_PORT = 29500


def parser() -> argparse.ArgumentParser:
    """The command line of launchers/train.sh."""
    words = argparse.ArgumentParser(
        prog="train.sh",
        description="Train on several GPUs or CPU processes, on one machine or many, and start again what dies.",
        epilog="Exit codes: 0 done, 2 bad configuration, 3 bad data, 4 bad machine (a rank was killed or hung, a "
        "machine was lost, and restarts did not help), 75 stopped and saved: run again. How long a hang may last and "
        "how often is started again is set by launch.* in the configuration. With a hostfile each restart takes the "
        "machines that answer: a job goes on without one that is lost, and one that is back takes part from the next "
        "restart on, not before; to have it at once, stop the job with SIGTERM and run the same command. Send signals "
        "to this program alone: DeepSpeed's launcher, when it gets a SIGTERM of its own, kills its ranks half a minute "
        "later, saved or not (a scheduler that signals every process may do that; --launcher torchrun gives the same "
        "half a minute, --launcher plain has nothing in between).",
    )
    words.add_argument("--ranks", type=int, help="processes on this machine; default: every GPU, or 1 on a CPU")
    words.add_argument("--launcher", choices=ENGINES, default=ENGINES[0], help="what starts the ranks of a machine")
    words.add_argument("--hostfile", help="machines and their slots, one 'name slots=8' per line")
    words.add_argument("--num-nodes", type=int, help="the first N machines of the hostfile; with --no-ssh: how many")
    words.add_argument(
        "--remote-shell", default="ssh", help="how other machines are reached: ssh, srun, pdsh, or like ssh"
    )
    words.add_argument("--no-ssh", action="store_true", help="start on this machine only; run this on every machine")
    words.add_argument("--node-rank", type=int, help="with --no-ssh: number of this machine, from 0")
    words.add_argument("--master-addr", help="address of the first machine, as the others see it")
    words.add_argument("--master-port", type=int, help="port on it; default: a free one, 29500 with --no-ssh")
    words.add_argument(
        "--may-requeue",
        action="store_true",
        help="start nothing; exit code 0: a job that failed at its time limit may be put back into a queue, which is "
        "noted in the run directory, 1: there is no checkpoint to go on from, or launch.max_restarts such jobs in a "
        "row made none",
    )
    words.add_argument("--debug", action="store_true", help="tracebacks and debug messages")
    words.add_argument("config", help="a YAML file such as configs/quickstart/denoiser.yaml")
    words.add_argument("overrides", nargs="*", help="settings over the file's: training.steps=200")
    return words


def main(arguments: Sequence[str] | None = None, module: str = MODULE) -> int:
    """Run a job to its end and return its exit code; `module` is the program of a rank."""
    options = parser().parse_intermixed_args(arguments)
    log.configure(level="DEBUG" if options.debug else "INFO")
    try:
        return run(options, module)
    except ArdistError as error:
        print(f"train.sh: {error}", file=sys.stderr)
        return error.exit_code


def run(options: argparse.Namespace, module: str = MODULE) -> int:
    """Check the options and the configuration before anything is started, then supervise."""
    if options.ranks is not None and options.ranks < 1:
        raise InvalidValueError(f"--ranks {options.ranks} is out of range; legal: 1 and more")
    if options.master_port is not None and not 1 <= options.master_port <= 65535:
        raise InvalidValueError(f"--master-port {options.master_port} is out of range; legal: 1 to 65535")
    config = load_config(TrainConfig, options.config, options.overrides)
    if options.may_requeue:
        return 0 if may_requeue(config) else 1
    order = Order(config, options.config, tuple(options.overrides), options.launcher, module, options.debug)
    starter = _starter(options, order)
    first = not options.no_ssh or options.node_rank == 0
    return Supervisor(config.launch, run_directory(config), starter, keeps_book=first).run()


def _starter(options: argparse.Namespace, order: Order) -> Callable[[int, str], Sequence[Node]]:
    if options.no_ssh:
        return start_alone(order, _own_place(options, order))
    for name in ("node_rank", "num_nodes", "master_addr"):
        if getattr(options, name) is not None and options.hostfile is None:
            raise ConfigError(f"--{name.replace('_', '-')} needs --hostfile or --no-ssh")
    if options.hostfile is None:
        alone = (Host("localhost", options.ranks or count_gpus() or 1),)
        _check_ranks(order, alone)
        return start_alone(order, Placement(alone, 0, "127.0.0.1", options.master_port or 0))
    hosts = _hosts(options)
    _check_ranks(order, hosts)
    if len(hosts) > 1 and "localhost" in [host.name for host in hosts]:
        raise ConfigError("the hostfile names localhost beside other machines, which cannot find it under that name")
    if options.remote_shell == "pdsh":
        return PdshCluster(order, hosts, options.master_addr, options.master_port).start
    return Cluster(order, hosts, options.remote_shell, options.master_addr, options.master_port).start


def _hosts(options: argparse.Namespace) -> tuple[Host, ...]:
    hosts = read_hostfile(options.hostfile, options.num_nodes)
    if options.ranks:
        short = [host for host in hosts if host.slots < options.ranks]
        if short:
            raise ConfigError(f"--ranks {options.ranks} is more than the slots={short[0].slots} of {short[0].name}")
        hosts = tuple(Host(host.name, options.ranks) for host in hosts)
    return hosts


def _own_place(options: argparse.Namespace, order: Order) -> Placement:
    """This machine's place in a job that somebody else starts on every machine."""
    if options.hostfile is not None:
        hosts = _hosts(options)
    elif options.num_nodes is not None and options.num_nodes >= 1:
        ranks = options.ranks or count_gpus() or 1
        hosts = tuple(Host(f"machine-{number}", ranks) for number in range(options.num_nodes))
    else:
        raise ConfigError("--no-ssh needs --hostfile, or --num-nodes of 1 and more")
    if options.node_rank is None or not 0 <= options.node_rank < len(hosts):
        raise ConfigError(f"--no-ssh needs --node-rank of 0 to {len(hosts) - 1}, not {options.node_rank}")
    address = options.master_addr or (hosts[0].name if options.hostfile else None)
    if address is None:
        raise ConfigError("--no-ssh without a hostfile needs --master-addr, the address of machine 0")
    _check_ranks(order, hosts)
    if options.hostfile and options.node_rank == 0 and not is_here(hosts[0].name):
        raise ConfigError(f"--node-rank 0 is {hosts[0].name} in the hostfile, which is not this machine")
    return Placement(hosts, options.node_rank, address, options.master_port or DEFAULT_PORT)


def _check_ranks(order: Order, hosts: Sequence[Host]) -> None:
    try:
        batch_layout(order.config.training, sum(host.slots for host in hosts))
    except ValueError as error:
        raise ConfigError(f"training.{error}") from None


if __name__ == "__main__":
    sys.exit(main())
