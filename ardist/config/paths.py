"""Paths as people write them: ``~`` and environment variables are filled in once, when a configuration is read."""

from __future__ import annotations

import os
import re
from typing import Annotated

from pydantic import AfterValidator

_VARIABLE = re.compile(r"\$(?:\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))")


def fill_in(text: str) -> str:
    """The path with ``~``, ``$NAME`` and ``${NAME}`` filled in; ValueError for a variable that is not set."""
    missing = [name for match in _VARIABLE.finditer(text) if (name := match[1] or match[2]) not in os.environ]
    if missing:
        raise ValueError(f"the environment variable {missing[0]} is not set; legal: a path, with variables that are")
    filled = _VARIABLE.sub(lambda match: os.environ[match[1] or match[2]], text)
    return filled if "://" in filled else os.path.expanduser(filled)


PathText = Annotated[str, AfterValidator(fill_in)]
"""A folder, file or URL in a configuration."""
