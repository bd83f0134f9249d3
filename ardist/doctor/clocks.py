"""The time of day of this machine: kept by somebody, and that of the object store. Training itself does not ask for it,
but signed requests do, and logs of several machines are compared by it."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Iterator

from ardist.config import TrainConfig
from ardist.doctor.findings import Finding, bad, good, weak
from ardist.errors import ArdistError
from ardist.storage import open_storage
from ardist.storage.s3 import S3Storage
from ardist.training.dataset import paths

REFUSED_SECONDS = 900.0
"""How far off a signed request may be."""

SKEW_SECONDS = 5.0
_TIME_ERROR = 5
_ADVICE = "start a time service (chrony, systemd-timesyncd); S3 refuses requests with a wrong time"


def this_clock() -> Iterator[Finding]:
    """Whether the kernel's clock is kept right by a time service."""
    now = time.strftime("%F %T UTC", time.gmtime())
    state = clock_state()
    if state is None:
        yield good("clock", f"{now}; this system does not say whether a time service keeps it")
    elif state == _TIME_ERROR:
        yield weak("clock", f"{now}; no time service keeps it", _ADVICE)
    else:
        yield good("clock", f"{now}, kept by a time service")


def clock_state() -> int | None:
    """What the kernel says of its clock (adjtimex(2)): 0 to 4 synchronised, 5 not; None where it cannot be asked."""
    if sys.platform != "linux":
        return None
    # A struct timex that only asks: all its words are zero, and so is the first, `modes`.
    state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(1024))
    return None if state < 0 else int(state)


def store_clocks(config: TrainConfig) -> Iterator[Finding]:
    """Our clock beside that of every object store that the run reads or writes."""
    places = [*paths(config.data), config.validation.path, config.checkpoint.url]
    buckets = {"/".join(place.split("/")[:3]): place for place in places if place and place.startswith("s3://")}
    for bucket, place in sorted(buckets.items()):
        subject = f"clock of {bucket}"
        storage = open_storage(place)
        assert isinstance(storage, S3Storage)
        before = time.time()
        try:
            theirs = storage.server_time()
        except ArdistError as error:
            yield bad(subject, str(error), "check the endpoint (AWS_ENDPOINT_URL), the region and the credentials")
            continue
        if theirs is None:
            yield weak(subject, "its answers tell no time", "compare the clocks in another way")
            continue
        # It was told in whole seconds, at some moment of the request.
        skew = theirs - (before + time.time()) / 2
        words = f"{skew:+.0f} s from ours"
        if abs(skew) > REFUSED_SECONDS:
            yield bad(subject, words, _ADVICE)
        elif abs(skew) > SKEW_SECONDS:
            yield weak(subject, words, _ADVICE)
        else:
            yield good(subject, words)
