"""The whole road in one command, on real videos, small enough for a laptop."""

from ardist.quickstart.road import run_quickstart

__all__ = ["run_quickstart"]
