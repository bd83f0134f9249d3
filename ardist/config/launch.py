"""What the launcher does when ranks die, hang or vanish."""

from __future__ import annotations

from pydantic import Field

from ardist.config.base import Section


class LaunchConfig(Section):
    """Watchdog and automatic restarts of launchers/train.sh; of no effect on what is learned."""

    max_restarts: int = Field(
        10, ge=0, description="restarts in a row without a new checkpoint in between; 0: never restart"
    )
    restart_pause_seconds: float = Field(
        1.0, ge=0, description="pause before a restart; doubled, up to a minute, for each one without a new checkpoint"
    )
    heartbeat_seconds: float = Field(30, gt=0, description="a rank without a sign of life for so long is stopped")
    step_seconds: float = Field(600, gt=0, description="longest time in a step without any progress of any rank")
    data_seconds: float = Field(900, gt=0, description="longest wait for data; storage has time limits of its own")
    other_seconds: float = Field(
        1800, gt=0, description="longest start, validation or checkpoint; the first step, which may compile, is start"
    )
    node_seconds: float = Field(30, gt=0, description="a machine without a sign of life for so long is cut off")
    grace_seconds: float = Field(120, gt=0, description="time to save when the launcher itself was killed")
    min_nodes: int = Field(1, ge=1, description="fewest machines of the hostfile to go on with when others are lost")
