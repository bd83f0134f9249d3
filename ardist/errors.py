"""Every error a user can meet, each with the exit code of its family.

Exit codes: 0 done, 2 bad configuration or usage, 3 bad data, 4 bad hardware or environment,
75 preempted and safely saved (a scheduler should requeue), 1 anything we did not foresee.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import SupportsIndex


class ArdistError(Exception):
    """Base of all errors that are reported as one message without a traceback."""

    exit_code: int = 1


class ConfigError(ArdistError, ValueError):
    """The configuration or the command line asks for something that cannot be done."""

    exit_code = 2


class InvalidValueError(ArdistError, ValueError):
    """An argument is outside its legal range; the message names the value and the legal ones."""

    exit_code = 2


class DataError(ArdistError):
    """A dataset, shard, video or manifest is missing, damaged or of another kind than expected."""

    exit_code = 3


class CheckpointError(DataError):
    """No checkpoint or bundle could be read, or it belongs to another run, version or model."""


class HardwareError(ArdistError):
    """The machine cannot do what was asked: device, memory, disk, network, missing library or tool."""

    exit_code = 4


class Preempted(ArdistError):
    """The run was asked to stop, saved its state and can be continued."""

    exit_code = 75


def did_you_mean(word: str, legal: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the legal name nearest to `word`, or an empty string."""
    near = difflib.get_close_matches(word, list(legal), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def choose(name: str, value: str, legal: Iterable[str]) -> str:
    """Return `value` if it is one of `legal`, else raise an `InvalidValueError` that lists them."""
    names = list(legal)
    if value not in names:
        raise InvalidValueError(f"{name}={value!r} is not known{did_you_mean(value, names)}; legal: {', '.join(names)}")
    return value


def check_integer(name: str, value: object) -> None:
    """Raise InvalidValueError unless `value` is an integer: a size like 2.5 must not be rounded in silence."""
    if type(value) is int:  # all that a compiler meets, which cannot trace the question below
        return
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise InvalidValueError(f"{name}={value!r} is illegal; legal: an integer")
