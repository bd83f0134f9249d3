"""Hostfiles, machines that do not agree, ports, and every word that is refused before anything is started."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tiny import settings, tiny_config

from ardist.code_digest import code_digest
from ardist.errors import ConfigError, HardwareError
from ardist.launch import cluster, hosts, local
from ardist.launch import main as program
from ardist.launch.cluster import Cluster, Order
from ardist.launch.engines import Host
from ardist.launch.hosts import fitting, interface_of, is_here, read_hostfile
from ardist.launch.remote import RemoteNode, remote_words


def test_a_hostfile_is_read(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# machines\na slots=8\n\n10.0.0.2  slots = 4 # the old\u2028one\n", encoding="utf-8")
    assert read_hostfile(file) == (Host("a", 8), Host("10.0.0.2", 4))
    assert read_hostfile(file, 1) == (Host("a", 8),)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a slots=2\na slots=2\n", "line 2: a is named twice"),
        ("a\n", "is not of the form 'name slots=8'"),
        ("a slots=0\n", "legal: 1 and more"),
        ("-oProxyCommand=x slots=1\n", "not of the form"),
        ("a;b slots=1\n", "not of the form"),
        ("-a slots=1\n", "begins with a dash"),
        ("# nobody\n", "it names no machine"),
    ],
)
def test_a_bad_hostfile_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError, match=problem):
        read_hostfile(tmp_path / "hosts")


def test_all_bad_lines_come_in_one_message(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a\nb\nc slots=x\n")
    with pytest.raises(ConfigError) as refused:
        read_hostfile(tmp_path / "hosts")
    assert [str(refused.value).count(f"line {number}") for number in (1, 2, 3)] == [1, 1, 1]


def test_this_machine_is_known_by_its_names() -> None:
    assert is_here("localhost")
    assert is_here("127.0.0.1")
    assert is_here(socket.gethostname())
    assert not is_here("192.0.2.77")
    assert not is_here("nowhere.invalid")
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.77") is None


@pytest.mark.parametrize(
    ("slots", "batch", "expected"),
    [((2, 2, 2), 48, (2, 2, 2)), ((2, 2), 6, (2, 1)), ((4, 4), 7, (4, 3)), ((3, 3), 4, (3, 1)), ((1,), 5, (1,))],
)
def test_as_many_ranks_as_divide_the_batch(slots: tuple[int, ...], batch: int, expected: tuple[int, ...]) -> None:
    chosen = fitting([Host(f"m{number}", count) for number, count in enumerate(slots)], batch)
    assert tuple(host.slots for host in chosen) == expected


def test_a_port_in_use_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(HardwareError, match=f"port {port} of this machine cannot be used"):
            local.check_port(port)
    local.check_port(port)


def test_no_word_of_the_user_is_in_the_remote_command() -> None:
    words = remote_words("ssh", "node1", "/opt/my python/bin/python", "/data/it's here")
    assert words[0] == "ssh"
    assert words[-1] == "cd '/data/it'\"'\"'s here' && exec '/opt/my python/bin/python' -m ardist.launch.agent"
    assert remote_words("srun", "node1", "python", "/x")[-3:-1] == ["bash", "-c"]


class Silent(RemoteNode):
    """A machine that only answers, as it is told."""

    answers: ClassVar[dict[str, dict[str, Any]]] = {}

    def __init__(self, name: str, shell: str, node_seconds: float) -> None:
        self.name = name

    def greet(self, *words: Any, **named: Any) -> dict[str, Any]:
        answer = self.answers[self.name]
        if "unreachable" in answer:
            raise HardwareError(f"machine {self.name} cannot be reached")
        return answer

    def kill(self) -> None:
        pass


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"code": "f" * 64}, ConfigError, "b has another code: ffffffffffff"),
        ({"config": "e" * 64}, ConfigError, "b has another config: eeeeeeeeeeee"),
        ({"problem": "cannot read 'x.yaml'"}, ConfigError, "b: cannot read 'x.yaml'"),
        ({"gpus": 4}, ConfigError, "b has 4 GPUs, the hostfile gives it slots=8"),
        ({"unreachable": True}, HardwareError, "machine b cannot be reached"),
    ],
)
def test_machines_that_do_not_fit_are_refused_before_any_rank_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], error: type[Exception], text: str
) -> None:
    config = tiny_config(tmp_path / "run", tmp_path, training__global_batch_size=16)
    good = {"code": code_digest(), "config": config.digest(), "problem": None, "gpus": 8, "free_port": 1}
    monkeypatch.setattr(Silent, "answers", {"a": good, "b": {**good, **changes}})
    monkeypatch.setattr(cluster, "RemoteNode", Silent)
    monkeypatch.setattr(cluster, "start_here", lambda *words, **named: pytest.fail("a rank was started"))
    job = Cluster(Order(config, "c.yaml", ()), (Host("a", 8), Host("b", 8)), "ssh", None, None)
    with pytest.raises(error, match=text):
        job.start(1, "job")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--ranks", "0"], "legal: 1 and more"),
        (["--ranks", "3"], "legal numbers of ranks: [1, 2, 4, 8]"),
        (["--master-port", "0"], "legal: 1 to 65535"),
        (["--node-rank", "1"], "--node-rank needs --hostfile or --no-ssh"),
        (["--no-ssh"], "--no-ssh needs --hostfile, or --num-nodes"),
        (["--no-ssh", "--num-nodes", "2"], "--node-rank of 0 to 1"),
        (["--no-ssh", "--num-nodes", "2", "--node-rank", "0"], "needs --master-addr"),
        (["--hostfile", "HOSTS", "--ranks", "4"], "more than the slots=2 of localhost"),
        (["--hostfile", "HOSTS"], "the hostfile names localhost beside other machines"),
        (["--hostfile", "HOSTS", "--num-nodes", "3"], "legal: 1 to 2"),
    ],
)
def test_words_that_do_not_fit_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], text: str
) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps(settings(tmp_path / "run", tmp_path)))
    (tmp_path / "hosts").write_text("localhost slots=2\nb slots=2\n")
    words = [str(tmp_path / "hosts") if word == "HOSTS" else word for word in words]
    assert program.main([*words, str(tmp_path / "run.yaml")]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_port_in_use_ends_before_any_rank_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps(settings(tmp_path / "run", tmp_path)))
    monkeypatch.setattr(cluster, "LocalNode", lambda *words: pytest.fail("a rank was started"))
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert program.main(["--ranks", "1", "--master-port", port, str(tmp_path / "run.yaml")]) == 4
    assert capsys.readouterr().err.count(f"port {port} of this machine cannot be used") == 1


def test_names_are_looked_up_once_they_are_no_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts.socket, "getaddrinfo", lambda *words: [(0, 0, 0, "", ("127.0.0.1", 0))])
    assert is_here("an-alias")
