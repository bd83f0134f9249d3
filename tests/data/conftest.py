"""An S3 server for the remote reading tests, shared with the storage tests."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "storage"))

from s3_servers import BUCKET, FaultProxy, S3Server, start_server

_numbers = itertools.count()


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """moto, or what ARDIST_TEST_S3 says (ceph)."""
    with start_server(os.environ.get("ARDIST_TEST_S3", "moto"), tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def proxy(object_store: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy in front of the store that records requests and plays faults; the environment points at it."""
    proxy = FaultProxy(object_store.endpoint)
    address = proxy.start()
    for name, value in {**object_store.environment(), "AWS_ENDPOINT_URL": address}.items():
        monkeypatch.setenv(name, value)
    yield proxy
    proxy.stop()


@pytest.fixture
def bucket_url(proxy: FaultProxy) -> str:
    """An empty prefix."""
    import boto3

    boto3.client("s3").create_bucket(Bucket=BUCKET)
    return f"s3://{BUCKET}/data{next(_numbers)}-{os.getpid()}"
