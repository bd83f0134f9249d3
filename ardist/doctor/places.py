"""Disks, shared memory, and the data: is it there, can it be read, with which kind of credentials."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ardist.config import TrainConfig
from ardist.data.manifest import load_manifest
from ardist.doctor.findings import Finding, bad, good, weak
from ardist.errors import ArdistError
from ardist.launch.local import count_gpus
from ardist.plan.plan import count_parameters
from ardist.training.dataset import paths
from ardist.training.object_store import open_store

_GIB = 2**30
_PROBE = 16 * 2**20


def run_directory(config: TrainConfig) -> Iterator[Finding]:
    """Room for the checkpoints that are kept, and a disk that takes them."""
    place = Path(config.run_dir).expanduser().absolute()
    existing = next(parent for parent in (place, *place.parents) if parent.exists())
    needed = count_parameters(config) * 4 * (3 + len(config.training.ema_decays)) * (config.checkpoint.keep + 1)
    free = shutil.disk_usage(existing).free
    detail = (
        f"{free / _GIB:.1f} GiB free, {needed / _GIB:.1f} GiB for {config.checkpoint.keep} checkpoints and the next"
    )
    if free < needed:
        yield bad("run directory", f"{place}: {detail}", "free some space, lower checkpoint.keep, or move run_dir")
        return
    try:
        seconds = _write_probe(existing)
    except OSError as error:
        yield bad("run directory", f"{existing} cannot be written: {error.strerror}", "choose another run_dir")
        return
    yield good("run directory", f"{place}: {detail}, {_PROBE / 2**20 / seconds:.0f} MiB/s to disk")


def _write_probe(directory: Path) -> float:
    began = time.perf_counter()
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".ardist-doctor-") as file:
        file.write(os.urandom(_PROBE))
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - began


def shared_memory() -> Iterator[Finding]:
    """What collectives between processes of one machine go through."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return
    free = shutil.disk_usage(place).free
    if free < 2**30 and count_gpus() > 1:
        yield bad("/dev/shm", f"{free / _GIB:.2f} GiB free", "give the container more: docker run --shm-size=16g")
    elif free < 2**26:
        yield weak("/dev/shm", f"{free / 2**20:.0f} MiB free", "give the container more: docker run --shm-size=1g")
    else:
        yield good("/dev/shm", f"{free / _GIB:.1f} GiB free")


def data(config: TrainConfig) -> Iterator[Finding]:
    """Every dataset's manifest is read; for s3:// that needs the endpoint, the credentials and the right to read."""
    for path in [*paths(config.data), *([config.validation.path] if config.validation.path else [])]:
        subject = f"data {path}"
        if path.startswith("s3://"):
            yield _credentials()
        began = time.perf_counter()
        try:
            manifest = load_manifest(path)
        except ArdistError as error:
            advice = "check the path; for s3:// the endpoint (AWS_ENDPOINT_URL), the region and the credentials"
            yield bad(subject, str(error), advice)
            continue
        seconds = time.perf_counter() - began
        yield good(subject, f"{manifest.num_samples:,} {manifest.kind} of {manifest.shape}, read in {seconds:.2f} s")


def checkpoints(config: TrainConfig) -> Iterator[Finding]:
    """The object store for checkpoints can be listed and written, and tells two writers apart; nothing stays there."""
    if config.checkpoint.url is None:
        return
    subject = f"checkpoints {config.checkpoint.url}"
    yield _credentials()
    began = time.perf_counter()
    try:
        store = open_store(config.checkpoint, Path(config.run_dir).expanduser() / "checkpoints")
        steps = store.steps()
        store.check()
    except (ArdistError, OSError) as error:
        advice = "check the bucket, the endpoint (AWS_ENDPOINT_URL), and the rights to list, read, write and delete"
        yield bad(subject, str(error), advice)
        return
    there = f"the newest of {len(steps)} is of step {steps[0]}" if steps else "none there yet"
    yield good(subject, f"can be written, {there}, {time.perf_counter() - began:.2f} s")


def _credentials() -> Finding:
    """Where they come from; what they are is nobody's business."""
    environment = os.environ
    home = Path(environment.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")).expanduser()
    sources = {
        "from the environment": "AWS_ACCESS_KEY_ID" in environment,
        "from a web identity": "AWS_WEB_IDENTITY_TOKEN_FILE" in environment,
        "from the container's service": any(name.startswith("AWS_CONTAINER_CREDENTIALS") for name in environment),
        "from a profile": "AWS_PROFILE" in environment,
        "from a file": home.is_file(),
    }
    found = next((words for words, there in sources.items() if there), None)
    if found is None:
        advice = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, unless the machine has a role"
        return weak("S3 credentials", "neither in the environment nor in a file", advice)
    return good("S3 credentials", found)
