"""What compilers should not look into."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def trace_time_constant(function: Callable[P, R]) -> Callable[P, R]:
    """Have a compiler call `function` while it traces and keep the result as a constant.

    For pure functions of plain values (numbers, strings, None, dtypes, devices; anything else would be guarded by
    identity). The function may be cached, run kernels or look at the machine, none of which a trace could contain.
    """
    marked: Callable[P, R] = torch.compiler.assume_constant_result(function)
    return marked
