"""Small JSON objects that carry a digest of themselves, so that damage to any byte that matters is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ardist.errors import DataError


def seal(fields: Mapping[str, Any]) -> bytes:
    """One line of JSON with the fields and their digest."""
    return json.dumps({"digest": _digest(fields), **fields}, separators=(",", ":")).encode()


def unseal(data: bytes, source: str) -> dict[str, Any]:
    """The fields; raises `DataError`, naming `source`, unless they are exactly what was sealed."""
    try:
        fields = json.loads(data)
        sealed = fields.pop("digest")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{source} is damaged: {error}") from None
    if sealed != _digest(fields) or data != seal(fields):
        raise DataError(f"{source} is damaged: its content does not have the digest that it states")
    return dict(fields)


def _digest(fields: Mapping[str, Any]) -> str:
    text = json.dumps(dict(fields), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
