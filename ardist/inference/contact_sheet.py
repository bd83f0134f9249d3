"""Many clips on one picture, to be looked at."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image, ImageDraw

from ardist.errors import InvalidValueError

_MARGIN, _TITLE_HEIGHT = 4, 16


def contact_sheet(
    rows: Iterable[tuple[str, UInt8[ndarray, "_ _ _ 3"]]], path: Path, *, max_columns: int = 16, cell: int = 96
) -> None:
    """A PNG with one titled row per clip, time running to the right.

    Args:
        rows: (title, RGB frames); clips longer than `max_columns` are thinned out evenly, first and last frame kept.
        cell: height of a frame on the sheet in pixels.

    Raises:
        InvalidValueError: no row, or a row without frames.
    """
    strips = [(title, _strip(frames, max_columns, cell)) for title, frames in rows]
    if not strips:
        raise InvalidValueError("a contact sheet needs at least one row")
    width = max(strip.width for _, strip in strips) + 2 * _MARGIN
    height = sum(strip.height + _TITLE_HEIGHT + _MARGIN for _, strip in strips) + _MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN
    for title, strip in strips:
        draw.text((_MARGIN, top), title, fill="black")
        sheet.paste(strip, (_MARGIN, top + _TITLE_HEIGHT))
        top += strip.height + _TITLE_HEIGHT + _MARGIN
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    sheet.save(temporary, format="PNG")
    os.replace(temporary, path)


def _strip(frames: UInt8[ndarray, "f h w 3"], max_columns: int, cell: int) -> Image.Image:
    if not len(frames):
        raise InvalidValueError("a row of a contact sheet needs at least one frame")
    chosen = np.linspace(0, len(frames) - 1, min(len(frames), max_columns)).round().astype(int)
    width = max(1, round(cell * frames.shape[2] / frames.shape[1]))
    strip = Image.new("RGB", (len(chosen) * (width + 1) - 1, cell), "white")
    for column, index in enumerate(chosen):
        picture = Image.fromarray(frames[index]).resize((width, cell), Image.Resampling.BICUBIC)
        strip.paste(picture, (column * (width + 1), 0))
    return strip
