"""Classes and captions: from the folder a video lies in, or from a CSV or JSONL file."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ardist.data.sample import MAX_CAPTION
from ardist.errors import ConfigError
from ardist.storage import open_storage
from data_tools.reasons import Reason, Refusal

_NAME = ("path", "video", "file", "source")
_CLASS = ("label", "class")
_CAPTION = ("caption", "text")


@dataclass(frozen=True)
class Label:
    """What is known about one video."""

    class_name: str | None = None
    caption: str | None = None


@dataclass(frozen=True)
class Labels:
    """Labels by the video's name relative to the root; `digest` identifies the file they came from."""

    by_name: Mapping[str, Label]
    digest: str

    def of(self, name: str) -> Label:
        """The label of a video; raises `Refusal` when the file does not mention it or its words are unusable."""
        label = self.by_name.get(name)
        if label is None:
            raise Refusal(Reason.LABEL, "the labels file does not mention this video")
        if label.class_name is not None and not _is_text(label.class_name):
            raise Refusal(Reason.LABEL, "the class name is no text: UTF-8 has no bytes for it")
        if label.caption is not None:
            if len(label.caption) > MAX_CAPTION:
                raise Refusal(Reason.CAPTION, f"the caption has {len(label.caption)} characters; legal: {MAX_CAPTION}")
            if not label.caption.strip() or "\ufffd" in label.caption or not _is_text(label.caption):
                raise Refusal(Reason.CAPTION, "the caption is empty or not UTF-8 text")
        return label


def read_labels(address: str) -> Labels:
    """Read a labels file: CSV with a header line, or JSONL; columns path and label and/or caption.

    Raises `ConfigError` for a file without the needed columns or with contradicting lines for one video.
    """
    parent, _, name = address.rpartition("/")
    data = open_storage(parent or ("/" if address.startswith("/") else ".")).read(name)
    text = data.decode("utf-8", errors="replace").removeprefix("\ufeff")
    rows = _jsonl(text, address) if name.lower().endswith((".jsonl", ".json", ".ndjson")) else _table(text, address)
    found: dict[str, Label] = {}
    for number, row in rows:
        path = _pick(row, _NAME)
        label = Label(_pick(row, _CLASS), _pick(row, _CAPTION))
        if path is None or label == Label():
            raise ConfigError(
                f"{address} line {number}: needs a path ({'/'.join(_NAME)}) and a label ({'/'.join(_CLASS)}) "
                f"or caption ({'/'.join(_CAPTION)}); it has {', '.join(map(str, row)) or 'nothing'}"
            )
        path = path.removeprefix("./")
        if found.setdefault(path, label) != label:
            raise ConfigError(f"{address} line {number}: another line gives {path!r} another label")
    if not found:
        raise ConfigError(f"{address} holds no labels")
    return Labels(found, hashlib.sha256(data).hexdigest())


def _is_text(words: str) -> bool:
    """Whether they can be written: half a surrogate pair, which JSON can escape, has no bytes."""
    try:
        words.encode()
    except UnicodeEncodeError:
        return False
    return True


def _pick(row: Mapping[str, Any], names: Iterable[str]) -> str | None:
    for name in names:
        value = row.get(name)
        if value is not None and str(value) != "":
            return str(value)
    return None


def _jsonl(text: str, address: str) -> Iterable[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):  # other ends of lines may stand within a string of JSON
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{address} line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ConfigError(f"{address} line {number} is not a JSON object")
        yield number, row


def _table(text: str, address: str) -> Iterable[tuple[int, Mapping[str, Any]]]:
    separator = "\t" if address.lower().endswith(".tsv") else ","
    reader = csv.DictReader(io.StringIO(text), delimiter=separator)
    for row in reader:
        yield reader.line_num, {str(name).strip().lower(): value for name, value in row.items() if name is not None}
