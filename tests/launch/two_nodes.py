"""Two machines on one: network namespaces joined by a cable, and a remote shell that really crosses it.

``python two_nodes.py serve ADDRESS PORT`` runs in the other namespace and starts what it is asked to; the file is also
installed as the ``ssh`` of the tests, which connects to it and relays standard input, output and error.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "launchers" / "train.sh"
HOSTS = "10.77.0.1 slots=1\n10.77.0.2 slots=1\n"
ODD = 'it\'s $(not) a `shell`; "&" | > * ? \\ two  blanks'
"""What no shell on the way must touch."""

PORT = 2222
OUT, ERR, END = 1, 2, 3


def wait_until(condition: Callable[[], object], seconds: float = 200) -> None:
    """Look again and again; an assertion error after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


def until_said(job: subprocess.Popen[str], text: str) -> None:
    """Read what a job says until a line has `text`; what is read is gone from its output."""
    seen = []
    while text not in (line := job.stdout.readline()):
        seen.append(line)
        assert line, "".join(seen)


def serve(address: str) -> None:
    """A shell for everybody who connects: a line with the script, then its input; frames of output come back."""
    listener = socket.create_server((address, PORT))
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=run, args=(connection,), daemon=True).start()


def run(connection: socket.socket) -> None:
    """One command, until it ends; its input ends with the connection."""
    file = connection.makefile("rb", buffering=0)
    if not (line := file.readline()):
        return  # somebody only asked whether we are there
    script = bytes.fromhex(line.decode()).decode()
    process = subprocess.Popen(
        ["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    lock = threading.Lock()

    def send(kind: int, data: bytes) -> None:
        with lock, contextlib.suppress(OSError):
            connection.sendall(bytes([kind]) + len(data).to_bytes(4, "big") + data)

    def relay(kind: int, stream: object) -> None:
        while data := stream.read(65536):  # type: ignore[attr-defined]
            send(kind, data)

    def feed() -> None:
        with contextlib.suppress(OSError):
            while data := connection.recv(65536):
                process.stdin.write(data)
            process.stdin.close()

    threads = [threading.Thread(target=relay, args=pair) for pair in ((OUT, process.stdout), (ERR, process.stderr))]
    for thread in [*threads, threading.Thread(target=feed, daemon=True)]:
        thread.start()
    code = process.wait()
    for thread in threads:
        thread.join(2)
    send(END, bytes([code % 256]))
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def connect(words: list[str]) -> int:
    """``ssh [-o option ...] host script``."""
    while words and words[0].startswith("-"):
        words = words[2:]
    host, script = words[0], " ".join(words[1:])
    try:
        connection = socket.create_connection((host, PORT), timeout=3)
    except OSError as error:
        print(f"ssh: connect to host {host} port {PORT}: {error}", file=sys.stderr)
        return 255
    connection.settimeout(None)
    connection.sendall(script.encode().hex().encode() + b"\n")
    buffer, inputs = b"", [connection, sys.stdin.buffer.raw]
    while True:
        for ready in select.select(inputs, [], [])[0]:
            if ready is not connection:
                data = os.read(0, 65536)
                if data:
                    connection.sendall(data)
                else:
                    inputs.remove(ready)
                    connection.shutdown(socket.SHUT_WR)
                continue
            data = connection.recv(65536)
            if not data:
                return 255
            buffer += data
            while len(buffer) >= 5 and len(buffer) >= 5 + (size := int.from_bytes(buffer[1:5], "big")):
                kind, payload, buffer = buffer[0], buffer[5 : 5 + size], buffer[5 + size :]
                if kind == END:
                    return payload[0]
                os.write(kind, payload)


class Pair:
    """The two namespaces; `inside` prefixes a command, `cut` and `mend` act on the cable."""

    def __init__(self, name: str, directory: Path) -> None:
        self.names = (f"{name}0", f"{name}1")
        self.addresses = ("10.77.0.1", "10.77.0.2")
        self.bin = directory / "bin"
        self.bin.mkdir(parents=True)
        shell = self.bin / "ssh"
        shell.write_text(f'#!/bin/sh\nexec {sys.executable} -S {Path(__file__).resolve()} connect "$@"\n')
        shell.chmod(0o755)
        self._server: subprocess.Popen[bytes] | None = None

    def up(self) -> None:
        """Lay the cable and start the shell's server on the second machine."""
        for name in self.names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "veth0",
            "netns",
            self.names[0],
            "type",
            "veth",
            "peer",
            "name",
            "veth0",
            "netns",
            self.names[1],
        )
        for name, address in zip(self.names, self.addresses, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "veth0")
            ip("-n", name, "link", "set", "veth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        words = [*self.inside(1), sys.executable, "-S", __file__, "serve", self.addresses[1]]
        self._server = subprocess.Popen(words, start_new_session=True, env={**os.environ, "PATH": self.path})
        self.wait_for_server(1, PORT)

    def wait_for_server(self, node: int, port: int) -> None:
        """Until somebody listens on a port of machine `node`, as the first machine sees it."""
        knock = f"import socket; socket.create_connection(({self.addresses[node]!r}, {port}), timeout=5)"
        words = [*self.inside(0), sys.executable, "-S", "-c", knock]
        wait_until(lambda: not subprocess.run(words, check=False, stderr=subprocess.DEVNULL).returncode)

    @property
    def path(self) -> str:
        """Where our ssh is found before any other."""
        return f"{self.bin}:{os.environ['PATH']}"

    def inside(self, node: int) -> list[str]:
        """Words before a command that runs on machine `node`."""
        return ["ip", "netns", "exec", self.names[node]]

    def running(self) -> set[int]:
        """All processes on both machines, whatever they are."""
        found = [subprocess.run(["ip", "netns", "pids", name], check=True, capture_output=True) for name in self.names]
        return {int(pid) for one in found for pid in one.stdout.split()}

    def cut(self) -> None:
        """Pull the cable out: nothing is refused, nothing arrives."""
        ip("-n", self.names[1], "link", "set", "veth0", "down")

    def mend(self) -> None:
        """Plug it in again."""
        ip("-n", self.names[1], "link", "set", "veth0", "up")

    def down(self) -> None:
        """Take everything away."""
        if self._server is not None:
            self._server.kill()
            self._server.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


def ip(*words: str) -> None:
    """The ip command."""
    subprocess.run(["ip", *words], check=True, stderr=subprocess.PIPE)


def possible() -> str | None:
    """Why namespaces cannot be had here, or None."""
    if shutil.which("ip") is None:
        return "there is no ip command"
    name = f"ardist-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces are not permitted: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=False)
    return None


@contextlib.contextmanager
def two_nodes(directory: Path) -> Iterator[Pair]:
    """A pair of machines for the time of a test."""
    pair = Pair(f"ard{os.getpid() % 100000}-", directory)
    try:
        pair.up()
        yield pair
    finally:
        pair.down()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        sys.exit(connect(sys.argv[2:]))
