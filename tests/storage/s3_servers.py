"""S3 servers for tests: Ceph where it is installed, else moto; and a proxy in front that injects faults."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import os
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

CEPH_SCRIPTS = Path(__file__).resolve().parents[3] / "shared" / "ceph-rgw"
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


def ceph_missing() -> str | None:
    """Why Ceph cannot be used here, or None."""
    if not (CEPH_SCRIPTS / "up.sh").is_file():
        return "the scripts that start a Ceph gateway are not on this machine"
    missing = [name for name in ("radosgw", "ceph-mon", "ceph-osd") if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


@contextlib.contextmanager
def start_server(kind: str, folder: Path) -> Iterator[S3Server]:
    """Run ``ceph`` or ``moto`` for the length of a block."""
    if kind == "ceph":
        environment = {**os.environ, "CEPH_DIR": str(folder / "ceph")}
        subprocess.run(["bash", str(CEPH_SCRIPTS / "up.sh")], env=environment, check=True, capture_output=True)
        try:
            yield S3Server("ceph", "http://127.0.0.1:9104", "AKTEST", "SKTESTSKTEST")
        finally:
            subprocess.run(["bash", str(CEPH_SCRIPTS / "down.sh")], env=environment, check=False, capture_output=True)
        return
    from moto.server import ThreadedMotoServer

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    try:
        yield S3Server("moto", f"http://127.0.0.1:{port}", "AKTEST", "SKTESTSKTEST")
    finally:
        server.stop()


@dataclass
class FaultProxy:
    """Forwards to a server; each request first takes the next fault of the script, if its method matches.

    Faults: ``500``, ``503``, ``503/2`` (Retry-After 2), ``429``, ``403/Code``, ``reset``, ``short`` (half of the
    body, then the connection closes), ``stall`` (half of the body, then nothing), ``flip`` (one wrong byte),
    ``html`` (200 with a web page), ``norange`` (200 with the whole object), ``lost`` (done, but the answer is lost).
    """

    target: str
    script: list[tuple[str, str]] = field(default_factory=list)
    seen: list[tuple[str, str, str]] = field(default_factory=list)

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
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def stop(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

    def handle(self, request: http.server.BaseHTTPRequestHandler) -> None:
        """One request."""
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        fault = ""
        if self.script and self.script[0][0] in (request.command, "*"):
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
        drop = {"connection", "range"} if kind == "norange" else {"connection"}
        headers = {name: value for name, value in request.headers.items() if name.lower() not in drop}
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
                time.sleep(float(argument or "5"))
            request.connection.close()
            request.close_connection = True
        else:
            if kind == "flip":
                data = bytes([data[0] ^ 1]) + data[1:]
            self._answer(request, answer.status, kept, data)

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
