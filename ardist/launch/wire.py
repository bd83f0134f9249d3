"""What the supervisor and the agent of another machine say to each other: JSON lines over the remote shell's pipes.

Nothing but the agent's program name is ever part of a command line there, so no word of the user meets a shell.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import time
from typing import Any

from ardist.launch.engines import Host, Placement
from ardist.launch.nodes import State
from ardist.launch.watchdog import Failure
from ardist.training.heartbeat import Beat, Phase

_TIMES = ("beat", "progress_time", "ended")


def pack_state(state: State) -> dict[str, Any]:
    """A state with ages in place of times: clocks of two machines have nothing in common."""
    now, beats = time.monotonic(), []
    for beat in state.beats:
        values = dataclasses.asdict(beat)
        beats.append(values | {name: now - values[name] for name in _TIMES} | {"phase": int(beat.phase)})
    failure = None if state.failure is None else dataclasses.asdict(state.failure)
    return {"beats": beats, "failure": failure, "exit_code": state.exit_code}


def unpack_state(values: dict[str, Any]) -> State:
    """The state again, in this machine's time."""
    now = time.monotonic()
    beats = [
        Beat(**{**beat, **{name: now - beat[name] for name in _TIMES}, "phase": Phase(beat["phase"])})
        for beat in values["beats"]
    ]
    failure = None if values["failure"] is None else Failure(**values["failure"])
    return State(beats, failure, values["exit_code"])


def pack_placement(placement: Placement) -> dict[str, Any]:
    """A placement as JSON."""
    return dataclasses.asdict(placement)


def unpack_placement(values: dict[str, Any]) -> Placement:
    """A placement from JSON."""
    hosts = tuple(Host(**host) for host in values["hosts"])
    return Placement(hosts, values["node"], values["master_addr"], values["master_port"])


def encode(message: dict[str, Any]) -> str:
    """A message as one word that means nothing to any shell."""
    return base64.urlsafe_b64encode(json.dumps(message).encode()).decode()


def decode(word: str) -> dict[str, Any]:
    """The message of such a word."""
    message: dict[str, Any] = json.loads(base64.urlsafe_b64decode(word))
    return message


def line(message: dict[str, Any]) -> bytes:
    """One message."""
    return json.dumps(message).encode() + b"\n"
