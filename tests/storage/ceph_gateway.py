"""A Ceph object gateway on loopback: one monitor, one store in memory, one S3 endpoint, shared by a whole test run.

``python ceph_gateway.py FOLDER`` keeps the daemons running, as its own children, for as long as anybody holds a shared
lock on FOLDER/users. So several test processes use one server, and none is left behind, however its users ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("radosgw", "radosgw-admin", "ceph-mon", "ceph-osd", "ceph", "ceph-authtool", "monmaptool")
ACCESS_KEY, SECRET_KEY = "AKTEST", "SKTESTSKTEST"
START_SECONDS = 120.0
TRIES = 3
"""Times that the daemons are started, each with ports of its own."""

KEYS = {
    "mon.": {"mon": "allow *"},
    "client.admin": {"mon": "allow *", "osd": "allow *", "mgr": "allow *"},
    "osd.0": {"mon": "allow profile osd", "osd": "allow *", "mgr": "allow profile osd"},
    "client.rgw": {"mon": "allow rw", "osd": "allow rwx"},
}
"""Who may do what among the daemons; the gateway itself checks the signature of every S3 request."""

CONFIGURATION = """\
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]
mon initial members = a
public addr = 127.0.0.1
public network = 127.0.0.0/8
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {folder}/keyring
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
mon allow pool size one = true
osd crush chooseleaf type = 0
osd max object name len = 2048
osd max object namespace len = 256
osd objectstore = memstore
memstore device bytes = 4294967296
admin socket = {folder}/$name.asok
log file = {folder}/$name.log
run dir = {folder}
mon data = {folder}/mon
osd data = {folder}/osd
rgw data = {folder}/rgw
setuser match path =
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
"""


def missing() -> str | None:
    """Why Ceph cannot be used here, or None."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def version() -> str:
    """The gateway's version, such as 16.2.15."""
    said = subprocess.run(["radosgw", "--version"], capture_output=True, text=True, check=True).stdout.split()
    return said[2] if len(said) > 2 else "of an unknown version"


@contextlib.contextmanager
def gateway(folder: Path) -> Iterator[str]:
    """The endpoint of the gateway of `folder`, started by whoever comes first and ended after the last."""
    folder.mkdir(parents=True, exist_ok=True)
    users = os.open(folder / "users", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with (folder / "starting").open("w") as starting:
            fcntl.flock(starting, fcntl.LOCK_EX)
            fcntl.flock(users, fcntl.LOCK_SH)
            if not (folder / "endpoint").exists():
                _launch(folder)
        yield (folder / "endpoint").read_text()
    finally:
        os.close(users)


def _launch(folder: Path) -> None:
    """Start the keeper and wait until the gateway answers."""
    with (folder / "keeper.log").open("wb") as log:
        keeper = subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_SECONDS
    while not (folder / "endpoint").exists():
        if keeper.poll() is not None or time.monotonic() > deadline:
            keeper.kill()
            words = (folder / "keeper.log").read_text(errors="replace")[-2000:]
            raise RuntimeError(f"the Ceph gateway did not start within {START_SECONDS:g} s:\n{words}")
        time.sleep(0.1)


def _keep(folder: Path) -> None:
    """Run the daemons until nobody uses them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for attempt in range(TRIES):
        data = Path(tempfile.mkdtemp(dir=folder, prefix="d"))
        try:
            return _serve(folder, data)
        except DaemonEndedError as error:
            print(error, flush=True)
            if attempt == TRIES - 1:
                raise
        finally:
            shutil.rmtree(data, ignore_errors=True)


class DaemonEndedError(RuntimeError):
    """A daemon ended by itself: somebody else may listen on a port that was chosen for it, which it cannot hold."""


def _serve(folder: Path, data: Path) -> None:
    """Daemons with everything of theirs in `data`; the endpoint is named in `folder` while there are users."""
    ports = _free_ports(3)
    fsid = str(uuid.uuid4())
    for name in ("mon", "osd", "rgw"):
        (data / name).mkdir()
    text = CONFIGURATION.format(folder=data, fsid=fsid, v2=ports[0], v1=ports[1], port=ports[2])
    (data / "ceph.conf").write_text(text)
    os.environ["CEPH_CONF"] = str(data / "ceph.conf")
    address = f"[v2:127.0.0.1:{ports[0]},v1:127.0.0.1:{ports[1]}]"
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for name, capabilities in KEYS.items():
            grants = [word for kind, what in capabilities.items() for word in ("--cap", kind, what)]
            create = [] if (data / "keyring").exists() else ["--create-keyring"]
            _run("ceph-authtool", f"{data}/keyring", *create, "--gen-key", "-n", name, *grants)
        _run("monmaptool", "--create", "--addv", "a", address, "--fsid", fsid, f"{data}/monmap")
        _run("ceph-mon", "-i", "a", "--mkfs", "--monmap", f"{data}/monmap", "--keyring", f"{data}/keyring")
        daemons.append(_daemon("ceph-mon", "-i", "a", "-f"))
        identity = str(uuid.uuid4())
        _run_with(daemons, "ceph", "osd", "new", identity)
        _run("ceph", "osd", "crush", "add", "osd.0", "1.0", "root=default")
        _run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", identity)
        daemons.append(_daemon("ceph-osd", "-i", "0", "-f"))
        daemons.append(_daemon("radosgw", "-n", "client.rgw", "-f"))
        endpoint = f"http://127.0.0.1:{ports[2]}"
        _wait_for(endpoint, daemons)
        _run(
            *("radosgw-admin", "user", "create", "--uid", "tests", "--display-name", "tests"),
            *("--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY),
        )
        (folder / "endpoint.new").write_text(endpoint)
        (folder / "endpoint.new").rename(folder / "endpoint")
        with (folder / "users").open("r+") as users:
            fcntl.flock(users, fcntl.LOCK_EX)
            (folder / "endpoint").unlink()
    finally:
        for daemon in reversed(daemons):
            daemon.kill()  # what they hold in memory is of no use to anybody
            daemon.wait()


def _run(*words: str) -> None:
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, timeout=START_SECONDS)


def _run_with(daemons: list[subprocess.Popen[bytes]], *words: str) -> None:
    """Run a command that needs the daemons, and would wait for one that is no more."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + START_SECONDS
    try:
        while process.poll() is None:
            _check(daemons)
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(words, START_SECONDS)
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, words)


def _check(daemons: list[subprocess.Popen[bytes]]) -> None:
    for daemon in daemons:
        if daemon.poll() is not None:
            raise DaemonEndedError(f"{daemon.args!r} ended with {daemon.returncode}")


def _daemon(*words: str) -> subprocess.Popen[bytes]:
    keeper = os.getpid()

    def die_with_keeper() -> None:
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != keeper:
            os._exit(1)

    return subprocess.Popen(words, stdout=subprocess.DEVNULL, preexec_fn=die_with_keeper)


def _wait_for(endpoint: str, daemons: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        _check(daemons)  # before the answer is believed: somebody else's server answers too
        try:
            urllib.request.urlopen(endpoint, timeout=5).close()
            return
        except urllib.error.HTTPError:
            return  # it refuses us, so it is there
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now; all are held until the last is chosen, so they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


if __name__ == "__main__":
    _keep(Path(sys.argv[1]))
