"""S3 servers and clean prefixes for the storage tests."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest
from s3_servers import BUCKET, FaultProxy, S3Server, server_kind, start_server

_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Ceph where it is installed, else moto; ARDIST_TEST_S3=moto|ceph decides otherwise."""
    with start_server(server_kind()[0], tmp_path_factory.mktemp("s3")) as server:
        before = dict(os.environ)
        os.environ.update(server.environment())
        import boto3

        boto3.client("s3").create_bucket(Bucket=BUCKET)
        os.environ.clear()
        os.environ.update(before)
        yield server


@pytest.fixture
def s3_url(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty prefix, with the environment pointing at the server."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/t{next(_numbers)}-{os.getpid()}"


@pytest.fixture
def fault_proxy(s3_server: S3Server, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy between the client and the server; put faults into its script."""
    proxy = FaultProxy(s3_server.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.start())
    yield proxy
    proxy.stop()
