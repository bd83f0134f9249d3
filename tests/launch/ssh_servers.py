"""A real sshd on each of two machines that are namespaces, with throwaway keys, for pdsh."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from two_nodes import Pair, possible

PORT = 2201


def missing() -> str | None:
    """Why pdsh cannot be tried here, or None."""
    for program in ("pdsh", "ssh", "ssh-keygen", "sshd"):
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None:
            return f"there is no {program}"
    if os.geteuid():
        return "sshd needs root here"
    return possible()


@contextlib.contextmanager
def ssh_servers(pair: Pair, directory: Path) -> Iterator[dict[str, str]]:
    """Serve on both machines; the environment in which pdsh finds its way to them."""
    directory.mkdir()
    directory.chmod(0o700)
    host, user = directory / "host", directory / "user"
    for key in (host, user):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    words = [str(shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")), "-D", "-f", os.devnull, "-h", str(host)]
    settings = {"Port": PORT, "PidFile": "none", "UsePAM": "no", "StrictModes": "no", "PermitRootLogin": "yes"}
    settings["AuthorizedKeysFile"] = f"{user}.pub"
    for name, value in settings.items():
        words += ["-o", f"{name}={value}"]
    servers = [subprocess.Popen([*pair.inside(node), *words], start_new_session=True) for node in range(2)]
    options = f"-i {user} -p {PORT} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    environment = {**os.environ, "PDSH_SSH_ARGS_APPEND": f"{options} -o ConnectTimeout=5 -o BatchMode=yes"}
    try:
        for node in range(2):
            pair.wait_for_server(node, PORT)
        yield environment
    finally:
        for server in servers:
            server.kill()
            server.wait()
