"""The program of launchers/train.sh with toy ranks in place of training; the same command line."""

from __future__ import annotations

import sys

from ardist.launch.main import main

if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--launcher", "plain"], module="toy_words"))
