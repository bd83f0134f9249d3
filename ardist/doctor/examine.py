"""The whole examination, in the order in which one thing needs another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from ardist.config import TrainConfig, load_config
from ardist.doctor import clocks, network, places, software
from ardist.doctor.findings import Finding, Level, bad
from ardist.errors import ArdistError, ConfigError, HardwareError

Check = Callable[[], Iterator[Finding]]


def examine(
    config_path: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    hostfile: Path | None = None,
    shell: str = "ssh",
) -> list[Finding]:
    """Examine this machine, with a configuration its data and disk too, with a hostfile all its machines.

    A check that fails in a way nobody foresaw is itself a finding. Raises `ConfigError` for a hostfile without a
    configuration, and for a configuration that cannot be read.
    """
    if hostfile is not None and config_path is None:
        raise ConfigError("a hostfile is examined together with a configuration: ardist doctor CONFIG --hostfile FILE")
    checks: list[Check] = [
        software.python_and_packages,
        software.devices,
        software.attention_backends,
        software.ffmpeg,
        places.shared_memory,
        clocks.this_clock,
        network.this_machine,
    ]
    if config_path is not None:
        config = load_config(TrainConfig, config_path, overrides)
        checks += [
            partial(places.run_directory, config),
            partial(places.data, config),
            partial(places.checkpoints, config),
            partial(clocks.store_clocks, config),
        ]
        if hostfile is not None:
            path, file = str(config_path), hostfile
            checks.append(partial(network.machines, config, path, overrides, file, shell))
    return [finding for check in checks for finding in _run(check)]


def _run(check: Check) -> list[Finding]:
    findings: list[Finding] = []
    name = getattr(check, "func", check).__name__.replace("_", " ")
    try:
        findings.extend(check())
    except ArdistError as error:
        findings.append(bad(name, str(error), "see the message"))
    except Exception as error:  # noqa: BLE001 - an examination does not end because one check of it broke
        words = f"{type(error).__name__}: {error}"
        findings.append(bad(name, words, "this check itself failed: please report it"))
    return findings


def require_fit(findings: Sequence[Finding]) -> None:
    """Raise `HardwareError` (exit code 4) when training cannot work."""
    broken = [finding.subject for finding in findings if finding.level is Level.BAD]
    if broken:
        raise HardwareError(f"training cannot work here: {', '.join(broken)}")
