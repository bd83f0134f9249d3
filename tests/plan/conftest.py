"""Tests of the plan share the tiny runs of the distributed tests and of the training ones."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("distributed", "training"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / folder))
