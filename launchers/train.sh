#!/usr/bin/env bash
# Train on several GPUs or CPU processes, on one machine or many, and start again what dies.
#
#   launchers/train.sh [--launcher deepspeed|torchrun|plain] [--ranks N | --hostfile FILE ...] CONFIG [section.key=value ...]
#
# --help lists all options. SIGTERM, SIGINT and SIGUSR1 finish the step, save and end with exit code 75: run the same
# command again to continue, on as many ranks as you like; a second signal ends everything at once. Ranks that die, hang
# or vanish with their machine are started again from the last checkpoint (launch.max_restarts in the configuration).
# PYTHON chooses the interpreter.
set -euo pipefail

if [[ -z "${PYTHON:-}" ]]; then
  root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
  if [[ -z "${VIRTUAL_ENV:-}" && -x "${root}/.venv/bin/python" ]]; then
    PYTHON="${root}/.venv/bin/python"
  else
    PYTHON=python
  fi
fi

# The process is replaced, so that a signal to this script is a signal to the program.
exec "${PYTHON}" -m ardist.launch.main "$@"
