"""What an output is for: written by the first builder, compared by all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ardist.data.manifest import MANIFEST_NAME
from ardist.errors import ConfigError
from ardist.storage import Storage
from data_tools import layout
from data_tools.parameters import BuildParameters
from data_tools.sealed import seal, unseal


@dataclass(frozen=True)
class Claim:
    """What an output folder is for; the first builder writes it, all others compare."""

    videos: str
    parameters: BuildParameters

    def settings(self) -> dict[str, Any]:
        """Flat names and values, for a comparison that people can read."""
        fields = self.parameters.model_dump(mode="json")
        encoder = fields.pop("encoder")
        return {"videos": self.videos, **{f"encoder.{name}": value for name, value in encoder.items()}, **fields}


def take(out: Storage, claim: Claim) -> None:
    """Write the claim, or check that the one that stands is the same; `ConfigError` shows the difference."""
    ours = seal(claim.settings())
    if not out.exists(layout.CLAIM) and any(out.exists(name) for name in (MANIFEST_NAME, layout.PLAN, layout.OLD_PLAN)):
        raise ConfigError(f"{out.url} holds another dataset that this tool did not build; choose another --out")
    if out.create(layout.CLAIM, ours):
        return
    standing = unseal(out.read(layout.CLAIM), f"{out.url}/{layout.CLAIM}")
    settings = claim.settings()
    different = [name for name in {**standing, **settings} if standing.get(name) != settings.get(name)]
    if different:
        lines = [f"  {name}: built with {standing.get(name)!r}, asked for {settings.get(name)!r}" for name in different]
        raise ConfigError(
            f"{out.url} holds a dataset with other parameters; choose another --out or the same parameters\n"
            + "\n".join(lines)
        )
