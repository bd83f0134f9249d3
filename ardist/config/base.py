"""The base of every configuration section: frozen, typed, and closed against unknown keys."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen configuration section in which an unknown key, an infinity and a NaN are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )

    def digest(self) -> str:
        """sha256 (64 hex digits) of the section's canonical JSON; equal configurations have equal digests."""
        return canonical_digest(self.model_dump(mode="json"))


def canonical_digest(value: Any) -> str:
    """sha256 of `value` as JSON with sorted keys and no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
