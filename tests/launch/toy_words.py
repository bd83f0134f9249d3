"""A toy rank that takes the command line of a real one: it writes its words down, then steps as `toy_rank` does."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import toy_rank

from ardist.config import TrainConfig, load_config
from ardist.training.heartbeat import heartbeat

if __name__ == "__main__":
    config = load_config(TrainConfig, sys.argv[1], sys.argv[2:])
    directory = Path(config.run_dir)
    directory.mkdir(parents=True, exist_ok=True)
    told = {
        "words": sys.argv[1:],
        "environment": {
            name: value
            for name, value in os.environ.items()
            if name.startswith(("MASTER", "WORLD", "GLOO_", "ARDIST_T"))
        },
    }
    (directory / f"told-{os.environ['RANK']}.json").write_text(json.dumps(told))
    sys.argv[1:] = [str(directory), str(config.training.steps), "0.02"]
    try:
        code = toy_rank.main()
    except RuntimeError as error:
        heartbeat.end(1, str(error))
        code = 1
    os._exit(code)
