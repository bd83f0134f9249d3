"""The examination: what is good is said, what is bad is said with what to do about it, and secrets are not said."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny import settings, tiny_config, write_latents
from yaml import safe_dump

from ardist.doctor import examine as examination
from ardist.doctor import network, places, software
from ardist.doctor.findings import Finding, Level, bad, findings_table, good
from ardist.errors import ConfigError, HardwareError


def levels(findings: Iterator[Finding]) -> dict[str, Level]:
    return {finding.subject: finding.level for finding in findings}


def test_packages_and_their_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(levels(software.python_and_packages()).values()) == {Level.GOOD}
    versions = {"deepspeed": "0.1", "torch": "1.0"}

    def version(name: str) -> str:
        if name == "boto3":
            raise PackageNotFoundError(name)
        return versions.get(name, "99")

    monkeypatch.setattr(software, "version", version)
    findings = {finding.subject: finding for finding in software.python_and_packages()}
    assert findings["deepspeed"].level is findings["torch"].level is findings["boto3"].level is Level.BAD
    assert findings["boto3"].detail == "not installed"
    assert "deepspeed<0.20,>=0.19.8" in findings["deepspeed"].advice


def test_attention_backends_run_once_and_a_wrong_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {finding.subject: finding for finding in software.attention_backends()}
    assert found["attention sdpa"].level is Level.GOOD
    assert "differs by" in found["attention sdpa"].detail
    assert found["attention flex"].level is Level.WEAK, "it has no gradients on a CPU"
    real = software.attention

    def wrong(*tensors: Any, backend: str) -> Any:
        if backend == "flash":
            raise RuntimeError("no kernel image")
        return real(*tensors, backend=backend) + (backend == "sdpa")

    monkeypatch.setattr(software, "attention", wrong)
    found = {finding.subject: finding for finding in software.attention_backends()}
    assert found["attention sdpa"].level is Level.BAD
    assert "no kernel image" in found["attention flash"].detail


def test_room_for_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path / "deep" / "run", tmp_path)
    assert levels(places.run_directory(config)) == {"run directory": Level.GOOD}
    assert not (tmp_path / "deep").exists(), "an examination leaves nothing behind"
    monkeypatch.setattr(places.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 1000}))
    [finding] = places.run_directory(config)
    assert finding.level is Level.BAD
    assert "checkpoint.keep" in finding.advice


def test_data_that_is_there_or_not(tmp_path: Path) -> None:
    data = write_latents(tmp_path / "latents")
    assert set(levels(places.data(tiny_config(tmp_path / "run", data))).values()) == {Level.GOOD}
    [finding] = places.data(tiny_config(tmp_path / "run", tmp_path / "absent"))
    assert finding.level is Level.BAD


def test_credentials_are_named_by_their_source_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    assert places._credentials().level is Level.WEAK
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "canary-of-the-test")
    assert places._credentials().detail == "from the environment"
    assert "canary" not in repr(places._credentials())


@pytest.mark.distributed
def test_ranks_of_this_machine_meet() -> None:
    [finding] = network.this_machine()
    assert finding.level is Level.GOOD, finding
    assert "gloo over 2 ranks" in finding.detail


def test_a_check_that_breaks_is_a_finding_and_the_end_has_code_4(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[Finding]:
        yield good("before", "")
        raise ZeroDivisionError("unforeseen [x]")

    found = examination._run(broken)
    assert [finding.level for finding in found] == [Level.GOOD, Level.BAD]
    assert examination._run(functools.partial(broken)) == found, "the checks of a configuration are such ones"
    examination.require_fit(found[:1])
    with pytest.raises(HardwareError, match="training cannot work here: broken") as error:
        examination.require_fit(found)
    assert error.value.exit_code == 4
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(findings_table([*found, bad("[odd]", "[/]", "[b]do this[/b]")]))
    text = console.export_text()
    assert "unforeseen [x]" in text
    assert "[b]do this[/b]" in text, "what was found is no markup"


def test_a_hostfile_needs_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ardist doctor CONFIG --hostfile"):
        examination.examine(hostfile=tmp_path / "hosts")


@pytest.mark.distributed
def test_machines_that_are_not_there(tmp_path: Path) -> None:
    data = write_latents(tmp_path / "latents")
    path = tmp_path / "config.yaml"
    path.write_text(safe_dump(settings(tmp_path / "run", data, launch={"node_seconds": 3})))
    (tmp_path / "hosts").write_text("nowhere.invalid slots=1\n")
    config = tiny_config(tmp_path / "run", data, launch={"node_seconds": 3})
    findings = list(network.machines(config, str(path), [], tmp_path / "hosts", "false"))
    assert [finding.level for finding in findings] == [Level.BAD, Level.BAD]
    assert "keys, names and the same folder" in findings[0].advice
