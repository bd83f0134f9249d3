"""S3 servers for tests: Ceph where it is installed, else moto; and a proxy in front that injects faults.

``python s3_servers.py`` says which one the tests will use here.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import os
import socket
import struct
import threading
import urllib.parse
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import ceph_gateway
import pytest

CHOICE = "ARDIST_TEST_S3"
"""Environment variable that decides: ceph (an error where it is not installed) or moto."""

BUCKET = "ardist-tests"


@dataclass(frozen=True)
class S3Server:
    """A running server and how to reach it."""

    name: str
    endpoint: str
    access_key: str
    secret_key: str

    def environment(self) -> dict[str, str]:
        """The standard settings that point a client here."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


def server_kind() -> tuple[str, str]:
    """(``ceph`` or ``moto``, a line that says which and why)."""
    missing = ceph_gateway.missing()
    kind = os.environ.get(CHOICE) or ("moto" if missing else "ceph")
    if kind == "ceph":
        if missing:
            raise RuntimeError(f"{CHOICE}=ceph, but it is {missing}")
        return kind, f"S3 tests run against Ceph RGW {ceph_gateway.version()}"
    why = "it was asked for" if missing is None else f"Ceph is {missing}; tests/storage/install_ceph.sh installs it"
    return kind, f"S3 tests run against moto's server: {why}"


@contextlib.contextmanager
def start_server(kind: str, folder: Path) -> Iterator[S3Server]:
    """Run ``ceph`` or ``moto`` for the length of a block; `folder` lies in pytest's own temporary folder.

    Ceph takes a while to start, so all processes of a test run share one.
    """
    if kind == "ceph":
        root = folder.parent.parent if "PYTEST_XDIST_WORKER" in os.environ else folder.parent
        with ceph_gateway.gateway(root / "ceph") as endpoint:
            yield S3Server("ceph", endpoint, ceph_gateway.ACCESS_KEY, ceph_gateway.SECRET_KEY)
        return
    chosen, why = server_kind()  # said at the end of the tests
    warnings.warn(why if chosen == "moto" else "S3 tests of this folder run against moto's server", stacklevel=2)
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    try:
        yield S3Server("moto", f"http://127.0.0.1:{port}", "AKTEST", "SKTESTSKTEST")
    finally:
        server.stop()


@contextlib.contextmanager
def moto_in_environment(folder: Path) -> Iterator[S3Server]:
    """moto's server with an empty bucket for the length of a block, and the environment pointing there."""
    import boto3

    with start_server("moto", folder) as running, pytest.MonkeyPatch.context() as patch:
        for name, value in running.environment().items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield running


@dataclass
class FaultProxy:
    """Forwards to a server; each request first takes the next fault of the script, if its method matches.

    The method is one of HTTP's, ``*``, or ``GET:text`` for requests whose path contains the text.

    Faults: ``500``, ``503``, ``503/2`` (Retry-After 2), ``429``, ``403/Code``, ``reset``, ``short`` (half of the
    body, then the connection closes), ``stall`` (half of the body, then nothing), ``flip`` (one wrong byte; ``flip/7``:
    byte 7), ``noise`` (only wrong bytes), ``html`` (200 with a web page), ``norange`` (200 with the whole object),
    ``lost`` (done, but the answer is lost).
    """

    target: str
    script: list[tuple[str, str]] = field(default_factory=list)
    seen: list[tuple[str, str, str]] = field(default_factory=list)
    release: threading.Event = field(default_factory=threading.Event)
    """Ends every stall when it is set."""

    def start(self) -> str:
        """Listen; returns the proxy's address."""
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None: ...

            def handle_any(self) -> None:
                proxy.handle(self)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self.address

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def stop(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

    def handle(self, request: http.server.BaseHTTPRequestHandler) -> None:
        """One request."""
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        fault = ""
        method, _, place = self.script[0][0].partition(":") if self.script else ("", "", "")
        if method in (request.command, "*") and place in urllib.parse.unquote(request.path):
            fault = self.script.pop(0)[1]
        self.seen.append((request.command, request.headers.get("Range") or "", fault))
        kind, _, argument = fault.partition("/")
        if kind == "reset":
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.connection.close()
            request.close_connection = True
            return
        if kind.isdigit():
            self._refuse(request, int(kind), argument)
            return
        if kind == "html":
            self._answer(request, 200, {"Content-Type": "text/html"}, b"<html>log in to the hotel network</html>")
            return
        if kind == "norange":
            self._answer(request, 200, *self._whole_object(request.path))
            return
        headers = {name: value for name, value in request.headers.items() if name.lower() != "connection"}
        host = self.target.removeprefix("http://")
        connection = http.client.HTTPConnection(host, timeout=30)
        connection.request(request.command, request.path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        kept = {
            name: value
            for name, value in answer.getheaders()
            if name.lower() not in ("connection", "transfer-encoding", "date", "server")
        }
        connection.close()
        if kind == "lost":
            request.connection.close()
            request.close_connection = True
        elif kind in ("short", "stall"):
            self._head(request, answer.status, kept)
            request.wfile.write(data[: len(data) // 2])
            request.wfile.flush()
            if kind == "stall":
                self.release.wait(float(argument or "5"))
            request.connection.close()
            request.close_connection = True
        else:
            if kind == "noise":
                data = bytes(byte ^ 1 for byte in data)
            if kind == "flip":
                place = int(argument or "0")
                data = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
            self._answer(request, answer.status, kept, data)

    def _whole_object(self, path: str) -> tuple[dict[str, str], bytes]:
        """Headers and body of an object: a request of its own, as the range belongs to what the client signed."""
        import boto3

        bucket, _, key = urllib.parse.unquote(path).removeprefix("/").partition("/")
        answer = boto3.client("s3", endpoint_url=self.target).get_object(Bucket=bucket, Key=key)
        return {"ETag": answer["ETag"]}, answer["Body"].read()

    def _refuse(self, request: http.server.BaseHTTPRequestHandler, status: int, argument: str) -> None:
        headers = {"Content-Type": "application/xml"}
        code = {503: "SlowDown", 500: "InternalError", 429: "TooManyRequests"}.get(status, argument)
        if argument.isdigit():
            headers["Retry-After"] = argument
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>scripted</Message></Error>"
        self._answer(request, status, headers, b"" if request.command == "HEAD" else text.encode())

    def _answer(
        self, request: http.server.BaseHTTPRequestHandler, status: int, headers: dict[str, str], data: bytes
    ) -> None:
        headers = {name: value for name, value in headers.items() if name.lower() != "content-length"} | (
            {"Content-Length": headers.get("Content-Length", headers.get("content-length", "0"))}
            if request.command == "HEAD"
            else {"Content-Length": str(len(data))}
        )
        self._head(request, status, headers)
        if request.command != "HEAD":
            request.wfile.write(data)

    def _head(self, request: http.server.BaseHTTPRequestHandler, status: int, headers: dict[str, str]) -> None:
        request.send_response_only(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.end_headers()


if __name__ == "__main__":
    print(server_kind()[1])
