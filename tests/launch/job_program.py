"""The supervisor's program with toy ranks in place of training: ``python job_program.py HOSTFILE CONFIG WORDS...``.

The ranks get the configuration's run directory and all words, which they leave in it, one file per rank.
"""

from __future__ import annotations

import sys

from ardist import log
from ardist.config import TrainConfig, load_config
from ardist.errors import ArdistError
from ardist.launch.cluster import Cluster, Order, run_directory
from ardist.launch.hosts import read_hostfile
from ardist.launch.supervisor import Supervisor

if __name__ == "__main__":
    log.configure()
    hostfile, path, *overrides = sys.argv[1:]
    try:
        config = load_config(TrainConfig, path, overrides)
        order = Order(config, path, tuple(overrides), "plain", "toy_words")
        cluster = Cluster(order, read_hostfile(hostfile), "ssh", None, None)
        code = Supervisor(config.launch, run_directory(config), cluster.start).run()
    except ArdistError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    sys.exit(code)
